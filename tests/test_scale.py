"""How large models are trained: activation checkpointing, autocast, DDP and FSDP2, two processes on one machine.

A checkpointed part runs twice, and its second run happens during backward, when nobody is inside the prepender's forward any
more: it must meet the same soft tokens, or be refused. Gradients that differ without a word are what these tests look for.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hosts import bigram_gpt, reference, tiny_hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni_adapters.anatomy import loss_of
from omni_adapters.features import Features
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.projector import Projector
from omni_adapters.shapes import BadInput

P = 127  # inside wte, outside the vocabulary
EXACT = {"rtol": 0, "atol": 1e-6}  # gradients of order 0.1 to 1, whose sums run in the same order or nearly so


def text(seed: int = 0, B: int = 2, T: int = 6) -> tuple[Tensor, Tensor]:
    idx = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))
    return idx, idx.roll(-1, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def prefix(width: int, seed: int) -> tuple[Tensor, Tensor, Any]:
    return (*text(seed), noise(2, 3, width, seed=seed))


def ragged(width: int, seed: int) -> tuple[Tensor, Tensor, Any]:
    return (*text(seed), Features(noise(2, 3, width, seed=seed), torch.tensor([3 - seed % 2, seed % 3])))


def clips(width: int, seed: int, key: int = P) -> tuple[Tensor, Tensor, Any]:
    idx, targets = text(seed)
    idx[0, 2 + seed % 3] = idx[1, seed % 2] = key
    return idx, targets, {key: Features(noise(2, 3, width, seed=seed), torch.tensor([1 + seed % 3, 3]))}


KINDS = {"prefix": prefix, "ragged": ragged, "clips": clips}


def leaf(soft: Any) -> Tensor:
    while isinstance(soft, dict):
        soft = next(iter(soft.values()))
    return soft.values if isinstance(soft, Features) else soft


def gradients(loss: Tensor, prepender: nn.Module, *softs: Any) -> list[Tensor]:
    """By backward(), as trainers do: reentrant checkpointing refuses autograd.grad."""
    wanted = [leaf(soft) for soft in softs] + [p for p in prepender.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.grad = None
    loss.backward()
    return [torch.zeros(()) if p.grad is None else p.grad for p in wanted]


def same(came: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(came) == len(expected) and bool(expected[0].abs().sum())
    for mine, theirs in zip(came, expected):
        torch.testing.assert_close(mine, theirs, **(tolerance or EXACT))


def checkpoint_blocks(gpt: nn.Module, reentrant: bool) -> None:
    for block in gpt.transformer["h"]:
        def again(*args: Any, forward: Callable[..., Any] = block.forward) -> Any:
            return checkpoint(forward, *args, use_reentrant=reentrant)
        block.forward = again


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_embeds", ["zero", "placeholder", "learned"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks(kind: str, reentrant: bool, value_embeds: Any) -> None:
    idx, targets, soft = KINDS[kind](32, 1)
    plain = SoftTokenPrepender(reference(), value_embeds=value_embeds)
    expected = gradients(plain(idx, targets, soft), plain, soft)
    gpt = reference()
    checkpoint_blocks(gpt, reentrant)
    prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds)
    same(gradients(prepender(idx, targets, soft), prepender, soft), expected)


@pytest.mark.parametrize("value_embeds", ["zero", "placeholder", "learned"])
@pytest.mark.parametrize("bigram_first", [False, True], ids=["values first", "bigram first"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_inside_checkpointed_blocks(kind: str, reentrant: bool, bigram_first: bool, value_embeds: Any) -> None:
    """Value tables and bigram tables that run again in backward. Two batches are in flight at once, as with pipelines or a
    sum of losses, and a second step follows the first."""
    options = {"bigram_first": bigram_first}
    plain = SoftTokenPrepender(bigram_gpt(**options), value_embeds=value_embeds)
    prepender = SoftTokenPrepender(bigram_gpt(**options, checkpointed=True, reentrant=reentrant), value_embeds=value_embeds)
    for step in (0, 2):
        one, two = KINDS[kind](24, step), KINDS[kind](24, step + 1)
        if kind == "clips":
            one, two = clips(24, step, 60), clips(24, step + 1, 60)
        expected = gradients(plain(*one) + plain(*two), plain, one[2], two[2])
        same(gradients(prepender(*one) + prepender(*two), prepender, one[2], two[2]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_forward_checkpointed(kind: str) -> None:
    one, two = KINDS[kind](32, 1), KINDS[kind](32, 2)
    prepender = SoftTokenPrepender(reference())
    expected = gradients(prepender(*one) + prepender(*two), prepender, one[2], two[2])
    total = checkpoint(prepender, *one, use_reentrant=False) + checkpoint(prepender, *two, use_reentrant=False)
    same(gradients(total, prepender, one[2], two[2]), expected)


def test_the_whole_forward_checkpointed_reentrantly() -> None:
    one, two = prefix(32, 1), prefix(32, 2)
    prepender = SoftTokenPrepender(reference())
    expected = gradients(prepender(*one) + prepender(*two), prepender, one[2], two[2])
    total = checkpoint(prepender, *one, use_reentrant=True) + checkpoint(prepender, *two, use_reentrant=True)
    same(gradients(total, prepender, one[2], two[2]), expected)


def test_checkpointed_blocks_inside_a_checkpointed_forward() -> None:
    batch = ragged(24, 1)
    plain = SoftTokenPrepender(bigram_gpt())
    expected = gradients(plain(*batch), plain, batch[2])
    prepender = SoftTokenPrepender(bigram_gpt(checkpointed=True))
    same(gradients(checkpoint(prepender, *batch, use_reentrant=False), prepender, batch[2]), expected)


def test_projector_and_all_checkpointed() -> None:
    """The soft tokens themselves are made again: another tensor of the same values."""
    ears = Ears(reference())
    idx, targets = text()
    frames = Features(noise(2, 7, 10).detach(), torch.tensor([7, 3]))
    expected = gradients(ears(idx, targets, *frames), ears, frames)
    same(gradients(checkpoint(ears, idx, targets, *frames, use_reentrant=False), ears, frames)[1:], expected[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_checkpointing(kind: str) -> None:
    idx, targets, soft = KINDS[kind](32, 1) if kind != "clips" else clips(32, 1, 52)
    plain = SoftTokenPrepender(tiny_hf().train())
    expected = gradients(loss_of(plain(idx, targets, soft)), plain, soft)
    gpt = tiny_hf().train()
    gpt.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepender = SoftTokenPrepender(gpt)
    same(gradients(loss_of(prepender(idx, targets, soft)), prepender, soft), expected)


def test_backward_twice() -> None:
    idx, targets, soft = ragged(24, 1)
    prepender = SoftTokenPrepender(bigram_gpt(checkpointed=True))
    loss = prepender(idx, targets, soft)
    first = torch.autograd.grad(loss, leaf(soft), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf(soft))[0])


def test_backward_after_other_forwards() -> None:
    """Between forward and backward: another prompt, a generation, a forward without soft tokens, and one that fails."""
    idx, targets, soft = ragged(24, 1)
    prepender = SoftTokenPrepender(bigram_gpt(checkpointed=True))
    expected = gradients(prepender(idx, targets, soft), prepender, soft)
    loss = prepender(idx, targets, soft)
    prepender(*prefix(24, 5))
    list(prepender.generate([5, 6], noise(1, 2, 24), max_tokens=2))
    prepender(idx, targets)
    with pytest.raises(TypeError):
        prepender(idx, None, soft, no_such_argument=1)
    same(gradients(loss, prepender, soft), expected)


def expanded(prepender: SoftTokenPrepender, tokens: list[int], soft: Any) -> tuple[Tensor, Tensor]:
    """Ids and targets for a foreign caller: soft slots and what follows the last id are not graded."""
    ids = torch.tensor([prepender.expand(tokens, soft)])
    targets = ids.roll(-1, 1)
    targets[0, : ids.size(1) - len(tokens)] = -1
    targets[0, -1] = -1
    return ids, targets


@pytest.fixture(params=["the whole", "tables in blocks"])
def foreign(request: pytest.FixtureRequest) -> tuple[SoftTokenPrepender, SoftTokenPrepender, Callable[..., Tensor]]:
    """An un-checkpointed prepender, a checkpointed one, and how a foreign caller runs the latter's GPT."""
    if request.param == "the whole":
        plain, prepender = SoftTokenPrepender(reference()), SoftTokenPrepender(reference())
        return plain, prepender, lambda *args: checkpoint(prepender.gpt, *args, use_reentrant=False)
    plain, prepender = SoftTokenPrepender(bigram_gpt()), SoftTokenPrepender(bigram_gpt(checkpointed=True))
    return plain, prepender, prepender.gpt


