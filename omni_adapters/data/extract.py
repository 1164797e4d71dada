"""Feature shards, written: a frozen encoder runs once over a manifest, its features go into tar files.

Notable:
- What shares an encoder batch is fixed by its shard: a run that was killed, or shared by several ranks, leaves the bytes
  of an undisturbed one.
- A shard is finished when its sidecar and its sha256 say so; index.json is written last, so a folder that has one is
  complete. The form of the files is `shard_format`'s.
- Bad clips are looked for before work is done (`preflight`). What only decoding or encoding shows can be skipped: stored
  without frames, beside the reason.
- Memory is bounded by a shard.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from omni_adapters.data.clips import at_lines, check_encoder, load_inputs
from omni_adapters.data.epochs import check_rank, fill
from omni_adapters.data.manifest import ManifestRow, common_folder, manifest_lines, manifest_sha256, portable_row
from omni_adapters.data.preflight import refuse_bad
from omni_adapters.data.shard_format import (
    DTYPES,
    FORMAT_VERSION,
    INDEX_NAME,
    MALFORMED,
    Member,
    Shard,
    index_values,
    num_shards,
    pack,
    parse_shard,
    plain,
    row_numbers,
    sample_key,
    sidecar_name,
    tar_name,
)
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.features import Features, check_form, check_values
from omni_adapters.files import UNFINISHED, hex_digest, json_bytes, json_object, json_values, write_whole
from omni_adapters.shapes import BadInput, listing


def write_shards(manifest_rows: Sequence[ManifestRow], encoder: AudioEncoder, out: str | os.PathLike[str], *,
                 description: dict[str, Any], samples_per_shard: int = 256, dtype: torch.dtype = torch.float16,
                 batch_seconds: float = 240.0, max_seconds: float = 600.0,
                 on_bad: Literal["refuse", "skip"] = "refuse", rank: int = 0, num_ranks: int = 1,
                 progress: bool = True) -> Path:
    """Encode every row's audio and write the features to shards in folder `out`, which is created and returned.

    description:   JSON values that say which encoder this is, {"encoder": "log_mel"}; a change of it is refused later.
    dtype:         of the stored features: float16, bfloat16 or float32.
    batch_seconds: an encoder batch holds clips × the longest, as the manifest gives their seconds, up to this much; it
                   may change between runs, and features then agree as far as the encoder's rounding goes.
    max_seconds:   longest clip to decode.
    on_bad:        "skip" stores a clip that cannot be decoded, that the encoder refuses, or whose features are not finite in
                   `dtype` without frames (T = 0), the reason under "skipped" in its row; the others of its batch are then
                   encoded alone. `ShardReader` numbers only what has frames. A folder begun with "refuse" goes on with
                   "skip", and keeps what is finished; there is no way back.
    rank:          writes the shards s with s % num_ranks == rank; the last rank to finish writes index.json. The number
                   of ranks may change between runs.

    Run again, it passes over shards that are finished and whole by their sha256, and rebuilds all others. Audio files are
    not hashed: give edited audio another folder. A dropout layer in the encoder must be in eval mode.

    Refused with `BadInput`: a folder begun with another manifest, description, encoder shape, dtype, samples_per_shard (or,
    when skipping, max_seconds), before anything is written. With "refuse", also before anything is written, all of this
    rank's unfinished clips that a look at their header shows to be bad, by manifest line (that of a manifest without blank
    lines): missing, unreadable, empty, cut short, longer than max_seconds or than the encoder takes. Then, before anything
    of their shard is written, clips that decoding or encoding shows to be bad.
    """
    check_rank("write_shards", rank, num_ranks)
    config = _config(manifest_rows, encoder, description, samples_per_shard, dtype)
    if not (batch_seconds > 0 and max_seconds > 0):
        raise BadInput("write_shards", f"batch_seconds {batch_seconds} and max_seconds {max_seconds}", "positive numbers")
    config |= _skip_config(manifest_rows, on_bad, max_seconds)
    audio_folder = common_folder("write_shards", manifest_rows)
    writer = _Writer(manifest_rows, encoder, Path(out), config, batch_seconds, max_seconds, audio_folder)
    writer.check_folder()
    own = range(rank, num_shards(config), num_ranks)
    writer.sweep([*map(tar_name, own), *map(sidecar_name, own), *([INDEX_NAME] if num_ranks == 1 else [])])
    say = _Progress(f"for rank {rank}", progress)
    todo = [number for number in own if not writer.finished(number)]
    if len(todo) < len(own):
        say(f"{len(own) - len(todo)} of {len(own)} shards already finished")
    if on_bad == "refuse":
        refuse_bad(manifest_rows, [row for number in todo for row in row_numbers(config, number)], encoder, max_seconds, say)
    writer.out.mkdir(parents=True, exist_ok=True)
    for done, number in enumerate(todo, start=1):
        say(f"{tar_name(number)} ({done} of {len(todo)}): {writer.build(number)}")
    writer.write_index()
    return writer.out


class _Progress:
    """A line on stderr for each step, with the seconds since the one before."""

    def __init__(self, who: str, wanted: bool) -> None:
        self.who, self.wanted, self.began = who, wanted, time.monotonic()

    def __call__(self, what: str) -> None:
        before, self.began = self.began, time.monotonic()
        if self.wanted:
            print(f"write_shards {self.who}: {what}, {self.began - before:.1f} s", file=sys.stderr, flush=True)


# --- writing -----------------------------------------------------------------------------------------------------------

class _Encoded(NamedTuple):
    """What a clip became: T frames as safetensors; why there are none, if it is skipped."""

    T: int
    values: bytes
    skipped: str = ""


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
        """Refuse a folder that holds anything made from something else."""
        if self.out.exists() and not self.out.is_dir():
            raise BadInput("write_shards", f"{self.out}, which is a file", "a folder to write to")
        for path in sorted([*self.out.glob("shard-*.json"), *self.out.glob(INDEX_NAME)]):
            self.read_json(path)

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """A sidecar or the index; None where it is absent or damaged, refused where its configuration is another.

        What was made without skipping has nothing to skip: a writer that skips takes it over.
        """
        try:
            content = json_object("write_shards", str(path), path.read_bytes())
            theirs = dict(content["config"])
        except (FileNotFoundError, *MALFORMED):
            return None
        fields = [name for name in {**self.config, **theirs} if self.config.get(name) != theirs.get(name)]
        taken_over = self.skips() and "on_bad" not in theirs and set(fields) <= {"on_bad", "max_seconds"}
        if fields and not taken_over:
            raise BadInput("write_shards", _settings(fields, self.config), f"{_settings(fields, theirs)}, as {path} has it",
                           "choose another folder, or delete this one to start over")
        return content

    def sweep(self, names: Sequence[str]) -> None:
        """Remove what a killed run left half-written; only of own shards, as other ranks may be at work."""
        prefixes = tuple(f".{name}." for name in names)
        for path in self.out.glob(".*"):
            if path.name.startswith(prefixes) and path.suffix in (UNFINISHED, ".tmp"):  # .tmp: of older writers
                path.unlink(missing_ok=True)

    def entry(self, number: int) -> Shard | None:
        """What the sidecar says, if there is a tar of that size."""
        content = self.read_json(self.out / sidecar_name(number))
        try:
            shard = parse_shard(self.config, number, content["shard"]) if content else None
            return shard if shard and (self.out / shard.name).stat().st_size == shard.bytes else None
        except (FileNotFoundError, *MALFORMED):
            return None

    def finished(self, number: int) -> bool:
        shard = self.entry(number)
        if shard is None:
            return False
        with open(self.out / shard.name, "rb") as file:
            whole = hex_digest(file) == shard.sha256
        if whole:
            self.write_sidecar(number, shard)  # one that was taken over still holds the configuration it was made with
        return whole

    def build(self, number: int) -> str:
        """Encode and write one shard, the sidecar after the tar; returns a phrase for the progress line."""
        content, samples = pack(self.members(number))
        shard = Shard(tar_name(number), hashlib.sha256(content).hexdigest(), len(content), samples)
        write_whole("write_shards", self.out / shard.name, content, sweep=False)  # `sweep` has done it, for all shards
        self.write_sidecar(number, shard)
        empty = sum(not sample.T for sample in samples)
        return f"{len(samples)} samples,{f' {empty} of them without frames,' if empty else ''} {len(content) / 1e6:.1f} MB"

    def write_sidecar(self, number: int, shard: Shard) -> None:
        content, path = json_bytes({"config": self.config, "shard": plain(shard)}), self.out / sidecar_name(number)
        if not (path.is_file() and path.read_bytes() == content):
            write_whole("write_shards", path, content, sweep=False)

    def members(self, number: int) -> list[Member]:
        """A shard's samples, in order of keys.

        Clips of similar length share an encoder batch; which ones depends on nothing outside the shard.
        """
        numbers = row_numbers(self.config, number)
        # A floor of one second: a manifest that says 0 must not put a whole shard into one batch.
        costs = {row: max(self.rows[row].seconds, 1.0) for row in numbers}
        encoded: dict[int, _Encoded] = {}
        for batch in fill(sorted(numbers, key=lambda row: (costs[row], row)), costs, self.batch_seconds):
            encoded.update(zip(batch, self.encode(batch)))
        return [Member(sample_key(row), self.row_json(row, skipped), steps, values)
                for row, (steps, values, skipped) in ((row, encoded[row]) for row in numbers)]

    def portable(self, row: int) -> dict[str, Any]:
        return portable_row("write_shards", row, self.rows[row], self.audio_folder)

    def row_json(self, row: int, skipped: str) -> bytes:
        return json_bytes(self.portable(row) | ({"skipped": skipped} if skipped else {}))

    def skips(self) -> bool:
        return self.config.get("on_bad") == "skip"

    def encode(self, batch: list[int]) -> list[_Encoded]:
        """The rows with these numbers, encoded together; an encoder that returns another form is refused in any case."""
        try:
            features = self.features(batch)
        except BadInput as error:
            return self.apart(batch, error)
        self.check(batch, features)
        try:
            lens = self.lens(batch, features)
            return [_Encoded(steps, self.stored(row, values[:steps])) for row, values, steps in zip(batch, features.values, lens)]
        except BadInput as error:
            return self.apart(batch, error)

    def apart(self, batch: list[int], error: BadInput) -> list[_Encoded]:
        """A batch that is refused for `error`, without those of its clips that are refused alone. What shares a batch is
        fixed, and so is what is refused: the bytes follow from the shard's rows."""
        if not self.skips():
            ways = [error.todo, 'go on with on_bad="skip" (--skip-bad), which keeps what is finished']
            raise BadInput(error.where, error.came, error.expected, "; or ".join(filter(None, ways))) from error
        if len(batch) > 1:
            return [one for row in batch for one in self.encode([row])]
        row, here = batch[0], self.portable(batch[0])["audio"]
        reason = f"{error.came}; expected {error.expected}"
        for there, name in ((repr(self.rows[row].audio), repr(here)), (self.rows[row].audio, here)):
            reason = reason.replace(there, name)  # soundfile tells the path: the place of a data set does not count
        nothing = torch.zeros(0, self.config["d_model"], dtype=DTYPES[self.config["dtype"]])
        return [_Encoded(0, save_tensors({"values": nothing}), reason)]

    def features(self, batch: list[int]) -> Features:
        inputs = load_inputs("write_shards", self.rows, batch, self.encoder, self.max_seconds)
        try:
            with torch.no_grad():
                return self.encoder(inputs)
        except BadInput as error:
            raise at_lines("write_shards", batch, error) from error

    def check(self, batch: list[int], features: Features) -> None:
        """Refuse features of another form than an encoder returns: no clip is to blame."""
        try:
            check_form("encoder", features, width=self.config["d_model"])
        except BadInput as error:
            raise at_lines("write_shards", batch, error) from error
        if len(features.lens) != len(batch):
            raise BadInput(f"write_shards, {manifest_lines(batch)}", f"{len(features.lens)} rows of features", f"{len(batch)}",
                           "an encoder returns one row per clip")

    def lens(self, batch: list[int], features: Features) -> list[int]:
        """The clips' frames T; NaN and infinity are refused."""
        try:
            return check_values("encoder", features)
        except BadInput as error:
            raise at_lines("write_shards", batch, error) from error

    def stored(self, row: int, values: Tensor) -> bytes:
        """(T, d) → safetensors bytes in the chosen dtype."""
        cast = values.to("cpu", DTYPES[self.config["dtype"]]).contiguous()
        if not cast.isfinite().all():
            raise BadInput(f"write_shards, {manifest_lines([row])}",
                           f"features up to {float(values.abs().max()):.4g}, infinite in {self.config['dtype']}",
                           "features that the stored dtype can hold", "write bfloat16 or float32")
        return save_tensors({"values": cast})

    def write_index(self) -> None:
        """Write index.json if every shard is there, of whatever rank. Ranks that end together write the same bytes."""
        shards = [self.entry(number) for number in range(num_shards(self.config))]
        whole = [shard for shard in shards if shard is not None]
        content, path = json_bytes(index_values(self.config, whole)), self.out / INDEX_NAME
        if len(whole) == len(shards) and not (path.is_file() and path.read_bytes() == content):
            write_whole("write_shards", path, content)


