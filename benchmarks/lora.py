"""LoRA: one linear layer and one nanochat block, forward and backward, against the same frozen, PEFT, and three operations.

Rank 16, no dropout, the gradient of the input wanted, as above a projector; 4096 rows, fp32 on a CPU. On CUDA, where 4096 rows
take less time than their launches, one layer has those and all have 32768; there activations are bf16 and weights fp32 masters
that the layer casts, as in nanochat: PEFT as it comes then casts x to fp32 for A and B. Errors are of the output and the
gradients of x, A and B, against the equation in fp64. Flops are those of matmuls, counted by hand, two for a product and its sum;
bytes are what must be read and written once. Of saved tensors each storage counts once, parameters do not, copies of them in
another dtype do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.group import Device, Group, Suite, Variant, worst
from benchmarks.step import saved_bytes
from omni_adapters.lora import Form, LoRALinear, inject_lora, lora_by_path, lora_layers
from omni_adapters.reference_gpt import GPT, GPTConfig, Linear

RANK, ALPHA = 16, 32.0
ROWS = {"cpu": 4096, "cuda": 32768}
SIZES = {"quick": [(768, 3072), (3072, 768)],
         "full": [(384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768), (1280, 5120), (5120, 1280)]}
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # sums of 5120 terms in fp32; some roundings of x, W, y and dy to 2⁻⁹
BLOCK_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # six matmuls, three norms and a softmax, one inside the other
FORMS: dict[str, Form] = {"ours": "auto", "ours: two-path": "two_path"}
TARGETS = ["c_q", "c_k", "c_v", "c_proj", "c_fc"]


class ThreeOp(nn.Module):
    """W x + s · B (A x), as it is written, factors in fp32 masters."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        y: Tensor = self.base(x) + (ALPHA / RANK) * low
        return y


class Problem:
    """One layer's weight, factors, input and upstream gradient, seeded, and what the equation says of them in fp64."""

    def __init__(self, n_in: int, n_out: int, rows: int, device: Device) -> None:
        rng = torch.Generator().manual_seed(0)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = device
        self.weight = (torch.randn(n_out, n_in, generator=rng) / n_in**0.5).to(device)
        self.a = (torch.randn(RANK, n_in, generator=rng) / n_in**0.5).to(device)
        self.b = (0.1 * torch.randn(n_out, RANK, generator=rng)).to(device)
        self.x = torch.randn(rows, n_in, generator=rng).to(device, self.dtype).requires_grad_()
        self.dy = torch.randn(rows, n_out, generator=rng).to(device, self.dtype)

    def base(self) -> nn.Linear:
        with torch.device("meta"):
            layer = Linear(self.weight.size(1), self.weight.size(0))
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        return layer

    def expected(self) -> list[Tensor]:
        s = ALPHA / RANK
        x, dy, w, a, b = (t.detach().double() for t in (self.x, self.dy, self.weight, self.a, self.b))
        merged = w + s * b @ a
        return [x @ merged.T, dy @ merged, s * (dy @ b).T @ x, s * dy.T @ (x @ a.T)]

    def ours(self, form: Form) -> LoRALinear:
        layer = LoRALinear(self.base(), RANK, ALPHA)
        layer.lora_a.data, layer.lora_b.data, layer.form = self.a.clone(), self.b.clone(), form
        return layer

    def peft(self) -> nn.Module:
        host = nn.ModuleDict({"layer": self.base()})
        adapted = with_peft(host, ["layer"])
        factors = dict(adapted.named_parameters())
        for name, value in (("lora_A", self.a), ("lora_B", self.b)):
            factors[f"layer.{name}.default.weight"].data = value.clone()
        layer: nn.Module = adapted["layer"]  # type: ignore[index]
        return layer


def with_peft(host: nn.Module, targets: list[str]) -> nn.Module:
    """PEFT as it comes, but for rank and alpha: no dropout, fp32 factors."""
    import peft
    config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets)
    adapted: nn.Module = peft.inject_adapter_in_model(config, host)
    return adapted


def has_peft() -> bool:
    from importlib.util import find_spec
    return find_spec("peft") is not None


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    if device == "cuda":
        yield layer_group(768, 3072, ROWS["cpu"], device)
    for n_in, n_out in SIZES[suite]:
        yield layer_group(n_in, n_out, ROWS[device], device)
    for width in (384,) if suite == "quick" else (384, 768, 1280):
        yield block_group(width, 1024 if suite == "quick" else 4096, device)


# ---- one layer -------------------------------------------------------------------------------------------------------


def layer_group(n_in: int, n_out: int, rows: int, device: Device) -> Group:
    problem = Problem(n_in, n_out, rows, device)
    expected = problem.expected()
    big, small = 2 * rows * n_in * n_out, 2 * rows * RANK * (n_in + n_out)  # flops of x Wᵀ, and of both factors on all rows
    least = layer_bytes(problem)
    frozen = problem.base()
    variants = [Variant("frozen layer", partial(step, frozen, (problem.x,), problem.dy), flops=2 * big, bytes=least,
                        saved_bytes=saved_bytes(partial(frozen, problem.x), frozen), trained=(problem.x,))]
    variants += [layer_variant(name, problem.ours(form), problem, expected, big, small) for name, form in FORMS.items()]
    variants.append(layer_variant("PEFT", problem.peft(), problem, expected, big, small) if has_peft()
                    else Variant("PEFT", why="peft is not installed"))
    three = ThreeOp(problem.base(), problem.a.clone(), problem.b.clone())
    variants.append(layer_variant("three-op", three, problem, expected, big, small))
    case = f"{n_in} → {n_out}, {rows} rows, {str(problem.dtype).removeprefix('torch.')}"
    return Group("lora", case, "frozen layer", variants, BOUND[problem.dtype])


