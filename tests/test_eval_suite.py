"""Five systems on a GPT that has learned to hear: it is right with its own sound and lost with another's.

Four pitches have names. A tiny GPT and its projector learn in seconds to say which one sounds; what it then says with another's
sound is that sound's name, which `exchange` makes sure is the wrong one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from corpus import tone
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters import OmniGPT, Projector
from omni_adapters.anatomy import loss_of
from omni_adapters.cli import main
from omni_adapters.data.audio import save_audio
from omni_adapters.data.questions import Question, read_questions
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.eval.cascade import Cascade
from omni_adapters.eval.suite import ask, clashes, exchange, open_suite, turns_of
from omni_adapters.lora import lora_disabled
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, save_reference
from omni_adapters.training.turns import Turns

NAMES = ("do", "mi", "so", "ti")
HZ = dict(zip(NAMES, (260.0, 520.0, 1040.0, 2080.0)))
WORDS = [*NAMES, "which", "tone", "of", "those"]


class Planted(NamedTuple):
    folder: Path  # gpt, adapter.safetensors, eight.jsonl
    omni: OmniGPT
    turns: Turns
    questions: list[Question]

    def options(self, *more: str) -> list[str]:
        return ["eval", "--suite", str(self.folder / "eight.jsonl"), "--reference", str(self.folder / "gpt"),
                "--adapter", str(self.folder / "adapter.safetensors"), *more]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    rows = [row(folder, number) for number in range(8)]
    (folder / "eight.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    omni, turns = trained(folder)
    return Planted(folder, omni, turns, read_questions(folder / "eight.jsonl"))


def row(folder: Path, number: int) -> dict[str, Any]:
    """Two categories of four questions; the sounds of each are the four tones, and one question has no transcript."""
    name = NAMES[number % 4]
    save_audio(folder / f"{number}.wav", sound(name, 0.1 + 0.02 * number), 16_000)
    options = [*NAMES[number % 3:], *NAMES[:number % 3]]
    return {"id": f"q{number}", "category": ("low", "long")[number // 4], "about": ("texture", "words")[number // 4],
            "question": "which tone", "options": options, "answer": options.index(name), "audio": f"{number}.wav",
            **({"text": f"{name} tone"} if number else {})}


def sound(name: str, seconds: float) -> np.ndarray:
    return tone(HZ[name], seconds).astype(np.float32)


def trained(folder: Path) -> tuple[OmniGPT, Turns]:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=64, vocab_size=len(SPECIALS) + len(WORDS), n_layer=1, n_head=2, n_kv_head=1, n_embd=32))
    turns, encoder = Turns(WordTokenizer(WORDS)), LogMelEncoder()
    inputs = encoder.preprocess([torch.from_numpy(sound(name, seconds)) for name in NAMES for seconds in (0.1, 0.15, 0.25)])
    encoder.fit_statistics(inputs)
    omni = OmniGPT(gpt, (encoder, Projector(80, 32, 32, stack=4, zero_init=False)), insert_at=turns.insert_at)
    learning = [parameter.requires_grad_() for parameter in (*gpt.parameters(), *omni.projector.parameters())]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    idx, targets = turns.batch([{"question": "which tone", "answer": name, "text": ""} for name in NAMES for _ in range(3)])
    for _ in range(120):
        loss = loss_of(omni(idx, targets, audio_inputs=inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    gpt.requires_grad_(False)
    save_reference(folder / "gpt", gpt, WORDS)
    omni.save_adapter(folder / "adapter.safetensors")
    return omni, turns


def test_right_with_its_own_sound_lost_with_anothers(planted: Planted) -> None:
    heard: list[int] = []

    def recognise(clips: Any) -> list[str]:
        heard.extend(len(clip) for clip in clips)
        return ["which strange tone"] * len(clips)

    planted.omni.train()
    lines: list[str] = []
    answers = ask(planted.omni, planted.turns, planted.questions, Cascade(recognise), max_slots=60, say=lines.append)
    assert planted.omni.training and lines[-1] == "8 of 8 sounds heard"
    points = {system: [None if each is None else each.points for each in graded] for system, graded in answers.graded.items()}
    assert points["overall"] == [1] * 8 and points["shuffled"] == [0] * 8
    assert points["text_oracle"][0] is None and None not in points["text_oracle"][1:]
    assert len(heard) == 8 and answers.num_dropped == {"text_oracle": 0, "cascade": 8}  # "strange" is no word of this GPT
    said = [each.said for each in answers.graded["shuffled"] if each is not None]
    other = exchange(planted.questions)
    assert [question.options[index] for question, index in zip(planted.questions, said)] \
        == [planted.questions[number].right for number in other]
    assert set(ask(planted.omni, planted.turns, planted.questions).graded) == {"overall", "shuffled", "blank", "text_oracle"}


def test_a_blank_tells_nothing(planted: Planted) -> None:
    """Equal silences get one answer, whatever is asked about; here they differ in length alone."""
    blank = ask(planted.omni, planted.turns, planted.questions).graded["blank"]
    said = Counter(question.options[int(each.said)] for question, each in zip(planted.questions, blank) if each is not None)
    assert len(said) == 1 and sum(each.points for each in blank if each is not None) == 2  # two of eight sound like that name


def test_answers_do_not_hang_on_batches(planted: Planted) -> None:
    whole = ask(planted.omni, planted.turns, planted.questions)
    assert ask(planted.omni, planted.turns, planted.questions, max_slots=1) == whole
    assert ask(planted.omni, planted.turns, planted.questions[::-1]).graded["overall"] == whole.graded["overall"][::-1]


def test_readers_have_no_lora(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA the ear may answer otherwise; who reads is the GPT as it came."""
    before = ask(planted.omni, planted.turns, planted.questions)
    with a_copy(planted) as omni:
        omni.add_lora(4)
        for layer in omni.lora():
            torch.nn.init.normal_(layer.lora_b, std=3.0)
        after = ask(omni, planted.turns, planted.questions)
        assert after.graded["text_oracle"] == before.graded["text_oracle"] and after.graded["overall"] != before.graded["overall"]
        with lora_disabled(omni.gpt):
            assert ask(omni, planted.turns, planted.questions).graded == before.graded


