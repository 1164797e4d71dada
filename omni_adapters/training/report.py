"""What a finished run leaves for people: metrics.json, loss.png, pca.png, layer_mix.png where layers are mixed, and a table on
the terminal.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_adapters import __version__
from omni_adapters.anatomy import table, unwrap
from omni_adapters.collective import whole
from omni_adapters.data.clips import ClipSource
from omni_adapters.encoders.layer_mix import LayerMix
from omni_adapters.files import write_whole
from omni_adapters.model import OmniGPT
from omni_adapters.training.pictures import draw_layer_mix, draw_pca, draw_run
from omni_adapters.training.ranks import Ranks
from omni_adapters.training.run_folder import RunFolder
from omni_adapters.training.turns import Turns
from omni_adapters.training.validation import COLUMNS, batches, hear

ANSWERS = {"exact_match": 12, "word_accuracy": 14}  # and their columns' widths


def scoreboard(result: Mapping[str, Any], num_samples: int = 3) -> str:
    """A validation's columns as rows of text, the gap, and a few answers."""
    lines = [f"    {'':14} {'loss':>8} {'exact match':>12} {'word accuracy':>14}"]
    for column in COLUMNS:
        if column in result:
            scores = result[column]
            answers = " ".join(f"{scores[name]:{width}.3f}" for name, width in ANSWERS.items() if name in scores)
            lines.append(f"    {column:14} {scores['loss']:8.3f} {answers}")
    if "gap" in result:
        lines.append(f"    right is {result['gap']:.3f} nats a token better than shuffled")
    for sample in result["samples"][:num_samples]:
        lines += [f"    {name:6} {' '.join(sample[name].split()):.100}" for name in ("said", "heard")]  # a line each
    return "\n".join(lines)


@torch.no_grad()
def heard_and_read(omni: OmniGPT, source: ClipSource, turns: Turns, max_tokens: int, max_rows: int = 64) -> tuple[Tensor, Tensor]:
    """Soft tokens of some clips (N, n_embd), and the embeddings of all words in their answers (M, n_embd), on the CPU.

    Under FSDP2 all ranks must call it.
    """
    sounds, words = [], set()
    for numbers in batches(source, max_tokens, max_rows):
        sound, rows = source.load_batch(numbers)
        soft = omni.project(hear(omni, source, sound), len(rows))
        sounds += [values[:length].float().cpu() for values, length in zip(soft.values, soft.lens.tolist())]
        words |= {token for row in rows for token in turns.answer(row)[:-1]}
    embeddings = whole(table(unwrap(omni.gpt), omni.prepender.anatomy.wte).weight)[sorted(words)]
    return torch.cat(sounds), embeddings.float().cpu()


def layer_mix(omni: OmniGPT) -> list[float] | None:
    """The share of each of the encoder's layers in what the projector hears, sum 1; None where it mixes none.

    Under FSDP2 all ranks must call it.
    """
    mix = getattr(omni.projector, "mix", None)
    return whole(mix.scores).softmax(dim=0).tolist() if isinstance(mix, LayerMix) else None


def finish_run(omni: OmniGPT, source: ClipSource, turns: Turns, folder: RunFolder, ranks: Ranks, args: Namespace) -> None:
    """Everything a finished run leaves behind: adapter.safetensors, the report, and with `args.push` a repository on the Hub.

    All ranks call this; the first writes. `args` as `options.add_run_options` made them.
    """
    omni.save_adapter(args.out / "adapter.safetensors")
    parts, mix = heard_and_read(omni, source, turns, args.max_tokens), layer_mix(omni)
    card = None
    if ranks.is_first:
        metrics = write_report(args.out, folder.rows(), parts, vars(args), omni, mix)
        numbers = {column: metrics[column] for column in COLUMNS}
        card = {"metrics": {f"{column} {name}": value for column, row in numbers.items() for name, value in row.items()}}
        print(f"{args.out}: loss {metrics['right']['loss']:.3f} with the right sound, {metrics['gap']:.3f} nats a token more "
              f"with another's; look at {'loss.png, pca.png and layer_mix.png' if mix else 'loss.png and pca.png'}")
    if args.push:
        url = omni.push_to_hub(args.push, card=card)
        if ranks.is_first:
            print(url)


def write_report(out: Path, rows: Sequence[Mapping[str, Any]], parts: tuple[Tensor, Tensor], options: Mapping[str, Any],
                 omni: OmniGPT, mix: Sequence[float] | None = None) -> dict[str, Any]:
    """Draw loss.png and pca.png, write metrics.json and return it: the last validation in the log, and what it belongs to.

    rows: the run's log. parts: what `heard_and_read` returned. mix: what `layer_mix` returned; then layer_mix.png is drawn too.
    """
    last = [row for row in rows if "validation" in row][-1]
    metrics = {"step": last["step"], **last["validation"], "pca": draw_pca(*parts, out / "pca.png"),
               "trained_parameters": sum(tensor.numel() for tensor in omni.trained().values()),
               **soft_token_rate(omni), **({"layer_mix": list(mix)} if mix else {}),
               "options": {name: str(value) for name, value in options.items()},
               "omni_adapters": __version__, "torch": torch.__version__}
    draw_run(rows, out / "loss.png")
    if mix:
        layers = getattr(omni.encoder, "layers", None)  # of a WhisperEncoder: the numbers of those it gives, or None
        draw_layer_mix(mix, out / "layer_mix.png", layers if isinstance(layers, tuple) and len(layers) == len(mix) else None)
    write_whole("write_report", out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def soft_token_rate(omni: OmniGPT) -> dict[str, float]:
    pool = getattr(omni.projector, "pool", None)
    return {"soft_tokens_a_clip": pool} if pool else {"soft_tokens_a_second": omni.encoder.frame_rate / omni.projector.stack}
