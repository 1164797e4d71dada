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
    """source: `hf:owner/name` or `ms:owner/name`, with `@revision` if one was asked for. revision: the commit where the
    hub said it, else the revision asked for. ok: False if the copy fails its check, True if every byte was hashed, None if
    only names and sizes were compared."""

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
    """$OMNI_ADAPTERS_CACHE, else omni_adapters/weights in $XDG_CACHE_HOME or ~/.cache. It need not exist."""
    said = os.environ.get("OMNI_ADAPTERS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni_adapters" / "weights"
    return Path(said).expanduser() if said else base


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
    surplus = {path.name for path in wanted_in(directory)} - {row["name"] for row in files}
    if surplus:
        raise Damaged(f"{directory / min(surplus)} was not fetched with the rest")
    for row in files:
        path = directory / row["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != row["size"]:
            raise Damaged(f"{path} is {'absent' if size is None else f'{size} bytes long'}, {row['size']} bytes were fetched")
        if verify and hash_file(path, hashlib.sha256()) != row["sha256"]:
            raise Damaged(f"{path}: its bytes have changed since they were fetched")


def read_manifest(directory: Path) -> dict[str, Any]:
    """source, endpoint, revision, files (rows of name, size, sha256); Damaged for everything that no fetch wrote."""
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            facts = json_object("weights", str(path), file.read(MAX_MANIFEST))
        own = facts.pop("sha256", None)
        whole = hashlib.sha256(json_bytes(facts)).hexdigest() == own
        fits = facts["format"] == FORMAT and all(is_wanted(row["name"]) for row in facts["files"])
    except (BadInput, OSError, KeyError, TypeError) as error:
        raise Damaged(f"{path} does not read ({error!s:.160})") from error
    if not (whole and fits):
        raise Damaged(f"{path} is not as it was written")
    return facts


def cached_copies(verify: bool = False) -> list[CachedCopy]:
    """The copies in this cache, by source. `verify` hashes every byte of them."""
    found = [_look(path.parent, verify) for hub in HUBS for path in cache_folder().glob(f"{hub}/*/[!.]*/{MANIFEST}")]
    return sorted(found)


def _look(directory: Path, verify: bool) -> CachedCopy:
    num_bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    try:
        facts = read_manifest(directory)
    except Damaged:
        return CachedCopy("", "", directory, num_bytes, False)
    try:
        check_files(directory, facts["files"], verify)
    except Damaged:
        return CachedCopy(facts["source"], facts["revision"], directory, num_bytes, False)
    return CachedCopy(facts["source"], facts["revision"], directory, num_bytes, True if verify else None)


# Making


@contextmanager
def turn(slot: Slot, headway: Callable[[], None], alone_after: float) -> Iterator[None]:
    """One process at a time fetches a source. `headway` is called whenever the other one's files have grown; when they have
    not for `alone_after` seconds, we go on beside the other."""
    slot.directory.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(slot.beside(f".{slot.directory.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        since, grown = time.monotonic(), _size(_partials(slot, "/*"))
        while lock(file) is False and time.monotonic() - since < alone_after:
            size = _size(_partials(slot, "/*"))
            if size > grown:
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
        folder = slot.beside(f".{slot.directory.name}.{os.urandom(4).hex()}.partial")
        folder.mkdir()
        with suppress(FileNotFoundError):  # a rival took it for an orphan before it was locked
            file = os.open(folder, os.O_RDONLY)
            lock(file)
            if folder.is_dir():
                return folder, file
            os.close(file)


def _size(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):  # moved into place meanwhile
            total += path.stat().st_size
    return total


def _partials(slot: Slot, inside: str = "") -> list[Path]:
    return list(slot.directory.parent.glob(f".{slot.directory.name}.{'[0-9a-f]' * 8}.partial{inside}"))


def finish(slot: Slot, folder: Path, endpoint: str, listing: Listing, hashes: dict[str, str]) -> None:
    """Write the manifest of a folder whose files are on the disk, and move it into place, over an older copy if there is one.

    A copy that a rival put there meanwhile and that is whole stays.
    """
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
    try:
        os.rename(folder, slot.directory)
    except OSError:
        if not slot.directory.is_dir():
            raise
        check_copy(slot)  # a rival's, whole
    sync_folder(slot.directory.parent)


def set_aside(slot: Slot) -> Path:
    """Move a bad copy out of the way, for whoever wants to know why; only the last one of a source is kept."""
    prefix = f".bad-{slot.directory.name}."
    for older in slot.directory.parent.glob(f"{prefix}{'[0-9a-f]' * 8}"):
        shutil.rmtree(older, ignore_errors=True)
    aside = slot.beside(prefix + os.urandom(4).hex())
    with suppress(FileNotFoundError):  # a rival was faster
        os.rename(slot.directory, aside)
    return aside


def remove_copy(slot: Slot) -> None:
    """Take a copy away that a fresh one is about to replace."""
    gone = slot.beside(f".{slot.directory.name}.{os.urandom(4).hex()}.partial")
    with suppress(FileNotFoundError):
        os.rename(slot.directory, gone)
    shutil.rmtree(gone, ignore_errors=True)
