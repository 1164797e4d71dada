"""A tiny corpus and a GPT with its words, made in a second, and the recipes as commands to run on it.

A word is a pitch: eight sines of 0.06 to 0.15 s. Rows have one to four words, so lengths are ragged; the numbers of training
clips fit no batch size.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hosts import reference

from omni_adapters.data.audio import save_audio
from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import ManifestRow, read_manifest, write_manifest
from omni_adapters.encoders.log_mel import SAMPLING_RATE, LogMelEncoder
from omni_adapters.training.hosts import SPECIALS, save_reference
from omni_adapters.training.sources import identity

ROOT = Path(__file__).parents[1]
WORDS = "do re mi fa so la ti ut what".split()
PITCHES = {word: 220 * 1.4**number for number, word in enumerate(WORDS[:-1])}  # Hz; "what" is only asked
QUESTION = "what"
NUM_TRAIN, NUM_VALID = 47, 9


class Corpus(NamedTuple):
    """Where things lie: `train`, `valid` are folders of shards with a manifest of the same name and suffix .jsonl beside."""

    folder: Path
    gpt: Path
    train: Path
    valid: Path

    def options(self, out: Path, *more: str, manifest: bool = False) -> list[str]:
        """Small, chat form, options of any recipe; what comes in `more` counts last."""
        train, valid = (path.with_suffix(".jsonl") if manifest else path for path in (self.train, self.valid))
        return ["--reference", str(self.gpt), "--train", str(train), "--valid", str(valid), "--out", str(out), "--device", "cpu",
                *"--steps 20 --max-tokens 220 --validate-every 10 --validate-rows 5 --max-answer 3 --save-every 4".split(), *more]


def build_corpus(folder: Path) -> Corpus:
    corpus = Corpus(folder, folder / "gpt", folder / "train", folder / "valid")
    save_reference(corpus.gpt, reference(vocab_size=len(SPECIALS) + len(WORDS), sequence_len=128), WORDS)
    (folder / "audio").mkdir()
    rng = random.Random(0)
    for path, count in ((corpus.train, NUM_TRAIN), (corpus.valid, NUM_VALID)):
        rows = [spoken(folder / "audio" / f"{path.name}-{number}.wav", rng) for number in range(count)]
        write_manifest(path.with_suffix(".jsonl"), rows)
        extract(path.with_suffix(".jsonl"), path)
    return corpus


def extract(manifest: Path, out: Path) -> None:
    encoder = LogMelEncoder()
    write_shards(read_manifest(manifest), encoder, out, description=identity(encoder), samples_per_shard=16, progress=False)


def spoken(path: Path, rng: random.Random) -> ManifestRow:
    words = rng.choices(WORDS[:-1], k=rng.randint(1, 4))
    sound = np.concatenate([tone(PITCHES[word], rng.uniform(0.06, 0.15)) for word in words])
    save_audio(path, sound, SAMPLING_RATE)
    return ManifestRow(str(path), " ".join(words), len(sound) / SAMPLING_RATE)


def tone(pitch: float, seconds: float) -> npt.NDArray[np.float64]:
    return 0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE)


# ---- running recipes ------------------------------------------------------------------------------------------------------


def command(recipe: str, arguments: Sequence[str], ranks: int = 1, restarts: int = 0) -> list[str]:
    """What a user types: python examples/align.py …, or torchrun with that many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "examples" / f"{recipe}.py"), *arguments]


@contextmanager
def started(recipe: str, arguments: Sequence[str], ranks: int = 1, restarts: int = 0,
            env: Mapping[str, str] | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The recipe running, its stderr in its stdout; what is left of it at the end of the block is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    process = subprocess.Popen(command(recipe, arguments, ranks, restarts), text=True, cwd=ROOT, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for it and all that it has started: loaders' workers, and ranks, which torchrun gives sessions of their own."""
    for pid in [process.pid, *descendants(process.pid)] if process.poll() is None else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Children, and theirs, as Linux lists them; elsewhere none."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def run(recipe: str, arguments: Sequence[str], *, fails: bool = False, timeout: float = 240.0, **options: Any) -> str:
    """Run a recipe to its end and return what it printed."""
    with started(recipe, arguments, **options) as process:
        printed, _ = process.communicate(timeout=timeout)
    assert (process.returncode != 0) == fails, printed
    return printed


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The log's rows of training steps; the others are validations."""
    return [row for row in log_of(out) if "loss" in row]


def results(out: Path, names: Iterable[str] = ("adapter.safetensors", "log.jsonl", "step-*.safetensors")) -> dict[str, bytes]:
    """The bytes of what a run leaves: equal runs have equal ones, wherever they lie."""
    return {path.name: path.read_bytes() for name in names for path in sorted(out.glob(name))}


def num_logged(out: Path) -> int:
    """The last step in the log of a run that may be alive, its last line half written."""
    lines = (out / "log.jsonl").read_bytes().split(b"\n")[:-1] if (out / "log.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@contextmanager
def time_limit(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """A process that hangs is killed, so that whoever waits for it goes on, and fails."""
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def everything(out: Path) -> dict[str, tuple[int, bytes]]:
    """All files there, hidden ones too, with their times and bytes: to show that nothing was changed."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir() if path.is_file()}
