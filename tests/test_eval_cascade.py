"""The recogniser: a function of the waveform alone, asked once for each; what the tokenizer cannot write is left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest

from omni_adapters.data.speech import speak
from omni_adapters.eval.cascade import PEAK, Cascade, pocketsphinx_decoder, readable, recognised, samples_of
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.hosts import WordTokenizer


class Counting:
    """A recogniser that hears how long a clip is, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, clips: Sequence[bytes]) -> list[str]:
        self.asked += [len(clip) // 2 for clip in clips]
        return [f"length {len(clip) // 2}" for clip in clips]


def test_each_waveform_is_recognised_once() -> None:
    recognise = Counting()
    cascade = Cascade(recognise)
    one, other = np.ones(3, np.float32), np.ones(5, np.float32)
    assert cascade([one, other, one]) == ["length 3", "length 5", "length 3"]
    assert cascade([other, one / 2]) == ["length 5", "length 3"]  # as loud as the other, once scaled
    assert recognise.asked == [3, 5]


def test_samples() -> None:
    peak = round(32767 * PEAK)
    assert np.frombuffer(samples_of(np.array([0.0, 0.001, -0.0005])), np.int16).tolist() == [0, peak, -round(32767 * PEAK / 2)]
    assert samples_of(np.zeros(3, np.float32)) == bytes(6)
    for bad in (np.zeros(0), np.zeros((2, 2)), np.array([np.nan])):
        with pytest.raises(BadInput, match="finite samples"):
            samples_of(bad)


def test_words_that_the_tokenizer_cannot_write_are_left_out() -> None:
    tokenizer = WordTokenizer(["turn", "left"])
    assert readable(tokenizer, "please turn  the left") == ("turn left", 2)
    assert readable(tokenizer, "") == ("", 0)


def test_pocketsphinx_hears_words_and_remembers_nothing() -> None:
    clips = [samples_of(speak("what is the weather today")), samples_of(speak("turn left there")), bytes(2)]
    texts = [recognised(clip) for clip in clips]
    assert "weather today" in texts[0] and texts[0] != texts[1] and texts[2] == ""
    pocketsphinx_decoder.cache_clear()
    assert recognised(clips[1]) == texts[1]  # by a decoder that heard nothing before
    assert recognised(clips[0]) == texts[0]  # and by one that heard something else


def test_without_pocketsphinx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(MissingExtra, match=r"omni-adapters\[eval\]"):
        Cascade()
