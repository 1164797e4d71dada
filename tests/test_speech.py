"""Speech: the same arguments give the same samples, and different ones are heard."""

import ctypes
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("espeakng_loader")
from omni_adapters.data import speech
from omni_adapters.data.speech import add_noise, speak, variants, voices
from omni_adapters.shapes import BadInput, MissingExtra

TEXT = "Turn on the light in the kitchen."


def digest(waveform):
    return hashlib.sha256(waveform.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def first():
    return digest(speak(TEXT))


@pytest.fixture(scope="module")
def first_whispered():
    return digest(speak(TEXT, variant="whisper"))


def test_a_sentence():
    waveform = speak(TEXT)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert 1.0 < len(waveform) / 16000 < 2.0  # seconds, seven words at 175 a minute
    assert 0.3 < np.abs(waveform).max() <= 1.0
    assert len(speak(TEXT, sampling_rate=8000)) == pytest.approx(len(waveform) / 2, abs=1)


@given(st.lists(st.sampled_from([
    dict(variant="whisper"), dict(variant="klatt6", rate=300), dict(variant=None, pitch=90, pitch_range=0),
    dict(voice="de", volume=150), dict(variant="robosoft", rate=80), dict(variant="f3"),
]), max_size=3))
def test_what_was_spoken_before_leaves_no_trace(first, first_whispered, before):
    for arguments in before:
        speak("Something quite different", **arguments)
    assert digest(speak(TEXT)) == first
    assert digest(speak(TEXT, variant="whisper")) == first_whispered


def test_another_process_says_the_same(first):
    script = ("import sys; from omni_adapters.data.speech import speak; "
              "sys.stdout.buffer.write(speak(sys.argv[1]).tobytes())")
    spoken = subprocess.run([sys.executable, "-c", script, TEXT], capture_output=True, check=True).stdout
    assert hashlib.sha256(spoken).hexdigest() == first


def test_threads_say_the_same(first):
    with ThreadPoolExecutor(4) as pool:
        assert {digest(waveform) for waveform in pool.map(speak, [TEXT] * 12)} == {first}


def test_another_user_of_the_library_in_this_process(first):
    import espeakng_loader

    other = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        assert other.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000) == 22050
        assert [digest(speak(TEXT)) for _ in range(2)] == [first, first]
        assert other.espeak_SetVoiceByName(b"en-us") == 0, "the other user's library is still alive"
    finally:
        other.espeak_Terminate()
        speech._unload(other)


def test_every_variant_differs_and_repeats():
    spoken = {}
    for variant in variants():
        waveform = speak("Turn left", variant=variant)
        ctypes.CDLL(None).rand()  # noise drawn from the C library, as Reed's and caleb's is, would move on
        assert np.array_equal(speak("Turn left", variant=variant), waveform), variant
        assert 0.01 < np.sqrt(np.mean(waveform**2)) < 0.5, variant
        spoken[digest(waveform)] = variant
    assert len(spoken) == len(variants()) > 90
    assert {"f1", "f5", "m1", "m8", "whisper", "croak"} <= set(variants())
    assert not {"Reed", "caleb"} & set(variants())


def test_every_voice_speaks():
    assert len(voices()) > 130
    assert list(voices()) == sorted(voices())
    assert voices()["en-us"] == "English (America)" and voices()["en-gb"] == "English (Great Britain)"
    assert "fo" not in voices(), "Faroese has no dictionary in the package and would be silent"
    for voice in voices():
        assert speak("ma", voice=voice, variant=None).any(), voice


def test_voices_differ_and_read_their_own_letters():
    assert digest(speak("garage", voice="en-gb")) != digest(speak("garage", voice="en-us"))
    assert len(speak("こんにちは", voice="ja")) < len(speak("こんにちは", voice="en-us")), "spelled, not read"


def test_parameters_are_heard(first):
    assert len(speak(TEXT, rate=350)) < 0.7 * len(speak(TEXT))
    assert np.abs(speak(TEXT, volume=50)).max() == pytest.approx(np.abs(speak(TEXT)).max() / 2, rel=0.1)
    assert pitch_of(speak("aaah", pitch=99)) > 1.2 * pitch_of(speak("aaah", pitch=0))
    assert pitch_of(speak("aaah", variant="f3")) > 1.5 * pitch_of(speak("aaah", variant="m2"))
    assert digest(speak(TEXT, pitch_range=0)) != first


