"""Who sits where: the integers against a list built by hand, and the tensors against the integers, in every small case.

By hand means a Python list that soft tokens are put into with `list.insert`-like slicing: nothing is counted there, so
nothing can be off by one. What a slot holds is a text position, or (clip, frame).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters import layout, splice
from omni_adapters.features import Features
from omni_adapters.layout import Row
from omni_adapters.shapes import BadInput

Slots = list[int | tuple[int, int]]

MOST_TEXT, MOST_SOFT, MOST_FRAMES = 5, 4, 3
PLACEHOLDERS = 7, 8   # ids of two modalities
TEXT = 100            # id of text position 0


# ---- by hand ----------------------------------------------------------------------------------------------------------


def prepended(num_text: int, num_soft: int, insert_at: int) -> tuple[Slots, list[int]]:
    """Slots, and the slot that answers for each text position: the one before the next text token."""
    slots: Slots = list(range(num_text))
    slots[insert_at:insert_at] = [(0, frame) for frame in range(num_soft)]
    return slots, [slots.index(p + 1) - 1 if p + 1 < num_text else len(slots) - 1 for p in range(num_text)]


def replaced(pattern: Sequence[bool], clip_lens: Sequence[int]) -> tuple[Slots, list[int]]:
    slots: Slots = []
    answers, clip = [], 0
    for position, is_placeholder in enumerate(pattern):
        if is_placeholder:
            slots += [(clip, frame) for frame in range(clip_lens[clip])]
            clip += 1
        else:
            slots.append(position)
        answers.append(len(slots) - 1)
    return slots, answers


def every_prefix(num_text: int) -> Iterator[tuple[int, int]]:
    """(num_soft, insert_at)"""
    return product(range(MOST_SOFT + 1), range(num_text + 1))


def every_pattern(num_text: int) -> Iterator[tuple[tuple[bool, ...], tuple[int, ...]]]:
    """(pattern, clip_lens)"""
    for pattern in product((False, True), repeat=num_text):
        for clip_lens in product(range(1, MOST_FRAMES + 1), repeat=sum(pattern)):
            yield pattern, clip_lens


def check_row(row: Row, slots: Slots, answers: list[int]) -> None:
    assert row.length == len(slots)
    assert row.source() == slots
    assert row.answer_at == tuple(answers)
    assert row.is_soft() == [isinstance(what, tuple) for what in slots]
    taken = [slot for slot in row.text_at if slot is not None] + [slot for clip in row.soft_at for slot in clip]
    assert sorted(taken) == list(range(row.length)), "each slot has exactly one source"
    assert list(row.answer_at) == sorted(set(row.answer_at)), "answers are strictly increasing"
    assert len(row.answer_at) == len(row.text_at)
    for position, slot in enumerate(row.text_at):
        if slot is not None:
            assert slot <= row.answer_at[position], "a token is answered where it has been heard"
            assert position == 0 or slot == row.answer_at[position - 1] + 1, "right before the next text token"


# ---- the integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_text", range(MOST_TEXT + 1))
def test_every_small_prefix(num_text: int) -> None:
    for num_soft, insert_at in every_prefix(num_text):
        check_row(layout.prepend(num_text, num_soft, insert_at), *prepended(num_text, num_soft, insert_at))


@pytest.mark.parametrize("num_text", range(MOST_TEXT + 1))
def test_every_small_pattern_of_placeholders(num_text: int) -> None:
    for pattern, clip_lens in every_pattern(num_text):
        check_row(layout.replace(pattern, clip_lens), *replaced(pattern, clip_lens))


@given(st.data(), st.integers(0, 60), st.integers(0, 200))
def test_larger_prefixes(data: st.DataObject, num_text: int, num_soft: int) -> None:
    insert_at = data.draw(st.integers(0, num_text))
    check_row(layout.prepend(num_text, num_soft, insert_at), *prepended(num_text, num_soft, insert_at))


@given(st.lists(st.one_of(st.none(), st.integers(1, 90)), max_size=40))
def test_larger_patterns_of_placeholders(columns: list[int | None]) -> None:
    pattern, clip_lens = [n is not None for n in columns], [n for n in columns if n is not None]
    check_row(layout.replace(pattern, clip_lens), *replaced(pattern, clip_lens))


def test_a_prefix_at_insert_at_is_a_clip_after_the_text_before_it() -> None:
    """The two modes agree where they overlap: a placeholder at `insert_at` in a text one longer."""
    for num_text in range(MOST_TEXT + 1):
        for num_soft, insert_at in every_prefix(num_text):
            if num_soft:
                pattern = [position == insert_at for position in range(num_text + 1)]
                prefix, clip = layout.prepend(num_text, num_soft, insert_at), layout.replace(pattern, [num_soft])
                assert (prefix.length, prefix.soft_at, prefix.is_soft()) == (clip.length, clip.soft_at, clip.is_soft())


def test_without_soft_tokens_text_stays_where_it_is() -> None:
    for num_text in range(MOST_TEXT + 1):
        here = tuple(range(num_text))
        for row in (layout.prepend(num_text, 0, num_text), layout.replace([False] * num_text, [])):
            assert (row.text_at, row.answer_at, row.length) == (here, here, num_text)


@given(st.lists(st.integers(0, 5), max_size=12))
def test_groups_hold_each_row_once_and_equal_lengths_together(lengths: list[int]) -> None:
    found = layout.groups(lengths)
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    assert [len({lengths[row] for row in group}) for group in found] == [1] * len(set(lengths))
    assert [group[0] for group in found] == sorted(group[0] for group in found), "in order of first appearance"
    assert all(group == sorted(group) for group in found)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: layout.prepend(1, 3, 2), "layout.prepend: got insert_at = 2 for 1 text tokens; expected 0 ≤ insert_at ≤ 1. "
                                      "Give at least insert_at text tokens, or prepend earlier."),
    (lambda: layout.prepend(4, 3, -1), "layout.prepend: got insert_at = -1 for 4 text tokens; expected 0 ≤ insert_at ≤ 4. "
                                       "Give at least insert_at text tokens, or prepend earlier."),
    (lambda: layout.replace([True, False], [2, 3]),
     "layout.replace: got 2 clips for 1 placeholders; expected one clip per placeholder. "
     "Put the placeholder id into idx once for every clip, in reading order."),
    (lambda: layout.replace([True, True], [2]),
     "layout.replace: got 1 clips for 2 placeholders; expected one clip per placeholder. "
     "Put the placeholder id into idx once for every clip, in reading order."),
    (lambda: layout.replace([True, True], [2, 0]),
     "layout.replace: got clip 1 with 0 soft tokens; expected at least one soft token per placeholder. "
     "Leave the placeholder out of a row that has no clip."),
])
def test_what_has_no_layout_is_refused_in_words(call: object, message: str) -> None:
    with pytest.raises(BadInput) as error:
        call()  # type: ignore[operator]
    assert str(error.value) == message


# ---- the tensors ------------------------------------------------------------------------------------------------------


def numbered(num_clips: int, num_frames: int, lens: Sequence[int], kind: int = 0) -> Features:
    """Soft tokens that say who they are: (kind, clip, frame)."""
    clip, frame = torch.meshgrid(torch.arange(num_clips), torch.arange(num_frames), indexing="ij")
    return Features(torch.stack([torch.full_like(clip, kind), clip, frame], dim=-1).float(), torch.tensor(lens).long())


def text_ids(num_rows: int, num_text: int) -> torch.Tensor:
    return torch.arange(TEXT, TEXT + num_text).repeat(num_rows, 1)


def check_fused(idx: torch.Tensor, columns: splice.Columns, expected: list[tuple[Slots, list[int]]],
                spare: int = 0) -> None:
    """`fuse` puts `expected` slots into each row, in which soft tokens are named (kind, clip, frame)."""
    T_fused = max(len(slots) for slots, _ in expected) + spare
    found, fused_idx = splice.fuse(idx, columns, T_fused)
    assert found.rows is not None and found.answer is not None
    assert fused_idx.shape == found.soft.shape == found.edge.shape == found.rows.shape[:2] == (len(idx), T_fused)
    assert found.answer.shape == idx.shape
    is_soft, ids, names = found.soft.tolist(), fused_idx.tolist(), found.rows.int().tolist()
    for row, (slots, answers) in enumerate(expected):
        held = [tuple(name) if soft else id_ - TEXT for soft, id_, name in zip(is_soft[row], ids[row], names[row])]
        assert held[: len(slots)] == slots
        assert held[len(slots):] == [splice.FILLER - TEXT] * (T_fused - len(slots)), "past the end there is only filler"
        assert all(id_ == splice.FILLER for soft, id_ in zip(is_soft[row], ids[row]) if soft)
        assert found.answer[row, : len(answers)].tolist() == answers
        assert found.edge[row].tolist() == [
            soft or (slot > 0 and is_soft[row][slot - 1]) for slot, soft in enumerate(is_soft[row])]


def named(slots: Slots, names: Sequence[tuple[int, int]]) -> Slots:
    """Clips of a row renamed as they are numbered in the batch: (clip, frame) → (kind, clip in the batch, frame)."""
    return [(*names[what[0]], what[1]) if isinstance(what, tuple) else what for what in slots]  # type: ignore[list-item]


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("num_text", range(MOST_TEXT + 1))
def test_tensors_put_every_small_prefix_where_the_integers_do(num_text: int, spare: int) -> None:
    """Every length alone, and all of them in one ragged batch."""
    for insert_at in range(num_text + 1):
        for lens in [[n] for n in range(1, MOST_SOFT + 1)] + [list(range(MOST_SOFT + 1))]:
            idx = text_ids(len(lens), num_text)
            columns = splice.prefix_columns(idx, numbered(len(lens), MOST_SOFT, lens), insert_at)
            rows = [layout.prepend(num_text, n, insert_at) for n in lens]
            check_fused(idx, columns, [(named(row.source(), [(0, number)]), list(row.answer_at))
                                       for number, row in enumerate(rows)], spare)


def placeholder_batch(cases: Sequence[tuple[Sequence[bool], Sequence[int]]], kinds: int,
                      ) -> tuple[torch.Tensor, dict[int, Features], list[tuple[Slots, list[int]]]]:
    """Rows of one text length → idx, clips by id, expected slots. With two kinds, clips take turns."""
    num_text = len(cases[0][0])
    idx, lens, expected = text_ids(len(cases), num_text), [[] for _ in range(kinds)], []
    for number, (pattern, clip_lens) in enumerate(cases):
        names = []
        for clip, position in enumerate(position for position in range(num_text) if pattern[position]):
            kind = (number + clip) % kinds
            idx[number, position] = PLACEHOLDERS[kind]
            names.append((kind, len(lens[kind])))
            lens[kind].append(clip_lens[clip])
        row = layout.replace(pattern, clip_lens)
        expected.append((named(row.source(), names), list(row.answer_at)))
    clips = {PLACEHOLDERS[kind]: numbered(len(of_kind), MOST_FRAMES + kind, of_kind, kind)
             for kind, of_kind in enumerate(lens)}
    return idx, clips, expected


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("num_text", range(1, MOST_TEXT + 1))
def test_tensors_put_every_small_pattern_where_the_integers_do(num_text: int, spare: int, kinds: int) -> None:
    """All patterns of one text length as one ragged batch, of one modality or two that take turns."""
    idx, clips, expected = placeholder_batch(list(every_pattern(num_text)), kinds)
    check_fused(idx, splice.placeholder_columns(idx, clips), expected, spare)


@pytest.mark.parametrize("num_text", range(1, 4))
def test_tensors_put_every_small_pattern_alone_where_the_integers_do(num_text: int) -> None:
    for pattern, clip_lens in every_pattern(num_text):
        if clip_lens:
            idx, clips, expected = placeholder_batch([(pattern, clip_lens)], kinds=1)
            check_fused(idx, splice.placeholder_columns(idx, clips), expected)


@pytest.mark.parametrize("insert_at", [0, 1, 2])
def test_cropped_text_takes_up_no_slot_behind_a_prefix(insert_at: int) -> None:
    """Every text length from insert_at on, times every soft length, in one right-padded batch."""
    cases = list(product(range(insert_at, MOST_TEXT + 1), range(MOST_SOFT + 1)))
    idx = text_ids(len(cases), MOST_TEXT)
    lens = torch.tensor([num_text for num_text, _ in cases])
    columns = splice.prefix_columns(idx, numbered(len(cases), MOST_SOFT, [n for _, n in cases]), insert_at)
    rows = [layout.prepend(num_text, n, insert_at) for num_text, n in cases]
    check_fused(idx, splice.crop_text(columns, lens), [(named(row.source(), [(0, number)]), list(row.answer_at))
                                                       for number, row in enumerate(rows)], spare=1)


def test_cropped_text_takes_up_no_slot_beside_placeholders() -> None:
    cases = list(every_pattern(3))
    idx, clips, expected = placeholder_batch(cases, kinds=2)
    padded = torch.nn.functional.pad(idx, (0, 2), value=TEXT + 99)
    columns = splice.placeholder_columns(padded, clips)
    check_fused(padded, splice.crop_text(columns, torch.full((len(cases),), 3)), expected, spare=2)


@given(st.data())
def test_tensors_agree_on_larger_batches(data: st.DataObject) -> None:
    num_text = data.draw(st.integers(1, 30))
    column = st.one_of(st.none(), st.integers(1, MOST_FRAMES))
    rows = data.draw(st.lists(st.lists(column, min_size=num_text, max_size=num_text), min_size=1, max_size=4))
    rows[0][0] = rows[0][0] or 1  # at least one clip
    cases = [([n is not None for n in row], [n for n in row if n is not None]) for row in rows]
    idx, clips, expected = placeholder_batch(cases, kinds=data.draw(st.sampled_from([1, 2])))
    check_fused(idx, splice.placeholder_columns(idx, clips), expected, spare=data.draw(st.integers(0, 3)))


def test_tensor_ids_may_be_int32() -> None:
    idx, clips, expected = placeholder_batch(list(every_pattern(3)), kinds=2)
    check_fused(idx.int(), splice.placeholder_columns(idx.int(), clips), expected)
