"""Projector: the equation, spelled out frame by frame; rows that do not know their mates; dtypes; refusals; and all of it
with every part in its place, in an adapter and on a command line.

float64 cases compare to 1e-12: sums of some hundred products of order 1, each 2⁻⁵³ = 1e-16 off, stay two orders below it.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import fingerprint, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from omni_adapters import OmniGPT
from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import Features
from omni_adapters.model_card import model_card
from omni_adapters.projector import Projector, build_projector, described_projector, settings_of, stack_frames
from omni_adapters.shapes import BadInput
from omni_adapters.training.options import add_projector_options, deciding, projector_settings

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
    ({"in_dim": 0}, "Projector: got in_dim = 0; expected in_dim ≥ 1, an integer."),
    ({"out_dim": -1}, "Projector: got out_dim = -1; expected out_dim ≥ 1, an integer."),
    ({"hidden_dim": 0}, "Projector: got hidden_dim = 0; expected hidden_dim ≥ 1, an integer."),
    ({"stack": 0}, "Projector: got stack = 0; expected stack ≥ 1, an integer."),
    ({"stack": "8"}, "Projector: got stack = '8'; expected stack ≥ 1, an integer."),
    ({"hidden_dim": 1.5}, "Projector: got hidden_dim = 1.5; expected hidden_dim ≥ 1, an integer."),
    ({"pool": True}, "Projector: got pool = True; expected pool ≥ 1, an integer."),
])
def test_sizes_that_make_no_projector_are_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        Projector(**{"in_dim": 6, "out_dim": 8} | options)
    assert str(error.value) == message


# ---- every part in its place -----------------------------------------------------------------------------------------


def twin(projector: Projector, frames: Tensor) -> Tensor:
    """`plain` with every part: one row (T, in_dim) alone, float64, step by step and head by head."""
    weights = {name: p.detach().double() for name, p in projector.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weights[f"{name}.weight"] if f"{name}.weight" in weights else x

    if projector.num_layers > 1:
        layers = frames.unflatten(1, (projector.num_layers, -1))
        if projector.normalize_layers:
            centred = layers - layers.mean(-1, keepdim=True)
            layers = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        frames = (weights["mix.scores"].softmax(dim=0)[:, None] * layers).sum(dim=1)
    steps, stack = [], projector.stack
    for start in range(0, len(frames), stack):
        if projector.downsample == "stack":
            window = [frames[t] if t < len(frames) else torch.zeros_like(frames[0]) for t in range(start, start + stack)]
            step = torch.cat(window)
        else:
            kernel = weights["downsampling.weight"]
            first = start - stack // 2
            seen = [t for t in range(first, first + kernel.size(2)) if 0 <= t < len(frames)]
            step = F.gelu(sum((kernel[:, :, t - first] @ frames[t] for t in seen), torch.zeros(len(kernel)).double()))
        hidden = weights["fc1.weight"] @ norm(step, "norm_in")
        if projector.activation == "swiglu":
            value, gate = hidden[: projector.hidden_dim], hidden[projector.hidden_dim :]
            hidden = value * gate * torch.sigmoid(gate)
        else:
            hidden = F.gelu(hidden)
        steps.append(norm(weights["fc2.weight"] @ norm(hidden, "norm_mid"), "norm_out"))
    if not steps:
        return frames.new_zeros(0, projector.out_dim)
    soft = torch.stack(steps)
    if projector.pool is None:
        return soft
    heads = projector.out_dim // 64 if projector.out_dim % 64 == 0 else 1
    pooled = []
    for query in weights["pooling.queries"]:
        found = []
        for q, key, value in zip(query.chunk(heads), (soft @ weights["pooling.key.weight"].T).chunk(heads, dim=1),
                                 (soft @ weights["pooling.value.weight"].T).chunk(heads, dim=1)):
            found.append((key @ q / len(q) ** 0.5).softmax(dim=0) @ value)
        pooled.append(weights["pooling.out.weight"] @ torch.cat(found))
    return torch.stack(pooled)


OPTIONS = st.fixed_dictionaries({
    "stack": st.integers(1, 5), "num_layers": st.sampled_from([1, 2, 3]), "normalize_layers": st.booleans(),
    "activation": st.sampled_from(["gelu", "swiglu"]), "norm": st.lists(st.sampled_from(["in", "mid", "out"]), unique=True),
    "downsample": st.sampled_from(["stack", "conv"]), "pool": st.sampled_from([None, 1, 3])})
EVERYTHING = {"stack": 3, "num_layers": 3, "normalize_layers": True, "activation": "swiglu", "norm": ("in", "mid", "out"),
              "downsample": "conv", "pool": 2}
SOME = {"everything": EVERYTHING, "ultravox": {"stack": 4, "activation": "swiglu", "norm": ("in", "out")},
        "conv": {"stack": 2, "downsample": "conv"}, "pool": {"stack": 2, "pool": 5}, "mix": {"num_layers": 2}}
some = pytest.mark.parametrize("options", SOME.values(), ids=SOME)


def moved(projector: Projector) -> Projector:
    """Off the values that scores and gains begin with, as after training."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in projector.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=rng)
    return projector


