"""A projector in a new house: exact where the embeddings are a linear map of each other, and honest where they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import bigram_gpt, fingerprint, nano_gpt, reference, tiny_hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import transfer as benchmark
from omni_adapters import OmniGPT, Projector
from omni_adapters.anatomy import discover_anatomy
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.projector import build_projector, described_projector
from omni_adapters.shapes import BadInput
from omni_adapters.transfer import (
    NUM_FOLDS,
    PoorTransfer,
    chosen,
    embedding_map,
    mapped,
    norms_embeddings,
    seen_embeddings,
    transfer_projector,
)

ROOT = Path(__file__).parents[1]
FRAMES = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))


def table_of(gpt: nn.Module) -> nn.Embedding:
    found = gpt.get_submodule(discover_anatomy(gpt).wte)
    assert isinstance(found, nn.Embedding)
    return found


def made_of(gpt: nn.Module, embeddings: Tensor) -> nn.Module:
    with torch.no_grad():
        table_of(gpt).weight[: len(embeddings)] = embeddings
    return gpt


def projector_to(width: int, **options: Any) -> Projector:
    torch.manual_seed(0)
    return Projector(5, width, 16, stack=2, **({"zero_init": False} | options))


# ---- the equation ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.sampled_from([10, 24, 36]))
def test_soft_tokens_go_where_an_exact_linear_map_sends_them(seed: int, width: int) -> None:
    """Rows y_i = A x_i: then the new soft tokens are A times the old ones. nanoGPT sees lengths too, so A may be any matrix.

    fc2 is rounded to fp32 once (eps each of 16 terms) after sums of 24 in fp64; a matmul of 16 terms adds as much again."""
    old = nano_gpt(n_embd=24)
    A = torch.randn(width, 24, generator=torch.Generator().manual_seed(seed))
    new = made_of(nano_gpt(n_embd=width), table_of(old).weight.detach()[:61] @ A.T)
    projector = projector_to(24)
    moved = transfer_projector(projector, old, new, ridge=0)
    with torch.no_grad():
        expected, found = projector(FRAMES).double() @ A.double().T, moved(FRAMES).double()
        hidden = torch.nn.functional.gelu(projector.fc1(torch.nn.functional.pad(FRAMES, (0, 0, 0, 1)).reshape(3, 4, 10)))
        terms = hidden.abs().double() @ (A.double() @ projector.fc2.weight.double()).abs().T  # sizes of what is summed
        terms = terms + (hidden.abs().double() @ projector.fc2.weight.abs().double().T) @ A.abs().double().T
    assert bool(((found - expected).abs() <= 2 * (16 + 24) * torch.finfo(torch.float32).eps * terms).all())


def test_directions_agree_where_the_gpt_norms_them_first() -> None:
    """From 32 to 48 wide by orthonormal columns, each row at a length of its own, which a GPT that norms does not see."""
    old, new = reference(n_embd=32), reference(n_embd=48)
    Q = torch.linalg.qr(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))[0]
    lengths = torch.rand(97, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    made_of(new, lengths * (table_of(old).weight.detach()[:97] @ Q.T))
    projector = projector_to(32)
    found = embedding_map(old, new, ridge=0)
    moved = transfer_projector(projector, old, new, ridge=0)
    with torch.no_grad():
        cosines = torch.nn.functional.cosine_similarity(projector(FRAMES) @ Q.T, moved(FRAMES), dim=-1)
    # relative errors of rows: 32 terms in fp32 of lengths · (E Qᵀ), as many in the soft tokens; 1 − cos is their square
    assert bool((1 - cosines <= 64 * torch.finfo(torch.float32).eps).all())
    assert found.r2 == pytest.approx(1, abs=1e-9) and found.num_tokens == 97


def test_to_the_same_gpt_nothing_changes() -> None:
    gpt = reference()
    sound = [0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(3))]
    torch.manual_seed(0)
    projector = Projector(80, 32, 16, stack=12, zero_init=False)
    moved = transfer_projector(projector, gpt, gpt, ridge=0)
    assert torch.allclose(embedding_map(gpt, gpt, ridge=0).matrix, torch.eye(32, dtype=torch.float64), atol=1e-10)
    logits = []
    for one in (projector, moved):
        omni = OmniGPT(gpt, (LogMelEncoder(), one))
        with torch.no_grad():
            logits.append(omni(torch.tensor([[1, 2, 3]]), None, sound))
        omni.remove()
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


# ---- against the plain twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_map_and_shares_are_those_of_numpys_least_squares(ridge: float) -> None:
    old, new = reference(n_embd=24, n_head=2, seed=0), reference(n_embd=32, seed=1)
    ids = chosen(None, 97)
    x, y = (seen_embeddings(gpt, discover_anatomy(gpt))[ids].numpy() for gpt in (old, new))

    def plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Ridge as extra rows √λ · I of x and 0 of y."""
        weight = np.sqrt(ridge * (x**2).sum() / x.shape[1])
        rows = np.concatenate([x, weight * np.eye(x.shape[1])]), np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
        return np.linalg.lstsq(*rows, rcond=None)[0].T

    found = embedding_map(old, new, ridge=ridge)
    np.testing.assert_allclose(found.matrix.numpy(), plain(x, y), atol=1e-10)
    fold, variance = np.arange(97) % NUM_FOLDS, ((y - y.mean(0)) ** 2).sum()
    left = sum(((y[fold == f] - x[fold == f] @ plain(x[fold != f], y[fold != f]).T) ** 2).sum() for f in range(NUM_FOLDS))
    assert found.r2 == pytest.approx(1 - left / variance, abs=1e-10)
    assert found.fitted_r2 == pytest.approx(1 - ((y - x @ plain(x, y).T) ** 2).sum() / variance, abs=1e-10)


