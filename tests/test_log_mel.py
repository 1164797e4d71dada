"""Log-mel frames: Whisper's numbers, one clip's independence of its batch, statistics over valid frames."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from omni_adapters.encoders.log_mel import MIN_STD, LogMelEncoder, mel_filters
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput

RATE = 16_000  # Hz


def clip(num_samples: int, seed: int = 0) -> torch.Tensor:
    """A chirp in noise, so that loud, quiet and floored mel cells all occur."""
    time = torch.arange(num_samples, dtype=torch.float64) / RATE
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.3 * torch.sin(2 * torch.pi * (200 + 600 * time) * time) + 1e-3 * noise).float()


def plain_log_mel(samples: np.ndarray, keep: int) -> np.ndarray:
    """The recipe in float64 with explicit windows and numpy's FFT: the first `keep` frames, of 2 hops or more."""
    padded = np.pad(samples.astype(np.float64), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[160 * t : 160 * t + 400] * window for t in range(keep)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    mel = np.log10(np.maximum(bank().T @ power.T, 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def bank() -> np.ndarray:
    return mel_filter_bank(num_frequency_bins=201, num_mel_filters=80, min_frequency=0, max_frequency=8000,
                           sampling_rate=RATE, norm="slaney", mel_scale="slaney")


def test_is_an_audio_encoder():
    encoder = LogMelEncoder()
    assert isinstance(encoder, AudioEncoder)
    assert (encoder.sampling_rate, encoder.n_mels, encoder.d_model, encoder.frame_rate) == (16_000, 80, 80, 100.0)
    assert not list(encoder.parameters())


def test_filters_equal_transformers():
    """Two float64 formulas of one bank, of values below 0.03, rounded to float32."""
    assert np.abs(mel_filters().numpy().T - bank()).max() < 0.03 * 2**-24 * 1.01


def test_equals_whisper_feature_extractor_on_30_s():
    """Both take torch's STFT. |z|² and sums of up to 20 positive products differ by rounding only, 30 · 2⁻²⁴ relative;
    log10 and / 4 make that 2e-7 absolute, and values up to 2 are themselves rounded by 1.2e-7, a few times."""
    samples = clip(30 * RATE)
    expected = WhisperFeatureExtractor()(samples.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
    got = LogMelEncoder().preprocess([samples])
    assert got.values.shape == (1, 80, 3000) and got.lens.tolist() == [3000]
    torch.testing.assert_close(got.values, expected, rtol=0, atol=1e-6)
    assert expected.max() - expected.min() > 1  # the clip does exercise the range


@pytest.mark.parametrize("num_samples", [1, 2, 159, 160, 161, 200, 201, 319, 320, 321, 1120, 8000])
def test_equals_the_plain_recipe_down_to_one_sample(num_samples):
    """Noise has no FFT bin far below the others, so float32 is good to 1e-5 relative in a mel cell, 1e-6 in log10 / 4.
    A single sample has a flat spectrum, hence no quiet bins either."""
    samples = torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    frames = -(-num_samples // 160)
    whole = np.zeros(160 * max(frames, 2), np.float32)
    whole[:num_samples] = samples
    got = LogMelEncoder().preprocess([samples])
    assert got.values.shape == (1, 80, frames) and got.lens.tolist() == [frames]
    np.testing.assert_allclose(got.values[0].numpy(), plain_log_mel(whole, frames), rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_a_clip_alone_equals_the_clip_in_a_batch_to_the_last_bit(sizes):
    encoder, clips = LogMelEncoder(), [clip(size, seed=size) for size in sizes]
    batch = encoder(encoder.preprocess(clips))
    assert batch.lens.tolist() == [(size + 159) // 160 for size in sizes] and batch.lens.dtype == torch.int64
    assert batch.values.shape == (len(sizes), max(batch.lens), 80)
    for row, samples in enumerate(clips):
        alone = encoder(encoder.preprocess([samples]))
        assert torch.equal(alone.values[0], batch.values[row, : alone.lens[0]])


def test_silence_is_finite():
    assert LogMelEncoder().preprocess([torch.zeros(1600)]).values.unique().tolist() == [-1.5]  # (log10 1e-10 + 4) / 4


@pytest.mark.parametrize("convert", [
    lambda x: x.numpy(), lambda x: x.double(), lambda x: x.double().numpy(), lambda x: x.numpy()[::-1][::-1],
    lambda x: x.numpy().astype(">f4"), lambda x: torch.stack([x, x], dim=1)[:, 0], lambda x: x.clone().requires_grad_(),
])
def test_every_form_of_a_waveform_gives_the_same_frames(convert):
    samples = clip(4000)
    got, expected = LogMelEncoder().preprocess([convert(samples)]), LogMelEncoder().preprocess([samples])
    assert torch.equal(got.values, expected.values) and not got.values.requires_grad


def test_reversed_array_is_read_backwards():
    samples = clip(4000)
    got = LogMelEncoder().preprocess([samples.numpy()[::-1]])
    assert torch.equal(got.values, LogMelEncoder().preprocess([samples.flip(0)]).values)


@pytest.mark.parametrize("waveforms, words", [
    (torch.zeros(100), ["one Tensor of shape (100,)", "Wrap a single clip"]),
    (np.zeros((2, 100), np.float32), ["one ndarray of shape (2, 100)"]),
    ([], ["no waveforms"]),
    ([torch.zeros(9), [0.0, 1.0]], ["clip 1 of type list"]),
    ([torch.zeros(9), torch.zeros(2, 9)], ["clip 1 of shape (2, 9)", "mono"]),
    ([np.zeros(9, np.int16)], ["clip 0 of int16", "32768"]),
    ([torch.zeros(9, dtype=torch.int16)], ["clip 0 of torch.int16"]),
    ([np.zeros(9, np.complex64)], ["clip 0 of complex64"]),
    ([torch.zeros(9), torch.zeros(0)], ["clip 1 without samples"]),
    ([torch.zeros(9), torch.tensor([0.0, float("nan")])], ["NaN or infinity in clip 1"]),
    ([np.array([1e300])], ["NaN or infinity in clip 0"]),
])
def test_bad_waveforms_are_named(waveforms, words):
    with pytest.raises(BadInput) as caught:
        LogMelEncoder().preprocess(waveforms)
    assert all(word in str(caught.value) for word in ["LogMelEncoder.preprocess", *words])


def test_statistics_come_from_valid_frames_only():
    encoder = LogMelEncoder()
    inputs = encoder.preprocess([clip(16_000, 1), clip(4_000, 2), clip(7_000, 3)])
    frames = torch.cat([inputs.values[row, :, :length].T for row, length in enumerate(inputs.lens.tolist())])
    inputs.values[1, :, inputs.lens[1] :] = float("nan")  # beyond a row's length anything may stand
    encoder.fit_statistics(inputs)
    np.testing.assert_allclose(encoder.mean.numpy(), frames.double().numpy().mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder.std.numpy(), frames.double().numpy().std(axis=0), rtol=0, atol=1e-6)
    out = encoder(inputs)
    normal = torch.cat([out.values[row, :length] for row, length in enumerate(out.lens.tolist())])
    torch.testing.assert_close(normal.mean(dim=0), torch.zeros(80), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal.std(dim=0, correction=0), torch.ones(80), rtol=0, atol=1e-4)


def test_statistics_of_batches_are_those_of_all_clips_at_once():
    whole, parts = LogMelEncoder(), LogMelEncoder()
    clips = [clip(16_000, 1), clip(4_000, 2) * 1e-4, clip(7_000, 3), clip(100, 4)]
    whole.fit_statistics(whole.preprocess(clips))
    nothing = Features(torch.zeros(1, 80, 3), torch.tensor([0]))
    parts.fit_statistics(iter([parts.preprocess(clips[:1]), nothing, parts.preprocess(clips[1:3]), parts.preprocess(clips[3:])]))
    for name in ("mean", "std"):  # fp64 sums of 272 frames, kept in fp32: one rounding apart at most
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=2**-23, atol=2**-23)


def test_a_band_that_stands_still_is_not_magnified_without_bound():
    encoder = LogMelEncoder()
    encoder.fit_statistics(Features(torch.full((1, 80, 5), 0.3), torch.tensor([5])))
    torch.testing.assert_close(encoder.std, torch.full((80,), MIN_STD))


def test_statistics_travel_in_the_state_dict():
    fitted, fresh = LogMelEncoder(), LogMelEncoder()
    inputs = fitted.preprocess([clip(8_000)])
    assert torch.equal(fresh(inputs).values, inputs.values.transpose(1, 2))  # identity until set
    fitted.fit_statistics(inputs)
    assert not torch.equal(fitted(inputs).values, fresh(inputs).values)
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fitted(inputs).values, fresh(inputs).values)
    given_ = LogMelEncoder(mean=fitted.mean, std=fitted.std.tolist())
    assert torch.equal(fitted(inputs).values, given_(inputs).values)
    assert given_.mean.data_ptr() != fitted.mean.data_ptr()


@pytest.mark.parametrize("inputs, words", [
    (Features(torch.zeros(2, 80, 5), torch.tensor([0, 0])), "without one valid frame"),
    (Features(torch.zeros(0, 80, 5), torch.zeros(0, dtype=torch.int64)), "without one valid frame"),
    (Features(torch.full((1, 80, 5), float("inf")), torch.tensor([5])), "NaN or infinity in row 0"),
    (Features(torch.zeros(1, 80, 5), torch.tensor([6])), "lens[0] = 6"),
    (Features(torch.zeros(1, 5, 80), torch.tensor([5])), "values (1, 5, 80)"),
    (Features(torch.zeros(2, 80, 5), torch.tensor([5])), "for 2 clips"),
])
def test_statistics_refuse_and_change_nothing(inputs, words):
    encoder = LogMelEncoder(mean=[0.5] * 80)
    with pytest.raises(BadInput) as caught:
        encoder.fit_statistics(inputs)
    assert words in str(caught.value)
    assert torch.equal(encoder.mean, torch.full((80,), 0.5)) and torch.equal(encoder.std, torch.ones(80))


@pytest.mark.parametrize("statistics", [
    {"mean": [0.0] * 79}, {"std": [1.0] * 79 + [0.0]}, {"std": [-1.0] * 80}, {"mean": [float("nan")] * 80},
])
def test_bad_statistics_are_refused(statistics):
    with pytest.raises(BadInput, match="LogMelEncoder"):
        LogMelEncoder(**statistics)


def test_forward_refuses_transposed_mel():
    with pytest.raises(BadInput, match="Pass what preprocess returns"):
        LogMelEncoder()(Features(torch.zeros(1, 7, 80), torch.tensor([7])))


def test_framing_sound_imports_no_transformers():
    code = ("import sys, torch; from omni_adapters.encoders.log_mel import LogMelEncoder as E; "
            "E().preprocess([torch.zeros(400)]); sys.exit('transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
