"""Where an encoder's weights come from: a directory, Hugging Face or ModelScope, and one error when none has them.

Notable:
- what is believed has been checked: every file of a download against the hub's listing (size, sha256), every load of a
  cached copy against what was downloaded. A copy that fails is set aside and fetched again
- what is cached is used without a request, whatever its hub holds by now; `refresh=True` asks again. If a later candidate
  had to stand in for one that failed, the same candidates lead to it again, without a request
- one deadline bounds all silence of a call: a hub that accepts and never answers costs its share of it, and the next one is
  asked. Bytes that arrive renew it, so that a slow line may take its time
- only safetensors, json and txt files are ever asked for: unpickling a checkpoint would run whatever code it carries

A candidate is written `hf:owner/name` (Hugging Face, HF_ENDPOINT honoured), `ms:owner/name` (ModelScope,
MODELSCOPE_ENDPOINT honoured) or as the path of a directory; `@revision` (branch, tag or commit) may follow a name. A plain
`owner/name` that is no directory means Hugging Face. With HF_HUB_OFFLINE=1 neither hub is contacted; a cached copy is used
all the same. docs/weights.md says it at length.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from omni_adapters.encoders.weight_cache import (
    CachedCopy,
    cache_folder,
    cached_copies,
    check_copy,
    finish,
    partial_folder,
    set_aside,
    slot_of,
    turn,
)
from omni_adapters.encoders.weight_hubs import HUBS, WANTED_FILES, Hub, Listing, check_client_copy, endpoints, is_offline, probe
from omni_adapters.encoders.weight_transfer import Damaged, Line, Patience, Refused, download, in_one_line
from omni_adapters.files import json_bytes, json_object, write_whole
from omni_adapters.shapes import BadInput

__all__ = ["WANTED_FILES", "CachedCopy", "Weights", "WeightsUnavailable", "cache_folder", "cached_copies",
           "endpoints", "fetch_weights", "in_one_line", "missing_files", "probe", "weight_files"]

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DEADLINE = 20.0          # seconds of silence in a call, all hubs together; $OMNI_ADAPTERS_DEADLINE
LONGEST = 1e6            # seconds: twice as many are the most that sockets can wait for
NAME, REVISION = r"\w[\w.-]*(?:/\w[\w.-]*)?", r"(?!.*\.\.)\w[\w./+-]*"


class Weights(NamedTuple):
    """directory holds the files; source is the candidate they came from, in the form that finds it again elsewhere:
    `hf:owner/name`, `ms:owner/name` (with `@revision` if one was asked for), or a directory."""

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


class Call(NamedTuple):
    """What one fetch asks for."""

    where: str
    required: tuple[str, ...]
    verify: bool
    refresh: bool


class Place(NamedTuple):
    """A candidate. `at_hand(call)` is its folder on this machine, checked, or an OSError that says why there is none;
    `fetch(call, patience)` downloads it, None for a directory."""

    label: str
    source: str
    at_hand: Callable[[Call], Path]
    fetch: Callable[[Call, Patience], Path] | None


def fetch_weights(where: str, candidates: Iterable[str | Path], required: Iterable[str] = ("config.json",), todo: str = "", *,
                  deadline: float | None = None, verify: bool = True, refresh: bool = False) -> Weights:
    """The first candidate that holds the `required` files and safetensors weights, downloaded if need be.

    where:      the class that asks, for the error.
    candidates: see the head of this file.
    todo:       the ways out, appended to the error.
    deadline:   seconds of silence that the hubs may cost, all together; each gets an equal share of what is left. None is
                $OMNI_ADAPTERS_DEADLINE, by default 20. Every 128 KiB and every finished file start a hub's share anew.
    verify:     hash every byte of a cached copy; False compares names and sizes only. Downloads are always hashed.
    refresh:    download again, and replace the cached copy if that succeeds.

    Raises WeightsUnavailable, and BadInput for a deadline that is none and for one str, whose characters would be candidates.
    """
    if isinstance(candidates, str) or isinstance(required, str):
        raise BadInput(where, f"{candidates if isinstance(candidates, str) else required!r:.80}, one str",
                       "candidates and required files as lists")
    call = Call(where, tuple(required), verify, refresh)
    places = [_place(candidate) for candidate in candidates]
    silence = _deadline(where, deadline)
    known = None if refresh else _recall(places)
    if known is not None:
        with suppress(Exception):  # gone or damaged: look again
            return Weights(known.at_hand(call), known.source)
    failures: list[str] = []
    for number, place in enumerate(places):
        patience = Patience(silence / max(1, sum(later.fetch is not None for later in places[number:])))
        try:
            directory = _bring(place, call, patience)
        except Exception as error:  # whatever a hub's client throws: the next candidate may do
            failures.append(f"{place.label}: {in_one_line(error)}" + (f". {error.todo}" if isinstance(error, Refused) else ""))
            silence -= patience.spent()
        else:
            _remember(places, number)
            return Weights(directory, place.source)
    raise WeightsUnavailable(where, failures, todo)


def missing_files(directory: Path, required: Iterable[str]) -> list[str]:
    """The required files that are not there; the weights, whole or in shards, are always required."""
    missing = [name for name in required if not (directory / name).is_file()]
    return missing + [file.name for file in weight_files(directory) if not file.is_file()]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: one, or the shards its index lists. They need not exist.

    Damaged for an index that lists none, or anything but safetensors files beside it, whose bytes nobody has checked.
    """
    index = directory / WEIGHTS_INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        return [directory / WEIGHTS]
    return [directory / name for name in _shards(index)]


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json_object("weights", str(index), index.read_bytes())["weight_map"].values()))
        strange = [name for name in names if os.path.basename(name) != name or not name.endswith(".safetensors")]
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{index} is no index of weights ({in_one_line(error)})") from error
    if strange or not names:
        raise Damaged(f"{index} lists {strange[0] if strange else ''!r:.120}, not safetensors files beside it")
    return names


