"""A projector's training step from feature shards against encoding online, in one process, interleaved.

    python -m benchmarks.shards                    # minutes on two cores; writes benchmarks/results/<device>/shards.*

The encoder is Whisper-base's architecture with random weights (speed does not depend on them), the GPT the d6 reference
at vocabulary 32768, frozen; four spoken clips a step. Online: waveforms → log-mel → encoder → projector → GPT → backward
→ AdamW. From shards: the same from the features on. Before a time counts, both must agree on the loss as far as the
stored float16 allows. The encoder's one pass over the data is reported beside it, in steps that pay for it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import omni_adapters
from omni_adapters import OmniGPT, Projector
from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.collate import collate
from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import ManifestRow
from omni_adapters.data.shards import ShardReader
from omni_adapters.data.speech import speak
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.features import features_to
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.reference_gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
ROWS = 4           # clips of a step
TOLERANCE = 2e-3   # relative, on the loss: float16 keeps each feature to 2⁻¹¹ = 5e-4, and the GPT norms what it makes of them


def random_whisper_base(folder: Path) -> WhisperEncoder:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    sizes = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    WhisperModel(WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=8)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return WhisperEncoder(folder)


def spoken_rows(folder: Path, count: int) -> list[ManifestRow]:
    rng, rows = random.Random(0), []
    for number in range(count):
        text = " ".join(rng.choices("open close the red blue lamp door in kitchen garden now later".split(), k=8))
        sound = speak(text, variant=rng.choice(("f1", "m1", "f3")), rate=rng.randint(140, 200))
        save_audio(folder / f"{number}.wav", sound, 16_000)
        rows.append(ManifestRow(str(folder / f"{number}.wav"), text, len(sound) / 16_000))
    return rows


def step(omni: OmniGPT, optimizer: torch.optim.Optimizer, texts: list[str], sound: dict[str, Any]) -> None:
    optimizer.zero_grad()
    loss_of(omni, texts, sound).backward()
    optimizer.step()


def loss_of(omni: OmniGPT, texts: list[str], sound: dict[str, Any]) -> Tensor:
    idx, targets = collate([[0, *text.encode()] for text in texts])
    return omni(idx, targets, **sound)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    encoder, rows = random_whisper_base(folder / "whisper"), spoken_rows(folder, args.clips)
    start = time.perf_counter()
    write_shards(rows, encoder, folder / "shards", description=describe_encoder(encoder), samples_per_shard=16, progress=False)
    encoding = time.perf_counter() - start
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=2048, vocab_size=32768, n_layer=6, n_head=3, n_kv_head=3, n_embd=384))
    for parameter in gpt.parameters():  # as built, its zero output projections would let no sound through
        torch.nn.init.normal_(parameter, std=0.05)
    omni = OmniGPT(gpt, (encoder, Projector(512, 384, stack=8, zero_init=False)))
    optimizer = torch.optim.AdamW(omni.trainable_parameters())
    reader = ShardReader(folder / "shards", verify=True)

    def online(numbers: list[int]) -> tuple[list[str], dict[str, Any]]:
        waves = [load_audio(rows[number].audio, encoder.sampling_rate) for number in numbers]
        return [rows[number].text for number in numbers], {"audio": waves}

    def stored(numbers: list[int]) -> tuple[list[str], dict[str, Any]]:
        features, found = reader.load_batch(numbers)
        return [row["text"] for row in found], {"audio_features": features_to(features, torch.float32)}

    with torch.no_grad():
        losses = {name: loss_of(omni, *load(list(range(ROWS)))).item() for name, load in (("online", online), ("shards", stored))}
    if not abs(losses["online"] - losses["shards"]) <= TOLERANCE * losses["online"]:  # NaN is not ≤
        raise SystemExit(f"the losses differ, {losses}: a fast wrong step is no step")
    times: dict[str, list[float]] = {"online": [], "shards": []}
    for number in tqdm(range(args.repeats + 1), desc="steps"):
        numbers = [(ROWS * number + i) % args.clips for i in range(ROWS)]
        for name, load in (("online", online), ("shards", stored)):
            start = time.perf_counter()
            step(omni, optimizer, *load(numbers))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first of each is a warm-up
    return {"ratio": medians["online"] / medians["shards"], "ms": {name: 1e3 * value for name, value in medians.items()},
            "loss": losses, "clips": args.clips, "rows": ROWS, "frames_of_the_longest_clip": int(reader.lens.max()),
            "encoding_once_s": encoding, "steps_that_pay_for_it": encoding / (medians["online"] - medians["shards"])}


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
    bars = axis.barh(["encoding online", "from shards"], [report["ms"]["online"], report["ms"]["shards"]],
                     color=["#9aa7b4", "#2a6f97"])
    axis.bar_label(bars, fmt="%.0f ms", padding=3)
    axis.set(xlabel="ms per step", title=f"{report['ratio']:.1f} × faster from shards ({report['device']})")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16, help="spoken and encoded")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each; the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu", help="folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    report = {"what": "one projector step, encoding online ÷ from shards", "command": "python -m benchmarks.shards",
              "date": date.today().isoformat(), "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
              "torch": torch.__version__, "omni_adapters": omni_adapters.__version__, **found}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "shards.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out / "shards.png")
    print(f"online {report['ms']['online']:.0f} ms, from shards {report['ms']['shards']:.0f} ms: {report['ratio']:.1f} ×; "
          f"encoding {args.clips} clips once took {report['encoding_once_s']:.1f} s, "
          f"which {report['steps_that_pay_for_it']:.0f} steps pay for")


if __name__ == "__main__":
    main()
