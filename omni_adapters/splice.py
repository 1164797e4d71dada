"""The layout's arithmetic on tensors: which slot of the fused sequence holds which token.

`layout` is the specification, in integers; tests hold the two equal over every small case. Here lengths stay tensors, so
that to torch.compile they are data, not reasons to compile again, and on CUDA nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.features import Features, full
from omni_adapters.shapes import BadInput, shape

SoftTokens: TypeAlias = "Tensor | Features | Mapping[int, Features | Tensor]"

FILLER = 0  # id in soft slots of fused_idx: always inside the vocabulary, and what the hand-patched forward looked up


class Splice(NamedTuple):
    """What hooks need to know during one forward.

    soft:   (B, T_fused) bool, slots that hold a soft token.
    edge:   (B, T_fused) bool, soft slots and slots whose left neighbour is soft: no smear, no bigram.
    rows:   (B, T_fused, n_embd) soft tokens where `soft`, anything elsewhere; None where no slot is soft.
    answer: (B, T) slot that answers for each text position; None leaves the head's input alone.
    """

    soft: Tensor
    edge: Tensor
    rows: Tensor | None
    answer: Tensor | None


class Columns(NamedTuple):
    """`layout`'s columns as tensors, with one virtual column ahead of the text for a prefix at 0.

    text:  (B, T + 1) int64, 1 where the column puts its own token.
    soft:  (B, T + 1) int64, soft tokens after it.
    first: (B, T + 1) int64, row of `flat` that holds the first of them.
    flat:  (num_rows, n_embd), all soft tokens one below another.
    """

    text: Tensor
    soft: Tensor
    first: Tensor
    flat: Tensor


def prefix_columns(idx: Tensor, features: Features, insert_at: int) -> Columns:
    """One clip per row, before text position `insert_at`."""
    values, lens = features
    text = F.pad(torch.ones_like(idx), (1, 0))
    soft = F.pad(lens.unsqueeze(1), (insert_at, idx.size(1) - insert_at))
    first = torch.arange(idx.size(0), device=idx.device).unsqueeze(1) * values.size(1)
    return Columns(text, soft, first.expand_as(text), values.flatten(0, 1))


def placeholder_columns(idx: Tensor, clips: Mapping[int, Features]) -> Columns:
    """Each occurrence of a placeholder id, read row by row, gives way to the next of its clips."""
    text, soft, first = torch.ones_like(idx), torch.zeros_like(idx), torch.zeros_like(idx)
    num_rows, flat = 0, []
    for key, (values, lens) in clips.items():
        if values.size(0) == 0:
            continue
        here = idx == key
        number = (here.flatten().cumsum(0) - 1).clamp(0, lens.size(0) - 1).view_as(idx)  # clip at each occurrence
        soft = torch.where(here, lens[number], soft)
        first = torch.where(here, num_rows + number * values.size(1), first)
        text = torch.where(here, 0, text)
        flat.append(values.flatten(0, 1))
        num_rows += flat[-1].size(0)
    joined = torch.cat([rows.to(flat[0].dtype) for rows in flat]) if flat else torch.zeros(0, 1, device=idx.device)
    return Columns(F.pad(text, (1, 0)), F.pad(soft, (1, 0)), F.pad(first, (1, 0)), joined)


def crop_text(columns: Columns, text_lens: Tensor) -> Columns:
    """Columns past a row's own text, (B,) tokens, take up no slot."""
    column = torch.arange(columns.text.size(1), device=text_lens.device)
    return columns._replace(text=torch.where(column > text_lens.unsqueeze(1), 0, columns.text))


def fuse(idx: Tensor, columns: Columns, T_fused: int) -> tuple[Splice, Tensor]:
    """Columns → (splice, fused_idx (B, T_fused)). Rows pack left; slots past a row's end hold the filler id."""
    text, soft, first, flat = columns
    end = (text + soft).cumsum(dim=1)                                                     # (B, T + 1)
    slot = torch.arange(T_fused, device=idx.device).expand(idx.size(0), -1).contiguous()  # (B, T_fused)
    column = torch.searchsorted(end, slot, right=True).clamp(max=idx.size(1))
    offset = slot - (end - text - soft).gather(1, column)  # slots since the column began
    own = text.gather(1, column)
    inside = slot < end[:, -1:]
    is_text = inside & (offset < own)
    is_soft = inside & ~is_text
    # Slots without a soft token read the rows in turn, not all the same one: the backward of index_select adds rows up,
    # and thousands of atomic additions (of zeros) to one address would queue.
    spare = slot % flat.size(0)
    source = torch.where(is_soft, first.gather(1, column) + offset - own, spare)
    rows = flat.index_select(0, source.flatten()).unflatten(0, source.shape)              # (B, T_fused, n_embd)
    fused_idx = torch.where(is_text, F.pad(idx, (1, 0)).gather(1, column), FILLER)
    answer = (end[:, 1:] - 1).clamp(0, T_fused - 1)
    return Splice(is_soft, edges(is_soft), rows, answer), fused_idx


