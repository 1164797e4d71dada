"""The texture corpus: clips say everything, labels are true of the sound, and a folder of them can be killed and made again."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("espeakng_loader")
pytest.importorskip("soundfile")
from omni_adapters.cli import main
from omni_adapters.data import sounds, texture
from omni_adapters.data.audio import load_audio
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.sounds import (
    active_rms,
    bend_end,
    frames,
    limit,
    noise,
    pitch_of,
    pitch_track,
    revoice,
    silence,
    tones,
    trim,
)
from omni_adapters.data.texture import (
    LANGUAGES,
    SCENES,
    VARIANTS,
    VOICES,
    Background,
    Clip,
    Part,
    draw,
    sentence_set,
)
from omni_adapters.data.texture_corpus import DEFAULT_SPEC, check_spec, clip_of, clips_of, record, speak_corpus
from omni_adapters.data.texture_sound import render, say
from omni_adapters.shapes import BadInput

RATE = 16_000
PLAIN = Clip("lemon window garden", (Part("m3", "lemon window garden", 50),), "en-us", 160, 60, -30.0, "normal", "natural", None,
             None, 1)
SMALL = {"seed": 3, "splits": {"train": {"clips": 6, "voices": ["f1", "linda", "m1", "ed"]},
                               "test": {"clips": 3, "voices": ["f5", "aunty", "m5", "edward"]}}}
seeds = st.integers(0, 2**32)


def buzz(hertz: float, seconds: float = 1.0, highest: float = 4000.0) -> sounds.Sound:
    """Harmonics of `hertz` up to `highest`, as a voice has them."""
    time = np.arange(round(seconds * RATE)) / RATE
    return sum(np.cos(2 * np.pi * hertz * k * time) / k for k in range(1, int(highest / hertz))).astype(np.float32) / 4


# ---- pieces of sound --------------------------------------------------------------------------------------------------------


@given(st.floats(60, 400))
def test_the_pitch_of_a_buzz(hertz: float) -> None:
    lag = RATE / hertz  # whole samples are what a lag can be: half of one on either side
    assert abs(pitch_of(buzz(hertz, 0.3)) / hertz - 1) <= 0.5 / (lag - 0.5) + 0.01


def test_noise_and_silence_have_no_pitch() -> None:
    hiss = noise("hiss", RATE, np.random.default_rng(0))
    assert np.isfinite(pitch_track(hiss)).mean() < 0.02 and math.isnan(pitch_of(silence(0.5)))


def test_active_rms_is_that_of_the_sound_alone() -> None:
    tone = 0.1 * tones("steady", 1, 500.0)
    alone = active_rms(tone)
    assert alone == pytest.approx(0.1 / math.sqrt(2), rel=0.03)  # 10 ms of ramp at both ends of 0.55 s
    assert active_rms(np.concatenate([silence(1.0), tone, silence(1.0)])) == pytest.approx(alone, rel=0.05)


@given(st.sampled_from(sounds.NOISES), st.integers(400, 40_000), seeds)
def test_noise_has_unit_power(kind: str, length: int, seed: int) -> None:
    made = noise(kind, length, np.random.default_rng(seed))
    assert made.shape == (length,) and made.dtype == np.float32
    assert np.mean(made.astype(np.float64) ** 2) == pytest.approx(1, rel=1e-4)


def test_tones_are_counted_and_move() -> None:
    beeps = np.abs(tones("beep", 3, 800.0)) > 0
    assert np.sum(np.diff(np.convolve(beeps, np.ones(160), "same") > 0)) == 4  # two silences, an edge at each of their ends
    rising, falling, steady = (pitch_track(tones(shape, 1, 110.0)) for shape in ("rising", "falling", "steady"))
    assert rising[-4] / rising[4] > 2 and falling[4] / falling[-4] > 2 and np.nanstd(steady) < 2
    assert np.nanstd(pitch_track(tones("warbling", 1, 110.0))) > 10


@given(seeds, st.floats(0.1, 5))
def test_limiting_is_quiet_below_its_knee_and_ends_below_one(seed: int, size: float) -> None:
    signal = (size * np.random.default_rng(seed).standard_normal(500)).astype(np.float32)
    limited, small = limit(signal), np.abs(signal) <= 0.7
    assert np.array_equal(limited[small], signal[small]) and np.abs(limited).max() < 1
    assert np.all(np.sign(limited) == np.sign(signal)) and np.all(np.diff(limited[np.argsort(signal)]) >= 0)


@pytest.mark.parametrize("excitation", sounds.EXCITATIONS)
def test_revoicing_takes_the_pitch_and_leaves_the_envelope(excitation: str) -> None:
    speech = say(PLAIN)
    made = revoice(speech, excitation, np.random.default_rng(0))
    assert made.shape == speech.shape and made.dtype == np.float32
    voiced = [np.isfinite(pitch_track(sound)).mean() for sound in (speech, made)]
    assert voiced[0] > 0.5 and voiced[1] < 0.4
    bands = [np.log([(np.abs(np.fft.rfft(frames(sound, 400, 200), axis=1)[:, first:first + 20]) ** 2).mean(axis=1) + 1e-6
                     for first in range(20, 180, 20)]).ravel() for sound in (speech, made)]  # 0.8 to 7.2 kHz
    assert np.corrcoef(*bands)[0, 1] > 0.7


@given(st.floats(80, 300), st.floats(-8, 8))
@settings(max_examples=25)
def test_the_bent_end_has_the_pitch_asked_for(hertz: float, semitones: float) -> None:
    sound = buzz(hertz, highest=1200.0)  # marks are whole samples: to 4 kHz half of one is a quarter of a period
    bent = bend_end(sound, (semitones, semitones), 0.5)
    assert len(bent) == len(sound) and np.array_equal(bent[:int(0.47 * RATE)], sound[:int(0.47 * RATE)])
    middle = bent[int(0.6 * RATE):int(0.95 * RATE)]
    wanted = hertz * 2 ** (semitones / 12)
    assert abs(12 * math.log2(pitch_of(middle) / wanted)) < 0.7  # a lag is whole samples, and so is a mark


def test_trimming() -> None:
    tone = tones("steady", 1, 440.0)
    trimmed = trim(np.concatenate([silence(0.3), tone, silence(0.2)]))
    assert len(tone) - 40 < len(trimmed) <= len(tone) and not len(trim(silence(0.1)))


# ---- clips ------------------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([None, *SCENES]))
def test_a_clip_goes_through_json_and_back(seed: int, scene: str | None) -> None:
    clip = draw(random.Random(seed), VOICES["train"], scene=scene)
    back = Clip.from_values(json.loads(json.dumps(clip.values(), sort_keys=True)))  # as manifests have their keys
    assert back == clip and back.name() == clip.name() and replace(clip, seed=clip.seed + 1).name() != clip.name()


@given(seeds)
def test_a_drawn_clip_agrees_with_itself(seed: int) -> None:
    clip = draw(random.Random(seed), VOICES["test"], sentences="test")
    words = clip.text.split()
    assert " ".join(part.words for part in clip.parts) == clip.text and sentence_set(clip.text) == "test"
    assert {part.variant for part in clip.parts} <= set(VOICES["test"])
    assert clip.labels and ("word" not in clip.labels or clip.labels["word"] in words)
    if "pitch" in clip.labels or "contour" in clip.labels:
        assert clip.style == "normal" and ("pitch" in clip.labels) != ("contour" in clip.labels)
    if clip.background is not None and clip.background.snr_db < 15:
        assert not set(clip.labels) & {"pitch", "style", "contour", "pauses", "beeps", "tone", "turns", "word"}
    if "pauses" in clip.labels:
        assert sum(part.gap >= 0.35 for part in clip.parts) == texture.PAUSES.index(clip.labels["pauses"])
    if "turns" in clip.labels:
        assert len({part.variant for part in clip.parts}) == texture.TURNS.index(clip.labels["turns"]) + 1
    if "speaker" in clip.labels:
        sexes = [VARIANTS[part.variant].sex for part in clip.parts]
        assert tuple(dict.fromkeys(sexes)) == texture.SPEAKERS[clip.labels["speaker"]]


def test_every_category_is_drawn_with_all_its_values_evenly() -> None:
    rng, seen = random.Random(0), defaultdict(Counter)
    for _ in range(4000):
        for category, value in draw(rng, VOICES["train"]).labels.items():
            seen[category][value] += 1
    assert len(seen) == 17
    for category, counts in seen.items():
        mean = sum(counts.values()) / len(counts)
        if category not in ("word", "first_word", "last_word", "word_count"):  # counts of three to six words: pauses need four
            assert len(counts) == (5 if category == "background" else 4) and sum(counts.values()) > 250
            assert max(abs(count - mean) for count in counts.values()) < 4.5 * math.sqrt(mean), category  # 4.5 sigma of 53 cells


def test_rendering_is_deterministic_and_never_clips() -> None:
    clips = [draw(random.Random(seed), VOICES["test"], sentences="test") for seed in range(12)]
    sound = [render(clip) for clip in clips]
    for clip, made in zip(clips, sound):
        assert made.dtype == np.float32 and made.ndim == 1 and np.abs(made).max() < 1 and len(made) > RATE / 2
        assert np.array_equal(made, render(Clip.from_values(clip.values())))
    script = "import sys, json; from omni_adapters.data.texture import Clip\n" \
             "from omni_adapters.data.texture_sound import render\n" \
             "for line in sys.stdin: sys.stdout.buffer.write(render(Clip.from_values(json.loads(line))).tobytes())"
    lines = "".join(json.dumps(clip.values()) + "\n" for clip in clips[:6]).encode()
    elsewhere = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, check=True).stdout
    assert elsewhere == b"".join(made.tobytes() for made in sound[:6])


@pytest.mark.parametrize("kind", [*sounds.NOISES, "babble"])
def test_the_noise_is_as_strong_as_the_clip_says(kind: str) -> None:
    clean, noisy = render(PLAIN), render(replace(PLAIN, background=Background(kind, 6.0)))
    rms = math.sqrt(np.mean((noisy.astype(np.float64) - clean) ** 2))
    assert 20 * math.log10(active_rms(clean) / rms) == pytest.approx(6.0, abs=0.05)
    assert 20 * math.log10(active_rms(clean)) == pytest.approx(PLAIN.level, abs=0.3)  # its frames stand elsewhere


@pytest.mark.parametrize(("change", "message"), [
    ({"voices": ["f1", "m1", "m3"]}, "two men and two women"),
    ({"voices": ["f1", "f2", "m1", "whisper"]}, "two men and two women"),
    ({"scene": "opera"}, "opera"), ({"sentences": "dev"}, "dev"), ({"languages": ["klingon"]}, "klingon")])
def test_drawing_refuses(change: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        draw(random.Random(0), change.pop("voices", VOICES["train"]), **change)


PART = PLAIN.values()["parts"][0]


@pytest.mark.parametrize("change", [
    {"volume": 3}, {"parts": None}, {"parts": [{"variant": "f1"}]}, {"background": {"kind": "hiss"}}, {"style": "whispered"},
    {"style": None}, {"contour": "rising"}, {"background": {"kind": "rain", "snr_db": 3.0}}, {"level": "loud"}, {"level": 1.0},
    {"background": {"kind": "hiss", "snr_db": None}}, {"tones": {"shape": "bell", "count": 1, "hertz": 500.0, "after": True}},
    {"tones": {"shape": "beep", "count": 0, "hertz": 500.0, "after": True}}, {"labels": ["pitch"]}, {"labels": {"pitch": 3}},
    {"parts": []}, {"parts": [{**PART, "gap": -0.5}]}, {"parts": [{**PART, "pitch": 5.0}]}, {"seed": -1}, {"seed": True},
    {"text": 5}, {"level": math.nan}])
def test_values_that_no_clip_gave_are_refused(change: dict) -> None:
    with pytest.raises(BadInput, match=r"Clip\.from_values"):
        Clip.from_values({**PLAIN.values(), **change})
    with pytest.raises(BadInput, match="missing"):
        Clip.from_values({key: value for key, value in PLAIN.values().items() if key != "rate"})


# ---- labels are true of the sound, for voices of the test set -----------------------------------------------------------------


def powers(sound: sounds.Sound) -> np.ndarray:
    """Per 10 ms."""
    return np.mean(frames(sound, 160, 160).astype(np.float64) ** 2, axis=1)


def stretches(flags: np.ndarray, least: int) -> int:
    """Runs of true of `least` or more."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return int(np.sum(edges[1::2] - edges[::2] >= least))


