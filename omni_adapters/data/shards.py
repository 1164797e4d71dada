"""Feature shards: a frozen encoder runs once, its features go into tar files, and training reads those.

    shard-000000.tar     000000000.json           the manifest row: audio, text, seconds and its other keys
                         000000000.safetensors    "values" (T, d): one row, no padding
                         000000001.json …         in order of keys; mtime, uid and gid 0, mode 0644
    shard-000000.json    what the shard was made from, and its entry in the index; written after the tar
    index.json           the same for all shards; written last, so a folder that has one is complete

Notable:
- Row i lies in shard i // samples_per_shard, and what shares its encoder batch is fixed by its shard: a run that was
  killed, or shared by several ranks, leaves the bytes of an undisturbed one. webdataset reads the tars too.
- Nothing is trained on that the index does not vouch for: sha256 per shard, name, shape and dtype per sample.
- An epoch's order follows from (seed, epoch) alone; all ranks get equally many batches, every sample exactly once.
- Tensors are safetensors, the rest is JSON. Memory is bounded by a shard when writing, by a batch when reading.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from omni_adapters.data.audio import load_audio
from omni_adapters.data.manifest import ManifestRow, write_whole
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.features import Features, check_form, check_values, pad_rows
from omni_adapters.shapes import BadInput, listing, shape

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_OWN_KEYS = ("audio", "text", "seconds")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what reading JSON of another form raises
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


# --- writing ----------------------------------------------------------------------------------------------------------

def write_shards(manifest_rows: Sequence[ManifestRow], encoder: AudioEncoder, out: str | os.PathLike[str], *,
                 description: dict[str, Any], samples_per_shard: int = 256, dtype: torch.dtype = torch.float16,
                 batch_seconds: float = 240.0, max_seconds: float = 600.0, rank: int = 0, num_ranks: int = 1,
                 progress: bool = True) -> Path:
    """Encode every row's audio and write the features to shards in folder `out`, which is created and returned.

    description:   JSON values that say which encoder this is, {"encoder": "log_mel"}; a change of it is refused later.
    dtype:         of the stored features: float16, bfloat16 or float32.
    batch_seconds: an encoder batch holds clips × the longest, as the manifest gives their seconds, up to this much; it
                   may change between runs, and features then agree as far as the encoder's rounding goes.
    max_seconds:   longest clip to decode.
    rank:          writes the shards s with s % num_ranks == rank; the last rank to finish writes index.json. The number
                   of ranks may change between runs.

    Run again, it skips shards that are finished and whole by their sha256, and rebuilds all others. Audio files are not
    hashed: give edited audio another folder. A dropout layer in the encoder must be in eval mode.

    Refused with `BadInput`: a folder begun with another manifest, description, encoder shape, dtype or
    samples_per_shard, before anything is written; audio that does not load and features that are not finite in `dtype`,
    by manifest line (that of a manifest without blank lines), before anything of that shard is written.
    """
    if not (isinstance(rank, int) and isinstance(num_ranks, int) and 0 <= rank < num_ranks):
        raise BadInput("write_shards", f"rank {rank} of {num_ranks}", "0 ≤ rank < num_ranks")
    config = _config(manifest_rows, encoder, description, samples_per_shard, dtype)
    if not (batch_seconds > 0 and max_seconds > 0):
        raise BadInput("write_shards", f"batch_seconds {batch_seconds} and max_seconds {max_seconds}", "positive numbers")
    writer = _Writer(manifest_rows, encoder, Path(out), config, batch_seconds, max_seconds, _common_folder(manifest_rows))
    writer.check_folder()
    own = range(rank, _num_shards(config), num_ranks)
    writer.sweep([*map(_tar_name, own), *map(_sidecar_name, own), *(["index.json"] if num_ranks == 1 else [])])
    for done, number in enumerate(own, start=1):
        began = time.monotonic()
        state = "already finished" if writer.finished(number) else writer.build(number)
        if progress:
            print(f"write_shards: {_tar_name(number)} ({done} of {len(own)} for rank {rank}): {state}, "
                  f"{time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    writer.write_index()
    return writer.out


@dataclass
class _Writer:
    rows: Sequence[ManifestRow]
    encoder: AudioEncoder
    out: Path
    config: dict[str, Any]
    batch_seconds: float
    max_seconds: float
    audio_folder: str

    def check_folder(self) -> None:
        """Make the folder; refuse one that holds anything made from something else."""
        if self.out.exists() and not self.out.is_dir():
            raise BadInput("write_shards", f"{self.out}, which is a file", "a folder to write to")
        self.out.mkdir(parents=True, exist_ok=True)
        for path in sorted([*self.out.glob("shard-*.json"), *self.out.glob("index.json")]):
            self.read_json(path)

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """A sidecar or the index; None where it is absent or damaged, refused where its configuration is another."""
        try:
            content = json.loads(path.read_bytes())
            theirs = dict(content["config"])
        except (FileNotFoundError, *_MALFORMED):
            return None
        fields = [name for name in {**self.config, **theirs} if self.config.get(name) != theirs.get(name)]
        if fields:
            raise BadInput("write_shards", _settings(fields, self.config), f"{_settings(fields, theirs)}, as {path} has it",
                           "choose another folder, or delete this one to start over")
        return dict(content)

    def sweep(self, names: Sequence[str]) -> None:
        """Remove what a killed run left half-written; only of own shards, as other ranks may be at work."""
        prefixes = tuple(f".{name}." for name in names)
        for path in self.out.glob(".*.tmp"):
            if path.name.startswith(prefixes):
                path.unlink(missing_ok=True)

    def entry(self, number: int) -> Shard | None:
        """What the sidecar says, if there is a tar of that size."""
        content = self.read_json(self.out / _sidecar_name(number))
        try:
            shard = _parse_shard(self.config, number, content["shard"]) if content else None
            return shard if shard and (self.out / shard.name).stat().st_size == shard.bytes else None
        except (FileNotFoundError, *_MALFORMED):
            return None

    def finished(self, number: int) -> bool:
        shard = self.entry(number)
        if shard is None:
            return False
        with open(self.out / shard.name, "rb") as file:
            return _sha256(file) == shard.sha256

    def build(self, number: int) -> str:
        """Encode and write one shard, the sidecar after the tar; returns a phrase for the progress line."""
        content, samples = _tar(self.members(number))
        shard = Shard(_tar_name(number), hashlib.sha256(content).hexdigest(), len(content), samples)
        write_whole("write_shards", self.out / shard.name, content)
        sidecar = _json({"config": self.config, "shard": _plain(shard)})
        write_whole("write_shards", self.out / _sidecar_name(number), sidecar)
        return f"{len(samples)} samples, {len(content) / 1e6:.1f} MB"

    def members(self, number: int) -> list[tuple[str, bytes, int, bytes]]:
        """(key, row as JSON, T, features as safetensors) of a shard's samples, in order of keys.

        Clips of similar length share an encoder batch; which ones depends on nothing outside the shard.
        """
        numbers = _row_numbers(self.config, number)
        # A floor of one second: a manifest that says 0 must not put a whole shard into one batch.
        costs = {row: max(self.rows[row].seconds, 1.0) for row in numbers}
        encoded: dict[int, tuple[int, bytes]] = {}
        for batch in _fill(sorted(numbers, key=lambda row: (costs[row], row)), costs, self.batch_seconds):
            encoded.update(zip(batch, self.encode(batch)))
        return [(_key(row), _row_json(row, self.rows[row], self.audio_folder), *encoded[row]) for row in numbers]

    def encode(self, batch: list[int]) -> list[tuple[int, bytes]]:
        """(T, safetensors) of the rows with these numbers, encoded together."""
        waveforms = [self.load(row) for row in batch]
        lines = listing([row + 1 for row in batch])
        try:
            with torch.no_grad():
                features = self.encoder(self.encoder.preprocess(waveforms))
            check_form("encoder", features, width=self.config["d_model"])
            lens = check_values("encoder", features)
        except BadInput as error:
            raise _at(f"manifest line{'s' if len(batch) > 1 else ''} {lines} as one batch", error) from error
        if len(lens) != len(batch):
            raise BadInput(f"write_shards, manifest lines {lines}", f"{len(lens)} rows of features", f"{len(batch)}",
                           "an encoder returns one row per clip")
        return [(steps, self.pack(row, values[:steps])) for row, values, steps in zip(batch, features.values, lens)]

    def load(self, row: int) -> npt.NDArray[np.float32]:
        try:
            return load_audio(self.rows[row].audio, self.encoder.sampling_rate, max_seconds=self.max_seconds)
        except BadInput as error:
            raise _at(f"manifest line {row + 1}", error) from error

    def pack(self, row: int, values: Tensor) -> bytes:
        """(T, d) → safetensors bytes in the chosen dtype."""
        stored = values.to("cpu", DTYPES[self.config["dtype"]]).contiguous()
        if not stored.isfinite().all():
            raise BadInput(f"write_shards, manifest line {row + 1}",
                           f"features up to {float(values.abs().max()):.4g}, infinite in {self.config['dtype']}",
                           "features that the stored dtype can hold", "write bfloat16 or float32")
        return save_tensors({"values": stored})

    def write_index(self) -> None:
        """Write index.json if every shard is there, of whatever rank. Ranks that end together write the same bytes."""
        shards = [self.entry(number) for number in range(_num_shards(self.config))]
        whole = [_plain(shard) for shard in shards if shard is not None]
        content, path = _json({"config": self.config, "shards": whole}), self.out / "index.json"
        if len(whole) == len(shards) and not (path.is_file() and path.read_bytes() == content):
            write_whole("write_shards", path, content)


def _config(rows: Sequence[ManifestRow], encoder: AudioEncoder, description: dict[str, Any], samples_per_shard: int,
            dtype: torch.dtype) -> dict[str, Any]:
    """All that decides the features, as JSON values: the folder belongs to it from its first shard on."""
    if not isinstance(encoder, AudioEncoder):
        raise BadInput("write_shards", f"an encoder of type {type(encoder).__name__}", "an AudioEncoder",
                       "it needs sampling_rate, d_model, frame_rate, preprocess and __call__")
    if not len(rows):
        raise BadInput("write_shards", "no manifest rows", "at least one")
    if isinstance(samples_per_shard, bool) or not isinstance(samples_per_shard, int) or samples_per_shard < 1:
        raise BadInput("write_shards", f"samples_per_shard {samples_per_shard!r}", "an integer ≥ 1")
    names = [name for name, one in DTYPES.items() if one == dtype]
    if not names:
        raise BadInput("write_shards", f"dtype {dtype}", listing(list(DTYPES)))
    return {"version": FORMAT_VERSION, "description": _json_values("write_shards", "a description", description),
            "d_model": int(encoder.d_model), "frame_rate": float(encoder.frame_rate),
            "sampling_rate": int(encoder.sampling_rate), "dtype": names[0], "samples_per_shard": samples_per_shard,
            "num_samples": len(rows), "manifest_sha256": _manifest_sha256(rows)}


def _manifest_sha256(rows: Sequence[ManifestRow]) -> str:
    """Of the rows as they stand in the shards: spacing, key order and the place of the data set do not count."""
    folder, digest = _common_folder(rows), hashlib.sha256()
    for number, row in enumerate(rows):
        digest.update(_row_json(number, row, folder) + b"\n")
    return digest.hexdigest()


def _common_folder(rows: Sequence[ManifestRow]) -> str:
    """The deepest folder that holds all audio; paths are told from there, so that a data set may move between runs."""
    here = os.getcwd()
    return os.path.commonpath({os.path.dirname(os.path.join(here, row.audio)) for row in rows})


def _row_json(number: int, row: ManifestRow, folder: str) -> bytes:
    """The row as its shard holds it, its audio path relative to `folder`."""
    where = f"write_shards, manifest line {number + 1}"
    taken = [key for key in _OWN_KEYS if key in row.attributes]
    if taken:
        raise BadInput(where, f"attributes {listing(taken)}", "attributes of other names", "those are the row's own fields")
    own = {"audio": Path(os.path.relpath(row.audio, folder)).as_posix(), "text": row.text, "seconds": float(row.seconds)}
    return _json(_json_values(where, "a row", {**row.attributes, **own}))


def _json_values(where: str, what: str, values: dict[str, Any]) -> dict[str, Any]:
    """A copy that JSON gives back as it was, or a refusal: what is read must equal what was meant."""
    try:
        copy = json.loads(_json(values))
    except _MALFORMED as error:
        raise BadInput(where, f"{what} that JSON cannot hold ({error})", "text, finite numbers, lists and dicts") from error
    if not isinstance(copy, dict) or copy != values:
        raise BadInput(where, f"{what} that JSON changes", "a dict of JSON values",
                       "turn tuples into lists and keys into strings")
    return copy


def _tar(members: Sequence[tuple[str, bytes, int, bytes]]) -> tuple[bytes, list[Sample]]:
    """Equal members → equal bytes: every header field that could differ is fixed."""
    buffer, samples = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, row, steps, values in members:
            offset = buffer.tell()
            for name, content in ((f"{key}.json", row), (f"{key}.safetensors", values)):
                header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 0644
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            samples.append(Sample(key, steps, offset, buffer.tell() - offset))
    return buffer.getvalue(), samples


def _at(place: str, error: BadInput) -> BadInput:
    return BadInput(f"write_shards, {place}, {error.where}", error.came, error.expected, error.todo)


def _settings(fields: Sequence[str], config: dict[str, Any]) -> str:
    return listing([f"{name} {config.get(name)!r}" for name in fields], most=len(fields))


# --- reading ----------------------------------------------------------------------------------------------------------

class ShardReader:
    """A finished folder of shards: samples by number, and epochs of batches.

    verify=True checks every shard's sha256 now. Otherwise a shard is checked when it is first read, and again if its
    file changes after that; each DataLoader worker does so for itself unless it was done before.

    config: what the features were made from: description, d_model, frame_rate, sampling_rate, dtype, manifest_sha256, …
    lens:   (num_samples,) int64, frames per sample; `len(reader)` is their number.

    Refused with `BadInput`: a folder without index.json or with a damaged one, shards that are missing, of another size
    or unknown to the index. The same, later, for a shard whose sha256 is not the index's.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.config, self._shards = _read_index(self.folder / "index.json")
        self._samples = [(shard, sample) for shard in self._shards for sample in shard.samples]
        self.lens = np.array([sample.T for _, sample in self._samples], dtype=np.int64)
        self._verified: dict[str, tuple[int, ...]] = {}  # shard → what identified its file when its sha256 was right
        self._check_files()
        if verify:
            for shard in self._shards:
                with self._open(shard):
                    pass

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Sample `number`, in the manifest's order: values (T, d_model) in the stored dtype, and its manifest row."""
        shard, sample = self._samples[number]
        with self._open(shard) as file:
            file.seek(sample.offset)
            span = file.read(sample.bytes)
        try:
            row, tensors = _unpack(sample.key, span)
            values = tensors["values"]
            fits = values.shape == (sample.T, self.config["d_model"]) and values.dtype == DTYPES[self.config["dtype"]]
        except (tarfile.TarError, SafetensorError, *_MALFORMED) as error:
            raise self._refuse(shard, f"a sample {sample.key} that does not read ({error})") from error
        if len(tensors) != 1 or not fits:
            raise self._refuse(shard, f"a sample {sample.key} of {values.dtype} {shape(values.shape)}")
        return values, row

    def batches(self, *, max_tokens: int, seed: int, epoch: int, rank: int = 0, num_ranks: int = 1,
                start: int = 0) -> Iterator[tuple[Features, list[dict[str, Any]]]]:
        """This rank's batches of an epoch from batch `start` on: Features (B, T, d_model), and B manifest rows.

        Which samples share a batch is `plan`'s matter. To resume, pass the seed, epoch, max_tokens and num_ranks of the
        run, and the number of batches that a rank has had.
        """
        plan = self.plan(max_tokens=max_tokens, seed=seed, epoch=epoch, rank=rank, num_ranks=num_ranks, start=start)
        return map(self.load_batch, plan)

    def load_batch(self, numbers: Sequence[int]) -> tuple[Features, list[dict[str, Any]]]:
        """The samples with these numbers, padded to the longest: Features (B, T, d_model), and B manifest rows."""
        samples = [self.read(number) for number in numbers]
        return pad_rows([values for values, _ in samples]), [row for _, row in samples]

    def plan(self, *, max_tokens: int, seed: int, epoch: int, rank: int = 0, num_ranks: int = 1,
             start: int = 0) -> list[list[int]]:
        """The sample numbers of each of this rank's batches, from batch `start` on; the same on every machine.

        B × the longest T is at most `max_tokens`, counted in feature frames; a longer sample is a batch of its own.
        Lengths in a batch differ by about 10 %, and batches of one step are of similar length over the ranks.

        Over all ranks every sample comes exactly once, and every rank gets equally many batches: where their number
        does not divide by `num_ranks`, the largest batches are halved until it does. Where no division of the samples
        can do that within max_tokens (fewer samples than ranks; or nearly all batches of one sample, in a number that
        does not divide) the call is refused, on all ranks and for every seed and epoch alike, so nothing waits forever.
        """
        _check_plan(max_tokens, seed, epoch, rank, num_ranks)
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))  # raw bits: numpy may change its shuffle, not these
        noise, costs = bits.random_raw(len(self)), np.maximum(self.lens, 1)  # a sample of no frames still takes a row
        batches = _fill(_roughly_by_length(costs, noise).tolist(), costs.tolist(), max_tokens)
        if _next_multiple(len(batches), num_ranks) > len(self):
            # Strict order of length gives the fewest batches there can be: what fails now fails in every epoch.
            batches = _fill(np.lexsort((noise, costs)).tolist(), costs.tolist(), max_tokens)
        batches = _even(batches, num_ranks)
        steps = np.argsort(bits.random_raw(len(batches) // num_ranks), kind="stable").tolist()
        if not 0 <= start <= len(steps):
            raise BadInput("ShardReader.plan", f"start = {start}", f"0 ≤ start ≤ {len(steps)}, the batches of this epoch")
        return [batches[step * num_ranks + rank] for step in steps[start:]]

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
            found = _sha256(file)
            if found != shard.sha256:
                file.close()
                raise self._refuse(shard, f"{path} with sha256 {found[:12]}…")
            self._verified[shard.name] = identity
        return file

    def _refuse(self, shard: Shard, came: str) -> BadInput:
        return BadInput("ShardReader", came, f"{shard.name} of {shard.bytes} bytes with sha256 {shard.sha256[:12]}…, as "
                        "index.json has it", "fetch it again, or run write_shards again, which rebuilds what is damaged")


class ShardDataset(IterableDataset[tuple[Features, list[dict[str, Any]]]]):
    """One epoch of `reader.batches(...)` for a DataLoader; its workers take turns, so the order stays that of `batches`.

        DataLoader(ShardDataset(reader, max_tokens=30_000, seed=1, epoch=3), batch_size=None, num_workers=4)

    Make a new one for each epoch. A reader opened with verify=True spares every worker its own check. Takes the
    arguments of `ShardReader.batches`; `len(dataset)` is the number of batches.
    """

    def __init__(self, reader: ShardReader, *, max_tokens: int, seed: int, epoch: int, rank: int = 0, num_ranks: int = 1,
                 start: int = 0) -> None:
        self.reader = reader
        self.plan = reader.plan(max_tokens=max_tokens, seed=seed, epoch=epoch, rank=rank, num_ranks=num_ranks, start=start)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[Features, list[dict[str, Any]]]]:
        worker = get_worker_info()  # the loader asks workers in turn: w, w + num_workers, … restores the order
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.reader.load_batch, self.plan[first::every])


