"""Hugging Face and ModelScope: what they list, where their files lie, who we are to them, what their clients cached.

Notable:
- endpoints, tokens and offline mode are read when asked, so that a change of the environment counts at once
- Hugging Face is listed by its own client (`HfApi.model_info`), which takes a timeout and does not try again. ModelScope's
  REST API is asked directly: its client tries again for minutes and drops the hashes from what it lists
- a file without a hash in the listing is refused: nobody could tell whether it came as it was published
- copies in the clients' own caches are found by the clients, without a request, and checked as far as they allow: Hugging
  Face names each file by its hash, ModelScope leaves a safetensors header, which says how long the file is
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from omni_adapters.encoders.weight_transfer import Damaged, Line, Patience, Refused, RemoteFile, http_status, in_one_line
from omni_adapters.files import hex_digest

# fp32 twins (`model.fp32-00001-of-00002.safetensors`), other frameworks' weights, pickles and subfolders stay where they are.
WANTED_FILES = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
MAX_LISTING = 32 << 20  # bytes of a listing
MAX_FILES = 1000        # that are wanted; the manifest of so many fits what is read of it
CUT_OFF = 3000          # entries: ModelScope ends a listing there without a word, says modelscope_hub's constants.py
MODELSCOPE = "https://www.modelscope.cn"
TRUE = {"1", "ON", "YES", "TRUE"}
COMMIT = re.compile("[0-9a-f]{40}")


class Listing(NamedTuple):
    """The wanted files of a repository. `revision` is the commit where the hub says it, else the revision asked for;
    `others` are the names of all other files at the top."""

    files: list[RemoteFile]
    revision: str
    others: list[str]


class Hub(Protocol):
    """One hub. Names are `owner/name`; a revision is a branch, a tag or a commit, None the default branch."""

    label: str

    def endpoint(self) -> str: ...

    def identity(self) -> dict[str, str]:
        """Headers that say who the user is; for the endpoint's origin only."""

    def listing(self, line: Line, name: str, revision: str | None) -> Listing: ...

    def cached(self, name: str, revision: str | None) -> Path | None:
        """The folder that the hub's own client keeps, perhaps incomplete; None without one. Sends nothing."""

    def way_in(self, name: str) -> str:
        """What to do when the hub refuses (401, 403)."""


class HuggingFace:
    label = "Hugging Face"

    def endpoint(self) -> str:
        """Where the environment says nothing, what the client was set to when it was imported."""
        from huggingface_hub import constants

        return _url(os.environ.get("HF_ENDPOINT"), constants.ENDPOINT)

    def token(self) -> str | None:
        from huggingface_hub import constants, get_token

        return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    def identity(self) -> dict[str, str]:
        token = self.token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def listing(self, line: Line, name: str, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=line.endpoint).model_info(name, revision=revision, files_metadata=True,
                                                            timeout=line.patience.seconds, token=self.token() or False)
        except Exception as error:  # its exceptions share no base, and some do not say whom they asked
            kind = Refused if http_status(error) in (401, 403) else ConnectionError
            raise kind(f"{line.endpoint}: {in_one_line(error)}") from error
        if not COMMIT.fullmatch(info.sha or "") or (COMMIT.fullmatch(revision or "") and info.sha != revision):
            raise ConnectionError(f"{line.endpoint}: asked for {revision or 'its default branch'}, it names commit {info.sha}")
        rows = [(item.rfilename, item.lfs.size if item.lfs else item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                for item in info.siblings or []]
        return _listing(rows, info.sha, lambda file: f"{line.endpoint}/{name}/resolve/{info.sha}/{quote(file)}")

    def cached(self, name: str, revision: str | None) -> Path | None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED_FILES, local_files_only=True))
        except Exception:  # not there; or in part, which newer clients refuse
            return None

    def way_in(self, name: str) -> str:
        return (f"If it is gated or private: accept its terms at {self.endpoint()}/{name}, then set HF_TOKEN or do "
                "`hf auth login`")