def test_bound_and_backward_outside(foreign: Any) -> None:
    plain, prepender, run = foreign
    soft = noise(1, 3, plain.anatomy.n_embd)
    ids, targets = expanded(plain, [5, 6, 7, 8], soft)
    with plain.bind(soft):
        loss = plain.gpt(ids, targets)
    expected = gradients(loss, plain, soft)
    torch.testing.assert_close(loss, plain(ids[:, 3:], targets[:, 3:], soft), rtol=0, atol=1e-5)
    with prepender.bind(soft):
        loss = run(ids, targets)
    same(gradients(loss, prepender, soft), expected)
    with prepender.bind(soft):  # and inside
        same(gradients(run(ids, targets), prepender, soft), expected)


def two_binds(plain: SoftTokenPrepender) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Two sounds for one prompt, the very same tensor of ids, and what each contributes."""
    softs = [noise(1, 3, plain.anatomy.n_embd, seed=seed) for seed in (1, 2)]
    ids, targets = expanded(plain, [5, 6, 7, 8], softs[0])
    losses = []
    for soft in softs:
        with plain.bind(soft):
            losses.append(plain.gpt(ids, targets))
    return softs, gradients(losses[0] + 2 * losses[1], plain, *softs), ids, targets


def test_one_tensor_of_ids_bound_to_two_sounds(foreign: Any) -> None:
    """Equal, or refused: the second sound must not stand in for the first."""
    plain, prepender, run = foreign
    softs, expected, ids, targets = two_binds(plain)
    losses = []
    for soft in softs:
        with prepender.bind(soft):
            losses.append(run(ids, targets))
    with contextlib.suppress(BadInput):
        same(gradients(losses[0] + 2 * losses[1], prepender, *softs), expected)


def test_backward_inside_the_next_bind(foreign: Any) -> None:
    """A loop that calls backward late: the recomputation belongs to the bind of its forward, not to the one it runs in."""
    plain, prepender, run = foreign
    softs, expected, ids, targets = two_binds(plain)
    with prepender.bind(softs[0]):
        first = run(ids.clone(), targets)
    with prepender.bind(softs[1]):
        second = run(ids.clone(), targets)
        with contextlib.suppress(BadInput):
            same(gradients(first + 2 * second, prepender, *softs), expected)


def test_our_own_backward_inside_a_bind(foreign: Any) -> None:
    plain, prepender, _ = foreign
    batch = prefix(plain.anatomy.n_embd, 3)
    expected = gradients(plain(*batch), plain, batch[2])
    loss = checkpoint(prepender, *batch, use_reentrant=False)
    with prepender.bind(noise(1, 2, plain.anatomy.n_embd)):
        same(gradients(loss, prepender, batch[2]), expected)
    if plain.gpt.__class__.__name__ == "BigramGPT":
        loss = prepender(*batch)
        with prepender.bind(noise(1, 2, plain.anatomy.n_embd)):
            same(gradients(loss, prepender, batch[2]), expected)


class InParts(nn.Module):
    """A host whose trunk and whose head with its loss are checkpointed each by itself."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.inner = bigram_gpt(softcap=None)
        self.transformer, self.lm_head, self.checkpointed = self.inner.transformer, self.inner.lm_head, checkpointed
        self.checkpoint_head = False

    def trunk(self, idx: Tensor) -> Tensor:
        x = F.rms_norm(self.transformer["wte"](idx), (24,))
        for block in self.transformer["h"]:
            x = block(x, idx)
        return x

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        logits = self.lm_head(x)[..., :50]
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        if not self.checkpointed:
            return self.head(self.trunk(idx), targets)
        x = checkpoint(self.trunk, idx, use_reentrant=False)
        if not self.checkpoint_head:
            return self.head(x, targets)
        return checkpoint(self.head, x, targets, use_reentrant=False)


