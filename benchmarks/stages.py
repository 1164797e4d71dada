"""What each stage of training brings: the chain of docs/train_your_own.md, measured on sentences and voices never trained on.

    python -m benchmarks.stages            # 43 minutes on two busy CPU cores; killed, it goes on where it was

Rows: stage 1 (projector only), stage 1 for as many steps as both stages together, and stage 2 (projector and LoRA), which goes
on from stage 1. Columns: exact match and word accuracy on unseen sentences and on unseen voices, the loss with the right sound,
and the gap to another clip's sound, in nats a token. Writes stages.json and stages.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from omni_adapters import OmniGPT, __version__
from omni_adapters.training.hosts import open_host
from omni_adapters.training.sources import open_source
from omni_adapters.training.turns import Turns
from omni_adapters.training.validation import validate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
ROWS = {"stage 1": "align", "stage 1, as long as both": "align-long", "stage 2": "instruct"}
NUM_ROWS = 300  # clips a score is the mean of


def commands(out: Path, scale: float) -> dict[str, list[str]]:
    """Name → command; `scale` < 1 for a quick try. docs/train_your_own.md has the same settings."""
    steps = {name: str(max(2, round(scale * number))) for name, number in
             {"align": 1500, "align-long": 4000, "instruct": 2500, "gpt": 1500, "clips": 16_000, "check": 500}.items()}
    data = ["--reference", f"{out}/synthetic/gpt", "--train", f"{out}/synthetic/train", "--valid", f"{out}/synthetic/unseen",
            "--max-tokens", "5000", "--max-answer", "12", "--validate-rows", str(NUM_ROWS), "--validate-every", steps["check"]]
    ears = ["--stack", "12", "--hidden", "768", "--lr", "3e-3"]
    extract = ["-m", "omni_adapters.cli", "extract", "--encoder", "log_mel"]
    return {
        "synthetic": ["examples/synthetic.py", "--out", f"{out}/synthetic", "--clips", steps["clips"],
                      "--gpt-steps", steps["gpt"]],
        **{split: [*extract, "--manifest", f"{out}/synthetic/{split}.jsonl", "--out", f"{out}/synthetic/{split}"]
           for split in ("train", "unseen", "unseen_voices")},
        "align": ["examples/align.py", *data, *ears, "--out", f"{out}/align", "--steps", steps["align"]],
        "align-long": ["examples/align.py", *data, *ears, "--out", f"{out}/align-long", "--steps", steps["align-long"]],
        "instruct": ["examples/instruct.py", *data, "--adapter", f"{out}/align/adapter.safetensors", "--rank", "32",
                     "--alpha", "64", "--lr", "2e-3", "--projector-lr", "1e-3", "--out", f"{out}/instruct",
                     "--steps", steps["instruct"]],
    }


def score(out: Path, stage: str) -> dict[str, Any]:
    """An adapter on both test sets."""
    gpt, tokenizer = open_host("reference", out / "synthetic" / "gpt")
    omni = OmniGPT.load_adapter(out / stage / "adapter.safetensors", gpt)
    turns = Turns(tokenizer)
    found = {}
    for split in ("unseen", "unseen_voices"):
        source = open_source(out / "synthetic" / split, omni.encoder)
        found[split] = validate(omni, source, turns, max_tokens=5000, max_rows=NUM_ROWS, max_answer=12)
        found[split].pop("samples")
    omni.remove()
    return {"exact_match": found["unseen"]["right"]["exact_match"], "gap": found["unseen"]["gap"], **found}


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | exact match | word accuracy | loss | gap to another's sound | unseen voices: exact match | word accuracy |",
             "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        here, voices = row["unseen"]["right"], row["unseen_voices"]["right"]
        lines.append(f"| {name} | {here['exact_match']:.3f} | {here['word_accuracy']:.3f} | {here['loss']:.3f} "
                     f"| {row['gap']:.2f} | {voices['exact_match']:.3f} | {voices['word_accuracy']:.3f} |")
    return "\n".join(lines)


def draw(out: Path, rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Exact match while training: stage 2 begins where stage 1 ends."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    starts = {"align": 0, "align-long": 0, "instruct": json.loads((out / "align" / "metrics.json").read_text())["step"]}
    colours = {"align": "#1b4965", "align-long": "#bcd4e6", "instruct": "#e07a5f"}
    for name, stage in ROWS.items():
        log = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
        checks = [(row["step"], row["validation"]["right"]["word_accuracy"]) for row in log if "validation" in row]
        points = [(starts[stage] + step, accuracy) for step, accuracy in checks]
        axis.plot(*zip(*points), marker="o", markersize=3, color=colours[stage],
                  label=f"{name} (exact match {rows[name]['exact_match']:.1%})")
    axis.set(xlabel="step", ylabel="word accuracy, unseen sentences", ylim=(0, 1))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stages"), help="where the chain runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where stages.json and stages.png go")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps and clips, for a quick try")
    args = parser.parse_args()
    out = args.out.absolute()
    seconds = {}
    for name, command in commands(out, args.scale).items():
        start = time.perf_counter()
        print(f"python {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        seconds[name] = time.perf_counter() - start
    rows = {name: score(out, stage) for name, stage in ROWS.items()}
    oracle = rows["stage 1"]["unseen"]["text_oracle"]
    results = {"rows": rows, "seconds": seconds, "text_oracle": oracle, "clips": NUM_ROWS, "scale": args.scale,
               "commands": {name: " ".join(part.replace(str(out), "runs") for part in command)
                            for name, command in commands(out, args.scale).items()},
               "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
               "omni_adapters": __version__}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "stages.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(out, rows, args.results / "stages.png")
    print(f"{table(rows)}\n\nGiven the transcript as text the frozen GPT has {oracle['exact_match']:.3f} exact matches.")


if __name__ == "__main__":
    main()
