"""What a training step needs: bytes, FLOPs and traffic, computed from sizes; the tables of docs/scale.md.

    python -m benchmarks.budget              # prints the tables, seconds
    python -m benchmarks.budget --json       # also holds the memory formula against a small GPT, and writes budget.json

Nothing here is a timing. The formulas are omni_adapters/step_counts.py's. Its activation formula counts what autograd saves in
nanochat's forward; `saved_bytes` counts the same on the reference GPT with saved-tensor hooks, and tests hold the two
together. FLOPs are held against torch's FlopCounterMode. LoRA runs in its two-path form, which is counted.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import omni_adapters
from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.cost import MACHINES, Prediction, predict, table
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.lora import Form, lora_by_path
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.step_counts import (
    Adapter,
    Batch,
    Engine,
    Sizes,
    adapter,
    flops,
    memory,
    rows_that_fit,
    sizes,
    traffic,
    whisper_encoder,
)

DEPTHS = (12, 20, 26)
GPUS = (1, 8, 64)
H100 = MACHINES["h100"]
GPU_BYTES = H100.memory


# ---- the formula against a real graph --------------------------------------------------------------------------------------


class Kept:
    """One saved tensor; dies with the graph that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saving() -> Iterator[weakref.WeakSet[Kept]]:
    """Inside, the set of what graphs keep: temporary graphs leave it again."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # a node that keeps its own output, and through it itself, is never let go of
        alive.add(kept)
        return kept

    def unpack(kept: Kept) -> Tensor:
        return kept.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield alive


class Small(NamedTuple):
    """A GPT that fits a test, by nanochat's rule, and what hears before it."""

    depth: int = 4
    aspect_ratio: int = 32
    head_dim: int = 32
    vocab_size: int = 512
    hidden: int = 96
    d_model: int = 80

    def sizes(self) -> Sizes:
        return sizes(self.depth, aspect_ratio=self.aspect_ratio, head_dim=self.head_dim, vocab_size=self.vocab_size)

    def adapter(self, batch: Batch, rank: int) -> Adapter:
        return adapter(self.sizes(), rank=rank, d_model=self.d_model, stack=batch.stack, hidden=self.hidden)


def small_step(small: Small, batch: Batch, rank: int, dtype: torch.dtype = torch.float32,
               form: Form = "two_path") -> tuple[OmniGPT, Callable[[], Tensor]]:
    """The reference GPT with a projector, and LoRA where rank > 0; and a function that runs its forward to the loss.
    LoRA computes as `form` says.

    Features come as float16, as shards store them. With bfloat16, tables and activations are bf16 and matrices stay fp32
    masters, as nanochat has them on CUDA.
    """
    shape = small.sizes()
    gpt = GPT(GPTConfig(sequence_len=2048, vocab_size=small.vocab_size, n_layer=shape.n_layer, n_head=shape.n_head,
                        n_kv_head=shape.n_head, n_embd=shape.n_embd))
    gpt.wte().to(dtype)
    gpt.value_embeds.to(dtype)
    omni = OmniGPT(gpt, (LogMelEncoder(), Projector(small.d_model, shape.n_embd, small.hidden, stack=batch.stack)))
    if rank:
        omni.add_lora(rank)
        for layer in lora_by_path(omni.gpt).values():
            layer.form = form
    features = Features(torch.randn(batch.rows, batch.soft * batch.stack, small.d_model, dtype=torch.float16),
                        torch.full((batch.rows,), batch.soft * batch.stack))
    idx = torch.randint(0, small.vocab_size, (batch.rows, batch.text))
    omni.train()
    return omni, lambda: omni(idx, idx.roll(-1, dims=1), audio_features=features)


def saved_bytes(small: Small, batch: Batch, rank: int, dtype: torch.dtype = torch.float32, form: Form = "two_path") -> int:
    """Bytes of all storages that the step's graph keeps when forward is over, parameters and buffers left out."""
    omni, forward = small_step(small, batch, rank, dtype, form)
    own = {t.untyped_storage().data_ptr() for t in [*omni.parameters(), *omni.buffers()]}
    with saving() as alive:
        loss = forward()
        storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    assert loss.requires_grad
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


