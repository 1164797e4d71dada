"""What a training step costs: the time, memory and price that a machine makes of its counts, before anything runs.

    step = Σ over parts of max(FLOPs / (peak · utilisation), bytes / (bandwidth · utilisation)), and launches, and traffic

Notable:
- plain arithmetic over `step_counts`, without torch: a laptop prices 1,000 GPUs in milliseconds
- assumptions carry names and stand together: `Utilisation`, a machine's launch time and network, the price of an hour
- everything it returns is computed; benchmarks/cost.py holds it against measured steps
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from omni_adapters.shapes import BadInput, listing
from omni_adapters.step_counts import (
    ENCODERS,
    ROOM,
    Adapter,
    Batch,
    Encoder,
    Engine,
    Part,
    Sizes,
    Stage,
    adapter,
    backward_bytes,
    memory,
    sizes,
    step_parts,
    traffic,
)

MOST_LAYERS, MOST = 1000, 10**6   # of a GPT, and of anything else that `cost` counts


# ---- machines ------------------------------------------------------------------------------------------------------------


class Utilisation(NamedTuple):
    """Shares of a peak that are reached, assumed, not measured: in large matmuls, in attention (short rows, causal blocks),
    in passes over memory."""

    matmul: float = 0.6
    attention: float = 0.3
    copy: float = 0.8


class Machine(NamedTuple):
    """One GPU, or a CPU. Peaks are dense and come from data sheets; what a data sheet does not say is assumed."""

    matmul: float                     # FLOP/s in the GPT's dtype: bf16 on CUDA, fp32 on a CPU
    fp32: float                       # FLOP/s of fp32 masters: TF32 on CUDA
    bandwidth: float                  # bytes/s of memory, read and written together
    memory: float                     # bytes
    link: float                       # bytes/s that one sends inside a node
    network: float                    # bytes/s that one sends to another node; assumed
    gpus_per_node: int = 8
    functions: float = 2.4e12         # values of tanh or exp a second: 16 a clock and multiprocessor, of an A100; assumed
    launch: float = 5e-6              # s that the host needs for one call, with autograd's share; assumed
    utilisation: Utilisation = Utilisation()
    cached: tuple[tuple[float, float], ...] = ()  # (size of a tensor, bytes/s), rising sizes: what a CPU's caches serve
    is_cpu: bool = False

    @property
    def activation(self) -> int:
        """Bytes of an activation."""
        return 4 if self.is_cpu else 2


MACHINES = {
    # NVIDIA H200 and H100 Tensor Core GPU data sheets, SXM: NVLink 900 GB/s both ways; 400 Gbit/s a GPU between nodes
    "h200": Machine(989e12, 495e12, 4.8e12, 141e9, 450e9, 50e9),
    "h100": Machine(989e12, 495e12, 3.35e12, 80e9, 450e9, 50e9),
    # NVIDIA A100 80GB data sheet, SXM: NVLink 600 GB/s both ways; 200 Gbit/s a GPU between nodes
    "a100": Machine(312e12, 156e12, 2.039e12, 80e9, 300e9, 25e9),
    # NVIDIA L40S data sheet: PCIe Gen4 x16, 64 GB/s both ways; 25 Gbit/s a GPU between nodes
    "l40s": Machine(362.05e12, 183e12, 864e9, 48e9, 32e9, 3.1e9),
    # NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090, fp32 accumulation: PCIe Gen4 x16
    "rtx4090": Machine(165.2e12, 82.6e12, 1.008e12, 24e9, 32e9, 3.1e9),
    # No data sheet: two cores of a server, assumed in all; `python -m benchmarks.cost` measures this machine's own
    "cpu": Machine(160e9, 160e9, 12e9, 16e9, 1.25e9, 1.25e9, 1, functions=1.2e9, utilisation=Utilisation(0.9, 0.3, 1.0),
                   is_cpu=True),
}
LATENCY = 10e-6  # s of a collective for each doubling of the GPUs it joins; assumed
BUCKET = 25e6    # bytes that DDP reduces at a time, torch's default


def bandwidth(machine: Machine, tensor: float) -> float:
    """bytes/s of passes over tensors of this size: memory's, or where sizes were measured, between the nearest two of them."""
    points = machine.cached
    if not points:
        return machine.bandwidth
    if tensor <= points[0][0]:
        return points[0][1]
    for (small, fast), (large, slow) in zip(points, points[1:]):
        if tensor <= large:
            share = math.log(tensor / small) / math.log(large / small)
            return fast ** (1 - share) * slow**share
    return points[-1][1]


