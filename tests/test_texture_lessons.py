"""What is taught about clips of the texture corpus: as many of each category, truths that contradict no label, text that tells
what the sound does."""

from __future__ import annotations

import random
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapters.data.texture import PITCHES, VARIANTS, VOICES, Clip, draw
from omni_adapters.data.texture_lessons import (
    DIRECTIONS,
    PAUSE,
    TEXTURE,
    direction,
    draw_evenly,
    events,
    hertz,
    notes,
    screenplay,
    truths,
)
from omni_adapters.data.texture_questions import CATEGORIES, vocabulary
from omni_adapters.training.hosts import WordTokenizer

SEEDS = st.integers(0, 10_000)
TOKENIZER = WordTokenizer([*dict.fromkeys([*vocabulary(), *CATEGORIES, *DIRECTIONS])])


def clip_of(seed: int) -> Clip:
    return draw(random.Random(seed), VOICES["train"], sentences="train")


def test_each_category_is_asked_of_as_many_clips() -> None:
    clips = draw_evenly(280, random.Random(0), VOICES["valid"], sentences="valid")
    assert len(clips) == 280
    counts = {name: sum(name in clip.labels for clip in clips) for name in (*TEXTURE, "word")}
    assert all(count >= 34 for count in counts.values()), counts  # some 37 each
    assert {part.variant for clip in clips for part in clip.parts} <= set(VOICES["valid"])
    assert clips == draw_evenly(280, random.Random(0), VOICES["valid"], sentences="valid")


def test_shares_say_of_which_there_are_more() -> None:
    plain, more = (draw_evenly(280, random.Random(0), VOICES["train"], shares=shares) for shares in (None, {"contour": 3}))
    counts = [[sum(name in clip.labels for clip in clips) for name in ("contour", "turns")] for clips in (plain, more)]
    assert counts[1][0] > 1.7 * counts[0][0] and counts[1][1] < counts[0][1], counts


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_truths_are_options_and_contradict_no_label(seed: int) -> None:
    clip = clip_of(seed)
    true = truths(clip)
    assert all(value in CATEGORIES[name].values for name, value in true.items())
    assert all(true[name] == value for name, value in clip.labels.items() if name in TEXTURE)
    if "speaker" in true and "then" not in true["speaker"]:
        assert {VARIANTS[part.variant].sex for part in clip.parts} == {true["speaker"].split()[-1]}
    if true.get("turns") == "one voice":
        assert len({part.variant for part in clip.parts}) == 1
    if "pitch" in true and "pitch" not in clip.labels:
        low, high = PITCHES[true["pitch"]]
        assert low <= hertz(clip, clip.parts[0]) <= high and clip.style == "normal"


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_a_screenplay_tells_what_is_true_of_its_clip(seed: int) -> None:
    clip = clip_of(seed)
    told = screenplay(clip, random.Random(seed), noted=0.0)
    TOKENIZER.encode(" ".join(told))
    said = iter(told)
    assert all(word in said for word in clip.text.split())  # every word, in order
    runs = [moment for moment, _ in groupby(told)]
    assert runs.count("(beep)") == (clip.tones.count if clip.tones is not None and clip.tones.shape == "beep" else 0)
    assert told.count("(turn)") == len({part.variant for part in clip.parts}) - 1
    assert told.count("(pause)") <= sum(round(10 * part.gap) for part in clip.parts if part.gap > PAUSE)
    if clip.style != "whisper":
        for part in clip.parts:
            assert direction(VARIANTS[part.variant].sex) in told
    for name in ("tone", "contour"):
        assert name not in clip.labels or direction(clip.labels[name]) in told


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_events_are_the_screenplay_without_times(seed: int) -> None:
    """Every event stands in a screenplay without noise, in that order, where the wrong words one in thirty are left aside."""
    clip = clip_of(seed)
    told = events(clip)
    said = iter(screenplay(clip, random.Random(seed), noted=0.0))
    assert all(event in said for event in told)
    assert [event for event in told if event not in DIRECTIONS] == clip.text.split()
    assert told.count("(beep)") == (clip.tones.count if clip.tones is not None and clip.tones.shape == "beep" else 0)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_notes_and_a_noted_screenplay_answer_everything_in_full(seed: int) -> None:
    clip = clip_of(seed)
    for told in (notes(clip, random.Random(seed)), screenplay(clip, random.Random(seed), noted=1.0)):
        TOKENIZER.encode(" ".join(told))
        text = f" {' '.join(told)} "
        assert all(f" {name} {value} " in text for name, value in truths(clip).items())
    assert " ".join(notes(clip, random.Random(seed))).endswith(clip.text)
