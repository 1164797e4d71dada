"""Adapters on the Hugging Face Hub: one commit up, one file down.

Notable:
- a download is looked at before it is believed: the adapter's own sha256 is checked on every load, the cached copy's too.
  A copy that fails is fetched afresh once; the hub's client compares sizes only and keeps a flipped bit for ever
- every conversation has a deadline. The client has none: a server that accepts and never answers costs it minutes, one
  that drips costs it days. It talks in a thread that is left behind when time is up
- with the file cached, a branch or tag costs one HEAD, a commit nothing, HF_HUB_OFFLINE=1 nothing; a hub that is out of
  reach leaves the cached copy usable, with a warning
- what is uploaded is written first: an adapter that cannot be saved creates no repository

`huggingface_hub` is imported when it is needed.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TypeVar

from omni_adapters.background import in_thread
from omni_adapters.checkpoint import MAX_BYTES, load_adapter
from omni_adapters.encoders.weight_transfer import http_status, in_one_line, is_passing
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.shapes import BadInput, listing

ADAPTER = "adapter.safetensors"  # the file's name in a repository and in a folder
PREFLIGHT_TIMEOUT = 5.0  # seconds for connecting, and again for the first byte, where the client talks
PATIENCE = 30.0  # seconds that a transfer may take besides the bytes themselves
SLOWEST = 100_000  # bytes a second under which a transfer is given up

COMMIT = re.compile("[0-9a-f]{40}")
REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*")  # what git allows and a cache can hold as the name of a file

T = TypeVar("T")
StrPath = str | os.PathLike[str]
Token = str | bool | None


class UploadFailed(OSError):
    """The hub did not take the upload; the message says what answered, and what to do."""


# Down


def fetch_adapter(source: StrPath, *, revision: str | None = None, token: Token = None) -> Path:
    """Where the adapter lies on this machine: a file that `load_adapter` has read once, whole and undamaged.

    source:   a folder that holds adapter.safetensors, or `owner/name` on the Hub (HF_ENDPOINT honoured). What exists here
              as a path is a path.
    revision: a branch, a tag or a full commit sha; None is the branch main. Folders have none.
    token:    for a private repository; None takes the one that `hf auth login` or HF_TOKEN left, where there is one.

    Raises BadInput for what can be no source or revision and for a damaged file, WeightsUnavailable (an OSError) where the
    hub has it not, or not for us, or is out of reach and no copy is cached.
    """
    where = f"from_pretrained({str(source)!r:.200})"
    if isinstance(source, str | os.PathLike) and str(source) and os.path.exists(os.path.expanduser(source)):
        return _in_folder(where, Path(os.path.expanduser(source)), revision)
    repo_id = check_repo_id(where, source)
    check_revision(where, revision)
    cached = _cached(repo_id, revision)
    damage = _damage(cached) if cached else None
    whole = cached if damage is None else None
    if whole and (_is_offline() or COMMIT.fullmatch(revision or "")):
        return whole
    if _is_offline():
        raise _refusal_offline(where, damage)
    try:
        commit, size = _within(4 * PREFLIGHT_TIMEOUT, partial(_ask, repo_id, revision, token))
    except Exception as error:  # whatever the hub's client throws
        if whole is None or not _is_silence(error):
            raise _unavailable(where, repo_id, revision, error, damage) from error
        warnings.warn(f"{where}: {_reason(error)}. Using the cached copy of commit {whole.parent.name}", stacklevel=3)
        return whole
    if whole and whole.parent.name == commit:
        return whole
    if size > MAX_BYTES:
        raise BadInput(where, f"an {ADAPTER} of {size} bytes", f"at most {MAX_BYTES}", "is this an adapter?")
    return _download(where, repo_id, revision, token, size, damage)


def _in_folder(where: str, folder: Path, revision: str | None) -> Path:
    if not folder.is_dir():
        raise BadInput(where, "a file", "a folder, or owner/name on the Hub", "load a file with OmniGPT.load_adapter(path, gpt)")
    if revision is not None:
        raise BadInput(where, f"revision={revision!r:.80} with a folder that exists here", "no revision",
                       "leave it out, or run elsewhere if the Hub's repository of that name is meant")
    if not (folder / ADAPTER).is_file():
        held = listing(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise BadInput(where, f"a folder that holds {held}", ADAPTER, "name the folder it lies in, or another repository")
    return folder / ADAPTER


def check_repo_id(where: str, repo_id: object) -> str:
    """`owner/name` as the Hub allows it, or BadInput."""
    from huggingface_hub.utils import validate_repo_id

    try:
        if not isinstance(repo_id, str) or repo_id.count("/") != 1:
            raise ValueError("owner/name, two words with one slash")
        validate_repo_id(repo_id)
    except ValueError as error:
        raise BadInput(where, f"{str(repo_id)!r:.120}, no folder here and no repository on the Hub ({error!s:.200})",
                       "owner/name", "check the spelling") from None
    return repo_id


def check_revision(where: str, revision: object) -> None:
    if revision is not None and not (isinstance(revision, str) and REVISION.fullmatch(revision)):
        raise BadInput(where, f"revision {revision!r:.80}", "a branch, a tag, a full commit sha, or None for main")


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """The file as the hub's cache has it, in a folder named by its commit. No request."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, ADAPTER, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _damage(file: Path) -> BadInput | None:
    """What `load_adapter` has against the file."""
    try:
        load_adapter(file)
    except BadInput as refusal:
        return refusal
    return None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _refusal_offline(where: str, damage: BadInput | None) -> Exception:
    if damage is not None:
        return BadInput(where, f"a cached copy that is damaged: {damage.came}", damage.expected,
                        "unset HF_HUB_OFFLINE once, and it is downloaded afresh")
    return WeightsUnavailable(where, ["the Hub: HF_HUB_OFFLINE is set and no copy is cached"],
                              "Unset HF_HUB_OFFLINE, or load a file with OmniGPT.load_adapter(path, gpt).")


