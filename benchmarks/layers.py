"""Which layer of an encoder hears how something is said: its last, its middle, or a learned mix of all?

    python -m benchmarks.layers --encoder openai/whisper-base --gpt runs/texture/gpt

One corpus of texture (`omni_adapters.data.texture`), heard once by all layers of a frozen encoder; the GPT that
examples/texture.py taught to read. For each of last, middle and mix a fresh projector and LoRA learn from the same clips, in the
same order, with the same schedule and number of steps. Then questions about unseen voices and sentences, by option
log-likelihood, in each category.

A mix has L − 1 more weights than a single layer and the same projector behind it. Writes layers.json, layers.png (accuracy by
category) and layers_mix.png (the learned weights).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples import texture
from omni_adapters import OmniGPT, Projector, __version__
from omni_adapters.data.questions import Question
from omni_adapters.data.texture import VOICES, Clip, draw
from omni_adapters.data.texture_lessons import TEXTURE, draw_evenly
from omni_adapters.data.texture_questions import ask
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.eval.report import bootstrap_ci95
from omni_adapters.eval.scoring import best, option_scores
from omni_adapters.eval.suite import turns_of
from omni_adapters.features import pad_rows
from omni_adapters.training.hosts import open_host
from omni_adapters.training.options import add_context_option
from omni_adapters.training.pictures import DARK, PALE, WARM, draw_layer_mix, plotting
from omni_adapters.training.report import layer_mix
from omni_adapters.training.sources import open_encoder

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"
COLOURS = {"last": PALE, "middle": WARM, "mix": DARK}


def questions_about(count: int, seed: int) -> tuple[list[Clip], list[Question]]:
    """`count` questions in each texture category, each on a clip of its own, of unseen voices and sentences."""
    rng, clips, found = random.Random(f"layers {seed}"), list[Clip](), list[Question]()
    left = dict.fromkeys(TEXTURE, count)
    while any(left.values()):
        clip = draw(rng, VOICES["valid"] + VOICES["test"], sentences="valid")
        wanted = [name for name in clip.labels if left.get(name)]
        if wanted:
            name = max(wanted, key=lambda category: left[category])
            left[name] -= 1
            clips.append(clip)
            found.append(replace(ask(clip, name, rng), id=f"{name}-{left[name]:03d}"))
    return clips, found


def hear(encoder: AudioEncoder, clips: list[Clip], workers: int) -> list[Tensor]:
    waves = texture.speak_all(clips, workers, texture.spoken)
    return texture.hear_all(encoder, [texture.waveform(wave) for wave in waves], encoder.preprocess, 16)


def layers_of(frames: list[Tensor], numbers: list[int], width: int) -> list[Tensor]:
    """Some layers of (T, L · width) frames, side by side."""
    return [torch.cat([row[:, number * width : (number + 1) * width] for number in numbers], dim=1) for row in frames]


@torch.no_grad()
def accuracies(omni: OmniGPT, tokenizer: Any, questions: list[Question], frames: list[Tensor]) -> dict[str, list[int]]:
    """category → 1 or 0 for each question."""
    soft: list[Tensor] = []
    for first in range(0, len(frames), 16):
        features = pad_rows([row.float() for row in frames[first : first + 16]])
        values, lens = omni.project(features, len(features.lens))
        soft += [row[:length] for row, length in zip(values, lens.tolist())]
    right: dict[str, list[int]] = {}
    for question, scores in zip(questions, option_scores(omni, turns_of(omni, tokenizer), questions, soft)):
        right.setdefault(question.category, []).append(int(best(scores) == question.answer))
    return right


def run(args: argparse.Namespace, encoder: AudioEncoder, numbers: list[int] | None, layer: Any, heard: list[Tensor],
        lessons: list[texture.Lesson], test: tuple[list[Question], list[Tensor]]) -> dict[str, Any]:
    """Train a projector and LoRA on some layers, all where `numbers` is None; what was right."""
    torch.manual_seed(args.seed)
    gpt, tokenizer = open_host("reference", args.gpt)
    count = 1 if numbers else encoder.num_layers
    width = encoder.d_model // encoder.num_layers
    ears = encoder if numbers is None else open_encoder(args.encoder, context=args.context, layer=layer)
    pick = (lambda rows: rows) if numbers is None else (lambda rows: layers_of(rows, numbers, width))
    projector = Projector(ears.d_model, gpt.config.n_embd, args.hidden, stack=args.stack, num_layers=count, zero_init=False,
                          normalize_layers=count > 1)
    omni = OmniGPT(gpt, (ears, projector), insert_at=2)
    omni.add_lora(args.rank, 2.0 * args.rank, seed=args.seed)
    learning = [parameter for group in omni.trainable_parameters() for parameter in group["params"]]
    began, batch = time.perf_counter(), texture.listening(omni, tokenizer, lessons, [pick(heard)], args.rows, args.seed)
    losses = texture.train(learning, lambda step: omni(**batch(step)), args.steps, args.lr,
                           "mix" if numbers is None else f"layer {layer}")
    seconds = time.perf_counter() - began
    right = accuracies(omni.eval(), tokenizer, test[0], pick(test[1]))
    every = [point for points in right.values() for point in points]
    return {"accuracy": sum(every) / len(every), "ci95": bootstrap_ci95(every, [1] * len(every)), "layer": layer,
            "per_category": {name: sum(points) / len(points) for name, points in right.items()}, "seconds": seconds,
            "last_losses": sum(losses[-50:]) / len(losses[-50:]), "layer_mix": layer_mix(omni)}


def draw_layers(results: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axis = plotting("layers").subplots(figsize=(10, 3.8), layout="constrained")
    for number, (name, result) in enumerate(results.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(TEXTURE))]
        axis.bar(places, [100 * result["per_category"][category] for category in TEXTURE], 0.25, color=COLOURS[name],
                 label=f"{name}: {result['accuracy']:.0%}")
    axis.axhline(25, color="grey", linestyle=":", linewidth=1)
    axis.set_xticks(range(len(TEXTURE)), TEXTURE, rotation=30, ha="right")
    axis.set(ylabel="right answers (%)", ylim=(0, 100), title="What a frozen encoder's layers tell about how something is said")
    axis.legend(frameon=False, ncols=3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--encoder", required=True, help="as examples/texture.py takes it")
    parser.add_argument("--gpt", required=True, help="folder of the GPT that examples/texture.py taught to read")
    add_context_option(parser)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--per-category", type=int, default=40, help="questions")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--stack", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    began, rng = time.perf_counter(), random.Random(args.seed)
    every = open_encoder(args.encoder, context=args.context, layer="all")
    clips = draw_evenly(args.clips, rng, VOICES["train"])
    asked, questions = questions_about(args.per_category, args.seed)
    heard, test = hear(every, clips, args.workers), (questions, hear(every, asked, args.workers))
    lessons, count = [texture.Lesson.of(clip) for clip in clips], every.num_layers
    middle = count // 2
    results = {"last": run(args, every, [count - 1], count - 1, heard, lessons, test),
               "middle": run(args, every, [middle], middle, heard, lessons, test),
               "mix": run(args, every, None, "all", heard, lessons, test)}
    args.out.mkdir(parents=True, exist_ok=True)
    draw_layers(results, args.out / "layers.png")
    draw_layer_mix(results["mix"]["layer_mix"], args.out / "layers_mix.png")
    content = {"results": results, "num_layers": count, "num_questions": len(questions), "seconds": time.perf_counter() - began,
               "options": {name: str(value) for name, value in vars(args).items() if name not in ("out", "gpt")},
               "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "omni_adapters": __version__,
               "torch": torch.__version__}
    (args.out / "layers.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, result in results.items():
        low, high = result["ci95"]
        print(f"{name:8} layer {result['layer']!s:4} {result['accuracy']:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