def test_trunk_and_head_checkpointed_apart() -> None:
    """The head runs again before the trunk does. Equal, or an error; in no step a gradient of other slots, although
    batches of one fused length follow each other, whose rows differ in theirs."""
    plain, prepender = SoftTokenPrepender(InParts(False)), SoftTokenPrepender(InParts(True))
    for seed in (1, 3, 5):
        idx, targets, soft = ragged(24, seed)
        expected = gradients(plain(idx, targets, soft), plain, soft)
        prepender.gpt.checkpoint_head = seed > 1
        refused = True
        with contextlib.suppress(BadInput, ValueError, torch.utils.checkpoint.CheckpointError):
            same(gradients(prepender(idx, targets, soft), prepender, soft), expected)
            refused = False
        assert seed > 1 or not refused


def test_a_bare_host_recomputed_beside_ours() -> None:
    """The same GPT without soft tokens, checkpointed, backward in one sum with ours: hooks leave it alone."""
    idx, targets, soft = prefix(24, 1)
    plain, prepender = SoftTokenPrepender(bigram_gpt()), SoftTokenPrepender(bigram_gpt(checkpointed=True))
    other = text(7, T=9)
    expected = gradients(plain(idx, targets, soft) + plain.gpt(*other) + plain(idx, targets), plain, soft)
    total = prepender(idx, targets, soft) + prepender.gpt(*other) + prepender(idx, targets)
    same(gradients(total, prepender, soft), expected)