def bare(clip: Clip) -> sounds.Sound:
    return render(replace(clip, background=None, tones=None))


def by_threshold(value: float, thresholds: tuple[float, ...], names) -> str:
    return list(names)[int(np.searchsorted(thresholds, value))]


def hear_pitch(clip: Clip) -> str:
    return by_threshold(pitch_of(bare(clip)), (97, 148, 217), texture.PITCHES)


def hear_pace(clip: Clip) -> str:
    """Seconds a word, silences left out."""
    smooth = np.convolve(powers(bare(clip)), np.ones(6) / 6, "same")
    seconds = np.sum(smooth > smooth.max() * 10**-3.0) / 100 / len(clip.text.split())
    return by_threshold(-seconds, (-0.66, -0.43, -0.27), texture.PACES)


def hear_loudness(clip: Clip) -> str:
    return by_threshold(20 * math.log10(active_rms(bare(clip))), (-44, -33, -22), texture.LEVELS)


def hear_style(clip: Clip) -> str:
    """Croak is spiky and without a steady pitch, a whisper is neither; a monotone voice's pitch stays within half a semitone."""
    sound = bare(clip)
    track, power = pitch_track(sound), powers(sound)
    voiced = track[np.isfinite(track)]
    if len(voiced) / np.sum(power > power.max() * 10**-3.5) < 0.42:
        cut = frames(sound, 800, 400)
        rms = np.sqrt((cut**2).mean(axis=1))
        loud = rms > rms.max() / 10
        return "croaky" if np.median(np.abs(cut[loud]).max(axis=1) / rms[loud]) > 4.5 else "whispered"
    steps = 12 * np.log2(voiced / np.median(voiced))
    return "monotone" if np.quantile(np.abs(steps), 0.7) < 0.6 else "normal"


