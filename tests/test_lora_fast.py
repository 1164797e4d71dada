"""LoRA as one matmul: its equation within rounding, when it is chosen, what it keeps, and who may be replaced by it.

Bounds are those of a sum: a dot product of n terms in floating point is off by at most n · eps · Σ|terms| (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1, with twice its unit roundoff), so every bound below is eps · terms · the same product of
absolute values.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hosts import bits, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from omni_adapters.host_linear import linear_form
from omni_adapters.lora import LoRALinear, inject_lora, lora_layers, lora_parameters
from omni_adapters.lora_matmul import WIDENS, factor_gradients, merged_linear
from omni_adapters.reference_gpt import GPT, Linear

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}
IDX = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def layer_of(n_in: int = 24, n_out: int = 40, rank: int = 4, bias: bool = False, kind: type[nn.Linear] = nn.Linear,
             form: str = "merged", **options: Any) -> LoRALinear:
    """A layer as after training: B is not zero."""
    base = kind(n_in, n_out, bias=bias) if kind is nn.Linear else kind(n_in, n_out)
    layer = LoRALinear(base, rank, **options)
    nn.init.normal_(layer.lora_b)
    layer.form = form
    return layer


def results(layer: LoRALinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients, in fp64."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach().double(), "x": x.grad.double(), "a": layer.lora_a.grad.double(), "b": layer.lora_b.grad.double()}


def expected(layer: LoRALinear, x: Tensor, dy: Tensor, absolute: bool = False) -> dict[str, Tensor]:
    """The equations of omni_adapters/lora_matmul.py in fp64; `absolute`, with every factor's absolute value."""
    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().abs() if absolute else tensor.detach().double()

    a, b, s = wide(layer.lora_a), wide(layer.lora_b), layer.scaling
    flat_x, flat_dy = wide(x).flatten(0, -2), wide(dy).flatten(0, -2)
    w = wide(layer.weight) + s * b @ a
    y = wide(x) @ w.T + (0 if layer.bias is None else wide(layer.bias))
    return {"y": y, "x": wide(dy) @ w, "a": s * (flat_dy @ b).T @ flat_x, "b": s * flat_dy.T @ (flat_x @ a.T)}


def terms(layer: LoRALinear, x: Tensor) -> dict[str, int]:
    """Roundings that a result passes at most: its sums, one inside the other, and single operations."""
    n_out, n_in = layer.weight.shape
    rows = x.numel() // n_in
    return {"y": n_in + layer.rank + 5, "x": n_out + layer.rank + 5, "a": n_out + rows + 5, "b": n_in + rows + 5}


# ---- the equation ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), data=st.data(), bias=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@pytest.mark.parametrize("form", ["merged", "two_path"])
def test_output_and_gradients_are_the_equation(form: str, kind: type[nn.Linear], dtype: torch.dtype, n_in: int, n_out: int,
                                               data: st.DataObject, bias: bool) -> None:
    rank = data.draw(st.integers(1, min(n_in, n_out)))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    layer = layer_of(n_in, n_out, rank, bias, kind, form)
    if kind is nn.Linear:
        layer.to(dtype)  # A and B stay fp32; under a class that casts, W does too
    x, dy = torch.randn(*shape, n_in, dtype=dtype), torch.randn(*shape, n_out, dtype=dtype)
    assert layer.runs_merged(x) == (form == "merged")
    came, wanted, most = results(layer, x, dy), expected(layer, x, dy), expected(layer, x, dy, absolute=True)
    for name, number in terms(layer, x).items():
        gradient_eps = EPS[torch.float32] if name in "ab" else EPS[dtype]  # those of A and B are fp32 as A and B are
        assert bool(((came[name] - wanted[name]).abs() <= number * gradient_eps * most[name]).all()), name