def test_embeddings_that_have_nothing_in_common_are_told_apart_from_those_that_do() -> None:
    """Twenty tokens in 24 dimensions: any map fits them, which is not worth anything on a twenty-first."""
    old, strange = nano_gpt(n_embd=24, seed=0), nano_gpt(n_embd=32, seed=1)
    few = embedding_map(old, strange, ridge=0, tokens=range(20))
    assert few.fitted_r2 == pytest.approx(1, abs=1e-9) and few.r2 < 0.2 and few.num_tokens == 20
    assert embedding_map(old, strange).r2 < 0
    with pytest.warns(PoorTransfer, match=r"embeddings of 61 tokens explains 0\.\d+ .* and -\d\.\d+ of that") as caught:
        transfer_projector(projector_to(24), old, strange)
    assert caught[0].filename == __file__
    A = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(61, 32, generator=torch.Generator().manual_seed(1))
    alike = made_of(nano_gpt(n_embd=32), table_of(old).weight.detach() @ A.T + noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer_projector(projector_to(24), old, alike)
    # variance 24 of 25 is the map's; a fit of 24 columns to 49 rows leaves 1 · (1 + 24 / 25) unexplained at most twice over
    assert 0.8 < embedding_map(old, alike).r2 < 0.97


def test_only_the_named_tokens_are_fitted() -> None:
    old = nano_gpt(n_embd=24)
    A = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    new = made_of(nano_gpt(n_embd=24, seed=5), (table_of(old).weight.detach() @ A.T)[:50])
    frequent = torch.arange(50)
    assert embedding_map(old, new, ridge=0, tokens=frequent).r2 == pytest.approx(1, abs=1e-8)
    assert embedding_map(old, new, ridge=0).r2 < 0.99


# ---- hosts -----------------------------------------------------------------------------------------------------------------


def test_whether_a_gpt_norms_its_embeddings_is_found_out() -> None:
    for gpt, expected in ((reference(), True), (tiny_hf(), True), (bigram_gpt(), True), (nano_gpt(), False),
                          (reference().bfloat16(), True), (nano_gpt().bfloat16(), False)):
        before = fingerprint(gpt)
        assert norms_embeddings(gpt, discover_anatomy(gpt)) is expected
        assert fingerprint(gpt) == before


def test_padding_of_the_vocabulary_has_no_part() -> None:
    """53 tokens in 64 rows, and in 53."""
    old, new = reference(vocab_size=53), tiny_hf()
    found = embedding_map(old, new)
    with torch.no_grad():
        table_of(old).weight[53:] = 1e6
    assert embedding_map(old, new).matrix.equal(found.matrix) and found.matrix.shape == (32, 32) and found.num_tokens == 53


def test_everything_but_the_last_layer_is_copied_and_nothing_is_touched() -> None:
    old, new = nano_gpt(n_embd=24), nano_gpt(n_embd=36, seed=1)
    projector = projector_to(24)
    projector(FRAMES).sum().backward()
    before = [fingerprint(one) for one in (old, new, projector)]
    with pytest.warns(PoorTransfer):
        moved = transfer_projector(projector, old, new)
    assert [fingerprint(one) for one in (old, new, projector)] == before
    assert (moved.in_dim, moved.out_dim, moved.hidden_dim, moved.stack) == (5, 36, 16, 2)
    assert moved.fc1.weight.equal(projector.fc1.weight) and moved.fc1.weight is not projector.fc1.weight
    assert moved.fc2.weight.shape == (36, 16) and moved.fc2.weight.requires_grad and moved.fc2.weight.dtype == torch.float32
    moved(FRAMES).sum().backward()
    assert moved.fc1.weight.grad is not None and moved.fc2.weight.grad is not None


def test_zeros_stay_zeros_and_half_precision_stays() -> None:
    matrix = torch.randn(9, 24, dtype=torch.float64)
    assert not mapped(projector_to(24, zero_init=True), matrix).fc2.weight.any()
    half = projector_to(24).bfloat16()
    expected = (matrix @ half.fc2.weight.detach().double()).bfloat16()
    assert torch.equal(mapped(half, matrix).fc2.weight, expected)


# ---- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "options", "vocab", "message"), [
    (36, {}, 61, "got a projector to 36; expected 24, the n_embd of the GPT it was trained with"),
    (24, {}, 60, "got GPTs of 61 and 60 tokens; expected two that share one tokenizer"),
    (24, {"ridge": -1.0}, 61, "got ridge = -1.0; expected ridge ≥ 0"),
    (24, {"ridge": float("nan")}, 61, "got ridge = nan"),
    (24, {"tokens": [1, 2, 3, 4]}, 61, "got 4 tokens, 1, 2, 3, 4; expected at least 5 ids from 0 to 60"),
    (24, {"tokens": range(58, 70)}, 61, "got 12 tokens, 58, 59, .*; expected at least 5 ids from 0 to 60"),
    (24, {"tokens": [1, 2, 3, 4, 5, 5]}, 61, "expected distinct ids"),
    (24, {"tokens": [0.5] * 6}, 61, "expected distinct ids"),
])
def test_what_is_refused(width: int, options: dict[str, Any], vocab: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        transfer_projector(projector_to(width), nano_gpt(n_embd=24), nano_gpt(n_embd=36, vocab_size=vocab), **options)


@pytest.mark.parametrize("options", [{"norm": ("in", "out")}, {"pool": 3}])
def test_a_projector_that_goes_on_behind_fc2_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="expected one that ends in fc2"):
        transfer_projector(projector_to(24, **options), nano_gpt(n_embd=24), nano_gpt(n_embd=36))


