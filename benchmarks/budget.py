"""What a training step needs: bytes, FLOPs and traffic, computed from sizes; the tables of docs/scale.md.

    python -m benchmarks.budget              # prints the tables, seconds
    python -m benchmarks.budget --json       # also holds the memory formula against a small GPT, and writes budget.json

Nothing here is a timing. Sizes follow from the depth as in nanochat's scripts/base_train.py. The activation formula counts
what autograd saves in nanochat's forward, the weights being frozen; `saved_bytes` counts the same on the reference GPT with
saved-tensor hooks, and tests hold the two together. FLOPs are held against torch's FlopCounterMode.

Letters: C = n_embd, H = heads, L = layers, V = vocabulary rows, r = LoRA's rank, a = bytes of an activation.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import omni_adapters
from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.reference_gpt import GPT, GPTConfig

Engine = Literal["ddp", "fsdp2"]

DEPTHS = (12, 20, 26)
GPUS = (1, 8, 64)
GPU_BYTES = 80e9         # memory of an H100
PEAK = 989e12            # FLOP/s of an H100 SXM in dense bf16, by its data sheet
PEAK_TF32 = 495e12       # the same in TF32, which the recipes allow for fp32 masters
UTILISATION = 0.40       # share of either peak that is assumed, not measured
NVLINK = 450e9           # bytes/s that an H100 SXM sends inside its node, by its data sheet (900 GB/s both ways)
NETWORK = 50e9           # bytes/s between nodes, one port of 400 Gbit/s a GPU
GPUS_PER_NODE = 8
VALUE_GATE, SMEAR_GATE = 12, 24  # channels that nanochat's gates read
VOCAB_MULTIPLE = 64              # nanochat pads its vocabulary to a multiple of this many rows


# ---- sizes -------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """A nanochat's shape and its parameters by kind; `total` is all of them."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_rows: int
    matrices: int   # attention and MLP
    gates: int      # value gates and the smear gate, matmuls too
    lm_head: int
    tables: int     # wte and the value embeddings
    scalars: int

    @property
    def matmuls(self) -> int:
        return self.matrices + self.gates + self.lm_head

    @property
    def total(self) -> int:
        return self.matmuls + self.tables + self.scalars

    @property
    def num_value_tables(self) -> int:
        return (self.n_layer + 1) // 2  # every other layer, the last included