def computed_bytes(small: Small, batch: Batch, rank: int, dtype: torch.dtype = torch.float32) -> float:
    """What `memory` says of the same: activations, casts, and the half of the logits' bytes that is kept, not a gradient."""
    terms = memory(small.sizes(), small.adapter(batch, rank), batch, a=dtype.itemsize, norm=4, d_model=small.d_model)
    return terms["activations"] + terms["casts"] + terms["logits"] / 2


def uncounted(small: Small, batch: Batch, dtype: torch.dtype = torch.float32) -> int:
    """Most bytes that the formula leaves out. A slot: the source row (int64) and two masks; a text position: answering slot
    and target (int64); casts of one row's rotary tables, and of scalars, two a layer."""
    casts = 2 * small.head_dim * (batch.soft + batch.text) if dtype is torch.bfloat16 else 0
    return 10 * batch.slots + 16 * batch.rows * batch.text + casts + 4 * (small.depth + 4)


CHECKS = [(small, batch, rank, dtype) for small, batch in (
    (Small(), Batch(rows=2, soft=24, text=12, stack=4)),
    (Small(depth=6, aspect_ratio=64, head_dim=64, vocab_size=2048, hidden=384), Batch(rows=3, soft=94, text=16, stack=8)),
) for rank in (0, 16) for dtype in (torch.float32, torch.bfloat16)]


def measure() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = []
    for small, batch, rank, dtype in CHECKS:
        measured, computed = saved_bytes(small, batch, rank, dtype), computed_bytes(small, batch, rank, dtype)
        rows.append({"gpt": small._asdict(), "batch": batch._asdict(), "rank": rank, "dtype": str(dtype).removeprefix("torch."),
                     "saved_bytes": measured, "computed_bytes": int(computed), "ratio": measured / computed,
                     "may_miss_bytes": uncounted(small, batch, dtype)})
    return rows


# ---- tables --------------------------------------------------------------------------------------------------------------

STAGES = ((1, 0), (2, 16))  # stage, LoRA's rank
ENGINES: tuple[Engine, ...] = ("ddp", "fsdp2")


def predicted(gpt: Sizes, own: Adapter, engine: Engine = "ddp", num_gpus: int = 1) -> Prediction:
    """What `omni-adapters cost` says of H100s."""
    return predict(H100, gpt, own, Batch(), num_gpus=num_gpus, engine=engine)


def cases() -> Iterator[tuple[int, int, Sizes, Adapter]]:
    for depth in DEPTHS:
        for stage, rank in STAGES:
            yield depth, stage, sizes(depth), adapter(sizes(depth), rank=rank)


def size_table() -> str:
    rows = []
    for depth in DEPTHS:
        gpt = sizes(depth)
        projector, lora = adapter(gpt), adapter(gpt, rank=16)
        rows.append([f"d{depth}", f"{gpt.n_embd}", *(f"{n / 1e6:,.1f}" for n in (
            gpt.total, gpt.matrices, gpt.lm_head, gpt.tables, projector.total, lora.lora))])
    return table(["", "n_embd", "parameters (M)", "matrices", "lm_head", "tables", "projector", "LoRA, rank 16"], rows)


def deepest(rank: int, **options: Any) -> int:
    """The deepest nanochat, in steps of two layers, of which one row fits."""
    depth = 2
    while rows_that_fit(sizes(depth + 2), adapter(sizes(depth + 2), rank=rank), Batch(), **options):
        depth += 2
    return depth


def depth_table() -> str:
    kinds: list[tuple[str, Engine, int]] = [("DDP, any number", "ddp", 8), ("FSDP2, 8", "fsdp2", 8), ("FSDP2, 64", "fsdp2", 64)]
    rows = [[name, *(f"d{deepest(rank, engine=engine, num_gpus=gpus)}" for _, rank in STAGES)] for name, engine, gpus in kinds]
    return table(["GPUs", "stage 1", "stage 2"], rows)


