"""Validation: each column against the plain computation, row by row; words counted as people count them."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hosts import randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.anatomy import logits_of, loss_of
from omni_adapters.data.clips import ClipSource
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import pad_rows
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import SPECIALS, WordTokenizer
from omni_adapters.training.report import heard_and_read, scoreboard
from omni_adapters.training.turns import Turns
from omni_adapters.training.validation import Tally, batches, edits, silence, validate

WORDS = "turn left right now lamp what is said".split()


class Memory:
    """A ClipSource of random features."""

    kind = "audio_features"
    identity: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, lens: list[int], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.lens = np.array(lens, dtype=np.int64)
        self.clips = [torch.randn(length, 80, generator=draw) for length in lens]
        chosen = [torch.randint(len(WORDS), (1 + number % 4,), generator=draw).tolist() for number in range(len(lens))]
        self.rows = [{"audio": "", "seconds": 1.0, "text": " ".join(WORDS[word] for word in words)} for words in chosen]

    def __len__(self) -> int:
        return len(self.lens)

    def load_batch(self, numbers: Any) -> tuple[Features, list[dict[str, Any]]]:
        return pad_rows([self.clips[number] for number in numbers]), [self.rows[number] for number in numbers]

    def row(self, number: int) -> dict[str, Any]:
        return self.rows[number]


def omni(lora: bool = False) -> tuple[OmniGPT, Turns]:
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=len(WORDS) + len(SPECIALS), n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    turns = Turns(WordTokenizer(WORDS))
    gpt = randomise(GPT(config)).eval()
    whole = OmniGPT(gpt, (LogMelEncoder(), Projector(80, 32, stack=4, zero_init=False)), insert_at=turns.insert_at)
    if lora:
        whole.add_lora(4)
        for layer in whole.lora():
            torch.nn.init.normal_(layer.lora_b, std=0.3)
    return whole, turns


def mean_loss(rows: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in rows) / sum(count for _, count in rows)


@torch.no_grad()
def by_hand(whole: OmniGPT, turns: Turns, source: Memory, partner: dict[int, int]) -> float:
    """Mean over graded tokens of each row alone, hearing its partner's features."""
    losses = []
    for number, row in enumerate(source.rows):
        idx, targets = turns.batch([row])
        features = Features(source.clips[partner[number]].unsqueeze(0), torch.tensor([len(source.clips[partner[number]])]))
        losses.append((float(whole(idx, targets, audio_features=features)), int((targets != -1).sum())))
    return mean_loss(losses)


def test_the_columns_are_what_they_say() -> None:
    whole, turns = omni(lora=True)
    source = Memory([12, 9, 14, 7, 12, 3])
    result = validate(whole, source, turns, max_tokens=1000, max_answer=3)
    partner = {}
    (numbers,) = batches(source, 1000, 256)
    for place, number in enumerate(numbers):
        partner[number] = numbers[(place - 3) % 6]
    # 30 tokens, each fp32 loss good to some 1e-6
    assert result["right"]["loss"] == pytest.approx(by_hand(whole, turns, source, {n: n for n in range(6)}), abs=1e-5)
    assert result["shuffled"]["loss"] == pytest.approx(by_hand(whole, turns, source, partner), abs=1e-5)
    assert result["gap"] == result["shuffled"]["loss"] - result["right"]["loss"]
    with torch.no_grad():
        bare, _ = omni()  # the same GPT without LoRA
        losses = [(float(bare.gpt(*turns.batch([row], read=True))), len(turns.answer(row))) for row in source.rows]
    assert result["text_oracle"]["loss"] == pytest.approx(mean_loss(losses), abs=1e-5)