def _read_index(path: Path) -> tuple[dict[str, Any], list[Shard]]:
    if not path.is_file():
        raise BadInput("ShardReader", f"{path.parent}, which has no index.json", "a finished folder of shards",
                       "run write_shards until all ranks are done; it writes the index last")
    try:
        content = json.loads(path.read_bytes())
        config = dict(content["config"])
        version = config["version"]
        shards = _parse_shards(config, content["shards"]) if version == FORMAT_VERSION else []
    except _MALFORMED as error:
        raise BadInput("ShardReader", f"{path}, which is damaged ({error!r})", "an index as write_shards writes it",
                       "run write_shards again") from error
    if version != FORMAT_VERSION:
        raise BadInput("ShardReader", f"{path} of format version {version!r}", f"version {FORMAT_VERSION}",
                       "read it with the release that wrote it")
    return config, shards


def _parse_shards(config: dict[str, Any], entries: Sequence[Any]) -> list[Shard]:
    if config["dtype"] not in DTYPES or not isinstance(config["d_model"], int) or not config["num_samples"] > 0:
        raise ValueError("configuration")
    if len(entries) != _num_shards(config):
        raise ValueError("number of shards")
    return [_parse_shard(config, number, entry) for number, entry in enumerate(entries)]


def _parse_shard(config: dict[str, Any], number: int, entry: Any) -> Shard:
    """Entry `number` as `json` gave it; one of _MALFORMED unless it names the shard and the keys that belong there."""
    shard = Shard(**{**entry, "samples": [Sample(**sample) for sample in entry["samples"]]})
    sizes = [shard.bytes, *(size for sample in shard.samples for size in sample[1:])]
    if not all(type(size) is int and size >= 0 for size in sizes) or not isinstance(shard.sha256, str):
        raise ValueError(f"sizes of shard {number}")
    if shard.name != _tar_name(number) or [sample.key for sample in shard.samples] != [
            _key(row) for row in _row_numbers(config, number)]:
        raise ValueError(f"names in shard {number}")
    return shard


