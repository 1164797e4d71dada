"""The training recipes on two ranks: what one process trains, under either engine; a rank that fails; R8 of docs/resume.md.

The corpus has 47 clips and a step two micro-batches, so that batches differ in size and the last of an epoch are uneven.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from corpus import (
    Corpus,
    build_corpus,
    descendants,
    log_of,
    num_logged,
    results,
    run,
    started,
    steps_of,
    time_limit,
)

from omni_adapters.checkpoint import load_adapter
from omni_adapters.data.epochs import Order
from omni_adapters.data.shards import ShardReader
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import SPECIALS, WordTokenizer
from omni_adapters.training.ranks import Ranks
from omni_adapters.training.turns import Turns
from omni_adapters.training.update import check_start

TOGETHER = ["--micro-batches", "2"]
STAGE_2 = ["--lr", "3e-3", "--projector-lr", "1e-3", "--dropout", "0.2"]
# Sums of some hundred fp32 terms in another order differ by 1e-6 of their size, here of some nats, and so do updates of 1e-3.
CLOSE = 1e-5
PATIENCE = 30.0  # seconds in which a failed rank ends the others


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run("align", corpus.options(out, *TOGETHER))
    return out


@pytest.fixture(scope="module")
def replicated(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 on two ranks, undisturbed."""
    out = tmp_path_factory.mktemp("replicated") / "run"
    run("align", corpus.options(out, *TOGETHER), ranks=2)
    return out


def check_equal(one: Path, other: Path) -> None:
    """Every step's loss, every validation and every trained value of two runs, within CLOSE; their samples exactly."""
    mine, theirs = steps_of(one), steps_of(other)
    assert [row["step"] for row in mine] == list(range(1, 21))
    for exact in ("step", "epoch", "tokens", "rows_crc32"):
        assert [row[exact] for row in mine] == [row[exact] for row in theirs]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], abs=CLOSE)
    for ours, other_row in zip(log_of(one), log_of(other)):
        if "validation" in ours:
            assert ours["validation"]["right"]["loss"] == pytest.approx(other_row["validation"]["right"]["loss"], abs=CLOSE)
    tensors, expected = (load_adapter(out / "adapter.safetensors")[0] for out in (one, other))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# ---- as one process ------------------------------------------------------------------------------------------------------


def test_batches_of_this_corpus_are_uneven(corpus: Corpus) -> None:
    """What the equalities below are worth: ranks have batches of other sizes and lengths, and epochs end within the run."""
    source = ShardReader(corpus.train)
    steps = list(itertools.islice(Order(source.lens, max_tokens=220, seed=0, num_groups=2).steps(), 20))
    assert sum(len(step.groups[0]) != len(step.groups[1]) for step in steps) >= 5
    assert {step.epoch for step in steps} >= {0, 1, 2} and len({sum(map(len, step.groups)) for step in steps}) > 2


