"""How well a GPT listens: suites of questions and what their answers are worth, and a measure for any training loop."""

from omni_adapters.eval.listening import listening_gap

__all__ = ["listening_gap"]
