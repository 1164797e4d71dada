"""Training on several ranks (processes, one device each) with torch's own engines: DDP, and FSDP2's fully_shard.

    torchrun --nproc_per_node=8 train.py         with join_ranks() as ranks: …        one process alone runs the same code

Notable:
- `wrap` last: after LoRA is injected and the adapter loaded, before the optimizer is made
- FSDP2 shards each transformer block, the rest of the GPT, and the projector; parameters are resharded after every forward,
  so `OmniGPT.trained()` always has the very tensors that the optimizer has
- engines average gradients over ranks, and know nothing of how many tokens each had: `finish_gradients` turns the average
  into the sum, and is the one place that does
- a rank that fails leaves at once: a process group cannot be taken down while other ranks wait in a collective
"""

from __future__ import annotations

import inspect
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from omni_adapters.anatomy import unwrap
from omni_adapters.collective import whole
from omni_adapters.fingerprints import describe_host
from omni_adapters.lora import relink_bases
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput, listing

Engine = Literal["ddp", "fsdp2"]
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun sets
POLL = 0.02  # seconds between two looks into the store
MOST_SHAPES = 1024  # graphs of one module: more than buckets make; torch's 8 is for programs whose shapes nobody has bounded
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, every method is the identity."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over ranks of `tensor`, of one shape and dtype on all: a new tensor without a graph, on the device it came from."""
        total = tensor.detach().to(self.device, copy=True)
        if self.num_ranks > 1:
            dist.all_reduce(total)
        return total.to(tensor.device)

    def share(self, value: Any) -> Any:
        """Rank 0's value, picklable, to every rank; what the others pass is not looked at."""
        if self.num_ranks == 1:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.num_ranks > 1:
            dist.barrier()


