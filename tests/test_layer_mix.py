"""LayerMix: the equation, its gradient by hand, dtypes and refusals; and what a run shows of what was learned.

Weights of `num_layers` ≤ 7 layers: in float64 sums of so few products of order 1 are within 8 · 2⁻⁵³ = 1e-15 each way.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omni_adapters import OmniGPT, Projector
from omni_adapters.encoders.layer_mix import LayerMix
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.shapes import BadInput
from omni_adapters.training.pictures import draw_layer_mix
from omni_adapters.training.report import layer_mix, write_report

EXACT = 1e-14


def plain(mix: LayerMix, frame: Tensor) -> Tensor:
    """One frame (L·width,) → (width,), layer by layer."""
    shares = [torch.exp(score) for score in mix.scores.double()]
    total = torch.zeros(mix.width, dtype=torch.float64)
    for number, share in enumerate(shares):
        layer = frame[number * mix.width : (number + 1) * mix.width]
        if mix.normalize:
            layer = (layer - layer.mean()) / (layer.var(correction=0) + 1e-5).sqrt()
        total += share / sum(shares) * layer
    return total


def scored(num_layers: int, width: int, seed: int = 0, **options: Any) -> LayerMix:
    rng = torch.Generator().manual_seed(seed)
    mix = LayerMix(num_layers, width, **options)
    with torch.no_grad():
        mix.scores.copy_(2 * torch.randn(num_layers, generator=rng))
    return mix


@settings(max_examples=60)
@given(num_layers=st.integers(1, 7), width=st.integers(1, 6), shape=st.lists(st.integers(0, 4), min_size=2, max_size=2),
       normalize=st.booleans(), seed=st.integers(0, 99))
def test_each_frame_is_the_equation(num_layers: int, width: int, shape: list[int], normalize: bool, seed: int) -> None:
    """float64 frames. Normalised, an error of 2⁻⁵³ may grow by 1/√1e-5 = 316, in a frame without variance."""
    mix = scored(num_layers, width, seed, normalize=normalize).double()
    frames = torch.randn(*shape, num_layers * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = mix(frames)
    assert mixed.shape == (*shape, width)
    for found, frame in zip(mixed.flatten(0, 1), frames.flatten(0, 1)):
        torch.testing.assert_close(found, plain(mix, frame), rtol=0, atol=316 * EXACT if normalize else EXACT)


def test_the_first_channels_are_the_first_layer() -> None:
    mix = LayerMix(3, 2)
    with torch.no_grad():
        mix.scores.copy_(torch.tensor([0.0, 50.0, 0.0]))  # e⁵⁰: the others are below float32's resolution
    assert mix(torch.arange(6.0).view(1, 1, 6)).tolist() == [[[2.0, 3.0]]]


def test_it_begins_as_the_mean_in_float32_and_begins_again() -> None:
    mix = LayerMix(4, 5)
    assert {name: (tuple(p.shape), p.dtype) for name, p in mix.named_parameters()} == {"scores": ((4,), torch.float32)}
    frames = torch.randn(2, 3, 20)
    torch.testing.assert_close(mix(frames), frames.view(2, 3, 4, 5).mean(dim=2), rtol=0, atol=4 * 2**-23)
    assert mix.weights().tolist() == [0.25] * 4 and not mix.weights().requires_grad
    trained = scored(4, 5)
    assert trained.weights().sum().item() == pytest.approx(1, abs=4 * 2**-23) and len(set(trained.weights().tolist())) == 4
    trained.reset_parameters()
    assert trained.weights().tolist() == [0.25] * 4


def test_the_gradient_of_the_scores_is_the_one_computed_by_hand() -> None:
    """∂/∂s_l Σ g·out = w_l (g·layer_l − Σ_k w_k g·layer_k)."""
    mix = scored(3, 4).double()
    frames, g = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    (mix(frames) * g).sum().backward()
    along = (frames.view(2, 5, 3, 4) * g.unsqueeze(2)).sum(dim=(0, 1, 3))
    weights = mix.weights()
    assert mix.scores.grad is not None
    torch.testing.assert_close(mix.scores.grad, weights * (along - (weights * along).sum()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_float32_scores_work_in_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    """Each of L weights is rounded once, and the sum of L products at most L times: (L + 1) · eps of Σ w·|layer|."""
    mix, frames = scored(5, 8), torch.randn(2, 3, 40, dtype=torch.float64).to(dtype)
    mixed = mix(frames)
    assert mixed.dtype == dtype
    expected = mix.double()(frames.double())
    bound = 6 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps * mix(frames.double().abs())
    assert ((mixed.double() - expected).abs() <= bound).all()
    mixed.float().sum().backward()
    assert mix.scores.grad is not None and mix.scores.grad.any()


@pytest.mark.parametrize(("refused", "message"), [
    (lambda: LayerMix(3, 4)(torch.zeros(2, 5, 8)), "LayerMix: got values (2, 5, 8), 8 wide; expected 3 layers of 4, 12 in all. "
                                                   "Ask the encoder for that many layers."),
    (lambda: LayerMix(0, 4), "LayerMix: got num_layers = 0; expected num_layers ≥ 1."),
    (lambda: LayerMix(3, -1), "LayerMix: got width = -1; expected width ≥ 1."),
])
def test_refusals_in_words(refused: Any, message: str) -> None:
    with pytest.raises(BadInput) as error:
        refused()
    assert str(error.value) == message


# ---- what a run shows ------------------------------------------------------------------------------------------------


def mixing(num_layers: int, pool: int | None = None) -> OmniGPT:
    projector = Projector(80, 32, 16, stack=4, num_layers=num_layers, pool=pool)
    if num_layers > 1:
        with torch.no_grad():
            projector.mix.scores[1] += 1
    return OmniGPT(reference(), (LogMelEncoder(), projector))


def bars_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every axis that is closed from here on."""
    import matplotlib.pyplot as pyplot

    axes, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: (axes.extend(figure.axes), close(figure)))
    return axes


