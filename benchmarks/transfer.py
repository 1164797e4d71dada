"""Does a transferred projector save steps? One trained with a d4 GPT goes on with a d6 GPT that read the same language.

    python -m benchmarks.transfer            # three seeds
    python -m benchmarks.transfer --quick    # does it run

For each seed: a corpus order, a d4 and a d6 reference GPT pre-trained on text as examples/demo.py does, and a projector for the
d4. Then projectors for the d6, on the same clips in the same order with the same schedule:

    from scratch      as a Projector starts: its first layer drawn, its last at zero
    transferred       `transfer_projector` of the d4's: the first layer copied, the last sent through the fitted map
    first layer       the first layer copied, the last at zero: what hearing brings without a map
    random map        the first layer copied, the last sent through a Gaussian matrix and as large as the transferred one: what
                      its size brings without its direction

GPTs are narrower than nanochat's (32 · depth for 64 · depth: --aspect), so that three seeds take minutes. Writes transfer.json,
transfer.csv and transfer.png: steps until the training loss, a mean of 20 steps, has fallen to each threshold; loss and exact
match on unseen sentences before the first step and after the last; and how well the map fits (`embedding_map`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples import demo
from omni_adapters import OmniGPT, Projector, __version__
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.training.pictures import DARK, PALE, WARM, plotting, smoothed
from omni_adapters.transfer import PoorTransfer, embedding_map, mapped, transfer_projector

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
THRESHOLDS = (1.5, 1.25, 1.0, 0.75, 0.6)  # nats per word
DEPTHS = 4, 6                            # layers of the old GPT and of the new one
COLOURS = {"from scratch": DARK, "transferred": WARM, "first layer": "tab:green", "random map": PALE}
QUICK = {"seeds": [0], "clips": 60, "test_clips": 20, "lm_steps": 8, "from_steps": 8, "steps": 8, "rows": 4}


class Corpus(NamedTuple):
    """Log-mel frames (T, 80) and texts of the clips to train on, and of unseen sentences."""

    frames: list[Tensor]
    texts: list[str]
    test_frames: list[Tensor]
    test_texts: list[str]


class Pair(NamedTuple):
    """Two GPTs of one language, and the projector that hears for the first."""

    old: GPT
    new: GPT
    projector: Projector
    seed: int


Arm = Callable[[Pair, argparse.Namespace], Projector]


# ---- what is compared ------------------------------------------------------------------------------------------------------


def from_scratch(pair: Pair, args: argparse.Namespace) -> Projector:
    return fresh(pair.new, args, pair.seed)


def transferred(pair: Pair, args: argparse.Namespace) -> Projector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorTransfer)  # its number is among the results
        return transfer_projector(pair.projector, pair.old, pair.new)


def first_layer(pair: Pair, args: argparse.Namespace) -> Projector:
    projector = fresh(pair.new, args, pair.seed)
    projector.fc1.load_state_dict(pair.projector.fc1.state_dict())
    return projector


def random_map(pair: Pair, args: argparse.Namespace) -> Projector:
    fitted, generator = transferred(pair, args), torch.Generator().manual_seed(pair.seed)
    noise = torch.randn(fitted.out_dim, pair.projector.out_dim, generator=generator, dtype=torch.float64)
    projector = mapped(pair.projector, noise)
    with torch.no_grad():  # under AdamW's rate a larger matrix turns more slowly
        projector.fc2.weight.mul_(fitted.fc2.weight.norm() / projector.fc2.weight.norm())
    return projector


ARMS: dict[str, Arm] = {"from scratch": from_scratch, "transferred": transferred, "first layer": first_layer,
                        "random map": random_map}


# ---- one seed --------------------------------------------------------------------------------------------------------------


def make_corpus(args: argparse.Namespace) -> Corpus:
    rng = random.Random(0)
    training = demo.clips(rng, demo.TRAINING_VOICES, args.clips, set(), demo.CLEAN)
    tests = demo.clips(rng, demo.TRAINING_VOICES, args.test_clips, {clip.sentence for clip in training})
    frames, texts = demo.speak_all(training + tests, 2), [clip.sentence for clip in training + tests]
    return Corpus(frames[: args.clips], texts[: args.clips], frames[args.clips :], texts[args.clips :])


def reader(depth: int, args: argparse.Namespace, seed: int) -> tuple[GPT, float]:
    """A GPT that has only ever read, and its loss at the end of that, a mean of 20 steps."""
    torch.manual_seed(100 * seed + depth)
    width = args.aspect * depth
    gpt = GPT(GPTConfig(sequence_len=256, vocab_size=len(demo.WORDS), n_layer=depth, n_head=width // 32, n_kv_head=width // 32,
                        n_embd=width))
    losses = demo.pretrain(gpt, args.lm_steps, args.rows, args.lm_lr, 100 * seed + depth)
    return gpt.eval(), smoothed(losses)[-1]


def fresh(gpt: GPT, args: argparse.Namespace, seed: int) -> Projector:
    torch.manual_seed(seed)
    return Projector(80, gpt.config.n_embd, args.hidden, stack=args.stack)


def scored(omni: OmniGPT, corpus: Corpus) -> dict[str, float]:
    prompts = [demo.ids(f"{demo.BOS} {demo.HEARD}")] * len(corpus.test_texts)
    return demo.score(omni, prompts, corpus.test_texts, corpus.test_frames)


def train(gpt: GPT, projector: Projector, encoder: LogMelEncoder, corpus: Corpus, args: argparse.Namespace, steps: int,
          seed: int) -> dict[str, Any]:
    """Scores before and after, and the loss of each step. The GPT is given back as it came."""
    omni = OmniGPT(gpt, (encoder, projector), insert_at=1)
    try:
        start = scored(omni, corpus)
        losses = demo.train_projector(omni, corpus.frames, corpus.texts, steps, args.rows, args.lr, seed)
        return {"start": start, "end": scored(omni, corpus), "steps_to": steps_to(losses), "losses": losses}
    finally:
        omni.remove()


def measure(seed: int, corpus: Corpus, args: argparse.Namespace, arms: dict[str, Arm]) -> dict[str, Any]:
    encoder = LogMelEncoder()
    encoder.fit_statistics(demo.inputs(corpus.frames[:500]))
    (old, old_loss), (new, new_loss) = (reader(depth, args, seed) for depth in DEPTHS)
    projector = fresh(old, args, seed)
    first = train(old, projector, encoder, corpus, args, args.from_steps, seed)
    found, pair = embedding_map(old, new), Pair(old, new, projector, seed)
    trained = {name: train(new, arm(pair, args), encoder, corpus, args, args.steps, seed + 1) for name, arm in arms.items()}
    return {"seed": seed, "text_loss": {"old": old_loss, "new": new_loss}, "old_projector": first,
            "map": {"r2": found.r2, "fitted_r2": found.fitted_r2, "num_tokens": found.num_tokens},
            "arms": trained}


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def steps_to(losses: Sequence[float]) -> dict[str, int | None]:
    """Steps taken when the smoothed loss is first at or below each threshold; None where it never is."""
    curve = smoothed(losses)
    return {f"{level:g}": next((i + 1 for i, loss in enumerate(curve) if loss <= level), None) for level in THRESHOLDS}


def median_steps(runs: Sequence[dict[str, Any]], arm: str, level: str) -> float | None:
    """Over seeds, as an order: None, never, is the largest."""
    found = [run["arms"][arm]["steps_to"][level] for run in runs]
    median = statistics.median(math.inf if steps is None else steps for steps in found)
    return median if math.isfinite(median) else None


def csv_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One a seed and arm, for the CSV."""
    return [{"seed": run["seed"], "arm": name, "r2": run["map"]["r2"], "start_loss": arm["start"]["loss"],
             "end_loss": arm["end"]["loss"], "end_exact_match": arm["end"]["exact_match"]}
            | {f"steps_to_{level}": steps for level, steps in arm["steps_to"].items()}
            for run in runs for name, arm in run["arms"].items()]


