"""Files: JSON that means one thing to every reader, and files that are there whole or not at all.

Notable:
- one rule for JSON, in and out: what `json_object` reads, `json_values` lets pass. What `json` alone lets pass is refused: a
  key given twice, NaN, 1e999, halves of surrogate pairs, nesting without end
- one writer: values to the disk, then the name, then the folder. Whenever it stops, readers find the old file or the new one
- the temporary file, `.{name}.{8 hex digits}.saving`, is locked while its writer lives, so the next writer of that name
  can tell an orphan, which it removes, from a rival's work. The lock is the kernel's: it ends with the process, however
  that ends; on a file system without flock orphans stay

Writing needs POSIX (flock, fsync of a folder), reading does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from omni_adapters.shapes import BadInput

MAX_LEVELS = 32  # of nesting, the leaves among them
MAX_DIGITS = 32  # characters of a number; a float64 has at most 24, a 64-bit integer 20
CHUNK = 1 << 20  # bytes read, written, or values looked at, at once
UNFINISHED = ".saving"  # ends the name of a temporary file

SURROGATE = re.compile("[\ud800-\udfff]")  # one half of a pair is no character, and has no UTF-8
JSON_VALUE = ("a JSON value: dict with str keys, list, str without lone surrogates, bool, None, a finite float, "
              "an integer of 64 bits")


# JSON


def json_object(where: str, what: str, content: bytes, todo: str = "") -> dict[str, Any]:
    """The one JSON object that `content` is: UTF-8, each key once, and only what `json_values` lets pass.

    what: names the content in messages, "train.jsonl, line 3". todo: the way out, for messages.
    Raises BadInput for everything else, numbers of more than `MAX_DIGITS` characters and nesting beyond `MAX_LEVELS` too.
    """
    try:
        value = STRICT.decode(content.decode())
    except UnicodeError as error:
        raise BadInput(where, f"{what}, which is not UTF-8 ({error!s:.120})", "UTF-8", todo or "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(where, f"{what}, which is not JSON ({error!s:.120})",
                       f"JSON, each key once, finite numbers of up to {MAX_DIGITS} characters", todo) from None
    if not isinstance(value, dict):
        raise BadInput(where, f"{what}, which is a {type(value).__name__}", "a JSON object", todo)
    _check(where, what, value, False, todo)
    return value


def json_values(where: str, what: str, values: Mapping[str, Any], *, tuples: bool = False,
                todo: str = "make lists of tuples, and numbers of arrays and tensors") -> dict[str, Any]:
    """A copy of `values`, just what JSON gives back. What it would change or cannot hold is refused with BadInput, by its path.

    tuples: let tuples count as lists and any Mapping as a dict. Else only the outermost may be such a Mapping.
    """
    if not isinstance(values, Mapping):
        raise BadInput(where, f"{what} of type {type(values).__name__}", "a dict of JSON values")
    _check(where, what, dict(values), tuples, todo)
    copy: dict[str, Any] = json.loads(json.dumps(dict(values), default=dict))
    return copy


def json_bytes(values: Any, *, sort_keys: bool = True) -> bytes:
    """Equal values → equal bytes: UTF-8, keys sorted, no spaces. NaN and infinity raise ValueError."""
    return json.dumps(values, ensure_ascii=False, sort_keys=sort_keys, allow_nan=False, separators=(",", ":")).encode()


def _check(where: str, what: str, value: object, tuples: bool, todo: str) -> None:
    try:
        _check_value(value, "", MAX_LEVELS, tuples)
    except ValueError as error:
        raise BadInput(where, f"{what}, {error}", JSON_VALUE, todo) from None


def _check_value(value: object, path: str, levels: int, tuples: bool) -> None:
    """`path` is the way to the value, for the message; `levels` are left, the value's own among them."""
    if not levels:
        raise ValueError(f"nested deeper than {MAX_LEVELS} levels, or without end")
    if isinstance(value, dict) or (tuples and isinstance(value, Mapping)):
        for name, item in value.items():
            if not isinstance(name, str) or SURROGATE.search(name):
                raise ValueError(f"with the key {_brief(name)}{f' in {path!r:.200}' if path else ''}")
            _check_value(item, f"{path}.{name:.80}" if path else f"{name:.80}", levels - 1, tuples)
    elif isinstance(value, list) or (tuples and isinstance(value, tuple)):
        for number, item in enumerate(value):
            _check_value(item, f"{path}[{number}]", levels - 1, tuples)
    elif not _is_leaf(value):
        raise ValueError(f"where {path!r:.200} is {_brief(value)} ({type(value).__name__})")


