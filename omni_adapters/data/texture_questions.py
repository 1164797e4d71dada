"""Questions about how a clip sounds and what is said in it, four options each; and AudioBench-mini, 200 of them.

    question = ask(clip, "pitch", rng)       # clip.labels has what may be asked of it
    read_questions(audiobench_mini_path())   # 200 of them, as audiobench_mini() builds them

Notable:
- Thirteen categories are about the sound (`about="texture"`), four about the words. Everything is lower-case words between
  blanks, so that `WordTokenizer(vocabulary())` reads it; the options of a question have equally many words.
- AudioBench-mini is built by `audiobench_mini()` from voices and sentences of the test set and committed as bytes that hash to
  `AUDIOBENCH_MINI_SHA256`. In it all four positions are right equally often, and so are the values within a category.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omni_adapters.data.questions import Question
from omni_adapters.data.texture import (
    BACKGROUNDS,
    BEEPS,
    CONTOURS,
    DIGITS,
    LANGUAGES,
    LEVELS,
    NOISE_LEVELS,
    PACES,
    PAUSES,
    PITCHES,
    SPEAKERS,
    STYLES,
    SWEEPS,
    TURNS,
    VOICES,
    WORD_COUNTS,
    WORDS,
    Clip,
    draw,
)
from omni_adapters.files import json_bytes
from omni_adapters.shapes import BadInput, listing

AUDIOBENCH_MINI_SHA256 = "5710dc132b882b9fc5bdb766c23c35a17b47c08f47979743e17bc0b0ac2caa57"
MINI_TEXTURE, MINI_WORDS = 12, 11  # questions a category


@dataclass(frozen=True)
class Category:
    about: str                  # "texture" or "words"
    questions: tuple[str, ...]  # ways to ask
    values: tuple[str, ...]     # what the answer may be; the words themselves in three of the categories about words


CATEGORIES: dict[str, Category] = {
    "speaker": Category("texture", ("who is speaking", "whose voices are these in turn", "is it a man or a woman or both"),
                        tuple(SPEAKERS)),
    "turns": Category("texture", ("how many different voices speak", "how many people take turns"), TURNS),
    "pitch": Category("texture", ("how high is the voice", "what is the pitch of the speaker"), tuple(PITCHES)),
    "pace": Category("texture", ("how fast is the speech", "at what pace are the words said"), tuple(PACES)),
    "loudness": Category("texture", ("how loud is the speech", "at what loudness is it said"), tuple(LEVELS)),
    "style": Category("texture", ("in what style is it said", "how does the voice sound"), tuple(STYLES)),
    "contour": Category("texture", ("what kind of sentence does it sound like", "how does the melody end"), tuple(CONTOURS)),
    "pauses": Category("texture", ("how many pauses are between the words", "how often does the speaker pause"), PAUSES),
    "language": Category("texture", ("what language is spoken", "in which language are the numbers read"), tuple(LANGUAGES)),
    "background": Category("texture", ("what is in the background", "what sounds behind the voice"), tuple(BACKGROUNDS)),
    "noise": Category("texture", ("how much noise is there", "how strong is the noise behind the voice"), tuple(NOISE_LEVELS)),
    "beeps": Category("texture", ("how many beeps are there", "how often does it beep"), BEEPS),
    "tone": Category("texture", ("what does the tone do", "how does the tone move"), SWEEPS),
    "word": Category("words", ("which of these words is said", "which word do you hear"), ()),
    "first_word": Category("words", ("what is the first word", "which word comes first"), ()),
    "last_word": Category("words", ("what is the last word", "which word comes last"), ()),
    "word_count": Category("words", ("how many words are said", "how many words do you hear"), WORD_COUNTS),
}


def ask(clip: Clip, category: str, rng: random.Random, position: int | None = None) -> Question:
    """One of the category's questions about a clip, its options in any order, the right one at `position` (0 to 3) if given.

    Its id is the category's name: in a suite it needs one of its own.
    Refused with BadInput: an unknown category, and one that `clip.labels` does not have.
    """
    if category not in CATEGORIES or category not in clip.labels:
        raise BadInput("ask", f"the category {category!r}", f"one of this clip's: {listing(list(clip.labels), 20)}")
    kind, right = CATEGORIES[category], clip.labels[category]
    wrong = rng.sample(_wrong(category, right, clip.text.split(), rng), 3)
    answer = rng.randrange(4) if position is None else position
    options = (*wrong[:answer], right, *wrong[answer:])
    return Question(category, category, kind.about, rng.choice(kind.questions), options, answer, clip.text, clip=clip)


def questions(clip: Clip, rng: random.Random) -> dict[str, Question]:
    """Category → question, for everything that may be asked of the clip."""
    return {category: ask(clip, category, rng) for category in clip.labels}


def vocabulary() -> list[str]:
    """Every word of questions, options and transcripts, sorted: what a WordTokenizer must know."""
    texts = [text for kind in CATEGORIES.values() for text in (*kind.questions, *kind.values)]
    return sorted({word for text in texts for word in text.split()} | set(WORDS) | set(DIGITS))


def _wrong(category: str, right: str, words: Sequence[str], rng: random.Random) -> list[str]:
    """Three or more; of the first and the last word the other words said, as far as they go, so that order must be heard."""
    if CATEGORIES[category].values:
        return [value for value in CATEGORIES[category].values if value != right]
    unsaid = rng.sample([word for word in WORDS if word not in words], 3)
    if category == "word":
        return unsaid
    said = [word for word in words if word != right]
    return said if len(said) >= 3 else [*said, *unsaid[:3 - len(said)]]


# ---- AudioBench-mini --------------------------------------------------------------------------------------------------------


def audiobench_mini_path() -> Path:
    """The committed file."""
    return Path(__file__).parents[1] / "eval" / "audiobench_mini.jsonl"


def audiobench_mini(seed: int = 0) -> list[Question]:
    """The 200 questions anew: 12 questions in each category about texture, 11 in each about words. Nothing is spoken."""
    rng, found = random.Random(f"audiobench-mini {seed}"), list[Question]()
    for category, kind in CATEGORIES.items():
        count = MINI_TEXTURE if kind.about == "texture" else MINI_WORDS
        values: list[str | None] = [*kind.values] or [None]
        for number in range(count):
            clip = _clip_with(rng, category, values[number % len(values)])
            position = (len(found) + number // 4) % 4 if kind.about == "texture" else len(found) % 4
            found.append(replace(ask(clip, category, rng, position), id=f"{category}-{number:03d}"))
    return found


def question_lines(questions: Iterable[Question]) -> bytes:
    """JSON Lines, equal questions to equal bytes."""
    return b"".join(json_bytes(question.values()) + b"\n" for question in questions)


def _clip_with(rng: random.Random, category: str, value: str | None) -> Clip:
    """The first clip by chance of which the category may be asked, with this answer unless None."""
    while True:
        clip = draw(rng, VOICES["test"], sentences="test")
        if category in clip.labels and value in (None, clip.labels[category]):
            return clip
