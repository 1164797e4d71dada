"""Manifests: JSON Lines, one clip a row, `{"audio": "a.wav", "text": "turn left", "seconds": 1.4}`.

Notable:
- Every refusal names the file and the line, so that a bad row among a million is found with one look.
- What `json` alone lets pass is refused: a key given twice in one row, NaN, Infinity, lone surrogates.
- Audio paths are absolute in memory and relative to the manifest's folder on disk: a data set can be moved whole.
- A file appears whole or not at all, and equal rows are written as equal bytes.
- A portable row tells its audio from the deepest folder that holds all of it: a data set keeps its sha256 when it moves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_adapters.shapes import BadInput, listing

_FIELDS: dict[str, tuple[type, ...]] = {"audio": (str,), "text": (str,), "seconds": (int, float)}


@dataclass(frozen=True)
class ManifestRow:
    """One clip: where its audio lies, what is said in it, how long it is, and whatever else the row carried.

    audio:      path of the file; absolute when it comes from `read_manifest`.
    text:       the transcript, may be empty.
    seconds:    duration, finite and ≥ 0.
    attributes: the row's other keys, any JSON values.
    """

    audio: str
    text: str
    seconds: float
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)


def read_manifest(path: str | os.PathLike[str]) -> list[ManifestRow]:
    """The rows of a manifest, relative audio paths joined to the manifest's folder. Blank lines are skipped.

    Refused with `BadInput`, naming the file and the line: a missing file, bytes that are not UTF-8, bad JSON, a row
    that is not an object, a missing or repeated key, a value of the wrong type, seconds that are negative or not
    finite, a file without rows.
    The audio files themselves are not looked at.
    """
    source = Path(path)
    if not source.is_file():
        raise BadInput("read_manifest", f"{source}, which is not a file", "a JSON Lines file")
    folder = source.absolute().parent
    rows = []
    for number, line in enumerate(source.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _parse("read_manifest", f"{source}, line {number}", line)
            rows.append(ManifestRow(str(folder / row.audio), row.text, row.seconds, row.attributes))
    if not rows:
        raise BadInput("read_manifest", f"{source}, which has no rows", "one JSON object per line")
    return rows


def write_manifest(path: str | os.PathLike[str], rows: Sequence[ManifestRow]) -> None:
    """Write the rows so that `read_manifest` returns them, audio paths made absolute.

    Audio inside the manifest's folder is stored relative to it, other audio by its absolute path; keys are sorted.
    Refused with `BadInput`, naming the row, before anything is written: no rows, what `read_manifest` would refuse,
    attributes named like the row's own keys, and attributes that JSON does not give back as they were (a tuple, say).
    """
    if not rows:
        raise BadInput("write_manifest", f"no rows for {path}", "at least one row")
    folder = Path(path).absolute().parent
    lines = [_line(f"row {number} for {path}", row, folder) for number, row in enumerate(rows)]
    write_whole("write_manifest", path, "".join(lines).encode())


def common_folder(where: str, rows: Sequence[ManifestRow]) -> str:
    """The deepest folder that holds all audio, against the working folder where paths are relative. No rows: `BadInput`."""
    if not len(rows):
        raise BadInput(where, "no manifest rows", "at least one")
    here = os.getcwd()
    return os.path.commonpath({os.path.dirname(os.path.join(here, row.audio)) for row in rows})


def portable_row(where: str, number: int, row: ManifestRow, folder: str) -> dict[str, Any]:
    """Row `number` (from 0) as JSON values, its audio path relative to `folder`. Refused as `row_values` does, by its line."""
    audio = Path(os.path.relpath(row.audio, folder)).as_posix()
    return row_values(f"{where}, {manifest_lines([number])}", "a row", row, audio)


def manifest_sha256(where: str, rows: Sequence[ManifestRow]) -> str:
    """Of the portable rows, a line each: spacing, key order and the place of the data set do not count, audio is not read."""
    folder, digest = common_folder(where, rows), hashlib.sha256()
    for number, row in enumerate(rows):
        digest.update(json_bytes(portable_row(where, number, row, folder)) + b"\n")
    return digest.hexdigest()


def manifest_lines(numbers: Sequence[int]) -> str:
    """How errors name rows, counted from 0: the lines of a manifest that has no blank ones, counted from 1."""
    return f"manifest line{'s' if len(numbers) > 1 else ''} {listing([number + 1 for number in numbers])}"


def row_values(where: str, what: str, row: ManifestRow, audio: str) -> dict[str, Any]:
    """The row as one dict of JSON values with this audio path; what JSON cannot give back as it was is refused."""
    taken = [key for key in _FIELDS if key in row.attributes]
    if taken:
        raise BadInput(where, f"{what} with attributes {listing(taken)}", "attributes of other names",
                       f"{listing(list(_FIELDS))} are fields of the row itself")
    try:
        seconds = float(row.seconds)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(where, f"{what}, where 'seconds' is {row.seconds!r:.40}", "a number for 'seconds'") from error
    return json_values(where, what, {**row.attributes, "audio": audio, "text": row.text, "seconds": seconds})


def json_values(where: str, what: str, values: dict[str, Any]) -> dict[str, Any]:
    """A copy that JSON gives back as it was, or a refusal: what is read must equal what was meant."""
    try:
        copy = json.loads(json_bytes(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(where, f"{what} with a value JSON cannot hold ({error})",
                       "text, finite numbers, lists and string-keyed dicts") from error
    if not isinstance(copy, dict) or copy != values:
        raise BadInput(where, f"{what} with values that JSON changes", "a dict of JSON values",
                       "turn tuples into lists and keys into strings")
    return copy


def json_bytes(values: Any) -> bytes:
    """Equal values → equal bytes: UTF-8, keys sorted, no spaces. NaN and infinity raise ValueError."""
    return json.dumps(values, ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def write_whole(where: str, path: str | os.PathLike[str], content: bytes) -> None:
    """Put `content` at `path` in one step: a reader, or a crash, sees the old file or the new one, never a part."""
    target = Path(path)
    if not target.parent.is_dir():
        raise BadInput(where, f"{target}, in a folder that does not exist", "a path in an existing folder",
                       f"create {target.parent} first")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")  # same folder: os.replace stays atomic
    try:
        with open(beside, "xb") as file:  # mode follows the umask; tempfile would leave 0600 behind
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _line(place: str, row: ManifestRow, folder: Path) -> str:
    values = row_values("write_manifest", place, row, _stored(row.audio, folder))
    line = json.dumps(values, ensure_ascii=False, sort_keys=True)
    _parse("write_manifest", place, line.encode())  # what `read_manifest` would refuse
    return line + "\n"


def _stored(audio: str, folder: Path) -> str:
    if not audio or not isinstance(audio, str):
        return audio  # `_parse` refuses it in its own words
    absolute = Path(audio).absolute()
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


def _parse(where: str, place: str, line: bytes) -> ManifestRow:
    """One line's row, its audio path as it stands in the file."""
    values = _object(where, place, line)
    for key, kinds in _FIELDS.items():
        if key not in values:
            raise BadInput(where, f"{place}, without {key!r}", f"the keys {listing(list(_FIELDS))}")
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise BadInput(where, f"{place}, where {key!r} is {values[key]!r}",
                           f"a {'string' if str in kinds else 'number'} for {key!r}")
    audio, text = values.pop("audio"), values.pop("text")
    if not audio or "\0" in audio:
        raise BadInput(where, f"{place}, where 'audio' is {audio!r}", "a path for 'audio'")
    return ManifestRow(audio, text, _seconds(where, place, values.pop("seconds")), values)


def _seconds(where: str, place: str, value: float) -> float:
    try:
        seconds = float(value)
    except OverflowError:  # an integer beyond 1.8e308
        seconds = math.inf
    if not (math.isfinite(seconds) and seconds >= 0):
        raise BadInput(where, f"{place}, where 'seconds' is {seconds}", "a finite duration ≥ 0")
    return seconds


def _object(where: str, place: str, line: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = [key for key in values if keys.count(key) > 1]
            raise BadInput(where, f"{place}, which gives {listing(twice)} more than once", "each key once")
        return values

    def constant(name: str) -> float:
        raise BadInput(where, f"{place}, which holds {name}", "finite numbers, as JSON has no others")

    try:
        values = json.loads(line.decode(), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(values, ensure_ascii=False).encode()  # "\ud800" is JSON, and no text
    except BadInput:
        raise
    except UnicodeError as error:
        raise BadInput(where, f"{place}, which is not UTF-8 ({error})", "UTF-8", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"{place}, which is not JSON ({error})", "one JSON object per line") from error
    if not isinstance(values, dict):
        raise BadInput(where, f"{place}, which is a {type(values).__name__}", "one JSON object per line")
    return values
