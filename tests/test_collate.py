"""collate: every target is checked against the definition, position by position, and no row is silently without any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.data.collate import collate, collate_clips
from omni_adapters.features import valid_steps
from omni_adapters.shapes import BadInput


@st.composite
def batches(draw):
    """Rows of tokens with the prompt length of each; every row keeps a target."""
    rows = draw(st.lists(st.lists(st.integers(0, 50000), min_size=2, max_size=9), min_size=1, max_size=5))
    return rows, [draw(st.integers(0, len(row) - 1)) for row in rows]


@given(batches(), st.integers(0, 9), st.sampled_from([-1, -100]))
def test_every_position_follows_the_definition(batch, pad_id, ignore_index):
    rows, prompts = batch
    idx, targets = collate(rows, pad_id=pad_id, num_prompt=prompts, ignore_index=ignore_index)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.shape == targets.shape == (len(rows), max(map(len, rows)) - 1)
    for b, (row, prompt) in enumerate(zip(rows, prompts)):
        for t in range(idx.size(1)):
            has_next = t + 1 < len(row)
            assert idx[b, t] == (row[t] if has_next else pad_id)
            assert targets[b, t] == (row[t + 1] if has_next and t + 1 >= prompt else ignore_index)


@given(batches())
def test_a_row_in_a_batch_equals_the_row_alone(batch):
    rows, prompts = batch
    idx, targets = collate(rows, num_prompt=prompts)
    for b, (row, prompt) in enumerate(zip(rows, prompts)):
        alone_idx, alone_targets = collate([row], num_prompt=prompt)
        assert torch.equal(idx[b, : len(row) - 1], alone_idx[0])
        assert torch.equal(targets[b, : len(row) - 1], alone_targets[0])
        assert (targets[b, len(row) - 1 :] == -1).all()


def test_the_picture_in_the_docstring():
    idx, targets = collate([[9, 9, 9, 1, 2, 3], [9, 9, 9, 1]], num_prompt=3)
    assert idx.tolist() == [[9, 9, 9, 1, 2], [9, 9, 9, 0, 0]]
    assert targets.tolist() == [[-1, -1, 1, 2, 3], [-1, -1, 1, -1, -1]]


def test_tensor_rows_are_tokens_too():
    assert collate([torch.tensor([1, 2, 3], dtype=torch.int32)])[1].tolist() == [[2, 3]]


REFUSALS = [
    (dict(tokens=[]), "no rows; expected at least one row of tokens"),
    (dict(tokens=[[1, 2, 3], [1, 2]], num_prompt=2),
     "row 1 with 2 tokens, 2 of them prompt; expected a token after the prompt. Every target of this row would be"),
    (dict(tokens=[[1, 2], [7]]), "row 1 with 1 tokens, 0 of them prompt"),
    (dict(tokens=[[1, 2], []]), "row 1 with 0 tokens"),
    (dict(tokens=[[1, 2], [1, -1]]), "row 1 of shape (2,) and torch.int64; expected token ids, integers ≥ 0"),
    (dict(tokens=[[1.0, 2.5]]), "row 0 of shape (2,) and torch.float32; expected token ids"),
    (dict(tokens=[[True, False]]), "row 0 of shape (2,) and torch.bool"),
    (dict(tokens=[[[1, 2], [3, 4]]]), "row 0 of shape (2, 2) and torch.int64"),
    (dict(tokens=[[1, 2]], num_prompt=-1), "num_prompt -1 for 1 rows; expected one number ≥ 0, or one per row"),
    (dict(tokens=[[1, 2]], num_prompt=[0, 1]), "num_prompt [0, 1] for 1 rows"),
    (dict(tokens=[[1, 2]], pad_id=-1), "pad_id -1 and ignore_index -1; expected pad_id ≥ 0 and ignore_index < 0"),
    (dict(tokens=[[1, 2]], ignore_index=0), "pad_id 0 and ignore_index 0; expected pad_id ≥ 0 and ignore_index < 0"),
]


@pytest.mark.parametrize("arguments, message", REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(arguments, message):
    with pytest.raises(BadInput) as refusal:
        collate(**arguments)
    assert f"collate: got {message}" in str(refusal.value)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5))
def test_clips_join_their_rows(lengths, width):
    clips = [torch.randn(length, width) for length in lengths]
    features, idx, targets = collate_clips(clips, [[1, 2, 3]] * len(clips), num_prompt=2)
    assert features.lens.tolist() == lengths
    assert features.values.shape == (len(clips), max(lengths), width)
    assert torch.equal(features.values[valid_steps(features)], torch.cat(clips))
    assert not features.values[~valid_steps(features)].any()
    assert idx.tolist() == [[1, 2]] * len(clips)
    assert targets.tolist() == [[-1, 3]] * len(clips)


def test_clip_refusals():
    clip = torch.randn(4, 3)
    with pytest.raises(BadInput, match=r"collate_clips: got 1 clips for 2 rows of tokens; .* an empty clip \(0, d\)"):
        collate_clips([clip], [[1, 2], [1, 2]])
    with pytest.raises(BadInput, match=r"row 1 of shape \(4, 2\); expected \(T, 3\)"):
        collate_clips([clip, clip[:, :2]], [[1, 2], [1, 2]])
    with pytest.raises(BadInput, match=r"collate_clips: got feature values \(1, 4, 3\) of torch\.int64"):
        collate_clips([clip.long()], [[1, 2]])
    with pytest.raises(BadInput, match="row 0 with 2 tokens, 2 of them prompt"):
        collate_clips([clip], [[1, 2]], num_prompt=2)
