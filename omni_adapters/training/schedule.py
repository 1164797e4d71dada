"""The learning rate over a run: linear warm-up, then half a cosine down to a floor."""

from __future__ import annotations

import math


def warmup_cosine(step: int, num_steps: int, num_warmup: int, floor: float = 0.0) -> float:
    """What to multiply a base rate by at `step` (from 0) of `num_steps`: (step + 1) / num_warmup while warming up, so that
    even the first step moves, then floor + (1 − floor)·(1 + cos πp) / 2 with p from 0 to just below 1."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
