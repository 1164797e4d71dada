"""linear_cross_entropy: the equation by hand, torch's cross_entropy, then chunks against the plain path.

Tolerances. fp64: sums of some hundred products of order 1, each 2⁻⁵³ = 1e-16 off, stay two orders below EXACT. fp32 is never
compared with fp32 but with fp64, beside the plain path's own error. There `fast_tanh_` may add TANH to tanh, so c · TANH to a
logit and to a loss, 2 c · TANH to a probability relatively, and 2 · TANH to the slope 1 − tanh²: times the largest |weight|,
a gradient. EPS are the roundings of sums and of the result, taken in another order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import peak_bytes
from omni_adapters import loss as module
from omni_adapters.loss import chunked, fast_tanh_, implementation, linear_cross_entropy, loss_and_gradients, plain
from omni_adapters.shapes import BadInput

EXACT, TANH, EPS = 1e-12, 4 * 2.0**-24, 2.0**-23
IMPLS = ("plain", "chunked")
REDUCTIONS = ("mean", "sum", "none")
CAPS = (None, 0.5, 15.0, 32.0, 33.0, 200.0)  # both sides of the softcap up to which no row maximum is looked for


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 rows a chunk and one row a block, at any V."""
    for name, value in (("CHUNK_BYTES", 1), ("CHUNK_ROWS", 4), ("BLOCK_BYTES", 1)):
        monkeypatch.setattr(module, name, value)


def problem(shape: tuple[int, ...] | int = 9, C: int = 6, V: int = 11, dtype: torch.dtype = torch.float64, scale: float = 1.0,
            seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, targets; logits have a standard deviation of scale · √C."""
    rng = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    hidden = torch.randn(*shape, C, generator=rng, dtype=torch.float64)
    weight = scale * torch.randn(V, C, generator=rng, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, shape, generator=rng)


def run(hidden: Tensor, weight: Tensor, targets: Tensor, *, trained: bool = True, upstream: Tensor | float = 1.7,
        autocast: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """(loss, gradient of hidden) and, where it is trained, of weight."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(trained)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(*leaves, targets, **options)
    (loss * upstream).sum().backward()
    assert trained or leaves[1].grad is None
    return loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def same(came: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(came) == len(expected)
    for one, other in zip(came, expected):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


# ---- the equation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", CAPS)
def test_the_equation_by_hand(impl: str, softcap: float | None) -> None:
    hidden, weight, targets = problem(3, 2, 4)
    expected = []
    for row, target in zip(hidden.tolist(), targets.tolist()):
        logits = [sum(x * y for x, y in zip(row, column)) for column in weight.tolist()]
        if softcap is not None:
            logits = [softcap * math.tanh(z / softcap) for z in logits]
        expected.append(math.log(sum(math.exp(z) for z in logits)) - logits[target])
    came = linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", impl=impl)
    assert came.tolist() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_plain_is_torchs_cross_entropy(reduction: str, softcap: float | None) -> None:
    hidden, weight, targets = problem((2, 5))
    targets[0, 1] = targets[1, 3] = -1
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction=reduction)
    came = linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction=reduction, impl="plain")
    assert came.shape == expected.shape
    torch.testing.assert_close(came, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 1.5, 40.0])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_are_the_slopes_of_the_loss(reduction: str, softcap: float | None) -> None:
    hidden, weight, targets = problem(6, 3, 5)
    targets[2] = -1

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction=reduction, impl="chunked")

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


# ---- chunks against the plain path -----------------------------------------------------------------------------------


@given(data=st.data(), V=st.integers(1, 12), C=st.integers(1, 5), softcap=st.sampled_from(CAPS), trained=st.booleans(),
       reduction=st.sampled_from(REDUCTIONS), lead=st.lists(st.integers(0, 4), max_size=3), scale=st.sampled_from([0.1, 1, 30]),
       ignore=st.sampled_from([-1, -100, 0]), rows=st.integers(1, 5), block=st.sampled_from([1, 300, 10**6]))
