"""Pictures of a run: how the losses fell, where projected sound lies among the GPT's words, which layers are listened to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_adapters.shapes import BadInput, MissingExtra, shape

DARK, PALE, WARM = "#1b4965", "#bcd4e6", "#e07a5f"


def principal_components(points: Tensor, num: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), directions (num, d), and each one's share of the variance (num,) of points (N, d).

    PCA by singular values of the centred points; a direction's sign is that its largest entry is positive.
    """
    if points.ndim != 2 or min(points.shape) < num:
        raise BadInput("principal_components", f"points {shape(points.shape)}", f"(N, d), both at least {num}")
    centred = points.float() - points.float().mean(dim=0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    directions = rows[:num]
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    return points.float().mean(dim=0), directions * signs, values[:num] ** 2 / values.square().sum().clamp(min=1e-30)


def unit_rms(points: Tensor) -> Tensor:
    """Each row divided by its root mean square: the GPT norms what enters it, so only directions count."""
    return points.float() / points.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def draw_pca(soft_tokens: Tensor, embeddings: Tensor, path: str | os.PathLike[str]) -> dict[str, float]:
    """Soft tokens (N, n_embd) beside rows of wte (M, n_embd), in the plane of the rows' two widest directions.

    Returns the share of each set's variance that lies in that plane: an ear that speaks the GPT's language puts its
    sound where the words are, not off in directions of its own.
    """
    pyplot = plotting("draw_pca")
    words, sounds = unit_rms(embeddings.detach().cpu()), unit_rms(soft_tokens.detach().cpu())
    mean, directions, share = principal_components(words)
    flat_words, flat_sounds = (words - mean) @ directions.T, (sounds - mean) @ directions.T
    inside = float(flat_sounds.var(dim=0).sum() / sounds.var(dim=0).sum().clamp(min=1e-30))
    figure, axis = pyplot.subplots(figsize=(6, 5), layout="constrained")
    axis.scatter(*flat_words.T, s=10, color=PALE, label=f"text embeddings ({len(words)})")
    axis.scatter(*flat_sounds.T, s=6, color=WARM, alpha=0.5, label=f"projected audio ({len(sounds)})")
    axis.set(xlabel=f"first direction of the words ({share[0]:.1%} of their variance)", ylabel=f"second ({share[1]:.1%})",
             title="Where the GPT hears sound, among its words")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return {"text_variance_in_plane": float(share.sum()), "audio_variance_in_plane": inside}


def draw_run(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """A run's log: training loss over steps, and the validation losses of each column where there are any."""
    pyplot = plotting("draw_run")
    steps = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "validation" in row]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot([row["step"] for row in steps], [row["loss"] for row in steps], color=PALE, linewidth=0.8, label="training")
    styles = {"right": (DARK, "-"), "shuffled": (WARM, "-"), "blank": (WARM, ":"), "text_oracle": (DARK, ":")}
    for column, (colour, dash) in styles.items():
        points = [(row["step"], row["validation"][column]["loss"]) for row in checks if column in row["validation"]]
        if points:
            axis.plot(*zip(*points), color=colour, linestyle=dash, marker="o", markersize=3, label=column.replace("_", " "))
    axis.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(path), dpi=130)
    pyplot.close(figure)


def smoothed(losses: Sequence[float], steps: int = 20) -> list[float]:
    """The mean of each and of up to `steps` − 1 before it."""
    sums = [0.0, *accumulate(losses)]
    return [(sums[i + 1] - sums[max(0, i + 1 - steps)]) / min(i + 1, steps) for i in range(len(losses))]


def draw_stages(stages: Mapping[str, Sequence[float]], path: str | os.PathLike[str], unit: str = "nats a token") -> None:
    """Title → the loss of each step, one beside the other, with a mean of 20 steps, on a logarithmic scale."""
    pyplot = plotting("draw_stages")
    figure, axes = pyplot.subplots(1, len(stages), figsize=(4.25 * len(stages), 3.2), layout="constrained", squeeze=False)
    for axis, (title, losses) in zip(axes[0], stages.items()):
        axis.plot(losses, color=PALE, linewidth=0.8)
        axis.plot(smoothed(losses), color=DARK, label="mean of 20 steps")
        axis.set(title=title, xlabel="step", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"loss ({unit})")
    axes[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_layer_mix(weights: Sequence[float], path: str | os.PathLike[str], layers: Sequence[int] | None = None) -> None:
    """The share of each layer in a LayerMix (L,), a bar a layer in %, beside the even share of a mix that learned nothing.

    layers: their numbers in the encoder, by default 0 … L−1.
    """
    if not weights or (layers is not None and len(layers) != len(weights)):
        raise BadInput("draw_layer_mix", f"{len(weights)} weights for {'no' if layers is None else len(layers)} layers",
                       "one weight for each of at least one layer")
    pyplot = plotting("draw_layer_mix")
    places, every = range(len(weights)), -(-len(weights) // 16)
    figure, axis = pyplot.subplots(figsize=(max(5, 0.35 * len(weights)), 4), layout="constrained")
    axis.bar(places, [100 * weight for weight in weights], 0.8, color=DARK)
    axis.axhline(100 / len(weights), color=WARM, linestyle=":", label=f"all alike ({100 / len(weights):.3g} %)")
    axis.set_xticks(places[::every], [str(layer) for layer in (places if layers is None else layers)][::every])
    axis.set(xlabel="layer of the encoder", ylabel="weight in the mix (%)", ylim=(0, 125 * max(weights)),
             title="Which layers are listened to")
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plotting(where: str) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra(where, "matplotlib", "train") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