def test_the_picture_has_a_bar_a_layer_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = bars_of(monkeypatch)
    draw_layer_mix([0.5, 0.2, 0.3], tmp_path / "mix.png", layers=(0, 4, 12))
    assert (tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([50, 20, 30])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "4", "12"]
    assert axis.get_xlabel() == "layer of the encoder" and "%" in axis.get_ylabel() and axis.get_title()
    for weights, layers in (([], None), ([0.5, 0.5], (1, 2, 3))):
        with pytest.raises(BadInput, match="draw_layer_mix"):
            draw_layer_mix(weights, tmp_path / "none.png", layers)
    assert not (tmp_path / "none.png").exists()


def test_a_picture_of_many_layers_names_every_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = bars_of(monkeypatch)
    draw_layer_mix([1 / 33] * 33, tmp_path / "mix.png")
    assert len(axes[0].patches) == 33 and [t.get_text() for t in axes[0].get_xticklabels()] == [str(n) for n in range(0, 33, 3)]


ROWS = [{"step": 1, "loss": 2.0}, {"step": 1, "validation": {"right": {"loss": 1.0}, "gap": 0.5}}]


@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_report_shows_the_mix_where_there_is_one(num_layers: int, tmp_path: Path) -> None:
    omni, points = mixing(num_layers), (torch.randn(9, 32), torch.randn(9, 32))
    mix = layer_mix(omni)
    metrics = write_report(tmp_path, ROWS, points, {}, omni, mix)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text()) and metrics["soft_tokens_a_second"] == 25
    assert (tmp_path / "layer_mix.png").exists() == (num_layers > 1) == ("layer_mix" in metrics) == (mix is not None)
    if num_layers > 1:
        expected = torch.tensor([0.0, 1.0, 0.0, 0.0]).softmax(dim=0).tolist()
        assert metrics["layer_mix"] == pytest.approx(expected, abs=1e-6) == mix


def test_a_report_numbers_the_layers_as_the_encoder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    omni, points, axes = mixing(4, pool=3), (torch.randn(9, 32), torch.randn(9, 32)), bars_of(monkeypatch)
    for layers, names in (((2, 4, 6, 8), "2468"), (nn.ModuleList(), "0123"), ((2, 4), "0123"), (None, "0123")):
        there: Any = SimpleNamespace(encoder=SimpleNamespace(layers=layers, frame_rate=100.0), projector=omni.projector,
                                     trained=omni.trained)
        metrics = write_report(tmp_path, ROWS, points, {}, there, layer_mix(omni))
        (axis,) = [axis for axis in axes if "mix" in axis.get_ylabel()]
        assert "".join(label.get_text() for label in axis.get_xticklabels()) == names
        axes.clear()
    assert metrics["soft_tokens_a_clip"] == 3 and "soft_tokens_a_second" not in metrics
