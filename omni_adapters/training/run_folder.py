"""A run's folder: whatever ends the process, and whenever, the run goes on from its newest whole checkpoint.

    run.json                     the configuration, written first
    step-00000100.safetensors    a checkpoint, one file each: tensors, state, and how long the log was
    log.jsonl                    one JSON object a line
    .lock                        locked while a process writes here

Notable:
- a checkpoint is an adapter file: there whole or not at all, and a flipped bit is found when it is loaded
- the log is fsynced before the checkpoint that states its length is written. So the log can be cut back to exactly what it
  held then, and training repeats the rows after it: none twice, none missing
- nothing of worth is deleted in doubt: a damaged checkpoint is moved aside under a `.bad-` name, a changed configuration refused
- the lock is the kernel's (flock): it ends with its process, SIGKILL or not. A forked child, a data loader's worker for one,
  lets go of it at birth, else it would hold the folder when its parent is dead and starts again

One process recovers, saves and logs; any may read. Writing needs POSIX, and a file system with flock.
"""

from __future__ import annotations

import json
import os
import re
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.descriptions import differences
from omni_adapters.files import json_object, json_values, sync_folder, write_all, write_whole
from omni_adapters.shapes import BadInput, listing

STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,15})\.safetensors")
LEFT_BEHIND = re.compile(rf"\.({STEP.pattern}|run\.json)\.[0-9a-f]{{8}}\.(saving|tmp)")  # by killed writers of these files
NO_LIMIT = 1 << 62  # bytes of a checkpoint; its header is held against the file's true size anyway
DIVERGED = "make numbers of arrays and tensors; NaN and infinity mean that training has diverged"
DAMAGED = "the file was damaged, or written by something else: put it back from where it is whole"
POLL = 0.05  # seconds between two tries for the lock


