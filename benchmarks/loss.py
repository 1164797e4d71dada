"""Cross-entropy of a linear head: omni_adapters.loss against logits written out, torch.compile, torch's own, Liger and CCE.

Forward and backward, softcap 15, mean over the rows: the weight frozen, the weight trained, 32 rows of 1500 supervised, and no
softcap, since torch's own F.linear_cross_entropy has none; the frozen one at other numbers of rows as well, for memory's sake.
On a CPU fp32 at 1500 rows, width 384, vocabulary 32768; on CUDA bf16 at 4096 rows, width 768.

Before a time counts, loss and gradients must agree with the equation in fp64. An error is a root mean square, relative; in bf16
none may be above that of logits written out by more than chance. Memory is what a step holds at most beyond what was there
before, gradients included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.group import Device, Group, Suite, Variant, worst
from benchmarks.measure import sentence
from benchmarks.step import raising
from omni_adapters.loss import linear_cross_entropy

TOLERANCE = 1e-5  # fp32, sums of 384 to 32768 terms of order 1
FOREIGN = ("liger", "cce")  # names of other projects' kernels, which nobody has promised for this hardware, begin so
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    N: int
    C: int
    V: int


class Case(NamedTuple):
    title: str
    softcap: float | None = 15.0
    trained: bool = False
    graded: float = 1.0  # share of the rows that are supervised


FROZEN = Case("weight frozen")
CASES = (FROZEN, Case("weight trained", trained=True), Case("few rows supervised", graded=32 / 1500),
         Case("no softcap", softcap=None))
SIZES: dict[tuple[Suite, Device], Size] = {
    ("quick", "cpu"): Size(256, 128, 8192), ("full", "cpu"): Size(1500, 384, 32768), ("quick", "cuda"): Size(1024, 768, 32768),
    ("full", "cuda"): Size(4096, 768, 32768)}
MORE_ROWS = {"cpu": (375, 6000), "cuda": (1024, 16384)}  # of the full suite: a quarter and four times as many


def cases(suite: Suite, device: Device) -> Iterator[tuple[Case, Size]]:
    size = SIZES[suite, device]
    yield from ((case, size) for case in CASES)
    if suite == "full":
        yield from ((FROZEN, size._replace(N=N)) for N in MORE_ROWS[device])


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for case, size in cases(suite, device):
        yield group(case, size, dtype, suite, device)
        if case is FROZEN and size == SIZES[suite, device]:
            yield kernels_alone(size, device)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """What a GPT's forward does. As there, the logits are let go of when it returns, but for what backward needs."""
    logits = F.linear(hidden, weight).float()  # a half-precision head rounds its logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1)


def torch_chunked(softcap: float | None) -> Loss | None:
    """torch's own, where this torch has it: it takes no softcap."""
    if softcap is None and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return partial(F.linear_cross_entropy, ignore_index=-1, options=torch.nn.LinearCrossEntropyOptions())
    return None


