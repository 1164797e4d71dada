"""Pieces of sound, and what can be done to a voice: numpy only, nothing is spoken here.

Notable:
- `revoice` keeps a voice's spectral envelope and exchanges what excites it: noise makes it a whisper, irregular pulses at some
  45 Hz make it croaky. Any voice will do; the envelope is the smoothed cepstrum (Oppenheim 1969), its filter minimum phase.
- `bend_end` moves the pitch of the last moments and nothing else, by pitch-synchronous overlap-add (Moulines
  and Charpentier 1990).
- `pitch_track` is plain autocorrelation: what a label about pitch is true of.

Signals are (T,) float32 at 16 kHz; what is random is drawn from the generator that comes with the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from omni_adapters.shapes import BadInput, listing

Sound = npt.NDArray[np.float32]
SAMPLING_RATE = 16000       # Hz
NOISES = ("hiss", "hum", "crackle")
EXCITATIONS = ("whisper", "creak")
TONES = ("beep", "rising", "falling", "steady", "warbling")

_ACTIVE = 10 ** (-35 / 10)  # power of a frame that counts as sound, against the loudest frame
_FRAME, _HOP = 400, 200     # samples: 25 ms, half of it
_FFT = 1024
_QUEFRENCIES = 24           # 1.5 ms: formants pass, pitch below 660 Hz does not
_KNEE = 0.7                 # amplitude above which `limit` bends


# ---- measures -------------------------------------------------------------------------------------------------------------


def frames(sound: Sound, length: int, hop: int) -> Sound:
    """(T,) → (F, length), a frame every `hop` samples, the end padded with zeros."""
    count = max(1, -(-(len(sound) - length) // hop) + 1)
    padded = np.pad(sound, (0, max(0, (count - 1) * hop + length - len(sound))))
    return np.lib.stride_tricks.sliding_window_view(padded, length)[::hop]


def active_rms(sound: Sound) -> float:
    """Root mean square of what sounds: the 20 ms frames within 35 dB of the loudest. 0 for silence."""
    power = np.mean(frames(sound, 320, 320).astype(np.float64) ** 2, axis=1)
    return float(np.sqrt(power[power >= _ACTIVE * power.max()].mean()))


def pitch_track(sound: Sound, lowest: float = 50.0, highest: float = 480.0) -> npt.NDArray[np.float64]:
    """(T,) → (F,) fundamental frequency in Hz every 10 ms, NaN where nothing is voiced.

    The peak of the autocorrelation of 48 ms under a Hann window, divided by the window's own; voiced is a peak above 0.6 in a
    frame within 17 dB of the loudest. Longer periods are handicapped by up to 12 %, against octave errors.
    """
    length, first, last = 768, int(SAMPLING_RATE / highest), int(SAMPLING_RATE / lowest)
    window = np.hanning(length).astype(np.float32)
    cut = frames(np.pad(sound, length // 2), length, 160) * window
    correlation = np.fft.irfft(np.abs(np.fft.rfft(cut, 2 * length)) ** 2)[:, :last]      # (F, last)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * length)) ** 2)[:last]
    energy = correlation[:, 0].copy()
    peaks = correlation[:, first:] / np.maximum(energy, 1e-12)[:, None] / (own / own[0])[first:]
    best = (peaks * (1 - 0.12 * np.arange(first, last) / last)).argmax(axis=1)
    voiced = (peaks[np.arange(len(best)), best] > 0.6) & (energy > 0.02 * energy.max()) & (energy > 0)
    return np.where(voiced, SAMPLING_RATE / (best + first), np.nan)


def pitch_of(sound: Sound) -> float:
    """Median fundamental frequency in Hz; NaN where nothing is voiced."""
    track = pitch_track(sound)
    return float(np.nanmedian(track)) if np.isfinite(track).any() else float("nan")


# ---- cutting and levels ---------------------------------------------------------------------------------------------------


def trim(sound: Sound, floor: float = 0.004) -> Sound:
    """Without the silence at both ends: what lies below `floor` of the peak."""
    loud = np.flatnonzero(np.abs(sound) > floor * np.abs(sound).max())
    return sound[loud[0]:loud[-1] + 1] if len(loud) else sound[:0]


def silence(seconds: float) -> Sound:
    return np.zeros(round(seconds * SAMPLING_RATE), np.float32)


def limit(sound: Sound) -> Sound:
    """Into (-1, 1): amplitudes up to 0.7 stay as they are, those above bend towards 1 as a hyperbolic tangent."""
    size = np.abs(sound)
    if size.max(initial=0) <= _KNEE:
        return sound
    bent = _KNEE + (1 - _KNEE) * np.tanh((size - _KNEE) / (1 - _KNEE))
    return np.where(size > _KNEE, np.sign(sound) * np.minimum(bent, 0.999), sound).astype(np.float32)


# ---- noises and tones -----------------------------------------------------------------------------------------------------


def noise(kind: str, length: int, random: np.random.Generator) -> Sound:
    """(length,) of unit power: hiss is white, hum is the mains with its harmonics, crackle is clicks, 25 a second."""
    if kind not in NOISES:
        raise BadInput("noise", f"the kind {kind!r}", f"one of {listing(NOISES)}")
    made = {"hiss": _hiss, "hum": _hum, "crackle": _crackle}[kind](length, random)
    return (made / max(np.sqrt(np.mean(made**2)), 1e-9)).astype(np.float32)


def tones(shape: str, count: int, hertz: float) -> Sound:
    """`count` tones of amplitude 1 with pauses between: a beep lasts 0.12 s, a tone that moves or stays, 0.55 s.

    rising and falling span two octaves from or to `hertz`; warbling sways by a fourth, seven times a second.
    """
    if shape not in TONES or count < 1:
        raise BadInput("tones", f"{count} of the shape {shape!r}", f"at least one of {listing(TONES)}")
    time = np.arange(round((0.12 if shape == "beep" else 0.55) * SAMPLING_RATE)) / SAMPLING_RATE
    along = time / time[-1]
    octaves = {"rising": 2 * along, "falling": 2 - 2 * along,
               "warbling": 0.4 * np.sin(2 * np.pi * 7 * time)}.get(shape, 0 * time)
    phase = 2 * np.pi * np.cumsum(hertz * 2**octaves) / SAMPLING_RATE
    ramp = np.minimum(1, np.minimum(time, time[::-1]) / 0.01)  # 10 ms, so that nothing clicks
    one = (np.sin(phase) * ramp).astype(np.float32)
    return np.concatenate([part for _ in range(count) for part in (silence(0.14), one)])[len(silence(0.14)):]


def _hiss(length: int, random: np.random.Generator) -> Sound:
    return random.standard_normal(length, np.float32)


def _hum(length: int, random: np.random.Generator) -> Sound:
    base = random.choice((50.0, 60.0)) * np.arange(1, 9)                                  # (8,) Hz
    weights = random.uniform(0.3, 1.0, 8) / np.arange(1, 9) ** 0.5
    time = np.arange(length) / SAMPLING_RATE
    waves = np.sin(2 * np.pi * base[:, None] * time + random.uniform(0, 2 * np.pi, 8)[:, None])
    return (weights @ waves).astype(np.float32)


def _crackle(length: int, random: np.random.Generator) -> Sound:
    clicks = np.zeros(length, np.float32)
    places = random.integers(0, length, max(2, round(25 * length / SAMPLING_RATE)))
    clicks[places] = random.uniform(0.4, 1.0, len(places)) * random.choice((-1, 1), len(places))
    burst = random.standard_normal(48) * np.exp(-np.arange(48) / 10)                      # 3 ms
    return np.convolve(clicks, burst)[:length].astype(np.float32)


# ---- the same words in another voice ----------------------------------------------------------------------------------------


def revoice(speech: Sound, excitation: str, random: np.random.Generator) -> Sound:
    """`speech` (T,) with its spectral envelope, excited anew: "whisper" by noise, "creak" by irregular pulses. As loud as before.

    In creak, frames that are mostly above 2 kHz (fricatives) stay noise, so that words can be told.
    """
    if excitation not in EXCITATIONS:
        raise BadInput("revoice", f"the excitation {excitation!r}", f"one of {listing(EXCITATIONS)}")
    window = np.hanning(_FRAME + 1)[:-1].astype(np.float32)
    cut = frames(np.pad(speech, (_HOP, _HOP)), _FRAME, _HOP) * window                     # (F, 400)
    length = (len(cut) - 1) * _HOP + _FRAME
    spectrum = np.abs(np.fft.rfft(cut, _FFT))                                             # (F, 513)
    driven = frames(random.standard_normal(length, np.float32), _FRAME, _HOP) * window
    if excitation == "creak":
        pulses = frames(creaky_pulses(length, random), _FRAME, _HOP) * window
        high = (spectrum[:, 128:] ** 2).sum(axis=1) > 0.5 * (spectrum**2).sum(axis=1)
        driven = np.where(high[:, None], driven, pulses + 0.02 * driven)
    shape = minimum_phase(spectrum)
    if excitation == "whisper":
        shape *= np.minimum(1, np.arange(_FFT // 2 + 1) / 40)                             # no chest: less below 600 Hz
    made = np.fft.irfft(np.fft.rfft(driven, _FFT) * shape)[:, :_FRAME + _HOP]
    power = np.mean(cut**2, axis=1) / np.maximum(np.mean(made**2, axis=1), 1e-12)
    made *= np.minimum(np.sqrt(power), np.quantile(np.sqrt(power), 0.98))[:, None] if excitation == "whisper" else 1
    return _overlap_add(made, _HOP)[_HOP:_HOP + len(speech)] * 1.0


def minimum_phase(spectrum: npt.NDArray[np.floating]) -> npt.NDArray[np.complexfloating]:
    """(F, bins) magnitudes → (F, bins) the filter of minimum phase that has their smooth envelope."""
    cepstrum = np.fft.irfft(np.log(np.maximum(spectrum, 1e-5 * spectrum.max() + 1e-12)))  # (F, 2·bins − 2)
    cepstrum[:, 1:_QUEFRENCIES] *= 2
    cepstrum[:, _QUEFRENCIES:] = 0
    return np.exp(np.fft.rfft(cepstrum))


def creaky_pulses(length: int, random: np.random.Generator) -> Sound:
    """(length,) pulses some 45 a second, none in time and none alike: intervals vary by a third, sizes by a half."""
    intervals = SAMPLING_RATE / 45 * random.uniform(0.67, 1.33, 2 + round(length / SAMPLING_RATE * 45 * 1.5))
    places = np.cumsum(intervals).astype(int)
    places = places[places < length]
    pulses = np.zeros(length, np.float32)
    pulses[places] = random.uniform(0.5, 1.5, len(places)) * np.sqrt(SAMPLING_RATE / 45)
    return pulses


def bend_end(speech: Sound, semitones: Sequence[float], seconds: float) -> Sound:
    """The last `seconds` of voice with the pitch moved along `semitones`, points evenly spread over them. As long as before.

    Grains of two periods, cut at the pitch marks there are, are laid down at the marks there shall be.
    """
    track = pitch_track(speech)
    if not np.isfinite(track).any():
        return speech
    end = min(len(speech), 160 * int(np.flatnonzero(np.isfinite(track))[-1]))
    first = max(0, end - round(seconds * SAMPLING_RATE))
    periods = _periods(track, len(speech))[first:]
    marks = _marks(speech[first:], periods)
    ratio = 2 ** (np.interp(np.arange(len(periods)), np.linspace(0, end - first, len(semitones)), semitones) / 12)
    bent = _lay_down(speech[first:], marks, periods, ratio)
    fade = np.minimum(1, np.arange(len(bent)) / 160).astype(np.float32)                   # 10 ms from the old to the new
    return np.concatenate([speech[:first], (1 - fade) * speech[first:] + fade * bent])


def _periods(track: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Samples per period at each sample; octave slips are taken for the median, gaps bridged."""
    middle = np.nanmedian(track)
    good = np.flatnonzero(np.isfinite(track) & (track > middle / 1.5) & (track < middle * 1.5))
    return SAMPLING_RATE / np.interp(np.arange(length) / 160, good, track[good])


