"""What is to be learned from clips of the texture corpus: who is drawn, what is true of each, and how it reads as text.

    clips = draw_evenly(1000, rng, VOICES["train"], sentences="train")
    truths(clips[0])               # {"speaker": "only a man", "turns": "one voice", "pitch": "very low", …}
    screenplay(clips[0], rng)      # ["(silence)", "tiger", "(man)", "tiger", "(pause)", "lemon", …]

Notable:
- A GPT that cannot answer a question from text is slow to answer it from sound: screenplays teach it the questions beforehand.
- `truths` holds more than `Clip.labels`, which leaves out what would make a question too easy or too rare.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from omni_adapters.data.texture import (
    LEVELS,
    PACES,
    PITCH_SETTINGS,
    PITCHES,
    VARIANTS,
    WORDS,
    Background,
    Clip,
    Part,
    draw,
    pitches,
)
from omni_adapters.data.texture_questions import CATEGORIES

TEXTURE = [name for name, kind in CATEGORIES.items() if kind.about == "texture"]
SCENES = {"speaker": "speaker", "turns": "turns", "language": "language"}  # where these are asked; all else is of a sentence
LOUD_NOISE = 10.0       # dB: speech that is less above its background is not described
PAUSE = 0.3             # seconds: shorter silences between phrases are none
HEIGHTS = {95.0: "very low", 150.0: "rather low", 225.0: "rather high", math.inf: "very high"}  # Hz, between the bins
STREWN = ("style", "language", "background", "noise", "loudness", "pitch")  # what each moment of a clip tells


def direction(value: str) -> str:
    """One word that no sentence has: very quiet → (very-quiet)."""
    return f"({value.replace(' ', '-')})"


DIRECTIONS = sorted({direction(value) for name in (*STREWN, "contour", "tone", "pace") for value in CATEGORIES[name].values}
                    | {direction(word) for word in ("man", "woman", "turn", "pause", "beep", "silence")})


def draw_evenly(count: int, rng: random.Random, variants: Sequence[str], *, sentences: str = "train",
                shares: Mapping[str, float] | None = None) -> list[Clip]:
    """Clips as `texture.draw` makes them, each about the category of which fewest have been drawn so far, or fewest for its
    share, which is 1 where `shares` says nothing.

    By chance alone one clip in fourteen may be asked about contour, and every other one about pace.
    """
    drawn, clips = dict.fromkeys([*TEXTURE, "word"], 0), list[Clip]()
    while len(clips) < count:
        name = min(drawn, key=lambda name: drawn[name] / (shares or {}).get(name, 1.0))
        clip = draw(rng, variants, sentences=sentences, scene=SCENES.get(name, "sentence"))
        if name in clip.labels:
            clips.append(clip)
            for label in clip.labels:
                if label in drawn:
                    drawn[label] += 1
    return clips


def truths(clip: Clip) -> dict[str, str]:
    """Texture category → option: the clip's labels, and what is as true but not asked of it."""
    found = {name: value for name, value in clip.labels.items() if name in TEXTURE}
    more: dict[str, str | None] = {}
    if clip.background is None:
        more |= {"noise": "no noise", "background": "nothing"}
    if not _is_loud(clip.background):
        if len({part.variant for part in clip.parts}) == 1:
            more["turns"] = "one voice"
            if clip.style != "whisper":
                more["speaker"] = f"only a {VARIANTS[clip.parts[0].variant].sex}"
            if clip.style == "normal" and clip.contour == "natural":
                more["pitch"] = _bin(hertz(clip, clip.parts[0]), PITCHES)
        more["pace"] = _bin(clip.rate, PACES) if clip.contour == "natural" else None
        more["loudness"] = _bin(clip.level, LEVELS)
    found = {name: value for name, value in more.items() if value is not None} | found
    return {name: found[name] for name in TEXTURE if name in found}


def hertz(clip: Clip, part: Part) -> float:
    """A part's median pitch, to some 3 %."""
    return float(np.interp(part.pitch, PITCH_SETTINGS, pitches(part.variant, clip.pitch_range)))