@settings(max_examples=100, deadline=None)
@given(options=OPTIONS, lens=st.lists(st.integers(0, 11), min_size=1, max_size=4), extra=st.integers(0, 4))
def test_any_parts_each_row_is_the_equation_on_its_own_frames(options: dict[str, Any], lens: list[int], extra: int) -> None:
    """Ragged, NaN beyond lens: the row alone. A norm keeps the relative error of its input to within a factor of two, so some
    eight sums of at most 100 products, whose terms outweigh them by 10 or so, are 8 · 100 · 10 · 2⁻⁵³ = 1e-12 off; the norm of a
    layer with hardly any variance may make it 1/√1e-5 = 316 times that."""
    projector, features = moved(make(hidden_dim=10, **options)).double(), random_features(lens, 6, extra)
    soft = projector(features)
    steps, stack, pool = max(lens) + extra, projector.stack, projector.pool
    assert soft.values.shape == (len(lens), -(-steps // stack) if pool is None else pool, 8)
    assert soft.lens.dtype == torch.int64 and soft.lens.tolist() == [projector.num_soft_tokens(n) for n in lens]
    assert soft.values.isfinite().all()
    for row, n in enumerate(lens):
        expected = twin(projector, features.values[row, :n])
        assert len(expected) == soft.lens[row]
        torch.testing.assert_close(soft.values[row, : len(expected)], expected, rtol=1e-10, atol=316 * EXACT)


@settings(max_examples=60, deadline=None)
@given(lens=st.lists(st.integers(0, 13), min_size=1, max_size=3), stack=st.integers(1, 7), extra=st.integers(0, 3))
def test_a_convolution_keeps_the_lengths_of_stacking(lens: list[int], stack: int, extra: int) -> None:
    features = random_features(lens, 6, extra)
    conv, stacked = (make(stack=stack, hidden_dim=4, downsample=way)(features) for way in ("conv", "stack"))
    assert conv.values.shape == stacked.values.shape and torch.equal(conv.lens, stacked.lens)
    for row, n in enumerate(lens):
        alone = make(stack=stack, hidden_dim=4, downsample="conv")(features.values[row : row + 1, :n])[0]
        torch.testing.assert_close(conv.values[row, : len(alone)], alone, rtol=0, atol=EXACT)


def test_heads_of_64_channels_each_attend_on_their_own() -> None:
    projector, frames = make(6, 128, hidden_dim=10, pool=2), random_features([7, 3], 6)
    for row, n in enumerate([7, 3]):
        torch.testing.assert_close(projector(frames).values[row], twin(projector, frames.values[row, :n]), rtol=0, atol=EXACT)


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS, zero_init=st.booleans(), lens=st.lists(st.integers(0, 11), min_size=2, max_size=4))
def test_any_parts_what_lies_beyond_lens_changes_no_bit_and_every_parameter_has_a_gradient(
        options: dict[str, Any], zero_init: bool, lens: list[int]) -> None:
    """A gradient, if only of zero, also where no row has a frame: processes that share weights meet in all of them."""
    torch.manual_seed(0)
    projector = Projector(6, 8, 10, zero_init=zero_init, **options)

    def step(garbage: float) -> list[Tensor]:
        features = random_features(lens, 6, extra=2, beyond=garbage, dtype=torch.float32)
        values = features.values.requires_grad_()
        soft = projector(features)
        projector.zero_grad()
        soft.values.square().sum().backward()
        assert values.grad is not None and all(p.grad is not None for p in projector.parameters())
        return [soft.values, values.grad, *(p.grad.clone() for p in projector.parameters())]

    clean = step(0.0)
    for garbage in (torch.nan, -torch.inf):
        assert all(torch.equal(found, expected) for found, expected in zip(step(garbage), clean))


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS)
def test_any_parts_a_gradient_other_than_zero_reaches_every_parameter(options: dict[str, Any]) -> None:
    """Rows of more than one step: over a single one attention is 1 whatever the query."""
    projector = moved(make(hidden_dim=10, **options))
    soft = projector(random_features([11, 13], 6))
    rng = torch.Generator().manual_seed(1)
    (soft.values * torch.randn(soft.values.shape, generator=rng, dtype=torch.float64)).sum().backward()
    assert [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS)
