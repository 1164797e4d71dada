"""What the training recipes promise, one process at a time: what they leave, and R1 to R7 of docs/resume.md.

Kills, full disks and the undisturbed run that others are held against are processes of their own; the rest calls `main`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import (
    NUM_TRAIN,
    QUESTION,
    ROOT,
    WORDS,
    Corpus,
    build_corpus,
    everything,
    extract,
    kill,
    log_of,
    num_logged,
    results,
    run,
    started,
    steps_of,
    time_limit,
)
from hosts import reference, tiny_hf

from omni_adapters.checkpoint import load_adapter
from omni_adapters.data.clips import ClipSource
from omni_adapters.data.epochs import Order
from omni_adapters.data.manifest import read_manifest, write_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.fingerprints import digest
from omni_adapters.model import OmniGPT
from omni_adapters.training.hosts import SPECIALS, Host, WordTokenizer, open_host, save_reference
from omni_adapters.training.sources import open_source
from omni_adapters.training.turns import Turns

sys.path.insert(0, str(ROOT / "examples"))
import align
import instruct

RECIPES = {"align": align, "instruct": instruct}
STEPS, SAVE_EVERY = 20, 4
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def aligned(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, undisturbed, in a process of its own."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    run("align", corpus.options(out))
    return out


@pytest.fixture(scope="module")
def instructed(corpus: Corpus, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2 with all that it has: dropout, distillation, a question."""
    out = tmp_path_factory.mktemp("instructed") / "run"
    here("instruct", corpus.options(out, *stage_2(aligned)))
    return out


def stage_2(aligned: Path) -> list[str]:
    return ["--adapter", str(aligned / "adapter.safetensors"), "--lr", "3e-3", "--projector-lr", "1e-3", "--rank", "4",
            "--dropout", "0.1", "--distill", "0.5", "--question", QUESTION]


def here(recipe: str, arguments: list[str]) -> None:
    """A recipe in this process."""
    try:
        RECIPES[recipe].main(arguments)
    finally:
        gc.collect()  # so that the run's folder is let go even where somebody keeps the traceback


def refused(recipe: str, arguments: list[str], match: str) -> str:
    with pytest.raises(SystemExit, match=match) as error:
        here(recipe, arguments)
    return str(error.value)


def opened(corpus: Corpus) -> Host:
    return open_host("reference", corpus.gpt)


def right_losses(out: Path) -> list[float]:
    return [row["validation"]["right"]["loss"] for row in log_of(out) if "validation" in row]


def plan(source: ClipSource) -> list[tuple[int, list[list[int]]]]:
    """(epoch, groups) of each step of `Corpus.options`, from the plan alone."""
    order = Order(source.lens, max_tokens=220, seed=0, num_groups=1)
    return [(step.epoch, step.groups) for step in itertools.islice(order.steps(), STEPS)]


# ---- what a run leaves ----------------------------------------------------------------------------------------------------


