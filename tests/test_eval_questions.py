"""Questions as they are read: what a file must say, what is refused and where, and the public sets' own formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_adapters.data.audio import save_audio
from omni_adapters.data.questions import Question, read_questions
from omni_adapters.data.texture_questions import audiobench_mini_path
from omni_adapters.data.texture_sound import render
from omni_adapters.eval.public import read_audiobench, read_mmau
from omni_adapters.eval.suite import open_suite
from omni_adapters.shapes import BadInput

ROW: dict[str, Any] = {"id": "pitch-0", "category": "pitch", "about": "texture", "question": "how high", "audio": "a.wav",
                       "options": ["low", "high", "higher", "highest"], "answer": 1, "text": "turn left"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def test_what_a_row_says(tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", ROW, ROW | {"id": "pitch-1", "text": None, "author": "somebody", "answer": 3})
    one, other = read_questions(path)
    assert one == Question("pitch-0", "pitch", "texture", "how high", ("low", "high", "higher", "highest"), 1, "turn left",
                           str(tmp_path / "a.wav"))
    assert one.right == "high" and one.is_choice and other.text is None and other.right == "highest"
    suite = open_suite(str(path))
    assert suite.name == "few" and suite.questions == (one, other)
    assert suite.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_files_waveform_at_any_rate(tmp_path: Path) -> None:
    sound = np.sin(np.arange(1600) / 9).astype(np.float32) / 2
    save_audio(tmp_path / "a.wav", sound, 16_000)
    question, = read_questions(write(tmp_path / "one.jsonl", ROW))
    np.testing.assert_allclose(question.waveform(16_000), sound, atol=1 / 32768)
    assert abs(len(question.waveform(8_000)) - 800) <= 1


def test_a_recipes_waveform_is_what_it_renders(tmp_path: Path) -> None:
    questions = read_questions(audiobench_mini_path())
    assert len(questions) == 200 and all(len(question.options) == 4 and question.text for question in questions)
    clip = questions[0].clip
    assert clip is not None and np.array_equal(questions[0].waveform(16_000), render(clip))
    assert abs(2 * len(questions[0].waveform(8_000)) - len(render(clip))) <= 2
    values = {**clip.values(), "flavour": "sweet"}
    path = write(tmp_path / "bad.jsonl", {key: value for key, value in ROW.items() if key != "audio"} | {"clip": values})
    with pytest.raises(BadInput, match="line 1, where 'clip' has"):
        read_questions(path)


def test_values_are_a_row_again(tmp_path: Path) -> None:
    clip = read_questions(audiobench_mini_path())[7]
    path = write(tmp_path / "few.jsonl", ROW, clip.values(), ROW | {"id": "other", "text": None})
    questions = read_questions(path)
    again = write(tmp_path / "again.jsonl", *(each.values() for each in questions))
    assert questions[1] == clip and read_questions(again) == questions


@pytest.mark.parametrize(("change", "message"), [
    ({"options": ["low", "high", "higher"]}, "a list of 4 texts or more"),
    ({"options": ["low", "high", "low", "higher"]}, "the option low more than once"),
    ({"options": ["low", "high", "", "higher"]}, "none empty"),
    ({"options": "abcd"}, "a list of 4 texts or more"),
    ({"answer": 4}, "'answer' is 4; expected the index of an option, 0 to 3"),
    ({"answer": -1}, "'answer' is -1"),
    ({"answer": True}, "'answer' is True"),
    ({"answer": "high"}, "'answer' is 'high'"),
    ({"clip": {"voice": "f1"}}, "clip and audio; expected exactly one"),
    ({"audio": None}, "neither clip nor audio; expected exactly one"),
    ({"audio": None, "clip": "f1"}, "'clip' is 'f1'"),
    ({"id": "first"}, "whose id 'first' came before"),
    ({"id": " "}, "'id' is ' '"),
    ({"about": "taste"}, "'about' is 'taste'; expected one of texture, words"),
    ({"category": None}, "'category' is None"),
    ({"question": 5}, "'question' is 5"),
    ({"text": ["turn"]}, "'text' is"),
])
def test_refusals_name_the_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", ROW | {"id": "first"}, ROW | change)  # a blank line follows each
    with pytest.raises(BadInput) as error:
        read_questions(path)
    assert f"{path}, line 3" in str(error.value) and message in str(error.value)


def test_no_file_no_rows_no_json(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a file"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="no rows"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "id": 2}')
    with pytest.raises(BadInput, match=r"line 1, which is not JSON .*twice"):
        read_questions(tmp_path / "bad.jsonl")


MMAU = {"id": "3f", "audio_id": "./test-mini-audios/3f.wav", "question": "Who speaks?", "choices": ["Man", "Woman"],
        "answer": "Woman", "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": ["Reasoning"],
        "sub-category": "Acoustic Source Inference", "difficulty": "medium"}  # some rows have a list for a category


def test_mmau(tmp_path: Path) -> None:
    twice = MMAU | {"id": "4a", "choices": ["one", "six", "four", "four"], "answer": "four", "task": "speech"}
    del twice["sub-category"]
    path = tmp_path / "mmau-test-mini.json"
    path.write_text(json.dumps([MMAU, twice]))
    one, other = read_mmau(path)
    assert one == Question("3f", "Acoustic Source Inference", "sound", "Who speaks?", ("Man", "Woman"), 1,
                           audio=str(tmp_path / "test-mini-audios" / "3f.wav"))
    assert other.options == ("one", "six", "four") and other.right == "four" and other.category == other.about == "speech"
    assert open_suite(f"mmau:{path}").name == "mmau-mmau-test-mini"


@pytest.mark.parametrize(("change", "message"), [
    ({"answer": None}, "MMAU withholds"),
    ({"answer": "Child"}, "'Child' is no choice"),
    ({"choices": "Man, Woman"}, "a list of 2 texts or more"),
    ({"choices": ["Woman", "Woman"]}, "a list of 2 texts or more"),
    ({"audio_id": None}, "'audio_id' is None"),
])
def test_mmau_refusals(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mmau.json"
    path.write_text(json.dumps([MMAU | {"id": "first"}, MMAU | change]))
    with pytest.raises(BadInput) as error:
        read_mmau(path)
    assert f"{path}, row 1" in str(error.value) and message in str(error.value)
    path.write_text("[")
    with pytest.raises(BadInput, match="not JSON"):
        read_mmau(path)


def test_audiobench_choices_and_transcriptions(tmp_path: Path) -> None:
    lettered = {"context": {"bytes": None, "path": "m/1.wav"}, "instruction": "Which genre?", "answer": "(B) Jazz. Or not",
                "choices": "(A) Folk (live) (B) Jazz. Or not (C) Blues"}
    listed = {"audio": "2.wav", "question": "Who?", "answer": "Man", "choices": ["Man", "Woman"],
              "other_attributes": {"id": "x", "task": "speech", "category": "speakers"}}
    music, speech = read_audiobench(write(tmp_path / "choices.jsonl", lettered, listed))
    assert music.options == ("Folk (live)", "Jazz. Or not", "Blues") and music.answer == 1 and music.question == "Which genre?"
    assert (music.id, music.category, music.audio) == ("row-0", "choice", str(tmp_path / "m/1.wav"))
    assert (speech.id, speech.category, speech.about, speech.right) == ("x", "speakers", "speech", "Man")
    inner = lettered | {"choices": "A. Plan B: go on B. Bach C. Vitamin A. Or B", "answer": "B. Bach"}
    plan, = read_audiobench(write(tmp_path / "inner.jsonl", inner))
    assert plan.options == ("Plan B: go on", "Bach", "Vitamin A. Or B") and plan.answer == 1
    said = {"context": "1.wav", "instruction": "", "answer": "turn left now"}
    heard, = read_audiobench(write(tmp_path / "words.jsonl", said))
    assert not heard.is_choice and heard.right == "turn left now" and heard.category == "transcription" and not heard.question
    with pytest.raises(BadInput, match="choices in some rows and none in others"):
        read_audiobench(write(tmp_path / "both.jsonl", said, listed))
    with pytest.raises(BadInput, match="line 1, where 'context' is None"):
        read_audiobench(write(tmp_path / "none.jsonl", {"answer": "turn"}))