def memory_table() -> str:
    rows = []
    for depth, stage, gpt, own in cases():
        encoder = whisper_encoder()
        alone = memory(gpt, own, Batch(), encoder=encoder)
        eight = {engine: sum(memory(gpt, own, Batch(), engine=engine, num_gpus=8, encoder=encoder).values())
                 for engine in ENGINES}
        fit = rows_that_fit(gpt, own, Batch(), num_gpus=8, encoder=encoder)
        parts = [alone[name] for name in ("frozen", "casts", "trained", "activations", "logits")]
        rows.append([f"d{depth}", str(stage), *(f"{n / 1e9:.2f}" for n in [*parts, sum(alone.values()), *eight.values()]),
                     str(fit)])
    return table(["", "stage", "frozen", "casts", "trained", "activations", "logits", "one GPU", "DDP, 8 GPUs",
                  "FSDP2, 8 GPUs", "rows that fit (DDP)"], rows)


def step_table() -> str:
    rows = []
    for depth, stage, gpt, own in cases():
        work = flops(gpt, own, Batch())
        cells = [f"{sum(work.values()) / 1e12:.2f}", f"{work['projector'] / 1e12:.2f}",
                 f"{1e3 * predicted(gpt, own).step_seconds:.1f}"]
        for engine in ENGINES:
            took = [1e3 * predicted(gpt, own, engine, num_gpus).traffic_seconds for num_gpus in GPUS[1:]]
            cells += [f"{traffic(gpt, own, engine, 8) / 1e6:,.0f}", *(f"{ms:.1f}" for ms in took)]
        rows.append([f"d{depth}", str(stage), *cells])
    return table(["", "stage", "TFLOP", "projector's", "ms", "DDP sends (MB)", "ms, 8 GPUs", "ms, 64 GPUs", "FSDP2 sends (MB)",
                  "ms, 8 GPUs", "ms, 64 GPUs"], rows)


def speed_table() -> str:
    rows = []
    for depth in DEPTHS:
        for num_gpus in GPUS:
            cells = ["–" if num_gpus == 1 and engine == "fsdp2" else
                     f"{predicted(gpt, own, engine, num_gpus).tokens_per_second / 1e3:,.0f}"
                     for d, _, gpt, own in cases() if d == depth for engine in ENGINES]
            rows.append([f"d{depth}", str(num_gpus), *cells, "not yet measured"])
    return table(["", "GPUs", "stage 1, DDP", "stage 1, FSDP2", "stage 2, DDP", "stage 2, FSDP2", "measured"], rows)


TABLES = {"sizes": size_table, "memory on each GPU (GB, computed)": memory_table, "deepest GPT that fits (computed)": depth_table,
          "a step (computed)": step_table, "thousand tokens a second (computed)": speed_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="check the formula on small GPTs and write budget.json")
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/cpu")
    args = parser.parse_args()
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")
    if args.json:
        print(f"written: {write(args.out or Path(__file__).parent / 'results' / 'cpu')}")


def computed() -> list[dict[str, Any]]:
    return [{"depth": depth, "stage": stage, "sizes": gpt._asdict() | {"total": gpt.total}, "adapter": own._asdict(),
             "memory": memory(gpt, own, Batch(), encoder=whisper_encoder()), "flops": flops(gpt, own, Batch())}
            for depth, stage, gpt, own in cases()]


def write(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    report = {"what": "memory and FLOPs of a step, computed; and the activation formula against saved tensors, measured",
              "command": "python -m benchmarks.budget --json", "date": date.today().isoformat(), "torch": torch.__version__,
              "omni_adapters": omni_adapters.__version__, "batch": Batch()._asdict(), "computed": computed(),
              "measured_on_cpu": measure()}
    path = out / "budget.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
