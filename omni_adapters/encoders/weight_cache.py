"""The package's own cache of weights: copies that are there whole or not at all, and are looked at before they are believed.

    $OMNI_ADAPTERS_CACHE/hf/openai--whisper-base/
        @default/               the default branch; a revision that was asked for has a folder of its own
            .copy.json          what the copy is of: names, sizes, sha256, commit
            config.json …
        .@default.lock              held by whoever fetches
        .@default.1f2e3d4c.partial/ being fetched, locked while its maker lives
        .bad-@default.5a6b7c8d/     a copy that failed its check, for whoever wants to know why

Notable:
- `.copy.json` is written last and carries a hash of itself; the folder is renamed into place when all is on the disk. A
  process that is killed leaves a `.partial` folder whose lock is free: the next fetch of that name removes it
- a copy is checked on every load: names, sizes, and sha256 of every byte (300 MB take about a quarter of a second)
- locks are the kernel's (flock): they end with the process, however it ends. Without flock (some network file systems)
  nothing breaks: several processes may fetch the same, the first one's copy stays, orphans stay as well
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from omni_adapters.encoders.weight_hubs import HUBS, Listing, hash_file, is_wanted, wanted_in
from omni_adapters.encoders.weight_transfer import Damaged
from omni_adapters.files import json_bytes, json_object, sync_folder, write_all
from omni_adapters.shapes import BadInput

MANIFEST = ".copy.json"
FORMAT = 1
MAX_MANIFEST = 4 << 20  # bytes
POLL = 0.05             # seconds between looks at what another process fetches


class CachedCopy(NamedTuple):
    """source: `hf:owner/name` or `ms:owner/name`, with `@revision` if one was asked for; where no manifest says so, the
    folder's path in the cache. revision: the commit where the hub said it, else the revision asked for. ok: False if the copy
    fails its check, True if every byte was hashed, None if only names and sizes were compared."""

    source: str
    revision: str
    directory: Path
    num_bytes: int
    ok: bool | None


class Slot(NamedTuple):
    """Where one source's copy belongs. `source` is `hf:owner/name` or `ms:owner/name`, `@revision` behind it or not."""

    source: str
    directory: Path

    def beside(self, name: str) -> Path:
        return self.directory.with_name(name)


def cache_folder() -> Path:
    """$OMNI_ADAPTERS_CACHE, else omni_adapters/weights in $XDG_CACHE_HOME or ~/.cache. It need not exist.

    FileNotFoundError where nothing says which folder `~` is.
    """
    said = os.environ.get("OMNI_ADAPTERS_CACHE")
    try:
        if said:
            return Path(said).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni_adapters" / "weights"
    except RuntimeError as error:  # no HOME, and a user without an entry, as in some containers
        raise FileNotFoundError("no home folder to cache weights in: set OMNI_ADAPTERS_CACHE to a folder") from error


def slot_of(hub: str, name: str, revision: str | None) -> Slot:
    """`revision` None is the default branch, whose folder bears a name that no revision has."""
    folder = cache_folder() / hub / name.replace("/", "--")
    return Slot(f"{hub}:{name}" + (f"@{revision}" if revision else ""), folder / (revision or "@default").replace("/", "@"))


# Looking


def check_copy(slot: Slot, verify: bool = True) -> None:
    """Damaged, with the reason, unless the copy is what its manifest says; with `verify` every byte is hashed."""
    facts = read_manifest(slot.directory)
    if facts["source"] != slot.source:
        raise Damaged(f"{slot.directory} holds {facts['source']!r:.120}, not {slot.source}")
    check_files(slot.directory, facts["files"], verify)


def check_files(directory: Path, files: list[dict[str, Any]], verify: bool) -> None:
    """Damaged unless the folder has these files and no other that a loader may read."""
    try:
        surplus = {path.name for path in wanted_in(directory)} - {row["name"] for row in files}
        if surplus:
            raise Damaged(f"{directory / min(surplus)} was not fetched with the rest")
        for row in files:
            _check_file(directory / row["name"], row["size"], row["sha256"] if verify else None)
    except Damaged:
        raise
    except OSError as error:  # a bad sector, no permission
        raise Damaged(f"{directory} cannot be read ({error!s:.160})") from error


def _check_file(path: Path, size: int, sha256: str | None) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise Damaged(f"{path} is {'absent' if found is None else f'{found} bytes long'}, {size} bytes were fetched")
    if sha256 and hash_file(path, hashlib.sha256()) != sha256:
        raise Damaged(f"{path}: its bytes have changed since they were fetched")


def read_manifest(directory: Path) -> dict[str, Any]:
    """source, endpoint, revision, files (rows of name, size, sha256); Damaged for everything that no fetch wrote."""
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            facts = json_object("weights", str(path), file.read(MAX_MANIFEST))
        own = facts.pop("sha256", None)
        whole = hashlib.sha256(json_bytes(facts)).hexdigest() == own
        texts = [facts["source"], facts["revision"], *(row["sha256"] for row in facts["files"])]
        fits = (facts["format"] == FORMAT and all(isinstance(text, str) for text in texts)
                and all(is_wanted(row["name"]) and row["size"] >= 0 for row in facts["files"]))
    except (BadInput, OSError, KeyError, TypeError) as error:
        raise Damaged(f"{path} does not read ({error!s:.160})") from error
    if not (whole and fits):
        raise Damaged(f"{path} is not as it was written")
    return facts