def pitch_of(waveform):
    """Hz, from the first strong peak of the middle's autocorrelation."""
    middle = waveform[len(waveform) // 3 :][:2000].astype(np.float64)
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 16000 / (40 + correlation[40:300].argmax())


@pytest.mark.parametrize("arguments, message", [
    (dict(voice="en-uk"), r"voice 'en-uk'; expected one such as .*en-gb.*\. See voices\(\) for all"),
    (dict(voice=""), r"voice ''; expected one such as"),
    (dict(variant="f9"), r"variant 'f9'; expected one such as f5, .*, or None\. See variants\(\) for all"),
    (dict(variant="Reed"), "variant 'Reed'; expected one such as"),
    (dict(variant="../f3"), "variant '../f3'; expected one such as"),
    (dict(rate=79), "rate 79; expected an integer from 80 to 450"),
    (dict(rate=451), "rate 451; expected an integer from 80 to 450"),
    (dict(rate=175.5), r"rate 175\.5; expected an integer"),
    (dict(pitch=-1), "pitch -1; expected an integer from 0 to 99"),
    (dict(pitch=100), "pitch 100; expected an integer from 0 to 99"),
    (dict(pitch_range=100), "pitch_range 100; expected an integer from 0 to 99"),
    (dict(volume=0), "volume 0; expected an integer from 1 to 200"),
    (dict(volume=True), "volume True; expected an integer"),
    (dict(text=""), "text ''; expected something to say"),
    (dict(text=" \n"), r"text ' \\n'; expected something to say"),
    (dict(text="..."), r"text '\.\.\.', which makes no sound; expected something the voice 'en-us' can say"),
    (dict(text="2", voice="chr"), "text '2', which makes no sound; .* A few languages come without words for numbers"),
    (dict(text="a\x01b"), r"text with '\\x01' at character 1; expected printable text\. Take it out"),
    (dict(text="a\0b"), r"text with '\\x00' at character 1"),
    (dict(text="hi \ud800"), r"text with '\\ud800' at character 3"),
])
def test_refusals(first, arguments, message):
    with pytest.raises(BadInput, match=f"speak: got {message}"):
        speak(**{"text": "hi", **arguments})
    assert digest(speak(TEXT)) == first, "a refusal leaves nothing behind"


def test_a_sampling_rate_no_one_has():
    with pytest.raises(BadInput, match="a sampling rate of 10; expected an integer from 1000"):
        speak("hi", sampling_rate=10)


def test_data_out_of_the_library_s_reach(first, tmp_path, monkeypatch):
    import espeakng_loader

    long = tmp_path / ("x" * 100) / ("y" * 100)
    long.mkdir(parents=True)
    (long / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    with monkeypatch.context() as patch:
        patch.setattr(espeakng_loader, "get_data_path", lambda: str(long / "espeak-ng-data"))
        with pytest.raises(RuntimeError, match=r"cannot read its data at .* bytes; it takes at most 159"):
            speak("hi")
    assert digest(speak(TEXT)) == first


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtra, match=r'speak needs espeakng-loader, .* "omni-adapters\[speech\]"'):
        speak("hi")


def test_importing_loads_nothing():
    script = ("import sys; import omni_adapters.data.speech as speech; "
              "assert not {'espeakng_loader', 'soxr', 'soundfile'} & set(sys.modules), 'not lazy'")
    subprocess.run([sys.executable, "-c", script], check=True)


signals = arrays(np.float32, st.integers(1, 500), elements=st.floats(-1, 1, width=32))
signals = signals.filter(lambda signal: (signal**2).mean() > 1e-6)


@given(signals, st.floats(-20, 40), st.integers(0, 2**32))
def test_noise_has_the_ratio_asked_for(signal, snr_db, seed):
    noisy = add_noise(signal, snr_db, seed)
    noise = noisy.astype(np.float64) - signal
    assert noisy.dtype == np.float32 and noisy.shape == signal.shape
    assert 10 * np.log10(np.mean(signal.astype(np.float64) ** 2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.01)
    assert np.array_equal(noisy, add_noise(signal, snr_db, seed))


def test_noise_is_white_and_new_for_each_seed():
    signal = np.ones(4096)
    one, two = (add_noise(signal, 0.0, seed) - 1 for seed in (1, 2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    power = np.abs(np.fft.rfft(one)) ** 2
    assert power[1:1000].mean() == pytest.approx(power[1000:2000].mean(), rel=0.2)


@pytest.mark.parametrize("signal, snr_db, message", [
    (np.zeros(10), 10.0, r"signal power 0\.0 and snr_db 10\.0; expected both finite, and power > 0"),
    (np.ones(10), np.inf, "snr_db inf"),
    (np.array([1.0, np.nan]), 10.0, "signal power nan"),
    (np.zeros(0), 10.0, r"a waveform \(0,\); expected a non-empty \(T,\)"),
    (np.ones((2, 5)), 10.0, r"a waveform \(2, 5\)"),
])
def test_noise_refusals(signal, snr_db, message):
    with pytest.raises(BadInput, match=f"add_noise: got {message}" if "a waveform" in message else message):
        add_noise(signal, snr_db, 0)