@contextmanager
def join_ranks(device: str | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun started, as one process group; without torchrun one process and no group.

    device: "cpu" (gloo) or "cuda" (nccl, where this process gets cuda:LOCAL_RANK); None is CUDA where there is some.

    With more than one rank, an exception that leaves the block ends the process there and then, with its traceback and exit
    status 1 (a SystemExit's own where that is a number): torchrun then ends the others. Nothing further up catches it.
    Raises BadInput for an environment that torchrun did not make, and inside another process group.
    """
    place = read_environment()
    kind = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place is None:
        yield Ranks(0, 1, kind)
        return
    rank, num_ranks, local_rank = place
    if dist.is_initialized():
        raise BadInput("join_ranks", "a process that is in a process group", "one that is in none", "join once")
    if kind.type not in BACKENDS or kind.index is not None:
        raise BadInput("join_ranks", f"device {device!r} for {num_ranks} ranks", "'cpu' or 'cuda'",
                       "leave the number out: torchrun's LOCAL_RANK chooses the device")
    begin(kind.type, rank, num_ranks, local_rank)
    try:
        yield Ranks(rank, num_ranks, torch.device("cuda", local_rank) if kind.type == "cuda" else kind)
    except BaseException as error:
        if num_ranks > 1 and not (isinstance(error, SystemExit) and error.code in (None, 0)):
            leave(error)
        raise
    finally:
        dist.destroy_process_group()


def begin(kind: str, rank: int, num_ranks: int, local_rank: int) -> None:
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if kind == "cuda" else None
    store, _, _ = next(dist.rendezvous("env://", rank, num_ranks))
    store = dist.PrefixStore(meet(store, rank, num_ranks), store)
    dist.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=num_ranks, device_id=device)


def meet(store: dist.Store, rank: int, num_ranks: int) -> str:
    """A name that exactly the ranks alive now agree on.

    torchrun's store outlives a restart (torch 2.13), and with it the addresses of the dead, which a rank that is early
    would read. So rank 0 draws a name, the others answer to it with theirs, and only who is named in its reply goes on.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set("first", own)
        while True:
            answers = [store.get(f"answer/{other}").decode() for other in range(1, num_ranks)]
            if all(answer.startswith(own) for answer in answers):
                store.set(f"reply/{own}", " ".join(answers))
                return own
            time.sleep(POLL)
    while True:
        first = store.get("first").decode()
        store.set(f"answer/{rank}", f"{first} {own}")
        if store.check([f"reply/{first}"]) and own in store.get(f"reply/{first}").decode().split():
            return first
        time.sleep(POLL)


def read_environment() -> tuple[int, int, int] | None:
    """(rank, number of ranks, rank on this machine), or None where there is no torchrun."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if not found:
        return None
    if len(found) < len(ENVIRONMENT) or not all(value.isdecimal() for value in found.values()):
        raise BadInput("join_ranks", listing([f"{name}={value}" for name, value in found.items()]) + " in the environment",
                       f"all of {', '.join(ENVIRONMENT)} as integers from 0, or none",
                       "start with torchrun, or unset them")
    rank, num_ranks, local_rank = (int(found[name]) for name in ENVIRONMENT)
    return rank, num_ranks, local_rank


def leave(error: BaseException) -> NoReturn:
    """End the process without waiting for anybody: not for peers inside a collective, nor for threads that wait for those.

    The interpreter's own way out would, in the destructor of the process group.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


# ---- engines -----------------------------------------------------------------------------------------------------------


def wrap(omni: OmniGPT, ranks: Ranks, engine: Engine, *, compiled: bool = False) -> nn.Module:
    """`omni` on the ranks' device, with rank 0's values of all that trains: what to call in its place for a training step.

    "ddp" returns a DistributedDataParallel around it, "fsdp2" shards it in place and returns `omni` itself; alone both
    return `omni`, which a group of one rank still shards. Make optimizers afterwards: the parameters are others then.
    Under either engine all ranks take every step together, with equally many micro-batches, heard or silent. Under FSDP2
    whatever calls the GPT does (validation, `generate` to the same number of tokens), and so do `save_adapter` and
    `description`.

    compiled: calls of `omni` run as one graph for each shape (`data/buckets`); not with "fsdp2", whose own hooks break graphs.

    Raises BadInput for an unknown engine, a GPT without blocks to shard, one that is sharded already.
    """
    if engine not in ("ddp", "fsdp2"):
        raise BadInput("wrap", f"engine {engine!r}", "'ddp' or 'fsdp2'")
    if compiled and engine == "fsdp2":
        raise BadInput("wrap", "compiled with engine 'fsdp2'", "compiled with 'ddp', or neither")
    if any(isinstance(module, FSDPModule) for module in omni.modules()):
        raise BadInput("wrap", "an OmniGPT that is sharded already", "one that is not", "wrap it once")
    share_values(omni, ranks)
    if engine == "fsdp2" and dist.is_initialized():
        shard(omni, ranks)
        return omni
    omni.to(ranks.device)
    if compiled:
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_SHAPES
        torch._dynamo.config.optimize_ddp = False  # it would cut the graph at every 25 MB of gradients, of which there are few
        omni.compile(fullgraph=True, dynamic=False)
    if ranks.num_ranks == 1:
        return omni
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
    still: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}  # buffers never change
    return DistributedDataParallel(omni, device_ids=[ranks.device] if ranks.device.type == "cuda" else None, **still)


@torch.no_grad()
def share_values(omni: OmniGPT, ranks: Ranks) -> None:
    """A projector is drawn from each process's own seed: rank 0's counts."""
    if ranks.num_ranks > 1:
        for tensor in omni.trained().values():
            value = tensor.detach().to(ranks.device, copy=True)
            dist.broadcast(value, src=0)
            tensor.copy_(value)


def shard(omni: OmniGPT, ranks: Ranks) -> None:
    """FSDP2 on each block, on what else the GPT has, and on projectors. Learned side rows, a vector a table, stay whole."""
    gpt = unwrap(omni.gpt)
    blocks = find_blocks(gpt)
    describe_host(omni.prepender, omni.host_digest)  # while every rank has all the weights
    mesh = init_device_mesh(ranks.device.type, (ranks.num_ranks,))
    projectors = [sense.projector for sense in omni.senses().values()]
    sharded = [fully_shard(module, mesh=mesh, reshard_after_forward=True) for module in (*blocks, gpt, *projectors)]
    relink_bases(gpt)
    for module in sharded:  # FSDP2 keeps the tensors it gathers into: were `generate` the first to gather, they would be
        module.unshard()    # inference tensors for good, and the next training step would fail
        module.reshard()
    omni.prepender.side_rows.to(ranks.device)
    for sense in omni.senses().values():
        if isinstance(sense.encoder, nn.Module):
            sense.encoder.to(ranks.device)


def find_blocks(gpt: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the largest list of composite modules of one class (transformer.h, model.layers)."""
    lists = [list(module) for module in gpt.modules() if isinstance(module, nn.ModuleList) and len(module)]
    alike = [items for items in lists if len({type(item) for item in items}) == 1 and any(True for _ in items[0].children())]
    if not alike:
        raise BadInput("wrap", f"a {type(gpt).__name__} without an nn.ModuleList of blocks of one class", "blocks to shard",
                       "use engine='ddp'")
    return max(alike, key=lambda items: sum(p.numel() for item in items for p in item.parameters()))


@contextmanager
def gradient_sync(model: nn.Module, on: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch go inside; `on` for the last of a step, so that ranks meet once a step.

    model: what `wrap` returned.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_gradient_sync(on, recurse=False)
    try:
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not on else nullcontext():
            yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


@torch.no_grad()
def finish_gradients(model: nn.Module, ranks: Ranks, total: float = 1.0) -> None:
    """After the last backward of a step, before clipping: every trained parameter's gradient becomes

        g = (Σ_r g_r) / total,        g_r = ∂(Σ over rank r's micro-batches of their summed losses) / ∂θ

    as if one process had seen the joint batch. `total` is the step's number of graded tokens over all ranks, or 1 where
    the losses were divided by it already. DDP and FSDP2 have left (Σ_r g_r) / R; what FSDP2 does not shard is still g_r.

    model: what `wrap` returned, or the OmniGPT in it. All ranks call this; a parameter that missed its gradient on one of
    them counts as zero there.
    """
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if sharded and not isinstance(parameter, DTensor):
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = ranks.sum(grad).div_(total)
        elif parameter.grad is not None:
            parameter.grad.mul_(ranks.num_ranks / total)


def gradient_norm(params: Iterable[Tensor]) -> float:
    """√Σ g² over all gradients, sharded ones as wholes: the same number on all ranks, which call it together."""
    grads = [p.grad for p in params if p.grad is not None]
    kinds = [g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)]
    return math.hypot(*(float(whole(get_total_norm(kind))) for kind in kinds if kind))


def clip_gradients(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale gradients so that their norm is at most `max_norm`; returns the norm before. One that is not finite changes
    nothing: look at it before the optimizer's step."""
    if not max_norm > 0:
        raise BadInput("clip_gradients", f"max_norm = {max_norm}", "max_norm > 0, math.inf for no limit")
    params = list(params)
    norm = gradient_norm(params)
    if max_norm < norm < math.inf:
        for parameter in params:
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / norm)
    return norm
