"""The form of feature shards: what their writer (`extract`) and their reader (`shards`) share.

    shard-000000.tar     000000000.json           the manifest row: audio, text, seconds and its other keys
                         000000000.safetensors    "values" (T, d): one row, no padding
                         000000001.json …         in order of keys; mtime, uid and gid 0, mode 0644
    shard-000000.json    what the shard was made from, and its entry in the index; written after the tar
    index.json           the same for all shards; written last, so a folder that has one is complete

Notable:
- Row i lies in shard i // samples_per_shard under key i, in nine digits; webdataset reads the tars too.
- Tensors are safetensors, the rest is JSON; equal members give equal bytes.
- The `config` of a folder, JSON values in index and sidecars, holds all that decides its features.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from omni_adapters.files import json_object

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what reading JSON of another form raises
_MIB = 1 << 20


class Sample(NamedTuple):
    """One sample's place in its shard: `bytes` from `offset` on hold its two members, headers included."""

    key: str
    T: int       # feature frames
    offset: int  # bytes
    bytes: int


class Shard(NamedTuple):
    """A shard's entry in the index."""

    name: str
    sha256: str
    bytes: int
    samples: list[Sample]


class Member(NamedTuple):
    """What a tar holds of one sample: its manifest row as JSON, its T feature frames as safetensors."""

    key: str
    row: bytes
    T: int
    values: bytes


# --- names ------------------------------------------------------------------------------------------------------------

def sample_key(row: int) -> str:
    return f"{row:09d}"


def tar_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def sidecar_name(shard: int) -> str:
    return f"shard-{shard:06d}.json"


def num_shards(config: dict[str, Any]) -> int:
    return int(-(-config["num_samples"] // config["samples_per_shard"]))


def row_numbers(config: dict[str, Any], shard: int) -> range:
    """The manifest rows, counted from 0, that lie in a shard."""
    first = shard * config["samples_per_shard"]
    return range(first, min(first + config["samples_per_shard"], config["num_samples"]))


# --- entries of the index ---------------------------------------------------------------------------------------------

def index_values(config: dict[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """What index.json holds."""
    return {"config": config, "shards": [plain(shard) for shard in shards]}


def plain(shard: Shard) -> dict[str, Any]:
    """The entry as JSON values."""
    return {**shard._asdict(), "samples": [sample._asdict() for sample in shard.samples]}


def parse_shard(config: dict[str, Any], number: int, entry: Any) -> Shard:
    """Entry `number` as `json` gave it; one of MALFORMED unless it names the shard and the keys that belong there."""
    shard = Shard(**{**entry, "samples": [Sample(**sample) for sample in entry["samples"]]})
    sizes = [shard.bytes, *(size for sample in shard.samples for size in sample[1:])]
    if not all(type(size) is int and size >= 0 for size in sizes) or not isinstance(shard.sha256, str):
        raise ValueError(f"sizes of shard {number}")
    if shard.name != tar_name(number) or [sample.key for sample in shard.samples] != [
            sample_key(row) for row in row_numbers(config, number)]:
        raise ValueError(f"names in shard {number}")
    return shard


# --- bytes ------------------------------------------------------------------------------------------------------------

def pack(members: Sequence[Member]) -> tuple[bytes, list[Sample]]:
    """A shard's tar and where its samples lie. Equal members → equal bytes: every header field that could differ is fixed."""
    buffer, samples = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, row, steps, values in members:
            offset = buffer.tell()
            for name, content in zip(_member_names(key), (row, values)):
                header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 0644
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            samples.append(Sample(key, steps, offset, buffer.tell() - offset))
    return buffer.getvalue(), samples


def unpack(key: str, span: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A sample's bytes → its row and tensors. Headers are read too: an index that points elsewhere is noticed.

    Raises tarfile.TarError, SafetensorError or one of MALFORMED for other bytes.
    """
    with tarfile.open(fileobj=io.BytesIO(span)) as tar:
        contents = []
        for name in _member_names(key):
            member = tar.next()
            file = tar.extractfile(member) if member and member.name == name else None
            if file is None:
                raise ValueError(f"no {name} there")
            contents.append(file.read())
    return json_object("unpack", f"{key}.json", contents[0]), load_tensors(contents[1])


def _member_names(key: str) -> tuple[str, str]:
    return f"{key}.json", f"{key}.safetensors"