def _marks(speech: Sound, periods: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Samples where periods begin: the largest of the first period, then the largest near each place that a period leads to."""
    size = speech * np.sign(np.sum(speech.astype(np.float64) ** 3))  # peaks of one polarity: a period has one of them
    marks = [int(size[:int(periods[0])].argmax())]
    while (here := marks[-1] + periods[marks[-1]]) < len(speech):
        slack = int(periods[marks[-1]] / 10)
        low = int(here) - slack
        marks.append(low + int(size[low:int(here) + slack + 1].argmax()))
    return np.array(marks)


def _lay_down(speech: Sound, marks: npt.NDArray[np.int64], periods: npt.NDArray[np.float64],
              ratio: npt.NDArray[np.float64]) -> Sound:
    """Grains at their new places, the first in time with what comes before."""
    edge = 2 * int(periods.max()) + 2
    padded, out = np.pad(speech, edge), np.zeros(len(speech) + 2 * edge, np.float32)
    place = float(marks[0] - int(periods[0]))
    while place < len(speech):
        here = int(place)
        mark = marks[np.abs(marks - here).argmin()]
        reach = int(periods[mark])
        grain = padded[edge + mark - reach:edge + mark + reach] * np.hanning(2 * reach)
        out[edge + here - reach:edge + here + reach] += grain
        place += periods[mark] / ratio[max(here, 0)]
    return out[edge:-edge]


def _overlap_add(pieces: npt.NDArray[np.floating], hop: int) -> Sound:
    """(F, length), a piece every `hop` samples, length a multiple of hop → their sum."""
    count, length = pieces.shape
    out = np.zeros((count + length // hop, hop), np.float32)
    for part in range(length // hop):
        out[part:part + count] += pieces[:, part * hop:(part + 1) * hop]
    return out.ravel()