class Checkpoint(NamedTuple):
    """What a run had at `step`: tensors on the CPU, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class RunFolder:
    """The checkpoints and the log of one run.

        run = RunFolder("runs/ears", config)
        start = run.recover() or 0                        # rank 0; the others wait, then run.read(start)
        for step in range(start + 1, num_steps + 1):
            run.log({"step": step, "loss": …})
            if step % 100 == 0:
                run.save(step, tensors, state)

    folder: need not exist; its parents neither.
    config: JSON values that decide the run; tuples count as lists. A folder is for one configuration.
    keep:   how many checkpoints to keep, the newest, at least 1; with 2 a damaged one costs no more than its own steps.

    Nothing is read or written before a method is called.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any], *, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.config = _plain(f"RunFolder({os.fsdecode(folder)!r})", "config", config)
        if keep < 1:
            raise BadInput(f"RunFolder({os.fsdecode(folder)!r})", f"keep = {keep}", "at least 1")
        self._log_bytes = 0
        self._release: weakref.finalize[..., RunFolder] | None = None

    def recover(self, *, patience: float = 5.0) -> int | None:
        """Lock the folder and bring it to where training goes on: the step of the newest whole checkpoint, None if there is
        none. For one process, rank 0, before training; again after a failure, if it likes.

        A new run gets its folder and run.json. In an old one, checkpoints newer than the newest whole one are damaged and
        moved aside (`.bad-step-00000100.safetensors`, `.bad-step-00000100-2.safetensors`, …), temporary files of killed
        writers are removed, and the log is cut back to what it held at that checkpoint; without one, emptied. Where *all*
        checkpoints are damaged the log is moved aside as well.

        patience: seconds to wait for the lock; a killed process may take some to die.

        A run without any checkpoint begins anew, and may do so with another configuration.

        Raises BadInput, with nothing changed in the folder: another configuration, naming every key path that differs; files
        of a run without a run.json; a log shorter than its checkpoint says; a living process that writes here.
        """
        where = self._where("recover")
        self._check_run(where)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock(where, patience)
        try:
            self._check_run(where)  # again, now that nobody else can begin one
            return self._recover(where)
        except BaseException:
            self.close()
            raise

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step. Raises BadInput if there is none, or if it is damaged."""
        if step not in self.steps():
            raise BadInput(self._where("read"), f"step {step}", f"one of the steps saved: {listing(self.steps()) or 'none'}")
        return _load(self.path(step), step)[0]

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, in one step, and remove the oldest beyond `keep`. A step saved again is replaced.

        step:    from 0.
        tensors: as `save_adapter` takes them: at least one, finite, any device.
        state:   JSON values; integers of up to 64 bits.

        An OSError (disk full) passes through; log and other checkpoints are then as they were, and the run may go on. Raises
        BadInput, with nothing changed: what `save_adapter` refuses, a folder that `recover` has not locked.
        """
        where = self._where("save")
        self._check_locked(where)
        if not isinstance(step, int) or not 0 <= step < 10**16:
            raise BadInput(where, f"step {step!r:.40}", "an integer from 0, of up to 16 digits")
        state = _plain(where, "state", state)
        with self._log_file(where) as file:
            os.fsync(file)
        save_adapter(self.path(step), tensors, {"step": step, "log_bytes": self._log_bytes, "state": state})
        for old in self.steps()[:-self.keep]:
            if old != step:
                os.unlink(self.path(old))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl; other processes see it when this returns. It outlasts this process, and with the
        next checkpoint a power cut.

        Raises BadInput for what is no JSON, NaN and infinity among it. OSErrors pass through; the log is then as it was.
        """
        where = self._where("log")
        self._check_locked(where)
        line = (json.dumps(_plain(where, "row", row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._log_file(where) as file:
            try:
                write_all(file, line)
            except BaseException:
                with suppress(OSError):  # the next to open the log tries again
                    os.ftruncate(file, self._log_bytes)
                raise
        self._log_bytes += len(line)

    def rows(self) -> list[dict[str, Any]]:
        """The log's rows. A line that is being written is not there yet; a damaged one raises BadInput."""
        try:
            lines = (self.folder / "log.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        place = f"{self.folder / 'log.jsonl'}, line "
        return [json_object(self._where("rows"), f"{place}{number}", line, DAMAGED) for number, line in enumerate(lines, 1)]

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, ascending, damaged ones among them."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(STEP.fullmatch, names) if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:08d}.safetensors"

    def close(self) -> None:
        """Let another process have the folder; so does the end of this process, or of this object."""
        if self._release is not None:
            self._release()

    def _where(self, method: str) -> str:
        return f"RunFolder({os.fsdecode(self.folder)!r}).{method}"

    # Whose folder it is

    def _check_run(self, where: str) -> None:
        """Refuse a folder that is not this run's."""
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(where, "a file", "a folder, or nothing yet", "name another --out")
        if (self.folder / "run.json").exists():
            saved = json_object(where, f"{self.folder / 'run.json'}", (self.folder / "run.json").read_bytes(), DAMAGED)
            changed = differences(saved, self.config)
            if changed and self.steps():  # without a checkpoint nothing is lost: the run begins anew as it is now
                raise BadInput(where, f"another configuration than this folder's run has ({listing(changed, len(changed))})",
                               "the same, to go on with it", "name another --out for a new run, or go back to the old settings")
        else:
            foreign = [self.path(step).name for step in self.steps()]
            foreign += ["log.jsonl"] if (self.folder / "log.jsonl").exists() else []
            if foreign:
                raise BadInput(where, f"a folder with {listing(foreign)}, but without a run.json",
                               "the folder of a run, or one without such files", "name another --out, or put run.json back")

    def _lock(self, where: str, patience: float) -> None:
        import fcntl  # here: Windows has none, and can read

        if self._release is not None and self._release.alive:
            return
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        end = time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise BadInput(where, "a folder that another process writes to", "one process a folder",
                                       "let it finish, or name another --out") from None
                time.sleep(POLL)
        except BaseException:
            os.close(file)
            raise
        self._release = weakref.finalize(self, os.close, file)
        os.register_at_fork(after_in_child=self._release)

    def _check_locked(self, where: str) -> None:
        if self._release is None or not self._release.alive:
            raise BadInput(where, "a folder that this process has not locked", "a call of recover() before",
                           "let one process recover, save and log")

    # Bringing it back

    def _recover(self, where: str) -> int | None:
        text = json.dumps(self.config, indent=2, ensure_ascii=False, allow_nan=False)
        content, path = f"{text}\n".encode(), self.folder / "run.json"
        if not path.exists() or (path.read_bytes() != content and not self.steps()):
            write_whole(where, path, content)
        newest, log_bytes, damaged = self._newest_whole()
        log = self.folder / "log.jsonl"
        present = log.stat().st_size if log.exists() else 0
        if present < log_bytes:
            raise BadInput(where, f"a log.jsonl of {present} bytes", f"the {log_bytes} that it had at step {newest}",
                           f"put log.jsonl back; or, to go on from an earlier checkpoint, remove {self.path(newest or 0).name}")
        if damaged and newest is None and present:
            self._set_aside(log)
        for step in damaged:
            self._set_aside(self.path(step))
        for name in os.listdir(self.folder):
            if LEFT_BEHIND.fullmatch(name):
                os.unlink(self.folder / name)
        self._cut_log(log_bytes)
        sync_folder(self.folder)
        return newest

    def _newest_whole(self) -> tuple[int | None, int, list[int]]:
        """The newest checkpoint that loads, the length of its log in bytes, and the newer ones, which do not."""
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                return step, _load(self.path(step), step)[1], damaged
            except BadInput:
                damaged.append(step)
        return None, 0, damaged

    def _set_aside(self, path: Path) -> None:
        number, aside = 1, path.with_name(f".bad-{path.name}")
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f".bad-{path.stem}-{number}{path.suffix}")
        os.rename(path, aside)

    # The log

    def _cut_log(self, length: int) -> None:
        file = os.open(self.folder / "log.jsonl", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.ftruncate(file, length)
            os.fsync(file)
        finally:
            os.close(file)
        self._log_bytes = length

    @contextmanager
    def _log_file(self, where: str) -> Iterator[int]:
        """The log, open at its end, without what a failed append has left."""
        file = os.open(self.folder / "log.jsonl", os.O_WRONLY | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            if size < self._log_bytes:
                raise BadInput(where, f"a log.jsonl of {size} bytes", f"the {self._log_bytes} that were written",
                               "leave the log of a running process alone: put it back")
            if size > self._log_bytes:
                os.ftruncate(file, self._log_bytes)
            yield file
        finally:
            os.close(file)


def _load(path: Path, step: int) -> tuple[Checkpoint, int]:
    """The checkpoint in a file, and how many bytes the log had. Raises BadInput for everything else."""
    tensors, description = load_adapter(path, max_bytes=NO_LIMIT)
    length, state = description.get("log_bytes"), description.get("state")
    if description.get("step") != step or type(length) is not int or length < 0 or not isinstance(state, dict):
        raise BadInput(f"RunFolder.read({os.fsdecode(path)!r})", f"a description with {listing(sorted(description))}",
                       f"step {step}, log_bytes and state", "the file is no checkpoint of a run, or was renamed")
    return Checkpoint(step, tensors, state), length


def _plain(where: str, what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return json_values(where, what, values, tuples=True, todo=DIVERGED)
