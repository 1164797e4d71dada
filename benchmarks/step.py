"""One training step, forward and backward: the library against the forward patched by hand; eager, compiled, as CUDA graphs.

Steps of several depths, stages and lengths go through `OmniGPT` with a Projector on 80 log-mel channels, stacked by 8: stage 1
trains the projector, stage 2 LoRA beside it, "all trained" the GPT as well; fp32 on CPU, on CUDA bf16 with fp32 masters, as
nanochat has it. Errors are those of loss and gradients against the hand-patched forward of a twin in fp64; a variant may err
three times as much as the hand-patched one in its own dtype. Steps "no head" stop at what lm_head reads: what they save is the
share of head and loss.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.budget import saving, sizes
from benchmarks.group import Device, Group, Suite, Variant, worst
from benchmarks.measure import HEADLESS, sentence
from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.lora import inject_lora
from omni_adapters.reference_gpt import GPT, GPTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hand_patched import hand_patched_logits, hand_patched_loss  # baselines live with the tests

Run = Callable[[], tuple[Tensor, ...]]  # a step: the loss and the gradients of all that trains

STAGES = ("1", "2", "full")
STACK = 8
COMPILE_S = 45.0  # of one case's variants on CUDA: the last may begin until then
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROWS = {"cpu": 1, "cuda": 8}
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # of a bound: fp32 sums of 384 to 32768 terms; two roundings of bf16
NAMES = ("hand-patched", "prepender", "prepender, fused loss", "hand-patched, compiled", "prepender, compiled",
         "CUDA graph, eager kernels", "CUDA graph, compiled")
EAGER, COMPILED, GRAPHS = NAMES[:3], NAMES[3:5], NAMES[5:]
COMPILING = (GRAPHS[0], COMPILED[1], GRAPHS[1], COMPILED[0])  # in this order: the cheapest first, what is not ours last
WATCHED = {"projector.fc1.weight", "projector.fc2.weight", *(f"prepender.gpt.{name}.weight" for name in (
    "lm_head", "transformer.h.0.attn.c_q", "transformer.h.0.mlp.c_fc"))}  # gradients that are compared where all are trained


# ---- cases ---------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    depth: int
    stage: str
    T_soft: int
    T: int
    device: Device

    def __str__(self) -> str:
        rows = ROWS[self.device]
        return (f"d{self.depth}, stage {self.stage}, {self.T_soft} soft + {self.T} text tokens, {rows} row{'s' * (rows > 1)}, "
                f"{'fp32' if DTYPE[self.device] is torch.float32 else 'bf16'}").replace("stage full", "all trained")


def cases(suite: Suite, device: Device) -> list[Case]:
    """On CUDA in the order of their importance, for a run that may be cut short: first those that are compiled. On a CPU from
    short to long: what a long one leaves in the allocator would spare a shorter one the page faults of a run of its own."""
    if suite == "quick":
        return [Case(6, stage, T_soft, 32, device) for T_soft in (375, 94) for stage in ("1", "2")]
    lengths = [(T_soft, T) for T in (32, 256) for T_soft in ((188, 1500, 375, 94) if device == "cuda" else (94, 188, 375, 1500))]
    depths = (12, 6, 20) if device == "cuda" else (6,)
    every = [Case(depth, stage, *length, device) for length in lengths for stage in STAGES for depth in depths]
    if device == "cpu":  # seconds a step; at other lengths and stages, hours in all
        every += [Case(depth, stage, 188, 32, device) for depth, stage in ((12, "1"), (12, "2"), (20, "1"))]
    return sorted(every, key=lambda case: case not in to_compile(suite, device))


def to_compile(suite: Suite, device: Device) -> list[Case]:
    """Compiling takes a minute a case on a CPU, and on CUDA up to a minute for each of four variants."""
    if suite == "quick":
        return []
    wanted = [(12, 188), (6, 188), (12, 1500), (20, 188)] if device == "cuda" else [(6, 188)]
    return [Case(depth, "1", T_soft, 32, device) for depth, T_soft in wanted]


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    for case in cases(suite, device):
        yield from groups_of(case, compiling=case in to_compile(suite, device))
    if suite == "full" and device == "cpu":
        for depth in (12, 20):
            yield Group("step", f"d{depth}, other stages and lengths", "hand-patched",
                        [Variant(name, why="hours on a CPU") for name in NAMES])


def groups_of(case: Case, *, compiling: bool) -> Iterator[Group]:
    """Eager steps, and where they are compiled as well a second group, so that eager rows need not wait for compilers."""
    host = Host(case)
    expected = host.expected()
    checked: dict[str, float] = {}
    variants = [host.eager(name, expected, checked) for name in EAGER]
    bound = max(FLOOR[DTYPE[case.device]], 3 * checked.get("hand-patched", 0.0))
    ablations = [Variant(name + HEADLESS, host.step(host.headless(name))) for name in EAGER[:2]]
    absent = [] if compiling else [not_compiled(name, case.device) for name in (*COMPILED, *GRAPHS)]
    yield Group("step", str(case), "hand-patched", [*variants, *absent, *ablations], bound)
    if compiling:
        yield Group("step", f"{case}, compiled", "hand-patched", [variants[0], *compiled_variants(host, expected)], bound)


def not_compiled(name: str, device: Device) -> Variant:
    return Variant(name, why="no CUDA graphs on a CPU" if device == "cpu" and name in GRAPHS else
                   "compiling takes minutes: done for a few cases of --suite full")


def compiled_variants(host: Host, expected: list[Tensor]) -> Iterator[Variant]:
    """On CUDA none is begun when COMPILE_S are spent: a run that is cut short has other benches behind this one."""
    start, device = time.perf_counter(), host.case.device
    for name in COMPILING:
        spent = time.perf_counter() - start
        if device == "cpu" and name in GRAPHS:
            yield not_compiled(name, device)
        elif device == "cuda" and spent > COMPILE_S:
            yield Variant(name, why=f"those before it took {spent:.0f} s to compile")
        else:
            yield host.compiled(name, expected)


class HostView:
    """A GPT with some of its parts exchanged, as `hand_patched_logits` reads it: by attribute."""

    def __init__(self, gpt: GPT, **parts: Any) -> None:
        self.gpt, self.parts = gpt, parts

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["parts"]
        return parts[name] if name in parts else getattr(self.__dict__["gpt"], name)


def view_of(gpt: GPT, dtype: torch.dtype, **parts: Any) -> GPT:
    """The GPT for `hand_patched_logits`, which leaves casts to the dtype of the activations to its caller."""
    return cast(GPT, HostView(gpt, cos=gpt.cos.to(dtype), sin=gpt.sin.to(dtype), backout_lambda=gpt.backout_lambda.to(dtype),
                              **parts))


class Host:
    """A GPT with a projector, and LoRA in stage 2; a batch; and the ways to run a step on them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.dtype, B = case, DTYPE[case.device], ROWS[case.device]
        self.gpt = build_gpt(case.depth, case.device)
        self.gpt.wte().to(self.dtype)
        self.gpt.value_embeds.to(self.dtype)
        self.projector = Projector(80, self.gpt.config.n_embd, stack=STACK, zero_init=False).to(case.device)
        self.omni = OmniGPT(self.gpt, (LogMelEncoder(), self.projector), value_embeds="placeholder").train()  # as by hand
        if case.stage == "2":
            self.omni.add_lora()
            for layer in self.omni.lora():
                nn.init.normal_(layer.lora_b, std=0.02)
        if case.stage == "full":
            self.gpt.requires_grad_(True)
        self.trained = {name: p for name, p in self.omni.named_parameters() if p.requires_grad}
        self.watched = [place for place, name in enumerate(self.trained) if case.stage != "full" or name in WATCHED]
        self.idx = torch.randint(self.gpt.config.vocab_size, (B, case.T), device=case.device)
        self.targets = self.idx.roll(-1, dims=1)
        frames = torch.randn(B, case.T_soft * STACK, 80, device=case.device, dtype=self.dtype)
        self.features = Features(frames, torch.full((B,), case.T_soft * STACK, device=case.device))

    # ---- losses: of all rows, or to the hidden states only

    def by_hand(self, idx: Tensor, targets: Tensor, frames: Tensor) -> Tensor:
        return hand_patched_loss(view_of(self.gpt, self.dtype), idx, targets, self.projector(frames))

    def loss_by(self, name: str, module: Callable[..., Tensor] | None = None) -> Callable[[], Tensor]:
        if name.startswith("hand-patched"):
            by_hand = self.by_hand if module is None else module
            return lambda: by_hand(self.idx, self.targets, self.features.values)
        omni: Callable[..., Tensor] = self.omni if module is None else module

        def by_hooks() -> Tensor:
            self.omni.prepender.loss = "fused" if name.endswith("fused loss") else "host"
            return omni(self.idx, self.targets, audio_features=self.features)
        return by_hooks

    def headless(self, name: str) -> Callable[[], Tensor]:
        """A step's loss without vocabulary: the mean square of what lm_head would have read."""
        def by_hand() -> Tensor:
            view = view_of(self.gpt, self.dtype, lm_head=nn.Identity())
            return hand_patched_logits(view, self.idx, self.projector(self.features.values)).square().mean()

        def prepender() -> Tensor:
            soft = self.omni.project(self.features, self.idx.size(0))
            return self.omni.prepender.hidden_states(self.idx, soft).float().square().mean()

        return by_hand if name == "hand-patched" else prepender

    # ---- steps

    def step(self, loss_of: Callable[[], Tensor]) -> Run:
        """`torch.autograd.grad`, not `backward`: what a step leaves behind cannot disturb the next variant's."""
        trained = list(self.trained.values())

        def run() -> tuple[Tensor, ...]:
            loss = loss_of()
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            return loss.detach(), *(p.new_zeros(()) if g is None else g for p, g in zip(trained, gradients))
        return run

    def eager(self, name: str, expected: list[Tensor], checked: dict[str, float]) -> Variant:
        loss_of = self.loss_by(name)
        run = self.step(loss_of)
        try:
            with FlopCounterMode(display=False) as counter:
                checked[name] = self.error(run(), expected)
            kept = saved_bytes(loss_of, self.omni)
        except Exception as error:
            return raising(name, error)
        flops = None if name.endswith("fused loss") else float(counter.get_total_flops())  # nobody counts inside that operator
        return Variant(name, run, error=checked[name], flops=flops, bytes=self.least_bytes(kept), saved_bytes=kept)

    def compiled(self, name: str, expected: list[Tensor]) -> Variant:
        """Compiled once here, for its error; how long that took is the variant's note."""
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if name == "CUDA graph, eager kernels":
            options["backend"] = "aot_eager"  # traced, so that nothing waits for the device, but no kernel is fused
        elif name == "CUDA graph, compiled":
            options["mode"] = "reduce-overhead"
        by_hand = name.startswith("hand-patched")
        run = self.step(self.loss_by(name, torch.compile(self.by_hand if by_hand else self.omni, **options)))
        try:
            start = time.perf_counter()
            if name == "CUDA graph, eager kernels":
                run = captured(run)
            elif name == "CUDA graph, compiled":
                run = marked(run)
            error = self.error(run(), expected)
            return Variant(name, run, f"compiled in {time.perf_counter() - start:.0f} s", error)
        except Exception as error_:
            return raising(name, error_)

    # ---- what is counted and compared

    def least_bytes(self, kept: int) -> float:
        """Matmul weights are read in forward and in backward, what backward needs is written and read, gradients are written."""
        matmuls = sum(m.weight.nbytes for m in self.omni.modules() if isinstance(m, nn.Linear))
        return 2.0 * matmuls + 2.0 * kept + sum(p.nbytes for p in self.trained.values())

    def expected(self) -> list[Tensor]:
        """Loss and watched gradients by the hand-patched forward in fp64, row by row: all rows have equally many targets."""
        gpt = build_gpt(self.case.depth, self.case.device)
        if self.case.stage == "2":
            inject_lora(gpt)
        gpt.load_state_dict(self.gpt.state_dict())
        gpt, projector = gpt.requires_grad_(False).double(), copy.deepcopy(self.projector).requires_grad_(False).double()
        twins = {f"prepender.gpt.{name}": p for name, p in gpt.named_parameters()}
        twins |= {f"projector.{name}": p for name, p in projector.named_parameters()}
        watched = [twins[name].requires_grad_(True) for place, name in enumerate(self.trained) if place in self.watched]
        total = [torch.zeros((), dtype=torch.float64, device=self.idx.device), *(torch.zeros_like(p) for p in watched)]
        for row in range(self.idx.size(0)):
            at = slice(row, row + 1)
            soft = projector(self.features.values[at].double())
            loss = hand_patched_loss(gpt, self.idx[at], self.targets[at], soft)
            for sum_, part in zip(total, (loss.detach(), *torch.autograd.grad(loss, watched))):
                sum_ += part / self.idx.size(0)
        return total

    def error(self, came: tuple[Tensor, ...], expected: list[Tensor]) -> float:
        """Of the loss relative to it, of a gradient relative to its largest element: the largest of these."""
        mine = [came[0], *(came[1 + place] for place in self.watched)]
        return worst(float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(mine, expected))


def build_gpt(depth: int, device: Device) -> GPT:
    """nanochat's size at this depth, every matrix random: as built, its zero output projections let no sound through."""
    shape = sizes(depth)
    with torch.device(device):
        gpt = GPT(GPTConfig(sequence_len=2048, vocab_size=shape.vocab_rows, n_layer=depth, n_head=shape.n_head,
                            n_kv_head=shape.n_head, n_embd=shape.n_embd))
        for layer in gpt.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
    return gpt


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of all storages that autograd holds when `forward` is over, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with saving() as alive:
        result = forward()  # alive until all is counted
        storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    assert result.requires_grad
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


def raising(name: str, error: Exception) -> Variant:
    """A variant that could not even be built: the suite runs it, and has a row that says so."""
    said = sentence(error)

    def step() -> None:
        raise RuntimeError(said)
    return Variant(name, step)


def captured(run: Run) -> Run:
    """A step whose inputs stay where they are, recorded as one CUDA graph: its outputs are overwritten by each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is allocated, chosen or loaded once must not fall into the recording
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs
    return replay


def marked(run: Run) -> Run:
    """torch's own CUDA graphs must know where a step begins, since what one step returned may be overwritten by the next."""
    def step() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return run()
    return step
