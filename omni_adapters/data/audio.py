"""Audio files in, audio files out: float32 mono waveforms in [-1, 1] at the rate an encoder wants.

Notable:
- A header is never believed: files are decoded block by block and counted as they come, because a few kilobytes may
  declare 256 GiB and 356 kB of FLAC may really hold 1.4 GB.
- Each block is averaged to mono and resampled before the next is read, so memory follows what is returned.
- What libsndfile loads without a word is refused: header-only files, WAV data that ends early, NaN.
- `soundfile` and `soxr` are imported when first used; the rest of the library lives without them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_adapters.files import write_whole
from omni_adapters.shapes import BadInput, MissingExtra, shape

Waveform = npt.NDArray[np.float32]  # (T,) mono

_BLOCK = 65536  # values per read, all channels together
_RATES = (1_000, 768_000)  # Hz; slower holds no speech, faster is no microphone
_SHORT_DATA = re.compile(r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7F000000  # bytes; pipes write sizes near 2 GiB or 4 GiB for "until the end of the file"


def load_audio(path: str | os.PathLike[str], sampling_rate: int = 16000, *, max_seconds: float = 600.0) -> Waveform:
    """The file's waveform (T,) at `sampling_rate` Hz: WAV, FLAC, OGG, MP3, AIFF; channels are averaged.

    Integer formats lie in [-1, 1]; float files keep their own scale. `max_seconds` limits the decoded duration;
    `math.inf` lifts the limit.
    Refused with `BadInput`, naming the path: a missing file, one that cannot be decoded, one without samples, WAV or
    AIFF data cut short, NaN or infinity, a rate outside 1–768 kHz, too long. A cut OGG or MP3 looks like a short one.
    """
    where = f"load_audio({os.fspath(path)!r})"
    soundfile = _module(where, "soundfile")
    _check_rate(where, sampling_rate)
    if not max_seconds > 0:
        raise BadInput(where, f"max_seconds {max_seconds}", "a positive number of seconds")
    if not Path(path).is_file():
        raise BadInput(where, "a path where there is no file", "an audio file")
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            _check_header(where, file)
            blocks = _decode(where, file, max_seconds)
            waveform = _resample_blocks(where, blocks, file.samplerate, sampling_rate)
    except (RuntimeError, TypeError) as error:  # soundfile's own errors; TypeError for headerless .raw
        raise BadInput(where, f"a file that cannot be decoded ({str(error).strip(' :') or 'damaged'})",
                       "WAV, FLAC, OGG, MP3 or AIFF", "convert it, or leave it out") from error
    if not len(waveform):
        raise BadInput(where, "a file without samples", "at least one sample")
    return waveform


def save_audio(path: str | os.PathLike[str], waveform: npt.ArrayLike, sampling_rate: int) -> None:
    """Write a (T,) float waveform in [-1, 1] as a 16-bit mono WAV, whole or not at all.

    A sample x becomes round(32768·x), at most 32767: what came from 16 bits goes back unchanged. Louder samples are
    refused rather than clipped; so are NaN, infinity, no samples, and integer arrays, whose scale nobody states.
    """
    soundfile = _module("save_audio", "soundfile")
    samples = _mono("save_audio", waveform)
    _check_rate("save_audio", sampling_rate)
    if not len(samples):
        raise BadInput("save_audio", f"no samples for {path}", "at least one")
    peak = float(np.abs(samples).max())
    if not peak <= 1.0:  # NaN fails this too
        raise BadInput("save_audio", f"a waveform with peak {peak:.4g} for {path}", "finite samples in [-1, 1]",
                       "divide by the peak, or np.clip it if distortion is wanted")
    pcm = np.minimum(np.rint(samples * np.float32(32768)), 32767).astype(np.int16)
    content = io.BytesIO()
    soundfile.write(content, pcm, sampling_rate, format="WAV", subtype="PCM_16")
    write_whole("save_audio", path, content.getvalue(), sweep=False)  # a folder may hold a million of them


def resample(waveform: npt.ArrayLike, from_rate: int, to_rate: int) -> Waveform:
    """(T,) at `from_rate` Hz → (≈ T · to_rate / from_rate,) at `to_rate` Hz, float32, band-limited.

    Equal rates return the waveform as it is. Next to a full-scale edge the result may overshoot [-1, 1] a little.
    """
    samples = _mono("resample", waveform)
    _check_rate("resample", from_rate)
    _check_rate("resample", to_rate)
    return _resample_blocks("resample", iter([samples]), from_rate, to_rate)


def _resample_blocks(where: str, blocks: Iterator[Waveform], from_rate: int, to_rate: int) -> Waveform:
    """Equal to resampling the joined blocks at once; holds one block at the old rate."""
    if from_rate == to_rate:
        return np.concatenate([np.zeros(0, np.float32), *blocks])
    stream = _module(where, "soxr").ResampleStream(from_rate, to_rate, 1, dtype="float32")
    resampled = [stream.resample_chunk(block) for block in blocks]
    resampled.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(resampled)


def _decode(where: str, file: Any, max_seconds: float) -> Iterator[Waveform]:
    """Mono blocks (≤ _BLOCK,), counted and checked as they come."""
    most = max_seconds * file.samplerate  # frames
    decoded = 0
    while True:
        block = file.read(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True)  # (frames, channels)
        if not len(block):
            return
        decoded += len(block)
        if decoded > most:
            raise BadInput(where, f"a file longer than {max_seconds:g} s", f"at most max_seconds = {max_seconds:g}",
                           "cut it into pieces or raise max_seconds")
        with np.errstate(over="ignore"):  # channels near 3e38 add up to infinity, refused below
            mono = block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise BadInput(where, f"NaN or infinity within {decoded / file.samplerate:.1f} s", "finite samples")
        yield mono


def _check_header(where: str, file: Any) -> None:
    if not _RATES[0] <= file.samplerate <= _RATES[1]:
        raise BadInput(where, f"a file at {file.samplerate} Hz", f"{_RATES[0]} to {_RATES[1]} Hz",
                       "its header is damaged, or this is not audio")
    for declared, there in _SHORT_DATA.findall(file.extra_info):
        if int(there) < int(declared) < _UNKNOWN_SIZE:
            raise BadInput(where, f"a file cut short, {there} of {declared} bytes of samples", "the whole file",
                           "copy or download it again")


def _check_rate(where: str, rate: int) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or not _RATES[0] <= rate <= _RATES[1]:
        raise BadInput(where, f"a sampling rate of {rate!r}", f"an integer from {_RATES[0]} to {_RATES[1]} Hz")


def _mono(where: str, waveform: npt.ArrayLike) -> Waveform:
    samples = np.asarray(waveform)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise BadInput(where, f"a waveform {shape(samples.shape)} of {samples.dtype}", "floating point (T,), mono",
                       "average the channels; divide 16-bit integers by 32768")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _module(where: str, name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtra(where, name, "audio") from error
