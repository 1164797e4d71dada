"""Projector: the equation, spelled out frame by frame; rows that do not know their mates; dtypes; refusals.

float64 cases compare to 1e-12: sums of some hundred products of order 1, each 2⁻⁵³ = 1e-16 off, stay two orders below it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_adapters.features import Features
from omni_adapters.projector import Projector, stack_frames
from omni_adapters.shapes import BadInput

EXACT = 1e-12


def plain(projector: Projector, frames: Tensor) -> Tensor:
    """One row (T, in_dim) → (⌈T/stack⌉, out_dim): the last window is filled up with zero frames."""
    stack, fc1, fc2 = projector.stack, projector.fc1.weight.to(frames.dtype), projector.fc2.weight.to(frames.dtype)
    soft = []
    for start in range(0, len(frames), stack):
        window = list(frames[start : start + stack])
        window += [torch.zeros_like(frames[0])] * (stack - len(window))
        soft.append(fc2 @ F.gelu(fc1 @ torch.cat(window)))
    return torch.stack(soft) if soft else frames.new_zeros(0, projector.out_dim)


def random_features(lens: list[int], width: int, extra: int = 0, beyond: float = torch.nan,
                    dtype: torch.dtype = torch.float64) -> Features:
    rng = torch.Generator().manual_seed(sum(lens) + width)
    values = torch.randn(len(lens), max(lens, default=0) + extra, width, generator=rng, dtype=dtype)
    at = torch.tensor(lens, dtype=torch.int64)
    return Features(values.masked_fill((torch.arange(values.size(1)) >= at.unsqueeze(1)).unsqueeze(-1), beyond), at)


def make(in_dim: int = 6, out_dim: int = 8, **options: Any) -> Projector:
    torch.manual_seed(0)
    return Projector(in_dim, out_dim, zero_init=False, **options)


@settings(max_examples=60)
@given(lens=st.lists(st.integers(0, 13), min_size=1, max_size=4), stack=st.integers(1, 6), extra=st.integers(0, 3))
def test_each_row_is_the_equation_on_its_own_frames(lens: list[int], stack: int, extra: int) -> None:
    """Ragged, with NaN beyond lens, whatever the padding: the row alone, window by window."""
    projector, features = make(stack=stack, hidden_dim=10), random_features(lens, 6, extra)
    soft = projector(features)
    assert isinstance(soft, Features)
    assert soft.values.shape == (len(lens), -(-(max(lens) + extra) // stack), 8)
    assert soft.lens.dtype == torch.int64 and soft.lens.tolist() == [-(-n // stack) for n in lens]
    for row, n in enumerate(lens):
        expected = plain(projector, features.values[row, :n])
        torch.testing.assert_close(soft.values[row, : len(expected)], expected, rtol=0, atol=EXACT)
        assert soft.values[row, len(expected) :].isfinite().all()


def test_every_partial_window() -> None:
    for stack in range(1, 6):
        projector = make(stack=stack)
        for n in range(12):
            row = projector(random_features([n], 6)).values[0]
            torch.testing.assert_close(row, plain(projector, random_features([n], 6).values[0]), rtol=0, atol=EXACT)


@pytest.mark.parametrize("beyond", [torch.nan, torch.inf, -1e30])
def test_what_lies_beyond_lens_changes_no_bit_of_output_or_gradient(beyond: float) -> None:
    projector = make(stack=4)

    def step(garbage: float) -> list[Tensor]:
        features = random_features([7, 0, 5, 8], 6, extra=3, beyond=garbage, dtype=torch.float32)
        values = features.values.requires_grad_()
        soft = projector(features)
        projector.zero_grad()
        soft.values.square().sum().backward()
        assert values.grad is not None and projector.fc1.weight.grad is not None and projector.fc2.weight.grad is not None
        return [soft.values, values.grad, projector.fc1.weight.grad.clone(), projector.fc2.weight.grad.clone()]

    for found, clean in zip(step(beyond), step(0.0)):
        assert torch.equal(found, clean)


def test_a_tensor_is_features_that_are_valid_to_the_end() -> None:
    projector, values = make(stack=3), random_features([8, 8], 6).values
    soft = projector(values)
    assert isinstance(soft, Tensor)
    assert torch.equal(soft, projector(Features(values, torch.tensor([8, 8]))).values)


@pytest.mark.parametrize(("num_clips", "num_frames"), [(0, 5), (0, 0), (2, 0)])
def test_a_batch_without_clips_or_frames_gives_one_without_soft_tokens(num_clips: int, num_frames: int) -> None:
    """A batch of text only has no clips: training code should not have to ask."""
    for stack in (1, 4):
        lens = torch.zeros(num_clips, dtype=torch.int64)
        soft = make(stack=stack)(Features(torch.zeros(num_clips, num_frames, 6), lens))
        assert soft.values.shape == (num_clips, -(-num_frames // stack), 8)
        assert soft.lens.shape == (num_clips,)


def test_stacked_frames_lie_side_by_side_in_time_order() -> None:
    features = Features(torch.arange(10.0).view(1, 5, 2), torch.tensor([5]))
    stacked = stack_frames(features, 2)
    assert stacked.values.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]]
    assert stacked.lens.tolist() == [3]


def test_the_callers_features_are_not_written_to() -> None:
    features = random_features([3, 1], 6, extra=2)
    before = features.values.clone(), features.lens.clone()
    make(stack=2)(features)
    assert torch.equal(features.values.nan_to_num(), before[0].nan_to_num()) and torch.equal(features.lens, before[1])


# ---- how it begins ---------------------------------------------------------------------------------------------------


def test_zero_init_begins_at_exact_zeros_and_learns_from_its_last_layer() -> None:
    projector = Projector(6, 8, stack=2)
    soft = projector(random_features([5], 6, dtype=torch.float32)).values
    assert projector.zero_init and not projector.fc2.weight.any() and projector.fc1.weight.any() and not soft.any()
    soft.sum().backward()
    assert projector.fc2.weight.grad is not None and projector.fc2.weight.grad.any()


def test_without_zero_init_both_layers_keep_the_variance_of_their_input() -> None:
    """Uniform ±√(3/fan_in): bounded by it, variance 1/fan_in. 2¹⁶ draws estimate a variance to √(0.8/2¹⁶) = 0.35 %."""
    projector = make(64, 256, stack=4, hidden_dim=256)
    for layer in (projector.fc1, projector.fc2):
        fan_in = layer.in_features
        assert layer.weight.abs().max() <= (3 / fan_in) ** 0.5
        assert layer.weight.var().item() == pytest.approx(1 / fan_in, rel=0.02)


def test_the_default_hidden_layer_is_four_times_the_gpts_width_and_nothing_has_a_bias() -> None:
    projector = Projector(6, 8, stack=3)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "fc1.weight": (32, 18), "fc2.weight": (8, 32)}


def test_reset_parameters_draws_again_from_the_global_generator() -> None:
    projector = make()
    first = projector.fc1.weight.clone()
    projector.reset_parameters()
    assert not torch.equal(projector.fc1.weight, first)
    torch.manual_seed(0)
    projector.reset_parameters()
    again = projector.fc1.weight.clone()
    torch.manual_seed(0)
    projector.reset_parameters()
    assert torch.equal(projector.fc1.weight, again)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_float32_masters_work_in_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    """The result is that of masters rounded to the features' dtype; the masters and their gradients stay float32."""
    projector, features = make(stack=2), random_features([4, 3], 6, beyond=0.0, dtype=dtype)
    soft = projector(features)
    assert soft.values.dtype == dtype
    rounded = make(stack=2).to(dtype)
    assert torch.equal(soft.values, rounded(features).values)
    soft.values.float().sum().backward()
    for parameter in projector.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.any()


