"""Speech whose transcript says nothing about how it sounds: who speaks, how high, how fast, in what manner, in what noise.

    clip = draw(random.Random(0), SPLITS["train"]["voices"], sentences="train")
    clip.text, clip.labels          # what is said; what is true of the sound, as options of a question
    render(clip)                    # its sound, from texture_sound

Notable:
- A `Clip` says everything, in JSON values, and is drawn without a sound being made; words are drawn apart from the labels.
- `labels` holds what may be asked of a clip. Whatever would blur a label is left out there: pitch is not asked of whispers.
- Labels that are numbers (pitch, pace, loudness, noise) are bins with gaps between them; pitch in Hz, by what each voice has been
  measured to speak at, at five settings of espeak-ng's pitch.
- A sentence belongs to one of the sets train, valid, test by its hash, and each voice to at most one.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from omni_adapters.data.sounds import TONES
from omni_adapters.files import json_bytes
from omni_adapters.shapes import BadInput, listing

# Common words of two syllables, so that pace is a matter of time alone.
WORDS = """
    apple autumn baker basket bottle bridges button carpet castle cherry chicken circle coffee copper cousin cricket daisy
    desert doctor dolphin dragon engine falcon farmer feather finger flower forest garden giant ginger guitar hammer harbor
    island jacket jungle kettle kitchen lantern lemon lizard magnet mango market meadow mirror monkey morning mountain
    needle ocean onion orange oven paper parrot pencil pepper picnic pillow pirate planet pocket pudding rabbit ribbon
    river robot rocket salad sandwich shadow silver sister spider sugar summer table tiger tower tractor turkey turtle
    valley velvet walnut water whistle window winter wizard zebra