def _unpack(key: str, span: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A sample's bytes → its row and tensors. Headers are read too: an index that points elsewhere is noticed."""
    with tarfile.open(fileobj=io.BytesIO(span)) as tar:
        contents = []
        for name in (f"{key}.json", f"{key}.safetensors"):
            member = tar.next()
            file = tar.extractfile(member) if member and member.name == name else None
            if file is None:
                raise ValueError(f"no {name} there")
            contents.append(file.read())
    return dict(json.loads(contents[0])), load_tensors(contents[1])


def _fill(order: Sequence[int], costs: Sequence[float] | dict[int, float], budget: float) -> list[list[int]]:
    """`order` cut into runs of at most `budget`, number × largest cost; what costs more than that stands alone."""
    batches: list[list[int]] = []
    largest = 0.0
    for item in order:
        largest = max(largest, costs[item])
        if batches and (len(batches[-1]) + 1) * largest <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
            largest = costs[item]
    return batches


def _even(batches: list[list[int]], num_ranks: int) -> list[list[int]]:
    """The batches, the largest of them halved until `num_ranks` divides their number; the halves stay neighbours."""
    num_samples = sum(map(len, batches))
    if _next_multiple(len(batches), num_ranks) > num_samples:
        raise BadInput("ShardReader.plan", f"{num_samples} samples in at least {len(batches)} batches for {num_ranks} ranks",
                       "equally many batches for every rank", f"raise max_tokens so that batches of two can be halved, or take "
                       f"a number of ranks that divides {num_samples}")
    heap, position = [], 0
    for batch in batches:
        heap.append((-len(batch), position, batch))  # equal sizes: the first one
        position += len(batch)
    heapq.heapify(heap)
    while len(heap) % num_ranks:
        _, position, batch = heapq.heappop(heap)
        half = len(batch) // 2
        heapq.heappush(heap, (-half, position, batch[:half]))
        heapq.heappush(heap, (half - len(batch), position + half, batch[half:]))
    return [batch for _, _, batch in sorted(heap, key=lambda entry: entry[1])]


def _roughly_by_length(lens: npt.NDArray[np.int64], noise: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """The order of lens × (1 + noise in [0, 0.1)): neighbours are of similar length, and others in every epoch.

    In integers, because rounding may differ between machines.
    """
    return np.lexsort((noise, (lens << 20) + (noise >> 44).astype(np.int64) * lens // 10))


def _check_plan(max_tokens: int, seed: int, epoch: int, rank: int, num_ranks: int) -> None:
    if not max_tokens >= 1:
        raise BadInput("ShardReader.plan", f"max_tokens {max_tokens}", "at least 1")
    if not (isinstance(seed, int) and isinstance(epoch, int) and seed >= 0 and epoch >= 0):
        raise BadInput("ShardReader.plan", f"seed {seed!r} and epoch {epoch!r}", "integers ≥ 0")
    if not (isinstance(rank, int) and isinstance(num_ranks, int) and 0 <= rank < num_ranks):
        raise BadInput("ShardReader.plan", f"rank {rank} of {num_ranks}", "0 ≤ rank < num_ranks")


# --- names and bytes --------------------------------------------------------------------------------------------------

def _key(row: int) -> str:
    return f"{row:09d}"


def _tar_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def _sidecar_name(shard: int) -> str:
    return f"shard-{shard:06d}.json"


def _num_shards(config: dict[str, Any]) -> int:
    return int(-(-config["num_samples"] // config["samples_per_shard"]))


def _row_numbers(config: dict[str, Any], shard: int) -> range:
    first = shard * config["samples_per_shard"]
    return range(first, min(first + config["samples_per_shard"], config["num_samples"]))


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _plain(shard: Shard) -> dict[str, Any]:
    return {**shard._asdict(), "samples": [sample._asdict() for sample in shard.samples]}


def _json(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_MIB):
        digest.update(block)
    return digest.hexdigest()