def test_chunks_compute_the_same(data: st.DataObject, V: int, C: int, softcap: float | None, trained: bool, reduction: str,
                                 lead: list[int], scale: float, ignore: int, rows: int, block: int) -> None:
    hidden, weight, targets = problem(tuple(lead), C, V, scale=scale)
    mask = data.draw(st.lists(st.booleans(), min_size=targets.numel(), max_size=targets.numel()))
    targets = targets.masked_fill(torch.tensor(mask, dtype=torch.bool).view(targets.shape), ignore)
    upstream = torch.randn(targets.shape if reduction == "none" else (), dtype=torch.float64)
    options = {"softcap": softcap, "reduction": reduction, "ignore_index": ignore, "trained": trained, "upstream": upstream}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CHUNK_BYTES", 1), ("CHUNK_ROWS", rows), ("BLOCK_BYTES", block)):
            patch.setattr(module, name, value)
        if reduction == "mean" and bool((targets == ignore).all()):
            for impl in IMPLS:
                with pytest.raises(BadInput, match="all of them ignored"):
                    run(hidden, weight, targets, impl=impl, **options)
            return
        came, expected = (run(hidden, weight, targets, impl=impl, **options) for impl in ("chunked", "plain"))
    for one, other in zip(came, expected):  # gradients and losses are of the order of the weight, up to scale · √C
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT * max(1, scale))
    assert len(came) == len(expected) == 2 + trained


@pytest.mark.parametrize("N", [1, 3, 4, 5, 7, 8, 9])
@pytest.mark.usefixtures("small_chunks")
def test_borders_of_chunks(N: int) -> None:
    batch = problem(N)
    same(run(*batch, softcap=15.0, impl="chunked"), run(*batch, softcap=15.0, impl="plain"))


@pytest.mark.parametrize("n, most, sizes", [(0, 4, []), (4, 4, [4]), (5, 4, [2, 3]), (1, 4, [1]), (9, 4, [3, 3, 3])])
def test_slices_are_even(n: int, most: int, sizes: list[int]) -> None:
    slices = list(module.even_slices(n, most))
    assert [part.stop - part.start for part in slices] == sizes
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(n))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_grade_is_zero_with_a_zero_gradient(impl: str, reduction: str) -> None:
    hidden, weight, targets = problem((2, 3))
    loss, *gradients = run(hidden.fill_(torch.nan), weight, targets.fill_(-1), impl=impl, reduction=reduction)
    assert loss.shape == (targets.shape if reduction == "none" else ())
    assert all(bool((value == 0).all()) for value in (loss, *gradients))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_not_read(impl: str, reduction: str, trained: bool) -> None:
    """NaN in their hidden states and in what comes back to them changes no bit of what the other rows give alone."""
    hidden, weight, targets = problem(9)
    ignored = torch.tensor([0, 3, 4, 8])
    graded = torch.tensor([1, 2, 5, 6, 7])
    upstream = torch.rand(9, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7, dtype=torch.float64)
    options = {"impl": impl, "reduction": reduction, "softcap": 15.0, "trained": trained}
    alone = run(hidden[graded], weight, targets[graded], upstream=upstream[graded] if upstream.dim() else upstream, **options)
    hidden[ignored], targets[ignored] = torch.nan, -1
    if upstream.dim():
        upstream[ignored] = torch.nan
    loss, gradient, *rest = run(hidden, weight, targets, upstream=upstream, **options)
    assert torch.equal(loss[graded] if loss.dim() else loss, alone[0])
    assert torch.equal(gradient[graded], alone[1])
    assert bool((gradient[ignored] == 0).all()) and (not loss.dim() or bool((loss[ignored] == 0).all()))
    assert all(torch.equal(one, other) for one, other in zip(rest, alone[2:]))


@pytest.mark.parametrize("leaf", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_asks_gets_a_gradient(leaf: str, reduction: str) -> None:
    hidden, weight, targets = problem()
    both = run(hidden, weight, targets, impl="chunked", reduction=reduction)
    asks = {"hidden": hidden, "weight": weight}[leaf].requires_grad_()
    (1.7 * linear_cross_entropy(hidden, weight, targets, impl="chunked", reduction=reduction)).sum().backward()
    torch.testing.assert_close(asks.grad, both[1 if leaf == "hidden" else 2], rtol=EXACT, atol=EXACT)
    assert (weight if leaf == "hidden" else hidden).grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, impl="chunked").requires_grad


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_twice(reduction: str, trained: bool) -> None:
    batch = problem((8, 40), 32, 500, torch.float32)
    options = {"softcap": 15.0, "reduction": reduction, "trained": trained, "impl": "chunked"}
    first, second = run(*batch, **options), run(*batch, **options)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_gives_twice(reduction: str) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, reduction=reduction, impl="chunked")
    loss.sum().backward(retain_graph=True)
    once = [hidden.grad.clone(), weight.grad.clone()]
    loss.sum().backward()
    assert torch.equal(hidden.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_tied_to_the_embedding_gets_both_gradients(reduction: str) -> None:
    _, table, targets = problem(6, 4, 11)
    grads = {}
    for impl in IMPLS:
        tied = table.clone().requires_grad_()
        linear_cross_entropy(F.embedding(targets.flip(0), tied).tanh(), tied, targets, softcap=3.0, reduction=reduction,
                             impl=impl).sum().backward()
        grads[impl] = tied.grad
    torch.testing.assert_close(grads["chunked"], grads["plain"], rtol=EXACT, atol=EXACT)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, impl="chunked")
    with pytest.raises(BadInput, match=r'create_graph=True; expected one derivative\. Use impl="plain"'):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = linear_cross_entropy(hidden, weight, targets, impl="plain")
    assert torch.autograd.grad(loss, hidden, create_graph=True)[0].requires_grad


