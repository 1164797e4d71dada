"""Kernels of linear cross-entropy in triton's interpreter: run by test_kernels.py, in a process with TRITON_INTERPRET=1.

fp32 and fp16 only: the interpreter's bf16 products are wrong. Every expectation is in fp64. A logit is off by at most
C · 2⁻²⁴ · Σ |x| |w| by its sum and 8c · 2⁻²⁴ by the four roundings of −2c · q; a loss by twice that, and a gradient by twice that
times the largest |weight|. Where G or logits are fp16, their own rounding, 2⁻¹¹, comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from omni_adapters.kernels import linear_cross_entropy as kernels
from omni_adapters.loss import beside_triton, linear_cross_entropy
from omni_adapters.shapes import BadInput

ULP, HALF = 2.0**-24, 2.0**-11
SIZES = [(70, 48, 330), (1, 1, 1), (3, 5, 7), (33, 32, 64), (64, 64, 256)]
TILES = kernels.config_of(torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def loops_of_any_length() -> Iterator[None]:
    """The interpreter holds a scalar argument as an array of shape (1,), which since NumPy 2.4 is no bound of a `range`."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
        yield


def problem(N: int, C: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; logits have a standard deviation of `scale`."""
    rng = torch.Generator().manual_seed(N + C + V)
    hidden, weight = torch.randn(N, C, generator=rng), scale * torch.randn(V, C, generator=rng) / C**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (N,), generator=rng)


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None,
             upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and both gradients in fp64."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = x @ w.T
    losses = F.cross_entropy(z if softcap is None else softcap * torch.tanh(z / softcap), targets, reduction="none")
    return (losses.detach(), *torch.autograd.grad((losses if upstream is None else losses * upstream).sum(), (x, w)))


def off(hidden: Tensor, weight: Tensor, softcap: float | None) -> float:
    """By how much a logit may be off, softcap included."""
    size = float((hidden.double().abs() @ weight.double().abs().T).max())
    return ULP * (hidden.size(1) * size + 8 * (softcap or size))


def near(came: Tensor, right: Tensor, bound: float) -> None:
    assert came.shape == right.shape
    assert float((came.double() - right).abs().max()) <= bound


# ---- bounded logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, softcap", [(torch.float32, 15.0), (torch.float16, 3.0)])
@pytest.mark.parametrize("N, C, V", SIZES)
def test_one_gemm_writes_its_tiles_and_nothing_else(N: int, C: int, V: int, dtype: torch.dtype, softcap: float) -> None:
    hidden, weight, targets = problem(N, C, V, dtype)
    e, wide = TILES.exponentials, -(-V // TILES.exponentials.columns)
    g = torch.full((N + 2, wide * e.columns), torch.nan, dtype=dtype)
    sums = torch.full((N + 2, wide), torch.nan)
    kernels.exponentials[-(-N // e.rows) * wide,](
        hidden, weight, targets, torch.arange(N), g[1:], sums[1:], N, 0, g.size(1), wide, 2 * kernels.LOG2E / softcap,
        -2 * kernels.LOG2E * softcap, C=C, V=V, BLOCK_M=e.rows, BLOCK_N=e.columns, BLOCK_K=e.depth, GRADIENT=True)
    u = torch.tanh(hidden.double() @ weight.double().T / softcap)
    right = torch.exp(softcap * (u - 1)).scatter_(1, targets[:, None], 0)  # of the order of 1 at most
    bound = 2 * off(hidden, weight, softcap)
    near(sums[1:-1].sum(1), right.sum(1), V * bound)
    near(g[1:-1, :V], right * (1 - u.square()) / 4, bound + (HALF if dtype == torch.float16 else 0))
    assert bool((g[1:-1, V:] == 0).all()) and not bool(sums[1:-1].isnan().any())
    assert all(bool(guard.isnan().all()) for guard in (g[0], g[-1], sums[0], sums[-1]))


@pytest.mark.parametrize("N, C, V, dtype, softcap, room", [
    (70, 48, 330, torch.float32, 15.0, kernels.BYTES), (70, 48, 330, torch.float16, 3.0, 1),
    *((*size, torch.float32, softcap, room) for size in SIZES[1:4] for softcap in (15.0, 32.0) for room in (kernels.BYTES, 1))])
def test_bounded(N: int, C: int, V: int, dtype: torch.dtype, softcap: float, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers for all at once, and for one tile of columns and few rows at a time; poisoned where nothing is to be written."""
    monkeypatch.setattr(kernels, "BYTES", room)
    hidden, weight, targets = problem(N, C, V, dtype)
    rows = torch.arange(0, N, 2)
    hidden[1::2], targets[1::2] = torch.nan, V + 10**6
    dx = torch.full((N, C), torch.nan)
    losses = kernels.bounded(hidden, weight, targets, rows, softcap, 3.0, dx)
    right, gradient, _ = expected(hidden[rows], weight, targets[rows], softcap)
    bound = 2 * off(hidden[rows], weight, softcap)
    near(losses, right, bound + ULP * float(right.max()))
    size = 3 * float(weight.abs().max())
    near(dx[rows], 3 * gradient, 2 * size * (bound + (HALF if dtype == torch.float16 else 2 * ULP)))
    assert bool(dx[1::2].isnan().all())
    assert torch.equal(kernels.bounded(hidden, weight, targets, rows, softcap, 3.0, None), losses)


def test_many_blocks_chunks_and_splits() -> None:
    """(32, 64) of G at a time, two splits: each border lies inside (70, 330)."""
    hidden, weight, targets = problem(70, 48, 330)
    dx, rest, cut = torch.full((70, 48), torch.nan), torch.full((70,), torch.nan), kernels.Plan(32, 128, 2)
    buffers = kernels.Buffers.of(hidden, cut, 48, 330, TILES, True)
    for buffer in buffers:
        buffer.fill_(torch.nan)
    for block in kernels.parts(70, 32):
        kernels.bounded_block(hidden, weight, targets, torch.arange(70)[block], 15.0, 1.0, rest[block], dx, buffers, cut, TILES)
    right, gradient, _ = expected(hidden, weight, targets, 15.0)
    bound = 2 * off(hidden, weight, 15.0)
    near(torch.log1p(rest), right, bound + ULP * 10)
    near(dx, gradient, 2 * float(weight.abs().max()) * (bound + 2 * ULP))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(n=st.integers(1, 10**6), C=st.integers(1, 8192), V=st.integers(1, 300_000), sms=st.sampled_from([1, 78, 108, 132]),
       name=st.sampled_from(list(kernels.CANDIDATES)))
def test_a_plan_keeps_to_its_bytes(n: int, C: int, V: int, sms: int, name: str) -> None:
    config = kernels.CANDIDATES[name]
    rows, columns, splits = kernels.plan(n, C, V, 2, sms, config)
    tile = config.exponentials.columns
    assert 1 <= rows < n + kernels.ALIGNED and rows % kernels.ALIGNED == 0
    assert columns % tile == 0 and 0 < columns < V + tile and 1 <= splits <= kernels.MOST_SPLITS
    held = 4 * rows * (splits * C + -(-V // tile)) + 2 * rows * columns
    at_least = 4 * 128 * (C + -(-V // tile)) + 2 * 128 * tile  # of the fewest rows that a plan goes down to
    assert held <= max(kernels.BYTES, at_least)


def test_the_plan_on_an_h200() -> None:
    """4096 rows in three blocks of 11 · 128, 60 · 11 = 5 · 132 tiles at a time; 66 tiles of the product, two splits."""
    config = kernels.CONFIGS[9, 0]
    assert kernels.plan(4096, 768, 32768, 2, 132, config) == (1368, 7680, 2)
    assert kernels.plan(32, 768, 32768, 2, 132, config) == (32, 32768, 22)


# ---- any logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, C, V, dtype, softcap, room", [
    (70, 48, 330, torch.float32, None, kernels.ROW_BYTES), (70, 48, 330, torch.float16, 15.0, 1),
    *((*size, dtype, softcap, 1) for size in SIZES[1:3] for dtype in (torch.float32, torch.float16)
      for softcap in (None, 15.0, 200.0))])
def test_by_row(N: int, C: int, V: int, softcap: float | None, dtype: torch.dtype, room: int,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROW_BYTES", max(room, 16 * V * dtype.itemsize))  # sixteen rows at a time
    hidden, weight, targets = problem(N, C, V, dtype)
    rows, upstream = torch.arange(0, N, 2), torch.rand(N)[::2] + 0.5
    hidden[1::2], targets[1::2] = torch.nan, V + 10**6
    bound = 2 * off(hidden[rows], weight, softcap)
    bound += 2 * HALF * float((hidden[rows].double() @ weight.double().T).abs().max()) if dtype == torch.float16 else 0
    for scale in (None, upstream):
        dx, dw = torch.full((N, C), torch.nan), torch.zeros(V, C)
        losses = kernels.by_row(hidden, weight, targets, rows, scale, softcap, 0.5, dx, dw)
        right, *gradients = expected(hidden[rows], weight, targets[rows], softcap, scale)
        near(losses, right, bound + ULP * float(right.max() + 1))
        rounding = 2 * (bound + (HALF if dtype == torch.float16 else 2 * ULP))
        near(dx[rows], 0.5 * gradients[0], rounding * float(weight.abs().max()))
        near(dw, 0.5 * gradients[1], rounding * float(hidden[rows].abs().sum(0).max()))
        assert bool(dx[1::2].isnan().all())


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_a_row_read_twice_is_the_row_read_once(softcap: float | None) -> None:
    z = 5 * torch.randn(9, 330, generator=torch.Generator().manual_seed(0))
    targets, scale, came = torch.arange(9) * 40, torch.rand(9) + 0.5, []
    for block in (512, 64):
        buffer = torch.full((11, 330), torch.nan)
        buffer[1:-1], rest, below = z, torch.full((9,), torch.nan), torch.full((9,), torch.nan)
        kernels.differentiate(buffer[1:-1], targets, scale, rest, below, softcap, True, block)
        assert bool(buffer[0].isnan().all()) and bool(buffer[-1].isnan().all())
        came.append((buffer[1:-1], rest, below))
    for one, other in zip(*came):
        torch.testing.assert_close(one, other, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("share", [1 / 4096, 1 / 32768, 1e-30])
def test_a_small_upstream_loses_no_digits_in_fp16(share: float) -> None:
    """Probabilities near 1 / 4096, times the share, are subnormal in fp16 or 0: what comes back is the gradient of the upstream
    brought to size 1 times the share, to roundings of fp32, and as near the right one as without the share."""
    hidden, weight, targets = problem(6, 8, 4096, torch.float16, scale=0.1)
    rows, upstream = torch.arange(6), torch.linspace(0.5, 1, 6)
    came = []
    for scale in (1.0, share):
        dx, dw = torch.full((6, 8), torch.nan), torch.zeros(4096, 8)
        kernels.by_row(hidden, weight, targets, rows, scale * upstream, 15.0, 1.0, dx, dw)
        came.append([dx.double() / scale, dw.double() / scale])
    right = expected(hidden, weight, targets, 15.0, upstream)[1:]
    for plain, small, gradient in zip(*came, right):
        assert float((small - gradient).abs().max()) <= 2 * HALF * float(gradient.abs().max())
        assert float((small - plain).abs().max()) <= HALF * float(gradient.abs().max())


def test_an_upstream_of_zeros_or_infinity_stays_in_its_row() -> None:
    hidden, weight, targets = problem(6, 8, 50)
    for upstream, finite in ((torch.zeros(6), 6), (torch.tensor([1.0, torch.inf, 1, 1, torch.nan, 0]), 4)):
        dx = torch.full((6, 8), torch.nan)
        kernels.by_row(hidden, weight, targets, torch.arange(6), upstream, None, 1.0, dx, None)
        assert int(dx.isfinite().all(1).sum()) == finite and bool((dx[upstream == 0] == 0).all())


def test_rocm_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for hip, beside in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert beside_triton(there, there) is beside


# ---- as linear_cross_entropy -----------------------------------------------------------------------------------------


def step(hidden: Tensor, weight: Tensor, targets: Tensor, trained: bool, dtype: torch.dtype = torch.float32,
         **options: Any) -> list[Tensor]:
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)]
    loss = linear_cross_entropy(*leaves, targets, **options)
    (loss * torch.linspace(0.5, 2, loss.numel(), dtype=dtype).reshape(loss.shape)).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl, trained, softcap", [("triton", False, 15.0), ("cublas", False, 15.0), ("cublas", True, None)])
@pytest.mark.parametrize("ignored", [False, True])
def test_every_reduction(impl: str, trained: bool, softcap: float | None, reduction: str, ignored: bool) -> None:
    hidden, weight, targets = problem(10, 8, 50)
    if ignored:
        targets[3], hidden[3] = -1, torch.nan
    options: dict[str, Any] = {"reduction": reduction, "softcap": softcap}
    came = step(hidden, weight, targets, trained, impl=impl, **options)
    right = step(hidden, weight, targets, trained, torch.float64, impl="plain", **options)
    bound = 2 * off(hidden[targets >= 0], weight, softcap) + 4 * ULP
    for one, other, size in zip(came, right, (100.0, float(weight.abs().max()), float(hidden[targets >= 0].abs().sum(0).max()))):
        near(one, other, 4 * bound * size)  # an upstream up to 2, probabilities relatively off by twice a logit
    assert all(torch.equal(one, other) for one, other in zip(came, step(hidden, weight, targets, trained, impl=impl, **options)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl, trained", [("triton", False), ("cublas", True)])
def test_one_graph_and_two_backwards(impl: str, trained: bool, reduction: str) -> None:
    hidden, weight, targets = problem(10, 8, 50)
    targets[3], hidden[3] = -1, torch.nan

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, targets, softcap=15.0, reduction=reduction, impl=impl).sum()

    torch._dynamo.reset()
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        function(*leaves).backward()
        gradients.append([leaves[0].grad[targets >= 0], *([leaves[1].grad] if trained else [])])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    leaf = hidden.clone().requires_grad_()
    twice = loss(leaf, weight)
    twice.backward(retain_graph=True)
    twice.backward()
    assert torch.equal(leaf.grad[targets >= 0], 2 * gradients[0][0])


@pytest.mark.parametrize("impl, trained", [("triton", False), ("cublas", True)])
def test_autocast_changes_no_bit(impl: str, trained: bool) -> None:
    batch, came = problem(9, 16, 40), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            came.append(step(*batch, trained, softcap=15.0, impl=impl))
    assert all(torch.equal(one, other) for one, other in zip(*came))


@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_a_certain_target_keeps_its_digits(impl: str) -> None:
    """z = 60 and −60 at c = 15: the target's logit is 15 tanh(4), the other's −15 tanh(4)."""
    gap, slope = 30 * math.tanh(4), 1 / math.cosh(4)**2
    hidden, weight, targets = torch.tensor([[60.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]]), torch.tensor([0])
    loss = linear_cross_entropy(hidden, weight, targets, softcap=15.0, impl=impl)
    loss.backward()
    bound = ULP * (4 * 2 * 15 + 4 / slope)  # relative: roundings of an exponent of up to 30, and 1 − q where q is nearly 1
    assert float(loss) == pytest.approx(math.log1p(math.exp(-gap)), rel=bound, abs=0)
    assert float(hidden.grad) == pytest.approx(-slope * 2 * math.exp(-gap), rel=bound, abs=0)


@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_nan_in_a_graded_row_is_seen(impl: str) -> None:
    hidden, weight, targets = problem(9, 8, 50)
    hidden[2] = torch.nan
    losses = linear_cross_entropy(hidden, weight, targets, softcap=15.0, reduction="none", impl=impl)
    assert losses.isnan().tolist() == [row == 2 for row in range(9)]


@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_nothing_to_grade_is_zero(impl: str) -> None:
    hidden, weight, targets = problem(9, 8, 50)
    loss, gradient = step(hidden, weight, targets.fill_(-1), False, softcap=15.0, reduction="sum", impl=impl)
    assert float(loss) == 0 and bool((gradient == 0).all())


@pytest.mark.parametrize("trained, softcap, dtype, message", [
    (True, 15.0, torch.float32, "a frozen weight"), (False, None, torch.float32, "a softcap up to 32"),
    (False, 33.0, torch.float32, "a softcap up to 32"), (False, 15.0, torch.float16, "both inputs bf16 or both fp32"),
    (False, 15.0, torch.float64, "no fp64")])
def test_refusals(trained: bool, softcap: float | None, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        step(*problem(9, 8, 50), trained, dtype, softcap=softcap, impl="triton")