def check_files(out: Path, steps: int = STEPS) -> None:
    files = {"adapter.safetensors", "metrics.json", "loss.png", "pca.png", "log.jsonl", "run.json"}
    assert files <= {path.name for path in out.iterdir()}
    assert all((out / name).read_bytes().startswith(PNG) for name in ("loss.png", "pca.png"))
    rows = log_of(out)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert [row["step"] for row in rows if "validation" in row] == sorted({0, steps, *range(10, steps, 10)})
    metrics = json.loads((out / "metrics.json").read_text())
    last = rows[-1]["validation"]
    assert {name: metrics[name] for name in last} == last and metrics["step"] == steps
    tensors, _ = load_adapter(out / "adapter.safetensors")
    assert metrics["trained_parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_stage_1(corpus: Corpus, aligned: Path) -> None:
    check_files(aligned)
    losses = right_losses(aligned)
    assert losses[-1] < losses[0] - 0.2  # nats a token, of ln 14 = 2.6 that guessing costs
    omni = OmniGPT.load_adapter(aligned / "adapter.safetensors", opened(corpus).gpt)
    assert omni.prepender.insert_at == 2 and not omni.lora() and omni.projector.stack == 8


def test_stage_2(corpus: Corpus, aligned: Path, instructed: Path) -> None:
    check_files(instructed)
    losses = right_losses(instructed)
    assert losses[-1] < losses[0] - 0.2
    omni = OmniGPT.load_adapter(instructed / "adapter.safetensors", opened(corpus).gpt)
    assert all(bool(layer.lora_b.any()) for layer in omni.lora()) and omni.lora()
    before, after = (load_adapter(out / "adapter.safetensors")[0] for out in (aligned, instructed))
    assert not torch.equal(before["projector.fc1.weight"], after["projector.fc1.weight"])


@pytest.mark.parametrize("recipe", ["align", "instruct"])
def test_the_gpt_stays_as_it_came(recipe: str, corpus: Corpus, aligned: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights in memory after the last step, LoRA's own left out; and a frozen projector stays, too."""
    seen: list[tuple[str, str]] = []

    def spy(omni: OmniGPT, *rest: Any) -> None:
        own = {name: t for name, t in omni.gpt.state_dict().items() if not name.endswith((".lora_a", ".lora_b"))}
        seen.append((digest(own), digest(dict(omni.projector.named_parameters()))))

    monkeypatch.setattr(RECIPES[recipe], "finish_run", spy)
    more = [*stage_2(aligned), "--projector-lr", "0"] if recipe == "instruct" else []
    here(recipe, corpus.options(tmp_path / "run", *more, "--steps", "5"))
    start = OmniGPT.load_adapter(aligned / "adapter.safetensors", opened(corpus).gpt)
    assert seen[0][0] == digest(opened(corpus).gpt.state_dict())
    assert (seen[0][1] == digest(dict(start.projector.named_parameters()))) == (recipe == "instruct")


def test_the_same_options_give_the_same_bytes(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    """In another process, with workers."""
    here("align", corpus.options(tmp_path / "run", "--workers", "1"))
    assert results(tmp_path / "run") == results(aligned)
    here("align", corpus.options(tmp_path / "other", "--seed", "1", "--steps", "2"))
    assert steps_of(tmp_path / "other")[0]["rows_crc32"] != steps_of(aligned)[0]["rows_crc32"]


# ---- other ways to run them -----------------------------------------------------------------------------------------------


def both_stages(corpus: Corpus, folder: Path, *more: str, first: tuple[str, ...] = (), host: tuple[str, str] | None = None,
                manifest: bool = False) -> tuple[OmniGPT, Path]:
    """20 steps of stage 1, with `first`, five of stage 2, both with `more`; what stage 2 saved, and stage 1's folder."""
    def options(out: Path, *arguments: str) -> list[str]:
        own = corpus.options(out, *more, *arguments, "--validate-rows", "3", manifest=manifest)
        return own if host is None else [*host, *own[2:]]

    here("align", options(folder / "1", *first))
    here("instruct", options(folder / "2", "--adapter", str(folder / "1" / "adapter.safetensors"), "--steps", "5"))
    check_files(folder / "1")
    check_files(folder / "2", 5)
    losses = right_losses(folder / "1")
    assert losses[-1] < losses[0]
    kind, checkpoint = ("reference", str(corpus.gpt)) if host is None else (host[0].strip("-"), host[1])
    gpt = open_host("reference" if kind == "loader" else kind, corpus.gpt if kind == "loader" else checkpoint).gpt
    return OmniGPT.load_adapter(folder / "2" / "adapter.safetensors", gpt), folder / "1"


def test_from_a_manifest_in_the_plain_form(corpus: Corpus, tmp_path: Path) -> None:
    omni, _ = both_stages(corpus, tmp_path, "--form", "plain", manifest=True)
    assert omni.prepender.insert_at == 1 and omni.lora()


def test_a_manifest_is_heard_as_its_shards_are(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    """But for shards being float16: 2⁻¹¹ of a frame, which says little about a loss after the gradient is amplified."""
    here("align", corpus.options(tmp_path / "run", "--steps", "1", "--no-zero-init", manifest=True))
    here("align", corpus.options(tmp_path / "shards", "--steps", "1", "--no-zero-init"))
    one, other = (right_losses(tmp_path / name)[0] for name in ("run", "shards"))
    assert one == pytest.approx(other, abs=5e-3) and one != right_losses(aligned)[0]


def test_learned_side_rows(corpus: Corpus, tmp_path: Path) -> None:
    omni, stage_1 = both_stages(corpus, tmp_path, first=("--value-embeds", "learned"))
    rows, (first, _) = omni.prepender.side_rows, load_adapter(stage_1 / "adapter.safetensors")
    assert len(rows) and all(not torch.equal(first[f"side_rows.{name}"], row) for name, row in rows.items())
    assert all(bool(first[f"side_rows.{name}"].any()) for name in rows)


def test_bf16_is_close(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    here("align", corpus.options(tmp_path / "run", "--bf16"))
    rows, exact = steps_of(tmp_path / "run"), steps_of(aligned)
    assert rows[0]["loss"] != exact[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2**-5)  # some roundings to 8 bits
    assert right_losses(tmp_path / "run")[-1] == pytest.approx(right_losses(aligned)[-1], rel=0.1)


@pytest.mark.slow
def test_compiled_both_stages_go_as_they_do_uncompiled(corpus: Corpus, aligned: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are padded to few shapes, each one graph; sums in another order move a loss by 1e-6 a step. Dropout is off: a
    compiler draws its own."""
    tuned = [*stage_2(aligned), "--dropout", "0"]
    here("instruct", corpus.options(tmp_path / "plain", *tuned))
    compile_module = OmniGPT.compile  # aot_eager traces forward and backward as inductor does, without its minutes of C++
    monkeypatch.setattr(OmniGPT, "compile", lambda omni, **options: compile_module(omni, backend="aot_eager", **options))
    here("align", corpus.options(tmp_path / "one", "--compile"))
    here("instruct", corpus.options(tmp_path / "two", "--compile", *tuned))
    for out, plain in ((tmp_path / "one", aligned), (tmp_path / "two", tmp_path / "plain")):
        rows, expected = steps_of(out), steps_of(plain)
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected] and len(rows) > 4
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-3)


def test_compiled_shards_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    for options in (["--compile"], ["--loss", "fused"]):
        with pytest.raises(SystemExit, match=f"{' '.join(options)} with --engine fsdp2"):
            here("align", corpus.options(tmp_path / "run", *options, "--engine", "fsdp2"))
    assert not (tmp_path / "run").exists()


def test_your_own_loader(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_gpt.py").write_text("from omni_adapters.training.hosts import load_reference as load\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    omni, _ = both_stages(corpus, tmp_path, host=("--loader", f"my_gpt:load={corpus.gpt}"))
    assert omni.prepender.insert_at == 2


def test_transformers(corpus: Corpus, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(WordTokenizer(WORDS).ids, unk_token=WORDS[0]))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path / "gpt")
    tiny_hf().save_pretrained(tmp_path / "gpt")  # type: ignore[operator]
    omni, _ = both_stages(corpus, tmp_path, host=("--transformers", str(tmp_path / "gpt")))
    assert type(omni.gpt).__name__ == "NanoChatForCausalLM"


def test_questions_and_answers_of_the_rows(corpus: Corpus, tmp_path: Path) -> None:
    """A row's own question and answer come before --question and the text; what is graded is the answer and its end."""
    rows = read_manifest(corpus.train.with_suffix(".jsonl"))
    asked = [type(row)(row.audio, row.text, row.seconds, {"question": QUESTION, "answer": "ti"}) for row in rows]
    write_manifest(tmp_path / "asked.jsonl", asked)
    here("align", corpus.options(tmp_path / "run", "--train", str(tmp_path / "asked.jsonl"), "--steps", "8"))
    source = Order([max(100, round(row.seconds * 100)) for row in rows], max_tokens=220, seed=0, num_groups=1)
    for row, step in zip(steps_of(tmp_path / "run"), source.steps()):
        assert row["tokens"] == 2 * len(step.groups[0])


def test_distillation_mixes_two_losses(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    """loss(w) = (1 − w)·loss(0) + w·loss(1) at the first step, where all three have the same weights; and both ends by hand."""
    losses = {}
    for share in ("0", "0.25", "1"):
        here("instruct", corpus.options(tmp_path / share, "--adapter", str(aligned / "adapter.safetensors"), "--distill", share,
                                        "--steps", "1", "--validate-rows", "2"))
        losses[share] = steps_of(tmp_path / share)[0]["loss"]
    graded, kl = first_losses(corpus, aligned)
    assert losses["0"] == pytest.approx(graded, rel=1e-6) and losses["1"] == pytest.approx(kl, rel=1e-5)
    assert losses["0.25"] == pytest.approx(0.75 * graded + 0.25 * kl, rel=1e-5) and abs(graded - kl) > 0.01


@torch.no_grad()
def first_losses(corpus: Corpus, aligned: Path) -> tuple[float, float]:
    """Nats a graded token of the first step's batch: −log p(answer), and 4·KL at temperature 2 to the GPT that reads it."""
    gpt, tokenizer = opened(corpus)
    omni, turns = OmniGPT.load_adapter(aligned / "adapter.safetensors", gpt), Turns(tokenizer)
    source = open_source(corpus.train, omni.encoder)
    sound, rows = source.load_batch(plan(source)[0][1][0])
    (idx, targets), (read_idx, read_targets) = turns.batch(rows), turns.batch(rows, read=True)
    logits, wanted = omni(idx, **{source.kind: sound})[targets != -1], targets[targets != -1]
    student, teacher = ((one / 2).log_softmax(-1) for one in (logits, gpt(read_idx)[read_targets != -1]))
    kl = 4 * (teacher.exp() * (teacher - student)).sum()
    return float(-logits.log_softmax(-1)[range(len(wanted)), wanted].mean()), float(kl / len(wanted))


# ---- R1, R2, R3, R6: killed ----------------------------------------------------------------------------------------------


Moment = Callable[[Path, int], bool]  # (folder, step that this process goes on after) -> now?


def steps_later(count: int) -> Moment:
    return lambda out, start: num_logged(out) >= min(start + count, STEPS)


def while_saving(out: Path, start: int) -> bool:
    return any(path.name.endswith((".saving", ".tmp")) for path in out.glob(".step-*"))


def begun(process: subprocess.Popen[str]) -> int:
    """Wait for the line that says where the run goes on; the step after which it does."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("run "):
            return int(line.split()[-1]) if "goes on after step" in line else 0
    raise AssertionError("it ended before it began")


def killed_when(recipe: str, arguments: list[str], out: Path, moment: Moment, delay: float, whole_group: bool) -> tuple[int, int]:
    """(step it went on after, last step in its log when SIGKILL ended it, `delay` seconds after `moment`)."""
    with started(recipe, arguments) as process, time_limit(process, 120):
        start = begun(process)
        while not moment(out, start) and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        if whole_group:
            kill(process)
        process.kill()  # without its workers, who must not hold the folder
        assert process.wait() == -signal.SIGKILL or num_logged(out) == STEPS  # where it was faster
    return start, num_logged(out)


def kill_until_done(recipe: str, arguments: list[str], out: Path, moments: list[Moment], *, whole_group: bool = True) -> None:
    """Kill the recipe at each moment and a random time after it, restart it, and let it end at last.

    R1: after every kill each checkpoint there is loads. R6: no restart repeats more than SAVE_EVERY steps.
    """
    rng, died_at = random.Random(0), 0
    for moment in moments:
        delay = 0.0 if moment is while_saving else rng.uniform(0, 0.04)
        start, logged = killed_when(recipe, arguments, out, moment, delay, whole_group)
        assert died_at - start <= SAVE_EVERY
        died_at = logged
        for path in out.glob("step-*.safetensors"):
            tensors, state = load_adapter(path)
            assert any(name.startswith("optimizer.") for name in tensors) and state["step"] == int(path.stem[5:])
    with started(recipe, arguments) as process, time_limit(process, 120):
        assert died_at - begun(process) <= SAVE_EVERY
        process.communicate()
        assert process.returncode == 0


MOMENTS = [steps_later(2), steps_later(5), while_saving, steps_later(3), steps_later(6), steps_later(STEPS)]


@pytest.fixture(scope="module")
def killed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 again, killed six times: before its first checkpoint, within steps, within a save, after the last step."""
    out = tmp_path_factory.mktemp("killed") / "run"
    kill_until_done("align", corpus.options(out), out, MOMENTS)
    return out


@pytest.mark.slow
def test_r1_r2_r6_killed_it_ends_as_if_undisturbed(aligned: Path, killed: Path) -> None:
    """Adapter, checkpoints with the optimizer's state, and log, byte for byte; `kill_until_done` has watched R1 and R6."""
    assert results(killed) == results(aligned)
    assert not [path.name for path in killed.iterdir() if path.name.endswith((".tmp", ".saving")) or path.name.startswith(".bad")]


@pytest.mark.slow
def test_r3_every_sample_once_an_epoch_across_kills(corpus: Corpus, killed: Path) -> None:
    planned, rows = plan(ShardReader(corpus.train)), steps_of(killed)
    assert [(row["epoch"], row["rows_crc32"]) for row in rows] == [
        (epoch, zlib.crc32(json.dumps(groups).encode())) for epoch, groups in planned]
    epochs = [[number for epoch, groups in planned if epoch == one for group in groups for number in group] for one in (0, 1)]
    assert sorted(epochs[0]) == list(range(NUM_TRAIN)) and planned[-1][0] >= 1
    assert len(set(epochs[1])) == len(epochs[1]) and epochs[1] != epochs[0][: len(epochs[1])]


@pytest.mark.slow
def test_r2_a_run_that_is_done_ends_again_the_same(corpus: Corpus, killed: Path) -> None:
    before = results(killed)
    (killed / "adapter.safetensors").unlink()
    (killed / "metrics.json").unlink()
    here("align", corpus.options(killed))
    assert results(killed) == before
    check_files(killed)


def test_r2_dropout_and_distillation_go_on(corpus: Corpus, aligned: Path, instructed: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = corpus.options(tmp_path / "run", *stage_2(aligned))
    begin("instruct", arguments, monkeypatch, steps=9)
    here("instruct", arguments)
    assert results(tmp_path / "run") == results(instructed)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_r1_r2_r6_stage_2_with_workers(whole_group: bool, corpus: Corpus, aligned: Path, instructed: Path,
                                       tmp_path: Path) -> None:
    """Dropout and distillation go on as they would have; orphaned workers do not hold the folder."""
    arguments = corpus.options(tmp_path / "run", *stage_2(aligned), "--workers", "1")
    kill_until_done("instruct", arguments, tmp_path / "run", [*MOMENTS, while_saving], whole_group=whole_group)
    assert results(tmp_path / "run") == results(instructed)


@pytest.mark.slow
def test_r1_r2_r6_killed_at_any_time(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    """Twelve times, some hundredths of a second to a second after the start, wherever that falls."""
    rng, out = random.Random(1), tmp_path / "run"
    kill_until_done("align", corpus.options(out), out, [after(rng.uniform(0.0, 1.0)) for _ in range(12)])
    assert results(out) == results(aligned)


def after(seconds: float) -> Moment:
    began: list[float] = []

    def now(out: Path, start: int) -> bool:
        began.append(time.monotonic())
        return began[-1] - began[0] >= seconds

    return now


# ---- R4: changed ----------------------------------------------------------------------------------------------------------


def begin(recipe: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, steps: int = 6) -> None:
    """The recipe until it fails after that many steps."""
    real, done = RECIPES[recipe].train_step, itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        if next(done) == steps:
            raise ConnectionError("the machine is gone")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RECIPES[recipe], "train_step", failing)
        with contextlib.suppress(ConnectionError):
            here(recipe, arguments)
    gc.collect()


def one_row_less(corpus: Corpus, folder: Path) -> Path:
    write_manifest(folder / "less.jsonl", read_manifest(corpus.train.with_suffix(".jsonl"))[:-1])
    extract(folder / "less.jsonl", folder / "less")
    return folder / "less"


def another_gpt(folder: Path) -> Path:
    save_reference(folder / "gpt", reference(seed=1, vocab_size=len(SPECIALS) + len(WORDS), sequence_len=128), WORDS)
    return folder / "gpt"


def test_r4_what_changed_is_refused_by_name(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    begin("align", corpus.options(out), monkeypatch)
    before = everything(out)
    assert "step-00000004.safetensors" in before
    changes: dict[str, list[str]] = {
        r"options\.lr: saved 0\.001, here 0\.002": ["--lr", "2e-3"],
        r"options\.max_tokens: saved 220, here 230": ["--max-tokens", "230"],
        r"options\.seed: saved 0, here 3.*options\.stack: saved 8, here 4": ["--seed", "3", "--stack", "4"],
        r"train\.index_sha256: saved .*train\.num_samples: saved 47, here 46": ["--train", str(one_row_less(corpus, tmp_path))],
        r"valid\.kind: saved 'audio_features', here 'audio_inputs'": ["--valid", str(corpus.valid.with_suffix(".jsonl"))],
    }
    for match, change in changes.items():
        refused("align", corpus.options(out, *change), match)
        assert everything(out) == before
    refused("align", ["--reference", str(another_gpt(tmp_path)), *corpus.options(out)[2:]], r"host\.sha256: saved '")
    assert everything(out) == before


def test_r4_another_stage_1_is_refused(corpus: Corpus, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here("align", corpus.options(tmp_path / "other", "--steps", "3"))
    begin("instruct", corpus.options(tmp_path / "run", *stage_2(aligned)), monkeypatch)
    before = everything(tmp_path / "run")
    refused("instruct", corpus.options(tmp_path / "run", *stage_2(tmp_path / "other")), r"\(adapter: saved '")
    assert everything(tmp_path / "run") == before


def test_r4_what_decides_nothing_may_change(corpus: Corpus, aligned: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that was moved, other workers, another pace of saving: the run goes on and ends the same."""
    out = tmp_path / "run"
    begin("align", corpus.options(out), monkeypatch)
    shutil.copytree(corpus.train, tmp_path / "moved")
    here("align", corpus.options(out, "--train", str(tmp_path / "moved"), "--workers", "1", "--save-every", "7", "--keep", "1"))
    names = ("adapter.safetensors", "log.jsonl")
    assert results(out, names) == results(aligned, names)


# ---- R5, R7 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_r5_a_full_disk_leaves_the_previous_checkpoint(corpus: Corpus, aligned: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    begin("align", corpus.options(out), monkeypatch)
    previous = (out / "step-00000004.safetensors").read_bytes()
    limit = len(previous) // 2  # bytes a file may have

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    printed = run("align", corpus.options(out), fails=True, preexec_fn=full)
    assert "OSError" in printed and "File too large" in printed
    assert {path.name: path.read_bytes() for path in out.glob("*step-*")} == {"step-00000004.safetensors": previous}
    here("align", corpus.options(out))
    assert results(out) == results(aligned)


@pytest.mark.parametrize(("keep", "left"), [(1, [20]), (3, [12, 16, 20])])
def test_r7_old_checkpoints_go(keep: int, left: list[int], corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    assert [path.name for path in sorted(aligned.glob("*step-*"))] == [f"step-{step:08d}.safetensors" for step in (16, 20)]
    here("align", corpus.options(tmp_path / "run", "--keep", str(keep)))
    found = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*step-*")}
    assert sorted(found) == [f"step-{step:08d}.safetensors" for step in left]


# ---- what is refused ------------------------------------------------------------------------------------------------------


def test_shards_of_another_encoder(corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(corpus.train, tmp_path / "shards")
    content = json.loads((tmp_path / "shards" / "index.json").read_text())
    content["config"]["description"]["d_model"] = 40
    (tmp_path / "shards" / "index.json").write_text(json.dumps(content))
    refused("align", corpus.options(tmp_path / "run", "--train", str(tmp_path / "shards")),
            r"open_source\(.*encoder\.d_model: saved 40, here 80")
    assert not (tmp_path / "run").exists()


def test_a_missing_adapter(corpus: Corpus, tmp_path: Path) -> None:
    message = run("instruct", corpus.options(tmp_path / "run", "--adapter", str(tmp_path / "none.safetensors")), fails=True)
    assert "none.safetensors" in message.splitlines()[-1] and not (tmp_path / "run").exists()


def test_another_form_than_stage_1(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", str(aligned / "adapter.safetensors"), "--form", "plain"]
    refused("instruct", corpus.options(tmp_path / "run", *arguments),
            r"--form plain, whose sound stands at 1; expected 2.*form of stage 1")
    assert not (tmp_path / "run").exists()


def test_impossible_options_of_stage_2(corpus: Corpus, aligned: Path, tmp_path: Path) -> None:
    change = ["--distill", "1.5", "--projector-lr", "-1", "--adapter", str(aligned / "adapter.safetensors")]
    refused("instruct", corpus.options(tmp_path / "run", *change), r"--projector-lr -1\.0, --distill 1\.5")
    assert not (tmp_path / "run").exists()


def test_a_question_in_the_plain_form(corpus: Corpus, tmp_path: Path) -> None:
    refused("align", corpus.options(tmp_path / "run", "--form", "plain", "--question", QUESTION), "in the plain form")
    assert not (tmp_path / "run").exists()


def test_words_the_gpt_does_not_know(corpus: Corpus, tmp_path: Path) -> None:
    rows = read_manifest(corpus.train.with_suffix(".jsonl"))
    strange = [*rows[:30], type(rows[30])(rows[30].audio, "do remi", rows[30].seconds), *rows[31:]]
    write_manifest(tmp_path / "strange.jsonl", strange)
    refused("align", corpus.options(tmp_path / "run", "--train", str(tmp_path / "strange.jsonl")), "row of .*: got the word remi")
    assert not (tmp_path / "run").exists()
    write_manifest(tmp_path / "first.jsonl", strange[30:])
    refused("align", corpus.options(tmp_path / "early", "--train", str(tmp_path / "first.jsonl")), "the word remi")
    assert not (tmp_path / "early").exists()


def test_rows_longer_than_the_gpt(corpus: Corpus, tmp_path: Path) -> None:
    rows = read_manifest(corpus.train.with_suffix(".jsonl"))
    endless = [*rows[:30], type(rows[30])(rows[30].audio, " ".join(["do"] * 1500), rows[30].seconds), *rows[31:]]
    write_manifest(tmp_path / "endless.jsonl", endless)
    refused("align", corpus.options(tmp_path / "run", "--train", str(tmp_path / "endless.jsonl")), "the GPT has")
    refused("align", corpus.options(tmp_path / "run", "--valid", str(corpus.train)), "the same manifest as --train and --valid")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "match"), [
    ("--steps 0", "--steps 0"), ("--warmup 1", r"--warmup 1\.0"), ("--save-every 0 --keep 0", "--save-every 0, --keep 0"),
    ("--lr -1", r"--lr -1\.0"), ("--clip 0", r"--clip 0\.0"),
    ("--micro-batches 48", "47 samples in at least"), ("--train nowhere", "nowhere"),
    ("--reference nowhere", "no host.json"), ("--seed -1", "seed -1")])
def test_impossible_options(change: str, match: str, corpus: Corpus, tmp_path: Path) -> None:
    refused("align", corpus.options(tmp_path / "run", *change.split()), match)
    assert not (tmp_path / "run").exists()