def device_seconds(machine: Machine, part: Part) -> float:
    """max of arithmetic and memory, each at its share of the peak."""
    used = machine.utilisation
    peak = {"matmul": machine.matmul * used.matmul, "fp32": machine.fp32 * used.matmul,
            "attention": machine.matmul * used.attention, "function": machine.functions}[part.unit]
    arithmetic = part.flops / peak
    return max(arithmetic, part.bytes / (bandwidth(machine, part.tensor) * used.copy))


def traffic_seconds(machine: Machine, gpt: Sizes, own: Adapter, engine: Engine, num_gpus: int, full: bool) -> float:
    """A ring at wire speed, and LATENCY. Whoever crosses nodes goes at the network's speed."""
    if num_gpus == 1:
        return 0.0
    link = machine.link if num_gpus <= machine.gpus_per_node else machine.network
    sent = traffic(gpt, own, engine, num_gpus, a=machine.activation, full=full)
    buckets = math.ceil(4 * (own.total + (gpt.total if full else 0)) / BUCKET)
    collectives = buckets if engine == "ddp" else 3 * (gpt.n_layer + 2)
    return sent / link + collectives * math.ceil(math.log2(num_gpus)) * LATENCY


# ---- a prediction --------------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """One step on `num_gpus`, computed. Times in seconds, memory in bytes of one GPU, by term."""

    num_gpus: int
    parts: dict[str, float]    # the device's time
    launch_seconds: float      # the host's
    traffic_seconds: float
    step_seconds: float
    memory: dict[str, float]
    fits: bool
    tokens_per_second: float   # soft and text, of all GPUs
    audio_hours_per_hour: float
    price_per_1000_hours: float


def predict(machine: Machine, gpt: Sizes, own: Adapter, batch: Batch, *, num_gpus: int = 1, stage: Stage = "1",
            engine: Engine = "ddp", d_model: int = 512, encoder: Encoder | None = None, encoder_bytes: float = 0.0,
            frame_rate: float = 50.0, price: float = 3.0, overlap: bool = False) -> Prediction:
    """A step of one micro-batch on each GPU. A GPU works while its host launches, so the longer of the two counts; a CPU does
    one after the other. Traffic comes on top, or beside it with `overlap` (it cannot in stage 1 under DDP, where all gradients
    come last). frame_rate: features a second; price: of one GPU for an hour, 0 is free."""
    full, a = stage == "full", machine.activation
    parts = step_parts(gpt, own, batch, a=a, fused_norm=not machine.is_cpu, full=full, encoder=encoder,
                       foreach=not machine.is_cpu)
    times = {name: device_seconds(machine, part) for name, part in parts.items()}
    launching = machine.launch * sum(part.launches for part in parts.values())
    working = sum(times.values()) + launching if machine.is_cpu else max(sum(times.values()), launching)
    sending = traffic_seconds(machine, gpt, own, engine, num_gpus, full)
    step = max(working, sending) if overlap else working + sending
    terms = memory(gpt, own, batch, engine=engine, num_gpus=num_gpus, a=a, norm=4 if machine.is_cpu else a, d_model=d_model,
                   full=full)
    terms |= {"encoder": encoder_bytes, "backward": backward_bytes(gpt, batch, a=a)}
    audio = num_gpus * batch.rows * batch.soft * batch.stack / frame_rate / step  # seconds of audio in a second
    return Prediction(num_gpus, times, launching, sending, step, terms, sum(terms.values()) <= ROOM * machine.memory,
                      num_gpus * batch.slots / step, audio, 1000 * price * num_gpus / audio)


