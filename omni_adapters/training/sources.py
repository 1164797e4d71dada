"""Opening an encoder by name and training data by path: shards that were extracted, or a manifest of audio files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_adapters.data.clips import Batch, ClipSource, Kind, ManifestClips
from omni_adapters.data.epochs import evenly
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.descriptions import differences
from omni_adapters.encoders import conv
from omni_adapters.encoders.hf_speech import FAMILIES, HFSpeechEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.log_mel_pitch import LogMelPitchEncoder
from omni_adapters.encoders.pretrained import REQUIRED_FILES, WAYS_OUT, Layer, read_object
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.encoders.weights import fetch_weights
from omni_adapters.encoders.whisper import Context, WhisperEncoder
from omni_adapters.features import Features
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.shapes import BadInput, listing

WEIGHTLESS: dict[str, type[LogMelEncoder]] = {"log_mel": LogMelEncoder, "log_mel_pitch": LogMelPitchEncoder}


def open_encoder(name: str, device: torch.device | str = "cpu", context: Context = "full", layer: Layer = None) -> AudioEncoder:
    """`log_mel`, `log_mel_pitch`, or a checkpoint of Whisper, wav2vec2, HuBERT, WavLM, w2v-BERT 2.0 or a ConvEncoder, whichever
    its config.json says: a directory, an id, hf:id or ms:id.

    context: a Whisper's. Other encoders hear the clip alone in any case; BadInput for them with "clip".
    layer:   hidden states of an encoder with weights, as in WhisperEncoder and HFSpeechEncoder; BadInput for the others.
    """
    kind = name if name in WEIGHTLESS else model_type(name)
    if kind == "whisper":
        return WhisperEncoder(name, device=device, context=context, layer=layer)
    if context != "full":
        raise BadInput("open_encoder", f"{kind} with context {context!r}", "a Whisper", "leave --context out")
    if kind in FAMILIES:
        return HFSpeechEncoder(name, device=device, layer=layer)
    if layer is not None:
        raise BadInput("open_encoder", f"{kind} with layer {layer!r:.40}", "an encoder with layers", "leave --layer out")
    if kind == conv.MODEL_TYPE:
        return conv.ConvEncoder.load(name, device=device)
    return WEIGHTLESS[kind]().to(device)


def model_type(name: str) -> str:
    """What config.json calls the checkpoint; its files are fetched if need be, once for this and for the encoder, which is the
    one to hash them."""

    def read(verify: bool) -> tuple[Path, Any]:
        directory, _ = fetch_weights("WhisperEncoder, HFSpeechEncoder or ConvEncoder", [name], REQUIRED_FILES, WAYS_OUT,
                                     verify=verify)
        return directory, read_object("open_encoder", directory / "config.json").get("model_type")

    try:
        directory, found = read(verify=False)
    except BadInput:  # damaged: what is hashed is fetched again
        directory, found = read(verify=True)
    if found not in (known := ["whisper", *FAMILIES, conv.MODEL_TYPE]):
        raise BadInput("open_encoder", f"a checkpoint of type {found!r:.60} in {directory}",
                       f"model_type {', '.join(map(repr, known))}")
    return str(found)


def open_source(path: str | os.PathLike[str], encoder: AudioEncoder) -> ClipSource:
    """A folder of feature shards or a manifest (JSON Lines).

    Raises BadInput for shards that another encoder made: its features would be noise to this one's projector.
    """
    if not Path(path).is_dir():
        return ManifestClips(read_manifest(path), encoder)
    reader = ShardReader(path)
    changed = differences({"encoder": reader.config["description"]}, {"encoder": identity(encoder)})
    if changed:
        raise BadInput(f"open_source({os.fspath(path)})", f"shards of another encoder ({listing(changed, len(changed))})",
                       "shards of the encoder in use", "name the one they were extracted with as --encoder, with its --context "
                       "and --layer, or extract again")
    return MelShards(reader) if isinstance(encoder, LogMelEncoder) else reader


class MelShards:
    """Shards of log-mel frames as `omni-adapters extract` writes them, handed out as a LogMelEncoder's inputs.

    Its forward only normalises, by statistics of the data it is trained on: those belong to the adapter, not to the shards.
    """

    kind: Kind = "audio_inputs"

    def __init__(self, reader: ShardReader) -> None:
        self.reader, self.lens, self.identity = reader, reader.lens, reader.identity

    def __len__(self) -> int:
        return len(self.reader)

    def load_batch(self, numbers: Sequence[int]) -> Batch:
        """values (B, d_model, T_mel) float32, lens, and B manifest rows."""
        (values, lens), rows = self.reader.load_batch(numbers)
        return Features(values.float().transpose(1, 2), lens), rows

    def row(self, number: int) -> dict[str, Any]:
        return self.reader.row(number)


def fit_encoder(encoder: AudioEncoder, source: ClipSource, num_clips: int = 500) -> None:
    """Set a LogMelEncoder's mean and std per band from up to `num_clips` clips, spread evenly over the source; encoders with
    weights of their own stay as they are. The same clips give the same statistics on every rank and after a kill."""
    if isinstance(encoder, LogMelEncoder):
        encoder.fit_statistics(source.load_batch([number])[0] for number in evenly(len(source), num_clips))


def identity(encoder: AudioEncoder) -> dict[str, Any]:
    """What tells an encoder from others; where its weights came from does not count."""
    description = describe_encoder(encoder)
    description.pop("source")
    return description
