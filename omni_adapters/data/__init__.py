"""From audio files and sentences to batches. Import each part from its own module."""
