"""One module to train, wrap, compile and save: the GPT, its senses, and LoRA where there is some.

    waveforms ─► encoder ─► projector ─┐
    images    ─► encoder ─► projector ─┴─► SoftTokenPrepender ─► the unedited GPT (+ LoRA) ─► loss | logits | text

Notable:
- the GPT and the encoders are frozen from the start; what trains are projectors, learned side rows, and LoRA
- a signal may enter at three places: as it is, as encoder inputs (made by DataLoader workers), as cached features
- an adapter is one file: everything trained, and a description of what it was trained with (`checkpoint`)
- every forward takes the same way, with sound or without: each projector runs once, then the GPT, and in training a gradient
  reaches all that trains. Where processes share the weights they meet in the same order whatever each one hears
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omni_adapters.anatomy import plain_name, unwrap
from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.collective import on_first_rank, whole
from omni_adapters.descriptions import check_same
from omni_adapters.encoders import hf_speech, whisper
from omni_adapters.encoders.conv import ConvEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.log_mel_pitch import LogMelPitchEncoder
from omni_adapters.encoders.protocol import AudioEncoder, Encoder
from omni_adapters.features import Features
from omni_adapters.fingerprints import Digest, describe_encoder, describe_host
from omni_adapters.head_loss import LossForm
from omni_adapters.hooks import ValueEmbeds
from omni_adapters.hub import fetch_adapter, publish
from omni_adapters.lora import LoRALinear, inject_at, inject_lora, keeping_dtype, lora_by_path, lora_settings, remove_lora
from omni_adapters.model_card import model_card
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.projector import Projector, build_projector, described_projector, settings_of, wording
from omni_adapters.senses import Sense, Signal, carrying, encoder_statistics, no_clips
from omni_adapters.shapes import BadInput
from omni_adapters.splice import SoftTokens

Waveforms = Sequence["Tensor | np.ndarray | None"]

ENCODERS: dict[str, Callable[[str | None, torch.dtype, dict[str, Any]], AudioEncoder]] = {
    "LogMelEncoder": lambda source, dtype, settings: LogMelEncoder(),
    "WhisperEncoder": lambda source, dtype, settings: whisper.WhisperEncoder(source, dtype=dtype, **settings),
    "HFSpeechEncoder": lambda source, dtype, settings: hf_speech.HFSpeechEncoder(source or "", dtype=dtype, **settings),
    "LogMelPitchEncoder": lambda source, dtype, settings: LogMelPitchEncoder(),
    "ConvEncoder": lambda source, dtype, settings: ConvEncoder.load(source or "", dtype=dtype),
}
SETTINGS = {"WhisperEncoder": whisper.SETTINGS, "HFSpeechEncoder": hf_speech.SETTINGS}  # of a description that an encoder takes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SAVED = {"host", "encoder", "projector", "value_embeds", "insert_at", "placeholders", "lora"}  # keys of a description
RATES = {  # AdamW learning rates that the field uses: LLaVA (arXiv:2304.08485) for the projector, its LoRA recipe beside it
    "align": {"projector": 1e-3, "side_rows": 1e-3},
    "instruct": {"projector": 2e-5, "side_rows": 2e-5, "lora": 2e-4},
}


class OmniGPT(nn.Module):
    """A GPT that hears, and sees where it has eyes.

    gpt:          any host a SoftTokenPrepender reads. Every parameter it came with is frozen; `remove` gives the flags back.
    audio:        (encoder, projector); projector.in_dim is encoder.d_model, projector.out_dim the GPT's n_embd.
    image:        the same for a second sense, or None. Its encoder has `d_model`, `preprocess` and a call (`Encoder`).
    placeholders: {"audio": id, "image": id}, one for each sense, puts one clip at each occurrence of its id in idx, read row
                  by row; None, for ears alone, puts one clip per row before text position `insert_at`.
    value_embeds, insert_at, loss: as in SoftTokenPrepender; an adapter does not say `loss`, a matter of speed.

    Sound is given to `forward` and `generate` in one of three forms: `audio`, a list of 1-D waveforms, None for a row
    without sound (never with placeholders); `audio_inputs`, what encoder.preprocess returned; `audio_features`, what the
    encoder returned. So are images: `image`, a list of what the encoder's preprocess takes, `image_inputs`,
    `image_features`. Raises BadInput; the GPT is then as it came.
    """

    encoder: AudioEncoder
    projector: Projector
    image_encoder: Encoder
    image_projector: Projector

    def __init__(self, gpt: nn.Module, audio: tuple[AudioEncoder, Projector], image: tuple[Encoder, Projector] | None = None, *,
                 placeholders: Mapping[str, int] | None = None, value_embeds: ValueEmbeds = "zero", insert_at: int = 0,
                 loss: LossForm = "host") -> None:
        super().__init__()
        check_placeholders(placeholders, ("audio",) if image is None else ("audio", "image"))
        prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds, insert_at=insert_at, loss=loss)
        try:
            Sense("audio", *audio).check(prepender.anatomy.n_embd)
            if image is not None:
                Sense("image", *image).check(prepender.anatomy.n_embd)
        except BaseException:
            prepender.remove()
            raise
        self.encoder, self.projector = audio
        self.has_eyes = image is not None
        if image is not None:
            self.image_encoder, self.image_projector = image
        self.prepender = prepender
        self.placeholders = None if placeholders is None else dict(placeholders)
        self.own_lora = False
        self.host_digest = Digest()
        self.flags = {name: p.requires_grad for name, p in gpt.named_parameters()}
        gpt.requires_grad_(False)
        for sense in self.senses().values():
            sense.freeze()
        for layer in self.lora():
            layer.lora_a.requires_grad_(True)
            layer.lora_b.requires_grad_(True)

    @property
    def gpt(self) -> nn.Module:
        return self.prepender.gpt

    @property
    def loss(self) -> LossForm:
        """Who computes the loss, as in SoftTokenPrepender; may be set at any time, after `load_adapter` too."""
        return self.prepender.loss

    @loss.setter
    def loss(self, form: LossForm) -> None:
        self.prepender.loss = form

    def senses(self) -> dict[str, Sense]:
        """By name, always in one order: "audio", then "image" where there is one."""
        eyes = {"image": Sense("image", self.image_encoder, self.image_projector)} if self.has_eyes else {}
        return {"audio": Sense("audio", self.encoder, self.projector)} | eyes

    def forward(self, idx: Tensor, targets: Tensor | None = None, audio: Waveforms | None = None, *,
                audio_inputs: Features | None = None, audio_features: Features | None = None,
                image: Sequence[Any] | None = None, image_inputs: Features | None = None,
                image_features: Features | None = None, **gpt_kwargs: Any) -> Any:
        """What the GPT returns for `idx` (B, T) and `targets`, having heard and seen: logits (B, T, vocab_size) or the loss.

        A batch without sound is the bare GPT's, bit for bit, unless it trains: then it runs with soft tokens of length 0,
        so that its loss, or what is made of its logits, has a gradient, of zero, for all that hears.
        """
        features = self.features(idx.size(0), Signal(audio, audio_inputs, audio_features),
                                 Signal(image, image_inputs, image_features))
        soft = {name: self.project(found, idx.size(0), name) for name, found in features.items()}
        idle = [name for name, found in features.items() if found is None]
        if idle and self.training and torch.is_grad_enabled():
            carrier = next((name for name, found in features.items() if found is not None), "audio")
            soft[carrier] = carrying(soft[carrier], [soft[name] for name in idle if name != carrier])
            if features[carrier] is None:
                targets = self.check_silent(idx, targets, soft, gpt_kwargs.get("loss_reduction", "mean"))
                return self.prepender(idx, targets, soft[carrier], **gpt_kwargs)
        return self.prepender(idx, targets, self.placed(features, soft), **gpt_kwargs)

    def check_silent(self, idx: Tensor, targets: Tensor | None, soft: Mapping[str, Features], reduction: str) -> Tensor | None:
        """Placeholders get no clips: one in idx is refused, one in targets not graded."""
        clips = self.placed(dict.fromkeys(soft), soft)
        if clips is None:
            return targets
        self.prepender.columns("OmniGPT", idx, clips)
        return None if targets is None else self.prepender.graded("OmniGPT", idx, targets, clips, reduction)

    def train(self, mode: bool = True) -> OmniGPT:
        """Encoders stay in eval: what one says of a clip must not depend on chance or on the batch."""
        super().train(mode)
        for sense in self.senses().values():
            if isinstance(sense.encoder, nn.Module):
                sense.encoder.eval()
        return self

    def generate(self, tokens: list[int], audio: Waveforms | None = None, *, audio_inputs: Features | None = None,
                 audio_features: Features | None = None, image: Sequence[Any] | None = None,
                 image_inputs: Features | None = None, image_features: Features | None = None, max_tokens: int,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> Iterator[int]:
        """Stream token ids after one prompt, as `SoftTokenPrepender.generate`. Call `eval()` first where LoRA has dropout."""
        with torch.no_grad():
            features = self.features(1, Signal(audio, audio_inputs, audio_features), Signal(image, image_inputs, image_features))
            soft = self.placed(features, {name: self.project(found, 1, name) for name, found in features.items()})
        return self.prepender.generate(tokens, soft, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)

    def features(self, num_rows: int, audio: Signal, image: Signal) -> dict[str, Features | None]:
        """Features (B, T, d_model) of each sense, None where it got nothing."""
        if not self.has_eyes and any(form is not None for form in image):
            raise BadInput("OmniGPT", "an image", "a GPT with eyes", "build it with OmniGPT(…, image=(encoder, projector))")
        rows = num_rows if self.placeholders is None else None
        return {name: sense.features({"audio": audio, "image": image}[name], rows) for name, sense in self.senses().items()}

    def project(self, features: Features | None, num_rows: int, sense: str = "audio") -> Features:
        """Features → soft tokens; nothing → one of length 0 for each row."""
        return self.senses()[sense].soft_tokens(features, num_rows, self.prepender.device())

    def placed(self, features: Mapping[str, Features | None], soft: Mapping[str, Features]) -> SoftTokens | None:
        """What the prepender takes: soft tokens, at placeholders where there are some. Where nothing is heard None, or no
        clip for any placeholder, so that one without its clip is refused, not read as text."""
        if self.placeholders is None:
            return None if features["audio"] is None else soft["audio"]
        clips = {name: no_clips(soft[name]) if found is None else soft[name] for name, found in features.items()}
        return {self.placeholders[name]: clip for name, clip in clips.items()}

    # ---- what is trained ----------------------------------------------------------------------------------------------

    def add_lora(self, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, **options: Any) -> list[str]:
        """LoRA on the GPT, for stage 2; options as in `inject_lora`. Returns the paths of the layers."""
        paths = inject_lora(unwrap(self.gpt), rank, alpha, dropout, **options)
        self.own_lora = True
        return paths

    def lora(self) -> list[LoRALinear]:
        return list(lora_by_path(self.gpt).values())

    def _apply(self, fn: Any, recurse: bool = True) -> OmniGPT:
        """A cast (`omni.bfloat16()`) is of what is frozen: what trains moves with it, but keeps its dtype, fp32."""
        projectors = [sense.projector for sense in self.senses().values()]
        masters = [*(p for projector in projectors for p in projector.parameters()), *self.prepender.side_rows.values()]
        return super()._apply(keeping_dtype(fn, masters), recurse)  # LoRALinear does so for its own

    def trained(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by its name in the file."""
        found: dict[str, Tensor] = {}
        for sense in self.senses().values():
            found |= {f"{prefix(sense)}projector.{name}": p for name, p in sense.projector.named_parameters()}
        found |= {f"side_rows.{name}": p for name, p in self.prepender.side_rows.items()}
        for path, layer in lora_by_path(self.gpt).items():
            found |= {f"lora.{path}.lora_a": layer.lora_a, f"lora.{path}.lora_b": layer.lora_b}
        for sense in self.senses().values():
            found |= {f"{prefix(sense)}encoder.{name}": value for name, value in encoder_statistics(sense.encoder).items()}
        return found

    def trainable_parameters(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, each with its `name` and a learning rate: `RATES["align"]` where only
        projectors (and side rows) train, `RATES["instruct"]` with LoRA."""
        rates = dict(RATES["instruct" if self.lora() else "align"])
        rates["image_projector"] = rates["projector"]
        groups: dict[str, list[Tensor]] = {name: [] for name in rates}
        for name, tensor in self.trained().items():
            if tensor.requires_grad:
                groups[name.split(".")[0]].append(tensor)
        return [{"name": name, "params": params, "lr": rates[name]} for name, params in groups.items() if params]

    def remove(self) -> nn.Module:
        """The GPT as it came: no hooks, no LoRA of ours, its own flags. A second call does nothing."""
        if not self.prepender.hooks.attached:
            return self.gpt
        self.prepender.remove()
        if self.own_lora and self.lora():
            remove_lora(unwrap(self.gpt))
        for name, parameter in self.gpt.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        return self.gpt

    def describe(self) -> str:
        """A few lines: what is frozen, what trains, what a second of sound costs, and whether 30 s fit."""
        anatomy, pool = self.prepender.anatomy, getattr(self.projector, "pool", None)
        per_second = self.encoder.frame_rate / getattr(self.projector, "stack", 1)
        clip, window, limit = pool or round(30 * per_second), short_window(self.gpt), anatomy.position_limit
        lora, host = self.lora(), type(unwrap(self.gpt)).__name__.removeprefix("FSDP")  # fully_shard renames the class
        trains = sum(group_size(group) for group in self.trainable_parameters())
        lines = [
            f"GPT        {host}: {parameters_of(self.gpt) - lora_size(lora):,} parameters, frozen",
            *(line for sense in self.senses().values() for line in told(sense)),
            f"LoRA       {f'rank {lora[0].rank} on {len(lora)} layers: {lora_size(lora):,} parameters' if lora else 'none'}",
            f"trained    {trains:,} parameters",
            f"sound      {f'{pool} soft tokens a clip' if pool else f'{per_second:g} soft tokens a second'}; "
            f"a clip of 30 s takes {clip} positions"
            f"{f' of {limit:,}' if limit else ''}",
        ]
        if window is not None:
            fits = "fits" if clip <= window else "does not fit: most layers see its end only"
            lines.append(f"windows    the shortest sees {window} positions: a clip of 30 s {fits}")
        return "\n".join(lines)

    # ---- one file -------------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """All that `load_adapter` needs to build this again, and to refuse another GPT or encoder.

        The digest of the GPT's weights is computed once and kept while they stay as they are. On a sharded GPT it is the
        digest from before, or, where there is none, all ranks have to call this together.
        """
        lora = lora_by_path(self.gpt)
        settings = lora_settings(list(lora.values()), "OmniGPT") | {"paths": list(lora)} if lora else None
        return {
            "host": describe_host(self.prepender, self.host_digest),
            **described(self.senses()["audio"]),
            "value_embeds": self.prepender.value_embeds, "insert_at": self.prepender.insert_at,
            "placeholders": self.placeholders,
            "lora": settings,
        } | {name: described(sense) for name, sense in self.senses().items() if name != "audio"}

    def save_adapter(self, path: str | os.PathLike[str]) -> None:
        """Everything trained, in one safetensors file that replaces `path` whole or not at all (docs/adapter_format.md).

        In a process group all ranks call this: sharded tensors are gathered, the first rank writes, and the others return
        when the file is there. What goes wrong on the first is raised on all.
        """
        tensors = {name: whole(tensor) for name, tensor in self.trained().items()}
        description = self.description()
        ears = description["encoder"]
        if ears["type"] in ENCODERS and ears["sha256"] is not None and not ears["source"]:
            raise BadInput("OmniGPT.save_adapter", f"an encoder of type {ears['type']} that was saved nowhere",
                           "one that the adapter can name", "save it first: omni.encoder.save(directory)")
        on_first_rank(lambda: save_adapter(path, tensors, description))

    @classmethod
    def load_adapter(cls, path: str | os.PathLike[str], gpt: nn.Module, *, encoder: AudioEncoder | None = None,
                     image_encoder: Encoder | None = None, any_weights: bool = False) -> OmniGPT:
        """The OmniGPT that `save_adapter` wrote, around `gpt`; `encoder` defaults to the one the file names, `image_encoder`
        has to be given where the file names one.

        All or nothing. Refuses (BadInput) a broken file, and a GPT or encoder of other sizes or, unless `any_weights`,
        of other weights than the adapter was trained with; both sides are named. Shard or wrap the OmniGPT afterwards.
        """
        where = f"OmniGPT.load_adapter({os.fspath(path)})"
        tensors, saved = load_adapter(path)
        if set(saved) - {"image"} != SAVED:
            raise BadInput(where, f"a description of {sorted(saved)}", str(sorted(SAVED)), "save it with OmniGPT.save_adapter")
        eyes = saved.get("image")
        if eyes is None and image_encoder is not None:
            raise BadInput(where, "an image_encoder for an adapter of ears alone", "none")
        encoder = build_encoder(where, saved["encoder"], Path(path).parent) if encoder is None else encoder
        audio = own_copy(encoder), build_projector(where, saved["projector"])
        image = None
        if eyes is not None:
            if image_encoder is None:
                raise BadInput(where, f"an adapter trained with eyes, {eyes['encoder']['type']}", "its encoder",
                               "pass it: load_adapter(path, gpt, image_encoder=…)")
            image = own_copy(image_encoder), build_projector(where, eyes["projector"])
        encoders = {"encoder": (saved["encoder"], audio[0])}
        if image is not None and eyes is not None:
            encoders["image_encoder"] = eyes["encoder"], image[0]
        for name, (theirs, ours) in encoders.items():
            if getattr(ours, "d_model", None) not in (None, theirs.get("d_model")):  # the projector would only see a width
                check_same(where, {name: comparable(theirs, any_weights)},
                           {name: comparable(describe_encoder(ours), any_weights)})
        omni = cls(gpt, audio, image, placeholders=saved["placeholders"], value_embeds=saved["value_embeds"],
                   insert_at=saved["insert_at"])
        try:
            for sense in omni.senses().values():
                sense.projector.to(omni.prepender.device())
            there = {"host": saved["host"]} | {name: theirs for name, (theirs, _) in encoders.items()}
            here = {"host": describe_host(omni.prepender, omni.host_digest)} | {
                name: describe_encoder(ours) for name, (_, ours) in encoders.items()}
            check_same(where, {name: comparable(one, any_weights) for name, one in there.items()},
                       {name: comparable(one, any_weights) for name, one in here.items()})
            if saved["lora"] is not None:
                lora = dict(saved["lora"])
                real = {plain_name(name): name for name, _ in unwrap(gpt).named_modules()}
                check_same(where, {"paths": [p for p in lora["paths"] if p not in real]}, {"paths": []})
                inject_at(unwrap(gpt), [real[path] for path in lora.pop("paths")], **lora)
                omni.own_lora = True
            own = omni.trained()
            check_same(where, {name: list(t.shape) for name, t in tensors.items()}, {n: list(t.shape) for n, t in own.items()})
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(tensors[name])
        except Exception:
            omni.remove()
            raise
        return omni

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | bool | None = None,
                    message: str = "Upload adapter", revision: str | None = None, card: Mapping[str, Any] | None = None) -> str:
        """The adapter file and a page about it, to `owner/name` on the Hugging Face Hub in one commit. Returns its URL.

        Arguments as in `hub.publish`; `card` says what only you know, as in `hub.model_card`. In a process group all ranks
        call this, the first uploads, and the others return "". Raises BadInput, UploadFailed (an OSError).
        """
        tensors, description = {name: whole(tensor) for name, tensor in self.trained().items()}, self.description()
        page = model_card(repo_id, description, {name: tensor.shape for name, tensor in tensors.items()}, card, revision=revision)
        url = [""]

        def upload() -> None:
            url[0] = publish(repo_id, lambda path: save_adapter(path, tensors, description), page, private=private, token=token,
                             message=message, revision=revision)

        on_first_rank(upload)
        return url[0]

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], gpt: nn.Module, *, encoder: AudioEncoder | None = None,
                        image_encoder: Encoder | None = None, revision: str | None = None, token: str | bool | None = None,
                        any_weights: bool = False) -> OmniGPT:
        """The OmniGPT that `push_to_hub` uploaded, or that lies in a folder as adapter.safetensors, around `gpt`.

        source, revision, token: as in `hub.fetch_adapter`. The rest, and what is refused: as in `load_adapter`.
        """
        path = fetch_adapter(source, revision=revision, token=token)
        return cls.load_adapter(path, gpt, encoder=encoder, image_encoder=image_encoder, any_weights=any_weights)


def check_placeholders(placeholders: Mapping[str, int] | None, senses: Sequence[str]) -> None:
    """One for each sense. Without, each row has one clip in front: with two senses nothing would say which comes first."""
    wanted = "{" + ", ".join(f"'{name}': id" for name in senses) + "}"
    if placeholders is None:
        if len(senses) > 1:
            raise BadInput("OmniGPT", "no placeholders for two senses", wanted)
    elif set(placeholders) != set(senses):
        raise BadInput("OmniGPT", f"placeholders for {sorted(placeholders)}", wanted)
    elif len(set(placeholders.values())) < len(placeholders):
        raise BadInput("OmniGPT", f"placeholders {dict(placeholders)}", "an id of its own for each sense")


def prefix(sense: Sense) -> str:
    """Of a sense's names in a file. Ears have none: they were there first."""
    return "" if sense.name == "audio" else f"{sense.name}_"


def described(sense: Sense) -> dict[str, Any]:
    return {"encoder": describe_encoder(sense.encoder), "projector": described_projector(sense.projector)}


def told(sense: Sense) -> tuple[str, str]:
    encoder, projector, eyes = sense.encoder, sense.projector, "" if sense.name == "audio" else f"{sense.name}: "
    parts = f" ({wording(settings)})" if (settings := settings_of(projector)) else ""
    return (f"encoder    {eyes}{type(encoder).__name__}: {parameters_of(encoder):,} parameters, frozen",
            f"projector  {eyes}{encoder.d_model} × {getattr(projector, 'stack', 1)} → {projector.out_dim}{parts}: "
            f"{parameters_of(projector):,} parameters")


def comparable(description: Mapping[str, Any], any_weights: bool) -> dict[str, Any]:
    """What of a description tells a GPT or an encoder from others, in what it computes."""
    left_out = {
        "source",                 # the same weights may come from another place
        "dtype",                  # the digest knows it
        "long", "max_seconds",    # which clips are refused, not what is heard in others
        *["sha256"] * any_weights,
    }
    return {name: value for name, value in description.items() if name not in left_out}


def own_copy(encoder: Any) -> Any:
    """A copy of an encoder without weights: the adapter's statistics must not reach others that use it."""
    return copy.deepcopy(encoder) if encoder_statistics(encoder) else encoder


def build_encoder(where: str, saved: Mapping[str, Any], beside: Path) -> AudioEncoder:
    """The encoder that a description names. A folder that is not where it was is looked for by its name in `beside`."""
    if saved["type"] not in ENCODERS:
        raise BadInput(where, f"an adapter trained with {saved['type']}", f"one of {', '.join(ENCODERS)}",
                       "pass the encoder itself: load_adapter(path, gpt, encoder=…)")
    name = saved.get("dtype", "float32")
    if name not in DTYPES:
        raise BadInput(where, f"an encoder in {name!r:.40}", f"one in {', '.join(DTYPES)}", "pass the encoder itself")
    settings = {name: saved[name] for name in SETTINGS.get(saved["type"], ()) if name in saved}
    source = saved["source"]
    if source and not source.startswith(("hf:", "ms:")) and not Path(source).is_dir():
        neighbour = beside / Path(source).name
        source = str(neighbour) if neighbour.is_dir() else source
    return ENCODERS[saved["type"]](source, DTYPES[name], settings)


def short_window(gpt: nn.Module) -> int | None:
    """Positions that the GPT's most short-sighted layer sees, from nanochat's `window_sizes` or the reference GPT's."""
    sizes = getattr(unwrap(gpt), "window_sizes", None) or getattr(unwrap(gpt), "windows", None)
    if not sizes:
        return None
    lefts = [size[0] if isinstance(size, (tuple, list)) else size for size in sizes]
    return min((left for left in lefts if left >= 0), default=None)


def parameters_of(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0


def lora_size(layers: Sequence[LoRALinear]) -> int:
    return sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers)


def group_size(group: Mapping[str, Any]) -> int:
    return sum(p.numel() for p in group["params"])
