"""The equations of training: the rate's curve, distillation, the loss of a step over micro-batches, pictures' arithmetic."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.distill import distillation_loss, graded, sum_of_losses
from omni_adapters.training.pictures import draw_pca, draw_run, draw_stages, principal_components, smoothed
from omni_adapters.training.schedule import warmup_cosine
from omni_adapters.training.trackers import PROJECT, flat, open_trackers

# ---- the rate --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1))
def test_the_rate_rises_then_falls_to_its_floor(num_steps: int, num_warmup: int, floor: float) -> None:
    rates = [warmup_cosine(step, num_steps, min(num_warmup, num_steps), floor) for step in range(num_steps)]
    top = min(num_warmup, num_steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:top] == [(step + 1) / top for step in range(top)]
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1:]))
    if num_steps > top:
        assert warmup_cosine(num_steps, num_steps, top, floor) == pytest.approx(floor, abs=1e-12)


def test_the_middle_of_the_cosine() -> None:
    assert warmup_cosine(0, 100, 0) == 1.0
    assert warmup_cosine(55, 100, 10) == pytest.approx(0.5)
    assert warmup_cosine(55, 100, 10, floor=0.2) == pytest.approx(0.6)


# ---- distillation ----------------------------------------------------------------------------------------------------------


def test_distillation_is_its_equation() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = temperature**2 * sum(float(p[i, j] * math.log(p[i, j] / q[i, j])) for i in range(5) for j in range(7))
        # fp32 over 35 terms of size ≤ 1: 35 · 2⁻²⁴ · T² < 1e-5
        assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(expected, abs=1e-5)


def test_nothing_flows_into_the_teacher_and_equal_logits_cost_nothing() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0
    assert distillation_loss(student, student).item() == pytest.approx(0.0, abs=1e-6)


def test_logits_of_the_last_token_only_cannot_be_graded() -> None:
    with pytest.raises(BadInput, match=r"logits \(2, 1, 5\) for targets \(2, 4\)"):
        graded(torch.zeros(2, 1, 5), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2, 3, 4), (2, 3, 4))])
def test_distillation_refuses_other_shapes(shapes: Any) -> None:
    with pytest.raises(BadInput, match="num_graded, vocab_size"):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    with pytest.raises(BadInput, match="temperature 0"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


def test_graded_rows_and_their_loss() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[-1, 2, 3, -1], [-1, -1, 0, 4]])
    assert torch.equal(graded(logits, targets), torch.stack([logits[0, 1], logits[0, 2], logits[1, 2], logits[1, 3]]))
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert torch.allclose(sum_of_losses(logits, targets), plain)


# ---- pictures --------------------------------------------------------------------------------------------------------------


def test_principal_components_of_a_known_cloud() -> None:
    """Points along a line in the plane x = y: that line is the first direction and has all the variance."""
    line = torch.linspace(-1, 1, 9).unsqueeze(1) * torch.tensor([[3.0, 3.0, 0.0]]) + torch.tensor([1.0, 2.0, 5.0])
    mean, directions, share = principal_components(line)
    assert torch.allclose(mean, torch.tensor([1.0, 2.0, 5.0]), atol=1e-6)
    assert torch.allclose(directions[0], torch.tensor([0.5**0.5, 0.5**0.5, 0.0]), atol=1e-6)
    assert share[0] == pytest.approx(1.0, abs=1e-6)


@given(st.integers(0, 50), st.integers(3, 12), st.integers(2, 6))
def test_principal_components_agree_with_the_covariance(seed: int, rows: int, width: int) -> None:
    points = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, directions, share = principal_components(points)
    values = torch.linalg.eigvalsh(points.T.cov()).flip(0)
    assert torch.allclose(share.double(), values[:2] / values.sum(), atol=1e-5)
    assert torch.allclose(directions @ directions.T, torch.eye(2), atol=1e-5)


@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(1, 25))
def test_smoothed_is_the_mean_of_the_last_ones(losses: list[float], steps: int) -> None:
    means = [sum(losses[max(0, i - steps + 1) : i + 1]) / len(losses[max(0, i - steps + 1) : i + 1]) for i in range(len(losses))]
    assert smoothed(losses, steps) == pytest.approx(means, abs=1e-10)  # sums of 60 numbers of order 100


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shares = draw_pca(torch.randn(50, 8), torch.randn(20, 8), tmp_path / "pca.png")
    assert all(0 < share < 1 for share in shares.values())
    scores = {name: {"loss": 1.0} for name in ("right", "shuffled", "blank", "text_oracle")}
    checks = [{"step": step, "validation": scores} for step in (0, 2)]
    rows = [checks[0], {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, checks[1]]
    draw_run(rows, tmp_path / "loss.png")
    draw_stages({"read": [2.0] * 30}, tmp_path / "one.png")
    draw_stages({"read": [2.0] * 30, "listen": [1.0]}, tmp_path / "two.png", "nats per word")
    for name in ("pca.png", "loss.png", "one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="principal_components"):
        draw_pca(torch.randn(5, 8), torch.randn(1, 8), tmp_path / "none.png")


# ---- trackers --------------------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values: dict[str, float], step: int) -> None:
        if values.get("loss") == 13.0:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("wandb")
    module.runs = []

    def init(**settings: Any) -> FakeRun:
        if settings["mode"] == "online" and settings["config"].get("unreachable"):
            raise ConnectionError("no route")
        module.runs.append(FakeRun(**settings))
        return module.runs[-1]

    module.init = init
    module.api = SimpleNamespace(api_key=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return module


def test_wandb_gets_numbers_by_their_paths_and_works_offline(wandb: Any, tmp_path: Path) -> None:
    with open_trackers(["wandb"], tmp_path / "run", {"steps": 5}) as log:
        log({"loss": 2.0, "validation": {"right": {"loss": 1.0}, "samples": ["a"]}, "name": "x"}, 3)
    run = wandb.runs[0]
    assert run.settings["mode"] == "offline" and run.settings["project"] == PROJECT and run.settings["name"] == "run"
    assert run.logged == [(3, {"loss": 2.0, "validation/right/loss": 1.0})] and run.finished


def test_an_unreachable_wandb_goes_offline(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    wandb.api.api_key = "k"
    with open_trackers(["wandb"], tmp_path / "run", {"unreachable": True}):
        pass
    assert [run.settings["mode"] for run in wandb.runs] == ["offline"]
    assert "no route" in capsys.readouterr().err


def test_a_tracker_that_fails_ends_nothing(wandb: Any, tmp_path: Path, capsys: Any) -> None:
    with open_trackers(["wandb"], tmp_path, {}) as log:
        for step, loss in enumerate((2.0, 13.0, 1.0)):
            log({"loss": loss}, step)
    assert [step for step, _ in wandb.runs[0].logged] == [0]
    assert capsys.readouterr().err.count("wandb failed and is left alone from step 1 on") == 1


def test_trackers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="mlflow"), open_trackers(["mlflow"], tmp_path, {}):
        pass
    for name, module in (("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra, match=r'omni-adapters\[trackers\]'), open_trackers([name], tmp_path, {}):
            pass


def test_flat() -> None:
    assert dict(flat({"a": 1, "b": {"c": {"d": 2}}})) == {"a": 1, "b/c/d": 2}