def hear_contour(clip: Clip) -> str:
    """Semitones against the median over the last half second: how high at most, and where it ends."""
    track = pitch_track(bare(clip))
    voiced = track[np.isfinite(track)]
    steps = 12 * np.log2(voiced / np.median(voiced))
    steps = steps[(steps > -10.5) & (steps < 13)][-50:]  # the others are octave slips
    highest, end = steps.max(), np.median(steps[-6:])
    if highest > 4:
        return "question" if end > highest - 2.5 else "exclamation"
    return "statement" if end < -4 else "unfinished" if end < 2 else "question"


def hear_pauses(clip: Clip) -> str:
    power = powers(trim(bare(clip), 0.02))
    return texture.PAUSES[stretches(power < power.max() * 10**-4.0, 35)]


def hear_turns(clip: Clip) -> str:
    pitches = np.sort([pitch_of(say(replace(clip, parts=(part,)))) for part in clip.parts])
    return texture.TURNS[int(np.sum(np.diff(np.log(pitches)) > 0.15))]


def hear_speaker(clip: Clip) -> str:
    sexes = ["man" if pitch_of(say(replace(clip, parts=(part,)))) < 152 else "woman" for part in clip.parts]
    return next(name for name, turns in texture.SPEAKERS.items() if turns == tuple(dict.fromkeys(sexes)))