def _ask(repo_id: str, revision: str | None, token: Token) -> tuple[str, int]:
    """One HEAD: the commit that `revision` means now, and the adapter's size in bytes."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    found = get_hf_file_metadata(hf_hub_url(repo_id, ADAPTER, revision=revision), token=token, timeout=PREFLIGHT_TIMEOUT)
    if found.commit_hash is None:
        raise ConnectionError(f"{constants.ENDPOINT} answers, but not as a hub does")
    return found.commit_hash, found.size or 0


def _download(where: str, repo_id: str, revision: str | None, token: Token, size: int, damage: BadInput | None) -> Path:
    """The file, whole. The client may hand out what its cache holds, so a damaged file is asked for once more, by force."""
    from huggingface_hub import hf_hub_download

    for by_force in (False, True) if damage is None else (True,):
        call = partial(hf_hub_download, repo_id, ADAPTER, revision=revision, token=token, force_download=by_force,
                       etag_timeout=PREFLIGHT_TIMEOUT)
        try:
            file = Path(_within(PATIENCE + size / SLOWEST, call))
        except Exception as error:
            raise _unavailable(where, repo_id, revision, error, damage) from error
        damage = _damage(file)
        if damage is None:
            return file
    assert damage is not None
    raise BadInput(where, f"a damaged file, from the cache and from the Hub: {damage.came}", damage.expected,
                   "try again on another connection; if it stays so, it was uploaded so: have it pushed again") from damage


# Up


def publish(repo_id: str, write_adapter: Callable[[Path], object], card: str, *, private: bool = False, token: Token = None,
            message: str = "Upload adapter", revision: str | None = None) -> str:
    """Upload what `write_adapter` writes to the path it is given, and `card` as README.md, in one commit. Returns its URL.

    private:  a repository that has to be made is made private; one that is there and public is refused. False makes it as
              its owner's settings say: public, unless changed.
    revision: the branch to commit to, made from main if absent; None is main.

    Raises BadInput for arguments that cannot be, UploadFailed (an OSError) when the hub refuses or is silent. Nothing
    stays behind on this machine; a repository that was made for an upload that failed stays, without the adapter.
    """
    where = f"push_to_hub({repo_id!r:.120})"
    check_repo_id(where, repo_id)
    check_revision(where, revision)
    if revision is not None and COMMIT.fullmatch(revision):
        raise BadInput(where, "a commit as revision", "a branch", "commits do not change; push to a branch")
    if not isinstance(message, str) or not message.strip():
        raise BadInput(where, f"message {message!r:.80}", "a line for the commit")
    if _is_offline():
        raise UploadFailed(f"{where}: nothing was uploaded: HF_HUB_OFFLINE is set. Unset it.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ADAPTER
        write_adapter(file)
        upload = partial(_upload, where, repo_id, file, card, private, token, message, revision)
        try:
            exists = _within(4 * PREFLIGHT_TIMEOUT, partial(_exists, where, repo_id, private, token))
            return _within(PATIENCE + file.stat().st_size / SLOWEST, partial(upload, exists))
        except BadInput:
            raise
        except Exception as error:
            raise UploadFailed(f"{where}: {_reason(error)}. {_way_up(repo_id, error)}") from error


def _exists(where: str, repo_id: str, private: bool, token: Token) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = HfApi().model_info(repo_id, timeout=PREFLIGHT_TIMEOUT, token=token)
    except RepositoryNotFoundError:
        return False
    if private and found.private is False:
        raise BadInput(where, "private=True for a repository that is public", "one that is private, or none yet",
                       "make it private in its settings, or push without private=True")
    return True


def _upload(where: str, repo_id: str, file: Path, card: str, private: bool, token: Token, message: str,
            revision: str | None, exists: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    if not exists:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision not in (None, "main") and not str(revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    parts = [CommitOperationAdd(ADAPTER, str(file)), CommitOperationAdd("README.md", card.encode())]
    return str(api.create_commit(repo_id, parts, commit_message=message, revision=revision).commit_url)


# Talking


def _within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, or TimeoutError after so many seconds. The thread it runs in is then left to its own time limits."""
    answer = in_thread(call)
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()


