"""Feature shards, read: what `extract` wrote, sample by sample, as one source to train on.

Notable:
- Nothing is trained on that the index does not vouch for: sha256 per shard, name, shape and dtype per sample.
- Numbers go to samples that have frames. What was skipped when it was written (T = 0) has none, and is listed apart.
- Memory is bounded by a batch. The form of the files is `shard_format`'s.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from torch import Tensor

from omni_adapters.data.clips import Batch, Kind
from omni_adapters.data.shard_format import (
    DTYPES,
    FORMAT_VERSION,
    INDEX_NAME,
    MALFORMED,
    Sample,
    Shard,
    index_values,
    num_shards,
    parse_shard,
    unpack,
)
from omni_adapters.features import pad_rows
from omni_adapters.files import hex_digest, json_bytes, json_object
from omni_adapters.shapes import BadInput, listing, shape


class ShardReader:
    """A finished folder of shards: its samples with T > 0 by number, in the manifest's order. A `ClipSource`.

    Number n is manifest row n only where nothing before it was skipped; a sample's key always holds its manifest row.

    verify=True checks every shard's sha256 now. Otherwise a shard is checked when it is first read, and again if its
    file changes after that; each worker of a `loader` does so for itself unless it was done before.

    config:   what the features were made from: description, d_model, frame_rate, sampling_rate, dtype, manifest_sha256, …
    lens:     (len(reader),) int64, frames per sample, all > 0; `config["num_samples"]` counts the skipped ones too.
    identity: the config, and a sha256 of the index, which holds that of every shard.

    Refused with `BadInput`: a folder without index.json or with a damaged one, shards that are missing, of another size
    or unknown to the index, or in which no sample has frames. The same, later, for a shard whose sha256 is not the index's.
    """

    kind: Kind = "audio_features"

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.config, self._shards, index_sha256 = _read_index(self.folder / INDEX_NAME)
        self.identity: dict[str, Any] = {**copy.deepcopy(self.config), "kind": self.kind, "index_sha256": index_sha256}
        samples = [(shard, sample) for shard in self._shards for sample in shard.samples]
        self._samples = [place for place in samples if place[1].T > 0]
        self._left_out = [place for place in samples if place[1].T == 0]
        self.lens: npt.NDArray[np.int64] = np.array([sample.T for _, sample in self._samples], dtype=np.int64)
        self._verified: dict[str, tuple[int, ...]] = {}  # shard → what identified its file when its sha256 was right
        self._check_files()
        if verify:
            for shard in self._shards:
                with self._open(shard):
                    pass
        if not self._samples:
            key, reason = self.skipped[0]
            raise BadInput("ShardReader", f"{self.folder}, where all {len(samples)} samples are skipped, {key} for {reason}",
                           "at least one sample with frames")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Sample `number`, in the manifest's order: values (T, d_model) in the stored dtype, and its manifest row."""
        shard, sample = self._samples[number]
        with self._open(shard) as file:
            file.seek(sample.offset)
            span = file.read(sample.bytes)
        try:
            row, tensors = unpack(sample.key, span)
            values = tensors["values"]
            fits = values.shape == (sample.T, self.config["d_model"]) and values.dtype == DTYPES[self.config["dtype"]]
        except (tarfile.TarError, SafetensorError, *MALFORMED) as error:
            raise self._refuse(shard, f"a sample {sample.key} that does not read ({error})") from error
        if len(tensors) != 1 or not fits:
            raise self._refuse(shard, f"a sample {sample.key} of {values.dtype} {shape(values.shape)}")
        return values, row

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of the samples without frames, which have no number: write_shards skipped them, or the encoder gave
        them none. Read from the shards each time."""
        if self.config.get("on_bad") != "skip":  # a key "skipped" is then the manifest's own
            return [(sample.key, "no frames") for _, sample in self._left_out]
        return [(sample.key, str(self._row(shard, sample).get("skipped", "no frames"))) for shard, sample in self._left_out]

    def row(self, number: int) -> dict[str, Any]:
        """The manifest row of sample `number`, as `read` gives it, without its values.

        Reads a few hundred bytes and no sha256, so that a run can look at all of its texts before it begins. What is trained
        on comes from `read`, which checks them.
        """
        return self._row(*self._samples[number])

    def _row(self, shard: Shard, sample: Sample) -> dict[str, Any]:
        name = f"{sample.key}.json"
        try:
            with open(self.folder / shard.name, "rb") as file:
                file.seek(sample.offset)
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
                if header.name != name or not header.isreg() or not 0 <= header.size <= sample.bytes:
                    raise ValueError(f"no {name} there")
                return json_object("ShardReader", name, file.read(header.size))
        except FileNotFoundError as error:
            raise self._refuse(shard, f"{self.folder / shard.name}, which is missing") from error
        except (tarfile.TarError, *MALFORMED) as error:
            raise self._refuse(shard, f"a sample {sample.key} that does not read ({error})") from error

    def load_batch(self, numbers: Sequence[int]) -> Batch:
        """The samples with these numbers, padded to the longest: Features (B, T, d_model), and B manifest rows."""
        samples = [self.read(number) for number in numbers]
        return pad_rows([values for values, _ in samples]), [row for _, row in samples]

    def _check_files(self) -> None:
        for shard in self._shards:
            path = self.folder / shard.name
            if not path.is_file():
                raise self._refuse(shard, f"{path}, which is missing")
            if path.stat().st_size != shard.bytes:
                raise self._refuse(shard, f"{path} of {path.stat().st_size} bytes")
        extra = {path.name for path in self.folder.glob("shard-*.tar")} - {shard.name for shard in self._shards}
        if extra:
            raise BadInput("ShardReader", f"{listing(sorted(extra))} in {self.folder}", f"the {len(self._shards)} shards of "
                           "its index.json", "move foreign shards to a folder of their own")

    def _open(self, shard: Shard) -> BinaryIO:
        """The shard's file, its sha256 checked unless that was done for this very file."""
        path = self.folder / shard.name
        try:
            file = open(path, "rb")  # noqa: SIM115, the caller closes it
        except FileNotFoundError as error:
            raise self._refuse(shard, f"{path}, which is missing") from error
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._verified.get(shard.name) != identity:
            found = hex_digest(file)
            if found != shard.sha256:
                file.close()
                raise self._refuse(shard, f"{path} with sha256 {found[:12]}…")
            self._verified[shard.name] = identity
        return file

    def _refuse(self, shard: Shard, came: str) -> BadInput:
        return BadInput("ShardReader", came, f"{shard.name} of {shard.bytes} bytes with sha256 {shard.sha256[:12]}…, as "
                        "index.json has it", "fetch it again, or run write_shards again, which rebuilds what is damaged")


