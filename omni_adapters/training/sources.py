"""Opening an encoder by name and training data by path: shards that were extracted, or a manifest of audio files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from omni_adapters.data.clips import ClipSource, ManifestClips
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.descriptions import check_same
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.model import describe_encoder


def open_encoder(name: str, device: torch.device | str = "cpu") -> AudioEncoder:
    """`log_mel`, or what WhisperEncoder takes: a directory, an id, hf:id or ms:id."""
    return LogMelEncoder().to(device) if name == "log_mel" else WhisperEncoder(name, device=device)


def open_source(path: str | os.PathLike[str], encoder: AudioEncoder) -> ClipSource:
    """A folder of feature shards or a manifest (JSON Lines).

    Raises BadInput for shards that another encoder made: its features would be noise to this one's projector.
    """
    if not Path(path).is_dir():
        return ManifestClips(read_manifest(path), encoder)
    reader = ShardReader(path)
    check_same(f"open_source({os.fspath(path)})", {"encoder": reader.config["description"]},
               {"encoder": identity(encoder)})
    return reader


def identity(encoder: AudioEncoder) -> dict[str, Any]:
    """What tells an encoder from others; where its weights came from does not count."""
    description = describe_encoder(encoder)
    description.pop("source")
    return description
