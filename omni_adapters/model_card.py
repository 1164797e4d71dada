"""The page beside a published adapter: what it is, what it was trained with, and how to load it.

It says what the adapter's description says. What is not known is left out; texts are shown, never obeyed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from omni_adapters.checkpoint import FORMAT, UNWRITABLE
from omni_adapters.hub import check_repo_id, check_revision
from omni_adapters.projector import DEFAULTS, wording
from omni_adapters.shapes import BadInput, listing


class Kind(NamedTuple):
    """What a key of `card` may hold: its name for an error, and the test."""

    name: str
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list | tuple) and all(map(_is_text, value)))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    """A Python or numpy number: no bool, no NaN, no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Kind("a text", _is_text)
TEXTS = Kind("a text or a list of texts", _is_texts)
METRICS = Kind("a dict of finite numbers by name", _is_metrics)
IN_FRONT = ("license", "language", "datasets", "base_model")
KEYS = {"license": TEXT, "language": TEXTS, "datasets": TEXTS, "base_model": TEXTS, "metrics": METRICS, "notes": TEXT}


def model_card(repo_id: str, description: Mapping[str, Any], sizes: Mapping[str, Sequence[int]],
               card: Mapping[str, Any] | None = None, *, revision: str | None = None) -> str:
    """README.md for an adapter: front matter, how to load it, what it is.

    description: as in the adapter file (docs/adapter_format.md).
    sizes:       name → shape of each tensor of the file.
    card:        what only its author knows, each optional: `license` and `notes` (texts), `language`, `datasets`,
                 `base_model` (a text, or a list of them), `metrics` (name → finite number). Notes are plain text, shown as
                 written.

    Raises BadInput for other keys or types.
    """
    check_repo_id("model_card", repo_id)
    check_revision("model_card", revision)
    given = _checked("model_card", card or {})
    metrics = [(_literal(name), _shown(value)) for name, value in given.get("metrics", {}).items()]
    told = [("What it is", _table(("", ""), list(_facts(description, sizes)))),
            ("Metrics", _table(("metric", "value"), metrics)),
            ("Notes", _paragraphs(given.get("notes", "")))]
    sections = "".join(f"\n## {title}\n\n{text}\n" for title, text in told if text)
    return f"""---
{_front_matter(given, bool(description.get("lora")))}
---

# {_literal(repo_id.split("/")[-1])}

{_opening(bool(description.get("image")))}

## How to load it

{_loading(repo_id, description, revision)}
{sections}"""


def _opening(eyes: bool) -> str:
    hear, encoder = ("hear and see", "frozen encoders") if eyes else ("hear", "a frozen audio encoder")
    return f"""An adapter that lets a GPT {hear}: features of {encoder} become soft tokens between the GPT's text tokens. It
holds what was trained, not the GPT and not the weights of the encoder. Made with `omni-adapters`."""


