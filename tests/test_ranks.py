"""Several ranks train what one process trains on the joint batch, with either engine; and a rank that fails holds nobody up.

This file is its own torchrun script: `torchrun --nproc_per_node=2 tests/test_ranks.py FOLDER` runs every case and writes
what each rank found to FOLDER, where the tests look.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hosts import nano_gpt, reference, tiny_hf
from patches import Patches
from torch import Tensor, nn

from omni_adapters.collective import whole
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import Features, pad_rows
from omni_adapters.lora import lora_by_path
from omni_adapters.model import OmniGPT
from omni_adapters.projector import Projector
from omni_adapters.shapes import BadInput
from omni_adapters.training.ranks import (
    ENVIRONMENT,
    Ranks,
    clip_gradients,
    find_blocks,
    finish_gradients,
    gradient_norm,
    gradient_sync,
    join_ranks,
    leave,
    wrap,
)

P, Q = 60, 61    # placeholder ids of sound and images inside the vocabulary, in no text
STEPS = 20
NUM_GROUPS = 6   # micro-batches of a step, over all ranks
MAX_NORM = 4.5   # some steps are clipped, others not
CASES: dict[str, dict[str, Any]] = {
    "stage 1": {},
    "lora, learned": {"lora": ("attn", "mlp"), "value_embeds": "learned", "insert_at": 1},
    "placeholders": {"lora": ("mlp",), "placeholders": {"audio": P}},
    "eyes": {"placeholders": {"audio": P, "image": Q}},
}
# Sums of some hundred fp32 terms in another order differ by some 1e-6 of their largest. AdamW divides a gradient by its own
# size, so an entry g of one of size G strays by lr · 1e-6 · G/g a step: with lr = 1e-2, 20 steps and a g of G/50, 1e-5.
CLOSE = {"rtol": 0, "atol": 1e-5}


def omni_gpt(lora: tuple[str, ...] = (), seed: int = 0, **options: Any) -> OmniGPT:
    torch.manual_seed(seed)
    audio = LogMelEncoder(), Projector(80, 32, 16, stack=2, zero_init=False)
    image = (Patches(), Projector(48, 32, 8, zero_init=False)) if "image" in options.get("placeholders", ()) else None
    omni = OmniGPT(reference(), audio, image, **options)
    if lora:
        omni.add_lora(4, targets=lora)
    return omni.train()


def silent(step: int, group: int) -> bool:
    """Every third step all groups of the second of two ranks, every third those of the third of three."""
    return (group % 2 == 1) if step % 3 == 0 else (group % 3 == 2) if step % 3 == 1 else False


def group_rows(step: int, group: int, placed: bool, eyes: bool) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One to three rows of (ids, targets, frames (T, 80), patches (T, 48)); frames has none in silent groups, and in some rows
    of others. With eyes, every second group sees, whether it hears or not."""
    rng = torch.Generator().manual_seed(100 * step + group)
    rows = []
    for row in range(1 + (step + group) % 3):
        idx = torch.randint(50, (2 + (group + row) % 4,), generator=rng)
        num_frames = 0 if silent(step, group) else (3 + 2 * group + row) % 8
        frames = torch.randn(num_frames, 80, generator=rng)
        if placed and num_frames:
            idx[0] = P
        patches = torch.randn(1 + group if eyes and group % 2 == 0 else 0, 48, generator=rng)
        if len(patches):
            idx = torch.cat([torch.tensor([Q]), idx])
        rows.append((idx, torch.cat([idx[1:], torch.tensor([-1])]), frames, patches))
    return rows