def cost(*, gpu: str = "h200", depth: int = 12, soft: int = 188, text: int = 256, batch: int = 16, stage: Stage = "1",
         gpus: Sequence[int] = (1, 8, 64, 1000), engine: Engine = "ddp", price: float = 3.0, rank: int = 16, stack: int = 8,
         frame_rate: float | None = None, vocab_size: int = 32768, encoder: str = "whisper-base", online: bool = False,
         overlap: bool = False) -> list[Prediction]:
    """What a step costs on each number of GPUs.

    soft, text: tokens of a row; batch: rows on each GPU; stage: "1" trains the projector, "2" LoRA of `rank` beside it, "full"
    everything; stack features of `frame_rate` Hz, None for the encoder's own, make a soft token; `online` runs the encoder in
    each step, otherwise its features come from shards; price: USD for a GPU and hour; overlap: traffic beside the work, refused
    in stage 1 under DDP, whose few gradients come last. Raises BadInput.
    """
    if not gpus:
        raise BadInput("options", "no number of GPUs", "at least one", "leave --gpus out for 1, 8, 64 and 1,000")
    check_known("--gpu", gpu, MACHINES)
    check_known("--encoder", encoder, ENCODERS)
    check_known("--stage", stage, ("1", "2", "full"))
    check_known("--engine", engine, ("ddp", "fsdp2"))
    for name, value in (("--depth", depth), ("--soft", soft), ("--text", text), ("--batch", batch), ("--rank", rank),
                        ("--stack", stack), ("--vocab", vocab_size), *(("--gpus", number) for number in gpus)):
        most = MOST_LAYERS if name == "--depth" else MOST
        if not 1 <= value <= most:
            raise BadInput("options", f"{name} {value}", f"an integer, 1 to {most:,}")
    ear = ENCODERS[encoder]
    rate = ear.frame_rate if frame_rate is None else frame_rate
    if not 0 < rate <= MOST:
        raise BadInput("options", f"--frame-rate {rate}", f"features a second, above 0, at most {MOST:,}")
    if not 0 <= price <= MOST:
        raise BadInput("options", f"--price {price}", f"USD for a GPU and hour, 0 to {MOST:,}")
    if overlap and stage == "1" and engine == "ddp" and max(gpus) > 1:
        raise BadInput("options", "--overlap in stage 1 under DDP", "a stage with gradients to send while backward runs",
                       "leave it out: the projector's gradients, all there are, come last")
    size, rows = sizes(depth, vocab_size=vocab_size), Batch(batch, soft, text, stack)
    if stage == "2" and rank > size.n_embd:
        raise BadInput("options", f"--rank {rank}", f"at most {size.n_embd}, the width of a GPT of depth {depth}")
    own = adapter(size, rank=rank if stage == "2" else 0, d_model=ear.d_model, stack=stack)
    return [predict(MACHINES[gpu], size, own, rows, num_gpus=number, stage=stage, engine=engine, d_model=ear.d_model,
                    encoder=ear if online else None, encoder_bytes=4.0 * ear.total, frame_rate=rate, price=price,
                    overlap=overlap) for number in gpus]


def check_known(option: str, came: str, known: Iterable[str]) -> None:
    if came not in known:
        raise BadInput("options", f"{option} {came}", f"one of [{listing(list(known), most=8)}]")


# ---- what is printed -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def as_json(predictions: Sequence[Prediction], gpu: str, price: float) -> dict[str, Any]:
    """The same for programs: seconds and bytes, with the machine and the assumptions."""
    return {"what": "a training step, computed, not measured", "gpu": gpu, "price_per_gpu_hour": price,
            "machine": MACHINES[gpu]._asdict() | {"utilisation": MACHINES[gpu].utilisation._asdict()},
            "computed": [p._asdict() for p in predictions]}


def describe(predictions: Sequence[Prediction], gpu: str, price: float, overlap: bool = False) -> str:
    """Tables of predictions for MACHINES[gpu], and what they assume."""
    machine, first = MACHINES[gpu], predictions[0]
    total = [[f"{p.num_gpus:,}", f"{1e3 * p.step_seconds:,.1f}", f"{1e3 * p.traffic_seconds:,.1f}",
              f"{sum(p.memory.values()) / 1e9:.2f}", "yes" if p.fits else "no", f"{p.tokens_per_second:,.0f}",
              f"{p.audio_hours_per_hour:,.0f}", f"{p.price_per_1000_hours:,.2f}"] for p in predictions]
    names = [name for name in first.memory if any(p.memory[name] for p in predictions)]
    held = [[f"{p.num_gpus:,}", *(f"{p.memory[name] / 1e9:.2f}" for name in names)] for p in predictions]
    launches = "added to it" if machine.is_cpu else "the longer of it and the work counts"
    used = machine.utilisation
    return "\n\n".join([
        "Computed, not measured.",
        table(["GPUs", "step (ms)", "of it traffic", "GB each", "fits", "tokens/s", "audio h/h", "USD per 1,000 h"], total),
        "Memory of each GPU, GB:\n\n" + table(["GPUs", *names], held),
        f"Time of one GPU's work, ms (launches in eager mode {1e3 * first.launch_seconds:.1f} ms, {launches}):\n\n"
        + table(list(first.parts), [[f"{1e3 * value:.2f}" for value in first.parts.values()]]),
        f"Assumed: {used.matmul:.0%} of {machine.matmul / 1e12:g} TFLOP/s in matmuls ({machine.fp32 / 1e12:g} in fp32 masters), "
        f"{used.attention:.0%} in attention, {used.copy:.0%} of {machine.bandwidth / 1e12:g} TB/s in passes, "
        f"{1e6 * machine.launch:g} µs a launch; {machine.link / 1e9:g} GB/s in a node of {machine.gpus_per_node}, "
        f"{machine.network / 1e9:g} between nodes, {'overlapped' if overlap else 'not overlapped'}; {price:.2f} USD for a GPU "
        f"and hour (--price). It fits up to {ROOM:.0%} of {machine.memory / 1e9:g} GB."])