def test_any_parts_zero_init_begins_at_exact_zeros_and_leaves_them(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    projector, features = Projector(6, 8, 10, **options), random_features([11, 13], 6, dtype=torch.float32)
    zero = [name for name, p in projector.named_parameters() if not p.any()]
    last = "norm_out.weight" if "out" in options["norm"] else "fc2.weight"
    assert zero == [*["mix.scores"] * (options["num_layers"] > 1), last]
    soft = projector(features).values
    assert not soft.any()
    soft.sum().backward()
    assert [name for name, p in projector.named_parameters() if p.grad is not None and p.grad.any()] == [last]
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter -= 0.1 * parameter.grad
    assert projector(features).values.any()


def test_other_parts_take_nothing_from_the_numbers_that_the_default_draws() -> None:
    """And the default itself is fc1 and fc2, drawn by nn.Linear and then by `draw`, in this order."""
    torch.manual_seed(0)
    expected = [torch.nn.Linear(18, 10, bias=False), torch.nn.Linear(10, 8, bias=False)]
    with torch.no_grad():
        for layer in expected:
            layer.weight.uniform_(-((3 / layer.in_features) ** 0.5), (3 / layer.in_features) ** 0.5)
    after = torch.rand(3)
    for options in ({}, {"norm": ("in", "mid", "out")}):
        projector = make(stack=3, hidden_dim=10, **options)
        assert torch.equal(torch.rand(3), after)
        assert torch.equal(projector.fc1.weight, expected[0].weight) and torch.equal(projector.fc2.weight, expected[1].weight)


@some
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_parts_float32_masters_work_in_the_dtype_of_the_features(options: dict[str, Any], dtype: torch.dtype) -> None:
    """As `test_float32_masters_work_in_the_dtype_of_the_features`; even scores have even weights, in any dtype."""
    projector, features = make(hidden_dim=10, **options), random_features([9, 13], 6, beyond=0.0, dtype=dtype)
    soft = projector(features)
    assert soft.values.dtype == dtype
    assert torch.equal(soft.values, make(hidden_dim=10, **options).to(dtype)(features).values)
    soft.values.float().square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in projector.parameters())


