"""Local copies of public test sets, read as questions; nothing is downloaded.

MMAU (arXiv:2410.19168; github.com/Sakshi113/MMAU, mmau-test-mini.json of v05.15.25): one JSON array. Read of each row:
    id, audio_id (a path relative to the file, "./test-mini-audios/….wav"), question, choices (2 to 8 texts), answer (the text
    of the right one), task ("sound", "music", "speech") and sub-category.
  Categories are MMAU's 27 sub-categories, grouped by task. Some rows have a choice twice: it is offered once. The answers of
  the other 9,000 questions are withheld, so those rows are refused.

AudioBench (arXiv:2406.16020; github.com/AudioLLMs/AudioBench): its sets are tables on a Hub with the columns context,
instruction, answer, other_attributes, and choices where there are some. Read of a local copy, a JSON array or JSON Lines:
    context or audio   a path relative to the file, or {"path": …} as `datasets` writes undecoded audio
    instruction or question, answer (a text), choices (optional: texts, or one text "(A) … (B) …" as MuChoMusic has them)
    id, category, task (optional; also within other_attributes)
  Rows with choices are scored as choices. Rows without are transcriptions, graded by word error rate; the sets whose free
  answers AudioBench has judged by a language model are not for this. A set is one or the other.

What is scored here is not what the leaderboards score. MMAU matches words of a generated answer to a prompt that lists the
choices, AudioBench has choices judged; here an option's likelihood counts, and no prompt lists them (`scoring`). AudioBench's
word error rates are after Whisper's English normaliser, which also spells numbers one way and contractions out
(`scoring.word_errors` does neither).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_adapters.data.questions import Question, add_question, check_options, text_in
from omni_adapters.files import STRICT, json_object
from omni_adapters.shapes import BadInput

LETTERED = re.compile(r"(?:^|(?<=\s))(\(?)([A-H])([).:])\s+")  # what stands before a choice: "(A) ", "B. ", "C: "


def read_mmau(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a local MMAU file. Raises BadInput, naming the row, for what is not one."""
    where, found = "read_mmau", dict[str, Question]()
    for place, row, folder in _rows(where, path):
        if row.get("answer") in (None, ""):
            raise BadInput(where, f"{place}, without an answer", "a row whose answer is known",
                           "MMAU withholds the answers of its 9,000 test questions: take test-mini")
        answer, choices = text_in(where, place, row, "answer"), row.get("choices")
        options = _options(where, place, _each_once(choices), answer)
        task, kind = text_in(where, place, row, "task"), row.get("sub-category")
        question = Question(text_in(where, place, row, "id"), kind if isinstance(kind, str) and kind else task, task,
                            text_in(where, place, row, "question"), options, options.index(answer),
                            audio=str(folder / text_in(where, place, row, "audio_id")))
        add_question(where, place, found, question)
    return list(found.values())


def read_audiobench(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a local copy of an AudioBench set. Raises BadInput, naming the row, for what is not one."""
    where, found = "read_audiobench", dict[str, Question]()
    for number, (place, row, folder) in enumerate(_rows(where, path)):
        extra = row.get("other_attributes")
        row = (extra if isinstance(extra, dict) else {}) | row
        sound = row.get("context", row.get("audio"))
        audio = text_in(where, place, {"context": sound.get("path") if isinstance(sound, dict) else sound}, "context")
        answer, choices = text_in(where, place, row, "answer"), row.get("choices")
        options: tuple[str, ...] = (answer,)
        if choices:
            lettered = isinstance(choices, str)
            texts = _split(choices) if lettered else choices
            answer = _bare(answer) if lettered and answer not in texts else answer
            options = _options(where, place, texts, answer)
        kind = str(row.get("category") or row.get("task") or ("choice" if choices else "transcription"))
        asked = str(row.get("instruction") or row.get("question") or "")
        question = Question(str(row.get("id") or f"row-{number}"), kind, str(row.get("task") or "audio"), asked, options,
                            options.index(answer), audio=str(folder / audio))
        add_question(where, place, found, question)
    if len({question.is_choice for question in found.values()}) > 1:
        raise BadInput(where, f"{path}, with choices in some rows and none in others", "a set of choices, or of transcriptions",
                       "divide the file")
    return list(found.values())


def _rows(where: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(what names a row, the row, the file's folder) of a JSON array or of JSON Lines."""
    source = Path(path)
    if not source.is_file():
        raise BadInput(where, f"{source}, which is not a file", "a local copy of the set, JSON or JSON Lines")
    content, folder = source.read_bytes(), source.absolute().parent
    if content.lstrip().startswith(b"["):
        try:
            values = STRICT.decode(content.decode())
        except (ValueError, RecursionError) as error:
            raise BadInput(where, f"{source}, which is not JSON ({error!s:.120})", "a JSON array of objects") from None
        lines = [(f"{source}, row {rank}", json.dumps(row).encode()) for rank, row in enumerate(values)]
    else:
        lines = [(f"{source}, line {rank}", line) for rank, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(where, f"{source}, which has no rows", "at least one")
    for place, line in lines:
        yield place, json_object(where, place, line), folder


def _each_once(choices: object) -> object:
    """Texts without those that came before; what is not texts is left for `check_options` to refuse."""
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    return list(dict.fromkeys(choices)) if isinstance(choices, list) and texts else choices


def _options(where: str, place: str, choices: object, answer: str) -> tuple[str, ...]:
    options = check_options(where, place, choices, 2)
    if answer not in options:
        raise BadInput(where, f"{place}, whose answer {answer!r:.80} is no choice", f"one of {list(options)!r:.200}")
    return options


def _split(choices: str) -> list[str]:
    """"(A) Folk (B) Plan C. Live" → ["Folk", "Plan C. Live"]: letters in their order, all written like the first."""
    marks: list[re.Match[str]] = []
    for mark in LETTERED.finditer(choices):
        first = marks[0] if marks else mark
        if mark[2] == "ABCDEFGH"[len(marks)] and (mark[1], mark[3]) == (first[1], first[3]):
            marks.append(mark)
    ends = [*(mark.start() for mark in marks[1:]), len(choices)]
    return [choices[mark.end():end].strip() for mark, end in zip(marks, ends)]


def _bare(answer: str) -> str:
    """"(A) Folk" → "Folk"; what has no letter is left as it is."""
    mark = LETTERED.match(answer)
    return answer[mark.end():].strip() if mark else answer