# Places


def _place(candidate: str | Path) -> Place:
    text = str(candidate)
    directory = Path(os.path.expanduser(text))  # unlike Path's, leaves `~nobody` as it is
    key, prefixed, rest = text.partition(":")
    if prefixed and key in HUBS:
        return _hub_place(key, rest, f"{HUBS[key].label} {rest}")
    if isinstance(candidate, str) and re.fullmatch(f"{NAME}(@{REVISION})?", text) and not os.path.exists(directory):
        return _hub_place("hf", text, f"Hugging Face {text} (no such directory here)")
    return Place(str(directory), str(directory), lambda call: _directory(directory, call.required), None)


def _hub_place(key: str, text: str, label: str) -> Place:
    name, _, revision = text.partition("@")
    source = f"{key}:{text}"
    if not re.fullmatch(f"{NAME}(@{REVISION})?", text):
        def refuse(call: Call) -> Path:
            raise ValueError("not owner/name or owner/name@revision")
        return Place(label, source, refuse, None)
    return Place(label, source, partial(_at_hand, key, name, revision or None), partial(_fetch, key, name, revision or None))


def _bring(place: Place, call: Call, patience: Patience) -> Path:
    """The place's folder: the one at hand if it is good, else a fresh one."""
    if place.fetch is None or not call.refresh:
        try:
            return place.at_hand(call)
        except Exception as error:
            if place.fetch is None:
                raise
            if is_offline():
                raise FileNotFoundError(f"HF_HUB_OFFLINE is set and no whole copy is cached ({in_one_line(error)})") from error
    if is_offline():
        raise FileNotFoundError("HF_HUB_OFFLINE is set, and a refresh was asked for")
    return place.fetch(call, patience)


def _directory(directory: Path, required: Iterable[str]) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError("no such directory")
    return _complete(directory, required)


def _complete(directory: Path, required: Iterable[str]) -> Path:
    missing = missing_files(directory, required)
    if missing:
        raise _incomplete(missing, [path.name for path in directory.glob("pytorch_model*.bin")])
    return directory


def _incomplete(missing: Iterable[str], others: Iterable[str]) -> FileNotFoundError:
    missing = list(missing)
    pickled = WEIGHTS in missing and any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in others)
    return FileNotFoundError(f"without {', '.join(missing)}" + " (pickled weights are not loaded)" * pickled)


# Hubs