@pytest.mark.slow
def test_stage_1_sharded_over_two_ranks(corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    run("align", corpus.options(tmp_path / "run", *TOGETHER, "--engine", "fsdp2"), ranks=2)
    check_equal(tmp_path / "run", alone)


@pytest.mark.slow
def test_stage_1_replicated_on_two_ranks(alone: Path, replicated: Path) -> None:
    check_equal(replicated, alone)


@pytest.mark.slow
def test_several_micro_batches_a_rank(corpus: Corpus, tmp_path: Path) -> None:
    options = ["--micro-batches", "4", "--value-embeds", "learned", "--workers", "1"]
    run("align", corpus.options(tmp_path / "one", *options))
    run("align", corpus.options(tmp_path / "two", *options), ranks=2)
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "distill"), [("ddp", "0.5"), ("fsdp2", "0"), ("fsdp2", "0.5")])
def test_stage_2_on_two_ranks(engine: str, distill: str, corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    options = ["--adapter", str(alone / "adapter.safetensors"), *TOGETHER, *STAGE_2, "--distill", distill]
    run("instruct", corpus.options(tmp_path / "one", *options))
    run("instruct", corpus.options(tmp_path / "two", *options, "--engine", engine), ranks=2)
    check_equal(tmp_path / "two", tmp_path / "one")
    losses = [row["loss"] for row in steps_of(tmp_path / "two")]
    assert sum(losses[10:]) < sum(losses[:10])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_engine(corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    arguments = corpus.options(tmp_path / "run", *TOGETHER)
    with started("align", [*arguments, "--engine", "fsdp2"], ranks=2) as process, time_limit(process, 120):
        wait_for(tmp_path / "run", 10, process)
    printed = run("align", arguments)
    assert any(f"goes on after step {step}" in printed for step in (8, 12, 16))
    check_equal(tmp_path / "run", alone)


def test_micro_batches_that_ranks_cannot_share_are_refused(corpus: Corpus) -> None:
    turns = Turns(WordTokenizer(["do"]))
    assert turns.before == [SPECIALS.index("<|bos|>"), SPECIALS.index("<|user_start|>")]
    for micro_batches in (1, 3):
        order = Order(ShardReader(corpus.train).lens, max_tokens=220, seed=0, num_groups=micro_batches)
        with pytest.raises(BadInput, match=f"--micro-batches {micro_batches} for 2 ranks; expected a multiple of 2"):
            check_start(order, (), turns, Ranks(0, 2, torch.device("cpu")), None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_micro_batches_that_ranks_cannot_share_leave_no_folder(corpus: Corpus, tmp_path: Path) -> None:
    printed = run("align", corpus.options(tmp_path / "run", "--micro-batches", "3"), ranks=2, fails=True)
    assert "--micro-batches 3 for 2 ranks" in printed and not (tmp_path / "run").exists()


# ---- a rank that fails -----------------------------------------------------------------------------------------------------


def wait_for(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    while num_logged(out) < step and process.poll() is None:
        time.sleep(0.005)


MOODY = """
import json, os
from pathlib import Path
from omni_adapters.training.hosts import WordTokenizer, load_reference

class Moody(WordTokenizer):
    def encode(self, text):
        log = Path(os.environ["LOG"])
        if os.environ["RANK"] == "1" and log.exists() and '"step": 3, "epoch"' in log.read_text():
            raise OSError("rank 1 has had enough")
        return super().encode(text)

def load(checkpoint, device):
    gpt, tokenizer = load_reference(checkpoint, device)
    return gpt, Moody(tokenizer.tokens[5:])

def load_on_first(checkpoint, device):
    assert os.environ["RANK"] == "0", "not today"
    return load_reference(checkpoint, device)
"""


def moody(corpus: Corpus, folder: Path, function: str) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a run whose rank 1 fails: in its fourth step or a little later, or when it opens the GPT."""
    (folder / "moody.py").write_text(MOODY)
    options = corpus.options(folder / "run", *TOGETHER, "--steps", "200")
    return (["--loader", f"moody:{function}={corpus.gpt}", *options[2:]],
            {"PYTHONPATH": str(folder), "LOG": str(folder / "run" / "log.jsonl")})


def test_a_rank_that_fails_ends_all(corpus: Corpus, tmp_path: Path) -> None:
    arguments, environment = moody(corpus, tmp_path, "load")
    with started("align", arguments, ranks=2, env=environment) as process, time_limit(process, 120):
        wait_for(tmp_path / "run", 3, process)
        began = time.monotonic()
        printed, _ = process.communicate()
    assert process.returncode not in (0, -signal.SIGKILL) and time.monotonic() - began < PATIENCE
    assert "OSError: rank 1 has had enough" in printed
    assert 3 <= num_logged(tmp_path / "run") < 100


@pytest.mark.slow
def test_a_rank_whose_gpt_does_not_open_ends_all(corpus: Corpus, tmp_path: Path) -> None:
    arguments, environment = moody(corpus, tmp_path, "load_on_first")
    began = time.monotonic()
    printed = run("align", arguments, ranks=2, fails=True, env=environment)
    assert "AssertionError: not today" in printed and time.monotonic() - began < 2 * PATIENCE  # the first half to start
    assert not (tmp_path / "run" / "log.jsonl").exists() or not log_of(tmp_path / "run")


# ---- R8 --------------------------------------------------------------------------------------------------------------------


def workers_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """RANK → pid of the processes that a torchrun has started."""
    found = {}
    for pid in descendants(process.pid):
        environment = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)
        found[environment.get("RANK", "")] = pid
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_r8_a_killed_rank_starts_again_and_the_run_ends_equal(engine: str, corpus: Corpus, replicated: Path,
                                                              tmp_path: Path) -> None:
    """Rank 1, then rank 0, by SIGKILL."""
    arguments = corpus.options(tmp_path / "run", *TOGETHER, "--engine", engine)
    with started("align", arguments, ranks=2, restarts=3) as process, time_limit(process, 200):
        for rank, step in (("1", 6), ("0", 14)):
            wait_for(tmp_path / "run", step, process)
            os.kill(workers_of(process)[rank], signal.SIGKILL)
            wait_for_restart(process, rank, tmp_path / "run")
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert printed.count("goes on after step") == 2 and printed.count("begins") == 1
    undisturbed = replicated
    if engine == "fsdp2":
        undisturbed = tmp_path / "undisturbed"
        run("align", corpus.options(undisturbed, *TOGETHER, "--engine", engine), ranks=2)
    assert results(tmp_path / "run") == results(undisturbed)


def wait_for_restart(process: subprocess.Popen[str], rank: str, out: Path) -> None:
    """Until that rank runs again and has cut the log back to its checkpoint."""
    reached = num_logged(out)
    while num_logged(out) >= reached and reached and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_ranks_that_outlive_their_torchrun_hold_the_folder(corpus: Corpus, tmp_path: Path) -> None:
    arguments = corpus.options(tmp_path / "run", *TOGETHER, "--steps", "5000", "--validate-every", "5000", "--save-every", "5000")
    with started("align", arguments, ranks=2) as process, time_limit(process, 120):
        wait_for(tmp_path / "run", 3, process)
        ranks = descendants(process.pid)
        process.kill()
        process.wait()
        try:
            assert "got a folder that another process writes to" in run("align", arguments, fails=True)
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
