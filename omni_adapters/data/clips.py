"""Sources of clips to train on, all with one interface, and the loader that prefetches their batches.

    source = ShardReader("shards/train")                        # features, encoded once; `kind` is "audio_features"
    source = ManifestClips(read_manifest("train.jsonl"), encoder)  # sound, decoded each time; "audio_inputs"
    steps = (deal(step.groups, rank, num_ranks) for step in Order(source.lens, …).steps())
    for micro_batches in loader(source, steps, num_workers=4):
        for sound, rows in micro_batches:
            omni(idx, targets, **{source.kind: sound})

Notable:
- Both sources give equal rows for one manifest, and both name it by the same sha256 in their `identity`.
- Workers change how long a batch takes and nothing else: neither the order, nor the values, nor any random number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from omni_adapters.data.audio import load_audio
from omni_adapters.data.epochs import MAX_LEN
from omni_adapters.data.manifest import ManifestRow, common_folder, manifest_lines, manifest_sha256, portable_row
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, MissingExtra

Kind = Literal["audio_features", "audio_inputs"]
Batch = tuple[Features, list[dict[str, Any]]]
_Item = TypeVar("_Item")


@runtime_checkable
class ClipSource(Protocol):
    """Clips by number, 0 ≤ number < len(source), with what was said in them. `ShardReader` and `ManifestClips` are ones.

    lens:     (len(source),) int64, feature frames of each clip, or a stand-in for them: what batches are planned by.
    identity: JSON values that decide the data. Equal identities, equal data: a run keeps it to refuse data that changed.
    kind:     the keyword of `OmniGPT.forward` that the sound goes to.
    """

    @property
    def lens(self) -> npt.NDArray[np.int64]: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def kind(self) -> Kind: ...

    def load_batch(self, numbers: Sequence[int]) -> Batch:
        """The clips with these numbers: their sound, and a dict for each with audio, text, seconds and its attributes."""
        ...

    def row(self, number: int) -> dict[str, Any]:
        """The dict that `load_batch` gives beside this clip's sound, without the sound: all texts are looked at in no time."""
        ...

    def __len__(self) -> int: ...


class ManifestClips:
    """A manifest's audio, decoded and preprocessed each time it is asked for. A `ClipSource`.

    rows:        as `read_manifest` returns them.
    encoder:     only its `preprocess` runs here; `load_batch` gives that one's Features.
    max_seconds: longest clip to decode.
    lens:        round(max(seconds, 1) × encoder.frame_rate), at least 1: the manifest's word, no file is opened for it.
                 The floor of one second keeps a manifest that says 0 from putting thousands of clips into one batch.

    The identity names the rows, not the samples in the audio files, which are not hashed.
    Refused with `BadInput`, by manifest line (that of a manifest without blank lines): seconds beyond max_seconds, rows
    that JSON cannot hold; later, audio that does not load and what the encoder refuses.
    """

    kind: Kind = "audio_inputs"

    def __init__(self, rows: Sequence[ManifestRow], encoder: AudioEncoder, *, max_seconds: float = 600.0) -> None:
        check_encoder("ManifestClips", encoder)
        self.rows, self.encoder, self.max_seconds = tuple(rows), encoder, max_seconds
        self.folder = common_folder("ManifestClips", self.rows)
        self.identity: dict[str, Any] = {
            "kind": self.kind, "manifest_sha256": manifest_sha256("ManifestClips", self.rows), "num_samples": len(self.rows),
            "frame_rate": float(encoder.frame_rate), "sampling_rate": int(encoder.sampling_rate)}
        seconds = np.array([row.seconds for row in self.rows], dtype=np.float64)
        _check_seconds(seconds, max_seconds)
        frames = np.rint(np.maximum(seconds, 1.0) * encoder.frame_rate)
        self.lens: npt.NDArray[np.int64] = frames.clip(1, MAX_LEN).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def load_batch(self, numbers: Sequence[int]) -> Batch:
        """What encoder.preprocess makes of these clips, and their rows, audio told from the folder that holds all of it."""
        rows = [self.row(number) for number in numbers]
        return load_inputs("ManifestClips", self.rows, numbers, self.encoder, self.max_seconds), rows

    def row(self, number: int) -> dict[str, Any]:
        """Row `number` as `load_batch` gives it; no file is opened."""
        return portable_row("ManifestClips", number, self.rows[number], self.folder)