def _is_silence(error: BaseException) -> bool:
    """Whether the hub said nothing about the file: out of reach, out of order, or too busy."""
    status = http_status(error)
    return status is None or is_passing(status)


def _reason(error: BaseException) -> str:
    """For the middle of a sentence."""
    return in_one_line(error).rstrip(": .")


def _unavailable(where: str, repo_id: str, revision: str | None, error: Exception, damage: BadInput | None) -> WeightsUnavailable:
    failures = [f"Hugging Face {repo_id}: {_reason(error)}"]
    if damage is not None:
        failures.insert(0, f"the cached copy: damaged, {damage.came}")
    return WeightsUnavailable(where, failures, _way_down(repo_id, revision, error))


def _way_down(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return f"revision takes a branch, a tag or a commit that {repo_id} has."
    if isinstance(error, EntryNotFoundError) and http_status(error):
        return f"{repo_id} has no {ADAPTER} at {revision or 'main'}: was it made by OmniGPT.push_to_hub?"
    if not _is_silence(error):
        return (f"Check the spelling of {repo_id}. A private or gated repository needs a token that may read it: pass token=…, "
                "or do `hf auth login`.")
    return (f"Check the network, and HF_ENDPOINT (now {constants.ENDPOINT}). A file that came another way loads with "
            "OmniGPT.load_adapter(path, gpt).")


def _way_up(repo_id: str, error: Exception) -> str:
    from huggingface_hub import constants

    if http_status(error) in (401, 403, 404):
        return f"Nothing was uploaded. Pass token=…, one that may write to {repo_id}, or do `hf auth login`."
    if not _is_silence(error) or isinstance(error, ValueError):
        return "Nothing was uploaded."
    return ("Check the network, and HF_ENDPOINT; set HF_HUB_DISABLE_XET=1 for a hub without xet storage. Whether the upload "
            f"arrived is not known: look at {constants.ENDPOINT}/{repo_id}, or push again, which changes nothing if it did.")
