"""Where an encoder's weights come from: a directory, Hugging Face or ModelScope, and one error when none has them.

Notable:
- candidates are tried in order, each from its hub's cache first, so a second load sends no request
- before a download, one request with a short timeout: a hub that accepts connections and never answers costs seconds,
  where the download clients would retry for minutes. A server that falls mute later meets the clients' own timeouts
- only safetensors, json and txt files are ever asked for: unpickling a checkpoint would run whatever code it carries
- the hubs' clients are imported when they are needed, and any failure of theirs becomes one line: their exceptions
  share no base class

A candidate is written `hf:owner/name` (Hugging Face, HF_ENDPOINT honoured), `ms:owner/name` (ModelScope,
MODELSCOPE_ENDPOINT honoured) or as the path of a directory. A plain `owner/name` that is no directory means Hugging
Face. With HF_HUB_OFFLINE=1 neither hub is contacted; a cached copy is used all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# fp32 twins (`model.fp32-00001-of-00002.safetensors`) and other frameworks' weights stay where they are.
WANTED_FILES = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PREFLIGHT_TIMEOUT = 5.0  # seconds for connecting, and again for the first byte


class Weights(NamedTuple):
    """directory holds the files; source is the candidate they came from, in the form that finds it again elsewhere:
    `hf:owner/name`, `ms:owner/name`, or a directory."""

    directory: Path
    source: str


class WeightsUnavailable(OSError):
    """No candidate had usable weights. `failures` has one line per candidate tried: which it was, and why not."""

    def __init__(self, where: str, failures: Sequence[str], todo: str = "") -> None:
        self.where, self.failures = where, list(failures)
        tried = "".join(f"\n  - {failure}" for failure in failures)
        self.todo = todo
        super().__init__(f"{where}: no weights. Tried{tried}\n{todo}".rstrip())

    def __reduce__(self) -> tuple[type[WeightsUnavailable], tuple[str, list[str], str]]:
        """Ranks and worker processes send their errors by pickle."""
        return WeightsUnavailable, (self.where, self.failures, self.todo)


def fetch_weights(where: str, candidates: Iterable[str | Path], required: Iterable[str] = ("config.json",),
                  todo: str = "") -> Weights:
    """The first candidate that holds the `required` files and safetensors weights, downloaded if need be.

    where:      the class that asks, for the error.
    candidates: see the head of this file.
    todo:       the ways out, appended to the error.

    Raises WeightsUnavailable. Files are not hashed here: ModelScope's client checks what it downloads, Hugging Face's
    checks sizes.
    """
    failures = []
    for candidate in candidates:
        label, source, load = _resolve(candidate)
        try:
            directory = load(required)
        except Exception as error:  # whatever a hub's client throws: the next candidate may do
            failures.append(f"{label}: {in_one_line(error)}")
        else:
            return Weights(directory, source)
    raise WeightsUnavailable(where, failures, todo)


def missing_files(directory: Path, required: Iterable[str]) -> list[str]:
    """The required files that are not there; the weights, whole or in shards, are always required."""
    missing = [name for name in required if not (directory / name).is_file()]
    return missing + [file.name for file in weight_files(directory) if not file.is_file()]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: one, or the shards its index lists. They need not exist."""
    index = directory / WEIGHTS_INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        return [directory / WEIGHTS]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(shards))]


def _resolve(candidate: str | Path) -> tuple[str, str, Callable[[Iterable[str]], Path]]:
    """What to call a candidate, `Weights.source`, and the function that brings its directory given the required files."""
    text = str(candidate)
    directory = Path(text).expanduser()
    if text.startswith("ms:"):
        return f"ModelScope {text[3:]}", text, lambda required: _from_hub(_modelscope, text[3:], required)
    if text.startswith("hf:"):
        return f"Hugging Face {text[3:]}", text, lambda required: _from_hub(_hugging_face, text[3:], required)
    if isinstance(candidate, str) and not directory.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        label = f"Hugging Face {text} (no such directory here)"
        return label, f"hf:{text}", lambda required: _from_hub(_hugging_face, text, required)
    return str(directory), str(directory), lambda required: _from_directory(directory, required)


def _from_directory(directory: Path, required: Iterable[str]) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError("no such directory")
    return _complete(directory, required)


def _from_hub(snapshot: Callable[[str, bool], str], name: str, required: Iterable[str]) -> Path:
    """The cached copy if it is whole, else a download. `snapshot(name, local_files_only)` is one hub's client."""
    from huggingface_hub import constants

    try:
        return _complete(Path(snapshot(name, True)), required)
    except Exception as error:  # not cached, or only in part
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(f"HF_HUB_OFFLINE is set and no whole copy is cached ({in_one_line(error)})") from error
    return _complete(Path(snapshot(name, False)), required)


def _complete(directory: Path, required: Iterable[str]) -> Path:
    missing = missing_files(directory, required)
    if missing:
        pickled = WEIGHTS in missing and any(directory.glob("pytorch_model*.bin"))
        raise FileNotFoundError(f"without {', '.join(missing)}" + " (pickled weights are not loaded)" * pickled)
    return directory


def _hugging_face(name: str, local_files_only: bool) -> str:
    from huggingface_hub import HfApi, snapshot_download

    if not local_files_only:
        api = HfApi()
        try:
            api.model_info(name, timeout=PREFLIGHT_TIMEOUT)
        except Exception as error:  # some of them do not say whom they asked
            raise ConnectionError(f"{api.endpoint}: {in_one_line(error)}") from error
    return snapshot_download(name, allow_patterns=WANTED_FILES, local_files_only=local_files_only,
                             etag_timeout=PREFLIGHT_TIMEOUT)


def _modelscope(name: str, local_files_only: bool) -> str:
    from modelscope.hub.api import HubApi
    from modelscope.hub.snapshot_download import snapshot_download

    if not local_files_only:
        import requests  # the transport of modelscope's own client

        # Any answer will do, a refusal included: the client reports those well. Silence it does not.
        requests.get(f"{HubApi().endpoint}/api/v1/models/{name}", timeout=PREFLIGHT_TIMEOUT, stream=True).close()
    return snapshot_download(name, allow_patterns=WANTED_FILES, local_files_only=local_files_only)


def in_one_line(error: BaseException) -> str:
    """An error in one line: its type, and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