def load_inputs(where: str, rows: Sequence[ManifestRow], numbers: Sequence[int], encoder: AudioEncoder,
                max_seconds: float) -> Features:
    """What encoder.preprocess makes of these rows' audio. What it or `load_audio` refuses is named by manifest line."""
    waveforms = []
    for number in numbers:
        try:
            waveforms.append(load_audio(rows[number].audio, encoder.sampling_rate, max_seconds=max_seconds))
        except BadInput as error:
            raise at_lines(where, [number], error) from error
    try:
        with torch.no_grad():
            return encoder.preprocess(waveforms)
    except BadInput as error:
        raise at_lines(where, numbers, error) from error


def at_lines(where: str, numbers: Sequence[int], error: BadInput) -> BadInput:
    """The same refusal, saying for which manifest rows; several are those of one batch."""
    together = " as one batch" if len(numbers) > 1 else ""
    return BadInput(f"{where}, {manifest_lines(numbers)}{together}, {error.where}", error.came, error.expected, error.todo)


def check_encoder(where: str, encoder: AudioEncoder) -> None:
    if not isinstance(encoder, AudioEncoder):
        raise BadInput(where, f"an encoder of type {type(encoder).__name__}", "an AudioEncoder",
                       "it needs sampling_rate, d_model, frame_rate, preprocess and __call__")


def loader(source: ClipSource, batches: Iterable[list[list[int]]], *, num_workers: int = 0) -> Iterator[list[Batch]]:
    """For each step in `batches`, a list of micro-batches of sample numbers: those micro-batches, loaded, in that order.

    num_workers: processes that load ahead, two steps each; 0 loads here, when asked. `batches` may be endless: it is
                 read as far as is loaded. Workers end when the iterator ends, is closed, or is dropped.

    What a source refuses arrives here as the `BadInput` it was, in its step's turn; the iterator then ends. A worker that
    is killed raises RuntimeError.
    """
    if not isinstance(source, ClipSource):
        raise BadInput("loader", f"a source of type {type(source).__name__}", "a ClipSource",
                       "it needs lens, identity, kind, load_batch, row and len()")
    if isinstance(num_workers, bool) or not (isinstance(num_workers, int) and num_workers >= 0):
        raise BadInput("loader", f"num_workers {num_workers!r}", "an integer ≥ 0")
    steps: DataLoader[Any] = DataLoader(_StepsOf(source), batch_size=None, sampler=batches, num_workers=num_workers,
                                        collate_fn=_as_it_is, generator=torch.Generator())  # leaves torch's own one alone
    return _raising(steps)


class _StepsOf(Dataset[Any]):
    """A source as torch's DataLoader asks for it: an "index" is a step's micro-batches."""

    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __getitem__(self, micro_batches: list[list[int]]) -> list[Batch] | Exception:
        """Errors go home as values: the DataLoader would make new ones, of one text and without their parts."""
        try:
            return [self.source.load_batch(numbers) for numbers in micro_batches]
        except (BadInput, MissingExtra) as error:
            return error


def _raising(steps: DataLoader[Any]) -> Iterator[list[Batch]]:
    try:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step
    except Exception as error:
        if not steps.num_workers:
            raise
        # The frames left out are the DataLoader's and would keep its workers; the worker's own stand in the message.
        raise error.with_traceback(None)  # noqa: B904, it is the same error


def _as_it_is(item: _Item) -> _Item:
    """Not a lambda: where workers are spawned they get it by pickle."""
    return item


def _check_seconds(seconds: npt.NDArray[np.float64], max_seconds: float) -> None:
    if not max_seconds > 0:
        raise BadInput("ManifestClips", f"max_seconds {max_seconds}", "a positive number of seconds")
    wrong = np.flatnonzero(~((seconds >= 0) & (seconds <= max_seconds))).tolist()
    if wrong:
        raise BadInput(f"ManifestClips, {manifest_lines(wrong)}", f"clips of up to {seconds[wrong].max():g} s",
                       f"0 to max_seconds = {max_seconds:g} s", "leave them out, cut them, or raise max_seconds")
