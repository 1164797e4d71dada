"""What a training step is made of: parameters, bytes, FLOPs, traffic and launches, counted from a GPT's depth and a batch.

Notable:
- plain arithmetic, without torch
- sizes follow from the depth as in nanochat's scripts/base_train.py; FLOPs of matmuls are torch's own count to the last one,
  launches are those of the reference GPT's eager step to the last one, activations what autograd saves: tests hold each so
- LoRA is counted in its two-path form, W x + s · B A x, an upper bound: from the rows on where `omni_adapters.lora` merges, W +
  s · B A, that keeps less of each slot and no cast of W, and has no more FLOPs. One W + s · B A at a time is not counted

Letters: C = n_embd, H = heads, L = layers, V = vocabulary rows, r = LoRA's rank, a = bytes of an activation. A slot is a soft
or a text token.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

Engine = Literal["ddp", "fsdp2"]
Stage = Literal["1", "2", "full"]

VALUE_GATE, SMEAR_GATE = 12, 24  # channels that nanochat's gates read
VOCAB_MULTIPLE = 64              # nanochat pads its vocabulary to a multiple of this many rows
ROOM = 0.9                       # of a GPU's memory; the rest is for CUDA, NCCL and gaps


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


def kept_per_slot(gpt: Sizes, rank: int, a: int, norm: int, *, full: bool = False) -> int:
    """Bytes that autograd keeps of one slot (a soft or a text token) from the GPT's forward to its backward.

    A frozen matmul needs only its weight to pass a gradient on, so its input is not kept. What is kept in each layer:

        inputs of norms       2 C residual, 2 C rotated q and k       and their fp32 scales, 2 + 2 H
        attention             q, k, v, output: 4 C                    and its fp32 log-sum-exp, H
        relu² MLP             relu's output: 4 C
        value embeddings      C + H, in every other layer
        LoRA on a matmul      its input: C before attention, C before the MLP, 4 C inside it (attention's output is kept
                              already), and r for each of the 6 low-rank products

    and once: the normed embedding's input C, smear C + 2, the final norm's input C and, for the gather, its output C.

    `full` (the whole GPT trains) keeps what a weight's gradient needs as well: the residual, the inputs of attention and MLP,
    C each, 4 C inside the MLP, and the value gates' H.

    a: bytes of an activation; norm: bytes a norm keeps of each input element (a in CUDA's fused kernel, 4 on the CPU).
    """
    C, H, L = gpt.n_embd, gpt.n_head, gpt.n_layer
    layer = 4 * C * norm + 4 * (2 + 2 * H) + (4 * C + 4 * C) * a + 4 * H
    lora = (6 * C + 6 * rank) * a if rank else 0
    layer += 7 * C * a if full else 0
    once = 2 * C * norm + 4 * 2 + (2 * C + 2) * a
    return L * (layer + lora) + gpt.num_value_tables * (C + H + H * full) * a + once


def frozen_bytes(gpt: Sizes, a: int) -> float:
    return 4.0 * (gpt.matmuls + gpt.scalars) + a * gpt.tables


def memory(gpt: Sizes, own: Adapter, batch: Batch, *, engine: Engine = "ddp", num_gpus: int = 1, a: int = 2,
           norm: int | None = None, d_model: int = 512, encoder: int = 0, full: bool = False) -> dict[str, float]:
    """Bytes on one GPU when backward begins, by term: the fullest moment where 16 V a text position, which is gone when the
    first block's backward is at work, is more than that block's 13 C a in each slot.

        frozen       4 · (matmuls + scalars) + a · tables: nanochat keeps matrices in fp32, tables in its compute dtype
        casts        a for each matmul weight and LoRA's: made in forward and kept for backward (none where a = 4)
        trained      16 for each trained parameter: fp32 master 4, gradient 4, AdamW 8; DDP's buckets are 4 more
        activations  kept_per_slot · slots + the projector's, in fp32: 4 (stack · d_model + 2 hidden) for each soft token
        logits       16 V for each text position: tanh, log-probabilities, and a gradient of each, all fp32
        encoder      4 for each weight, with shards too: the recipe opens it to validate and to check what made them
        gathered     FSDP2: what stands unsharded at a time beside the shards

    With `full` nothing of the GPT is frozen: its weights, gradients and AdamW's moments, 8 bytes, stand under trained.

    FSDP2 divides frozen and trained by `num_gpus`. It cannot divide the rest: rows are each GPU's own, casts are kept by
    autograd like activations, and wte, value tables and lm_head stay whole while the GPT runs, for they belong to its root.
    """
    norm = a if norm is None else norm
    weights = frozen_bytes(gpt, a)
    ddp = num_gpus > 1 and engine == "ddp"
    gpt_trained = weights + (16.0 if ddp else 12.0) * gpt.total if full else 0.0
    shards = num_gpus if engine == "fsdp2" else 1
    whole = num_gpus > 1 and engine == "fsdp2"
    root = 4.0 * (gpt.lm_head + SMEAR_GATE + gpt.scalars) + a * gpt.tables
    block = 4.0 * (gpt.matrices + own.lora) / gpt.n_layer
    return {
        "frozen": 0.0 if full else weights / shards,
        "casts": float(a * (gpt.matmuls + own.lora)) if a != 4 else 0.0,
        "trained": ((20.0 if ddp else 16.0) * own.total + gpt_trained) / shards,
        "activations": float(kept_per_slot(gpt, own.rank, a, norm, full=full) * batch.slots
                             + 4 * (batch.stack * d_model + 2 * own.hidden) * batch.rows * batch.soft),
        "logits": 16.0 * gpt.vocab_rows * batch.rows * batch.text,
        "encoder": 4.0 * encoder,
        "gathered": root + 2 * block + 8.0 * (own.fc1 + own.fc2) if whole else 0.0,  # one block works, the next arrives
    }


def backward_bytes(gpt: Sizes, batch: Batch, *, a: int = 2) -> float:
    """What backward adds to `memory` where sound outweighs text: the last block works, 13 C a in each slot, when the logits'
    16 V a text position are gone. The larger of the two is the peak's."""
    return max(0.0, 13.0 * gpt.n_embd * a * batch.slots - 16.0 * gpt.vocab_rows * batch.rows * batch.text)


def step_bytes(gpt: Sizes, own: Adapter, batch: Batch, *, a: int = 2, norm: int | None = None, d_model: int = 512,
               full: bool = False) -> float:
    """Bytes that forward and backward hold at most beyond weights and AdamW's moments, gradients included: an allocator's
    peak over that of the step before it. Where the whole GPT trains, its gradients may outgrow what they replace."""
    terms = memory(gpt, own, batch, a=a, norm=norm, d_model=d_model, full=full)
    peak = terms["casts"] + terms["activations"] + terms["logits"] + backward_bytes(gpt, batch, a=a)
    return max(peak, 4.0 * (own.total + gpt.total)) if full else peak


def rows_that_fit(gpt: Sizes, own: Adapter, batch: Batch, *, gpu_bytes: float = 80e9, **options: Any) -> int:
    """Largest micro-batch, in rows, whose `memory` stays within ROOM of a GPU (80 GB: an H100)."""
    def total(rows: int) -> float:
        return sum(memory(gpt, own, batch._replace(rows=rows), **options).values())

    return max(0, int((ROOM * gpu_bytes - total(0)) // (total(1) - total(0))))


# ---- FLOPs and traffic ---------------------------------------------------------------------------------------------------


def attended(T: int, window: int) -> int:
    """Σ over T causal queries of the keys that each sees: itself and `window` before it."""
    full = min(T, window + 1)
    return full * (full + 1) // 2 + (T - full) * full


def flops(gpt: Sizes, own: Adapter, batch: Batch, *, encoder: int = 0, frames: int = 0,
          sequence_len: int = 2048, full: bool = False) -> dict[str, float]:
    """Multiplications and additions of one step on one micro-batch, by part.

        matmuls     frozen: 2 forward, 2 backward for each weight and slot; no weight gradients. lm_head: text positions only.
                    `full`: 2 more for the weight's gradient
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
        "matmuls": (6.0 if full else 4.0) * ((gpt.matrices + value_gates) * batch.slots + SMEAR_GATE * (batch.slots - batch.rows)
                                            + gpt.lm_head * batch.rows * batch.text),
        "attention": 12.0 * gpt.n_embd * keys * batch.rows,
        "lora": 6.0 * own.lora * batch.slots,
        "projector": (4.0 * own.fc1 + 6.0 * own.fc2) * batch.rows * batch.soft,
        "encoder": 2.0 * encoder * frames,
    }


def traffic(gpt: Sizes, own: Adapter, engine: Engine, num_gpus: int, *, a: int = 2, full: bool = False) -> float:
    """Bytes that each GPU sends in one step of one micro-batch.

    DDP: a ring all-reduce of the trained gradients, 2 (N − 1)/N · 4 bytes each. FSDP2: all-gathers of every weight, frozen
    and trained, for forward and for backward, and a reduce-scatter of the trained gradients; with m micro-batches a GPU
    the gathers come m times, DDP's all-reduce once.
    """
    share = (num_gpus - 1) / num_gpus
    trained = own.total + (gpt.total if full else 0)
    if engine == "ddp":
        return share * 2 * 4.0 * trained
    return share * (2 * (frozen_bytes(gpt, a) + 4.0 * own.total) + 4.0 * trained)


# ---- passes and launches -------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """Element-wise work: elements read and written in each slot, in units of C, and launches."""

    forward: float
    backward: float
    launches: int           # of forward
    launches_backward: int


# One aten call is one launch, and reads and writes its tensors whole, as eager mode does.
LAYER = {
    "mix": Pass(7, 7, 3, 3),                # λx, λ₀x₀ and their sum; backward two products, and the sum of x₀'s gradients
    "rotary": Pass(18, 20, 14, 16),         # of q and of k, on halves: four products, sum, difference, cat
    "scale": Pass(4, 4, 2, 2),              # 1.2 q, 1.2 k
    "residual": Pass(6, 12, 2, 4),          # two sums; backward two, and two that join the gradients of q, k and v
    "relu²": Pass(16, 40, 2, 4),            # 4 C wide; backward x¹, 2x¹, its product with the gradient, threshold
}
VALUES = Pass(9, 8, 7, 6)                   # in every other layer: look-up, silence at soft slots, gate, sum
ONCE = Pass(33, 44, 80, 29)                 # embedding, splice, smear, backout, gather, loss
FUSED_NORM = Pass(2, 3, 1, 1)               # RMSNorm on CUDA, and as the CPU composes it
COMPOSED_NORM = Pass(5, 17, 5, 11)
NORMS_A_LAYER, NORMS_ONCE = 4, 2            # the residual's two, q's, k's; the embedding's and the last
LORA = Pass(45, 45, 12, 12)                 # six layers: scale and add outputs, 9 C; backward scale outputs, add inputs, 9 C
LORA_MATMULS = Pass(18, 36, 12, 24)         # x → r → y; backward both weights' and both inputs' gradients
FULL, FULL_VALUES = Pass(0, 8, 0, 8), Pass(0, 6, 0, 4)  # gradients of a layer's two scalars; of a value table and its gate
FULL_ONCE = Pass(0, 6, 1, 5)
MATMULS = Pass(18, 18, 6, 6)                # q, k, v, c_proj: C → C; c_fc: C → 4C; c_proj: 4C → C
LOSS_BYTES = 56                             # of an fp32 logit: divide 8, multiply 8; backward of the two, of tanh, of the
                                            # crop and of the choice of targets 8 + 8 + 12 + 8 + 4
FUNCTIONS, FUNCTION_BYTES = 3, 28           # of a logit: tanh, exp in log-softmax and in its backward; 8 + 8 + 12 bytes
LOGIT_CASTS = 12                            # of a logit in bf16: to fp32, and its gradient back
ADAMW_BYTES = 92                            # of a parameter: AdamW's nine passes 80, clipping 12
ADAMW_LAUNCHES = 12                         # of a parameter tensor; of all together where foreach joins them
ENCODER_BYTES, ENCODER_LAUNCHES = 34, 20    # of a layer of Whisper's encoder: activations of a frame, in units of d_model


class Part(NamedTuple):
    """Kernels of one kind in one step. `unit` says whose peak its FLOPs meet (those of "function" are values of tanh and exp);
    `tensor` is the size of what one pass reads, in bytes: a cache serves small ones."""

    flops: float
    bytes: float
    launches: int
    unit: Literal["matmul", "fp32", "attention", "function"] = "matmul"
    tensor: float = math.inf


class Encoder(NamedTuple):
    """A Whisper's encoder: width, layers, mel bands, features a second. Without layers: a log-mel, which has no weights."""

    d_model: int
    n_layer: int
    n_mels: int = 80
    frame_rate: float = 50.0

    @property
    def total(self) -> int:
        return whisper_encoder(self.d_model, self.n_layer, self.n_mels) if self.n_layer else 0


# Whispers by their config.json
ENCODERS = {"log_mel": Encoder(80, 0, frame_rate=100.0), "whisper-tiny": Encoder(384, 4), "whisper-base": Encoder(512, 6),
            "whisper-small": Encoder(768, 12), "whisper-medium": Encoder(1024, 24), "whisper-large-v3": Encoder(1280, 32, 128)}


def step_parts(gpt: Sizes, own: Adapter, batch: Batch, *, a: int = 2, fused_norm: bool = True, full: bool = False,
               encoder: Encoder | None = None, foreach: bool = True, sequence_len: int = 2048) -> dict[str, Part]:
    """A step of one micro-batch on one machine in eager mode: forward, backward, AdamW. `encoder`: None where features come
    from shards."""
    C, L, H, text = gpt.n_embd, gpt.n_layer, gpt.num_value_tables, batch.rows * batch.text
    width = float(a * C * batch.slots)  # one pass over one activation, in bytes
    frames = batch.rows * batch.soft * batch.stack
    work = flops(gpt, own, batch, sequence_len=sequence_len, full=full)
    head = (6.0 if full else 4.0) * gpt.lm_head * text
    gradients = 3 if full else 2  # passes of a matmul: forward, gradient of its input, of its weight
    parts = {
        "blocks": Part(work["matmuls"] - head, gradients * (a * (gpt.matrices + gpt.gates) + L * MATMULS.forward * width),
                       gradients * (MATMULS.launches * L + H + 1), tensor=width),
        "attention": Part(work["attention"], 12 * L * width, 2 * L, "attention", width),
        "lm_head": Part(head, gradients * a * (gpt.lm_head + (C + gpt.vocab_rows) * text), gradients),
        "passes": passes(gpt, width, fused_norm, full, a),
        "loss": Part(0, float(LOSS_BYTES + (LOGIT_CASTS if a != 4 else 0)) * gpt.vocab_rows * text, 0,
                     tensor=4.0 * gpt.vocab_rows * text),
        "tanh, exp": Part(float(FUNCTIONS) * gpt.vocab_rows * text, float(FUNCTION_BYTES) * gpt.vocab_rows * text, 0, "function",
                          4.0 * gpt.vocab_rows * text),
        "projector": Part(work["projector"], 12.0 * (own.fc1 + own.fc2) + 20.0 * own.hidden * batch.rows * batch.soft, 7, "fp32"),
        "optimizer": optimizer(gpt, own, full, foreach),
    }
    if a != 4:
        parts["casts"] = Part(0, (4.0 + a) * (gpt.matmuls + own.lora), 8 * L + H + 4 + (12 * L if own.rank else 0))
    if own.rank:
        parts["LoRA matmuls"] = Part(work["lora"], L * both(LORA_MATMULS) * width, L * launched(LORA_MATMULS), tensor=width)
        parts["LoRA passes"] = Part(0, L * both(LORA) * width, L * launched(LORA), tensor=width)
    if encoder is not None:
        parts["encoder"] = encoding(encoder, frames, batch.soft * batch.stack)
    return parts


def both(kind: Pass) -> float:
    return kind.forward + kind.backward


def launched(kind: Pass) -> int:
    return kind.launches + kind.launches_backward


def passes(gpt: Sizes, width: float, fused_norm: bool, full: bool, a: int) -> Part:
    """Everything element-wise between the embedding and lm_head, `width` bytes a pass over an activation."""
    norm, L, H = FUSED_NORM if fused_norm else COMPOSED_NORM, gpt.n_layer, gpt.num_value_tables
    counts = [(L, kind) for kind in LAYER.values()] + [(H, VALUES), (1, ONCE), (NORMS_A_LAYER * L + NORMS_ONCE, norm)]
    counts += [(L, FULL), (H, FULL_VALUES), (1, FULL_ONCE)] if full else []
    tables = float(a) * gpt.tables if full else 0.0  # their gradients are dense: zeros first
    return Part(0, sum(n * both(kind) for n, kind in counts) * width + tables, sum(n * launched(kind) for n, kind in counts),
                tensor=width)


def optimizer(gpt: Sizes, own: Adapter, full: bool, foreach: bool) -> Part:
    """Clipping and AdamW. No cache holds what it reads: a step has gone by since; where tables train, they are most of it."""
    trained = own.total + (gpt.total if full else 0)
    tensors = 2 + (12 * gpt.n_layer if own.rank else 0) + (6 * gpt.n_layer + 2 * gpt.num_value_tables + 7 if full else 0)
    return Part(0, float(ADAMW_BYTES) * trained, ADAMW_LAUNCHES * (1 if foreach else tensors),
                tensor=4.0 * gpt.lm_head if full else 20.0 * trained)


def encoding(encoder: Encoder, frames: int, frames_a_row: int) -> Part:
    """Forward only, fp32: 2 FLOPs for each weight and frame, 4 d_model for each frame that a frame attends to."""
    d, layers = encoder.d_model, encoder.n_layer
    return Part(2.0 * encoder.total * frames + 4.0 * d * frames_a_row * frames * layers,
                4.0 * (encoder.total + ENCODER_BYTES * d * layers * frames), ENCODER_LAUNCHES * layers, "fp32")