""".split()
DIGITS = "0 1 2 3 4 5 6 7 8 9".split()

PITCH_SETTINGS = (0, 25, 50, 75, 99)
PITCH_RANGE = 60  # espeak-ng's, of a voice in its natural manner
CALM = 25         # where a melody of its own would be in the way


class Voice(NamedTuple):
    """Medians of `pitch_of` over three sentences."""

    sex: str                # apparent: the variant file's own `gender`, or by measured pitch where it has none
    hertz: tuple[int, ...]  # at the five PITCH_SETTINGS, in PITCH_RANGE
    calm: float             # times these in the range CALM


# Left out: whispers, robots, croaks, echoes, and voices that stretch or swallow syllables, for pace would be theirs.
VARIANTS: dict[str, Voice] = {
    "f1": Voice("woman", (119, 145, 184, 239, 308), 0.92), "f2": Voice("woman", (137, 163, 203, 258, 327), 0.90),
    "f3": Voice("woman", (155, 182, 219, 271, 340), 0.89), "f4": Voice("woman", (118, 145, 184, 239, 314), 0.93),
    "linda": Voice("woman", (137, 178, 232, 314, 421), 0.95), "belinda": Voice("woman", (138, 178, 232, 314, 421), 0.95),
    "steph": Voice("woman", (108, 142, 187, 250, 340), 0.96), "steph3": Voice("woman", (108, 142, 186, 250, 340), 0.96),
    "grandma": Voice("woman", (151, 176, 208, 254, 314), 0.86), "Annie": Voice("woman", (203, 221, 250, 291, 356), 0.84),
    "steph2": Voice("woman", (108, 142, 186, 250, 340), 0.96), "f5": Voice("woman", (137, 167, 211, 271, 356), 0.92),
    "aunty": Voice("woman", (73, 114, 170, 250, 356), 1.03), "Alicia": Voice("woman", (172, 206, 258, 320, 416), 0.90),
    "m1": Voice("man", (66, 78, 96, 124, 160), 0.91), "m2": Voice("man", (65, 80, 103, 136, 180), 0.93),
    "m3": Voice("man", (75, 88, 109, 138, 178), 0.90), "m4": Voice("man", (68, 80, 98, 123, 157), 0.89),
    "m6": Voice("man", (70, 83, 104, 134, 176), 0.92), "m7": Voice("man", (80, 92, 111, 138, 174), 0.88),
    "john": Voice("man", (69, 84, 104, 135, 176), 0.92), "ed": Voice("man", (91, 107, 131, 163, 208), 0.89),
    "max": Voice("man", (71, 85, 105, 134, 174), 0.91), "Gene": Voice("man", (63, 77, 98, 127, 167), 0.93),
    "Lee": Voice("man", (61, 77, 98, 130, 172), 0.94), "Mike": Voice("man", (67, 78, 94, 119, 150), 0.89),
    "travis": Voice("man", (77, 88, 107, 133, 172), 0.89), "m5": Voice("man", (71, 85, 105, 134, 174), 0.91),
    "m8": Voice("man", (63, 74, 89, 112, 143), 0.89), "edward": Voice("man", (71, 86, 105, 134, 174), 0.91),
    "norbert": Voice("man", (70, 84, 104, 134, 176), 0.92),
}
VOICES: dict[str, list[str]] = {
    "train": "f1 f2 f3 linda belinda steph steph3 grandma Annie m1 m2 m3 m4 m6 m7 john ed max Gene Lee".split(),
    "valid": "f4 steph2 Mike travis".split(),
    "test": "f5 aunty Alicia m5 m8 edward norbert".split(),
}
BABBLERS = "antonio anika pablo Andrea ian klatt3".split()  # behind a speaker, in no set

# The values of the texture labels, as options of a question; those of a label have as many words each. Pitches are in Hz.
LANGUAGES = {"english": "en-us", "spanish": "es", "german": "de", "mandarin": "cmn"}
PITCHES = {"very low": (66.0, 88.0), "rather low": (108.0, 135.0), "rather high": (168.0, 205.0), "very high": (245.0, 325.0)}
PACES = {"very slow": (80, 88), "rather slow": (130, 140), "rather fast": (208, 224), "very fast": (335, 360)}  # words a minute
LEVELS = {"very quiet": (-51.0, -48.0), "rather quiet": (-40.0, -37.0), "rather loud": (-29.0, -26.0),
          "very loud": (-18.0, -15.0)}  # dBFS
STYLES = {"normal": "normal", "whispered": "whisper", "croaky": "creak", "monotone": "monotone"}
CONTOURS = {"question": (0, 0, 4, 9), "statement": (0, -2, -6, -8), "exclamation": (7, 8, 4, -1, -6),
            "unfinished": (0, 0, 0, 0)}  # semitones over the end
NOISE_LEVELS = {"no noise": None, "faint noise": (25.0, 28.0), "moderate noise": (11.0, 14.0), "strong noise": (-2.0, 1.0)}  # dB
BACKGROUNDS = {"nothing": None, "hiss": "hiss", "humming": "hum", "crackling": "crackle", "babble": "babble"}
SWEEPS = ("rising", "falling", "steady", "warbling")
SPEAKERS = {"only a man": ("man",), "only a woman": ("woman",), "man then woman": ("man", "woman"),
            "woman then man": ("woman", "man")}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
TURNS = tuple(f"{number} voice" if number == "one" else f"{number} voices" for number in NUMBERS[1:5])
PAUSES = tuple(f"{number} pause" if number == "one" else f"{number} pauses" for number in NUMBERS[:4])
BEEPS = tuple(f"{number} beep" if number == "one" else f"{number} beeps" for number in NUMBERS[1:5])
WORD_COUNTS = tuple(f"{number} words" for number in NUMBERS[3:7])

NATURAL = {"man": (80.0, 140.0), "woman": (175.0, 300.0)}  # Hz, where nobody is asked about pitch
BENT = {"man": (95.0, 140.0), "woman": (175.0, 280.0)}      # Hz, where the melody falls by nine semitones
SLOTS = (("man", (70.0, 88.0)), ("man", (116.0, 136.0)), ("woman", (170.0, 200.0)), ("woman", (260.0, 315.0)))  # Hz, of turns
RANGES: dict[str, list[float]] = {
    "words": [3, 6],          # of a sentence
    "rate": [130, 220],       # words a minute, where pace is not asked
    "level": [-42.0, -17.0],  # dBFS, where loudness is not asked
    "snr": [18.0, 30.0],      # dB of a background that is not asked
}
SCENES = {"sentence": 0.70, "speaker": 0.09, "turns": 0.11, "language": 0.10}  # shares
SETS = {"test": (0, 1), "valid": (1, 2), "train": (2, 10)}  # tenths of all sentences


@dataclass(frozen=True)
class Part:
    """What one speaker says at a stretch: `gap` seconds after the part before."""

    variant: str
    words: str
    pitch: int  # espeak-ng's, 0 to 99
    gap: float = 0.0


@dataclass(frozen=True)
class Background:
    kind: str      # hiss, hum, crackle, babble
    snr_db: float  # against the speech where it sounds


@dataclass(frozen=True)
class Tones:
    shape: str    # beep, rising, falling, steady, warbling
    count: int
    hertz: float
    after: bool   # the speech, else before it


@dataclass(frozen=True)
class Clip:
    """A sound, described so that `render` makes it: JSON values throughout, see `values`.

    labels: category → the true option, for all that may be asked of it.
    seed:   of everything random in the sound itself.
    """

    text: str
    parts: tuple[Part, ...]
    language: str     # a key of `speech.voices()`
    rate: int         # words a minute
    pitch_range: int  # espeak-ng's, 0 to 99
    level: float      # dBFS, RMS of the speech where it sounds
    style: str        # normal, whisper, creak, monotone
    contour: str      # natural, or a key of CONTOURS
    background: Background | None
    tones: Tones | None
    seed: int
    labels: dict[str, str] = field(default_factory=dict, hash=False)

    def values(self) -> dict[str, Any]:
        """JSON values that `from_values` reads: equal clips, equal values."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Clip:
        """The clip that gave these values. Refused with BadInput: missing or unknown keys, at any depth, values of another type,
        a style, contour, noise or tone that nobody knows, no parts, a gap or a count below what can be.
        """
        where = "Clip.from_values"
        try:
            parts = tuple(_record(where, Part, part) for part in values["parts"])
            background = None if values["background"] is None else _record(where, Background, values["background"])
            sounds = None if values["tones"] is None else _record(where, Tones, values["tones"])
        except (KeyError, TypeError) as error:
            raise BadInput(where, f"values in which {error} is missing or of another kind", "what Clip.values gave") from error
        clip: Clip = _record(where, cls, {**values, "parts": parts, "background": background, "tones": sounds})
        _check_words(clip)
        return clip

    def name(self) -> str:
        """16 hex digits that stand for everything above; equal clips, equal names."""
        return hashlib.sha256(json_bytes(self.values())).hexdigest()[:16]


