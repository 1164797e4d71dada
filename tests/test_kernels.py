"""Kernels of linear cross-entropy: interpreted and compiled without a GPU, each in a process of its own, and measured on one.

Interpreting is decided when the kernels are imported, so that the two cannot share a process with each other or with this one.
On CUDA the claims are those of the module: no further from fp64 than eager bf16, 32 MB of buffers at any N, the same bits twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.loss import device_form, linear_cross_entropy
from omni_adapters.shapes import BadInput, MissingExtra

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it is there for Linux on x86-64")
needs_cuda = pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("triton")), reason="no CUDA device, or no triton")


def passes_in_a_process(name: str, tmp_path: Path, **environment: str) -> bool:
    """Whether a file of tests that pytest does not collect by itself passes: it has some, and none of them fails."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / name)]
    variables = {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path), **environment}
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, cwd=tmp_path)
    print(child.stdout, child.stderr)
    return child.returncode == 0


@pytest.mark.slow
@needs_triton
def test_kernels_interpreted(tmp_path: Path) -> None:
    assert passes_in_a_process("kernels_interpreted.py", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_kernels_compiled_for_sm_80_and_sm_90(tmp_path: Path) -> None:
    assert passes_in_a_process("kernels_compiled.py", tmp_path, TRITON_INTERPRET="0")


# ---- which form ------------------------------------------------------------------------------------------------------


def test_on_cpu_auto_never_takes_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_adapters.loss.device_form", None)
    hidden, weight, targets = torch.randn(600, 8), torch.randn(500, 8), torch.zeros(600, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        assert bool(linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, softcap=15.0).isfinite())


@pytest.mark.parametrize("softcap, dtypes, trained, form", [
    (15.0, (torch.bfloat16, torch.bfloat16), False, "triton"), (32.0, (torch.bfloat16, torch.bfloat16), False, "triton"),
    (33.0, (torch.bfloat16, torch.bfloat16), False, "cublas"), (None, (torch.bfloat16, torch.bfloat16), False, "cublas"),
    (15.0, (torch.bfloat16, torch.bfloat16), True, "cublas"), (15.0, (torch.float16, torch.float16), False, "cublas"),
    (15.0, (torch.bfloat16, torch.float32), False, "cublas"), (15.0, (torch.float32, torch.float32), False, "cublas")])
def test_what_auto_takes_on_cuda(softcap: float | None, dtypes: tuple[torch.dtype, ...], trained: bool, form: str) -> None:
    hidden, weight = torch.zeros(2, 3, dtype=dtypes[0]), torch.zeros(5, 3, dtype=dtypes[1], requires_grad=trained)
    assert device_form("auto", hidden, weight, softcap) == form


@needs_triton
@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_a_kernel_on_cpu_is_refused(impl: str) -> None:
    with pytest.raises(BadInput, match=f"got impl = '{impl}' on cpu; expected tensors on CUDA"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), softcap=15.0, impl=impl)


def test_without_triton_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_adapters.loss.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="linear_cross_entropy needs triton"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), softcap=15.0, impl="triton")


# ---- on a GPU --------------------------------------------------------------------------------------------------------

REAL = (4096, 768, 32768)