@contextmanager
def a_copy(planted: Planted) -> Iterator[OmniGPT]:
    from omni_adapters.training.hosts import open_host

    omni = OmniGPT.load_adapter(planted.folder / "adapter.safetensors", open_host("reference", planted.folder / "gpt").gpt)
    yield omni
    omni.remove()


def test_transcriptions_are_graded_by_their_words(planted: Planted) -> None:
    said = [Question(f"t{number}", "said", "words", "which tone", (f"{NAMES[number % 4]} of",), 0, "do", question.audio)
            for number, question in enumerate(planted.questions)]
    answers = ask(planted.omni, planted.turns, said, Cascade(lambda clips: ["do of"] * len(clips)), max_answer=3)
    assert set(answers.graded) == {"overall", "shuffled", "blank", "cascade"}
    right = [each for each in answers.graded["overall"] if each is not None]
    assert [each.said for each in right] == [NAMES[number % 4] for number in range(8)]  # one of two words, as it has learned
    assert all((each.points, each.out_of) == (1, 2) for each in right)
    assert all(each is not None and each.points == 2 for each in answers.graded["shuffled"])
    assert [each.points for each in answers.graded["cascade"] if each is not None] == [0, 1, 1, 1] * 2


def test_what_is_refused(planted: Planted) -> None:
    one, other, *_ = planted.questions
    choice = Question("q", "k", "words", "which", ("do",), 0, audio=one.audio)
    with pytest.raises(BadInput, match="at least two"):
        ask(planted.omni, planted.turns, [one])
    with pytest.raises(BadInput, match="choices and transcriptions"):
        ask(planted.omni, planted.turns, [one, choice])
    with pytest.raises(BadInput, match="row of q: got the word lamp"):
        ask(planted.omni, planted.turns, [one, Question("q", "k", "words", "which lamp", one.options, 0, audio="none.wav")])
    with pytest.raises(BadInput, match="has no words"):
        ask(planted.omni, planted.turns, [choice, Question("r", "k", "words", "which", (" ",), 0, audio=one.audio)])
    with pytest.raises(BadInput, match=r"the options do, do  of q, which the tokenizer writes alike"):
        ask(planted.omni, planted.turns, [one, Question("q", "k", "words", "which", ("do", "mi", "do "), 0, audio=one.audio)])
    with pytest.raises(BadInput, match=r"1 audio files that are not there, none\.wav the first"):
        ask(planted.omni, planted.turns, [one, Question("q", "k", "words", "which", one.options, 0, audio="none.wav")])
    with pytest.raises(BadInput, match="plain turns for an adapter that hears elsewhere"):
        ask(planted.omni, Turns(planted.turns.tokenizer, "plain"), [one, other])
    assert turns_of(planted.omni, planted.turns.tokenizer).form == "chat"


