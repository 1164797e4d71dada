"""Cross-entropy of a linear head: omni_adapters.loss against logits written out, torch.compile, torch's own, Liger and CCE.

Forward and backward, softcap 15, mean over the rows: the weight frozen, the weight trained, 32 rows of 1500 supervised, and no
softcap, since torch's own F.linear_cross_entropy has none; the frozen one at other numbers of rows as well, for memory's sake.
On a CPU fp32 at 1500 rows, width 384, vocabulary 32768; on CUDA bf16 at 4096 rows, width 768.

Before a time counts, loss and gradients must agree with the equation in fp64. An error is a root mean square, relative; in bf16
none may be above that of logits written out by more than chance. Memory is what a step holds at most beyond what was there
before, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

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
    """Liger-Kernel as it comes and with larger chunks; cut-cross-entropy as it comes and with no gradient left out."""
    for name, extra in (("liger", {}), ("liger, chunk_mem_const=16", {"chunk_mem_const": 16})):
        yield name, missing("liger_kernel", device) or built(partial(liger, case, extra))
    for name, extra in (("cce", {}), ("cce, exact", {"filter_eps": None})):
        yield name, missing("cut_cross_entropy", device) or built(partial(cut_cross_entropy, case, extra))


def missing(package: str, device: Device) -> str:
    return "needs CUDA" if device == "cpu" else "" if find_spec(package) else f"{package} is not installed"


def built(make: Callable[[], Loss | str]) -> Loss | str:
    """Another project's loss, or why importing it fails: installed is not yet importable."""
    try:
        return make()
    except Exception as failure:
        return sentence(failure)


def liger(case: Case, extra: dict[str, int]) -> Loss | str:
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


def cut_cross_entropy(case: Case, extra: dict[str, None]) -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cut
    return lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=-1, softcap=case.softcap, **extra)


def variant(name: str, loss_of: Loss | str, tensors: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]) -> Variant:
    """A foreign loss that cannot run is "n/a"; ours, torch's and the one written out must run: theirs is a row "failed"."""
    if isinstance(loss_of, str):
        return Variant(name, why=loss_of)
    try:
        off = [float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
               for one, other in zip(came(loss_of, tensors), exact)]
    except Exception as failure:
        return Variant(name, why=sentence(failure)) if name.startswith(FOREIGN) else raising(name, failure)
    return Variant(name, partial(step, loss_of, *tensors), error=worst(off), trained=tensors[:2])


def came(loss_of: Loss, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients, in fp64; nothing of them is left behind."""
    hidden, weight, targets = tensors
    loss = step(loss_of, hidden, weight, targets)
    values = [value.double() for value in (loss, hidden.grad, weight.grad) if value is not None]
    hidden.grad = weight.grad = None
    return values
