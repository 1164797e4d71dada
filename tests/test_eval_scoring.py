"""Scores against the sum written out, alone against in a batch; word errors as people count them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_validation import omni
from torch import Tensor

from omni_adapters import OmniGPT, Projector
from omni_adapters.data.questions import Question
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.eval.scoring import batches, best, hear, option_scores, transcribe, word_errors
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import WordTokenizer
from omni_adapters.training.turns import Turns

OPTIONS = ("left", "left lamp", "right now lamp", "what is said now")  # one the beginning of another


def questions(num: int = 3, asked: str = "what is said") -> list[Question]:
    return [Question(f"q{number}", "k", "words", asked, OPTIONS[number % 2:] + OPTIONS[:number % 2], 0, "turn left", "x.wav")
            for number in range(num)]


def sounds(*lens: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 32, generator=draw) for length in lens]


@torch.no_grad()
def by_hand(whole: OmniGPT, turns: Turns, question: Question, option: str, soft: Tensor) -> float:
    """One row through the GPT, its logits normalised by the definition, the answer's own log-probabilities added up."""
    prompt = turns.prompt({"question": question.question})
    answer = [*turns.tokenizer.encode(option), turns.end]
    logits = whole.prepender(torch.tensor([prompt + answer]), soft_tokens=soft[None])[0].double()  # (T, vocab_size)
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    return sum(float(log_p[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


def test_a_score_is_the_sum_over_option_and_end_token() -> None:
    whole, turns = omni()
    asked, soft = questions(), sounds(3, 1, 5)
    scores = option_scores(whole, turns, asked, soft)
    for question, heard, row in zip(asked, soft, scores):
        expected = [by_hand(whole, turns, question, option, heard) for option in question.options]
        # 5 tokens, each a log-softmax of 12 logits of some 3 units in fp32: 5 · 3 · 12 · 6e-8 < 1.1e-5
        assert row == pytest.approx(expected, abs=1.1e-5)
        assert all(score < 0 for score in row) and sum(math.exp(score) for score in row) < 1  # they exclude one another


def test_all_answers_of_up_to_two_words_and_longer_ones_share_one_probability() -> None:
    """Σ p(answer with its end) over every answer of ≤ 2 words, and Σ p(beginning) over all of 3 words, make 1."""
    torch.manual_seed(0)
    turns = Turns(WordTokenizer(["a", "b"]))
    gpt = randomise(GPT(GPTConfig(sequence_len=32, vocab_size=7, n_layer=1, n_head=2, n_kv_head=1, n_embd=32))).eval()
    whole = OmniGPT(gpt, (LogMelEncoder(), Projector(80, 32, stack=4, zero_init=False)), insert_at=turns.insert_at)
    prompt, soft = turns.prompt({}), sounds(4)
    options = ("a", "b", "a a", "a b", "b a", "b b")
    scores, = option_scores(whole, turns, [Question("q", "k", "words", "", options, 0)], soft)
    answered = sum(math.exp(score) for score in scores)

    def mass(beginning: list[int]) -> float:
        """p(beginning), and of all that it could go on with but `a`, `b` and the end."""
        logits = whole.prepender(torch.tensor([prompt + beginning]), soft_tokens=soft[0][None])[0].double()
        return float(sum(logits[len(prompt) - 1 + place].log_softmax(0)[token] for place, token in enumerate(beginning)))

    with torch.no_grad():
        words = [turns.tokenizer.encode(word)[0] for word in "ab"]
        beginnings: list[list[int]] = [[]]
        rest = 0.0
        for length in (1, 2, 3):
            longer = [[*before, token] for before in beginnings for token in range(7)]
            others = [one for one in longer if one[-1] not in words and not (length > 1 and one[-1] == turns.end)]
            rest += sum(math.exp(mass(one)) for one in others)
            beginnings = [one for one in longer if one[-1] in words]
        rest += sum(math.exp(mass(one)) for one in beginnings)
    assert answered + rest == pytest.approx(1, abs=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(0, 9), min_size=2, max_size=5), st.sampled_from([1, 40, 100, 10_000]))
def test_alone_as_in_a_batch(seed: int, lens: list[int], max_slots: int) -> None:
    whole, turns = omni()
    asked, soft = questions(len(lens)), sounds(*lens, seed=seed)
    together = option_scores(whole, turns, asked, soft, max_slots=max_slots)
    for number, row in enumerate(together):
        alone, = option_scores(whole, turns, [asked[number]], [soft[number]])
        assert row == pytest.approx(alone, abs=1e-5)


def test_readers_get_the_text_in_place_of_the_sound() -> None:
    whole, turns = omni()
    asked = questions(2)
    scores = option_scores(whole, turns, asked, None, ["turn left", "right"])
    for question, text, row in zip(asked, ["turn left", "right"], scores):
        for option, score in zip(question.options, row):
            idx, targets = turns.batch([{"question": question.question, "answer": option, "text": text}], read=True)
            with torch.no_grad():
                loss = whole.gpt(idx, targets)
            assert score == pytest.approx(-float(loss) * int((targets != -1).sum()), abs=1.1e-5)
    assert scores != option_scores(whole, turns, asked, None, ["", ""])


def test_equal_scores_go_to_the_first() -> None:
    assert best([-2.0, -1.0, -1.0, -3.0]) == 1 and best([0.0, 0.0]) == 0


def test_nan_is_no_answer() -> None:
    whole, turns = omni()
    with torch.no_grad():
        whole.gpt.lm_head.weight[3] = math.nan
    with pytest.raises(BadInput, match="NaN for an option of q0"):
        option_scores(whole, turns, questions(1), sounds(3))


def test_what_is_heard_is_what_the_gpt_gets() -> None:
    whole, _ = omni()
    waveforms = [torch.randn(1600), torch.randn(960)]
    with torch.no_grad():
        expected = whole.project(whole.encoder(whole.encoder.preprocess(waveforms)), 2)
    for row, heard, length in zip(hear(whole, waveforms), expected.values, expected.lens.tolist()):
        assert torch.equal(row, heard[:length]) and not row.requires_grad
    assert [len(row) for row in hear(whole, waveforms)] == expected.lens.tolist()


def test_a_transcription_is_the_greedy_answer() -> None:
    whole, turns = omni()
    asked = [Question(f"t{number}", "t", "words", "what is said", ("turn left",), 0, audio="x.wav") for number in range(3)]
    soft = sounds(2, 6, 3)
    found = transcribe(whole, turns, asked, soft, max_answer=4, max_slots=20)
    for question, heard, said in zip(asked, soft, found):
        prompt = turns.prompt({"question": question.question})
        ids = list(whole.prepender.generate(prompt, heard[None], max_tokens=4, temperature=0))
        assert said == turns.tokenizer.decode(ids[:ids.index(turns.end)] if turns.end in ids else ids)


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 100))
def test_batches_hold_each_row_once(lens: list[int], max_slots: int) -> None:
    found = list(batches(lens, max_slots))
    assert sorted(place for batch in found for place in batch) == list(range(len(lens)))
    assert all(len(batch) == 1 or len(batch) * max(lens[place] for place in batch) <= max_slots for batch in found)


def test_batches_of_nothing_at_all() -> None:
    with pytest.raises(BadInput, match="max_slots = 0"):
        list(batches([1], 0))


@pytest.mark.parametrize(("reference", "said", "expected"), [
    ("turn left now", "Turn left, NOW!", (0, 3)),
    ("turn left now", "turn right", (2, 3)),
    ("turn left", "please turn left lamp", (2, 2)),
    ("don't stop", "", (2, 2)),
    ("", "lamp", (1, 0)),
])
def test_word_errors(reference: str, said: str, expected: tuple[int, int]) -> None:
    assert word_errors(reference, said) == expected


def test_without_jiwer(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"omni-adapters\[eval\]"):
        word_errors("a", "a")