def spoil_overflow(splice: Splice, columns: Columns, T_fused: int) -> Splice:
    """Rows longer than T_fused become NaN from their first slot on."""
    soft, edge, rows, answer = splice
    assert rows is not None
    over = (columns.text + columns.soft).sum(dim=1, keepdim=True) > T_fused  # (B, 1)
    return Splice(soft | over, edge | over, torch.where(over.unsqueeze(-1), torch.nan, rows), answer)


def edges(soft: Tensor) -> Tensor:
    """Soft slots and the slots right after them."""
    return soft | F.pad(soft[:, :-1], (1, 0))


def text_after(tail: Tensor, idx: Tensor) -> Splice:
    """Text that goes on in a cache, where `tail` (B,) bool says which rows end on a soft token."""
    soft = torch.zeros_like(idx, dtype=torch.bool)
    return Splice(soft, torch.cat([tail.unsqueeze(1), soft[:, 1:]], dim=1), None, None)


def recognise(where: str, idx: Tensor, soft_tokens: SoftTokens, insert_at: int, n_embd: int) -> Splice:
    """The splice of a prompt that was already expanded, perhaps with generated tokens behind it.

    A prefix is known by its place and the filler id, a clip by its placeholder's id. The clips of one prompt serve every
    row of a larger batch. Raises BadInput where the ids are not those of an expanded prompt.
    """
    if isinstance(soft_tokens, Mapping):
        return recognise_clips(where, idx, soft_tokens, n_embd)
    values, lens = full(soft_tokens) if isinstance(soft_tokens, Tensor) else soft_tokens
    if values.size(0) not in (1, idx.size(0)):
        raise BadInput(where, f"a call with {idx.size(0)} rows", f"1 or {values.size(0)} rows, as many as were bound")
    place = torch.arange(idx.size(1), device=idx.device) - insert_at
    soft = (place >= 0) & (place < lens.expand(idx.size(0)).unsqueeze(1))
    longest = insert_at + int(lens.max())
    if idx.size(1) < longest or bool((idx[soft] != FILLER).any()):
        raise BadInput(where, f"a call of the GPT with ids {shape(idx.shape)}",
                       f"one token (a decode step) or an expanded prompt with {longest} slots up to the prefix's end",
                       "pass the GPT prepender.expand(tokens, soft_tokens)")
    rows = values.expand(idx.size(0), -1, -1)[:, place.clamp(0, values.size(1) - 1)]
    return Splice(soft, edges(soft), rows, None)


def recognise_clips(where: str, idx: Tensor, clips: Mapping[int, Features | Tensor], n_embd: int) -> Splice:
    soft = torch.zeros_like(idx, dtype=torch.bool)
    bound = {key: valid_rows(clip) for key, clip in clips.items()}
    dtype = next((flat.dtype for flat in bound.values()), torch.float32)
    rows = torch.zeros(*idx.shape, n_embd, device=idx.device, dtype=dtype)
    for key, flat in bound.items():
        number = (idx == key).cumsum(dim=1) - 1  # tokens generated later may repeat the id: they come after the clips
        here = (idx == key) & (number < flat.size(0))
        counts = here.sum(dim=1).tolist()
        if any(count != flat.size(0) for count in counts):
            raise BadInput(where, f"a call of the GPT with {counts} slots of placeholder {key}",
                           f"one token (a decode step) or an expanded prompt with {flat.size(0)} in each row",
                           "pass the GPT prepender.expand(tokens, soft_tokens)")
        if flat.size(0):
            found = flat[number.clamp(0, flat.size(0) - 1)].to(rows.dtype)
            rows, soft = torch.where(here.unsqueeze(-1), found, rows), soft | here
    return Splice(soft, edges(soft), rows, None)


def valid_rows(clip: Features | Tensor) -> Tensor:
    """All valid soft tokens of all clips, one below another: (num_rows, n_embd)."""
    values, lens = full(clip) if isinstance(clip, Tensor) else clip
    return torch.cat([row[:length] for row, length in zip(values, lens.tolist())]) if len(values) else values.flatten(0, 1)


def lens_of(clip: Features | Tensor) -> list[int]:
    return [clip.size(1)] * clip.size(0) if isinstance(clip, Tensor) else clip.lens.tolist()