def table(runs: Sequence[dict[str, Any]]) -> str:
    levels = [f"{level:g}" for level in THRESHOLDS]
    lines = [f"{'steps to':18}" + "".join(f"{'loss ' + level:>10}" for level in levels)
             + f"{'at step 0':>11}{'at the end':>12}{'exact match':>13}"]
    for name in runs[0]["arms"]:
        steps = [median_steps(runs, name, level) for level in levels]
        ends = [statistics.median(run["arms"][name][when][what] for run in runs)
                for when, what in (("start", "loss"), ("end", "loss"), ("end", "exact_match"))]
        lines.append(f"{name:18}" + "".join(f"{'never' if count is None else f'{count:g}':>10}" for count in steps)
                     + f"{ends[0]:11.3f}{ends[1]:12.3f}{ends[2]:13.3f}")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The smoothed training losses: a line a seed."""
    pyplot = plotting("benchmarks.transfer")
    figure, axis = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for name in runs[0]["arms"]:
        for number, run in enumerate(runs):
            curve = smoothed(run["arms"][name]["losses"])
            axis.plot(curve, color=COLOURS.get(name), linewidth=1.2, label=None if number else name)
    axis.set(xlabel="step", ylabel="loss (nats per word), mean of 20 steps", yscale="log",
             title=f"a projector for the d{DEPTHS[1]}, {len(runs)} seed{'s' * (len(runs) > 1)}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(out: Path, runs: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    medians = {name: {f"{level:g}": median_steps(runs, name, f"{level:g}") for level in THRESHOLDS} for name in runs[0]["arms"]}
    (out / "transfer.json").write_text(json.dumps({"median_steps_to": medians, "runs": runs} | about, indent=1) + "\n")
    with open(out / "transfer.csv", "w", newline="") as file:
        rows = csv_rows(runs)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(runs, out / "transfer.png")


# ---- all of it -------------------------------------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight steps of everything; only shows that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=2000, help="spoken for training")
    parser.add_argument("--test-clips", type=int, default=100, help="spoken of unseen sentences")
    parser.add_argument("--lm-steps", type=int, default=400, help="text-only steps of each GPT")
    parser.add_argument("--from-steps", type=int, default=400, help="steps of the old GPT's projector")
    parser.add_argument("--steps", type=int, default=300, help="steps of each of the new GPT's projectors")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--lm-lr", type=float, default=2e-3, help="learning rate of the GPTs on text")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the projectors")
    parser.add_argument("--aspect", type=int, default=32, help="n_embd = aspect · depth; nanochat has 64")
    parser.add_argument("--stack", type=int, default=12, help="10 ms frames per soft token")
    parser.add_argument("--hidden", type=int, default=512, help="width of the projectors' hidden layer")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/cpu, or runs/transfer with --quick")
    return parser


def main() -> None:
    args = options().parse_args()
    if args.quick:
        vars(args).update(QUICK)
    out = args.out or (ROOT / "runs" / "transfer" if args.quick else RESULTS)
    start, runs = time.perf_counter(), list[dict[str, Any]]()
    corpus = make_corpus(args)
    for seed in args.seeds:
        runs.append(measure(seed, corpus, args, ARMS))
        about = {"options": {name: value for name, value in vars(args).items() if name != "out"}, "depths": DEPTHS,
                 "seconds": time.perf_counter() - start, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                 "torch": torch.__version__, "omni_adapters": __version__}
        write(out, runs, about)  # after each seed: a run that is cut short leaves what it had measured
        print(f"seed {seed}: the map explains {runs[-1]['map']['r2']:.3f} of tokens it has not seen, "
              f"{runs[-1]['map']['fitted_r2']:.3f} of those it has; text loss {runs[-1]['text_loss']}", flush=True)
    print(f"\n{table(runs)}\n\n{time.perf_counter() - start:.0f} s; {out / 'transfer.json'}")


if __name__ == "__main__":
    main()
