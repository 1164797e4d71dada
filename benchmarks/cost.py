"""What omni_adapters/cost.py predicts of a step, against steps that run here: time and peak memory, stage by stage.

    python -m benchmarks.cost                # minutes; writes benchmarks/results/<device>/cost.*
    python -m benchmarks.cost --threads 2 --repeats 3

A machine's roofs are measured (`roofs`): one matmul, one element-wise pass at several tensor sizes, tanh and exp, a small call.
Everything else is the formula, and the shares of the roofs that it assumes. Steps are those of reference GPTs with a projector
on random features: forward, backward, clipping, AdamW; fp32 on the CPU, bf16 with fp32 masters on CUDA. Roofs and steps take
turns, and medians count. On the CPU one thread runs and its own CPU time counts, which others on the machine disturb least;
with more threads, and on CUDA, it is the wall clock's. LoRA runs in its two-path form, the one that is counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import omni_adapters
from benchmarks.measure import peak_bytes
from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.cost import MACHINES, Machine, Prediction, Utilisation, predict, table
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.lora import lora_by_path
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.step_counts import Adapter, Batch, Stage, adapter, sizes, step_bytes

ROOT = Path(__file__).parents[1]
STACK, RANK, D_MODEL = 8, 16, 80       # D_MODEL: log-mel's bands
PASS_BYTES = [2**n for n in range(16, 27, 2)]  # sizes of the tensors that a pass reads, 64 KiB to 64 MiB
CPU_UTILISATION = Utilisation(matmul=0.9, attention=0.3, copy=1.0)  # of measured roofs: assumed, as the formula's own are
# Of measured roofs, which hold what a matmul and a pass lose of a data sheet's peak. Attention has no roof of its own: assumed to
# reach half a matmul's FLOP/s, the ratio of the formula's own shares.
CUDA_UTILISATION = Utilisation(matmul=1.0, attention=0.5, copy=1.0)


class Case(NamedTuple):
    depth: int
    soft: int
    text: int
    rows: int
    stage: Stage

    def adapter(self) -> Adapter:
        return adapter(sizes(self.depth), rank=RANK if self.stage == "2" else 0, d_model=D_MODEL, stack=STACK)

    def batch(self) -> Batch:
        return Batch(self.rows, self.soft, self.text, STACK)

    def __str__(self) -> str:
        return f"d{self.depth}, {self.rows} × ({self.soft} + {self.text}), stage {self.stage}"


CASES = [Case(depth, soft, text, rows, stage) for depth in (4, 6) for stage in ("1", "2")
         for soft, text, rows in ((94, 16, 2), (188, 64, 2), (94, 32, 8))] + [
             Case(6, 400, 16, 2, "1"), Case(4, 16, 128, 4, "1"), Case(4, 94, 32, 4, "full"), Case(4, 188, 64, 2, "full")]


# ---- roofs -------------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: str, repeats: int = 5, *, warm: bool = False) -> float:
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + (not warm)):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[-repeats:])


def roofs(device: str) -> dict[str, float]:
    """{"matmul", "fp32"}: FLOP/s; {"functions"}: values of tanh and exp a second; {"pass N"}: bytes/s of a product of two tensors
    of N bytes into a new one; {"launch"}: s of a small call, the mean of forward's and backward's."""
    M, K, N = (1024, 512, 2048) if device == "cpu" else (8192, 1024, 4096)
    found = {}
    for name, dtype in (("matmul", torch.bfloat16 if device == "cuda" else torch.float32), ("fp32", torch.float32)):
        x, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((M, K), (N, K)))
        found[name] = 2.0 * M * K * N / seconds(partial(torch.matmul, x, weight.T), device)
    values = torch.randn(2**18, device=device)  # 1 MiB: a cache serves it
    times = [seconds(partial(function, values), device) for function in (torch.tanh, torch.exp, torch.exp)]  # as in a loss
    found["functions"] = 3 * 2**18 / sum(times)
    for nbytes in PASS_BYTES:
        x, y = (torch.randn(nbytes // 4, device=device) for _ in range(2))
        found[f"pass {nbytes}"] = 3 * nbytes / seconds(partial(torch.mul, x, y), device, 3)
    leaf = torch.randn(8, device=device, requires_grad=True)

    def chain(calls: int = 250) -> None:
        y = leaf
        for _ in range(calls):
            y = y * 1.0
        y.sum().backward()

    found["launch"] = seconds(chain, device) / 500
    return found


def machine_of(found: dict[str, float], device: str) -> Machine:
    """The machine that these roofs make; memory and links are left at those of an assumed one."""
    one: dict[str, Any] = {name: found[name] for name in ("matmul", "fp32", "functions", "launch")}
    if device == "cuda":
        return MACHINES["h200"]._replace(**one, bandwidth=found[f"pass {PASS_BYTES[-1]}"], utilisation=CUDA_UTILISATION,
                                         memory=float(torch.cuda.get_device_properties(0).total_memory))
    points = tuple((float(nbytes), found[f"pass {nbytes}"]) for nbytes in PASS_BYTES)
    return MACHINES["cpu"]._replace(**one, bandwidth=points[-1][1], cached=points, utilisation=CPU_UTILISATION)


# ---- steps -------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """`run`: one whole step. `learn`: its forward and backward alone, for memory."""

    run: Callable[[], None]
    learn: Callable[[], Tensor]
    trained: list[Tensor]


def build(case: Case, device: str) -> Step:
    torch.manual_seed(0)
    shape, batch = sizes(case.depth), case.batch()
    gpt = GPT(GPTConfig(vocab_size=shape.vocab_rows, n_layer=shape.n_layer, n_head=shape.n_head, n_kv_head=shape.n_head,
                        n_embd=shape.n_embd))
    if device == "cuda":
        gpt.wte().bfloat16()
        gpt.value_embeds.bfloat16()
    omni = OmniGPT(gpt, (LogMelEncoder(), Projector(D_MODEL, shape.n_embd, stack=STACK))).to(device).train()
    if case.stage == "2":
        omni.add_lora(RANK)
        for layer in lora_by_path(gpt).values():
            layer.form = "two_path"
    if case.stage == "full":
        gpt.requires_grad_(True)
    idx = torch.randint(0, shape.vocab_rows, (batch.rows, batch.text), device=device)
    targets = idx.roll(-1, dims=1)
    features = Features(torch.randn(batch.rows, batch.soft * STACK, D_MODEL, device=device),
                        torch.full((batch.rows,), batch.soft * STACK, device=device))
    trained = [p for p in omni.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def learn() -> Tensor:
        loss = omni(idx, targets, audio_features=features)
        loss.backward()
        return loss.detach()

    def run() -> None:
        learn()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, learn, [*omni.parameters()])


def expected(case: Case, machine: Machine) -> tuple[Prediction, float]:
    """The prediction of a step, and the bytes that its forward and backward hold at most beyond what was there before."""
    shape, own, batch = sizes(case.depth), case.adapter(), case.batch()
    a = machine.activation
    return (predict(machine, shape, own, batch, stage=case.stage, d_model=D_MODEL),
            step_bytes(shape, own, batch, a=a, norm=4 if machine.is_cpu else a, d_model=D_MODEL, full=case.stage == "full"))


def measure(cases: Sequence[Case], device: str, repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    steps = [build(case, device) for case in cases]
    rounds: list[dict[str, float]] = []
    times: list[list[float]] = [[] for _ in cases]
    for step in steps:
        step.run()
    for _ in tqdm(range(repeats), desc="rounds"):
        for step, own in zip(steps, times):
            own.append(seconds(step.run, device, 1, warm=True))
        rounds.append(roofs(device))
    found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    machine, rows = machine_of(found, device), []
    for case, step, own in zip(cases, steps, times):
        told, held = expected(case, machine)
        ms, peak = 1e3 * statistics.median(own), peak_bytes(step.learn, step.trained, device)
        rows.append({"case": str(case), **case._asdict(), "predicted_ms": 1e3 * told.step_seconds, "measured_ms": ms,
                     "error": 1e3 * told.step_seconds / ms - 1, "parts_ms": {k: 1e3 * v for k, v in told.parts.items()},
                     "launches_ms": 1e3 * told.launch_seconds, "predicted_mb": held / 1e6, "measured_mb": peak / 1e6,
                     "memory_error": held / peak - 1})
    return found, rows


def median_error(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(abs(row[key]) for row in rows)


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for axis, told, found, label in ((axes[0], "predicted_ms", "measured_ms", "a step, ms"),
                                     (axes[1], "predicted_mb", "measured_mb", "peak memory, MB")):
        ends = [min(row[key] for row in rows for key in (told, found)) * 0.8,
                max(row[key] for row in rows for key in (told, found)) * 1.25]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], color="black", alpha=0.06,
                          label="within 25 %")
        for stage, colour in (("1", "#2a6f97"), ("2", "#e07a5f"), ("full", "#3a7d44")):
            own = [row for row in rows if row["stage"] == stage]
            axis.scatter([row[found] for row in own], [row[told] for row in own], color=colour, s=22, label=f"stage {stage}")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"measured: {label}", ylabel="predicted")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter("")
            side.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="rounds of roofs and steps; medians count")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--cases", type=int, nargs="+", help="their numbers, from 0; default all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/<device>")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, rows = measure([CASES[i] for i in args.cases or range(len(CASES))], args.device, args.repeats)
    out = args.out or ROOT / "benchmarks" / "results" / args.device
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, threads: {args.threads}"
    errors = {"time": median_error(rows, "error"), "memory": median_error(rows, "memory_error")}
    report = {"what": "time and peak memory of a training step, predicted by omni_adapters/cost.py and measured",
              "command": "python -m benchmarks.cost", "date": date.today().isoformat(), "device": name,
              "torch": torch.__version__, "omni_adapters": omni_adapters.__version__, "repeats": args.repeats,
              "roofs": found, "utilisation_assumed": machine_of(found, args.device).utilisation._asdict(),
              "median_error": errors, "rows": rows}
    (out / "cost.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, out / "cost.png", f"A training step, predicted from counted FLOPs and bytes, and measured ({name})")
    print(table(["step", "predicted ms", "measured ms", "error", "predicted MB", "measured MB", "error"],
                [[row["case"], f"{row['predicted_ms']:.0f}", f"{row['measured_ms']:.0f}", f"{row['error']:+.0%}",
                  f"{row['predicted_mb']:.0f}", f"{row['measured_mb']:.0f}", f"{row['memory_error']:+.1%}"] for row in rows]))
    print(f"median error: time {errors['time']:.0%}, memory {errors['memory']:.1%}")
    if args.device == "cpu":
        print("CUDA: not yet measured")


if __name__ == "__main__":
    main()
