"""Clips that an encoder will not take, found before work is done: by their headers and lengths, and told of all at once."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import torch

from omni_adapters.data.audio import load_audio
from omni_adapters.data.manifest import ManifestRow
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.shapes import BadInput, MissingExtra

USUAL_RATES = (8_000, 48_000)  # Hz; what load_audio takes at other rates, it says itself
LOOKS = 20_000  # files looked at for one line of progress
THREADS = 8
MOST = 20  # bad clips that a refusal tells of one by one


def refuse_bad(rows: Sequence[ManifestRow], numbers: Sequence[int], encoder: AudioEncoder, max_seconds: float,
                say: Callable[[str], None]) -> None:
    """Refuse those of these rows that a look shows to be bad, all in one message."""
    looks = look_at({rows[number].audio for number in numbers}, encoder.sampling_rate, max_seconds, say)
    longest, complaint = limit(encoder, [samples for samples, bad in looks.values() if not bad])
    faults = {}
    for number in numbers:
        row, (samples, bad) = rows[number], looks[rows[number].audio]
        if row.seconds > max_seconds:
            bad = bad or f"{row.seconds:g} s by the manifest, more than max_seconds = {max_seconds:g}"
        elif samples > longest:
            bad = bad or f"a clip of {samples / encoder.sampling_rate:g} s, {complaint}"
        if bad:
            faults[number] = bad
    if faults:
        lines = [f"\n  line {number + 1}: {rows[number].audio}, {bad}" for number, bad in list(faults.items())[:MOST]]
        more = f"\n  and {len(faults) - MOST} more" if len(faults) > MOST else ""
        raise BadInput("write_shards", f"{len(faults)} of {len(numbers)} clips that cannot be encoded",
                       f"audio that opens, has samples, and is no longer than max_seconds = {max_seconds:g} and what the "
                       "encoder takes", "repair these files, leave their lines out if no shard is written yet, or go on with "
                       f'on_bad="skip" (--skip-bad). By manifest line:{"".join(lines)}{more}')


def look_at(paths: set[str], sampling_rate: int, max_seconds: float, say: Callable[[str], None]) -> dict[str, tuple[int, str]]:
    """Path → `look`. Opening files is waiting, on network drives above all: threads wait together."""
    ordered = sorted(paths)
    looks: dict[str, tuple[int, str]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(ordered), LOOKS):
            some = ordered[first:first + LOOKS]
            looks.update(zip(some, pool.map(lambda path: look(path, sampling_rate, max_seconds), some)))
            say(f"looked at {len(looks)} of {len(ordered)} audio files")
    return looks


def look(path: str, sampling_rate: int, max_seconds: float) -> tuple[int, str]:
    """(samples at the encoder's rate, what is wrong or ""). Nobody is condemned by a header: where that looks odd,
    `load_audio` decodes the file and decides."""
    try:
        soundfile = import_module("soundfile")
    except ImportError as error:
        raise MissingExtra("write_shards", "soundfile", "audio") from error
    try:
        with soundfile.SoundFile(path) as file:
            usual = USUAL_RATES[0] <= file.samplerate <= USUAL_RATES[1] and "should be" not in file.extra_info
            if usual and 0 < file.frames <= max_seconds * file.samplerate:
                return file.frames * sampling_rate // file.samplerate, ""
    except (RuntimeError, TypeError, OSError):  # load_audio has words for it
        pass
    try:
        return len(load_audio(path, sampling_rate, max_seconds=max_seconds)), ""
    except BadInput as error:
        return 0, error.came


def limit(encoder: AudioEncoder, lens: Sequence[int]) -> tuple[float, str]:
    """The most samples, of these numbers, that encoder.preprocess takes, and what it says of more; infinity if it takes all.

    It is asked with a quiet tone of a few of these lengths. An encoder that refuses a length refuses longer ones.
    """
    complaints: dict[int, str] = {}

    def refuses(samples: int) -> bool:
        try:
            with torch.no_grad():
                encoder.preprocess([np.sin(np.arange(samples, dtype=np.float32)) / 10])
        except BadInput as error:
            complaints[samples] = f"where {error.where} expects {error.expected}"
        return samples in complaints

    ordered = sorted({samples for samples in lens if samples > 0})
    if not ordered or not refuses(ordered[-1]):
        return math.inf, ""
    first = bisect_left(ordered, True, key=refuses)
    return (ordered[first - 1] if first else 0), complaints[ordered[first]]
