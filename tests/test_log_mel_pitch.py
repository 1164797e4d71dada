"""The pitchgram: the equation, what a voice, noise and silence look like in it, and the encoder that gives it beside log-mel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_adapters import OmniGPT, Projector
from omni_adapters.encoders.log_mel import MIN_STD, LogMelEncoder
from omni_adapters.encoders.log_mel_pitch import LOWEST, N_HEIGHTS, LogMelPitchEncoder, pitchgram
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.sources import open_encoder

RATE = 16_000  # Hz
HEIGHTS = LOWEST * 2 ** (np.arange(N_HEIGHTS) / 12)


def voice(hertz: float, seconds: float = 0.5, tilt: float = 1.0) -> Tensor:
    """Harmonics up to 4 kHz, each 1 / number^tilt as loud."""
    time = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE
    harmonics = [torch.cos(2 * torch.pi * hertz * n * time + n * n) / n**tilt for n in range(1, int(4000 / hertz) + 1)]
    return 0.1 * torch.stack(harmonics).sum(dim=0).float()


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def plain_pitchgram(samples: np.ndarray, frames: int) -> np.ndarray:
    """The equation in float64: a transform written out at each frequency, one frame after another."""
    padded = np.pad(samples.astype(np.float64), 512, mode="reflect")
    window = np.zeros(1024)
    window[192:832] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(640) / 640)
    frequencies = np.arange(1, 129) * RATE / 1024
    transform = np.exp(-2j * np.pi * np.outer(frequencies, np.arange(1024)) / RATE)
    waves = np.cos(2 * np.pi * np.outer(1 / HEIGHTS, frequencies))
    magnitudes = np.stack([np.abs(transform @ (window * padded[160 * t : 160 * t + 1024])) for t in range(frames)], 1) ** (2 / 3)
    return (waves @ magnitudes) / magnitudes.sum(axis=0)


@pytest.mark.parametrize("num_samples", [1, 160, 161, 640, 641, 5000])
def test_equals_the_equation(num_samples: int) -> None:
    """Noise has no empty bins: float32 is good to 1e-5 of each magnitude, hence of each mean of cosines."""
    samples, frames = noise(num_samples), -(-num_samples // 160)
    whole = np.zeros(160 * max(frames, 4), np.float32)
    whole[:num_samples] = samples
    got = pitchgram(samples)
    assert got.shape == (N_HEIGHTS, frames) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), plain_pitchgram(whole, frames), rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(80, 450), st.floats(0.5, 1.5))
def test_a_voice_stands_out_at_its_pitch(hertz: float, tilt: float) -> None:
    """The best height that is no multiple of the period is at most a semitone away: heights are a semitone apart."""
    curve = pitchgram(voice(hertz, tilt=tilt))[:, 25].numpy()
    best = HEIGHTS[curve.argmax()]
    periods = round(hertz / best)  # a period twice as long fits as well
    assert periods >= 1 and abs(12 * np.log2(best * periods / hertz)) <= 1
    assert curve.max() <= 1 + 1e-6


def test_a_glide_is_followed() -> None:
    time = torch.arange(RATE, dtype=torch.float64) / RATE
    phase = 2 * torch.pi * 120 * (2**time - 1) / np.log(2)  # 120 Hz to 240 Hz in a second
    glide = 0.1 * sum((torch.cos(n * phase) / n for n in range(1, 12)), torch.zeros_like(time)).float()
    within = slice(12, None)  # heights of 120 Hz and more
    found = HEIGHTS[within][pitchgram(glide)[within, 10:90].argmax(dim=0).numpy()]
    expected = 120 * 2 ** (np.arange(10, 90) / 100)
    assert np.abs(12 * np.log2(found / expected)).max() <= 1


def test_noise_is_near_zero_and_silence_is_zero() -> None:
    """|X|^(2/3) of noise varies by 0.36 of its mean; some 40 of 128 bins are independent, as a window's main lobe is three wide:
    a weighted mean of cosines has a deviation of 0.36 √(1 / 80) = 0.04, and a mean size of 0.03."""
    assert pitchgram(noise(8000))[:, 5:45].abs().mean() < 0.06
    assert not pitchgram(torch.zeros(1600)).any()
    spoken = torch.cat([voice(150.0) + 0.01, torch.zeros(8000)])  # a pause stays silent, whatever the voice's mean is
    assert not pitchgram(spoken)[:, 54:].any()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 9.0), st.integers(0, 100))
def test_loudness_changes_nothing(gain: float, seed: int) -> None:
    samples = voice(150.0) + noise(8000, seed)
    torch.testing.assert_close(pitchgram(gain * samples), pitchgram(samples), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_a_clip_alone_equals_the_clip_in_a_batch_to_the_last_bit(sizes: list[int]) -> None:
    encoder, clips = LogMelPitchEncoder(), [noise(size, size) for size in sizes]
    batch = encoder(encoder.preprocess(clips))
    assert batch.values.shape == (len(sizes), max(batch.lens), 117)
    for row, samples in enumerate(clips):
        alone = encoder(encoder.preprocess([samples]))
        assert torch.equal(alone.values[0], batch.values[row, : alone.lens[0]])
        assert torch.equal(alone.values[0, :, :80], LogMelEncoder().preprocess([samples]).values[0].T)
        assert torch.equal(alone.values[0, :, 80:], pitchgram(samples).T)


def test_statistics_and_errors_are_its_own() -> None:
    encoder = LogMelPitchEncoder()
    assert isinstance(encoder, AudioEncoder) and not list(encoder.parameters())
    assert (encoder.d_model, encoder.n_mels, encoder.frame_rate, encoder.sampling_rate) == (117, 80, 100.0, RATE)
    encoder.fit_statistics(encoder.preprocess([voice(200.0) + noise(8000)]))
    assert encoder.mean.shape == encoder.std.shape == (117,) and (encoder.std >= MIN_STD).all()
    with pytest.raises(BadInput, match=r"LogMelPitchEncoder: got values \(1, 80, 5\).*mel frames \(B, 117, T_mel\)"):
        encoder(LogMelEncoder().preprocess([noise(800)]))
    with pytest.raises(BadInput, match=r"LogMelPitchEncoder.*117 finite numbers"):
        LogMelPitchEncoder(mean=[0.0] * 80)
    with pytest.raises(BadInput, match=r"LogMelPitchEncoder\.preprocess"):
        encoder.preprocess([])


def test_an_adapter_brings_it_back(tmp_path: Path) -> None:
    config = GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=32)
    encoder, waves = open_encoder("log_mel_pitch"), [voice(180.0), noise(3000)]
    assert type(encoder) is LogMelPitchEncoder
    encoder.fit_statistics(encoder.preprocess(waves))
    gpt = GPT(config)
    omni = OmniGPT(gpt, (encoder, Projector(117, 32, stack=5, zero_init=False)))
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = omni(idx, audio=waves)
    omni.save_adapter(tmp_path / "adapter.safetensors")
    omni.remove()
    again = OmniGPT.load_adapter(tmp_path / "adapter.safetensors", gpt)
    assert type(again.encoder) is LogMelPitchEncoder and torch.equal(again.encoder.mean, encoder.mean)
    assert torch.equal(again(idx, audio=waves), expected)