def test_an_input_without_rows_of_its_own_and_one_that_is_not_contiguous() -> None:
    layer = layer_of()
    x = torch.randn(24, 3, 2).permute(2, 1, 0)
    assert layer(x[0, 0]).shape == (40,)
    dy = torch.randn(2, 3, 40)
    came, wanted, most = results(layer, x, dy), expected(layer, x, dy), expected(layer, x, dy, absolute=True)
    for name, number in terms(layer, x).items():
        assert bool(((came[name] - wanted[name]).abs() <= number * EPS[torch.float32] * most[name]).all()), name


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_first_and_second_derivatives_in_fp64(wanted: tuple[bool, bool, bool]) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = (2, 3, 4), (5, 4), (2, 4), (5, 2), (5,)
    x, w, a, b, bias = (torch.randn(*size, generator=rng, dtype=torch.float64) for size in sizes)
    for tensor, flag in zip((x, a, b), wanted):
        tensor.requires_grad_(flag)
    inputs = (x, w, bias, a, b, 1.5)
    assert torch.autograd.gradcheck(merged_linear, inputs)
    assert torch.autograd.gradgradcheck(merged_linear, inputs)


def test_a_gradient_of_functions() -> None:
    """torch.func takes the same Function."""
    layer = layer_of()
    x = torch.randn(9, 24)
    factors = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(factors)
    layer(x).square().sum().backward()
    assert sorted(found) == ["lora_a", "lora_b"]
    assert torch.equal(found["lora_a"], layer.lora_a.grad) and torch.equal(found["lora_b"], layer.lora_b.grad)


def test_bf16_over_fp32_masters_rounds_weight_and_output_once_and_sums_their_gradients_in_fp32() -> None:
    layer = layer_of(kind=Linear)
    x, dy = torch.randn(2, 17, 24).bfloat16(), torch.randn(2, 17, 40).bfloat16()
    came, wanted, most = results(layer, x, dy), expected(layer, x, dy), expected(layer, x, dy, absolute=True)
    for name in "yx":  # one rounding of each weight, one of the result, half an eps each, and the sum in fp32
        bound = (1.01 * EPS[torch.bfloat16] + terms(layer, x)[name] * EPS[torch.float32]) * most[name]
        assert bool(((came[name] - wanted[name]).abs() <= bound).all()), name
    for name in "ab":
        assert bool(((came[name] - wanted[name]).abs() <= terms(layer, x)[name] * EPS[torch.float32] * most[name]).all()), name
    assert layer(x).dtype == torch.bfloat16 and layer.lora_a.grad.dtype == torch.float32


