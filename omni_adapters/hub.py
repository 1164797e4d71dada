"""Adapters on the Hugging Face Hub: one commit up, one file down, and a page that says what the file is.

Notable:
- a download is looked at before it is believed: the adapter's own sha256 is checked on every load, the cached copy's too.
  A copy that fails is fetched afresh once; the hub's client compares sizes only and keeps a flipped bit for ever
- every conversation has a deadline. The client has none: a server that accepts and never answers costs it minutes, one
  that drips costs it days. It talks in a thread that is left behind when time is up
- with the file cached, a branch or tag costs one HEAD, a commit nothing, HF_HUB_OFFLINE=1 nothing; a hub that is out of
  reach leaves the cached copy usable, with a warning
- what is uploaded is written first: an adapter that cannot be saved creates no repository
- the page (`model_card`) says what the description says. What is not known is left out; texts are shown, never obeyed

`huggingface_hub` is imported when it is needed.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omni_adapters.checkpoint import FORMAT, UNWRITABLE, load_adapter
from omni_adapters.encoders.weights import PREFLIGHT_TIMEOUT, WeightsUnavailable
from omni_adapters.shapes import BadInput, listing

ADAPTER = "adapter.safetensors"  # the file's name in a repository and in a folder
MAX_BYTES = 4 << 30  # as load_adapter's max_bytes
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
    _check_revision(where, revision)
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


def _check_revision(where: str, revision: object) -> None:
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
        load_adapter(file, max_bytes=MAX_BYTES)
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
    _check_revision(where, revision)
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
    answer: Future[T] = Future()

    def talk() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=talk, daemon=True, name="omni_adapters.hub").start()
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer.result()


def _status(error: BaseException) -> int | None:
    """The HTTP status of a refusal; None where nobody answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_silence(error: BaseException) -> bool:
    """Whether the hub said nothing about the file: out of reach, out of order, or too busy."""
    status = _status(error)
    return status is None or status >= 500 or status in (408, 429)


def _reason(error: BaseException) -> str:
    """An error in one line: its type, and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")


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
    if isinstance(error, EntryNotFoundError) and _status(error):
        return f"{repo_id} has no {ADAPTER} at {revision or 'main'}: was it made by OmniGPT.push_to_hub?"
    if not _is_silence(error):
        return (f"Check the spelling of {repo_id}. A private or gated repository needs a token that may read it: pass token=…, "
                "or do `hf auth login`.")
    return (f"Check the network, and HF_ENDPOINT (now {constants.ENDPOINT}). A file that came another way loads with "
            "OmniGPT.load_adapter(path, gpt).")


def _way_up(repo_id: str, error: Exception) -> str:
    from huggingface_hub import constants

    if _status(error) in (401, 403, 404):
        return f"Nothing was uploaded. Pass token=…, one that may write to {repo_id}, or do `hf auth login`."
    if not _is_silence(error) or isinstance(error, ValueError):
        return "Nothing was uploaded."
    return ("Check the network, and HF_ENDPOINT; set HF_HUB_DISABLE_XET=1 for a hub without xet storage. Whether the upload "
            f"arrived is not known: look at {constants.ENDPOINT}/{repo_id}, or push again, which changes nothing if it did.")


# The page

class Kind(NamedTuple):
    """What a key of `card` may hold: its name for an error, and the test."""

    name: str
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list | tuple) and all(map(_is_text, value)))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value)) and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    """A Python or numpy number: no bool, no NaN, no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Kind("a text", _is_text)
TEXTS = Kind("a text or a list of texts", _is_texts)
METRICS = Kind("a dict of finite numbers by name", _is_metrics)
IN_FRONT = ("license", "language", "datasets", "base_model")
KEYS = {"license": TEXT, "language": TEXTS, "datasets": TEXTS, "base_model": TEXTS, "metrics": METRICS, "notes": TEXT}


def model_card(repo_id: str, description: Mapping[str, Any], sizes: Mapping[str, Sequence[int]],
               card: Mapping[str, Any] | None = None, *, revision: str | None = None) -> str:
    """README.md for an adapter: front matter, how to load it, what it is.

    description: as in the adapter file (docs/adapter_format.md).
    sizes:       name → shape of each tensor of the file.
    card:        what only its author knows, each optional: `license` and `notes` (texts), `language`, `datasets`,
                 `base_model` (a text, or a list of them), `metrics` (name → finite number). Notes are plain text, shown as
                 written.

    Raises BadInput for other keys or types.
    """
    check_repo_id("model_card", repo_id)
    _check_revision("model_card", revision)
    given = _checked("model_card", card or {})
    metrics = [(_literal(name), _shown(value)) for name, value in given.get("metrics", {}).items()]
    told = [("What it is", _table(("", ""), list(_facts(description, sizes)))),
            ("Metrics", _table(("metric", "value"), metrics)),
            ("Notes", _paragraphs(given.get("notes", "")))]
    sections = "".join(f"\n## {title}\n\n{text}\n" for title, text in told if text)
    return f"""---
{_front_matter(given, bool(description.get("lora")))}
---

# {_literal(repo_id.split("/")[-1])}

An adapter that lets a GPT hear: features of a frozen audio encoder become soft tokens between the GPT's text tokens. It
holds what was trained, not the GPT and not the weights of the encoder. Made with `omni-adapters`.

## How to load it

{_loading(repo_id, description, revision)}
{sections}"""