def _config(rows: Sequence[ManifestRow], encoder: AudioEncoder, description: dict[str, Any], samples_per_shard: int,
            dtype: torch.dtype) -> dict[str, Any]:
    """All that decides the features, as JSON values: the folder belongs to it from its first shard on."""
    check_encoder("write_shards", encoder)
    if isinstance(samples_per_shard, bool) or not isinstance(samples_per_shard, int) or samples_per_shard < 1:
        raise BadInput("write_shards", f"samples_per_shard {samples_per_shard!r}", "an integer ≥ 1")
    names = [name for name, one in DTYPES.items() if one == dtype]
    if not names:
        raise BadInput("write_shards", f"dtype {dtype}", listing(list(DTYPES)))
    return {"version": FORMAT_VERSION, "description": json_values("write_shards", "a description", description),
            "d_model": int(encoder.d_model), "frame_rate": float(encoder.frame_rate),
            "sampling_rate": int(encoder.sampling_rate), "dtype": names[0], "samples_per_shard": samples_per_shard,
            "num_samples": len(rows), "manifest_sha256": manifest_sha256("write_shards", rows)}


def _skip_config(rows: Sequence[ManifestRow], on_bad: str, max_seconds: float) -> dict[str, Any]:
    """What skipping adds to the configuration: nothing where nothing is skipped. max_seconds then decides what is; None is
    no limit."""
    if on_bad not in ("refuse", "skip"):
        raise BadInput("write_shards", f"on_bad {on_bad!r}", "'refuse' or 'skip'")
    if on_bad == "refuse":
        return {}
    taken = [number for number, row in enumerate(rows) if "skipped" in row.attributes]
    if taken:
        raise BadInput(f"write_shards, {manifest_lines(taken)}", "a key 'skipped' in the row", "rows without that key",
                       "it tells why a clip was skipped; rename it")
    return {"on_bad": on_bad, "max_seconds": float(max_seconds) if math.isfinite(max_seconds) else None}


def _settings(fields: Sequence[str], config: dict[str, Any]) -> str:
    return listing([f"{name} {config.get(name)!r}" for name in fields], most=len(fields))