def test_validation_repeats_and_leaves_the_mode_as_it_was() -> None:
    whole, turns = omni()
    source = Memory([12, 9, 14, 7, 12, 3])
    whole.train()
    before = torch.get_rng_state()
    first = validate(whole, source, turns, max_tokens=30, max_answer=3)
    assert validate(whole, source, turns, max_tokens=30, max_answer=3) == first
    assert whole.training and torch.equal(torch.get_rng_state(), before)
    assert set(first["right"]) == {"loss", "exact_match", "word_accuracy"}
    assert len(first["samples"]) == 6 and "right is" in scoreboard(first)
    short = validate(whole, source, turns, max_tokens=30, answered=(), columns=("right",))
    assert set(short) == {"right", "samples"} and set(short["right"]) == {"loss"}


def test_blank_is_the_encoders_silence_and_nothing_of_the_clip() -> None:
    whole, turns = omni()
    quiet = silence(whole, pad_rows([torch.randn(12, 80), torch.randn(5, 80)]))
    expected = whole.encoder(whole.encoder.preprocess([torch.zeros(12 * 160)]))
    assert torch.equal(quiet.values[1, :5], expected.values[0, :5]) and quiet.lens.tolist() == [12, 5]
    one, other = Memory([12, 9], seed=1), Memory([12, 9], seed=2)
    other.rows = one.rows
    scores = [validate(whole, source, turns, max_tokens=100, answered=())["blank"] for source in (one, other)]
    assert scores[0] == scores[1]


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 100), st.integers(2, 40))
def test_nobody_is_left_alone(seed: int, num_samples: int, max_tokens: int, max_rows: int) -> None:
    """Batches hold each chosen sample once, two or more together: one alone would be shuffled with itself.

    Lengths are drawn evenly, by a seed: those that hypothesis likes to draw hardly ever leave one alone at the front.
    """
    lens = np.random.Generator(np.random.PCG64(seed)).integers(1, 41, num_samples).tolist()
    found = batches(Memory(lens), max_tokens, max_rows)
    flat = sorted(number for numbers in found for number in numbers)
    assert len(flat) == len(set(flat)) == min(len(lens), max_rows)
    assert all(len(numbers) > 1 for numbers in found)
    assert all(len(numbers) <= 3 or len(numbers) * max(lens[n] for n in numbers) <= max_tokens for numbers in found)


def test_one_sample_is_refused() -> None:
    whole, turns = omni()
    with pytest.raises(BadInput, match="1 samples; expected at least two"):
        validate(whole, Memory([5]), turns, max_tokens=100)
    assert isinstance(Memory([5]), ClipSource)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_edits_are_levenshteins(one: list[str], other: list[str]) -> None:
    @cache
    def plain(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        return min(plain(i - 1, j) + 1, plain(i, j - 1) + 1, plain(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    assert edits(one, other) == plain(len(one), len(other))


def test_a_tally() -> None:
    tally = Tally()
    tally.add(1.0, 3, ["turn left now", "left"], ["turn right now", "left"])
    tally.add(3.0, 1, ["now"], ["now lamp what"])
    assert tally.scores() == {"loss": 1.5, "exact_match": 1 / 3, "word_accuracy": 1 - 3 / 5}


def test_what_hosts_return() -> None:
    class Output:
        loss, logits = torch.tensor(2.0), torch.zeros(1, 2, 3)

    for result in (torch.tensor(2.0), (torch.zeros(1, 2, 3), torch.tensor(2.0)), Output()):
        assert loss_of(result).item() == 2.0
    for result in (torch.zeros(1, 2, 3), (torch.zeros(1, 2, 3), None), Output()):
        assert logits_of(result).shape == (1, 2, 3)


def test_what_the_picture_shows() -> None:
    whole, turns = omni()
    source = Memory([8, 9, 3])
    soft, words = heard_and_read(whole, source, turns, max_tokens=100)
    assert soft.shape == (2 + 3 + 1, 32)  # ⌈8/4⌉ + ⌈9/4⌉ + ⌈3/4⌉
    expected: Tensor = whole.gpt.transformer["wte"].weight  # type: ignore[index, union-attr]
    named = sorted({token for row in source.rows for token in turns.tokenizer.encode(row["text"])})
    assert torch.equal(words, expected[named])