def sizes(depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, vocab_size: int = 32768) -> Sizes:
    """nanochat's rule: n_embd = depth · aspect_ratio, rounded up to whole heads of `head_dim`; no grouped queries."""
    heads = -(-depth * aspect_ratio // head_dim)
    C, V = heads * head_dim, -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    values = (depth + 1) // 2
    return Sizes(depth, C, heads, V, matrices=12 * depth * C * C, gates=values * VALUE_GATE * heads + SMEAR_GATE,
                 lm_head=V * C, tables=(1 + values) * V * C, scalars=2 * depth + 2)


class Batch(NamedTuple):
    """One micro-batch of one GPU: `rows`, each with `soft` tokens made of `frames` features and `text` tokens."""

    rows: int = 32
    soft: int = 94
    text: int = 64
    stack: int = 8

    @property
    def slots(self) -> int:
        return self.rows * (self.soft + self.text)


class Adapter(NamedTuple):
    """What is trained: the projector's two matrices, and LoRA of `rank` in stage 2 (rank 0: stage 1)."""

    fc1: int   # stack · d_model × hidden
    fc2: int   # hidden × C
    hidden: int
    rank: int
    lora: int  # parameters of all lora_a and lora_b

    @property
    def total(self) -> int:
        return self.fc1 + self.fc2 + self.lora


def adapter(gpt: Sizes, *, rank: int = 0, d_model: int = 512, stack: int = 8, hidden: int | None = None) -> Adapter:
    """d_model 512 is Whisper-base's; hidden defaults to the Projector's own 4 C. LoRA stands on c_q, c_k, c_v, c_proj
    (C × C each) and on the MLP's c_fc and c_proj (C × 4C); value gates have fewer than 16 outputs, too few for its rank."""
    C = gpt.n_embd
    hidden = 4 * C if hidden is None else hidden
    return Adapter(stack * d_model * hidden, hidden * C, hidden, rank, lora=gpt.n_layer * rank * (4 * 2 * C + 2 * 5 * C))


def whisper_encoder(d_model: int = 512, n_layer: int = 6, n_mels: int = 80) -> int:
    """Parameters of Whisper's encoder; the defaults are Whisper-base's. Its MLP is 4 d wide, keys have no bias."""
    d = d_model
    convolutions = 3 * n_mels * d + d + 3 * d * d + d
    block = 4 * d * d + 3 * d + 8 * d * d + 5 * d + 4 * d
    return convolutions + 1500 * d + n_layer * block + 2 * d


# ---- bytes -------------------------------------------------------------------------------------------------------------


def kept_per_slot(gpt: Sizes, rank: int, a: int, norm: int) -> int:
    """Bytes that autograd keeps of one slot (a soft or a text token) from the GPT's forward to its backward.

    A frozen matmul needs only its weight to pass a gradient on, so its input is not kept. What is kept in each layer:

        inputs of norms       2 C residual, 2 C rotated q and k       and their fp32 scales, 2 + 2 H
        attention             q, k, v, output: 4 C                    and its fp32 log-sum-exp, H
        relu² MLP             relu's output: 4 C
        value embeddings      C + H, in every other layer
        LoRA on a matmul      its input: C before attention, C before the MLP, 4 C inside it (attention's output is kept
                              already), and r for each of the 6 low-rank products

    and once: the normed embedding's input C, smear C + 2, the final norm's input C and, for the gather, its output C.

    a: bytes of an activation; norm: bytes a norm keeps of each input element (a in CUDA's fused kernel, 4 on the CPU).
    """
    C, H, L = gpt.n_embd, gpt.n_head, gpt.n_layer
    layer = 4 * C * norm + 4 * (2 + 2 * H) + (4 * C + 4 * C) * a + 4 * H
    lora = (6 * C + 6 * rank) * a if rank else 0
    once = 2 * C * norm + 4 * 2 + (2 * C + 2) * a
    return L * (layer + lora) + gpt.num_value_tables * (C + H) * a + once


def frozen_bytes(gpt: Sizes, a: int) -> float:
    return 4.0 * (gpt.matmuls + gpt.scalars) + a * gpt.tables


def memory(gpt: Sizes, own: Adapter, batch: Batch, *, engine: Engine = "ddp", num_gpus: int = 1, a: int = 2,
           norm: int | None = None, d_model: int = 512, encoder: int = 0) -> dict[str, float]:
    """Bytes on one GPU when backward begins, by term: the fullest moment where 16 V a text position, which is gone when the
    first block's backward is at work, is more than that block's 13 C a in each slot.

        frozen       4 · (matmuls + scalars) + a · tables: nanochat keeps matrices in fp32, tables in its compute dtype
        casts        a for each matmul weight and LoRA's: made in forward and kept for backward (none where a = 4)
        trained      16 for each trained parameter: fp32 master 4, gradient 4, AdamW 8; DDP's buckets are 4 more
        activations  kept_per_slot · slots + the projector's, in fp32: 4 (stack · d_model + 2 hidden) for each soft token
        logits       16 V for each text position: tanh, log-probabilities, and a gradient of each, all fp32
        encoder      4 for each weight, with shards too: the recipe opens it to validate and to check what made them
        gathered     FSDP2: what stands unsharded at a time beside the shards

    FSDP2 divides frozen and trained by `num_gpus`. It cannot divide the rest: rows are each GPU's own, casts are kept by
    autograd like activations, and wte, value tables and lm_head stay whole while the GPT runs, for they belong to its root.
    """
    norm = a if norm is None else norm
    frozen = frozen_bytes(gpt, a)
    shards = num_gpus if engine == "fsdp2" else 1
    whole = num_gpus > 1 and engine == "fsdp2"
    root = 4.0 * (gpt.lm_head + SMEAR_GATE + gpt.scalars) + a * gpt.tables
    block = 4.0 * (gpt.matrices + own.lora) / gpt.n_layer
    return {
        "frozen": frozen / shards,
        "casts": float(a * (gpt.matmuls + own.lora)) if a != 4 else 0.0,
        "trained": (20.0 if num_gpus > 1 and engine == "ddp" else 16.0) * own.total / shards,
        "activations": float(kept_per_slot(gpt, own.rank, a, norm) * batch.slots
                             + 4 * (batch.stack * d_model + 2 * own.hidden) * batch.rows * batch.soft),
        "logits": 16.0 * gpt.vocab_rows * batch.rows * batch.text,
        "encoder": 4.0 * encoder,
        "gathered": root + 2 * block + 8.0 * (own.fc1 + own.fc2) if whole else 0.0,  # one block works, the next arrives
    }


def rows_that_fit(gpt: Sizes, own: Adapter, batch: Batch, **options: Any) -> int:
    """Largest micro-batch, in rows, whose `memory` stays within 90 % of a GPU: the rest is for CUDA, NCCL and gaps."""
    def total(rows: int) -> float:
        return sum(memory(gpt, own, batch._replace(rows=rows), **options).values())

    return max(0, int((0.9 * GPU_BYTES - total(0)) // (total(1) - total(0))))


# ---- FLOPs and traffic ---------------------------------------------------------------------------------------------------


def attended(T: int, window: int) -> int:
    """Σ over T causal queries of the keys that each sees: itself and `window` before it."""
    full = min(T, window + 1)
    return full * (full + 1) // 2 + (T - full) * full


def flops(gpt: Sizes, own: Adapter, batch: Batch, *, encoder: int = 0, frames: int = 0,
          sequence_len: int = 2048) -> dict[str, float]:
    """Multiplications and additions of one step on one micro-batch, by part.

        matmuls     frozen: 2 forward, 2 backward for each weight and slot; no weight gradients. lm_head: text positions only
        attention   4 C forward, 8 C backward for each key a query sees; three of four layers see a quarter of sequence_len
        lora        6 for each parameter and slot
        projector   fc2 6, fc1 4 for each weight and soft token: features need no gradient
        encoder     2 for each of its weights and frame, 0 where features come from shards (convolutions and attention left out)
    """
    short = -(-sequence_len // 4 // 128) * 128
    longs = sum(layer % 4 == 3 or layer == gpt.n_layer - 1 for layer in range(gpt.n_layer))
    T = batch.soft + batch.text
    keys = longs * attended(T, sequence_len) + (gpt.n_layer - longs) * attended(T, short)
    value_gates = gpt.gates - SMEAR_GATE
    return {
        "matmuls": 4.0 * ((gpt.matrices + value_gates) * batch.slots + SMEAR_GATE * (batch.slots - batch.rows)
                          + gpt.lm_head * batch.rows * batch.text),
        "attention": 12.0 * gpt.n_embd * keys * batch.rows,
        "lora": 6.0 * own.lora * batch.slots,
        "projector": (4.0 * own.fc1 + 6.0 * own.fc2) * batch.rows * batch.soft,
        "encoder": 2.0 * encoder * frames,
    }


def traffic(gpt: Sizes, own: Adapter, engine: Engine, num_gpus: int, *, a: int = 2) -> float:
    """Bytes that each GPU sends in one step of one micro-batch.

    DDP: a ring all-reduce of the trained gradients, 2 (N − 1)/N · 4 bytes each. FSDP2: all-gathers of every weight, frozen
    and trained, for forward and for backward, and a reduce-scatter of the trained gradients; with m micro-batches a GPU
    the gathers come m times, DDP's all-reduce once.
    """
    share = (num_gpus - 1) / num_gpus
    if engine == "ddp":
        return share * 2 * 4.0 * own.total
    return share * (2 * (frozen_bytes(gpt, a) + 4.0 * own.total) + 4.0 * own.total)


def work_seconds(gpt: Sizes, own: Adapter, batch: Batch) -> float:
    """Computed, not measured: UTILISATION of the peak in bf16, for the projector in TF32."""
    work = flops(gpt, own, batch)
    projector = work.pop("projector")
    return (sum(work.values()) / PEAK + projector / PEAK_TF32) / UTILISATION


def step_seconds(gpt: Sizes, own: Adapter, batch: Batch, engine: Engine, num_gpus: int) -> float:
    """Computed, not measured: the work, then traffic at wire speed, nothing overlapped."""
    link = NVLINK if num_gpus <= GPUS_PER_NODE else NETWORK
    return work_seconds(gpt, own, batch) + traffic(gpt, own, engine, num_gpus) / link


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
        kept = Kept(tensor)
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


def small_step(small: Small, batch: Batch, rank: int, dtype: torch.dtype = torch.float32) -> tuple[OmniGPT, Callable[[], Tensor]]:
    """The reference GPT with a projector, and LoRA where rank > 0; and a function that runs its forward to the loss.

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
    features = Features(torch.randn(batch.rows, batch.soft * batch.stack, small.d_model, dtype=torch.float16),
                        torch.full((batch.rows,), batch.soft * batch.stack))
    idx = torch.randint(0, small.vocab_size, (batch.rows, batch.text))
    omni.train()
    return omni, lambda: omni(idx, idx.roll(-1, dims=1), audio_features=features)


def saved_bytes(small: Small, batch: Batch, rank: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all storages that the step's graph keeps when forward is over, parameters and buffers left out."""
    omni, forward = small_step(small, batch, rank, dtype)
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


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


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
                 for engine in ("ddp", "fsdp2")}
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
                 f"{1e3 * work_seconds(gpt, own, Batch()):.0f}"]
        for engine in ("ddp", "fsdp2"):
            sent = traffic(gpt, own, engine, 8)
            cells += [f"{sent / 1e6:,.0f}", f"{1e3 * sent / NVLINK:.1f}", f"{1e3 * traffic(gpt, own, engine, 64) / NETWORK:.0f}"]
        rows.append([f"d{depth}", str(stage), *cells])
    return table(["", "stage", "TFLOP", "projector's", "ms", "DDP sends (MB)", "ms, 8 GPUs", "ms, 64 GPUs", "FSDP2 sends (MB)",
                  "ms, 8 GPUs", "ms, 64 GPUs"], rows)


def speed_table() -> str:
    rows = []
    for depth in DEPTHS:
        for gpus in GPUS:
            cells = []
            for _, rank in STAGES:
                gpt = sizes(depth)
                own = adapter(gpt, rank=rank)
                for engine in ("ddp", "fsdp2"):
                    seconds = step_seconds(gpt, own, Batch(), engine, gpus)
                    cells.append("–" if gpus == 1 and engine == "fsdp2" else f"{gpus * Batch().slots / seconds / 1e3:,.0f}")
            rows.append([f"d{depth}", str(gpus), *cells, "not yet measured"])
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
