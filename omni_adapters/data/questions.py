"""Questions about sound: what is asked, what may be answered, what is right, and where the sound comes from.

One JSON object a line:

    {"id": "pitch-003", "category": "pitch", "about": "texture", "question": "how high is the voice",
     "options": ["low", "high", "very low", "very high"], "answer": 1, "text": "turn left", "clip": {…}}

Notable:
- The sound is a recipe ("clip", which `data.texture` renders, the same samples everywhere) or a file ("audio"), never both.
- "text" is what is said. Questions without it are not asked of who reads instead of hearing.
- A suite is named by the sha256 of its file's bytes: a score belongs to these questions and no others.
- Waveforms are made when they are heard, a batch at a time: a suite of a thousand long clips needs no memory for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omni_adapters.data.audio import Waveform, load_audio, resample
from omni_adapters.data.sounds import SAMPLING_RATE
from omni_adapters.data.texture import Clip
from omni_adapters.data.texture_sound import render
from omni_adapters.files import hex_digest, json_object
from omni_adapters.shapes import BadInput, listing

ABOUT = ("texture", "words")  # how it sounds, what is said
LEAST_OPTIONS = 4


@dataclass(frozen=True)
class Question:
    """One question about one sound.

    id, category: of its own, and of its kind; scores are reported for each category.
    about:    the group of categories it belongs to: "texture" or "words", in public sets their own name of it.
    question: what is asked after the sound; empty where nothing is.
    options:  distinct answers. One alone is no choice but a transcription: the answer is generated and its words are counted.
    answer:   index of the right option.
    text:     what is said, None where nobody wrote it down.
    audio:    path of the sound; None where `clip` is its recipe.
    """

    id: str
    category: str
    about: str
    question: str
    options: tuple[str, ...]
    answer: int
    text: str | None = None
    audio: str | None = None
    clip: Clip | None = None

    @property
    def right(self) -> str:
        return self.options[self.answer]

    @property
    def is_choice(self) -> bool:
        return len(self.options) > 1

    def waveform(self, sampling_rate: int) -> Waveform:
        """(T,) float32 at `sampling_rate` Hz: the file decoded, or the recipe rendered. Raises what those raise."""
        if self.clip is not None:
            return resample(render(self.clip), SAMPLING_RATE, sampling_rate)
        return load_audio(self.audio or "", sampling_rate)

    def values(self) -> dict[str, Any]:
        """JSON values, a line of a question file; an audio path as it is here."""
        sound = {"audio": self.audio} if self.clip is None else {"clip": self.clip.values()}
        return {"id": self.id, "category": self.category, "about": self.about, "question": self.question,
                "options": list(self.options), "answer": self.answer, "text": self.text, **sound}


class Suite(NamedTuple):
    """Questions in a fixed order; `sha256` is of the file they came from."""

    name: str
    questions: tuple[Question, ...]
    sha256: str


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a JSON Lines file, relative audio paths joined to its folder. Blank lines are skipped.

    Refused with BadInput, naming file and line: what `files.json_object` refuses; a missing key or one of another type; an
    `about` that is not in ABOUT; fewer than four options, equal or empty ones; an answer that is not the index of one; an id
    that came before; both "clip" and "audio", or neither; values that are no Clip's. Audio files are not looked at, other keys
    neither.
    """
    source = Path(path)
    if not source.is_file():
        raise BadInput("read_questions", f"{source}, which is not a file", "a JSON Lines file of questions")
    found: dict[str, Question] = {}
    for number, line in enumerate(source.read_bytes().split(b"\n"), start=1):
        if line.strip():
            place = f"{source}, line {number}"
            question = _question(place, json_object("read_questions", place, line), source.absolute().parent)
            add_question("read_questions", place, found, question)
    if not found:
        raise BadInput("read_questions", f"{source}, which has no rows", "one JSON object a line")
    return list(found.values())


def add_question(where: str, place: str, found: dict[str, Question], question: Question) -> None:
    """Under its id, which must be new."""
    if question.id in found:
        raise BadInput(where, f"{place}, whose id {question.id!r:.80} came before", "an id of its own for each question")
    found[question.id] = question


def file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hex_digest(file)


def text_in(where: str, place: str, values: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """The text under `key`; empty only where that is allowed."""
    value = values.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise BadInput(where, f"{place}, where {key!r} is {value!r:.80}", f"a text{'' if empty else ' that is not empty'}")
    return value


def check_options(where: str, place: str, options: object, least: int) -> tuple[str, ...]:
    """Texts, each one once: of two equal options neither could be right alone."""
    texts = options if isinstance(options, Sequence) and not isinstance(options, str) else []
    if len(texts) < least or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadInput(where, f"{place}, where the options are {options!r:.80}", f"a list of {least} texts or more, none empty")
    twice = sorted({text for text in texts if list(texts).count(text) > 1})
    if twice:
        raise BadInput(where, f"{place}, with the option {listing(twice)} more than once", "distinct options")
    return tuple(texts)


def _question(place: str, values: dict[str, Any], folder: Path) -> Question:
    where = "read_questions"
    name, category, about, asked = (text_in(where, place, values, key) for key in ("id", "category", "about", "question"))
    if about not in ABOUT:
        raise BadInput(where, f"{place}, where 'about' is {about!r:.80}", f"one of {listing(ABOUT)}")
    options = check_options(where, place, values.get("options"), LEAST_OPTIONS)
    answer = values.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise BadInput(where, f"{place}, where 'answer' is {answer!r:.80}", f"the index of an option, 0 to {len(options) - 1}")
    text = None if values.get("text") is None else text_in(where, place, values, "text", empty=True)
    return Question(name, category, about, asked, options, answer, text, **_sound(place, values, folder))


def _sound(place: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """{"audio": absolute path} or {"clip": Clip}."""
    given = [key for key in ("clip", "audio") if values.get(key) is not None]
    if len(given) != 1:
        raise BadInput("read_questions", f"{place}, with {' and '.join(given) or 'neither clip nor audio'}",
                       "exactly one of clip and audio")
    if given == ["audio"]:
        return {"audio": str(folder / text_in("read_questions", place, values, "audio"))}
    if not isinstance(values["clip"], dict):
        raise BadInput("read_questions", f"{place}, where 'clip' is {values['clip']!r:.80}", "the values of a Clip, an object")
    try:
        return {"clip": Clip.from_values(values["clip"])}
    except BadInput as error:
        raise BadInput("read_questions", f"{place}, where 'clip' has {error.came}", error.expected, error.todo) from error