def test_every_module_is_left_in_its_mode(planted: Planted) -> None:
    """A GPT in eval whose OmniGPT never was: dropout would come back with the next answer."""
    planted.omni.train()
    planted.omni.gpt.eval()
    before = [module.training for module in planted.omni.modules()]
    ask(planted.omni, planted.turns, planted.questions)
    assert True in before and not planted.omni.gpt.training and [module.training for module in planted.omni.modules()] == before


KINDS = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abcd")), min_size=2, max_size=24)


@given(KINDS)
def test_every_question_gets_anothers_sound(kinds: list[tuple[str, str]]) -> None:
    questions = [Question(str(number), kind, "words", "", (right, "other"), 0, audio=str(number))
                 for number, (kind, right) in enumerate(kinds)]
    other = exchange(questions)
    assert all(number != partner for number, partner in enumerate(other))
    for kind, count in Counter(kind for kind, _ in kinds).items():
        numbers = [number for number, question in enumerate(questions) if question.category == kind]
        if count == 1:
            continue
        assert sorted(other[number] for number in numbers) == numbers  # a permutation of the category
        commonest = max(Counter(questions[number].right for number in numbers).values())
        kept = sum(questions[number].right == questions[other[number]].right for number in numbers)
        assert kept == max(0, 2 * commonest - count)  # no exchange can do better
    if len({right for _, right in kinds}) > 1:
        alone = [number for number, (kind, _) in enumerate(kinds) if Counter(kind for kind, _ in kinds)[kind] == 1]
        assert all(questions[number].right != questions[other[number]].right for number in alone)


def test_a_sound_that_two_questions_share_is_exchanged_with_a_third() -> None:
    asked = [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    questions = [Question(str(n), "k", "words", "", (right, "other"), 0, audio=audio) for n, (right, audio) in enumerate(asked)]
    other = exchange(questions)
    assert all(questions[n].audio != questions[partner].audio for n, partner in enumerate(other))


def test_a_large_category_with_one_answer_in_the_majority_is_exchanged_at_once() -> None:
    """A rotation by the commonest answer's count is the best there is: 2,000 questions are not compared with all others."""
    questions = [Question(str(n), "k", "words", "", ("yes", "no"), int(n % 10 > 5), audio=str(n)) for n in range(2000)]
    with mock.patch("omni_adapters.eval.suite.clashes", wraps=clashes) as compared:
        other = exchange(questions)
    assert compared.call_count == 1
    assert sum(questions[n].right == questions[partner].right for n, partner in enumerate(other)) == 2 * 1200 - 2000


def test_the_command(planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the recogniser in its two processes."""
    out = tmp_path / "runs" / "eight.json"
    assert main(planted.options("--out", str(out))) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["overall"] == {"accuracy": 1.0, "ci95": [1.0, 1.0], "num_questions": 8}
    assert report["shuffled"]["accuracy"] == 0 and report["text_oracle"]["num_questions"] == 7
    assert report["cascade"]["num_questions"] == 8 and all(isinstance(each["transcript"], str) for each in report["answers"])
    assert report["questions_sha256"] == open_suite(str(planted.folder / "eight.jsonl")).sha256
    assert report["command"].startswith("omni-adapters eval --suite") and report["seconds"] > 0
    assert set(report["per_category"]) == {"low", "long"} and set(report["by_about"]) == {"texture", "words"}
    assert out.with_suffix(".png").is_file() and "recogniser" in printed and str(out) in printed


def test_the_command_without_a_recogniser(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(planted.options("--no-cascade", "--encoder", "log_mel", "--max-slots", "50")) == 0
    report = json.loads((tmp_path / "runs" / "eight.json").read_text())
    assert report["cascade"] is None and report["overall"]["accuracy"] == 1


@pytest.mark.parametrize(("change", "message"), [
    (["--suite", "mmau:none.json"], "none.json, which is not a file"),
    (["--out", "report.txt"], "ends in .json"),
    (["--context", "clip"], "--context clip without --encoder"),
    (["--layer", "all"], "--layer all without --encoder"),
])
def test_the_command_refuses(planted: Planted, change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(planted.options("--no-cascade", *change)) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_imports_no_evaluation() -> None:
    code = "import sys, omni_adapters.cli; print([m for m in sys.modules if m.split('.')[-1] in ('eval', 'jiwer', 'matplotlib')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
