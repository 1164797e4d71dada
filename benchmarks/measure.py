"""Measure a group: every variant in turn, round after round, so that whatever disturbs the machine disturbs them alike.

Notable:
- the order turns by one each round: no variant always runs in the wake of the same neighbour
- a first call apart (`first_ms`: compilation, allocation), then rounds until the group's seconds are spent, three at least
- a step begins on a device with nothing left to do: one that is shorter than its launches is a latency, not the pace of a loop
  that runs ahead of its device
- CUDA events around a step: what the device took, gaps between launches included; caches are not flushed between steps,
  since a step of a training run finds them as the step before has left them
- a variant that raises is a row "failed", one whose error is beyond its bound a row "invalid" without times, one that cannot
  run here a row "n/a": never silence, and the others go on
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.group import Device, Group, Variant

Status = Literal["ok", "invalid", "failed", "n/a"]
Step = Callable[[], Any]
Timer = Callable[[Step], float]  # runs a step, returns milliseconds

MIN_ROUNDS = 3
MAX_ROUNDS = 100   # beyond these p20 and p80 no longer move
WARM_UPS = {"cpu": 1, "cuda": 3}  # torch.compile's CUDA graphs are recorded at the second call and replayed from the third on
NEW_TOKENS = re.compile(r"(\d+) new tokens")  # a case that says how many tokens a step generates has tokens/s
DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
DTYPE = re.compile(rf"\b({'|'.join(DTYPES)})\b")
USUAL = {"cpu": "fp32", "cuda": "bf16"}  # dtype whose roof counts where a case names none
HEADLESS = ", no head"  # ends the name of a step without lm_head and loss: an ablation, of which a ratio would say nothing
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


class Roofs(NamedTuple):
    """What this device was measured to do at best: a copy in GB/s (bytes read plus written), matmuls in TFLOP/s by dtype."""

    copy_gbs: float
    matmul_tflops: dict[str, float]


class Row(NamedTuple):
    """One variant's line; what does not apply is None. Times in ms, `share_of_roof` in 0 … 1."""

    bench: str
    case: str
    variant: str
    status: Status
    note: str = ""                      # why not ok, or what the variant says of itself
    ratio: float | None = None          # the baseline's p50 ÷ this p50
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    first_ms: float | None = None
    rounds: int | None = None
    tflops: float | None = None         # TFLOP/s
    gbs: float | None = None            # GB/s
    share_of_roof: float | None = None
    tokens_per_s: float | None = None
    launches: int | None = None         # that the host asks of the device in one step: kernels, copies, graphs
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None
    bound: float | None = None
    flops: float | None = None
    bytes: float | None = None


class Running(NamedTuple):
    """A variant that is being timed."""

    variant: Variant
    step: Step
    first_ms: float
    times: list[float]


# ---- clocks and counters -------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Step, device: str) -> float:
    """Of one call, on the host's clock, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def event_ms(run: Step) -> float:
    """Of one call, on the device's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def timer_of(device: Device) -> Timer:
    return event_ms if device == "cuda" else lambda run: 1e3 * seconds(run, "cpu")


def peak_bytes(run: Step, trained: Sequence[Tensor], device: str) -> int:
    """Most bytes that one step holds at a time beyond what was there before it, gradients included: the sum of the
    profiler's allocations on CPU, the allocator's peak on CUDA. Gradients of `trained` are let go of first."""
    for tensor in trained:
        tensor.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def peak_of(variant: Variant, device: Device) -> int | None:
    """None for a CUDA graph: its memory is a pool that stands before the step begins."""
    if variant.step is None or "CUDA graph" in variant.name:
        return None
    return peak_bytes(variant.step, variant.trained, device)


def launches(run: Step, device: Device) -> int | None:
    """What the host asks of the device in one step; None on CPU, where nothing is launched."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    return sum(event.name().startswith(LAUNCHES) for event in record.profiler.kineto_results.events())


# ---- a group -------------------------------------------------------------------------------------------------------------


def sentence(error: BaseException) -> str:
    """An exception's first line, after its name."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.160}" if lines else type(error).__name__