# ---- precision -------------------------------------------------------------------------------------------------------


def test_fast_tanh_is_within_its_bound() -> None:
    x = torch.linspace(-12, 12, 200_001)
    assert float((fast_tanh_(x.clone()).double() - torch.tanh(x.double())).abs().max()) <= TANH


def errors(batch: tuple[Tensor, Tensor, Tensor], **options: Any) -> dict[str, list[Tensor]]:
    """What each impl is off by from fp64 on the same inputs: loss, gradient of hidden, of weight."""
    hidden, weight, targets = batch
    expected = run(hidden.double(), weight.double(), targets, impl="plain", **options)
    return {impl: [came.double() - right for came, right in zip(run(*batch, impl=impl, **options), expected)] for impl in IMPLS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 1.0, 15.0, 30.0, 50.0])
@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0])
def test_never_further_off_than_the_plain_path_and_fast_tanh(dtype: torch.dtype, softcap: float | None, scale: float) -> None:
    batch = problem(64, 32, 300, dtype, scale)
    off = errors(batch, softcap=softcap, reduction="none", upstream=1.0)
    fast = softcap if softcap is not None and softcap <= 32 else 0.0
    largest_logit = 5 * scale * 32**0.5  # of 19200 normal ones; a loss is at most log V + twice this
    rounding = torch.finfo(dtype).eps
    allowed = [fast * TANH + EPS * (math.log(300) + 2 * largest_logit)]
    for gradient, other in ((1, batch[1]), (2, batch[0])):
        size = float(other.abs().max()) * (1 if gradient == 1 else 64)  # 64 rows are summed up in the weight's gradient
        allowed.append((2 * fast * TANH + 2 * bool(fast) * TANH + EPS + rounding) * size)
    for chunks, whole, bound in zip(off["chunked"], off["plain"], allowed):
        assert float(chunks.abs().max()) <= float(whole.abs().max()) + bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_the_plain_path_at_a_real_size(dtype: torch.dtype) -> None:
    """Where the matmul's own rounding is the larger one, as in every head: root mean square, to 10 % of it by chance."""
    off = errors(problem(128, 256, 8192, dtype, 0.1), softcap=15.0, reduction="none", upstream=1.0)
    for chunks, whole in zip(off["chunked"], off["plain"]):
        assert float(chunks.square().mean()) <= 1.1**2 * float(whole.square().mean())


def test_half_precision_inputs_are_not_multiplied_in_half_precision() -> None:
    hidden, weight, targets = problem(64, 64, 500, torch.bfloat16, 0.5)
    expected = linear_cross_entropy(hidden.double(), weight.double(), targets, softcap=15.0, impl="plain")
    came = linear_cross_entropy(hidden, weight, targets, softcap=15.0, impl="chunked")
    naive = F.cross_entropy(15 * torch.tanh(F.linear(hidden, weight) / 15), targets)
    assert abs(float(came) - float(expected)) < 20 * EPS < abs(float(naive) - float(expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes, result", [
    ((torch.bfloat16, torch.bfloat16), torch.float32), ((torch.float16, torch.float32), torch.float32),
    ((torch.float32, torch.bfloat16), torch.float32), ((torch.bfloat16, torch.float64), torch.float64)])
def test_dtypes(impl: str, dtypes: tuple[torch.dtype, torch.dtype], result: torch.dtype) -> None:
    hidden, weight, targets = problem()
    for reduction in REDUCTIONS:
        loss, *gradients = run(hidden.to(dtypes[0]), weight.to(dtypes[1]), targets, impl=impl, reduction=reduction)
        assert loss.dtype == result and tuple(gradient.dtype for gradient in gradients) == dtypes


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_no_bit(impl: str, reduction: str) -> None:
    batch = problem(9, 16, 40, torch.float32)
    outside, inside = (run(*batch, impl=impl, reduction=reduction, softcap=15.0, autocast=on) for on in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(inside, outside))