def batch(case: Case, size: Size, device: Device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as after a norm; a weight that spreads the logits by 1, as early in training."""
    rng, (N, C, V) = torch.Generator().manual_seed(0), size
    hidden, weight = torch.randn(N, C, generator=rng), torch.randn(V, C, generator=rng) / C**0.5
    targets = torch.randint(V, (N,), generator=rng)
    targets[graded(case, size):] = -1
    return (hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(case.trained), targets.to(device))


def graded(case: Case, size: Size) -> int:
    return round(case.graded * size.N)


def step(loss_of: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    loss = loss_of(hidden, weight, targets)
    loss.backward()
    return loss.detach()


def group(case: Case, size: Size, dtype: torch.dtype, suite: Suite, device: Device) -> Group:
    """Every variant over the same tensors; a step begins by letting go of the gradients of the one before."""
    tensors, (N, C, V), rows = batch(case, size, device, dtype), size, graded(case, size)
    # The expectation is the chunked path in fp64, which tests hold to the equation by hand: written out it takes gigabytes
    exact = came(partial(linear_cross_entropy, softcap=case.softcap, impl="chunked"),
                 tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
                       for tensor in tensors))
    made = [variant(name, loss_of, tensors, exact) for name, loss_of in contenders(case, suite, device)]
    flops = (6 if case.trained else 4) * rows * C * V
    least = dtype.itemsize * C * (2 * rows + (3 if case.trained else 2) * V)  # inputs read, gradients written, once each
    made = [one._replace(flops=flops, bytes=least) if one.step else one for one in made]
    bound = TOLERANCE if dtype == torch.float32 else 1.05 * (made[0].error or 0.0)
    title = case.title if rows == N else f"{rows} rows supervised"
    return Group("loss", f"{title}, N={N}, C={C}, V={V}, {dtype}".replace("torch.", ""), "naive", made, bound)


def contenders(case: Case, suite: Suite, device: Device) -> Iterator[tuple[str, Loss | str]]:
    """Name and loss, or why there is none. The first is what ratios and errors are held against."""
    written_out = partial(naive, softcap=case.softcap)
    yield "naive", written_out
    slow_start = device == "cpu" and suite == "quick"
    yield "torch.compile", "takes seconds to compile" if slow_start else torch.compile(written_out)
    for impl in ("plain", "chunked", "triton", "cublas"):
        yield impl, why_not(impl, case, device) or partial(linear_cross_entropy, softcap=case.softcap, impl=impl)
    yield "torch, chunked", torch_chunked(case.softcap) or "not in this torch, or not with a softcap"
    yield from others(case, device)


def why_not(impl: str, case: Case, device: Device) -> str:
    if impl not in ("triton", "cublas"):
        return ""
    if device == "cpu" or not find_spec("triton"):
        return "needs CUDA and triton"
    return "needs a frozen weight and a softcap" if impl == "triton" and (case.trained or case.softcap is None) else ""


def others(case: Case, device: Device) -> Iterator[tuple[str, Loss | str]]:
    """Liger-Kernel as it comes, with larger chunks, and with the weight's gradient summed in fp32; cut-cross-entropy as it comes,
    and with no gradient left out and sums in fp32."""
    ligers: dict[str, dict[str, Any]] = {"liger": {}, "liger, chunk_mem_const=16": {"chunk_mem_const": 16},
                                         "liger, fp32 sums": {"accum_dtype": torch.float32}}
    for name, extra in ligers.items():
        yield name, missing("liger_kernel", device) or built(partial(liger, case, extra))
    for name, impl in (("cce", "cce"), ("cce, exact", "cce_exact")):
        yield name, missing("cut_cross_entropy", device) or built(partial(cut_cross_entropy, case, impl))


def missing(package: str, device: Device) -> str:
    return "needs CUDA" if device == "cpu" else "" if find_spec(package) else f"{package} is not installed"


def built(make: Callable[[], Loss | str]) -> Loss | str:
    """Another project's loss, or why importing it fails: installed is not yet importable."""
    try:
        return make()
    except Exception as failure:
        return sentence(failure)


def liger(case: Case, extra: dict[str, Any]) -> Loss | str:
    from inspect import signature

    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function
    names = list(signature(Function.forward).parameters)[1:]  # after ctx: apply takes no names, so defaults fill the places
    if any(name not in names for name in extra):
        return f"this version has no {', '.join(extra)}"
    known = {name: parameter.default for name, parameter in signature(Function.forward).parameters.items()}
    known |= {"ignore_index": -1, "softcap": case.softcap} | extra
    rest = [known[name] for name in names[3:]]
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = Function.apply(hidden, weight, targets, *rest)
        return result[0] if isinstance(result, tuple) else result
    return loss


def cut_cross_entropy(case: Case, impl: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cut
    return lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=-1, softcap=case.softcap, impl=impl)


def variant(name: str, loss_of: Loss | str, tensors: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]) -> Variant:
    """A foreign loss that cannot run is "n/a"; ours, torch's and the one written out must run: theirs is a row "failed"."""
    if isinstance(loss_of, str):
        return Variant(name, why=loss_of)
    try:
        off = [relative(one, other) for one, other in zip(came(loss_of, tensors), exact)]
    except Exception as failure:
        return Variant(name, why=sentence(failure)) if name.startswith(FOREIGN) else raising(name, failure)
    return Variant(name, partial(step, loss_of, *tensors), error=worst(off), trained=tensors[:2])


# ---- the kernels alone -----------------------------------------------------------------------------------------------


def kernels_alone(size: Size, device: Device) -> Group:
    """The two GEMMs of "triton" in each of their tilings, without what a host does before the first: what a whole step loses
    there says nothing of a kernel, and which tiles to ship is asked here."""
    case, shipped = f"frozen, kernels alone, N={size.N}, C={size.C}, V={size.V}, bfloat16", "two a SM"
    why = why_not("triton", FROZEN, device)
    if not why and torch.cuda.get_device_capability() != (9, 0):
        why = "tilings for sm_90"
    if why:
        return Group("loss", case, shipped, [Variant(shipped, why=why)])
    from omni_adapters.kernels import linear_cross_entropy as kernels

    hidden, weight, targets = batch(FROZEN, size, device, torch.bfloat16)
    exact = came(partial(linear_cross_entropy, softcap=FROZEN.softcap, impl="chunked"),
                 (hidden.detach().double().requires_grad_(), weight.double(), targets))
    x, rows, dx = hidden.detach(), torch.arange(size.N, device=device), torch.empty_like(hidden)

    def run(config: kernels.Config) -> Tensor:
        return kernels.bounded(x, weight, targets, rows, FROZEN.softcap or 0.0, 1 / size.N, dx, config=config)

    made = []
    for name, config in kernels.CANDIDATES.items():
        try:
            dx.fill_(math.nan)  # what a tiling leaves out must not be what the one before it wrote
            off = [relative(run(config).mean().double(), exact[0]), relative(dx.double(), exact[1])]
        except Exception as failure:
            made.append(raising(name, failure))
            continue
        made.append(Variant(name, partial(run, config), error=worst(off), flops=4 * size.N * size.C * size.V,
                            bytes=2 * size.C * (2 * size.N + 2 * size.V)))
    return Group("loss", case, shipped, made, 2**-8)  # a rounding of bf16; eager's own is larger


def relative(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, of what is expected."""
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def came(loss_of: Loss, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients, in fp64; nothing of them is left behind."""
    hidden, weight, targets = tensors
    loss = step(loss_of, hidden, weight, targets)
    values = [value.double() for value in (loss, hidden.grad, weight.grad) if value is not None]
    hidden.grad = weight.grad = None
    return values
