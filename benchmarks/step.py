"""One training step: the prepender against the hand-patched forward, in one process, interleaved.

    python -m benchmarks.step                      # minutes on two cores; writes benchmarks/results/<device>/step.*
    python -m benchmarks.step --soft 94 --repeats 3

d6 at vocabulary 32768, 13 text tokens, 2 rows; the LM frozen (stage 1) and everything trained. Before a time counts, both
must agree on the loss and on the gradient of the soft tokens. Memory is what a step holds at most beyond what was there
before it, gradients included: the sum of the profiler's allocations on CPU, the allocator's peak on CUDA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import omni_adapters
from omni_adapters import SoftTokenPrepender
from omni_adapters.reference_gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hand_patched import hand_patched_loss  # noqa: E402  (baselines live with the tests)

VARIANTS = ("hand-patched", "prepender")
MODES = ("frozen", "full")
TOLERANCE = 1e-5  # fp32, sums of 384 to 32768 terms of order 1; a wrong layout is off by 1e-2 and more


def build(T_soft: int, mode: str, device: str, B: int, T: int) -> tuple[dict[str, Callable[[], Tensor]], Tensor, GPT]:
    """Both steps over the same GPT: variant → a function that runs forward and backward and returns the loss."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=2048, vocab_size=32768, n_layer=6, n_head=3, n_kv_head=3, n_embd=384))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    gpt.to(device).requires_grad_(mode == "full")
    idx = torch.randint(0, 32768, (B, T), device=device)
    targets = idx.roll(-1, dims=1)
    soft = torch.randn(B, T_soft, 384, device=device, requires_grad=True)
    prepender = SoftTokenPrepender(gpt, value_embeds="placeholder")  # what the hand-patched forward computes

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            gpt.zero_grad(set_to_none=True)
            soft.grad = None
            loss = loss_of()
            loss.backward()
            return loss.detach()
        return run

    steps = {"hand-patched": step(lambda: hand_patched_loss(gpt, idx, targets, soft)),
             "prepender": step(lambda: prepender(idx, targets, soft))}
    return steps, soft, gpt


def check(steps: dict[str, Callable[[], Tensor]], soft: Tensor) -> float:
    """Largest difference between the variants in loss and soft-token gradients, relative to the largest gradient."""
    losses, grads = [], []
    for variant in VARIANTS:
        losses.append(steps[variant]())
        grads.append(soft.grad.clone())
    error = max(float((losses[0] - losses[1]).abs()),
                float((grads[0] - grads[1]).abs().max() / grads[0].abs().max()))
    if error > TOLERANCE:
        raise SystemExit(f"the variants differ by {error:.1e}: a fast wrong step is no step")
    return error


def seconds(run: Callable[[], Tensor], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Tensor], trained: list[Tensor], device: str) -> int:
    """Most bytes that one step holds at a time beyond what was there before it, gradients included."""
    for tensor in trained:
        tensor.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    cases = [(mode, T_soft) for mode in MODES for T_soft in args.soft]
    for mode, T_soft in tqdm(cases, desc="cases"):
        steps, soft, gpt = build(T_soft, mode, args.device, args.rows, args.text)
        error = check(steps, soft)  # the first, slow run of each as well
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.repeats):
            for variant in VARIANTS:
                times[variant].append(seconds(steps[variant], args.device))
        medians = {variant: statistics.median(times[variant]) for variant in VARIANTS}
        peaks = {variant: peak_bytes(steps[variant], [soft, *gpt.parameters()], args.device) for variant in VARIANTS}
        del steps, soft, gpt
        rows.append({
            "mode": mode, "T_soft": T_soft, "ratio": medians["hand-patched"] / medians["prepender"],
            "ms": {variant: 1e3 * value for variant, value in medians.items()},
            "peak_ratio": peaks["hand-patched"] / peaks["prepender"],
            "peak_mb": {variant: value / 1e6 for variant, value in peaks.items()}, "error": error,
        })
    return rows


def draw(rows: list[dict], path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted({row["T_soft"] for row in rows}, reverse=True)
    for axis, key, label in zip(axes, ("ratio", "peak_ratio"), ("step time", "peak memory of a step")):
        for offset, mode, colour in ((-0.2, "frozen", "#2a6f97"), (0.2, "full", "#e07a5f")):
            found = {row["T_soft"]: row[key] for row in rows if row["mode"] == mode}
            bars = axis.bar([i + offset for i in range(len(sizes))], [found[size] for size in sizes], 0.38, color=colour,
                            label="LM frozen" if mode == "frozen" else "all trained")
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlabel("soft tokens per row")
        axis.set_ylabel("hand-patched ÷ prepender")
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soft", type=int, nargs="+", default=[1500, 250, 94], help="soft tokens per row")
    parser.add_argument("--text", type=int, default=13, help="text tokens per row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per variant; the median counts")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/<device>")
    args = parser.parse_args()
    rows = measure(args)
    out = args.out or ROOT / "benchmarks" / "results" / args.device
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    report = {
        "what": "one training step, hand-patched forward ÷ prepender", "command": "python -m benchmarks.step",
        "date": date.today().isoformat(), "device": name, "torch": torch.__version__, "omni_adapters": omni_adapters.__version__,
        "host": "d6, vocabulary 32768, fp32", "T": args.text, "B": args.rows, "repeats": args.repeats, "rows": rows,
    }
    (out / "step.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, out / "step.png", f"One training step, d6, vocabulary 32768, {args.text} text tokens, {args.rows} rows ({name})")
    print(f"{'mode':8} {'T_soft':>6} {'hand-patched ms':>16} {'prepender ms':>13} {'ratio':>6} {'peak ratio':>10} {'error':>8}")
    for row in rows:
        ms = row["ms"]
        assert isinstance(ms, dict)
        print(f"{row['mode']:8} {row['T_soft']:6} {ms['hand-patched']:16.0f} {ms['prepender']:13.0f} {row['ratio']:6.2f} "
              f"{row['peak_ratio']:10.2f} {row['error']:8.0e}")


if __name__ == "__main__":
    main()