def cached_copies(verify: bool = False) -> list[CachedCopy]:
    """The copies in this cache, by source, damaged ones too. `verify` hashes every byte of them."""
    cache = cache_folder()
    return sorted(_look(cache, path, verify) for hub in HUBS for path in cache.glob(f"{hub}/*/[!.]*") if path.is_dir())


def _look(cache: Path, directory: Path, verify: bool) -> CachedCopy:
    num_bytes = _size(list(directory.glob("*")))
    try:
        facts = read_manifest(directory)
    except Damaged:
        return CachedCopy(str(directory.relative_to(cache)), "", directory, num_bytes, False)
    try:
        check_files(directory, facts["files"], verify)
    except Damaged:
        return CachedCopy(facts["source"], facts["revision"], directory, num_bytes, False)
    return CachedCopy(facts["source"], facts["revision"], directory, num_bytes, True if verify else None)


# Making


@contextmanager
def turn(slot: Slot, headway: Callable[[], None], alone_after: float) -> Iterator[None]:
    """One process at a time fetches a source. `headway` is called whenever the other one's files have changed; when they have
    not for `alone_after` seconds, we go on beside the other."""
    slot.directory.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(slot.beside(f".{slot.directory.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        since, grown = time.monotonic(), _size(_partials(slot, "/*"))
        while lock(file) is False and time.monotonic() - since < alone_after:
            size = _size(_partials(slot, "/*"))
            if size != grown:  # less, when orphans are removed or a file is sent again
                since, grown = time.monotonic(), size
                headway()
            time.sleep(POLL)
        yield
    finally:
        os.close(file)


def lock(file: int) -> bool | None:
    """Whether the open file is ours at once, None where there are no locks. It ends with the descriptor."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without
        return None
    return True


@contextmanager
def partial_folder(slot: Slot) -> Iterator[Path]:
    """A new folder beside the copy's place, locked; gone when the block ends, unless it was moved into place."""
    remove_orphans(slot)
    folder, file = _create_locked(slot)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


def remove_orphans(slot: Slot) -> None:
    """What killed processes left of this source."""
    for folder in _partials(slot):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            file = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if lock(file):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(file)


def _create_locked(slot: Slot) -> tuple[Path, int]:
    while True:
        folder = slot.beside(_new_partial(slot))
        folder.mkdir()
        with suppress(FileNotFoundError):  # a rival took it for an orphan before it was locked
            file = os.open(folder, os.O_RDONLY)
            if lock(file) is not False and folder.is_dir():
                return folder, file
            os.close(file)


def _size(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):  # moved or gone meanwhile
            total += path.stat().st_size
    return total


def _new_partial(slot: Slot) -> str:
    return f".{slot.directory.name}.{os.urandom(4).hex()}.partial"


def _partials(slot: Slot, inside: str = "") -> list[Path]:
    return list(slot.directory.parent.glob(f".{slot.directory.name}.{'[0-9a-f]' * 8}.partial{inside}"))


def finish(slot: Slot, folder: Path, endpoint: str, listing: Listing, hashes: dict[str, str], replace: bool) -> None:
    """See a folder's files to the disk, write its manifest, and move it into place, over an older copy with `replace`.

    Otherwise a copy that a rival put there meanwhile and that is whole stays. The disk's time is no hub's silence: this
    is not on the clock.
    """
    for path in folder.iterdir():
        with open(path, "rb") as fetched:
            os.fsync(fetched.fileno())
    files = [{"name": file.name, "size": file.size, "sha256": hashes[file.name]} for file in listing.files]
    facts = {"format": FORMAT, "source": slot.source, "endpoint": endpoint, "revision": listing.revision, "files": files}
    content = json_bytes({**facts, "sha256": hashlib.sha256(json_bytes(facts)).hexdigest()})
    file = os.open(folder / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    sync_folder(folder)
    _move_into_place(slot, folder, replace)
    sync_folder(slot.directory.parent)


def _move_into_place(slot: Slot, folder: Path, replace: bool) -> None:
    older = slot.beside(_new_partial(slot))
    if replace:
        with suppress(FileNotFoundError):
            os.rename(slot.directory, older)
    try:
        os.rename(folder, slot.directory)
    except OSError:
        if not slot.directory.is_dir():
            with suppress(OSError):
                os.rename(older, slot.directory)
            raise
        check_copy(slot)  # a rival's, whole
    finally:
        shutil.rmtree(older, ignore_errors=True)


def set_aside(slot: Slot) -> Path:
    """Move a bad copy out of the way, for whoever wants to know why; only the last one of a source is kept."""
    prefix = f".bad-{slot.directory.name}."
    for older in slot.directory.parent.glob(f"{prefix}{'[0-9a-f]' * 8}"):
        shutil.rmtree(older, ignore_errors=True)
    aside = slot.beside(prefix + os.urandom(4).hex())
    with suppress(FileNotFoundError):  # a rival was faster
        os.rename(slot.directory, aside)
    return aside