@pytest.mark.filterwarnings("ignore::omni_adapters.transfer.PoorTransfer")
def test_other_parts_of_a_projector_move_with_it() -> None:
    projector = projector_to(24, norm=("in", "mid"), activation="swiglu", downsample="conv")
    moved = transfer_projector(projector, nano_gpt(n_embd=24), nano_gpt(n_embd=36, seed=1))
    told = described_projector(projector) | {"out_dim": 36}
    assert moved(FRAMES).shape == (3, 4, 36) and described_projector(moved) == told
    rebuilt = build_projector("test", told)
    rebuilt.load_state_dict(moved.state_dict())
    assert torch.equal(rebuilt(FRAMES), moved(FRAMES))


def test_new_embeddings_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(BadInput, match="got 61 embeddings of the new GPT that are all the same"):
        embedding_map(nano_gpt(n_embd=24), made_of(nano_gpt(n_embd=24), torch.zeros(61, 24)))


# ---- the benchmark ---------------------------------------------------------------------------------------------------------


def arm(losses: list[float]) -> dict[str, Any]:
    scores = {"loss": 1.0, "exact_match": 0.5}
    return {"start": scores, "end": scores, "steps_to": benchmark.steps_to(losses), "losses": losses}


def test_steps_to_a_loss_are_counted_on_the_mean_of_twenty() -> None:
    assert benchmark.smoothed([3.0, 1.0, 2.0]) == [3.0, 2.0, 2.0]
    assert benchmark.smoothed([4.0] * 20 + [0.0] * 20)[29] == 2.0
    assert benchmark.steps_to([4.0] * 20 + [0.0] * 20) == {"1.5": 33, "1.25": 34, "1": 35, "0.75": 37, "0.6": 37}
    assert benchmark.steps_to([4.0] * 5) == dict.fromkeys(("1.5", "1.25", "1", "0.75", "0.6"))