class ModelScope:
    label = "ModelScope"

    def endpoint(self) -> str:
        return _url(os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN"), MODELSCOPE)

    def identity(self) -> dict[str, str]:
        """Both ways in which its client says it: the older routes read the cookie."""
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    def listing(self, line: Line, name: str, revision: str | None) -> Listing:
        revision = revision or "master"
        repo = f"{line.endpoint}/api/v1/models/{quote(name)}/repo"
        answer = line.read(f"{repo}/files?Revision={quote(revision, safe='')}&Recursive=False", MAX_LISTING)
        try:
            files = json.loads(answer)["Data"]["Files"]
            rows = [(str(item["Path"]), item["Size"], item.get("Sha256"), None) for item in files if item.get("Type") != "tree"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConnectionError(f"{line.endpoint}: no listing: {answer[:200].decode(errors='replace')}") from error
        if len(files) >= CUT_OFF:
            raise ConnectionError(f"{line.endpoint}: it lists {len(files)} entries, the most it sends, and perhaps not all")
        where = f"{repo}?Revision={quote(revision, safe='')}&FilePath="
        return _listing(rows, revision, lambda file: where + quote(file, safe=""))

    def cached(self, name: str, revision: str | None) -> Path | None:
        """Its client takes seconds to import: only where one of the places it uses exists."""
        base = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
        owner, _, short = name.partition("/")
        older = [base / folder / owner / short.replace(".", "___") for folder in ("models", "hub/models")]
        if not any(place.is_dir() for place in [base / "models" / name.replace("/", "--"), *older]):
            return None
        from modelscope.hub.snapshot_download import snapshot_download

        try:
            found = Path(snapshot_download(name, revision=revision or "master", local_files_only=True))
        except Exception:  # not there
            return None
        # Older layouts do not say which revision they hold; the client hands them out for any.
        return found if revision is None or (found.parent.name, found.name) == ("snapshots", revision) else None

    def way_in(self, name: str) -> str:
        return f"If it is gated or private: ask for access at {self.endpoint()}/models/{name}, then set MODELSCOPE_API_TOKEN"


HUBS: dict[str, Hub] = {"hf": HuggingFace(), "ms": ModelScope()}


def endpoints() -> dict[str, str]:
    """Hub → URL that weights are asked for at, as the environment says at this moment."""
    return {hub.label: hub.endpoint() for hub in HUBS.values()}


def is_offline() -> bool:
    """HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE), as Hugging Face reads it; it holds for both hubs. ModelScope has none."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in TRUE


def probe(url: str, timeout: float) -> str | None:
    """None if an HTTP server answers at `url` within `timeout` seconds, whatever it says; else why not, in one line."""
    patience = Patience(timeout)

    def ask() -> None:
        import requests

        requests.get(url, timeout=timeout, stream=True, allow_redirects=False, auth=lambda request: request).close()

    try:
        patience.wait_for(url, ask)
    except Exception as error:  # requests raises ValueError for a URL that is none
        return in_one_line(_first_cause(error))
    return None


def _first_cause(error: BaseException) -> BaseException:
    """What `requests` wraps three times: a name that does not resolve, a refused connection, a certificate."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def check_client_copy(directory: Path, verify: bool = True) -> None:
    """Damaged unless the wanted files of a client's copy are as long as their headers say and, with `verify`, what they are
    named after (Hugging Face)."""
    for path in (directory / name for name in wanted(path.name for path in wanted_in(directory))):
        check_safetensors_size(path)
        blob = os.path.basename(os.readlink(path)) if verify and path.is_symlink() else ""
        if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob) and _content_name(path, blob) != blob:
            raise Damaged(f"{path}: its bytes are not those it is named after; delete it")


def wanted_in(directory: Path) -> list[Path]:
    """The files at the top of a folder that a loader may read."""
    return sorted(path for path in directory.iterdir() if is_wanted(path.name) and path.is_file())


def wanted(names: Iterable[str]) -> list[str]:
    """Those of the names at the top of a repository that are fetched, sorted: no shards of what is there whole."""
    found = sorted(name for name in names if is_wanted(name))
    return [name for name in found if "model.safetensors" not in found or not fnmatchcase(name, "model-*.safetensors")]


def is_wanted(name: str) -> bool:
    """By a name that is one, at the top: no folders, no hidden files."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and any(fnmatchcase(name, pattern) for pattern in WANTED_FILES)


def check_safetensors_size(path: Path) -> None:
    """Damaged unless a safetensors file is as long as its header says; other files pass."""
    if path.suffix != ".safetensors":
        return
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100 << 20)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Damaged(f"{path}: no safetensors header ({in_one_line(error)})") from error
    size, expected = path.stat().st_size, 8 + length + max(ends, default=0)
    if size != expected:
        raise Damaged(f"{path}: {size} bytes, its header says {expected}")


def hash_file(path: Path, digest: Any) -> str:
    """The hex digest of a file's bytes, added to `digest`."""
    with open(path, "rb") as file:
        return hex_digest(file, digest)


def _content_name(path: Path, blob: str) -> str:
    """How Hugging Face names the content: by sha256 in large-file storage, else as git does."""
    if len(blob) == 64:
        return hash_file(path, hashlib.sha256())
    return hash_file(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def _url(said: str | None, default: str) -> str:
    """An endpoint from an environment variable, where "" means unset and a bare domain https."""
    url = (said or "").strip().rstrip("/") or default
    return url if "://" in url else f"https://{url}"


def _listing(rows: Iterable[tuple[str, Any, str | None, str | None]], revision: str, url: Callable[[str], str]) -> Listing:
    """rows: path, size, sha256, git sha1. url: file → where it lies."""
    known = {name: rest for name, *rest in rows if "/" not in name}
    names = wanted(known)
    if len(names) > MAX_FILES:
        raise Damaged(f"the listing has {len(names)} files to fetch, more than {MAX_FILES}")
    files = [RemoteFile(name, *_facts(name, *known[name]), url(name)) for name in names]
    return Listing(files, revision, sorted(known.keys() - {file.name for file in files}))


def _facts(name: str, size: Any, sha256: str | None, git_sha1: str | None) -> tuple[int, str | None, str | None]:
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Damaged(f"the listing gives {name} the size {size!r:.40}")
    if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256.lower()):
        return size, sha256.lower(), None
    if git_sha1 and COMMIT.fullmatch(git_sha1):
        return size, None, git_sha1
    raise Damaged(f"the listing gives {name} no hash")