def test_bf16_weights_work_on_float32_features() -> None:
    soft = make().bfloat16()(random_features([4], 6, dtype=torch.float32))
    assert soft.values.dtype == torch.float32


def test_gradients_reach_the_features_and_stop_at_lens() -> None:
    features = random_features([5, 2], 6, extra=1)
    values = features.values.requires_grad_()
    make(stack=2)(features).values.sum().backward()
    assert values.grad is not None
    valid = torch.arange(6) < features.lens.unsqueeze(1)
    assert values.grad[valid].abs().amax(dim=-1).gt(0).all() and not values.grad[~valid].any()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "message"), [
    (torch.zeros(2, 5, 80), "Projector: got features (2, 5, 80), 80 wide; expected width 6. "
                            "Build it with in_dim = encoder.d_model."),
    (torch.zeros(5, 6), "Projector: got feature values (5, 6) of torch.float32; expected a floating-point tensor (B, T, 6). "
                        "Build it with in_dim = encoder.d_model."),
    (torch.zeros(6), "Projector: got feature values (6,) of torch.float32; expected a floating-point tensor (B, T, 6). "
                     "Build it with in_dim = encoder.d_model."),
    (torch.zeros(()), "Projector: got feature values () of torch.float32; expected a floating-point tensor (B, T, 6). "
                      "Build it with in_dim = encoder.d_model."),
    (torch.zeros(2, 5, 6, dtype=torch.int64), "Projector: got feature values (2, 5, 6) of torch.int64; expected a "
                                              "floating-point tensor (B, T, 6). Build it with in_dim = encoder.d_model."),
    (Features(torch.zeros(2, 5, 6), torch.tensor([5, 5, 5])),
     "Projector: got lens (3,) of torch.int64 for 2 rows; expected an int64 tensor (2,). One length per row of values."),
    (Features(torch.zeros(2, 5, 6), torch.tensor([5.0, 5.0])),
     "Projector: got lens (2,) of torch.float32 for 2 rows; expected an int64 tensor (2,). One length per row of values."),
    (Features(torch.zeros(2, 5, 6), torch.tensor([5, 5], device="meta")),
     "Projector: got lens on meta and values on cpu; expected one device. Move both with features_to(features, device)."),
])
def test_features_of_another_form_are_refused_in_words(features: Tensor | Features, message: str) -> None:
    projector = make()
    before = [parameter.clone() for parameter in projector.parameters()]
    with pytest.raises(BadInput) as error:
        projector(features)
    assert str(error.value) == message
    assert all(torch.equal(now, then) for now, then in zip(projector.parameters(), before))


@pytest.mark.parametrize(("options", "message"), [
    ({"in_dim": 0}, "Projector: got in_dim = 0; expected in_dim ≥ 1."),
    ({"out_dim": -1}, "Projector: got out_dim = -1; expected out_dim ≥ 1."),
    ({"hidden_dim": 0}, "Projector: got hidden_dim = 0; expected hidden_dim ≥ 1."),
    ({"stack": 0}, "Projector: got stack = 0; expected stack ≥ 1."),
])
def test_sizes_that_make_no_projector_are_refused_in_words(options: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput) as error:
        Projector(**{"in_dim": 6, "out_dim": 8} | options)
    assert str(error.value) == message