def screenplay(clip: Clip, rng: random.Random, noted: float = 0.35) -> list[str]:
    """A word or a direction for each tenth of a second of a clip, as a good ear would write it down, one in thirty wrong.

    Pace is how often a word is repeated; turns, beeps and pauses stand where they are, to be counted; what is true all the time
    is strewn between the words. With the chance `noted` each, what is true is noted somewhere in full too: `pitch very low`.
    """
    true, quiet = truths(clip), direction("silence")
    whole = [direction(true[name]) for name in STREWN if name in true]
    if "pace" in true and rng.random() < 0.3:
        whole.append(direction(true["pace"]))

    def moments(count: int, text: str, told: float = 0.1) -> list[str]:
        return [rng.choice(whole) if whole and rng.random() < told else text for _ in range(count)]

    speech: list[str] = []
    for number, part in enumerate(clip.parts):
        if number:
            speech += moments(round(10 * part.gap), direction("pause") if part.gap > PAUSE else quiet)
            speech += [direction("turn")] * (part.variant != clip.parts[number - 1].variant)
        speech += _spoken(clip, part, whole, rng)
    for text in whole:
        if text not in speech and rng.random() < 0.8:
            speech.insert(rng.randrange(len(speech) + 1), text)
    if "contour" in true:
        speech += moments(rng.randint(2, 4), direction(true["contour"]))
    tones: list[str] = []
    if clip.tones is not None and clip.tones.shape == "beep":
        for _ in range(clip.tones.count):
            tones += [quiet, *[direction("beep")] * rng.randint(1, 2)]
    elif clip.tones is not None:
        tones = moments(rng.randint(4, 6), direction(clip.tones.shape), 0.05)
    gap = moments(rng.randint(2, 4), quiet) if tones else []
    after = clip.tones is not None and clip.tones.after
    told = [quiet, *([*speech, *gap, *tones] if after else [*tones, *gap, *speech]), quiet]
    for name, value in true.items():
        if rng.random() < noted:
            told.insert(rng.randrange(len(told) + 1), f"{name} {value}")
    return " ".join(told).split()


def events(clip: Clip) -> list[str]:
    """What is to be heard one after the other: words, a change of voice, each beep, a tone. Without times."""
    told: list[str] = []
    for number, part in enumerate(clip.parts):
        told += [direction("turn")] * (number > 0 and part.variant != clip.parts[number - 1].variant) + part.words.split()
    if clip.tones is None:
        return told
    tones = [direction(clip.tones.shape)] * (clip.tones.count if clip.tones.shape == "beep" else 1)
    return told + tones if clip.tones.after else tones + told


def notes(clip: Clip, rng: random.Random) -> list[str]:
    """What is true of the clip in any order, and its words: the easiest text that answers every question."""
    true = truths(clip)
    return " ".join([*(f"{name} {true[name]}" for name in rng.sample(list(true), len(true))), clip.text]).split()


def _spoken(clip: Clip, part: Part, whole: Sequence[str], rng: random.Random) -> list[str]:
    """The moments of a part: each word at least once, and each direction about its voice."""
    own = [direction(VARIANTS[part.variant].sex)] if clip.style != "whisper" else []
    if clip.style in ("normal", "monotone"):
        own.append(direction(next(height for bound, height in HEIGHTS.items() if hertz(clip, part) < bound)))
    said: list[str] = []
    for text in part.words.split():
        count = max(1, round(600 / clip.rate * rng.uniform(0.85, 1.15)))
        first = len(said)
        for _ in range(count):
            chance = rng.random()
            others: Sequence[str] = own if chance < 0.25 else whole if chance < 0.42 else WORDS if chance < 0.45 else ()
            said.append(rng.choice(others or [text]))
        said[first + rng.randrange(count)] = text
    for text in own:
        if text not in said:
            said.insert(rng.randrange(len(said) + 1), text)
    return said


def _is_loud(background: Background | None) -> bool:
    return background is not None and background.snr_db < LOUD_NOISE


def _bin(value: float, bins: Mapping[str, tuple[float, float]]) -> str | None:
    return next((name for name, (low, high) in bins.items() if low <= value <= high), None)
