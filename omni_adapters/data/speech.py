"""Speech from text, offline: libespeak-ng through ctypes, a sentence in about five milliseconds.

Notable:
- The same arguments give the same samples, whatever was spoken before. libespeak-ng keeps the phase of its pitch
  flutter, its gain and its resonators from one utterance to the next, with no call to reset them, and seeds its noise
  from the clock. So each utterance gets a freshly loaded image of the library (some 3 ms) and a fixed seed.
- The library is driven in its synchronous retrieval mode: samples arrive in a callback, without a sound device.
- The signal is synthetic but real: voiced pitch, formants, coarticulation, 130 languages, a hundred voice variants.
- espeak-ng is GPL-3. It comes with the extra `speech`, is loaded when first used and never bundled.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from omni_adapters.data.audio import Waveform, resample
from omni_adapters.shapes import BadInput, MissingExtra, listing, shape

# espeak-ng's speak_lib.h
_SYNCHRONOUS, _DONT_EXIT, _POS_CHARACTER, _UTF8 = 2, 0x8000, 1, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_LONGEST_PATH = 159  # bytes; espeak-ng keeps the path of its data in a buffer of 160
_UNSEEDED = {"Reed", "caleb"}  # their breath is drawn from the C library's rand(), which the whole process shares
_LOCK = threading.Lock()  # espeak_Initialize sets the locale, which no two threads may do at once


def speak(text: str, *, voice: str = "en-us", variant: str | None = "f3", rate: int = 175, pitch: int = 50,
          pitch_range: int = 50, volume: int = 100, sampling_rate: int = 16000) -> Waveform:
    """`text` spoken: a waveform (T,) float32 mono in [-1, 1] at `sampling_rate` Hz. Deterministic, thread-safe.

    voice:       a key of `voices()`: the language and its accent.
    variant:     one of `variants()`, the speaker; None for the voice's own.
    rate:        words per minute, 80 to 450.
    pitch:       0 to 99, of the speaker's own; 50 leaves it as it is.
    pitch_range: 0 (monotone) to 99.
    volume:      1 to 200; 100 is the voice's own, and loud variants saturate above it.

    Raises `MissingExtra` without espeakng-loader or soxr; `BadInput` for an unknown voice or variant, a parameter out
    of range, and text that is empty, makes no sound or holds control characters.
    """
    name = _voice_name(voice, variant)
    parameters = {_RATE: _within("rate", rate, 80, 450), _VOLUME: _within("volume", volume, 1, 200),
                  _PITCH: _within("pitch", pitch, 0, 99), _RANGE: _within("pitch_range", pitch_range, 0, 99)}
    spoken = _check_text(text)
    with _LOCK, _engine() as (library, native_rate):
        samples = _synthesise(library, spoken, name, parameters)
    if not samples.any():
        raise BadInput("speak", f"text {text!r}, which makes no sound", f"something the voice {voice!r} can say",
                       "a few languages come without words for numbers")
    waveform = resample(samples.astype(np.float32) / 32768, native_rate, sampling_rate)
    return np.clip(waveform, -1.0, 1.0)  # resampling overshoots where a loud variant saturates


def voices() -> dict[str, str]:
    """What `speak(voice=…)` takes, sorted, and its name: {"af": "Afrikaans", …, "en-us": "English (America)", …}."""
    return {code: name for code, (_, name) in sorted(_voice_files().items())}


@cache
def variants() -> tuple[str, ...]:
    """What `speak(variant=…)` takes, sorted: speakers such as f1–f5, m1–m8, croak, whisper.

    All differ and all repeat exactly. Two that cannot repeat are left out: Reed and caleb.
    """
    folder = _data_folder() / "voices" / "!v"
    return tuple(sorted(file.name for file in folder.iterdir() if file.is_file() and file.name not in _UNSEEDED))


def add_noise(waveform: npt.ArrayLike, snr_db: float, seed: int) -> Waveform:
    """`waveform` (T,) plus white noise, so that 10·log10(mean signal² / mean noise²) = `snr_db` exactly. Float32.

    The noise depends on `seed` and T alone. Nothing is clipped, as clipping would change the ratio: at low `snr_db` the
    result may leave [-1, 1]. Refused with `BadInput`: silence, which has no ratio to noise, and `snr_db` not finite.
    """
    signal = np.asarray(waveform, dtype=np.float64)
    if signal.ndim != 1 or not len(signal):
        raise BadInput("add_noise", f"a waveform {shape(signal.shape)}", "a non-empty (T,)")
    power = float(np.mean(signal**2))
    if not (np.isfinite(power) and power > 0 and np.isfinite(snr_db)):
        raise BadInput("add_noise", f"signal power {power} and snr_db {snr_db}", "both finite, and power > 0")
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(len(signal))
    scale = np.sqrt(power / np.mean(noise**2)) * 10 ** (-snr_db / 20)
    return (signal + scale * noise).astype(np.float32)


def _synthesise(library: ctypes.CDLL, text: bytes, name: bytes, parameters: Mapping[int, int]) -> npt.NDArray[np.int16]:
    """The samples (T,) at the library's own rate. `text` is UTF-8 and ends in a zero byte."""
    chunks: list[bytes] = []

    @_CALLBACK
    def collect(samples: object, count: int, events: object) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))  # type: ignore[arg-type]
        return 0  # go on

    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(name):
        raise RuntimeError(f"libespeak-ng lists the voice {name.decode()!r} and cannot load it")
    for parameter, value in parameters.items():
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    status = library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, _POS_CHARACTER, 0, _UTF8, None, None)
    if status:
        raise RuntimeError(f"libespeak-ng gave up with status {status}")
    return np.frombuffer(b"".join(chunks), np.int16)


