"""`Features`, the one currency between encoder, projector and prepender: padded values and their true lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from omni_adapters.shapes import BadInput, shape


class Features(NamedTuple):
    """A ragged batch. What lies beyond a row's length is never looked at.

    values: (B, T, d) right-padded, floating point.
    lens:   (B,) int64, valid steps per row, 0 ≤ lens ≤ T.
    """

    values: Tensor
    lens: Tensor


def check_form(where: str, features: Features, width: int | None = None, todo: str = "") -> None:
    """Refuse what the shapes and dtypes alone can show to be wrong. Costs nothing and traces under torch.compile."""
    values, lens = features
    if not isinstance(lens, Tensor):
        raise BadInput(where, f"lens {lens!r:.40}", f"an int64 tensor {shape([values.size(0)])}",
                       "one length per row of values")
    if values.ndim != 3 or not values.is_floating_point():
        raise BadInput(where, f"feature values {shape(values.shape)} of {values.dtype}",
                       f"a floating-point tensor {shape(['B', 'T', width or 'd'])}", todo)
    if width is not None and values.size(-1) != width:
        raise BadInput(where, f"features {shape(values.shape)}, {values.size(-1)} wide", f"width {width}", todo)
    if lens.ndim != 1 or lens.size(0) != values.size(0) or lens.dtype != torch.int64:
        raise BadInput(where, f"lens {shape(lens.shape)} of {lens.dtype} for {values.size(0)} rows",
                       f"an int64 tensor {shape([values.size(0)])}", "one length per row of values")
    if lens.device != values.device:
        raise BadInput(where, f"lens on {lens.device} and values on {values.device}", "one device",
                       "move both with features_to(features, device)")


def check_values(where: str, features: Features) -> list[int]:
    """Refuse lengths outside the tensor and non-finite values within them; returns the lengths as integers.

    Reads from the device, so it synchronises CUDA once; frames beyond `lens` may hold anything.
    """
    values, lens = features
    valid = valid_steps(features).unsqueeze(-1)  # (B, T, 1)
    finite = torch.where(valid, values, values.new_zeros(())).isfinite().all(dim=-1).all(dim=-1)  # (B,)
    read = torch.stack([lens, finite.to(lens.dtype)]).tolist()
    longest = values.size(1)
    for row, length in enumerate(read[0]):
        if not 0 <= length <= longest:
            raise BadInput(where, f"lens[{row}] = {length} for values {shape(values.shape)}", f"0 ≤ lens ≤ {longest}",
                           "lens count valid steps of the padded tensor")
    for row, ok in enumerate(read[1]):
        if not ok:
            raise BadInput(where, f"NaN or infinity in row {row} of features {shape(values.shape)}", "finite values",
                           "look at the encoder's input and at fp16 overflow; bf16 or fp32 encoders do not overflow")
    return [int(length) for length in read[0]]


def valid_steps(features: Features) -> Tensor:
    """(B, T) bool: True within a row's length."""
    values, lens = features
    return torch.arange(values.size(1), device=values.device) < lens.unsqueeze(1)


def full(values: Tensor) -> Features:
    """Features of a plain (B, T, d) tensor, every step valid."""
    if values.ndim < 2:  # check_form has words for it
        return Features(values, torch.zeros(0, dtype=torch.int64, device=values.device))
    lens = torch.full((values.size(0),), values.size(1), dtype=torch.int64, device=values.device)
    return Features(values, lens)


def pad_rows(rows: Sequence[Tensor]) -> Features:
    """Ragged rows (T_i, d) → Features (B, max T_i, d), zeros beyond each row's length."""
    if not rows:
        raise BadInput("pad_rows", "no rows", "at least one (T, d) tensor")
    for number, row in enumerate(rows):
        if row.ndim != 2 or row.size(1) != rows[0].size(1):
            raise BadInput("pad_rows", f"row {number} of shape {shape(row.shape)}", f"(T, {rows[0].size(-1)})",
                           "all rows share one width")
    lens = torch.tensor([row.size(0) for row in rows], dtype=torch.int64, device=rows[0].device)
    return Features(torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lens)


def select(features: Features, rows: Sequence[int] | Tensor) -> Features:
    """The given rows, cropped to the longest of them."""
    index = torch.as_tensor(rows, dtype=torch.int64, device=features.values.device)
    lens = features.lens[index]
    longest = int(lens.max()) if lens.numel() else 0
    return Features(features.values[index, :longest], lens)


def features_to(features: Features, *args: torch.device | torch.dtype | str) -> Features:
    """`values.to(*args)`, with lens moved beside them but kept int64."""
    values = features.values.to(*args)  # type: ignore[call-overload]
    return Features(values, features.lens.to(values.device))