def _checked(where: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is None or empty."""
    if unknown := [str(key) for key in card if key not in KEYS]:
        raise BadInput(where, f"card with {listing(unknown)!r:.100}", f"keys among {', '.join(KEYS)}")
    given = {key: value for key, value in card.items() if value is not None}
    for key, value in given.items():
        if not KEYS[key].accepts(value):
            raise BadInput(where, f"{key} = {value!r:.100}", KEYS[key].name)
    return {key: value for key, value in given.items() if value}


def _shown(number: Any) -> str:
    return f"{int(number)}" if isinstance(number, Integral) else f"{float(number):.6g}"


def _front_matter(given: Mapping[str, Any], lora: bool) -> str:
    from huggingface_hub import ModelCardData

    named = {key: value if isinstance(value, str) else list(value) for key, value in given.items() if key in IN_FRONT}
    tags = ["omni-adapters", "audio", "soft-tokens", *["lora"] * lora]
    data = ModelCardData(**named, library_name="omni-adapters", pipeline_tag="audio-text-to-text", tags=tags)
    return str(data.to_yaml(line_break="\n"))


def _loading(repo_id: str, description: Mapping[str, Any], revision: str | None) -> str:
    """A block that runs where `gpt` is the host, and `encoder` the encoder where nobody else could make it."""
    encoder, placeholders = description["encoder"], description.get("placeholders")
    makes_itself = encoder["type"] == "LogMelEncoder" or (
        encoder["type"] == "WhisperEncoder" and _public_name(encoder.get("source")) is not None)
    options = "" if revision in (None, "main") else f', revision="{revision}"'
    options += "" if makes_itself else ", encoder=encoder"
    theirs = "" if makes_itself else ", and `encoder` the encoder"
    before = max(1, description.get("insert_at", 0))  # sound needs that many tokens before it
    prompt = f"[{placeholders['audio']}]" if placeholders else "[0]" if before == 1 else f"[0] * {before}"
    stands = f"; {placeholders['audio']} stands for a clip" if placeholders else ""
    return f"""`gpt` is the GPT it was trained with{theirs}, loaded by you; any other is refused.

```python
import torch
from omni_adapters import OmniGPT

omni = OmniGPT.from_pretrained("{repo_id}", gpt{options}).eval()
prompt = {prompt}  # ids from the GPT's tokenizer{stands}
clip = torch.zeros(omni.encoder.sampling_rate)  # one second of silence; a recording is a 1-D float tensor at this rate
print(list(omni.generate(prompt, [clip], max_tokens=8)))
```"""


def _public_name(source: object) -> str | None:
    """`hf:owner/name` or `ms:owner/name`, where an encoder came from there. The path of a folder is nobody's business."""
    return str(source) if re.fullmatch(r"(hf|ms):\w[\w.-]*/\w[\w.-]*", str(source)) else None


def _facts(description: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    import torch

    from omni_adapters import __version__

    encoder, host, projector = (description.get(key) or {} for key in ("encoder", "host", "projector"))
    yield from _parts(sizes)
    source = _public_name(encoder.get("source"))
    yield "encoder", ", ".join(filter(None, [_literal(str(encoder.get("type"))), source and f"`{source}`", _digest(encoder)]))
    if encoder.get("frame_rate") and projector.get("stack"):
        rate, stack = encoder["frame_rate"], projector["stack"]
        yield "sound", f"{encoder['sampling_rate']} Hz; {rate:g} frames a second, {stack} to a soft token"
        yield "soft tokens per second", f"{rate / stack:g}"
    shown = [f"{key} {host[key]}" for key in ("n_embd", "vocab_size", "num_embeddings") if host.get(key) is not None]
    yield "GPT", ", ".join([_literal(text) for text in shown] + [text for text in [_digest(host)] if text])
    yield "LoRA", _lora(description.get("lora"))
    if "value_embeds" in description:
        yield "value embeddings at soft tokens", _literal(str(description["value_embeds"]))
    if description.get("placeholders"):
        yield "sound stands", f"at each id {description['placeholders']['audio']}"
    elif "insert_at" in description:
        yield "sound stands", f"before text position {description['insert_at']}"
    yield "versions", f"omni-adapters {__version__}, torch {torch.__version__}, adapter format {FORMAT}"


def _parts(sizes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """A row for each part of the adapter: how many tensors and values it has, and the shapes where they are few."""
    for part in dict.fromkeys(name.split(".")[0] for name in sizes):
        own = {name: list(shape) for name, shape in sizes.items() if name.split(".")[0] == part}
        count = sum(math.prod(shape) for shape in own.values())
        shapes = listing([f"{name.partition('.')[2]} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in own.items()], 4)
        kind = "stored" if part == "encoder" else "trained"  # an encoder without weights: its fitted statistics
        yield f"{kind}: {_literal(part)}", f"{count:,} values in {len(own)} tensors ({_literal(shapes)})"


def _digest(described: Mapping[str, Any]) -> str:
    return f"weights of sha256 `{described['sha256']}`" if described.get("sha256") else ""


def _lora(settings: Mapping[str, Any] | None) -> str:
    if not settings:
        return "none"
    shown = [f"{key} {settings[key]}" for key in ("rank", "alpha", "dropout", "rslora") if key in settings]
    return _literal(", ".join([*shown, f"{len(settings['paths'])} layers"] if "paths" in settings else shown))


# Markdown


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)]
    return "\n".join(lines) if rows else ""


def _paragraphs(text: str) -> str:
    text = "\n".join(_literal(line) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _literal(text: str) -> str:
    """One line of Markdown that shows `text` as it is written: nothing in it opens a block, a span, a link or a cell."""
    line = " ".join(UNWRITABLE.sub(" ", text).split())
    line = re.sub(r"[\\`*_\[\]<>|~&$]", r"\\\g<0>", line)
    return re.sub(r"^([#+=:-])|^(\d+)([.)])", lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", line)
