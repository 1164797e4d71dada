"""Questions: four options that say nothing by themselves; and AudioBench-mini, which is what its builder builds."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.data.questions import Question, read_questions
from omni_adapters.data.texture import VOICES, draw, sentence_set
from omni_adapters.data.texture_questions import (
    AUDIOBENCH_MINI_SHA256,
    CATEGORIES,
    ask,
    audiobench_mini,
    audiobench_mini_path,
    question_lines,
    questions,
    vocabulary,
)
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import WordTokenizer

ROWS = read_questions(audiobench_mini_path())
TEXTURE = [row for row in ROWS if row.about == "texture"]
seeds = st.integers(0, 2**32)


# ---- questions --------------------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_question_has_one_right_option_among_four_alike(seed: int) -> None:
    rng = random.Random(seed)
    clip = draw(rng, VOICES["train"])
    asked = questions(clip, rng)
    assert set(asked) == set(clip.labels)
    for category, question in asked.items():
        kind = CATEGORIES[category]
        assert question.options[question.answer] == clip.labels[category] and question.question in kind.questions
        assert len(set(question.options)) == 4 and len({len(option.split()) for option in question.options}) == 1
        assert question.about == kind.about and (not kind.values or set(question.options) <= set(kind.values))


@given(seeds)
def test_wrong_words_are_wrong(seed: int) -> None:
    clip = draw(random.Random(seed), VOICES["train"], scene="turns")
    words = clip.text.split()
    asked = questions(clip, random.Random(seed))
    assert [option in words for option in asked["word"].options].count(True) == 1
    assert set(asked["first_word"].options) | set(asked["last_word"].options) <= set(words)  # four or more are said
    assert asked["word_count"].options[asked["word_count"].answer].split()[0] == {4: "four", 5: "five", 6: "six"}[len(words)]


def test_the_position_is_by_chance_or_as_told() -> None:
    clip, rng = draw(random.Random(1), VOICES["train"], scene="language"), random.Random(0)
    found = Counter(ask(clip, "language", rng).answer for _ in range(400))
    assert all(abs(found[position] - 100) < 40 for position in range(4))  # 4.6 sigma of a binomial
    assert [ask(clip, "language", rng, position).answer for position in range(4)] == [0, 1, 2, 3]


@given(seeds)
def test_the_vocabulary_is_enough(seed: int) -> None:
    rng = random.Random(seed)
    clip = draw(rng, VOICES["valid"], sentences="valid")
    tokenizer = WordTokenizer(vocabulary())
    for question in questions(clip, rng).values():
        for text in (question.question, *question.options, clip.text):
            assert text == text.lower() and tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("category", ["pitch", "colour"])
def test_what_cannot_be_asked_is_refused(category: str) -> None:
    clip = draw(random.Random(1), VOICES["train"], scene="language")
    with pytest.raises(BadInput, match=f"'{category}'.*language"):
        ask(clip, category, random.Random(0))


# ---- AudioBench-mini --------------------------------------------------------------------------------------------------------


def test_the_file_is_what_the_builder_builds() -> None:
    content = audiobench_mini_path().read_bytes()
    assert content == question_lines(audiobench_mini()) and audiobench_mini() == ROWS
    assert hashlib.sha256(content).hexdigest() == AUDIOBENCH_MINI_SHA256


def test_two_hundred_questions_in_balance() -> None:
    assert len(ROWS) == 200 and len({row.id for row in ROWS}) == 200 and len(TEXTURE) >= 120
    assert Counter(row.answer for row in ROWS) == {0: 50, 1: 50, 2: 50, 3: 50}
    right = defaultdict(Counter)
    for row in ROWS:
        right[row.category][row.right] += 1
    assert set(right) == set(CATEGORIES) and min(sum(counts.values()) for counts in right.values()) >= 11
    for category, counts in right.items():
        if CATEGORIES[category].values:
            assert set(counts) == set(CATEGORIES[category].values) and max(counts.values()) - min(counts.values()) <= 1
        positions = Counter(row.answer for row in ROWS if row.category == category)
        assert len(positions) == 4 and max(positions.values()) - min(positions.values()) <= 1


def test_voices_and_sentences_are_of_the_test_set_alone() -> None:
    for row in ROWS:
        assert row.clip is not None and row.clip.text == row.text and sentence_set(row.clip.text) == "test"
        assert {part.variant for part in row.clip.parts} <= set(VOICES["test"]) and not set(VOICES["test"]) & set(VOICES["train"])
    assert len({row.text for row in ROWS}) == 200


def test_rows_are_what_their_clips_say() -> None:
    for row in ROWS:
        assert row.clip is not None and row.audio is None
        assert row.clip.labels[row.category] == row.right and CATEGORIES[row.category].about == row.about


def read_out(row: Question) -> int:
    """The answer of who has read the transcript."""
    words = (row.text or "").split()
    told = {"first_word": words[0], "last_word": words[-1],
            "word_count": f"{['three', 'four', 'five', 'six'][max(0, len(words) - 3)]} words",
            "word": next((option for option in row.options if option in words), "")}
    return row.options.index(told[row.category])


def test_questions_about_words_can_be_answered_from_the_transcript() -> None:
    words = [row for row in ROWS if row.about == "words"]
    assert [read_out(row) for row in words] == [row.answer for row in words]


def test_the_transcript_does_not_tell_the_texture() -> None:
    """Who knows which answers come most often with how many words, and with which words, in training does as well as chance."""
    rng, often = random.Random(0), defaultdict(Counter)
    for _ in range(6_000):
        clip = draw(rng, VOICES["train"])
        for category, value in clip.labels.items():
            for sign in signs(clip.text):
                often[category, sign][value] += 1
    right = 0
    for row in TEXTURE:
        score = {option: sum(often[row.category, sign][option] / max(1, often[row.category, sign].total())
                             for sign in signs(row.text or "")) for option in row.options}
        right += max(row.options, key=lambda option: score[option]) == row.right
    assert abs(right / len(TEXTURE) - 0.25) <= 0.08


def signs(text: str) -> list[object]:
    words = text.split()
    return [len(words), (words[0], "first"), (words[-1], "last"), *words]