def problem(N: int, C: int, V: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """As after a norm; a quarter of the targets ignored; a weight that spreads the logits by 2."""
    rng = torch.Generator("cuda").manual_seed(0)
    hidden, weight = torch.randn(N, C, device="cuda", generator=rng), torch.randn(V, C, device="cuda", generator=rng)
    targets = torch.randint(V, (N,), device="cuda", generator=rng)
    targets[1::4] = -1
    return hidden.to(dtype), (2 * weight / C**0.5).to(dtype), targets


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """As nanochat's forward: logits in the GPT's dtype, everything after them in fp32."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets, ignore_index=-1)


def step(batch: tuple[Tensor, Tensor, Tensor], trained: bool, loss_of: Any) -> list[Tensor]:
    hidden, weight = batch[0].detach().clone().requires_grad_(), batch[1].detach().clone().requires_grad_(trained)
    loss = loss_of(hidden, weight, batch[2])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (hidden, weight) if leaf.grad is not None)]


@needs_cuda
@pytest.mark.parametrize("impl, trained, softcap", [("triton", False, 15.0), ("cublas", False, 15.0), ("cublas", True, 15.0),
                                                    ("cublas", False, None)])
@pytest.mark.parametrize("N, C, V", [REAL, (70, 48, 330), (33, 72, 40000), (5000, 384, 65536)])
def test_never_further_off_than_eager_on_cuda(N: int, C: int, V: int, impl: str, trained: bool, softcap: float | None) -> None:
    """Root mean squares over 4 · 10³ and more elements: two samples of the same rounding differ by less than 5 %."""
    batch = problem(N, C, V)
    exact = step((batch[0].double(), batch[1].double(), batch[2]), trained,
                 lambda *a: linear_cross_entropy(*a, softcap=softcap, impl="chunked"))
    came = step(batch, trained, lambda *a: linear_cross_entropy(*a, softcap=softcap, impl=impl))
    usual = step(batch, trained, lambda *a: eager(*a, softcap))
    assert abs(float(came[0]) - float(exact[0])) <= abs(float(usual[0]) - float(exact[0])) + 2**-20 * float(exact[0])
    for one, other, right in zip(came[1:], usual[1:], exact[1:]):
        assert float((one.double() - right).square().mean()) <= 1.05**2 * float((other.double() - right).square().mean())


@needs_cuda
@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_reduction_on_cuda(reduction: str, dtype: torch.dtype, impl: str) -> None:
    """To the rounding of two products of the dtype; an ignored row holds NaN."""
    if impl == "triton" and dtype == torch.float16:
        pytest.skip("refused: fp16 has no room for e^−2c")
    hidden, weight, targets = problem(70, 48, 330, dtype)
    hidden[1::4] = torch.nan
    right = step((hidden.double(), weight.double(), targets), False,
                 lambda *a: linear_cross_entropy(*a, softcap=15.0, reduction=reduction, impl="plain").sum())
    came = step((hidden, weight, targets), False,
                lambda *a: linear_cross_entropy(*a, softcap=15.0, reduction=reduction, impl=impl).sum())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(came[0].double(), right[0], rtol=max(4 * eps, 2**-10), atol=0)
    graded = targets >= 0
    assert bool((came[1][~graded] == 0).all())
    near = (came[1].double() - right[1])[graded].abs().max() / right[1][graded].abs().max()
    assert float(near) <= max(16 * eps, 2**-10)


@needs_cuda
@pytest.mark.parametrize("N", [4096, 32768])
def test_buffers_are_32_megabytes_at_any_length_on_cuda(N: int) -> None:
    hidden, weight, targets = problem(N, *REAL[1:])
    hidden.requires_grad_()
    for _ in range(2):  # the first compiles, and cuBLAS takes its workspace
        hidden.grad = None
        torch.cuda.empty_cache()  # a cached block that is a little too large would count whole
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, targets, softcap=15.0, impl="triton").backward()
        peak = torch.cuda.max_memory_allocated() - before
    rows = 64 * N  # bytes of what there is one of a row: indices, masks, losses
    assert peak <= 32e6 + hidden.numel() * hidden.element_size() + rows


@needs_cuda
@pytest.mark.parametrize("impl, trained", [("triton", False), ("cublas", False), ("cublas", True)])
def test_the_same_bits_twice_on_cuda(impl: str, trained: bool) -> None:
    batch = problem(*REAL)
    first, second = (step(batch, trained, lambda *a: linear_cross_entropy(*a, softcap=15.0, impl=impl)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@needs_cuda
def test_every_candidate_computes_the_same_on_cuda() -> None:
    from omni_adapters.kernels import linear_cross_entropy as kernels
    hidden, weight, targets = problem(1000, 768, 32768)
    rows, came = (targets >= 0).nonzero().squeeze(1), []
    for config in kernels.CANDIDATES.values():
        dx = torch.zeros_like(hidden, dtype=torch.float32)
        came.append((kernels.bounded(hidden, weight, targets, rows, 15.0, 1.0, dx, config=config), dx))
    for losses, dx in came[1:]:
        torch.testing.assert_close(losses, came[0][0], rtol=2**-16, atol=2**-16)  # sums in another order
        assert float((dx - came[0][1]).abs().max()) <= 2**-8 * float(dx.abs().max())  # an entry of G may round the other way


@needs_cuda
def test_one_graph_on_cuda() -> None:
    batch = problem(70, 48, 330)
    torch._dynamo.reset()
    results = [step(batch, False, function) for function in (
        lambda *a: linear_cross_entropy(*a, softcap=15.0),
        torch.compile(lambda *a: linear_cross_entropy(*a, softcap=15.0), fullgraph=True))]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def test_what_needs_cuda_says_so_in_its_name() -> None:
    """`benchmarks/gpu.sh` picks these tests by name: `-k cuda`."""
    marked = [name for name, test in globals().items() if needs_cuda.mark in getattr(test, "pytestmark", ())]
    assert marked and all("cuda" in name for name in marked)
