"""The two roofs of this device, measured in this process: how fast it copies, how fast it multiplies.

    python -m benchmarks.roofs --device cpu

A copy counts bytes read plus bytes written. The fastest of all repeats counts: a roof is what nothing passes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.group import Device
from benchmarks.measure import Roofs, timer_of

DTYPES = {"cpu": {"fp32": torch.float32},  # bf16 matmuls are emulated on most CPUs; nothing here computes in it there
          "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16}}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # well beyond any cache
SIDE = {"cpu": 2048, "cuda": 8192}          # of the square matrices
REPEATS = {"cpu": 5, "cuda": 20}


def best_ms(run: Callable[[], Any], device: Device) -> float:
    run()
    timer = timer_of(device)
    return min(timer(run) for _ in range(REPEATS[device]))


def copy_gbs(device: Device, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_ms(lambda: target.copy_(source), device) / 1e6


def matmul_tflops(device: Device, dtype: torch.dtype, side: int) -> float:
    """Random operands: a matrix of zeros draws less power and runs faster than real data does."""
    rng = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=rng).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / best_ms(lambda: torch.mm(a, b, out=out), device) / 1e9


def measure_roofs(device: Device, *, num_bytes: int | None = None, side: int | None = None) -> Roofs:
    matmuls = {name: matmul_tflops(device, dtype, side or SIDE[device]) for name, dtype in DTYPES[device].items()}
    return Roofs(copy_gbs(device, num_bytes or COPY_BYTES[device]), matmuls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    print(json.dumps(measure_roofs(parser.parse_args().device)._asdict()))


if __name__ == "__main__":
    main()
