"""Who sits where in the fused sequence: plain integers, no torch, small enough to enumerate in tests.

A row of text is a list of columns. A column puts its own token (`text`), then `soft` soft tokens:

    prepend, insert_at=1, 3 soft tokens          a placeholder P with a clip of 3

    text      b        t        u                text      b        P        u
    columns   b s s s  t        u                columns   b        s s s    u
    slots     0 1 2 3  4        5                slots     0        1 2 3    4
    answers         3  4        5                answers   0            3    4

One rule says which slot *answers* for a text position, that is, whose hidden state becomes its logits: the last slot of
its column, right before the next text token. A prefix at 0 comes before all columns and answers for nothing.

This module is the specification. `prepender.fuse` does the same arithmetic on tensors, and tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omni_adapters.shapes import BadInput

SoftSlot = tuple[int, int]  # (clip number within the row, frame of that clip)


@dataclass(frozen=True)
class Row:
    """One fused row.

    text_at:   slot of each text token, None where a placeholder gave way to its clip.
    soft_at:   slots of each clip's frames, clips in order.
    answer_at: slot that answers for each text position.
    length:    number of slots.
    """

    text_at: tuple[int | None, ...]
    soft_at: tuple[tuple[int, ...], ...]
    answer_at: tuple[int, ...]
    length: int

    def source(self) -> list[int | SoftSlot]:
        """What sits in each slot: a text position, or (clip, frame)."""
        slots: list[int | SoftSlot] = [-1] * self.length
        for position, slot in enumerate(self.text_at):
            if slot is not None:
                slots[slot] = position
        for clip, frames in enumerate(self.soft_at):
            for frame, slot in enumerate(frames):
                slots[slot] = (clip, frame)
        return slots

    def is_soft(self) -> list[bool]:
        return [isinstance(what, tuple) for what in self.source()]


def prepend(num_text: int, num_soft: int, insert_at: int = 0) -> Row:
    """`num_soft` soft tokens before text position `insert_at` (0 = before everything, 1 = after `<|bos|>`)."""
    check_insert_at("layout.prepend", num_text, insert_at)
    text_at = tuple(position + num_soft * (position >= insert_at) for position in range(num_text))
    soft_at = tuple(range(insert_at, insert_at + num_soft))
    length = num_text + num_soft
    before_next = [*text_at[1:], length][:num_text]
    return Row(text_at, (soft_at,), tuple(slot - 1 for slot in before_next), length)


def replace(is_placeholder: Sequence[bool], clip_lens: Sequence[int]) -> Row:
    """Each placeholder gives way to the next clip; the clips of a row are used up exactly."""
    check_clips("layout.replace", sum(is_placeholder), clip_lens)
    text_at: list[int | None] = []
    soft_at: list[tuple[int, ...]] = []
    answer_at: list[int] = []
    length, clips = 0, iter(clip_lens)
    for here in is_placeholder:
        width = next(clips) if here else 1
        if here:
            soft_at.append(tuple(range(length, length + width)))
        text_at.append(None if here else length)
        length += width
        answer_at.append(length - 1)
    return Row(tuple(text_at), tuple(soft_at), tuple(answer_at), length)


def check_insert_at(where: str, num_text: int, insert_at: int) -> None:
    if not 0 <= insert_at <= num_text:
        raise BadInput(where, f"insert_at = {insert_at} for {num_text} text tokens", f"0 ≤ insert_at ≤ {num_text}",
                       "give at least insert_at text tokens, or prepend earlier")


def check_clips(where: str, num_placeholders: int, clip_lens: Sequence[int]) -> None:
    if num_placeholders != len(clip_lens):
        raise BadInput(where, f"{len(clip_lens)} clips for {num_placeholders} placeholders", "one clip per placeholder",
                       "put the placeholder id into idx once for every clip, in reading order")
    for clip, length in enumerate(clip_lens):
        if length < 1:
            raise BadInput(where, f"clip {clip} with {length} soft tokens", "at least one soft token per placeholder",
                           "leave the placeholder out of a row that has no clip")


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers of equal fused length, which share one KV cache; groups in order of first appearance."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(length, []).append(row)
    return list(found.values())
