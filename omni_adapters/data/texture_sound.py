"""The sound of a `texture.Clip`, from its numbers alone.

    render(clip)                    # (T,) float32 at 16 kHz; equal clips give equal samples

Notable:
- espeak-ng speaks; manner, noise and tones are made here (`data/sounds`), so that they are the same for every voice.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from omni_adapters.data.sounds import (
    SAMPLING_RATE,
    Sound,
    active_rms,
    bend_end,
    limit,
    noise,
    pitch_of,
    revoice,
    silence,
    tones,
    trim,
)
from omni_adapters.data.speech import speak
from omni_adapters.data.texture import BABBLERS, CONTOURS, WORDS, Clip, Tones


def render(clip: Clip) -> Sound:
    """The clip's sound (T,), float32 at 16 kHz, within (-1, 1). Equal clips give equal samples.

    Raises what `speech.speak` raises, MissingExtra without the extra `speech` among it.
    """
    return produce(clip, say(clip))


def say(clip: Clip) -> Sound:
    """The clip's words, part by part: its pace, pitch and contour, neither manner nor level nor anything beside or behind."""
    pieces = []
    for number, part in enumerate(clip.parts):
        last = number == len(clip.parts) - 1
        stop = "." if last and clip.contour == "natural" else ","
        spoken = trim(speak(part.words + stop, voice=clip.language, variant=part.variant, rate=clip.rate, pitch=part.pitch,
                            pitch_range=clip.pitch_range, sampling_rate=SAMPLING_RATE))
        if last and clip.contour != "natural":
            spoken = bend_end(spoken, CONTOURS[clip.contour], min(0.6, 0.75 * len(spoken) / SAMPLING_RATE))
        pieces += [silence(part.gap), spoken]
    return np.concatenate(pieces)


def produce(clip: Clip, speech: Sound) -> Sound:
    """What `say` gave, in the clip's manner and at its level, with what is beside and behind it."""
    random = np.random.Generator(np.random.PCG64(clip.seed))
    if clip.style in ("whisper", "creak"):
        speech = revoice(speech, clip.style, random)
    speech = speech / np.float32(max(active_rms(speech), 1e-6))
    sound = np.concatenate([silence(0.15), *_beside(speech, clip.tones), silence(0.15)])
    if clip.background is not None:
        sound = sound + np.float32(10 ** (-clip.background.snr_db / 20)) * _behind(clip.background.kind, len(sound), random)
    return limit((sound * np.float32(10 ** (clip.level / 20))).astype(np.float32))


def measured_pitch(clip: Clip, speech: Sound) -> float | None:
    """The median of what `say` gave in Hz, where one voice speaks and has a pitch; None for everything else."""
    alone = len({part.variant for part in clip.parts}) == 1 and clip.style in ("normal", "monotone")
    return round(pitch_of(speech), 1) if alone else None


def _beside(speech: Sound, sounds: Tones | None) -> list[Sound]:
    if sounds is None:
        return [speech]
    made = tones(sounds.shape, sounds.count, sounds.hertz)  # RMS 0.7, 3 dB below the speech
    return [speech, silence(0.3), made] if sounds.after else [made, silence(0.3), speech]


def _behind(kind: str, length: int, random: np.random.Generator) -> Sound:
    """(length,) of unit power."""
    if kind != "babble":
        return noise(kind, length, random)
    bed = babble(int(random.integers(4)))
    first = int(random.integers(len(bed)))
    cut = np.take(bed, np.arange(first, first + length), mode="wrap")
    return (cut / np.sqrt(np.mean(cut**2))).astype(np.float32)


@lru_cache(maxsize=4)
def babble(number: int) -> Sound:
    """Six voices at once for some 8 s: (T,), one of as many beds as there are numbers."""
    rng = random.Random(number)
    voices = [speak(" ".join(rng.choices(WORDS, k=16)), variant=variant, rate=rng.randint(130, 190), pitch=rng.randint(30, 70))
              for variant in BABBLERS]
    length = min(map(len, voices))
    return np.sum([voice[:length] / active_rms(voice[:length]) for voice in voices], axis=0).astype(np.float32)