def test_a_certain_target_keeps_its_digits() -> None:
    """log(1 + e⁻³⁰) = 9.4e-14 lies far below an ulp of 1, which is where log_softmax ends."""
    hidden, weight, targets = torch.tensor([[30.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0])
    loss, gradient = run(hidden, weight, targets, impl="chunked", trained=False, upstream=1.0)
    assert float(loss) == pytest.approx(math.exp(-30), rel=1e-6, abs=0)
    assert float(gradient) == pytest.approx(-math.exp(-30), rel=1e-6, abs=0)


@pytest.mark.parametrize("gap", [10.0, 63.0, 65.0, 80.0, 1000.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_targets_far_from_the_others(gap: float, sign: int) -> None:
    """Logits 0 (the target), ±gap and ±gap/2: the loss is gap and the gradient 1 where the target is hopeless, and where it is
    certain both are what e^−gap/2 gives. The weights that make them are 0, ±1 and ±1/2."""
    hidden, weight, targets = torch.tensor([[gap]]), torch.tensor([[0.0], [1.0], [0.5]]) * sign, torch.tensor([0])
    loss, gradient = run(hidden, weight, targets, impl="chunked", upstream=1.0, trained=False)
    far, half = math.exp(-gap), math.exp(-gap / 2)
    others = (half + far) if sign < 0 else (1 + half)  # e^l relative to the target's, or to the largest
    expected = math.log1p(others) if sign < 0 else gap + math.log(others + far)
    slope = -(half / 2 + far) / (1 + others) if sign < 0 else (1 + half / 2) / (far + others)
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-37)  # below, fp32 is zero
    assert float(gradient) == pytest.approx(slope, rel=1e-6, abs=1e-37)


def test_nan_in_a_graded_row_is_seen() -> None:
    hidden, weight, targets = problem()
    hidden[2] = torch.nan
    for softcap in (None, 15.0):
        losses = linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", impl="chunked")
        assert losses.isnan().tolist() == [row == 2 for row in range(9)]


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("nothing_compiled")
def test_one_graph_with_the_same_result(impl: str, reduction: str, trained: bool) -> None:
    hidden, weight, targets = problem()
    targets[4], hidden[4] = -1, torch.nan

    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, targets, softcap=15.0, reduction=reduction, impl=impl).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        loss = function(*leaves, targets)
        loss.backward()
        assert bool((leaves[0].grad[:4].isfinite()).all())
        results.append((loss.detach(), leaves[0].grad[targets >= 0], *([leaves[1].grad] if trained else [])))
    same(*results)


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_code_does_not_look_at_values() -> None:
    hidden, weight, targets = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for impl in IMPLS:
        assert bool(compiled(hidden, weight, targets.new_full((9,), -1), impl=impl).isnan())
        assert float(compiled(hidden, weight, targets.new_full((9,), -1), impl=impl, reduction="sum")) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_inductor_takes_it_too() -> None:
    hidden, weight, targets = problem((4, 30), 16, 200, torch.float32)
    results = []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, fullgraph=True)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves, targets, softcap=15.0, impl="chunked").backward()
        results.append((leaves[0].grad, leaves[1].grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_operator_keeps_its_promises_to_torch(by_row: bool, trained: bool) -> None:
    hidden, weight, targets = problem()
    targets[0] = -1
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    torch.library.opcheck(loss_and_gradients, (hidden, weight, targets, None, 15.0, -1, by_row, True, trained))


# ---- memory and choice -----------------------------------------------------------------------------------------------


def step(impl: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Loss and gradient of 512 rows of width 16 at vocabulary 4096, and the hidden states that get it."""
    hidden, weight, targets = problem(512, 16, 4096, torch.float32)

    def run() -> Tensor:
        loss = linear_cross_entropy(hidden, weight, targets, softcap=15.0, impl=impl)
        loss.backward()
        return loss

    return run, hidden.requires_grad_()


def test_chunks_hold_one_buffer_and_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of 128 rows, a block beside it, and a few tensors of hidden's size; plain holds some (512, 4096) at a time."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**17)
    buffer, small = 128 * 4096 * 4, 6 * 512 * 16 * 4
    peaks = {}
    for impl in IMPLS:
        run, hidden = step(impl)
        peaks[impl] = peak_bytes(run, [hidden], "cpu")
    assert buffer < peaks["chunked"] < buffer + 2**17 + small
    assert peaks["plain"] > 2 * 512 * 4096 * 4


def test_auto_takes_chunks_where_they_win() -> None:
    frozen, trained = torch.empty(4096, 256), torch.empty(4096, 256, requires_grad=True)
    assert implementation("auto", 64, frozen) is chunked and implementation("auto", 63, frozen) is plain
    assert implementation("auto", 128, trained) is chunked and implementation("auto", 127, trained) is plain
    with torch.no_grad():
        assert implementation("auto", 64, trained) is chunked
    for rows in (3, 600):
        batch = problem(rows, 8, 500, torch.float32)
        assert torch.equal(linear_cross_entropy(*batch), linear_cross_entropy(*batch, impl="chunked" if rows == 600 else "plain"))


# ---- other derivatives -------------------------------------------------------------------------------------------------


def test_auto_is_right_in_forward_mode_at_any_size() -> None:
    """The operator has no rule for it, and a tangent without a rule is silently zero."""
    for rows in (3, 600):
        hidden, weight, targets = problem(rows, 8, 500, torch.float32)
        loss_of = partial(linear_cross_entropy, weight=weight.detach(), targets=targets, softcap=15.0)
        x = hidden.detach()
        expected = torch.func.jvp(partial(loss_of, impl="plain"), (x,), (x,))[1]
        assert expected != 0
        torch.testing.assert_close(torch.func.jvp(loss_of, (x,), (x,))[1], expected)
        with forward_ad.dual_level():
            torch.testing.assert_close(forward_ad.unpack_dual(loss_of(forward_ad.make_dual(x, x))).tangent, expected)
        torch.testing.assert_close(torch.func.grad(loss_of)(x), torch.func.grad(partial(loss_of, impl="plain"))(x))
        with pytest.raises(BadInput, match=r"impl = 'chunked' under torch\.func or forward-mode"):
            torch.func.jvp(partial(loss_of, impl="chunked"), (x,), (x,))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ({"weight": torch.zeros(6, 11)}, r"got hidden \(9, 6\), weight \(6, 11\); expected hidden \(\.\.\., C\), weight \(V, C\)"),
    ({"weight": torch.zeros(6)}, r"weight \(6,\)"),
    ({"hidden": torch.tensor(1.0)}, r"hidden \(\)"),
    ({"targets": torch.zeros(8, dtype=torch.int64)}, r"targets \(8,\); expected one a row of hidden, \(9,\)"),
    ({"targets": torch.zeros(9, dtype=torch.int32)}, "targets of torch.int32; expected torch.int64"),
    ({"targets": torch.full((9,), 11)}, "targets from 11 to 11; expected 0 … 10, or -1"),
    ({"targets": torch.full((9,), -2)}, "targets from -2 to -2"),
    ({"targets": torch.full((9,), -1)}, "9 rows, all of them ignored; expected a row to take the mean over"),
    ({"hidden": torch.zeros(9, 6, dtype=torch.int64)}, "hidden of torch.int64"),
    ({"hidden": torch.zeros(9, 6, dtype=torch.float8_e5m2)}, "hidden of torch.float8_e5m2.* expected torch.float16, "),
    ({"weight": torch.zeros(0, 6)}, r"weight \(0, 6\); expected a row for each word"),
    ({"weight": torch.zeros(11, 6, device="meta")}, "hidden on cpu, weight on meta, targets on cpu; expected one device"),
    ({"targets": torch.zeros(9, dtype=torch.int64, device="meta")}, "targets on meta; expected one device"),
    ({"softcap": "15"}, "softcap = '15'"), ({"softcap": 1e39}, r"softcap = 1e\+39"),
    ({"softcap": 0}, "softcap = 0; expected a finite softcap > 0"), ({"softcap": -1.0}, "softcap = -1.0"),
    ({"softcap": math.inf}, "softcap = inf"), ({"softcap": math.nan}, "softcap = nan"),
    ({"reduction": "average"}, "reduction = 'average'; expected one of mean, sum, none"),
    ({"impl": "fast"}, "impl = 'fast'; expected one of auto, plain, chunked"),
])
def test_bad_input(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets = problem()
    with pytest.raises(BadInput, match="linear_cross_entropy: got " if "got" not in message else message) as caught:
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | change))
    assert caught.match(message)