def test_an_arm_that_never_arrives_is_last_in_the_median(tmp_path: Path) -> None:
    fast, slow, never = arm([1.5]), arm([3.0, 0.0]), arm([4.0])
    runs = [{"seed": seed, "map": {"r2": 0.5}, "arms": {"from scratch": a, "transferred": b}}
            for seed, (a, b) in enumerate([(fast, never), (slow, never), (never, fast)])]
    assert [benchmark.median_steps(runs, name, "1.5") for name in ("from scratch", "transferred")] == [2, None]
    benchmark.write(tmp_path, runs, {})
    saved = json.loads((tmp_path / "transfer.json").read_text())
    assert saved["median_steps_to"]["from scratch"]["1.5"] == 2 and saved["runs"] == json.loads(json.dumps(runs))
    rows = (tmp_path / "transfer.csv").read_text().splitlines()
    assert rows[0] == ("seed,arm,r2,start_loss,end_loss,end_exact_match,steps_to_1.5,steps_to_1.25,steps_to_1,steps_to_0.75,"
                       "steps_to_0.6")
    assert len(rows) == 7 and rows[1] == "0,from scratch,0.5,1.0,1.0,0.5,1,,,,"
    assert "never" in benchmark.table(runs) and (tmp_path / "transfer.png").stat().st_size > 1000


def test_arms_differ_in_what_they_copy_alone() -> None:
    """First layer and size of the last one, each with and without its direction."""
    args = benchmark.options().parse_args(["--hidden", "16", "--stack", "2"])
    old, new = reference(seed=0), reference(n_embd=48, seed=1)
    trained = benchmark.fresh(old, args, 0)
    torch.nn.init.normal_(trained.fc2.weight)
    pair = benchmark.Pair(old, new, trained, 1)
    scratch, fitted, first, control = (arm(pair, args) for arm in benchmark.ARMS.values())
    assert all(one.fc1.weight.equal(trained.fc1.weight) for one in (fitted, first, control))
    assert not scratch.fc1.weight.equal(trained.fc1.weight) and not scratch.fc2.weight.any() and not first.fc2.weight.any()
    matrix = embedding_map(old, new).matrix
    torch.testing.assert_close(fitted.fc2.weight.double(), matrix @ trained.fc2.weight.double(), rtol=0, atol=1e-5)
    sizes = [float(one.fc2.weight.detach().double().norm()) for one in (fitted, control)]
    assert sizes[0] == pytest.approx(sizes[1], rel=16 * torch.finfo(torch.float32).eps)
    cosine = float((fitted.fc2.weight * control.fc2.weight).sum().detach()) / (sizes[0] * sizes[1])
    assert abs(cosine) < 0.3 and {tuple(one.fc2.weight.shape) for one in (scratch, first, control)} == {(48, 16)}
    assert benchmark.COLOURS.keys() == benchmark.ARMS.keys()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # steps this small wait for the other thread more than they work
    command = [sys.executable, "-m", "benchmarks.transfer", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=one_thread)
    saved = json.loads((tmp_path / "transfer.json").read_text())
    assert len(saved["runs"][0]["arms"]["transferred"]["losses"]) == 8 and saved["options"]["quick"]
