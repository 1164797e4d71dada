"""Frozen encoders: a signal in, `Features` out. Import each from its own module."""