@pytest.mark.skipif(not WIDENS, reason="this torch cannot trace a matmul that returns fp32")
def test_on_cuda_halves_go_through_matmuls_that_return_fp32() -> None:
    """On tensors without storage, as here may be no GPU: shapes, dtypes, and which operators run. Not what they compute."""
    class Matmuls(TorchDispatchMode):
        ran: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ran.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad(), Matmuls():
        x, dy = (torch.empty(50, width, device="cuda", dtype=torch.bfloat16) for width in (24, 40))
        a, b = torch.empty(4, 24, device="cuda"), torch.empty(40, 4, device="cuda")
        da, db = factor_gradients(x, dy, a, b, 2.0, torch.bfloat16)
    assert [op for op in Matmuls.ran if "mm" in op] == ["aten.mm.dtype"] * 4
    assert (da.shape, db.shape, da.dtype, db.dtype) == ((4, 24), (40, 4), torch.float32, torch.float32)


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
def test_autocast_says_in_what_dtype(kind: type[nn.Linear]) -> None:
    layer, x, dy = layer_of(kind=kind), torch.randn(17, 24), torch.randn(17, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.runs_merged(x)
        came = results(layer, x, dy)
        assert layer(x).dtype == torch.bfloat16 and layer(x.double()).dtype == torch.float64
    wanted, most = expected(layer, x, dy), expected(layer, x, dy, absolute=True)
    for name, number in terms(layer, x).items():  # x is rounded too
        bound = (1.51 * EPS[torch.bfloat16] + number * EPS[torch.float32]) * most[name]
        assert bool(((came[name] - wanted[name]).abs() <= bound).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [lambda w: w.normal_(), lambda w: w.zero_()], ids=["normal", "zero"])
def test_at_first_it_is_the_base_bit_for_bit(dtype: torch.dtype, weights: Callable[[Tensor], Tensor]) -> None:
    base = Linear(48, 64)
    weights(base.weight.data)
    x = torch.randn(99, 48).to(dtype)
    before = base(x)
    layer = LoRALinear(base)
    layer.form = "merged"
    assert layer.runs_merged(x) and torch.equal(layer(x), before)


def test_tiny_updates_survive_in_the_mean() -> None:
    """Of an update of rms 1e-5 to weights of rms 0.02, how much is in the bf16 output: the slope ⟨Δy, Δ⟩ / ⟨Δ, Δ⟩, with Δ = x
    (s · B A)ᵀ in fp64 and Δy = y(update) − y(none), both y as they came. 1 is all of it. Rounding W' moves few weights, but by
    a whole step, in proportion to the update: the mean is kept and each output is noisy. With noise of 4.4 times Δ, as measured
    here, spread over some 2¹⁹ independent weights the slope strays by less than 0.01. Added to y in bf16, less than half of
    Δ is left, since Δ is below a step of y: plain two-path and addmm lose it for good."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 1024, generator=rng).bfloat16(), 0.02 * torch.randn(1024, 1024, generator=rng)
    a, b = torch.randn(8, 1024, generator=rng), torch.randn(1024, 8, generator=rng)
    scaling = 1e-5 / float((b @ a).square().mean().sqrt())
    bare, low = F.linear(x, w.bfloat16()), F.linear(x, a.bfloat16())
    exact = scaling * x.double() @ (b @ a).double().T

    def kept(y: Tensor) -> float:
        return float(((y.double() - bare.double()) * exact).sum() / exact.square().sum())

    assert 0.95 <= kept(merged_linear(x, w, None, a, b, scaling)) <= 1.05
    assert kept(bare + scaling * F.linear(low, b.bfloat16())) < 0.5
    assert kept(torch.addmm(bare, low, b.bfloat16().T, alpha=scaling)) < 0.5


# ---- when it is chosen -----------------------------------------------------------------------------------------------


def test_auto_counts_rows() -> None:
    """2 · in · out / (in + out) = 30 rows for 24 × 40."""
    layer = layer_of(form="auto")
    assert not layer.runs_merged(torch.randn(29, 24)) and layer.runs_merged(torch.randn(30, 24))
    assert layer.runs_merged(torch.randn(3, 10, 24)) and not layer.runs_merged(torch.randn(0, 24))
    few = torch.randn(29, 24)
    low = F.linear(few, layer.lora_a)
    assert torch.equal(layer(few), F.linear(few, layer.weight) + layer.scaling * F.linear(low, layer.lora_b))


CHOICES: dict[str, tuple[Callable[[LoRALinear], Any], bool]] = {
    "as it is": (lambda layer: None, True),
    "dropout": (lambda layer: setattr(layer, "dropout", 0.1), False),
    "dropout asleep": (lambda layer: setattr(layer.eval(), "dropout", 0.1), True),
    "disabled": (lambda layer: setattr(layer, "enabled", False), False),
    "merged for decoding": (lambda layer: layer.eval().merge(), False),
    "two_path": (lambda layer: setattr(layer, "form", "two_path"), False),
    "weight trained": (lambda layer: layer.weight.requires_grad_(), False),
    "bias trained": (lambda layer: layer.bias.requires_grad_(), False),
    "nothing trained": (lambda layer: layer.requires_grad_(False), False),
    "one factor trained": (lambda layer: layer.lora_a.requires_grad_(False), True),
}


@pytest.mark.parametrize(("change", "merged"), CHOICES.values(), ids=CHOICES)
def test_merged_only_where_it_is_the_same_and_pays(change: Callable[[LoRALinear], Any], merged: bool) -> None:
    layer, x = layer_of(bias=True, form="auto"), torch.randn(99, 24)
    change(layer)
    assert layer.runs_merged(x) == merged
    with torch.no_grad():  # what is validated is what trains
        assert layer.runs_merged(x) == merged


def test_a_trained_weight_gets_its_gradient() -> None:
    layer, x = layer_of(form="merged"), torch.randn(99, 24)
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(40, 24), rtol=1e-5, atol=99 * EPS[torch.float32] * 5)


def test_mismatched_dtypes_are_the_bases_to_refuse() -> None:
    layer = layer_of(form="merged")
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(99, 24).bfloat16())
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(99, 23))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_choose_alike(again: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = layer_of(kind=Linear), torch.randn(2, 24)
    assert again(layer).runs_merged(x) and torch.equal(again(layer)(x), layer(x))


# ---- what a host's class computes ------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoublingInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Quantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


class WithoutAutocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class CastingBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CastingX(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Counting(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return super().forward(x)


class Raising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only inside its host")


@pytest.mark.parametrize(("kind", "form"), [(nn.Linear, "plain"), (Linear, "casting"), (CastingBias, "casting"),
                                            (CastingX, "plain"), (Counting, "plain"), (Doubling, "own"),
                                            (DoublingInTraining, "own"), (Dropping, "own"), (Quantised, "own"), (Raising, "own"),
                                            (WithoutAutocast, "own")])
@pytest.mark.parametrize("change", [lambda m: m, lambda m: m.requires_grad_(False).eval(), lambda m: m.bfloat16(),
                                    lambda m: m.weight.data.zero_()], ids=["", "frozen", "bf16", "zero"])
def test_a_hosts_class_is_asked_what_it_computes(kind: type[nn.Linear], form: str, change: Callable[[nn.Module], Any]) -> None:
    layer = kind(24, 40)
    change(layer)
    before = {name: bits(t) for name, t in layer.state_dict().items()}
    attributes, random = {**vars(layer)}, bits(torch.get_rng_state())
    assert linear_form(layer) == form
    assert vars(layer) == attributes and bits(torch.get_rng_state()) == random
    assert {name: bits(t) for name, t in layer.state_dict().items()} == before


def test_what_cannot_be_asked_keeps_its_forward() -> None:
    class Labelled(nn.Parameter):
        pass

    assert linear_form(Linear(8, 8).to("meta")) == "own" and linear_form(nn.Linear(8, 8, device="meta")) == "plain"
    layer = nn.Linear(8, 8)
    layer.weight = Labelled(layer.weight.data)
    assert linear_form(layer) == "own"


def test_arithmetic_of_its_own_stays_in_use() -> None:
    layer, x = layer_of(kind=Doubling), torch.randn(99, 24)
    low = F.linear(x, layer.lora_a)
    assert torch.equal(layer(x), 2 * F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(low, layer.lora_b))


def test_hooks_of_a_layer_see_the_merged_output() -> None:
    layer, x = layer_of(), torch.randn(9, 24)
    plain = layer(x)
    handle = layer.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(layer(x), plain + 1)
    handle.remove()


# ---- inside machinery ------------------------------------------------------------------------------------------------


def tuned(form: str, **sizes: Any) -> GPT:
    gpt = reference(**sizes)
    inject_lora(gpt, rank=4)
    rng = torch.Generator().manual_seed(0)
    for layer in lora_layers(gpt, ""):
        layer.lora_b.data.normal_(std=0.1, generator=rng)
        layer.form = form
    return gpt


def gradients(gpt: nn.Module, loss: Tensor) -> list[Tensor]:
    gpt.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in lora_parameters(gpt))]


def close(one: list[Tensor], other: list[Tensor]) -> None:
    """fp32 through two layers and their norms: sums of at most 128 terms, an eps of the largest each."""
    for x, y in zip(one, other, strict=True):
        assert float((x - y).abs().max()) <= 128 * EPS[torch.float32] * max(1.0, float(y.abs().max()))


def test_a_gpt_in_either_form() -> None:
    merged, two_path = (gradients(gpt, gpt(IDX, IDX.roll(-1, 1))) for gpt in (tuned("merged"), tuned("two_path")))
    close(merged, two_path)
    assert not all(torch.equal(x, y) for x, y in zip(merged, two_path))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    """A reentrant checkpoint runs its first forward without gradients, so in two paths: the same but for rounding."""
    gpt = tuned("merged")
    plain = gradients(gpt, gpt(IDX, IDX.roll(-1, 1)))
    for block in gpt.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    gpt.wte().weight.requires_grad_()
    again = gradients(gpt, gpt(IDX, IDX.roll(-1, 1)))
    close(again, plain)
    assert reentrant or all(torch.equal(x, y) for x, y in zip(again, plain))


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_in_one_graph_it_keeps_what_it_keeps_in_eager_mode(bf16: bool) -> None:
    net = nn.Sequential(layer_of(24, 40, kind=Linear), layer_of(40, 24, kind=Linear))
    x = torch.randn(50, 24, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert saved_bytes(compiled, x) == saved_bytes(net, x) == 50 * (24 + 40) * x.element_size()
    close([compiled(x).float().detach()], [net(x).float().detach()])


def test_compiled_with_any_number_of_rows() -> None:
    """One graph on each side of the break-even, 30 rows."""
    layer, seen = layer_of(form="auto"), []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (40, 50, 60, 3, 4, 5):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    assert len(seen) == 2


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_inside_the_engines(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    alone = tuned("merged")
    expected = gradients(alone, alone(IDX, IDX.roll(-1, 1)))
    gpt = tuned("merged")
    close(gradients(gpt, DistributedDataParallel(gpt)(IDX, IDX.roll(-1, 1))), expected)
    gpt = tuned("merged")
    for block in gpt.blocks():
        fully_shard(block, reshard_after_forward=True)
    fully_shard(gpt)
    loss = gpt(IDX, IDX.roll(-1, 1))
    assert all(layer.runs_merged(torch.randn(2, layer.in_features)) is False for layer in lora_layers(gpt, ""))  # sharded again
    loss.backward()
    close([loss.detach(), *(p.grad.full_tensor() for p in lora_parameters(gpt))], expected)


# ---- what is kept for backward ---------------------------------------------------------------------------------------


def saved_bytes(net: nn.Module, *inputs: Any, casts: bool = True) -> int:
    """Of tensors that autograd keeps, each storage once, parameters not counted; without `casts`, nothing of a weight's shape."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    shapes = {frozenset(p.shape) for p in net.parameters() if p.ndim == 2}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and (casts or frozenset(tensor.shape) not in shapes):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = net(*inputs)
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_is_kept(dtype: torch.dtype) -> None:
    layer, x = layer_of(kind=Linear), torch.randn(2, 50, 24).to(dtype).requires_grad_()
    assert saved_bytes(layer, x) == x.numel() * x.element_size()


@pytest.mark.parametrize("casts", [False, True], ids=["activations", "with casts of weights"])
def test_a_third_of_pefts_bytes_on_a_nanochat_block(casts: bool) -> None:
    """What LoRA keeps for backward beyond the frozen block, bf16 activations over fp32 masters as in nanochat, PEFT as it comes
    (no dropout). PEFT casts each layer's x to fp32 and keeps that, q, k and v one each: T · C · 18 bf16 numbers and r-wide ones;
    x as it came is 6. Whole blocks, or fp32 activations, where PEFT keeps x as it came too, differ by less."""
    peft = pytest.importorskip("peft")
    T, C = 80, 128

    def block() -> nn.Module:
        return reference(n_embd=C, n_head=2, n_kv_head=2, n_layer=1, sequence_len=T).blocks()[0].requires_grad_(False)

    x, ve = torch.randn(1, T, C).bfloat16().requires_grad_(), torch.randn(1, T, C).bfloat16()
    cos_sin = tuple(table.bfloat16() for table in GPT.rotary_table(T, C // 2))
    ours, theirs = block(), block()
    inject_lora(ours, rank=16)
    for layer in lora_layers(ours, ""):
        layer.form = "merged"
    names = ["c_q", "c_k", "c_v", "c_proj", "c_fc"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=32, target_modules=names), theirs)
    frozen, mine, other = (saved_bytes(net, x, ve, cos_sin, T, None, casts=casts) for net in (block(), ours, theirs))
    assert mine - frozen <= (other - frozen) / 3
