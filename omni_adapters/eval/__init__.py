"""What a GPT with ears has heard: measures to ask of any training loop."""

from omni_adapters.eval.listening import listening_gap

__all__ = ["listening_gap"]
