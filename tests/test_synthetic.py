"""The synthetic corpus: what it promises of its words, splits, bytes and GPT, at a tiny size."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from omni_adapters.data.audio import load_audio
from omni_adapters.data.manifest import ManifestRow, read_manifest
from omni_adapters.data.speech import speak
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, open_host

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import synthetic

TINY = "--words 6 --clips 10 --test-clips 3 --lengths 2 3 --n-layer 2 --n-embd 32 --rows 16 --workers 1 --whispered 0.3".split()
SPLITS = ("train", "unseen", "unseen_voices")


def make(out: Path, *more: str) -> dict[str, list[ManifestRow]]:
    synthetic.main(["--out", str(out), *TINY, "--gpt-steps", "20", *more])
    return {name: read_manifest(out / f"{name}.jsonl") for name in SPLITS}


def contents(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[ManifestRow]]]:
    out = tmp_path_factory.mktemp("synthetic") / "corpus"
    return out, make(out)


# ---- words --------------------------------------------------------------------------------------------------------------


def test_there_are_500_words_and_no_word_twice() -> None:
    assert len(synthetic.WORDS) == len(set(synthetic.WORDS)) >= 500
    assert all(word.isalpha() and word.islower() for word in synthetic.WORDS)


def test_no_two_words_sound_alike() -> None:
    """Homophones are the same samples: libespeak-ng hears phonemes only, and `speak` repeats exactly."""
    sounds = {speak(word, rate=450).tobytes() for word in synthetic.WORDS}
    assert speak("sun", rate=450).tobytes() == speak("son", rate=450).tobytes(), "what the next line would find"
    assert len(sounds) == len(synthetic.WORDS)


# ---- sound --------------------------------------------------------------------------------------------------------------


def test_manifests_say_what_the_files_hold(corpus: tuple[Path, dict[str, list[ManifestRow]]]) -> None:
    out, rows = corpus
    assert [len(rows[name]) for name in SPLITS] == [10, 3, 3]
    for row in (row for name in SPLITS for row in rows[name]):
        assert len(load_audio(row.audio, 16000)) / 16000 == pytest.approx(row.seconds, abs=1e-9)
        words = row.text.split()
        assert 2 <= len(words) <= 3 and len(set(words)) == len(words) and set(words) <= set(synthetic.WORDS)
        assert row.attributes.keys() == {"voice", "rate", "pitch", "style", "snr"}
        assert (row.attributes["style"] == "whisper") == (row.attributes["voice"] in synthetic.WHISPERS)
    assert {Path(row.audio).parent for name in SPLITS for row in rows[name]} == {out / "audio"}


def test_splits_share_no_sentence_and_no_voice(corpus: tuple[Path, dict[str, list[ManifestRow]]]) -> None:
    _, rows = corpus
    texts = [row.text for name in SPLITS for row in rows[name]]
    assert len(set(texts)) == len(texts) == 16
    assert len({row.audio for name in SPLITS for row in rows[name]}) == 16
    strangers = {row.attributes["voice"] for row in rows["unseen_voices"]}
    assert strangers <= set(synthetic.UNSEEN_VOICES)
    assert not strangers & {row.attributes["voice"] for name in ("train", "unseen") for row in rows[name]}


@pytest.mark.slow
def test_equal_options_give_equal_bytes_and_a_crash_costs_nothing(
        corpus: tuple[Path, dict[str, list[ManifestRow]]], tmp_path: Path) -> None:
    out, _ = corpus
    make(tmp_path / "again")
    whole = contents(out)
    assert contents(tmp_path / "again") == whole
    lost = sorted((tmp_path / "again" / "audio").iterdir())[:4]
    kept = sorted((tmp_path / "again" / "audio").iterdir())[4].stat().st_mtime_ns
    for path in (*lost, tmp_path / "again" / "train.jsonl", tmp_path / "again" / "text.json"):
        path.unlink()
    make(tmp_path / "again", "--workers", "2")
    assert contents(tmp_path / "again") == whole
    assert sorted((tmp_path / "again" / "audio").iterdir())[4].stat().st_mtime_ns == kept, "what is there is not spoken again"


def test_another_seed_is_another_corpus_and_needs_another_folder(
        corpus: tuple[Path, dict[str, list[ManifestRow]]], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = corpus
    before = contents(out)
    with pytest.raises(SystemExit):
        make(out, "--seed", "1")
    assert "made by other options" in capsys.readouterr().err and contents(out) == before
    draws = [synthetic.draw_texts(random.Random(seed), 5, synthetic.WORDS, (3, 5), set()) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("arguments, words", [
    ("--words 3 --lengths 2 4", "is needed"), ("--lengths 0 2", "is needed"), ("--lengths 4 3", "is needed"),
    ("--words 9999", "is needed"), ("--n-embd 48", "multiple of 32"), ("--clips 0", "at least 1"),
    ("--words 3 --lengths 1 2 --clips 3 --test-clips 1", "5 sentences of 9"),
])
def test_impossible_sizes_are_refused(arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        synthetic.main(["--out", str(tmp_path / "none"), *arguments.split()])
    assert words in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_noise_and_whispers_come_in_their_shares() -> None:
    clips = synthetic.draw_clips(random.Random(0), ["a b"] * 2000, synthetic.TRAINING_VOICES, clean=0.1, whispered=0.05)
    for count, share in ((sum(math.isinf(clip.snr) for clip in clips), 0.1),
                         (sum(clip.voice in synthetic.WHISPERS for clip in clips), 0.05)):
        assert abs(count - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5  # five standard deviations
    assert len({clip.name() for clip in clips}) == 2000


# ---- text ---------------------------------------------------------------------------------------------------------------


def test_an_easy_copy_is_clean_and_a_hard_one_keeps_the_order() -> None:
    rng, vocabulary, text = random.Random(0), list(range(5, 517)), [7, 9, 8]
    assert all(synthetic.misspoken(text, rng, vocabulary, 0.0) == text for _ in range(50))
    hard = [synthetic.misspoken(text, rng, vocabulary, 1.0) for _ in range(400)]
    faithful = [copy for copy in hard if set(copy) <= set(text)]
    for copy in faithful:
        assert [word for word, before in zip(copy, [None, *copy]) if word != before] == text, "each word, in its order"
    assert {len(copy) for copy in faithful} >= {3, 6, 9, 12} and max(map(len, hard)) <= 15
    wrong = sum(word not in text for copy in hard for word in copy) / sum(map(len, hard))
    assert 0.05 < wrong < 0.25  # 0.15 of what is written more than once, which is 10 words in 11


def test_only_the_assistant_is_graded() -> None:
    tokenizer = WordTokenizer(synthetic.WORDS[:8])
    idx, targets = synthetic.batch_of(tokenizer, [([5, 5, 6], [5, 6])])
    special = [tokenizer.encode_special(name) for name in SPECIALS]
    assert idx[0].tolist() == [special[0], special[1], 5, 5, 6, special[2], special[3], 5, 6]
    assert targets[0].tolist() == [-1] * 6 + [5, 6, special[4]]


def test_the_folder_opens_as_the_gpt_that_was_trained(corpus: tuple[Path, dict[str, list[ManifestRow]]]) -> None:
    out, rows = corpus
    host = open_host("reference", out / "gpt")
    words = host.tokenizer.decode(list(range(len(SPECIALS), len(SPECIALS) + 6))).split()
    assert len(set(words)) == 6 and {word for name in SPLITS for row in rows[name] for word in row.text.split()} <= set(words)
    again = synthetic.repeat_clean(host.gpt, host.tokenizer, [row.text for row in rows["unseen"]])
    said = json.loads((out / "text.json").read_text())
    assert again["loss"] == pytest.approx(said["loss"], rel=1e-5) and again["exact_match"] == said["exact_match"]
    assert said["training_losses"][-1] < said["training_losses"][0]


def test_a_small_gpt_learns_to_repeat() -> None:
    torch.manual_seed(0)
    words = synthetic.WORDS[:64]
    tokenizer, gpt = WordTokenizer(words), synthetic.build_gpt(69, n_layer=2, n_embd=64)
    args = argparse.Namespace(seed=0, gpt_steps=300, rows=32, lr=4e-3, lengths=(2, 3))
    texts = [" ".join(synthetic.sentence(random.Random(i), words, (2, 3))) for i in range(100)]
    untrained = synthetic.repeat_clean(gpt, tokenizer, texts)
    synthetic.pretrain(gpt, tokenizer, args)
    trained = synthetic.repeat_clean(gpt, tokenizer, texts)
    assert untrained["exact_match"] < 0.01 and trained["exact_match"] > 0.2  # by chance, less than one in 4,000
    assert trained["loss"] < untrained["loss"] / 2