@contextmanager
def _engine() -> Iterator[tuple[ctypes.CDLL, int]]:
    """A fresh image of the library, and the rate it speaks at in Hz."""
    data = str(_data_folder()).encode()
    library = _load()
    try:
        native_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if native_rate <= 0:
            raise RuntimeError(f"libespeak-ng cannot read its data at {data.decode()}, a path of {len(data)} bytes; it "
                               f"takes at most {_LONGEST_PATH}")
        try:
            yield library, native_rate
        finally:
            library.espeak_Terminate()  # ends its thread, which must not outlive its code
    finally:
        _unload(library)


def _load() -> ctypes.CDLL:
    """The library in the state it was compiled with. Where other code of this process holds it, a private copy."""
    path = _loader().get_library_path()
    library = ctypes.CDLL(path)
    data = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(data))
    if not data.value:  # empty until espeak_Initialize
        return library
    _unload(library)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # loaded, it no longer needs its file
        return ctypes.CDLL(shutil.copy(path, folder))


def _unload(library: ctypes.CDLL) -> None:
    handle = ctypes.c_void_p(library._handle)
    if sys.platform == "win32":
        ctypes.windll.kernel32.FreeLibrary(handle)
    else:
        ctypes.CDLL(None).dlclose(handle)


@cache
def _voice_files() -> dict[str, tuple[str, str]]:
    """code → (file under `lang/`, name). A file answers to its own name first, then to its language codes in order."""
    data = _data_folder()
    claims = []  # (rank, code, file, name)
    for file in sorted(path for path in (data / "lang").rglob("*") if path.is_file()):
        words = [line.split() for line in file.read_text("utf-8").splitlines()]
        codes = [rest[0] for key, *rest in filter(None, words) if key == "language"]
        values = {key: " ".join(rest) for key, *rest in filter(None, words) if key in ("name", "dictionary")}
        dictionary = values.get("dictionary", codes[0].split("-")[0])
        if (data / f"{dictionary}_dict").is_file():  # four test languages come without one and say nothing
            for rank, code in enumerate([file.name, *codes]):
                claims.append((rank, code.lower(), file.relative_to(data / "lang").as_posix(), values["name"]))
    return {code: (file, name) for _, code, file, name in sorted(claims, reverse=True)}  # the lowest rank comes last


def _voice_name(voice: str, variant: str | None) -> bytes:
    """`gmw/en-US+f3`. libespeak-ng itself would take an unknown variant for none."""
    files = _voice_files()
    if voice.lower() not in files:
        close = get_close_matches(voice.lower(), sorted(files), n=6, cutoff=0)
        raise BadInput("speak", f"voice {voice!r}", f"one such as {listing(close)}", "see voices() for all")
    if variant is not None and variant not in variants():
        close = get_close_matches(variant, variants(), n=6, cutoff=0)
        raise BadInput("speak", f"variant {variant!r}", f"one such as {listing(close)}, or None",
                       "see variants() for all")
    file = files[voice.lower()][0]
    return (file if variant is None else f"{file}+{variant}").encode()


def _within(name: str, value: int, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise BadInput("speak", f"{name} {value!r}", f"an integer from {least} to {most}")
    return int(value)


def _check_text(text: str) -> bytes:
    """UTF-8 with a zero byte at its end."""
    if not text.strip():
        raise BadInput("speak", f"text {text!r}", "something to say")
    for position, letter in enumerate(text):
        if (letter < " " and letter not in "\t\n\r") or "\ud800" <= letter <= "\udfff":
            raise BadInput("speak", f"text with {letter!r} at character {position}", "printable text",
                           "take it out, espeak-ng reads control characters as commands")
    return text.encode() + b"\0"


def _data_folder() -> Path:
    return Path(_loader().get_data_path())


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingExtra("speak", "espeakng-loader", "speech") from error
    return espeakng_loader
