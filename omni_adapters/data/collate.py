"""From ragged rows to a batch: tokens become `idx` and `targets`, clips become `Features`.

Notable: a GPT without an attention mask must see each row as if it were alone, so rows pack left, padding goes right,
and every target that predicts padding or the prompt is ignored. With 3 prompt tokens p and padding `·`:

    tokens    p p p a b c        p p p a
    idx       p p p a b          p p p · ·
    targets   - - a b c          - - a - -        (targets[t] = token t + 1; - is ignore_index)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_adapters.features import Features, check_form, pad_rows
from omni_adapters.shapes import BadInput, shape


def collate(tokens: Sequence[Sequence[int]], *, pad_id: int = 0, num_prompt: int | Sequence[int] = 0,
            ignore_index: int = -1) -> tuple[Tensor, Tensor]:
    """Rows of n tokens → idx (B, T) and targets (B, T), int64, T = the longest row − 1.

    A row's last token is only ever a target, its first never one. The first `num_prompt` tokens (one number for all
    rows, or one per row) are context: a target counts iff the token it predicts stands at index ≥ num_prompt.

    Refused with `BadInput`: no rows; rows that are not 1-D non-negative integers; a row without any target left, which
    a template mismatch would otherwise hide; a negative pad_id; an ignore_index that could be a token.
    """
    if not len(tokens):
        raise BadInput("collate", "no rows", "at least one row of tokens")
    if pad_id < 0 or ignore_index >= 0:
        raise BadInput("collate", f"pad_id {pad_id} and ignore_index {ignore_index}", "pad_id ≥ 0 and ignore_index < 0",
                       "padding is fed to the GPT, ignored targets must differ from every token")
    prompts = _prompts(num_prompt, len(tokens))
    rows = [_row(number, row, prompt) for number, (row, prompt) in enumerate(zip(tokens, prompts))]
    longest = max(len(row) for row in rows) - 1
    idx = torch.full((len(rows), longest), pad_id)
    targets = torch.full((len(rows), longest), ignore_index)
    for number, (row, prompt) in enumerate(zip(rows, prompts)):
        first = max(prompt, 1)  # the first token counted; nothing stands before token 0 to predict it
        idx[number, : len(row) - 1] = row[:-1]
        targets[number, first - 1 : len(row) - 1] = row[first:]
    return idx, targets


def collate_clips(clips: Sequence[Tensor], tokens: Sequence[Sequence[int]], *, pad_id: int = 0,
                  num_prompt: int | Sequence[int] = 0, ignore_index: int = -1) -> tuple[Features, Tensor, Tensor]:
    """One clip per row of tokens: clips (T_i, d) → Features (B, max T_i, d); tokens as in `collate`.

    A clip may have no steps (0, d): a text-only row. Errors are those of `collate` and `pad_rows`, and `BadInput` when
    clips and rows differ in number or the clips are not floating point.
    """
    if len(clips) != len(tokens):
        raise BadInput("collate_clips", f"{len(clips)} clips for {len(tokens)} rows of tokens", "one clip per row",
                       "give a row without audio an empty clip (0, d)")
    idx, targets = collate(tokens, pad_id=pad_id, num_prompt=num_prompt, ignore_index=ignore_index)
    features = pad_rows(clips)
    check_form("collate_clips", features)
    return features, idx, targets


def _prompts(num_prompt: int | Sequence[int], num_rows: int) -> list[int]:
    prompts = [num_prompt] * num_rows if isinstance(num_prompt, int) else [int(prompt) for prompt in num_prompt]
    if len(prompts) != num_rows or min(prompts) < 0:
        raise BadInput("collate", f"num_prompt {num_prompt} for {num_rows} rows",
                       "one number ≥ 0, or one per row")
    return prompts


def _row(number: int, row: Sequence[int], prompt: int) -> Tensor:
    """The row's tokens (n,) int64, at least one of them a target."""
    values = torch.as_tensor(row, device="cpu")
    if values.ndim == 1 and len(values) <= max(prompt, 1):
        raise BadInput("collate", f"row {number} with {len(values)} tokens, {prompt} of them prompt",
                       "a token after the prompt", "every target of this row would be ignored; check the template")
    if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool or int(values.min()) < 0:
        raise BadInput("collate", f"row {number} of shape {shape(values.shape)} and {values.dtype}",
                       "token ids, integers ≥ 0, in one dimension")
    return values.to(torch.int64)