def _read_index(path: Path) -> tuple[dict[str, Any], list[Shard], str]:
    """Its configuration, its shards, and a sha256 of both that spacing and key order do not change."""
    if not path.is_file():
        raise BadInput("ShardReader", f"{path.parent}, which has no index.json", "a finished folder of shards",
                       "run write_shards until all ranks are done; it writes the index last")
    try:
        content = json_object("ShardReader", str(path), path.read_bytes())
        config = dict(content["config"])
        version = config["version"]
        shards = _parse_shards(config, content["shards"]) if version == FORMAT_VERSION else []
        sha256 = hashlib.sha256(json_bytes(index_values(config, shards))).hexdigest()
    except MALFORMED as error:
        raise BadInput("ShardReader", f"{path}, which is damaged ({error!r})", "an index as write_shards writes it",
                       "run write_shards again") from error
    if version != FORMAT_VERSION:
        raise BadInput("ShardReader", f"{path} of format version {version!r}", f"version {FORMAT_VERSION}",
                       "read it with the release that wrote it")
    return config, shards, sha256


def _parse_shards(config: dict[str, Any], entries: Sequence[Any]) -> list[Shard]:
    if config["dtype"] not in DTYPES or not isinstance(config["d_model"], int) or not config["num_samples"] > 0:
        raise ValueError("configuration")
    if len(entries) != num_shards(config):
        raise ValueError("number of shards")
    return [parse_shard(config, number, entry) for number, entry in enumerate(entries)]