def _at_hand(key: str, name: str, revision: str | None, call: Call) -> Path:
    """The copy in our own cache, else the one in the cache of the hub's client, after a look at it."""
    slot = slot_of(key, name, revision)
    failure: OSError = FileNotFoundError("none here")
    if slot.directory.is_dir():
        try:
            check_copy(slot, call.verify)
            return _complete(slot.directory, call.required)
        except OSError as error:
            failure = error
    client_copy = HUBS[key].cached(name, revision)
    if client_copy is None:
        raise failure
    _complete(client_copy, call.required)
    check_client_copy(client_copy, call.verify)
    return client_copy


def _fetch(key: str, name: str, revision: str | None, call: Call, patience: Patience) -> Path:
    """Download into a folder beside the slot and move it there; while another process does the same, wait for that."""
    hub, slot = HUBS[key], slot_of(key, name, revision)
    endpoint = hub.endpoint()
    line = Line(endpoint, hub.identity(), patience)  # imports the clients, before the clock runs
    patience.renew()
    with turn(slot, patience.renew, patience.seconds / 2):
        if slot.directory.is_dir() and not call.refresh:
            try:
                check_copy(slot, call.verify)
                return _complete(slot.directory, call.required)
            except Damaged as damage:
                warnings.warn(f"{call.where}: {damage}. It is set aside as {set_aside(slot)} and fetched again", stacklevel=5)
            except FileNotFoundError:  # whole, but it lacks what this call requires: the hub may have it by now
                pass
            patience.renew()
        with partial_folder(slot) as folder:
            try:
                listing, hashes = patience.wait_for(endpoint, lambda: _download(hub, line, name, revision, call, folder))
            except Refused as refused:
                refused.todo = hub.way_in(name)
                raise
            replace = slot.directory.is_dir() and (call.refresh or bool(missing_files(slot.directory, call.required)))
            finish(slot, folder, endpoint, listing, hashes, replace)
    return slot.directory


def _download(hub: Hub, line: Line, name: str, revision: str | None, call: Call, folder: Path) -> tuple[Listing, dict[str, str]]:
    """What the hub lists, and file → sha256 of what is in the folder. Small files first: a hub that refuses does so soon."""
    listing = hub.listing(line, name, revision)
    line.patience.renew()
    names = {file.name for file in listing.files}
    missing = [file for file in call.required if file not in names]
    if missing or not names & {WEIGHTS, WEIGHTS_INDEX}:
        raise _incomplete(missing + [WEIGHTS] * (not names & {WEIGHTS, WEIGHTS_INDEX}), listing.others)
    hashes = {file.name: download(line, file, folder / file.name) for file in sorted(listing.files, key=lambda file: file.size)}
    _complete(folder, call.required)
    return listing, hashes


# What a call says, and what the last one found


def _deadline(where: str, seconds: float | None) -> float:
    said: object = os.environ.get("OMNI_ADAPTERS_DEADLINE") or DEADLINE if seconds is None else seconds
    with suppress(ValueError):
        found = float(str(said))
        if math.isfinite(found) and found > 0:
            return min(found, LONGEST)
    raise BadInput(where, f"a deadline of {said!r:.80}", "seconds above 0",
                   "pass deadline=… or set OMNI_ADAPTERS_DEADLINE" if seconds is None else "")


def _memory(places: Sequence[Place]) -> Path:
    """The file that says which of these places, in this order, had the weights when an earlier one failed."""
    sources = b"\0".join(os.fsencode(place.source) for place in places)
    return cache_folder() / "stand_ins" / f"{hashlib.sha256(sources).hexdigest()}.json"


def _recall(places: Sequence[Place]) -> Place | None:
    try:
        source = json_object("weights", "stand-in", _memory(places).read_bytes()).get("source")
    except (OSError, BadInput):
        return None
    return next((place for place in places if place.source == source), None)


def _remember(places: Sequence[Place], number: int) -> None:
    """Without it, a hub that is out of reach would be asked again on every load. A cache that is read-only forgets."""
    with suppress(OSError, UnicodeEncodeError):  # a path need not be text
        memory = _memory(places)
        if is_offline():  # says nothing about the hubs
            return
        if not any(place.fetch for place in places[:number]):
            return memory.unlink(missing_ok=True)
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole("weights", memory, json_bytes({"sources": [place.source for place in places],
                                                   "source": places[number].source}))
