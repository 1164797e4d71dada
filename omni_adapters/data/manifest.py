"""Manifests: JSON Lines, one clip a row, `{"audio": "a.wav", "text": "turn left", "seconds": 1.4}`.

Notable:
- Every refusal names the file and the line, so that a bad row among a million is found with one look.
- Audio paths are absolute in memory and relative to the manifest's folder on disk: a data set can be moved whole.
- Equal rows are written as equal bytes; `files` holds what JSON is, and how a file appears whole or not at all.
- A portable row tells its audio from the deepest folder that holds all of it: a data set keeps its sha256 when it moves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_adapters.files import json_bytes, json_object, json_values, write_whole
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

    Refused with `BadInput`, naming the file and the line: a missing file, a row that `files.json_object` refuses, a missing
    key, a value of the wrong type, negative seconds, a file without rows.
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
    values = json_object(where, place, line)
    for key, kinds in _FIELDS.items():
        if key not in values:
            raise BadInput(where, f"{place}, without {key!r}", f"the keys {listing(list(_FIELDS))}")
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise BadInput(where, f"{place}, where {key!r} is {values[key]!r}",
                           f"a {'string' if str in kinds else 'number'} for {key!r}")
    audio, text = values.pop("audio"), values.pop("text")
    if not audio or "\0" in audio:
        raise BadInput(where, f"{place}, where 'audio' is {audio!r}", "a path for 'audio'")
    seconds = float(values.pop("seconds"))
    if seconds < 0:
        raise BadInput(where, f"{place}, where 'seconds' is {seconds}", "a finite duration ≥ 0")
    return ManifestRow(audio, text, seconds, values)