def batch(rows: list[tuple[Tensor, Tensor, Tensor, Tensor]], placed: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    clips = [frames for _, _, frames, _ in rows if len(frames) or not placed]
    images = [patches for *_, patches in rows if len(patches)]
    given = {"audio_features": pad_rows(clips)} if any(len(clip) for clip in clips) else {}
    given |= {"image_features": pad_rows(images)} if images else {}
    return padded([idx for idx, *_ in rows], 0), padded([targets for _, targets, *_ in rows], -1), given


def train(model: nn.Module, omni: OmniGPT, ranks: Ranks, case: str, joint: bool = False) -> dict[str, Any]:
    """STEPS of AdamW; `joint` puts all micro-batches of a step into one. {"losses", "norms", and every trained tensor}."""
    placed = "placeholders" in CASES[case]
    optimizer = torch.optim.AdamW(omni.trainable_parameters(), lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses, norms = [], []
    for step in range(STEPS):
        every = [group_rows(step, group, placed, "image" in CASES[case].get("placeholders", ())) for group in range(NUM_GROUPS)]
        mine = [[row for rows in every for row in rows]] if joint else every[ranks.rank :: ranks.num_ranks]
        graded = sum(int((targets != -1).sum()) for rows in mine for _, targets, *_ in rows)
        total = float(ranks.sum(torch.tensor(graded)))
        loss_sum = torch.zeros(())
        for number, rows in enumerate(mine, start=1):
            idx, targets, sound = batch(rows, placed)
            with gradient_sync(model, number == len(mine)):
                loss = model(idx, targets, loss_reduction="sum", **sound)
                loss.backward()
            loss_sum += loss.detach()
        finish_gradients(model, ranks, total)
        losses.append(float(ranks.sum(loss_sum)) / total)
        norms.append(clip_gradients([p for group in optimizer.param_groups for p in group["params"]], MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms),
            **{name: whole(tensor).clone() for name, tensor in omni.trained().items()}}


# ---- what a rank does --------------------------------------------------------------------------------------------------


def trained_on_ranks(ranks: Ranks, case: str, engine: Any) -> dict[str, Any]:
    omni = omni_gpt(**CASES[case], seed=ranks.rank)  # only rank 0 draws what the single process draws
    return train(wrap(omni, ranks, engine), omni, ranks, case)


def heard(omni: OmniGPT, row: int) -> list[int]:
    """Greedy text after a prompt; the second rank's prompt has no sound."""
    sound = {} if row == 1 else {"audio_features": Features(torch.ones(1, 5, 80), torch.tensor([5]))}
    return list(omni.generate([5, 6, 7], max_tokens=4, temperature=0.0, **sound))


def sharded_otherwise(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All that is not training, on a sharded OmniGPT whose tensors have moved."""
    options = CASES["lora, learned"]
    omni, plain = omni_gpt(**options), omni_gpt(**options)
    frozen = omni.description()["host"]["sha256"]
    model = wrap(omni, ranks, "fsdp2")
    optimizer = torch.optim.AdamW(omni.trainable_parameters())
    trained = omni.trained()
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.mul_(1.5)
            plain.trained()[name].copy_(whole(tensor))
    result: dict[str, Any] = {"kept digest": omni.description()["host"]["sha256"] == frozen}
    omni.host_digest.sha256 = ""
    result["digest of shards"] = omni.description()["host"]["sha256"] == frozen
    omni.eval()
    result["generated"], result["alone"] = heard(omni, ranks.rank), heard(plain.eval(), ranks.rank)
    with torch.no_grad():  # a validation, in which one rank has nothing to hear
        idx, targets, sound = batch(group_rows(0, ranks.rank, False, False), False)
        result["validation"] = bool((model(idx, targets, **sound) - plain(idx, targets, **sound)).abs() < 1e-5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    now = omni.trained()
    result["the optimizer's tensors"] = held == {id(t) for t in now.values() if t.requires_grad}
    result["no second copy"] = all(layer.base.weight is layer.weight and hasattr(layer.weight, "full_tensor")
                                   for layer in lora_by_path(omni.gpt).values())
    omni.save_adapter(folder / "sharded")
    plain.save_adapter(folder / "whole")
    result["file is there"] = (folder / "sharded").exists() and (folder / "whole").exists()
    try:
        omni.save_adapter(folder / "no such folder" / "adapter")
    except FileNotFoundError as error:
        result["refused"] = error.filename
    try:
        wrap(omni, ranks, "ddp")
    except BadInput as error:
        result["wrapped twice"] = str(error)
    return result


def told(ranks: Ranks) -> dict[str, Any]:
    mine = torch.tensor([ranks.rank + 1.0, 2.0])
    ranks.barrier()
    result = {"sum": ranks.sum(mine), "mine": mine, "counts": ranks.sum(torch.tensor(ranks.rank)),
              "shared": ranks.share({"step": 7, "who": ranks.rank})}
    p, q = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    p.grad, q.grad = torch.full((5,), 2.0), torch.full((3,), 4.0)
    return result | {"norm": gradient_norm([p, q, nn.Parameter(torch.zeros(9))])}


def every_case(ranks: Ranks, folder: Path) -> dict[str, Any]:
    cases = list(CASES) if ranks.num_ranks == 2 else ["lora, learned"]
    found = {f"{case}, {engine}": trained_on_ranks(ranks, case, engine) for case in cases for engine in ("ddp", "fsdp2")}
    return found | {"told": told(ranks), "sharded": sharded_otherwise(ranks, folder)}


def main(folder: Path, fail: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with join_ranks("cpu") as ranks:
        if fail and ranks.rank == 1:
            dist.all_reduce(torch.zeros(1 << 20), async_op=True)  # a thread waits for a peer that never comes
            raise ArithmeticError("the second rank has had enough")
        if fail:
            ranks.barrier()
            ranks.barrier()
        torch.save(every_case(ranks, folder), folder / f"rank{ranks.rank}.pt")


# ---- what the tests see ------------------------------------------------------------------------------------------------


def torchrun(num_ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The time limit is far below gloo's own, 30 minutes: who waits for a rank that is gone fails the test."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", __file__,
         *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""})


Found = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of so many ranks found; each number of ranks runs once."""
    kept: dict[int, list[dict[str, Any]]] = {}

    def on(num_ranks: int) -> list[dict[str, Any]]:
        if num_ranks not in kept:
            folder = tmp_path_factory.mktemp(f"ranks{num_ranks}")
            done = torchrun(num_ranks, folder)
            assert done.returncode == 0, done.stderr[-3000:]
            kept[num_ranks] = [torch.load(folder / f"rank{rank}.pt") for rank in range(num_ranks)]
            for result in kept[num_ranks]:
                result["sharded"]["files"] = [(folder / name).read_bytes() for name in ("sharded", "whole")]
        return kept[num_ranks]

    return on


ALONE = Ranks(0, 1, torch.device("cpu"))
EXPECTED: dict[str, dict[str, Any]] = {}


def expected(case: str) -> dict[str, Any]:
    if case not in EXPECTED:
        omni = omni_gpt(**CASES[case])
        EXPECTED[case] = train(wrap(omni, ALONE, "ddp"), omni, ALONE, case, joint=True)
    return EXPECTED[case]


THREE = pytest.param(3, marks=pytest.mark.slow)
RUNS = [(2, case) for case in CASES] + [pytest.param(3, "lora, learned", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("num_ranks", "case"), RUNS)
def test_training_equals_one_process_on_the_joint_batch(num_ranks: int, case: str, engine: str, found: Found) -> None:
    alone = expected(case)
    assert alone["norms"].min() < MAX_NORM < alone["norms"].max()
    assert any("side_rows" in name for name in alone) == (case == "lora, learned")
    for rank in found(num_ranks):
        came = rank[f"{case}, {engine}"]
        assert came.keys() == alone.keys()
        for name, value in alone.items():
            tolerance = {"rtol": 1e-5, "atol": 0} if name == "norms" else CLOSE
            torch.testing.assert_close(came[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_every_trained_tensor_has_moved_by_more_than_the_tolerance() -> None:
    """Or the test above could not fail."""
    for case in CASES:
        before = omni_gpt(**CASES[case]).trained()
        assert all((expected(case)[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items()
                   if "encoder." not in name)


@pytest.mark.parametrize("num_ranks", [2, THREE])
def test_sums_shares_and_norms(num_ranks: int, found: Found) -> None:
    for number, rank in enumerate(found(num_ranks)):
        came = rank["told"]
        assert came["sum"].tolist() == [sum(range(1, num_ranks + 1)), 2.0 * num_ranks]
        assert came["mine"].tolist() == [number + 1.0, 2.0] and int(came["counts"]) == sum(range(num_ranks))
        assert came["shared"] == {"step": 7, "who": 0} and came["norm"] == pytest.approx(math.sqrt(5 * 4 + 3 * 16))


@pytest.mark.parametrize("num_ranks", [2, THREE])
def test_a_sharded_omni_gpt_does_the_rest_too(num_ranks: int, found: Found) -> None:
    for rank in found(num_ranks):
        came = rank["sharded"]
        assert came["generated"] == came["alone"] and len(came["alone"]) == 4
        for what in ("kept digest", "digest of shards", "validation", "the optimizer's tensors", "no second copy",
                     "file is there"):
            assert came[what], what
        assert came["files"][0] == came["files"][1] and "sharded already" in came["wrapped twice"]
        assert "no such folder" in came["refused"]
    assert found(num_ranks)[0]["sharded"]["alone"] != found(num_ranks)[1]["sharded"]["alone"]


def test_a_rank_that_fails_ends_all_at_once_with_its_message(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path, "fail")
    assert done.returncode != 0 and "ArithmeticError: the second rank has had enough" in done.stderr
    assert not list(tmp_path.glob("rank*"))


# ---- one process -------------------------------------------------------------------------------------------------------


@contextmanager
def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in ENVIRONMENT:
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def test_without_torchrun_one_process_and_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with environment(monkeypatch), join_ranks("cpu") as ranks:
        assert ranks == ALONE and ranks.is_first and not dist.is_initialized()
        tensor = torch.ones(2)
        assert torch.equal(ranks.sum(tensor), tensor) and ranks.sum(tensor) is not tensor and ranks.share("x") == "x"
        ranks.barrier()
        omni = omni_gpt()
        assert wrap(omni, ranks, "ddp") is omni and wrap(omni, ranks, "fsdp2") is omni
        assert not any(hasattr(p, "full_tensor") for p in omni.parameters())
    with environment(monkeypatch), pytest.raises(KeyError), join_ranks("cpu"):
        raise KeyError


def test_a_group_of_one_shards_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
             "GLOO_SOCKET_IFNAME": "lo"}
    expected_file, omni = tmp_path / "plain", omni_gpt(lora=("mlp",))
    omni.save_adapter(expected_file)
    with environment(monkeypatch, **place), pytest.raises(KeyError), join_ranks("cpu") as ranks:
        assert dist.is_initialized() and ranks == ALONE
        assert wrap(omni, ranks, "fsdp2") is omni and all(hasattr(p, "full_tensor") for p in omni.projector.parameters())
        omni.save_adapter(tmp_path / "sharded")
        with pytest.raises(BadInput, match="in a process group"), join_ranks("cpu"):
            pass
        raise KeyError  # alone there is nobody to hold up: the exception goes its way
    assert not dist.is_initialized() and (tmp_path / "sharded").read_bytes() == expected_file.read_bytes()


@pytest.mark.parametrize("values", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2"},
                                    {"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_an_environment_that_torchrun_did_not_make_is_refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    with environment(monkeypatch, **values), pytest.raises(BadInput, match=r"RANK=.*Start with torchrun"), join_ranks("cpu"):
        pass
    assert not dist.is_initialized()


def test_a_numbered_device_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for device in ("cuda:1", "mps"):
        with environment(monkeypatch, **place), pytest.raises(BadInput, match="for 2 ranks; expected 'cpu' or 'cuda'"), \
                join_ranks(device):
            pass


@pytest.mark.parametrize(("error", "status"), [(SystemExit(3), 3), (SystemExit("words"), 1), (KeyboardInterrupt(), 1)])
def test_the_status_a_rank_leaves_with(error: BaseException, status: int) -> None:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        leave(error)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


@pytest.mark.parametrize("total", [1.0, 7.0])
def test_gradients_are_finished_by_the_equation(total: float) -> None:
    layer = nn.Linear(3, 2)
    layer(torch.ones(4, 3)).sum().backward()
    before = {name: p.grad.clone() for name, p in layer.named_parameters()}
    finish_gradients(layer, ALONE, total)
    assert all(torch.allclose(p.grad, before[name] / total) for name, p in layer.named_parameters())


def test_the_norm_and_its_clipping_as_torch_has_them() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.zeros(n)) for n in (3, 50, 7)] for _ in range(2))
    for mine, other in zip(ours[:2], theirs[:2]):
        mine.grad = torch.randn(mine.shape)
        other.grad = mine.grad.clone()
    expected_norm = float(nn.utils.clip_grad_norm_(theirs, 0.5))
    assert clip_gradients(iter(ours), 0.5) == pytest.approx(expected_norm) and expected_norm > 0.5
    for mine, other in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm it divides by
    assert gradient_norm(ours) == pytest.approx(0.5) and clip_gradients(ours, math.inf) == pytest.approx(0.5)
    assert gradient_norm([]) == 0.0 == gradient_norm(theirs[2:])
    ours[0].grad[0] = math.inf
    before = [p.grad.clone() for p in ours[:2]]
    assert clip_gradients(ours, 0.5) == math.inf and all(torch.equal(p.grad, was) for p, was in zip(ours, before))
    with pytest.raises(BadInput, match="max_norm > 0"):
        clip_gradients(ours, 0.0)


@pytest.mark.parametrize(("build", "path"),
                         [(reference, "transformer.h"), (nano_gpt, "transformer.h"), (tiny_hf, "model.layers")])
def test_the_blocks_of_every_host(build: Callable[[], nn.Module], path: str) -> None:
    gpt = build()
    assert find_blocks(gpt) == list(gpt.get_submodule(path))


def test_what_cannot_be_wrapped() -> None:
    with pytest.raises(BadInput, match="engine 'zero'; expected 'ddp' or 'fsdp2'"):
        wrap(omni_gpt(), ALONE, "zero")  # type: ignore[arg-type]
    tables = nn.Module()
    tables.rows = nn.ModuleList([nn.Embedding(9, 9), nn.Embedding(9, 9)])
    with pytest.raises(BadInput, match="blocks of one class; expected blocks to shard"):
        find_blocks(tables)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["fail"])
