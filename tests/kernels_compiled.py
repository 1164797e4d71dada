"""Kernels of linear cross-entropy compiled for sm_80 and sm_90, on a machine without a GPU: run by test_kernels.py.

Tiles, vocabulary (32768) and width (768) are those of a real launch, in bf16. Read off the binary: registers spilled (bytes of
stack a thread), shared memory, and which tensor core instructions are in it. Spills allowed: what two programs on an SM cost
`exponentials` after its sum, beside 32 accumulators a thread, and a row of 32768 in 128 registers a thread.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from omni_adapters.kernels import linear_cross_entropy as kernels

N, C, V = 4096, 768, 32768
SMS = {80: 108, 90: 132}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
MATMUL = {80: "mma.sync", 90: "wgmma.mma_async"}
SPILLS = {"exponentials": 128, "products": 0, "finish": 0, "rows_differentiated": 160}
TYPES = {"hidden": "*bf16", "weight": "*bf16", "g": "*bf16", "z": "*bf16", "dx": "*bf16", "targets": "*i64", "rows": "*i64",
         "sums": "*fp32", "partial": "*fp32", "rest": "*fp32", "below": "*fp32", "steep": "fp32", "low": "fp32"}


def compiled(kernel: Any, capability: int, options: dict[str, Any], **constants: Any) -> Any:
    """Arguments are specialised as a launch does it: pointers and rows of G begin at multiples of 16."""
    types = TYPES | {"scale": "fp32" if kernel is kernels.finish else "*fp32"}
    arguments = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(arguments.items())
               if kind.startswith("*") or name == "g_stride"}
    source = ASTSource(kernel, arguments, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(binary: Any, folder: Path) -> int:
    """Bytes of stack a thread."""
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def check(kernel: Any, capability: int, options: dict[str, Any], folder: Path, **constants: Any) -> str:
    binary = compiled(kernel, capability, options, **constants)
    assert spilled(binary, folder) <= SPILLS[kernel.__name__]
    assert binary.metadata.shared <= SHARED[capability]
    assert "st.global.v4" in binary.asm["ptx"] or kernel is kernels.finish  # 16 bytes at a time, but for a row of 768
    return str(binary.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
def test_the_gemms(capability: int, tmp_path: Path) -> None:
    config = kernels.CONFIGS[capability // 10, 0]
    cut = kernels.plan(N, C, V, 2, SMS[capability], config)
    for kernel, tiles, constants in (
            (kernels.exponentials, config.exponentials, {"V": V, "GRADIENT": True}),
            (kernels.products, config.products, {"EVEN": True, "FIRST": False})):
        if kernel is kernels.products:
            assert cut.columns % (cut.splits * tiles.depth) == 0  # otherwise EVEN is another kernel
        ptx = check(kernel, capability, tiles.options(), tmp_path, C=C, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
                    BLOCK_K=tiles.depth, **constants)
        assert MATMUL[capability] in ptx and "cp.async" in ptx


@pytest.mark.parametrize("name", [name for name, one in kernels.CANDIDATES.items() if one is not kernels.CONFIGS[9, 0]])
def test_candidates_fit_sm_90(name: str, tmp_path: Path) -> None:
    """Which of them is fastest is for a GPU to say; a launch that asks for too much would say nothing."""
    for kernel, tiles, constants in (
            (kernels.exponentials, kernels.CANDIDATES[name].exponentials, {"V": V, "GRADIENT": True}),
            (kernels.products, kernels.CANDIDATES[name].products, {"EVEN": True, "FIRST": False})):
        ptx = check(kernel, 90, tiles.options(), tmp_path, C=C, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth,
                    **constants)
        assert MATMUL[90] in ptx and "cp.async" in ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_what_goes_by_row(capability: int, tmp_path: Path) -> None:
    check(kernels.finish, capability, {"num_warps": 4}, tmp_path, C=C, TILES=256, BLOCK=1024, GRADIENT=True)
    for columns, block, warps in ((V, kernels.ONE_READ, 16), (2 * V, kernels.AT_ONCE, 8)):
        check(kernels.rows_differentiated, capability, {"num_warps": warps}, tmp_path, V=columns, CAPPED=True, GRADIENT=True,
              BLOCK=block, ONE=block >= columns)
