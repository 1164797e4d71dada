"""The two roofs of this device, measured in this process: how fast it copies, how fast it multiplies.

    python -m benchmarks.roofs --device cpu

A copy counts bytes read plus bytes written. The fastest of all repeats counts: a roof is what nothing passes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.group import Device
from benchmarks.measure import Roofs, timer_of

DTYPES = {"cpu": {"fp32": torch.float32},  # bf16 matmuls are emulated on most CPUs; nothing here computes in it there
          "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16}}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # well beyond any cache
# Of matmuls, (rows, depth, columns): a large square, and a GPT's, which runs faster where caches are small
SHAPES = {"cpu": ((2048, 2048, 2048), (4096, 768, 3072)), "cuda": ((8192, 8192, 8192), (32768, 768, 3072))}
REPEATS = 20


def best_ms(run: Callable[[], Any], device: Device) -> float:
    run()
    timer = timer_of(device)
    return min(timer(run) for _ in range(REPEATS))


def copy_gbs(device: Device, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_ms(lambda: target.copy_(source), device) / 1e6


def matmul_tflops(device: Device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Random operands: a matrix of zeros draws less power and runs faster than real data does."""
    rng, (rows, depth, columns) = torch.Generator(device=device).manual_seed(0), shape
    a, b = (torch.randn(size, device=device, generator=rng).to(dtype) for size in ((rows, depth), (columns, depth)))
    out = a.new_empty(rows, columns)
    return 2 * rows * depth * columns / best_ms(lambda: torch.mm(a, b.T, out=out), device) / 1e9


def measure_roofs(device: Device, *, num_bytes: int | None = None, shapes: Sequence[tuple[int, int, int]] | None = None) -> Roofs:
    matmuls = {name: max(matmul_tflops(device, dtype, shape) for shape in shapes or SHAPES[device])
               for name, dtype in DTYPES[device].items()}
    return Roofs(copy_gbs(device, num_bytes or COPY_BYTES[device]), matmuls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    print(json.dumps(measure_roofs(parser.parse_args().device)._asdict()))


if __name__ == "__main__":
    main()