def _is_leaf(value: object) -> bool:
    if isinstance(value, str):
        return SURROGATE.search(value) is None
    if isinstance(value, int):  # bool is one of them
        return -(2**63) <= value < 2**64
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _brief(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # an integer of more digits than Python prints, or an object that cannot
        return "something unprintable"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers disagree about which of two equal keys counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r:.80} twice")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def _short(digits: str) -> str:
    """Converting digits to an integer takes quadratic time."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters")
    return digits


STRICT = json.JSONDecoder(object_pairs_hook=_each_once, parse_constant=_no_constant,
                          parse_int=lambda digits: int(_short(digits)), parse_float=lambda digits: float(_short(digits)))


# Writing


def write_whole(where: str, path: str | os.PathLike[str], content: bytes, *, sweep: bool = True) -> None:
    """`write_parts` of one part. A folder that does not exist is a BadInput."""
    target = Path(path)
    if not target.parent.is_dir():
        raise BadInput(where, f"{target}, in a folder that does not exist", "a path in an existing folder",
                       f"create {target.parent} first")
    write_parts(target, [content], sweep=sweep)


def write_parts(target: Path, parts: Iterable[bytes | memoryview], *, sweep: bool = True) -> None:
    """Put the parts, one after the other, at `target` in one step; the mode is 0666 & ~umask.

    sweep: first remove what killed writers of this target left. It lists the folder, once a write: too slow for one of many
           thousand files that are all written like this.

    An OSError (disk full, no permission) passes through, and the old file is as it was, without a temporary file beside it;
    but when the fsync of the *folder* fails the new file is in place, whole, and might not outlast a power cut.
    """
    if sweep:
        _remove_orphans(target)  # first: they may be what fills the disk
    with _temporary_beside(target) as (temporary, file):
        for part in parts:
            write_all(file, part)
        os.fsync(file)  # the rename must not reach the disk before the values do
        os.replace(temporary, target)
    sync_folder(target.parent)


def write_all(file: int, content: bytes | memoryview) -> None:
    """`os.write` writes what it likes; this writes all, to an open file descriptor."""
    left = memoryview(content)
    while left:
        left = left[os.write(file, left[:CHUNK]):]


def sync_folder(folder: Path) -> None:
    """So that the names of files outlast a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[tuple[Path, int]]:
    """A new file, locked while it is open and gone when the block fails."""
    temporary, file = _create_locked(target)
    try:
        yield temporary, file
    except BaseException:  # an interrupt from the keyboard, too
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(file)


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}{UNFINISHED}")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the kernel takes the umask off
        _lock(file)
        if os.fstat(file).st_nlink:
            return temporary, file
        os.close(file)  # a rival took it for an orphan before it was locked


def _remove_orphans(target: Path) -> None:
    left_behind = re.compile(rf"{re.escape(f'.{target.name}.')}[0-9a-f]{{8}}{re.escape(UNFINISHED)}")
    for name in filter(left_behind.fullmatch, os.listdir(target.parent)):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            file = os.open(target.with_name(name), os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(file, wait=False):
                    target.with_name(name).unlink()
            finally:
                os.close(file)


def _lock(file: int, wait: bool = True) -> bool:
    """Whether the file is now ours; the lock ends with the descriptor."""
    import fcntl  # here: Windows has none, and can read

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or a file system without locks
        return False
    return True


# Bytes


def hex_digest(file: BinaryIO, digest: Any = None) -> str:
    """The hex digest of what is left of an open file, a piece at a time, added to `digest`, by default a new sha256."""
    digest = hashlib.sha256() if digest is None else digest
    while block := file.read(CHUNK):
        digest.update(block)
    return str(digest.hexdigest())