def hear_edges(clip: Clip) -> np.ndarray:
    """What sounds where nobody speaks: the 0.14 s at either end, float64."""
    sound = render(clip).astype(np.float64)
    return np.concatenate([sound[100:2300], sound[-2300:-100]])


def hear_noise(clip: Clip) -> str:
    ratio = 20 * math.log10(active_rms(render(clip))) - 10 * math.log10(np.mean(hear_edges(clip) ** 2) + 1e-13)
    return by_threshold(-ratio, (-60, -18, -6.5), texture.NOISE_LEVELS)


def hear_background(clip: Clip) -> str:
    edges = hear_edges(clip)
    power = np.mean(edges**2)
    if power < 1e-12:
        return "nothing"
    spectrum = np.abs(np.fft.rfft(edges)) ** 2
    if np.mean(edges**4) / power**2 > 15:
        return "crackling"
    if spectrum[:int(520 * len(edges) / RATE)].sum() > 0.97 * spectrum.sum():
        return "humming"
    return "hiss" if np.exp(np.log(spectrum + 1e-12).mean()) / spectrum.mean() > 0.3 else "babble"


def pure_tones(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """(F,) per 10 ms: is nearly all the power within some 150 Hz, and where, in Hz."""
    power = np.abs(np.fft.rfft(frames(render(replace(clip, background=None)), 512, 160) * np.hanning(512))) ** 2
    peak = power.argmax(axis=1)
    near = np.array([row[max(0, place - 2):place + 3].sum() for row, place in zip(power, peak)])
    total = power.sum(axis=1)
    return (near > 0.9 * total) & (total > 0.02 * total.max()) & (peak > 10), peak * 31.25


def hear_beeps(clip: Clip) -> str:
    pure, _ = pure_tones(clip)
    return texture.BEEPS[min(4, stretches(pure, 7)) - 1]


def hear_tone(clip: Clip) -> str:
    pure, hertz = pure_tones(clip)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pure, [False]]).astype(int))).reshape(-1, 2)
    first, end = max(edges, key=lambda pair: pair[1] - pair[0])
    moved = hertz[end - 5:end].mean() / hertz[first:first + 5].mean()
    steady = np.std(hertz[first:end]) < 0.06 * np.mean(hertz[first:end])
    return "rising" if moved > 1.8 else "falling" if moved < 0.55 else "steady" if steady else "warbling"