def layer_variant(name: str, layer: nn.Module, problem: Problem, expected: list[Tensor], big: int, small: int) -> Variant:
    """Two paths multiply by the factors once forward and twice backward. Merged: twice backward only, and W' twice."""
    n_out, n_in = problem.weight.shape
    merged = isinstance(layer, LoRALinear) and layer.runs_merged(problem.x)
    flops = 2 * big + (2 * small + 2 * 2 * RANK * n_in * n_out if merged else 3 * small)
    return Variant(name, partial(step, layer, (problem.x,), problem.dy), error=error(layer, problem, expected), flops=flops,
                   bytes=layer_bytes(problem), saved_bytes=saved_bytes(partial(layer, problem.x), layer),
                   trained=(problem.x, *layer.parameters()))


def layer_bytes(problem: Problem) -> int:
    """x and dy read, y and dx written, once each; the weight read in both passes."""
    activations = 2 * (problem.x.numel() + problem.dy.numel()) * problem.x.element_size()
    return activations + 2 * problem.weight.numel() * problem.weight.element_size()


def error(layer: nn.Module, problem: Problem, expected: list[Tensor]) -> float:
    """Largest difference of output or gradient from fp64, relative to its largest element."""
    y = step(layer, (problem.x,), problem.dy)
    came = [y, problem.x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    return worst(float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(came, expected, strict=True)
                 if one is not None)


def step(net: nn.Module, inputs: tuple[Any, ...], dy: Tensor) -> Tensor:
    """Forward and backward; gradients of what trains and of the first input are made anew."""
    for tensor in (inputs[0], *net.parameters()):
        tensor.grad = None
    y: Tensor = net(*inputs)
    y.backward(dy)
    return y.detach()


# ---- one block -------------------------------------------------------------------------------------------------------


def block_group(width: int, rows: int, device: Device) -> Group:
    """A block of the reference GPT, LoRA on attention and MLP. Timed in bf16 over fp32 masters on CUDA, as nanochat, and in fp32
    on a CPU; saved bytes are those of bf16 on both."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = torch.Generator().manual_seed(0)
    x, ve, dy = (torch.randn(1, rows, width, generator=rng).to(device, dtype) for _ in range(3))
    cos_sin = tuple(table.to(device, dtype) for table in GPT.rotary_table(rows, 64))
    inputs = (x.requires_grad_(), ve, cos_sin, rows, None)
    builders: dict[str, Callable[[], nn.Module]] = {
        "frozen block": lambda: block(width, rows, device),
        **{name: partial(adapted_block, width, rows, device, form) for name, form in FORMS.items()}}
    if has_peft():
        builders["PEFT"] = lambda: with_factors_of(with_peft(block(width, rows, device), TARGETS),
                                                   adapted_block(width, rows, device, "two_path"))
    nets = {name: build() for name, build in builders.items()}
    half = (x.detach().bfloat16().requires_grad_(), ve.bfloat16(), tuple(table.bfloat16() for table in cos_sin), rows, None)
    variants = [Variant(name, partial(step, net, inputs, dy), error=block_error(net, nets["ours: two-path"], inputs, dy),
                        saved_bytes=saved_bytes(partial(net, *half), net), trained=(x, *net.parameters()))
                for name, net in nets.items()]
    if not has_peft():
        variants.append(Variant("PEFT", why="peft is not installed"))
    case = f"block of width {width}, {rows} rows, {str(dtype).removeprefix('torch.')}; saved bytes in bf16"
    return Group("lora", case, "frozen block", variants, BLOCK_BOUND[dtype])


def block_error(net: nn.Module, reference: nn.Module, inputs: tuple[Any, ...], dy: Tensor) -> float:
    """Of output and gradients, against the two-path block on fp64 inputs, which casts its weights and factors to fp64; the frozen
    block is its own reference."""
    reference = reference if any(p.requires_grad for p in net.parameters()) else net
    x, ve, cos_sin, *rest = inputs
    wide = (x.detach().double().requires_grad_(), ve.double(), tuple(table.double() for table in cos_sin), *rest)
    expected = [step(reference, wide, dy.double()), wide[0].grad, *factor_gradients(reference)]
    came = [step(net, inputs, dy), x.grad, *factor_gradients(net)]
    return worst(float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(came, expected, strict=True))


def factor_gradients(net: nn.Module) -> list[Tensor]:
    """A and B of each layer in turn, whatever their names."""
    return [p.grad.double() for p in net.parameters() if p.grad is not None]


def with_factors_of(net: nn.Module, ours: nn.Module) -> nn.Module:
    """PEFT's layers with our A and B."""
    for (path, layer), (other, mine) in zip(peft_layers(net), lora_by_path(ours).items(), strict=True):
        assert path == other
        layer.get_parameter("lora_A.default.weight").data.copy_(mine.lora_a)
        layer.get_parameter("lora_B.default.weight").data.copy_(mine.lora_b)
    return net


def peft_layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in net.named_modules() if hasattr(module, "lora_A")]


def block(width: int, rows: int, device: Device) -> nn.Module:
    torch.manual_seed(0)
    heads = width // 64
    gpt = GPT(GPTConfig(sequence_len=rows, vocab_size=64, n_layer=1, n_head=heads, n_kv_head=heads, n_embd=width))
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.02)
    first: nn.Module = gpt.blocks()[0].to(device).requires_grad_(False)
    return first


def adapted_block(width: int, rows: int, device: Device, form: Form) -> nn.Module:
    net = block(width, rows, device)
    inject_lora(net, RANK, ALPHA)
    for layer in lora_layers(net, "benchmarks.lora"):
        layer.lora_b.data.normal_(std=0.02)  # from the generator that block() seeds
        layer.form = form
    return net