def _record(where: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    if set(values) != names:
        raise BadInput(where, f"{kind.__name__} with keys {listing(sorted(set(values) ^ names))} missing or unknown",
                       f"exactly {listing(sorted(names), 12)}")
    for item in fields(kind):
        if not _is_of(values[item.name], item.type):
            raise BadInput(where, f"{kind.__name__} in which {item.name} is {values[item.name]!r:.60}", str(item.type))
    return kind(**values)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is what a field's annotation says; records within were looked at before."""
    if kind == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return kind not in ("str", "int", "bool") or type(value).__name__ == kind


def _check_words(clip: Clip) -> None:
    """What `render` would pass over in silence, or fail at."""
    known = {"style": (clip.style, STYLES.values()), "contour": (clip.contour, ("natural", *CONTOURS)),
             "background": (clip.background and clip.background.kind, (None, *filter(None, BACKGROUNDS.values()))),
             "tones": (clip.tones and clip.tones.shape, (None, *TONES))}
    for name, (value, values) in known.items():
        if value not in values:
            raise BadInput("Clip.from_values", f"the {name} {value!r}", f"one of {listing([str(each) for each in values])}")
    gaps = [part.gap for part in clip.parts]
    if not clip.parts or min(gaps) < 0 or (clip.tones is not None and clip.tones.count < 1) or clip.seed < 0 or clip.level > 0:
        raise BadInput("Clip.from_values", f"{len(gaps)} parts with gaps of {gaps!r:.60} s, seed {clip.seed}, {clip.level} dBFS",
                       "one part or more, gaps, counts and seeds that are not negative, a level of at most 0")


# ---- drawing ----------------------------------------------------------------------------------------------------------------


def sentence_set(text: str) -> str:
    """train, valid or test: the set that a sentence belongs to, by its hash."""
    tenth = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10
    return next(name for name, (first, end) in SETS.items() if first <= tenth < end)


def draw(rng: random.Random, variants: Sequence[str], *, sentences: str = "train", ranges: Mapping[str, Sequence[float]] = RANGES,
         languages: Sequence[str] = tuple(LANGUAGES), scene: str | None = None) -> Clip:
    """A clip by chance: its speakers from `variants`, its words from the set `sentences`; no sound is made.

    scene: "sentence" (one speaker; most categories), "speaker", "turns", "language"; by chance unless given.
    Refused with BadInput: variants that are not in `VARIANTS`, or without two men and two women; an unknown scene or set.
    """
    _check_draw(variants, sentences, scene, languages)
    studio = _Studio(rng, list(variants), sentences, {**RANGES, **ranges}, list(languages))
    chosen = scene or rng.choices(list(SCENES), list(SCENES.values()))[0]
    return {"sentence": _sentence, "speaker": _speaker, "turns": _turns, "language": _language}[chosen](studio)


def _check_draw(variants: Sequence[str], sentences: str, scene: str | None, languages: Sequence[str]) -> None:
    unknown = [variant for variant in variants if variant not in VARIANTS]
    sexes = [VARIANTS[variant].sex for variant in dict.fromkeys(variants) if variant in VARIANTS]
    if unknown or min(sexes.count("man"), sexes.count("woman")) < 2:
        raise BadInput("draw", f"the voices {listing(list(variants), 40) or 'none'}", "two men and two women or more, all of "
                       "them of texture.VARIANTS")
    if sentences not in SETS or scene not in {None, *SCENES} or not set(languages) <= set(LANGUAGES):
        raise BadInput("draw", f"sentences {sentences!r}, scene {scene!r}, languages {listing(list(languages))}",
                       f"{listing(list(SETS))}; {listing(list(SCENES))}, or None; some of {listing(list(LANGUAGES))}")


@dataclass
class _Studio:
    """What the scenes draw from."""

    rng: random.Random
    variants: list[str]
    sentences: str
    ranges: dict[str, Sequence[float]]
    languages: list[str]

    def between(self, low: float, high: float) -> float:
        return round(self.rng.uniform(low, high), 3)

    def free(self, name: str) -> float:
        low, high = self.ranges[name]
        return self.between(low, high)

    def words(self, least: int = 3) -> list[str]:
        """Any words in any order, of this set's sentences; how many is drawn before them."""
        low, high = (int(bound) for bound in self.ranges["words"])
        count = self.rng.randint(max(low, least), max(high, least))
        return self._of_this_set(lambda: self.rng.sample(WORDS, count))

    def digits(self) -> list[str]:
        count = self.rng.randint(4, 6)
        return self._of_this_set(lambda: self.rng.choices(DIGITS, k=count))

    def _of_this_set(self, sample: Callable[[], list[str]]) -> list[str]:
        while sentence_set(" ".join(words := sample())) != self.sentences:
            pass
        return words

    def voice(self, hertz: Mapping[str, tuple[float, float]], pitch_range: int, without: Sequence[str] = ()) -> tuple[str, int]:
        """A variant that can speak at its sex's `hertz` (sexes that are not there do not speak), and its pitch setting there."""
        able = []
        for variant in self.variants:
            sex, reach = VARIANTS[variant].sex, pitches(variant, pitch_range)
            low, high = hertz.get(sex, (math.inf, 0.0))
            if variant not in without and max(low, reach[0]) * 1.08 < min(high, reach[-1]):
                able.append((variant, max(low, reach[0]), min(high, reach[-1])))
        if not able:
            raise BadInput("draw", f"voices of which no other speaks at {dict(hertz)} Hz", "voices that reach all pitches",
                           "add some of texture.VOICES")
        variant, low, high = self.rng.choice(able)
        aim = math.exp(self.rng.uniform(math.log(low), math.log(high)))
        return variant, round(float(np.interp(math.log(aim), np.log(pitches(variant, pitch_range)), PITCH_SETTINGS)))

    def loudness(self, labels: dict[str, str]) -> float:
        if self.rng.random() < 0.5:
            return self.free("level")
        labels["loudness"], bounds = self.rng.choice(list(LEVELS.items()))
        return self.between(*bounds)

    def faint_background(self) -> Background | None:
        """One that disturbs no label, in half of all clips."""
        if self.rng.random() < 0.5:
            return None
        return Background(self.rng.choice(("hiss", "hum", "crackle", "babble")), self.free("snr"))

    def seed(self) -> int:
        return self.rng.randrange(2**31)


def pitches(variant: str, pitch_range: int) -> list[float]:
    """Median Hz of a variant at the five PITCH_SETTINGS, to some 3 %; a flatter melody (0 too) lies lower, as in CALM."""
    voice = VARIANTS[variant]
    return [hertz * (1.0 if pitch_range == PITCH_RANGE else voice.calm) for hertz in voice.hertz]


def _sentence(studio: _Studio) -> Clip:
    """One speaker, words, and one or more of: pitch, pace, loudness, style, contour, pauses, background, noise, beeps, tone."""
    rng, labels = studio.rng, dict[str, str]()
    asked_of_noise = rng.choices(("", "background", "noise"), (7, 2, 2))[0]
    quiet = not asked_of_noise
    style = rng.choices(list(STYLES), (11, 3, 3, 3))[0]
    contour = rng.choice(list(CONTOURS)) if style == "normal" and rng.random() < 0.35 else "natural"
    melody = 0 if style == "monotone" else PITCH_RANGE if contour == "natural" else CALM
    if style == "normal" and contour == "natural":
        pitch, bounds = rng.choice(list(PITCHES.items()))
        variant, setting = studio.voice({"man": bounds, "woman": bounds}, PITCH_RANGE)
        _label(labels, "pitch", pitch, quiet)
    else:
        variant, setting = studio.voice(NATURAL if contour == "natural" else BENT, melody)
    _label(labels, "style", style, quiet and contour == "natural" and (style != "normal" or rng.random() < 0.4))
    _label(labels, "contour", contour, quiet and contour != "natural")
    pace, rates = rng.choice(list(PACES.items())[:4 if contour == "natural" else 3])  # no melody fits into very fast words
    _label(labels, "pace", pace, asked_of_noise != "noise" and contour == "natural")
    background = _background(studio, asked_of_noise, labels)
    level = studio.loudness(labels) if asked_of_noise != "noise" else studio.free("level")
    words = studio.words()
    parts = _with_pauses(studio, variant, setting, words, labels if quiet else {})
    sounds = _tones(studio, labels) if quiet else None
    if quiet and style in ("normal", "monotone") and pace != "very fast":
        labels |= _words(rng, words)
    return Clip(" ".join(words), parts, LANGUAGES["english"], rng.randint(*rates), melody, level, STYLES[style], contour,
                background, sounds, studio.seed(), labels)


def _label(labels: dict[str, str], category: str, value: str, may_be_asked: bool) -> None:
    if may_be_asked:
        labels[category] = value


def _background(studio: _Studio, asked: str, labels: dict[str, str]) -> Background | None:
    rng = studio.rng
    if not asked:
        return studio.faint_background()
    if asked == "background":
        labels["background"], kind = rng.choice(list(BACKGROUNDS.items()))
        return None if kind is None else Background(kind, studio.between(6, 14))
    labels["noise"], bounds = rng.choice(list(NOISE_LEVELS.items()))
    return None if bounds is None else Background(rng.choice(("hiss", "hum", "babble")), studio.between(*bounds))


def _with_pauses(studio: _Studio, variant: str, setting: int, words: Sequence[str], labels: dict[str, str]) -> tuple[Part, ...]:
    """None to three silences of 0.4 to 0.6 s, where there are words enough for any number of them."""
    if len(words) < 4 or studio.rng.random() < 0.4:
        return (Part(variant, " ".join(words), setting),)
    pauses = studio.rng.randrange(4)
    labels["pauses"] = PAUSES[pauses]
    return tuple(Part(variant, phrase, setting, studio.between(0.4, 0.6) if number else 0.0)
                 for number, phrase in enumerate(phrases(studio.rng, words, pauses + 1)))


def phrases(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """`words` in turn, cut into `count` phrases of one or more."""
    cuts = [0, *sorted(rng.sample(range(1, len(words)), count - 1)), len(words)]
    return [" ".join(words[first:end]) for first, end in zip(cuts, cuts[1:])]


def _tones(studio: _Studio, labels: dict[str, str]) -> Tones | None:
    rng = studio.rng
    asked = rng.choices(("", "beeps", "tone"), (4, 3, 3))[0]
    if not asked:
        return None
    hertz, after = studio.between(450, 900), rng.random() < 0.5
    if asked == "beeps":
        count = rng.randint(1, 4)
        labels["beeps"] = BEEPS[count - 1]
        return Tones("beep", count, hertz, after)
    labels["tone"] = rng.choice(SWEEPS)
    return Tones(labels["tone"], 1, hertz, after)


def _words(rng: random.Random, words: Sequence[str]) -> dict[str, str]:
    return {"word": rng.choice(words), "first_word": words[0], "last_word": words[-1], "word_count": WORD_COUNTS[len(words) - 3]}


def _speaker(studio: _Studio) -> Clip:
    """Two phrases, by one or by a man and a woman."""
    rng = studio.rng
    label, sexes = rng.choice(list(SPEAKERS.items()))
    voices = [studio.voice({sex: NATURAL[sex]}, CALM) for sex in sexes]
    return _in_turn(studio, {"speaker": label}, voices * (3 - len(voices)), 3)


def _turns(studio: _Studio) -> Clip:
    """One to four speakers, each of whom is told from the others by a fifth or more; one alone makes as many stops."""
    rng = studio.rng
    count = rng.randint(1, 4)
    voices: list[tuple[str, int]] = []
    for sex, hertz in rng.sample(SLOTS, count):
        voices.append(studio.voice({sex: hertz}, CALM, without=[variant for variant, _ in voices]))
    return _in_turn(studio, {"turns": TURNS[count - 1]}, voices * rng.randint(2, 4) if count == 1 else voices, 4)


def _in_turn(studio: _Studio, labels: dict[str, str], voices: Sequence[tuple[str, int]], least: int) -> Clip:
    words, rate, rng = studio.words(least), round(studio.free("rate")), studio.rng
    parts = tuple(Part(variant, phrase, setting, studio.between(0.1, 0.22) if number else 0.0)
                  for number, ((variant, setting), phrase) in enumerate(zip(voices, phrases(rng, words, len(voices)))))
    level = studio.loudness(labels)
    return Clip(" ".join(words), parts, LANGUAGES["english"], rate, CALM, level, "normal", "natural", studio.faint_background(),
                None, studio.seed(), {**labels, **_words(rng, words)})


def _language(studio: _Studio) -> Clip:
    """Digits, which are written alike in every language."""
    labels = {"language": studio.rng.choice(studio.languages)}
    digits, (variant, setting) = studio.digits(), studio.voice(NATURAL, PITCH_RANGE)
    level = studio.loudness(labels)
    text, code, rate = " ".join(digits), LANGUAGES[labels["language"]], round(studio.free("rate"))
    return Clip(text, (Part(variant, text, setting),), code, rate, PITCH_RANGE, level, "normal", "natural",
                studio.faint_background(), None, studio.seed(), labels)
