"""Batches in few shapes: torch.compile makes a graph for each shape of its inputs.

Steps of sound are rounded up to 2ⁿ or 3 · 2ⁿ⁻¹, by less than half and by a sixth on average, text and rows to 2ⁿ. Transcripts of
clips of similar length make few shapes, free answers to clips of any length many tens. What is added is never looked at: frames
beyond `lens`, text that is not graded, rows with neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, shape

LEAST = 32  # steps of text or sound: shorter buckets would save less than a compilation costs


def next_power(size: int, least: int = 1) -> int:
    """The smallest of 1, 2, 4, 8, … that is neither below `size` nor below `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def bucket(size: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is neither below `size` nor below `least`."""
    power = next_power(size, least)
    return power * 3 // 4 if power >= 4 and max(size, least) <= power * 3 // 4 else power


def to_bucket(features: Features, idx: Tensor, targets: Tensor, *, soft_tokens: Callable[[int], int] = lambda frames: frames,
              room: int | None = None) -> tuple[Features, Tensor, Tensor]:
    """features (B, T_enc, d), idx and targets (B, T) → the same with B, T_enc and T rounded up.

    Added frames are zeros beyond `lens`, added text is id 0 with target −1, added rows are both and hear nothing: a sum over
    graded tokens, its mean and every gradient stay what they are. Rows of features are rows of idx, as with a prefix. A batch
    whose padding would take more than `room` positions (T + soft_tokens(T_enc)) keeps its own T_enc and T.

    soft_tokens: how many so many frames become, `Projector.num_soft_tokens`.
    """
    values, lens = features
    if values.size(0) != idx.size(0) or targets.shape != idx.shape:
        raise BadInput("to_bucket", f"{values.size(0)} rows of features, idx {shape(idx.shape)}, targets {shape(targets.shape)}",
                       "one row of features for each row of idx, targets of its shape")
    rows = next_power(idx.size(0)) - idx.size(0)
    steps = bucket(values.size(1), LEAST) - values.size(1)
    text = next_power(idx.size(1), LEAST) - idx.size(1)
    if room is not None and idx.size(1) + text + soft_tokens(values.size(1) + steps) > room:
        steps = text = 0
    padded = Features(F.pad(values, (0, 0, 0, steps, 0, rows)), F.pad(lens, (0, rows)))
    return padded, F.pad(idx, (0, text, 0, rows)), F.pad(targets, (0, text, 0, rows), value=-1)