def turned(running: list[Running], number: int) -> list[Running]:
    """The order of round `number`."""
    start = number % len(running) if running else 0
    return running[start:] + running[:start]


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, linear between neighbours."""
    p20, p50, p80 = np.percentile(times, (20, 50, 80)).tolist()
    return p20, p50, p80


def standing(group: Group, variant: Variant) -> Row | None:
    """The row of a variant that is not timed: it cannot run, or it is wrong."""
    head = Row(group.bench, group.case, variant.name, "n/a", variant.why, bound=group.bound)
    if variant.step is None:
        return head
    if group.bound is None or variant.error is None or variant.error <= group.bound:  # NaN is not ≤
        return None
    why = f"error {variant.error:.1e} is beyond its bound of {group.bound:.1e}"
    return head._replace(status="invalid", note=why, error=variant.error)


def failed(group: Group, name: str, error: BaseException) -> Row:
    return Row(group.bench, group.case, name, "failed", sentence(error))


def warm(variant: Variant, device: Device) -> Running:
    """Run a variant as often as it needs to reach its pace."""
    assert variant.step is not None
    first = 1e3 * seconds(variant.step, device)
    for _ in range(WARM_UPS[device] - 1):
        variant.step()
    return Running(variant, variant.step, first, [])


def time_rounds(group: Group, running: list[Running], budget_s: float, timer: Timer, clock: Callable[[], float],
                rows: dict[str, Row]) -> list[Running]:
    """Fill `times`, interleaved; returns who reached the end, and puts a row for each who did not."""
    start = clock()
    for number in range(MAX_ROUNDS):
        if not running or (number >= MIN_ROUNDS and clock() - start >= budget_s):
            break
        for one in turned(running, number):
            try:
                one.times.append(timer(one.step))
            except Exception as error:  # a variant may fail in any way it likes; the others go on
                rows[one.variant.name] = failed(group, one.variant.name, error)
        running = [one for one in running if one.variant.name not in rows]
    return running


def measure_group(group: Group, device: Device, roofs: Roofs, budget_s: float, *, timer: Timer | None = None,
                  clock: Callable[[], float] = time.perf_counter) -> list[Row]:
    """A row for each variant, in the group's order. budget_s: seconds for all timed rounds together; three are run even so."""
    rows: dict[str, Row] = {}
    running = []
    for variant in group.variants:
        row = standing(group, variant)
        if row is not None:
            rows[variant.name] = row
            continue
        try:
            running.append(warm(variant, device))
        except Exception as error:  # as above
            rows[variant.name] = failed(group, variant.name, error)
    running = time_rounds(group, running, budget_s, timer or timer_of(device), clock, rows)
    medians = {one.variant.name: percentiles(one.times)[1] for one in running}
    for one in running:
        try:
            rows[one.variant.name] = timed(group, one, device, roofs, medians.get(group.baseline))
        except Exception as error:  # as above
            rows[one.variant.name] = failed(group, one.variant.name, error)
    return [rows[variant.name] for variant in group.variants]


def timed(group: Group, one: Running, device: Device, roofs: Roofs, baseline_ms: float | None) -> Row:
    variant = one.variant
    p20, p50, p80 = percentiles(one.times)
    tokens = NEW_TOKENS.search(group.case)
    ratio = None if baseline_ms is None or variant.name.endswith(HEADLESS) else baseline_ms / p50
    notes = [variant.why] if variant.why else []
    asked, peak = (counted(what, count, notes) for what, count in (("launches", lambda: launches(one.step, device)),
                                                                   ("peak", lambda: peak_of(variant, device))))
    return Row(group.bench, group.case, variant.name, "ok", "; ".join(notes), ratio, p20, p50, p80, one.first_ms, len(one.times),
               tflops=rate(variant.flops, p50, 1e12), gbs=rate(variant.bytes, p50, 1e9),
               share_of_roof=share_of_roof(variant, p50, roofs, dtype_of(group.case, device)),
               tokens_per_s=rate(float(tokens[1]), p50, 1) if tokens else None, launches=asked,
               peak_bytes=peak, saved_bytes=variant.saved_bytes, error=variant.error, bound=group.bound,
               flops=variant.flops, bytes=variant.bytes)


def counted(what: str, count: Callable[[], int | None], notes: list[str]) -> int | None:
    """None, and a note, where the profiler fails: times that were measured stand without what it counts."""
    try:
        return count()
    except Exception as error:  # a profiler that is missing, busy or forbidden
        notes.append(f"{what} not counted: {sentence(error)}")
        return None


def rate(amount: float | None, ms: float, unit: float) -> float | None:
    return None if amount is None else amount / (1e-3 * ms) / unit


def dtype_of(case: str, device: Device) -> str:
    """The first that a case names."""
    found = DTYPE.search(case)
    return DTYPES[found[1]] if found else USUAL[device]


def share_of_roof(variant: Variant, ms: float, roofs: Roofs, dtype: str) -> float | None:
    """The least time that the roofs allow for what is counted, ÷ the time taken. None where nothing is counted."""
    least = []
    if variant.flops is not None and dtype in roofs.matmul_tflops:
        least.append(variant.flops / (1e12 * roofs.matmul_tflops[dtype]))
    if variant.bytes is not None:
        least.append(variant.bytes / (1e9 * roofs.copy_gbs))
    return max(least) / (1e-3 * ms) if least else None
