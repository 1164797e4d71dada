"""Audio files: every format comes back, and no file, however crafted, decides how much memory is used."""

import math
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from omni_adapters.data.audio import load_audio, resample, save_audio
from omni_adapters.shapes import BadInput, MissingExtra

RATE = 16000


def tone(seconds=0.5, rate=RATE, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(declared_bytes, samples, *, rate=RATE, kind=1, bits=16):
    """A mono WAV whose header says `declared_bytes` of data, whatever `samples` (bytes) really hold."""
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * bits // 8, bits // 8, bits)
    riff = b"RIFF" + struct.pack("<I", (36 + declared_bytes) & 0xFFFFFFFF) + b"WAVE"
    return riff + b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", declared_bytes) + samples


def peak_memory(action):
    """Bytes allocated at the highest point of `action()`; NumPy reports its arrays to tracemalloc."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refusal_of(path, **arguments):
    with pytest.raises(BadInput) as refusal:
        load_audio(path, **arguments)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("form, subtype, tolerance", [
    ("WAV", "PCM_16", 4e-5), ("WAV", "FLOAT", 0), ("FLAC", "PCM_24", 1e-6), ("AIFF", "PCM_16", 4e-5),
    ("OGG", "VORBIS", 0.05), ("MP3", "MPEG_LAYER_III", 0.05),
])
def test_every_format_comes_back(tmp_path, form, subtype, tolerance):
    path = tmp_path / f"tone.{form.lower()}"
    soundfile.write(path, tone(), RATE, format=form, subtype=subtype)
    loaded = load_audio(path)
    assert loaded.dtype == np.float32 and loaded.shape == (RATE // 2,)
    middle = slice(2000, -2000)  # lossy codecs bend the edges
    np.testing.assert_allclose(loaded[middle], tone()[middle], atol=tolerance)


@given(pcm=arrays(np.int16, st.integers(1, 200)), rate=st.sampled_from([8000, 16000, 44100]))
def test_sixteen_bits_survive_exactly(tmp_path_factory, pcm, rate):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    waveform = pcm.astype(np.float32) / 32768
    save_audio(path, waveform, rate)
    assert np.array_equal(load_audio(path, rate), waveform)
    assert os.listdir(path.parent) == ["clip.wav"], "no temporary file stays behind"


@given(waveform=arrays(np.float32, st.integers(1, 200), elements=st.floats(-1, 1, width=32)))
def test_saving_rounds_to_the_nearest_step(tmp_path_factory, waveform):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    save_audio(path, waveform, RATE)
    half = np.where(waveform > 1 - 1 / 32768, 1, 0.5) / 32768  # +1.0 has no step of its own: 32767 is the highest
    assert (np.abs(load_audio(path) - waveform) <= half + 1e-7).all()


def test_channels_are_averaged(tmp_path):
    left, right = tone(hertz=300), tone(hertz=500)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_a_file_in_blocks_equals_the_whole_resampled_at_once(tmp_path, rate):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 150_000).astype(np.float32)  # three blocks
    soundfile.write(tmp_path / "noise.wav", noise, rate, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "noise.wav", RATE), soxr.resample(noise, rate, RATE))


@given(st.integers(0, 3000), st.sampled_from([8000, 16000, 22050, 48000]), st.sampled_from([8000, 16000, 24000]))
def test_resampling_scales_the_length(length, from_rate, to_rate):
    resampled = resample(np.zeros(length), from_rate, to_rate)
    assert resampled.dtype == np.float32
    assert abs(len(resampled) - length * to_rate / from_rate) <= 0.5 + 1e-9
    assert from_rate != to_rate or len(resampled) == length


def test_resampling_keeps_a_tone_and_drops_what_does_not_fit():
    middle = slice(1000, -1000)
    np.testing.assert_allclose(resample(tone(rate=22050), 22050, RATE)[middle], tone()[middle], atol=1e-3)
    assert np.abs(resample(tone(rate=48000, hertz=15000), 48000, RATE)[middle]).max() < 1e-3


def test_files_that_are_no_audio(tmp_path):
    assert "a path where there is no file; expected an audio file" in refusal_of(tmp_path / "missing.wav")
    assert "a path where there is no file" in refusal_of(tmp_path)
    for name in ("text.wav", "text.mp3", "text.raw", "text"):
        (tmp_path / name).write_text("not audio at all " * 50)
        assert "a file that cannot be decoded" in refusal_of(tmp_path / name)
    (tmp_path / "nothing.wav").write_bytes(b"")
    assert "expected WAV, FLAC, OGG, MP3 or AIFF. Convert it" in refusal_of(tmp_path / "nothing.wav")
    (tmp_path / "header.wav").write_bytes(wav(0, b""))
    assert "a file without samples; expected at least one sample" in refusal_of(tmp_path / "header.wav")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_not_finite(tmp_path, value, channels):
    samples = np.zeros((RATE, channels), np.float32)
    samples[RATE // 2, -1] = value
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    assert "NaN or infinity within 1.0 s; expected finite samples" in refusal_of(tmp_path / "bad.wav")


def test_channels_that_add_up_to_infinity(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.full((100, 2), 3e38, np.float32), RATE, subtype="FLOAT")
    assert "NaN or infinity" in refusal_of(tmp_path / "loud.wav")


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_rates_no_recording_has(tmp_path, rate):
    (tmp_path / "odd.wav").write_bytes(wav(2000, bytes(2000), rate=rate))
    assert f"a file at {rate} Hz; expected 1000 to 768000 Hz" in refusal_of(tmp_path / "odd.wav")


@pytest.mark.parametrize("declared", [0x7FFFFFFE, 0xFFFFFFFE, 0xFFFFFFFF], ids=hex)
def test_a_header_that_declares_gigabytes_allocates_none(tmp_path, declared):
    (tmp_path / "pipe.wav").write_bytes(wav(declared, struct.pack("<4h", 0, 16384, -16384, 0) * 500))
    loaded = []
    assert peak_memory(lambda: loaded.append(load_audio(tmp_path / "pipe.wav"))) < 4e6  # bytes
    assert loaded[0].tolist() == [0, 0.5, -0.5, 0] * 500, "such sizes are what pipes write; the samples are all there"


def test_data_that_ends_early_is_refused(tmp_path):
    (tmp_path / "cut.wav").write_bytes(wav(1_500_000_000, bytes(2000)))
    message = "a file cut short, 2000 of 1500000000 bytes of samples; expected the whole file"
    assert message in refusal_of(tmp_path / "cut.wav")
    for form in ("FLAC", "AIFF"):
        path = tmp_path / f"cut.{form.lower()}"
        soundfile.write(path, tone(2.0), RATE, format=form)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "cut short" in refusal_of(path) or "cannot be decoded" in refusal_of(path)


def test_a_flac_that_declares_256_gib_allocates_none(tmp_path):
    path = tmp_path / "lie.flac"
    soundfile.write(path, tone(), RATE)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # STREAMINFO: the 36 bits of the total number of samples, all set
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert soundfile.info(str(path)).frames == 2**36 - 1
    assert peak_memory(lambda: refusal_of(path)) < 4e6


def test_twenty_minutes_of_silence_stop_at_the_cap(tmp_path, monkeypatch):
    path = tmp_path / "silence.flac"
    soundfile.write(path, np.zeros(20 * 60 * 8000, np.int16), 8000)
    assert path.stat().st_size < 50_000
    decoded = []
    read = soundfile.SoundFile.read

    def counting(file, *arguments, **options):
        block = read(file, *arguments, **options)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    memory = peak_memory(lambda: refusal_of(path, max_seconds=60.0))
    assert 60 * 8000 < sum(decoded) <= 60 * 8000 + 65536, "one block beyond the cap, not twenty minutes"
    assert memory < 3 * 60 * RATE * 4 + 4e6
    assert "a file longer than 600 s; expected at most max_seconds = 600. Cut it" in refusal_of(path)
    assert len(load_audio(path, 8000, max_seconds=math.inf)) == 20 * 60 * 8000


def test_many_channels_share_one_block(tmp_path):
    soundfile.write(tmp_path / "wide.wav", np.zeros((4000, 512), np.int16), RATE)
    loaded = []
    assert peak_memory(lambda: loaded.append(load_audio(tmp_path / "wide.wav"))) < 4e6
    assert loaded[0].shape == (4000,)


def test_exactly_the_cap_is_allowed(tmp_path):
    save_audio(tmp_path / "one.wav", np.zeros(RATE, np.float32), RATE)
    assert len(load_audio(tmp_path / "one.wav", max_seconds=1.0)) == RATE
    refusal_of(tmp_path / "one.wav", max_seconds=1.0 - 1 / RATE)


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan])
def test_a_cap_must_be_positive(tmp_path, seconds):
    assert f"max_seconds {seconds}; expected a positive number" in refusal_of(tmp_path / "any.wav", max_seconds=seconds)


@pytest.mark.parametrize("rate", [0, -16000, 999, 10**6, 16000.0, True, "16000"])
def test_rates_that_are_asked_for(tmp_path, rate):
    message = "a sampling rate of .*; expected an integer from 1000 to 768000 Hz"
    with pytest.raises(BadInput, match=message):
        load_audio(tmp_path / "any.wav", rate)
    with pytest.raises(BadInput, match=message):
        save_audio(tmp_path / "any.wav", tone(), rate)
    for rates in ((RATE, rate), (rate, RATE)):
        with pytest.raises(BadInput, match=message):
            resample(tone(), *rates)


@pytest.mark.parametrize("waveform, message", [
    (np.zeros((2, 100), np.float32), r"a waveform \(2, 100\) of float32; expected floating point \(T,\), mono"),
    (np.zeros(100, np.int16), r"a waveform \(100,\) of int16; .* divide 16-bit integers by 32768"),
    (np.zeros(0, np.float32), "no samples for .*; expected at least one"),
    (np.array([0.5, -1.5]), r"a waveform with peak 1\.5 for .*; expected finite samples in \[-1, 1\]\. Divide by"),
    (np.array([0.5, math.nan]), "a waveform with peak nan"),
    (np.array([0.5, -math.inf]), "a waveform with peak inf"),
])
def test_what_is_not_saved(tmp_path, waveform, message):
    (tmp_path / "clip.wav").write_text("before")
    with pytest.raises(BadInput, match=f"save_audio: got {message}"):
        save_audio(tmp_path / "clip.wav", waveform, RATE)
    assert (tmp_path / "clip.wav").read_text() == "before"


def test_saving_into_no_folder(tmp_path):
    with pytest.raises(BadInput, match=r"save_audio: got .* in a folder that does not exist"):
        save_audio(tmp_path / "absent" / "clip.wav", tone(), RATE)


def test_resampling_needs_a_mono_float_waveform():
    with pytest.raises(BadInput, match=r"resample: got a waveform \(10, 2\) of float64"):
        resample(np.zeros((10, 2)), 8000, RATE)


@pytest.mark.parametrize("module, action", [
    ("soundfile", lambda path: load_audio(path)),
    ("soundfile", lambda path: save_audio(path, tone(), RATE)),
    ("soxr", lambda path: load_audio(path, 8000)),
    ("soxr", lambda path: resample(tone(), RATE, 8000)),
])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, module, action):
    save_audio(tmp_path / "clip.wav", tone(), RATE)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf'needs {module}, which is not installed\. .*"omni-adapters\[audio\]"'):
        action(tmp_path / "clip.wav")