def test_finished_graphs_are_let_go() -> None:
    prepender = SoftTokenPrepender(bigram_gpt(checkpointed=True))

    def fused_alive() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.shape == (2, 17, 24))

    for _ in range(3):
        idx, targets = text(T=12)
        soft = noise(2, 5, 24)
        gradients(prepender(idx, targets, soft), prepender, soft)
        prepender(idx, targets, soft)  # never followed by a backward
    assert fused_alive() <= 2  # the last one may wait for its successor
    prepender.remove()
    assert fused_alive() == 0


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [reference, bigram_gpt, tiny_hf], ids=["reference", "bigram", "transformers"])
@pytest.mark.parametrize("kind", ["prefix", "ragged"])
def test_bf16_autocast(kind: str, build: Callable[[], nn.Module]) -> None:
    """bf16 rounds activations to 2⁻⁸ at some ten places: the loss, of about 4, within 0.15; gradients point the same way."""
    prepender = SoftTokenPrepender(build())
    batch = KINDS[kind](prepender.anatomy.n_embd, 1)
    loss = loss_of(prepender(*batch)).detach()
    expected = gradients(loss_of(prepender(*batch)), prepender, batch[2])[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = loss_of(prepender(*batch))
        bare = loss_of(prepender(*batch[:2]))
        if build is not tiny_hf:
            assert torch.equal(bare, prepender.gpt(*batch[:2]))
    came = gradients(low, prepender, batch[2])[0]
    torch.testing.assert_close(low.float(), loss, rtol=0, atol=0.15)
    assert came.dtype == torch.float32 and F.cosine_similarity(came.flatten(), expected.flatten(), dim=0) > 0.97


def test_soft_tokens_in_bf16_for_an_fp32_host_and_the_other_way() -> None:
    for gpt_dtype, soft_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        prepender = SoftTokenPrepender(reference().to(gpt_dtype))
        idx, targets, soft = prefix(32, 1)
        soft = soft.detach().to(soft_dtype).requires_grad_()
        prepender(idx, targets, soft).backward()
        assert soft.grad is not None and soft.grad.dtype == soft_dtype and bool(soft.grad.isfinite().all())


# ---- two processes ---------------------------------------------------------------------------------------------------


class Ears(nn.Module):
    """What a training script wraps: projector and prepender around a frozen GPT."""

    def __init__(self, gpt: nn.Module, value_embeds: Any = "zero") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = Projector(10, 32, 16, stack=2, zero_init=False)
        self.prepender = SoftTokenPrepender(gpt.requires_grad_(False), value_embeds=value_embeds)

    def forward(self, idx: Tensor, targets: Tensor, frames: Tensor, lens: Tensor) -> Tensor:
        return self.prepender(idx, targets, self.projector(Features(frames, lens)))


JOINT = (*text(3, B=4), noise(4, 7, 10, seed=3).detach(), torch.tensor([7, 2, 0, 0]))  # the second rank has no sound at all


def ears_gradients(ears: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    ears.zero_grad()
    loss = ears(*batch)
    loss.backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in ears.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def ddp(rank: int, value_embeds: str) -> dict[str, Tensor]:
    ears = nn.parallel.DistributedDataParallel(Ears(reference(), value_embeds))
    mine = tuple(part[2 * rank : 2 * rank + 2] for part in JOINT)
    ears_gradients(ears, mine)
    result = ears_gradients(ears, mine)  # the second step too
    dist.all_reduce(result["loss"])
    result["loss"] /= 2
    return result


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


SHARDINGS = ["prepender first", "sharded first", "placeholder rows", "tables by themselves"]
FSDP_BATCH = ragged(32, 1)


def shard(gpt: nn.Module, tables: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    if tables:
        for module in (gpt.transformer["wte"], gpt.value_embeds["1"], gpt.lm_head, gpt.smear_gate):
            fully_shard(module)
    for block in gpt.transformer["h"]:
        fully_shard(block)
    fully_shard(gpt)


def fsdp(case: str) -> dict[str, Tensor]:
    gpt = reference()
    value_embeds: Any = "placeholder" if case in ("placeholder rows", "tables by themselves") else "zero"
    if case != "prepender first":
        shard(gpt, case == "tables by themselves")
    prepender = SoftTokenPrepender(gpt, value_embeds=value_embeds)
    if case == "prepender first":
        shard(gpt, False)
    return fsdp_result(prepender)


def fsdp_result(prepender: SoftTokenPrepender) -> dict[str, Tensor]:
    """Two steps of a full fine-tune: loss, gradients of soft tokens and of some parameters, and the bare forward."""
    idx, targets, soft = FSDP_BATCH
    for _ in range(2):
        prepender.zero_grad()
        leaf(soft).grad = None
        loss = prepender(idx, targets, soft)
        loss.backward()
    gpt = prepender.gpt
    result = {"loss": loss.detach(), "soft": leaf(soft).grad.clone()}
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_q.weight", "value_embeds.1.weight", "lm_head.weight"):
        result[name] = whole(gpt.get_parameter(name).grad)
    with torch.no_grad():
        result["bare"] = prepender(idx)
    return result


def fsdp_generation() -> dict[str, Tensor]:
    gpt = reference()
    shard(gpt, False)
    return generation(SoftTokenPrepender(gpt))


def generation(prepender: SoftTokenPrepender) -> dict[str, Tensor]:
    return {"ids": torch.tensor(list(prepender.generate([5, 6, 7], noise(1, 3, 32), max_tokens=5, temperature=0.0)))}


Ranks = Callable[[str], list[dict[str, Tensor]]]
CASES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "ddp zero": lambda rank: ddp(rank, "zero"),
    "ddp learned": lambda rank: ddp(rank, "learned"),
    **{f"fsdp {case}": lambda rank, case=case: fsdp(case) for case in SHARDINGS},
    "fsdp generation": lambda rank: fsdp_generation(),
}


def process(rank: int, folder: str) -> None:
    """One of two: every case, results or the error's text to a file."""
    import traceback

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, run in CASES.items():
        try:
            results[name] = {key: whole(value) for key, value in run(rank).items()}
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    results = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]

    def results_of(case: str) -> list[dict[str, Tensor]]:
        for rank in range(2):
            assert isinstance(results[rank][case], dict), results[rank][case]
        return [results[rank][case] for rank in range(2)]

    return results_of


def alike(came: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert came.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(came[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("value_embeds", ["zero", "learned"])
def test_ddp_equals_one_process_on_the_joint_batch(value_embeds: str, ranks: Ranks) -> None:
    expected = ears_gradients(Ears(reference(), value_embeds), JOINT)
    assert {"projector.fc1.weight", "projector.fc2.weight"} <= expected.keys()
    assert any("side_rows" in name for name in expected) == (value_embeds == "learned")
    for came in ranks(f"ddp {value_embeds}"):
        alike(came, expected)


@pytest.mark.parametrize("case", SHARDINGS)
def test_fsdp2_equals_one_process(case: str, ranks: Ranks) -> None:
    value_embeds: Any = "placeholder" if case in ("placeholder rows", "tables by themselves") else "zero"
    expected = fsdp_result(SoftTokenPrepender(reference(), value_embeds=value_embeds))
    for came in ranks(f"fsdp {case}"):
        alike(came, expected, atol=1e-5)  # logits of the bare forward among them


def test_fsdp2_generates(ranks: Ranks) -> None:
    expected = generation(SoftTokenPrepender(reference()))
    for came in ranks("fsdp generation"):
        alike(came, expected)