def _checked(where: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is None or empty."""
    if unknown := [str(key) for key in card if key not in KEYS]:
        raise BadInput(where, f"card with {listing(unknown)!r:.100}", f"keys among {', '.join(KEYS)}")
    given = {key: value for key, value in card.items() if value is not None}
    for key, value in given.items():
        if not KEYS[key].accepts(value):
            raise BadInput(where, f"{key} = {value!r:.100}", KEYS[key].name)
    return {key: value for key, value in given.items() if value}


def _shown(number: Any) -> str:
    return f"{int(number)}" if isinstance(number, Integral) else f"{float(number):.6g}"


def _front_matter(given: Mapping[str, Any], lora: bool) -> str:
    from huggingface_hub import ModelCardData

    named = {key: value if isinstance(value, str) else list(value) for key, value in given.items() if key in IN_FRONT}
    tags = ["omni-adapters", "audio", "soft-tokens", *["lora"] * lora]
    data = ModelCardData(**named, library_name="omni-adapters", pipeline_tag="audio-text-to-text", tags=tags)
    return str(data.to_yaml(line_break="\n"))


def _loading(repo_id: str, description: Mapping[str, Any], revision: str | None) -> str:
    """A block that runs where `gpt` is the host, and `encoder` the encoder where nobody else could make it."""
    encoder, placeholders = description["encoder"], description.get("placeholders")
    makes_itself = encoder["type"] in ("LogMelEncoder", "LogMelPitchEncoder") or (
        encoder["type"] in ("WhisperEncoder", "HFSpeechEncoder", "ConvEncoder")
        and _public_name(encoder.get("source")) is not None)
    options = "" if revision in (None, "main") else f', revision="{revision}"'
    options += "" if makes_itself else ", encoder=encoder"
    theirs = "" if makes_itself else ", and `encoder` the encoder"
    if description.get("image"):
        options += ", image_encoder=image_encoder"
        theirs += ", and `image_encoder` the encoder of images"
    before = max(1, description.get("insert_at", 0))  # sound needs that many tokens before it
    prompt = f"[{placeholders['audio']}]" if placeholders else "[0]" if before == 1 else f"[0] * {before}"
    stands = f"; {placeholders['audio']} stands for a clip" if placeholders else ""
    return f"""`gpt` is the GPT it was trained with{theirs}, loaded by you; any other is refused.

```python
import torch
from omni_adapters import OmniGPT

omni = OmniGPT.from_pretrained("{repo_id}", gpt{options}).eval()
prompt = {prompt}  # ids from the GPT's tokenizer{stands}
clip = torch.zeros(omni.encoder.sampling_rate)  # one second of silence; a recording is a 1-D float tensor at this rate
print(list(omni.generate(prompt, [clip], max_tokens=8)))
```"""


def _public_name(source: object) -> str | None:
    """`hf:owner/name` or `ms:owner/name`, where an encoder came from there. The path of a folder is nobody's business."""
    return str(source) if re.fullmatch(r"(hf|ms):\w[\w.-]*/\w[\w.-]*", str(source)) else None


def _facts(description: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    import torch

    from omni_adapters import __version__

    encoder, host, projector = (description.get(key) or {} for key in ("encoder", "host", "projector"))
    yield from _parts(sizes)
    source, context, layers = _public_name(encoder.get("source")), encoder.get("context"), _layers(encoder.get("layer"))
    named = [_literal(str(encoder.get("type"))), source and f"`{source}`", context and _literal(f"context {context}"), layers]
    yield "encoder", ", ".join(filter(None, [*named, _digest(encoder)]))
    if encoder.get("frame_rate") and projector.get("stack"):
        rate, stack = encoder["frame_rate"], projector["stack"]
        yield "sound", f"{encoder['sampling_rate']} Hz; {rate:g} frames a second, {_soft_tokens(projector)}"
        if not projector.get("pool"):
            yield "soft tokens per second", f"{rate / stack:g}"
    if parts := wording({name: projector[name] for name in DEFAULTS if name in projector}):
        yield "projector", _literal(parts)
    shown = [f"{key} {host[key]}" for key in ("n_embd", "vocab_size", "num_embeddings") if host.get(key) is not None]
    if eyes := description.get("image"):
        yield "encoder of images", ", ".join(filter(None, [_literal(str(eyes["encoder"].get("type"))), _digest(eyes["encoder"])]))
        yield "images", _soft_tokens(eyes["projector"], "frames ")
    yield "GPT", ", ".join([_literal(text) for text in shown] + [text for text in [_digest(host)] if text])
    yield "LoRA", _lora(description.get("lora"))
    if "value_embeds" in description:
        yield "value embeddings at soft tokens", _literal(str(description["value_embeds"]))
    if description.get("placeholders"):
        yield "sound stands", f"at each id {description['placeholders']['audio']}"
        if "image" in description["placeholders"]:
            yield "an image stands", f"at each id {description['placeholders']['image']}"
    elif "insert_at" in description:
        yield "sound stands", f"before text position {description['insert_at']}"
    yield "versions", f"omni-adapters {__version__}, torch {torch.__version__}, adapter format {FORMAT}"


def _layers(layer: Any) -> str:
    """Which hidden states the features are, as `recorded_layers` writes them: nothing for the output, a number, several, all."""
    if layer is None:
        return ""
    if isinstance(layer, list | tuple):
        return _literal(f"layers {' '.join(map(str, layer))}")
    return "all layers" if layer == "all" else _literal(f"layer {layer}")


def _soft_tokens(projector: Mapping[str, Any], unit: str = "") -> str:
    pooled = projector.get("pool")
    return f"{projector['stack']} {unit}to a soft token" if not pooled else (
        f"{projector['stack']} {unit}to a step, {pooled} soft tokens a clip")


def _parts(sizes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """A row for each part of the adapter: how many tensors and values it has, and the shapes where they are few."""
    for part in dict.fromkeys(name.split(".")[0] for name in sizes):
        own = {name: list(shape) for name, shape in sizes.items() if name.split(".")[0] == part}
        count = sum(math.prod(shape) for shape in own.values())
        shapes = listing([f"{name.partition('.')[2]} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in own.items()], 4)
        kind = "stored" if part == "encoder" else "trained"  # an encoder without weights: its fitted statistics
        yield f"{kind}: {_literal(part)}", f"{count:,} values in {len(own)} tensors ({_literal(shapes)})"


def _digest(described: Mapping[str, Any]) -> str:
    return f"weights of sha256 `{described['sha256']}`" if described.get("sha256") else ""


def _lora(settings: Mapping[str, Any] | None) -> str:
    if not settings:
        return "none"
    shown = [f"{key} {settings[key]}" for key in ("rank", "alpha", "dropout", "rslora") if key in settings]
    return _literal(", ".join([*shown, f"{len(settings['paths'])} layers"] if "paths" in settings else shown))


# Markdown


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)]
    return "\n".join(lines) if rows else ""


def _paragraphs(text: str) -> str:
    text = "\n".join(_literal(line) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _literal(text: str) -> str:
    """One line of Markdown that shows `text` as it is written: nothing in it opens a block, a span, a link or a cell."""
    line = " ".join(UNWRITABLE.sub(" ", text).split())
    line = re.sub(r"[\\`*_\[\]<>|~&$]", r"\\\g<0>", line)
    return re.sub(r"^([#+=:-])|^(\d+)([.)])", lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", line)