HEARD: dict[str, Callable[[Clip], str]] = {
    "pitch": hear_pitch, "pace": hear_pace, "loudness": hear_loudness, "style": hear_style, "contour": hear_contour,
    "pauses": hear_pauses, "turns": hear_turns, "speaker": hear_speaker, "noise": hear_noise, "background": hear_background,
    "beeps": hear_beeps, "tone": hear_tone}


def clips_about(category: str, count: int) -> list[Clip]:
    rng, found = random.Random(category), list[Clip]()
    while len(found) < count:
        clip = draw(rng, VOICES["test"], sentences="test")
        found += [clip] * (category in clip.labels)
    return found


@pytest.mark.parametrize("category", HEARD)
def test_labels_are_true_of_the_sound(category: str) -> None:
    clips = clips_about(category, 40)
    heard = [HEARD[category](clip) for clip in clips]
    wrong = [(said, clip.labels[category]) for said, clip in zip(heard, clips) if said != clip.labels[category]]
    assert len(wrong) <= 2, wrong  # 95 %


def test_languages_sound_different_and_read_the_same() -> None:
    digits = Clip("7 3 9 4", (Part("f5", "7 3 9 4", 50),), "en-us", 160, 60, -30.0, "normal", "natural", None, None, 1)
    spoken = [render(replace(digits, language=code)) for code in LANGUAGES.values()]
    spectra = [np.log(np.abs(np.fft.rfft(frames(sound, 400, 160)[:90], 512)) + 1e-4) for sound in spoken]  # (90, 257)
    for one in range(4):
        for other in range(one):
            assert np.abs(spectra[one] - spectra[other]).mean() > 0.5


# ---- the corpus -------------------------------------------------------------------------------------------------------------