@some
def test_any_parts_under_autocast(options: dict[str, Any]) -> None:
    """bf16 rounds some ten sums to 2⁻⁸ of their terms' size; soft tokens are of order 1, and with the norm out ≤ √8."""
    projector, features = make(hidden_dim=10, **options), random_features([9, 0, 13], 6, beyond=0.0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        soft = projector(features)
        soft.values.float().square().sum().backward()
    assert (soft.values.float() - projector(features).values).abs().max() <= 10 * 2**-8 * 8**0.5
    assert all(p.grad.isfinite().all() for p in projector.parameters())


@some
@pytest.mark.parametrize(("num_clips", "num_frames"), [(0, 5), (0, 0), (2, 0), (2, 1)])
def test_any_parts_a_batch_without_clips_or_frames(options: dict[str, Any], num_clips: int, num_frames: int) -> None:
    projector = make(hidden_dim=10, **options)
    soft = projector(Features(torch.zeros(num_clips, num_frames, 6), torch.zeros(num_clips, dtype=torch.int64)))
    assert soft.values.shape == (num_clips, projector.pool or -(-num_frames // projector.stack), 8)
    assert soft.lens.tolist() == [0] * num_clips and soft.values.isfinite().all()
    soft.values.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("options", [SOME["everything"], SOME["pool"]], ids=["everything", "pool"])
def test_any_parts_are_one_graph_for_torch_compile(options: dict[str, Any]) -> None:
    """Eager and aot_eager run the same kernels but for decomposed norms: float64, so as the equation."""
    torch._dynamo.reset()
    projector = moved(make(hidden_dim=10, **options)).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(projector, backend=counter, fullgraph=True, dynamic=False)
    for lens in ([9, 0, 13], [13, 2, 0]):
        grads = []
        for run in (projector, compiled):
            projector.zero_grad()
            soft = run(random_features(lens, 6))
            soft.values.square().sum().backward()
            grads.append([soft.values.detach(), soft.lens, *(p.grad.clone() for p in projector.parameters())])
        for found, expected in zip(*grads):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 1
    free = torch.compile(projector, backend="eager", fullgraph=True, dynamic=True)
    for lens in ([5, 7], [11, 3, 12]):
        torch.testing.assert_close(free(random_features(lens, 6)).values, projector(random_features(lens, 6)).values, rtol=1e-10,
                                   atol=1e-10)


@some
def test_any_parts_copied_and_described(options: dict[str, Any]) -> None:
    projector, features = moved(make(hidden_dim=10, **options)), random_features([9, 4], 6)
    copied = copy.deepcopy(projector)
    assert torch.equal(copied(features).values, projector(features).values)
    told = json.loads(json.dumps(described_projector(projector)))
    again = build_projector("here", told)
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(features).values, projector(features).values) and described_projector(again) == told
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    assert told == {"in_dim": 6, "out_dim": 8, "hidden_dim": 10, "stack": 1} | settings
    assert all(f"{name}={value!r}" in repr(projector) for name, value in settings.items())


def test_the_description_of_the_default_says_sizes_alone() -> None:
    sizes = {"in_dim": 6, "out_dim": 8, "hidden_dim": 32, "stack": 3}
    for norm in (None, (), []):
        assert described_projector(Projector(6, 8, stack=3, norm=norm)) == sizes
    assert Projector(6, 8, norm=["out", "in"]).norm == ("in", "out")


@pytest.mark.parametrize(("options", "message"), [
    ({"num_layers": 0}, "Projector: got num_layers = 0; expected num_layers ≥ 1, an integer."),
    ({"pool": 0}, "Projector: got pool = 0; expected pool ≥ 1, an integer."),
    ({"num_layers": 4}, "Projector: got in_dim = 6 for 4 layers; expected a multiple of 4. In_dim is encoder.d_model, "
                        "num_layers · the width of one."),
    ({"activation": "relu"}, "Projector: got activation = 'relu'; expected one of gelu, swiglu."),
    ({"downsample": "mean"}, "Projector: got downsample = 'mean'; expected one of stack, conv."),
    ({"activation": ["gelu"]}, "Projector: got activation = ['gelu']; expected one of gelu, swiglu."),
    ({"norm": "mid"}, "Projector: got norm = 'mid'; expected a tuple of places among in, mid, out, or None."),
    ({"norm": [["in"]]}, "Projector: got norm = [['in']]; expected a tuple of places among in, mid, out, or None."),
    ({"norm": 3}, "Projector: got norm = 3; expected a tuple of places among in, mid, out, or None."),
    ({"norm": ("in", "pre")}, "Projector: got norm = ('in', 'pre'); expected a tuple of places among in, mid, out, or None."),
])
def test_settings_that_name_no_part_are_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        Projector(**{"in_dim": 6, "out_dim": 8} | options)
    assert str(error.value) == message


def test_a_description_without_its_sizes_is_refused_in_words() -> None:
    with pytest.raises(BadInput, match="load: got a projector without out_dim, stack; expected the sizes in_dim, out_dim"):
        build_projector("load", {"in_dim": 6, "hidden_dim": 8})


# ---- in an adapter ---------------------------------------------------------------------------------------------------

IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
IN_FILES = {"everything": EVERYTHING | {"num_layers": 4}, "default": {}, **{name: SOME[name] for name in ("ultravox", "mix")}}
in_files = pytest.mark.parametrize("options", IN_FILES.values(), ids=IN_FILES)


def ears(**options: Any) -> OmniGPT:
    torch.manual_seed(0)
    return OmniGPT(reference(), (LogMelEncoder(), moved(Projector(80, 32, 16, zero_init=False, **options))))


@in_files
def test_an_adapter_comes_back_with_every_part(options: dict[str, Any], tmp_path: Path) -> None:
    omni, features = ears(**options), random_features([40, 0], 80, dtype=torch.float32, beyond=0.0)
    assert {name for name in omni.trained() if name.startswith("projector.")} == {
        f"projector.{name}" for name in omni.projector.state_dict()}
    assert [group["name"] for group in omni.trainable_parameters()] == ["projector"]
    omni.save_adapter(tmp_path / "a.safetensors")
    tensors, told = load_adapter(tmp_path / "a.safetensors")
    assert told["projector"] == {"in_dim": 80, "out_dim": 32, "hidden_dim": 16, "stack": 1} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    assert ("projector.mix.scores" in tensors) == (options.get("num_layers", 1) > 1)
    again = OmniGPT.load_adapter(tmp_path / "a.safetensors", reference())
    with torch.no_grad():
        assert torch.equal(again(IDX, None, audio_features=features), omni(IDX, None, audio_features=features))
    assert again.description() == told and again.describe() == omni.describe()


@in_files
def test_an_adapter_whose_parts_and_tensors_differ_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    ears(**options).save_adapter(tmp_path / "a.safetensors")
    tensors, told = load_adapter(tmp_path / "a.safetensors")
    other = {"activation": "swiglu" if options.get("activation", "gelu") == "gelu" else "gelu"}
    for change, said in ((other, "projector.fc1.weight"), ({"hidden_dim": 15}, "projector.fc2.weight"),
                         ({"num_layers": 5}, "projector.mix.scores"), ({"activation": "relu"}, "got activation = 'relu'"),
                         ({"dropout": 0.1}, "a projector with 'dropout'")):
        save_adapter(tmp_path / "b.safetensors", tensors, told | {"projector": told["projector"] | change})
        gpt = reference()
        before = fingerprint(gpt) | {"random": None}  # weights that are drawn only to be replaced
        with pytest.raises(BadInput, match=re.escape(said)):
            OmniGPT.load_adapter(tmp_path / "b.safetensors", gpt)
        assert fingerprint(gpt) | {"random": None} == before


@in_files
def test_a_batch_of_text_alone_reaches_every_part(options: dict[str, Any]) -> None:
    """With a gradient of zero: processes that share the projector meet in it whatever each one hears."""
    omni = ears(**options).train()
    omni(IDX, IDX.roll(-1, 1)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in omni.projector.parameters())


def test_what_is_said_of_an_adapter_names_its_parts() -> None:
    omni = ears(**EVERYTHING | {"num_layers": 4})
    said = omni.describe()
    parts = "num_layers 4, normalize_layers True, activation swiglu, norm in mid out, downsample conv, pool 2"
    assert f"80 × 3 → 32 ({parts}): " in said and "2 soft tokens a clip; a clip of 30 s takes 2 positions" in said
    page = model_card("me/ears", omni.description(), {name: t.shape for name, t in omni.trained().items()})
    assert f"| projector | {parts.replace('_', chr(92) + '_')} |" in page
    assert "100 frames a second, 3 to a step, 2 soft tokens a clip" in page and "soft tokens per second" not in page
    plain_page = model_card("me/ears", ears(stack=4).description(), {})
    assert "100 frames a second, 4 to a soft token" in plain_page and "| projector |" not in plain_page
    assert "| soft tokens per second | 25 |" in plain_page


# ---- on a command line -----------------------------------------------------------------------------------------------


def flags(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_projector_options(parser)
    return parser.parse_args(given)


def test_flags_build_the_projector_they_name() -> None:
    every = flags("--stack", "3", "--hidden", "10", "--activation", "swiglu", "--norm", "in", "mid", "out", "--downsample",
                  "conv", "--pool", "2", "--normalize-layers", "--no-zero-init")
    asked = Projector(6, 8, num_layers=3, **projector_settings(every))
    assert settings_of(asked) | {"stack": asked.stack} == {n: list(v) if n == "norm" else v for n, v in EVERYTHING.items()}
    assert asked.hidden_dim == 10 and not asked.zero_init
    default = Projector(6, 8, **projector_settings(flags()))
    assert described_projector(default) == {"in_dim": 6, "out_dim": 8, "hidden_dim": 32, "stack": 8} and default.zero_init


def test_a_runs_record_names_parts_only_where_they_decide_something() -> None:
    """So a run that was begun before an option existed goes on."""
    record = deciding(flags("--stack", "4"), host={})
    assert record == {"options": {"stack": 4, "hidden": None, "no_zero_init": False}, "host": {}}
    assert deciding(flags("--norm", "in", "--pool", "3"))["options"] == {
        "stack": 8, "hidden": None, "no_zero_init": False, "norm": ["in"], "pool": 3}
