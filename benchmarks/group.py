"""What a benchmark hands to the suite: variants of one computation at one size, ready to run.

A benchmark module has `groups(suite, device)`, a generator: each group is built when the one before has been measured and let
go of. The suite measures time, memory and launches; what is counted or compared (flops, bytes, error) comes with the variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Suite = Literal["quick", "full"]
Device = Literal["cpu", "cuda"]


class Variant(NamedTuple):
    """One way to compute. `step` runs it once, forward and backward where it trains; None where it cannot run here, and
    `why` says why not: its row is "n/a"."""

    name: str
    step: Callable[[], Any] | None = None
    why: str = ""
    error: float | None = None       # largest error against fp64, relative; None where a variant has nothing to be wrong about
    flops: float | None = None       # of one step, counted
    bytes: float | None = None       # read and written by one step at least, counted
    saved_bytes: int | None = None   # that autograd holds between forward and backward
    trained: Sequence[Tensor] = ()   # whose gradients a step lets go of first: they are no part of its peak


class Group(NamedTuple):
    bench: str                       # the module: "loss", "lora", …
    case: str                        # the size and what is special about it
    baseline: str                    # the variant that ratios are taken against: its time ÷ this one's
    variants: list[Variant]
    bound: float | None = None       # a row with a larger error is invalid, however fast


def worst(values: Iterable[float]) -> float:
    """The largest, or NaN where one is NaN: Python's own `max` may drop it, and a NaN error is no small one."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())