def test_splits_of_the_default_share_neither_voices_nor_sentences() -> None:
    splits = DEFAULT_SPEC["splits"]
    voices = [set(split["voices"]) for split in splits.values()]
    assert sum(map(len, voices)) == len(set.union(*voices)) and len(voices[0]) >= 16 and len(voices[2]) >= 6
    few = {**DEFAULT_SPEC, "splits": {name: {**split, "clips": 400} for name, split in splits.items()}}
    texts = {name: {clip.text for clip in clips_of(few, name)} for name in few["splits"]}
    assert all({sentence_set(text) for text in found} == {name} for name, found in texts.items())
    assert not set.intersection(*texts.values()) and all(len(found) > 350 for found in texts.values())
    for name, split in few["splits"].items():
        assert {part.variant for clip in clips_of(few, name) for part in clip.parts} <= set(split["voices"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_is_equal_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = speak_corpus(SMALL, tmp_path / "a")
    first = tree(tmp_path / "a")
    assert list(manifests) == ["train", "test"] and len(first) == 9 + 2 + 1
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(SMALL))
    (tmp_path / "b" / "audio").mkdir(parents=True)
    name = next(name for name in first if name.startswith("audio/"))
    (tmp_path / "b" / name).write_bytes(first[name])  # as if it had been stopped after one
    assert main(["speak", "--spec", str(spec), "--out", str(tmp_path / "b"), "--workers", "2"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "b" / f"{split}.jsonl") for split in ("train", "test")]
    assert tree(tmp_path / "b") == first


def test_a_row_says_everything(tmp_path: Path) -> None:
    manifests = speak_corpus(SMALL, tmp_path)
    rows = read_manifest(manifests["train"])
    clips = clips_of(SMALL, "train")
    assert [clip_of(row) for row in rows] == clips
    assert [clip_of(row).name() for row in rows] == [Path(row.audio).stem for row in rows]
    for row, clip in zip(rows, clips):
        sound = load_audio(row.audio)
        assert row.text == clip.text and row.seconds == len(sound) / RATE and row.attributes["split"] == "train"
        assert np.abs(sound - render(clip)).max() <= 1 / 32768  # half a step of 16 bits, and 1 − 1/32768 at the top
        alone = len({part.variant for part in clip.parts}) == 1 and clip.style in ("normal", "monotone")
        assert (row.attributes["f0_hz"] is not None) == alone


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    there = tmp_path / f"{PLAIN.name()}.wav"
    seconds, hertz = record(PLAIN, tmp_path)
    before = there.stat().st_mtime_ns
    assert record(PLAIN, tmp_path) == (seconds, hertz) and there.stat().st_mtime_ns == before


def test_another_specification_needs_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(BadInput, match="another specification"):
        speak_corpus(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "spec.json"]
    assert main(["speak", "--out", str(tmp_path)]) == 2 and "another specification" in capsys.readouterr().err


def changed(path: str, value: object) -> dict:
    """SMALL with one value changed; `path` is its keys."""
    spec = json.loads(json.dumps(SMALL))
    *way, last = path.split("/")
    inner = spec
    for key in way:
        inner = inner[key]
    inner[last] = value
    return spec


@pytest.mark.parametrize(("spec", "message"), [
    ({}, "keys none"), (changed("sed", 1), "seed, splits"), (changed("seed", None), "seed, splits"),
    (changed("splits", {}), "seed, splits"),
    (changed("splits/train/voices", ["f5", "aunty", "m1", "m3"]), "share the voices aunty, f5"),
    (changed("splits/train/sentences", "test"), "share the sentences of test"),
    (changed("splits/train/sentences", "more"), "'more'"),
    (changed("splits/extra", {"clips": 1, "voices": VOICES["valid"]}), "'extra'"),
    (changed("splits/train/clips", 0), "clips 0"), (changed("splits/train/voices", ["f1", "reed"]), "reed"),
    (changed("splits/train/voices", 7), "voices 7"), (changed("splits/train/voices", []), "voices none"),
    (changed("splits/train/speed", 2), "clips and voices"), (changed("splits/train/languages", ["klingon"]), "klingon"),
    (changed("splits/train/languages", []), "languages none"),
    (changed("splits/..", {"clips": 1, "voices": VOICES["valid"], "sentences": "valid"}), r"named '\.\.'"),
    (changed("splits/a\\b", {"clips": 1, "voices": VOICES["valid"], "sentences": "valid"}), "letters, digits"),
    (changed("ranges", {"rate": [20, 90]}), "80 to 450"), (changed("ranges", {"level": [-20, 6]}), "-90 to 0"),
    (changed("ranges", {"words": [1, 9]}), "3 to 6"), (changed("ranges", {"level": [0]}), "level"),
    (changed("ranges", {"x": [0, 1]}), "x"),
])
def test_bad_specifications_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_spec(spec)


def test_shared_voices_can_be_meant() -> None:
    check_spec({**changed("splits/train/voices", VOICES["test"]), "shared_voices": True})


def test_the_printed_specification_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speak", "--print-spec"]) == 0
    assert json.loads(capsys.readouterr().out) == DEFAULT_SPEC
    check_spec(DEFAULT_SPEC)
    assert main(["speak", "--spec", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "none.json, which is not a file" in capsys.readouterr().err
