"""The model of cost (omni_adapters/cost.py, step_counts.py): what it counts is what an eager step of the reference GPT does, and
what it makes of the counts is the equation it states. FLOPs of frozen GPTs, parameters, traffic and kept bytes are
tests/test_budget.py's."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import cost as benchmark  # noqa: E402
from benchmarks.budget import Small, small_step  # noqa: E402
from benchmarks.measure import peak_bytes  # noqa: E402
from omni_adapters import cost as model  # noqa: E402
from omni_adapters import step_counts as counts  # noqa: E402
from omni_adapters.cost import MACHINES, Machine, cost  # noqa: E402
from omni_adapters.shapes import BadInput  # noqa: E402
from omni_adapters.step_counts import Batch, Part, Stage, flops, step_bytes, step_parts, traffic  # noqa: E402

BATCH = Batch(rows=2, soft=24, text=12, stack=4)
STAGES: tuple[Stage, ...] = ("1", "2", "full")
MATMULS = ("mm", "bmm", "addmm")
NO_KERNEL = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "promote_types"}


def small_case(small: Small, stage: Stage) -> tuple[Any, Any, dict[str, Part]]:
    """An OmniGPT of this stage, its forward, and the parts that the model sees in it."""
    rank, full = 16 if stage == "2" else 0, stage == "full"
    omni, forward = small_step(small, BATCH, rank)
    if full:
        omni.gpt.requires_grad_(True)
    parts = step_parts(small.sizes(), small.adapter(BATCH, rank), BATCH, a=4, fused_norm=False, full=full, foreach=False)
    return omni, forward, parts


class Kernels(TorchDispatchMode):
    """Calls that are not views, and the bytes that they read and write: a tensor broadcast by stride 0 counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.calls[name] += 1
            self.nbytes[name] += touched((args, kwargs)) + touched(out)
        return out


def touched(tree: Any) -> int:
    whole = {t.data_ptr(): t.nbytes for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and 0 not in t.stride()}
    return sum(whole.values())


def kernels(omni: Any, forward: Any) -> Kernels:
    forward().backward()  # what is made once
    for parameter in omni.parameters():
        parameter.grad = None
    with Kernels() as found:
        forward().backward()
    return found


# ---- what is counted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("depth", [1, 4, 5])
def test_launches_are_those_of_the_eager_step(stage: Stage, depth: int) -> None:
    omni, forward, parts = small_case(Small(depth=depth), stage)
    found = kernels(omni, forward)
    assert found.calls.total() == sum(part.launches for name, part in parts.items() if name != "optimizer")
    assert sum(found.calls[name] for name in MATMULS) == sum(
        parts[name].launches for name in ("blocks", "lm_head")) + 5 + (36 * depth if stage == "2" else 0)


def test_merged_lora_has_as_many_launches() -> None:
    small = Small(depth=1)
    merged, forward = small_step(small, BATCH, 16, form="merged")
    two_path, other = small_step(small, BATCH, 16)
    one, two = kernels(merged, forward).calls, kernels(two_path, other).calls
    assert one.total() == two.total() and one["addmm"] == 12 and not two["addmm"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("small", [Small(depth=4), Small(depth=6, aspect_ratio=64, head_dim=64, vocab_size=4096)], ids=str)
def test_bytes_are_those_that_the_eager_step_touches(stage: Stage, small: Small) -> None:
    """Within 2 %: counts of a vector's width, of masks and of indices are left out. Of an embedding's table the rows looked up
    count, not all, and of the log-probabilities the graded ones."""
    omni, forward, parts = small_case(small, stage)
    found, shape = kernels(omni, forward), small.sizes()
    attention = sum(n for name, n in found.nbytes.items() if "attention" in name)
    matmuls = sum(found.nbytes[name] for name in MATMULS)
    unread = found.calls["embedding"] * 4 * shape.vocab_rows * shape.n_embd + 4 * shape.vocab_rows * BATCH.rows * BATCH.text * 2
    passes = found.nbytes.total() - attention - matmuls - unread
    told = {name: part.bytes for name, part in parts.items()}
    assert told["passes"] + told["loss"] + told["tanh, exp"] + told.get("LoRA passes", 0) == pytest.approx(passes, rel=0.02)
    assert told["attention"] == pytest.approx(attention, rel=0.01)
    if stage != "2":  # rank 16 is not small beside these widths, and LoRA's r-wide tensors are left out
        assert told["blocks"] + told["lm_head"] + 12 * (96 * 4 * 80 + 96 * shape.n_embd) == pytest.approx(matmuls, rel=0.02)


@pytest.mark.parametrize("depth", [1, 4])
def test_flops_of_a_gpt_that_trains_are_torchs_count(depth: int) -> None:
    small = Small(depth=depth)
    _, forward, parts = small_case(small, "full")
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in MATMULS)
    assert counted == sum(part.flops for name, part in parts.items() if name not in ("attention", "tanh, exp"))


def test_flops_of_parts_are_those_of_the_step() -> None:
    gpt = counts.sizes(12)
    own = counts.adapter(gpt, rank=16)
    parts = step_parts(gpt, own, Batch())
    counted = sum(part.flops for part in parts.values() if part.unit != "function")
    assert counted == pytest.approx(sum(flops(gpt, own, Batch()).values()), rel=1e-12)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("text", [2, 12])
def test_the_peak_of_forward_and_backward(stage: Stage, text: int) -> None:
    """With much text its logits are the peak, with little the last block's backward, or the gradients of what trains."""
    small, batch = Small(vocab_size=4096), BATCH._replace(text=text)
    omni, forward = small_step(small, batch, 16 if stage == "2" else 0)
    if stage == "full":
        omni.gpt.requires_grad_(True)
    forward().backward()
    peak = peak_bytes(lambda: forward().backward(), list(omni.parameters()), "cpu")
    own = small.adapter(batch, 16 if stage == "2" else 0)
    told = step_bytes(small.sizes(), own, batch, a=4, norm=4, d_model=small.d_model, full=stage == "full")
    assert told == pytest.approx(peak, rel=0.08)


@pytest.mark.parametrize(("file", "needed"), [
    ("step_counts.py", {"__future__", "math", "typing"}),
    ("cost.py", {"__future__", "math", "collections.abc", "typing", "omni_adapters.shapes", "omni_adapters.step_counts"})])
def test_formulas_need_no_torch(file: str, needed: set[str]) -> None:
    tree = ast.parse((ROOT / "omni_adapters" / file).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == needed


# ---- what is made of the counts ------------------------------------------------------------------------------------------

PLAIN = Machine(matmul=100.0, fp32=50.0, bandwidth=10.0, memory=1e9, link=4.0, network=1.0, gpus_per_node=2, functions=20.0,
                utilisation=model.Utilisation(0.5, 0.25, 0.8))


@pytest.mark.parametrize(("part", "seconds"), [
    (Part(200, 0, 0), 200 / 50), (Part(200, 0, 0, "fp32"), 200 / 25), (Part(200, 0, 0, "attention"), 200 / 25),
    (Part(200, 0, 0, "function"), 200 / 20), (Part(200, 16, 0), 4), (Part(200, 80, 9), 10),
])
def test_a_part_takes_the_longer_of_arithmetic_and_memory(part: Part, seconds: float) -> None:
    assert model.device_seconds(PLAIN, part) == seconds


@given(tensor=st.floats(1, 1e9))
def test_measured_bandwidths_are_met_and_bound_what_lies_between(tensor: float) -> None:
    points = ((1e4, 50.0), (1e6, 20.0), (1e8, 5.0))
    machine = PLAIN._replace(cached=points)
    assert [model.bandwidth(machine, size) for size, _ in points] == pytest.approx([speed for _, speed in points])
    assert 5 * (1 - 1e-9) <= model.bandwidth(machine, tensor) <= 50 * (1 + 1e-9)
    assert model.bandwidth(machine, math.inf) == 5 and model.bandwidth(PLAIN, tensor) == 10


@given(num_gpus=st.integers(2, 1000), engine=st.sampled_from(["ddp", "fsdp2"]), full=st.booleans())
def test_traffic_is_a_ring_at_the_slowest_links_speed(num_gpus: int, engine: counts.Engine, full: bool) -> None:
    gpt = counts.sizes(4)
    own = counts.adapter(gpt)
    sent = traffic(gpt, own, engine, num_gpus, full=full)
    took = model.traffic_seconds(PLAIN, gpt, own, engine, num_gpus, full) - sent / (4 if num_gpus == 2 else 1)
    assert 0 < took < sent  # what is left is latency
    if engine == "ddp":
        assert sent == 2 * 4 * (own.total + gpt.total * full) * ((num_gpus - 1) / num_gpus)


@settings(max_examples=60)
@given(gpu=st.sampled_from(list(MACHINES)), depth=st.integers(1, 40), soft=st.integers(1, 2000), text=st.integers(1, 500),
       batch=st.integers(1, 64), stage=st.sampled_from(STAGES), engine=st.sampled_from(["ddp", "fsdp2"]),
       overlap=st.booleans(), online=st.booleans())
def test_a_prediction_adds_up(gpu: str, depth: int, soft: int, text: int, batch: int, stage: Stage, engine: counts.Engine,
                              overlap: bool, online: bool) -> None:
    assume(not (overlap and stage == "1" and engine == "ddp"))
    one, many = cost(gpu=gpu, depth=depth, soft=soft, text=text, batch=batch, stage=stage, engine=engine, overlap=overlap,
                     online=online, gpus=(1, 1000), price=2.5)
    work = sum(one.parts.values())
    assert one.step_seconds == (work + one.launch_seconds if gpu == "cpu" else max(work, one.launch_seconds))
    assert many.parts == one.parts and many.traffic_seconds > one.traffic_seconds == 0
    assert many.step_seconds == (max if overlap else lambda *pair: sum(pair))(one.step_seconds, many.traffic_seconds)
    for found in (one, many):
        assert found.tokens_per_second * found.step_seconds == pytest.approx(found.num_gpus * batch * (soft + text))
        heard = found.num_gpus * batch * soft * 8 / 50  # s of sound in a step
        assert found.audio_hours_per_hour * found.step_seconds == pytest.approx(heard)
        assert found.price_per_1000_hours == pytest.approx(1000 * 2.5 * found.num_gpus * found.step_seconds / heard)
        assert found.fits == (sum(found.memory.values()) <= 0.9 * MACHINES[gpu].memory)
        assert min(found.parts.values()) >= 0 and min(found.memory.values()) >= 0
    assert ("encoder" in one.parts) == online
    assert many.price_per_1000_hours >= one.price_per_1000_hours * (1 - 1e-12)  # rounding


@pytest.mark.parametrize("more", [{"depth": 13}, {"soft": 189}, {"text": 257}, {"batch": 17}, {"vocab_size": 50304},
                                  {"stage": "2"}, {"stage": "full"}, {"online": True}, {"gpu": "h100"}, {"gpu": "a100"}], ids=str)
def test_more_work_or_a_slower_gpu_takes_longer(more: dict[str, Any]) -> None:
    base, other = cost(gpus=[1])[0], cost(gpus=[1], **more)[0]
    assert sum(other.parts.values()) > sum(base.parts.values())


def test_stage_2_and_the_whole_gpt_keep_more() -> None:
    one, two, full = (sum(cost(gpus=[8], stage=stage)[0].memory.values()) for stage in STAGES)
    assert one < two < full


@pytest.mark.parametrize(("options", "message"), [
    ({"gpu": "h900"}, "--gpu h900; expected one of [h200, h100, a100, l40s, rtx4090, cpu]"),
    ({"encoder": "whisper"}, "--encoder whisper; expected one of [log_mel, whisper-tiny"),
    ({"stage": "3"}, "--stage 3"), ({"engine": "zero"}, "--engine zero"), ({"depth": 0}, "--depth 0"), ({"soft": 0}, "--soft 0"),
    ({"text": 0}, "--text 0"), ({"batch": -1}, "--batch -1"), ({"gpus": [8, 0]}, "--gpus 0"), ({"gpus": []}, "no number of GPUs"),
    ({"price": -1.0}, "--price -1"), ({"price": math.nan}, "--price nan"), ({"frame_rate": 0.0}, "--frame-rate 0"),
    ({"depth": 10**9}, "--depth 1000000000; expected an integer, 1 to 1,000"), ({"soft": 10**7}, "--soft 10000000; expected"),
    ({"gpus": [10**9]}, "--gpus 1000000000"), ({"vocab_size": 10**9}, "--vocab 1000000000"), ({"price": math.inf}, "--price inf"),
    ({"frame_rate": 1e9}, "--frame-rate 1000000000"),
    ({"stack": 0}, "--stack 0"), ({"stage": "2", "rank": 0}, "--rank 0"), ({"stage": "2", "rank": 769}, "--rank 769"),
    ({"overlap": True}, "--overlap in stage 1 under DDP"),
])
def test_what_cannot_be_priced_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        cost(**options)


def test_a_feature_lasts_as_long_as_its_encoder_says() -> None:
    from omni_adapters.encoders.log_mel import LogMelEncoder

    assert counts.ENCODERS["log_mel"].frame_rate == LogMelEncoder.frame_rate == 100
    for encoder, rate in (("log_mel", 100.0), ("whisper-base", 50.0)):
        assert cost(encoder=encoder) == cost(encoder=encoder, frame_rate=rate) != cost(encoder=encoder, frame_rate=75.0)


def test_the_largest_step_that_is_priced_is_finite() -> None:
    found = cost(depth=1000, soft=10**6, text=10**6, batch=10**6, gpus=[10**6], stage="full", price=1e6)
    json.dumps(model.as_json(found, "h200", 1e6), allow_nan=False)


def test_measured_roofs_are_not_cut_by_a_data_sheets_shares() -> None:
    assert (benchmark.CUDA_UTILISATION.matmul, benchmark.CUDA_UTILISATION.copy) == (1, 1)
    assumed = model.Utilisation()
    assert benchmark.CUDA_UTILISATION.attention == assumed.attention / assumed.matmul


# ---- what is printed -----------------------------------------------------------------------------------------------------


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)


def test_the_pages_table_is_the_commands_output() -> None:
    section = (ROOT / "docs" / "scale.md").read_text().split("## What will it cost?")[1].split("\n## ")[0]
    assert tables(section) == tables(model.describe(cost(), "h200", 3.0))[:1]


def test_json_says_the_same() -> None:
    found = cost(gpus=[1, 8])
    told = json.loads(json.dumps(model.as_json(found, "h200", 3.0), allow_nan=False))
    assert "computed" in told["what"] and told["computed"] == [json.loads(json.dumps(p._asdict())) for p in found]


def test_a_step_is_predicted_measured_and_drawn(tmp_path: Path) -> None:
    cases = [benchmark.Case(1, 8, 8, 1, "1"), benchmark.Case(1, 8, 8, 1, "full")]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        roofs, rows = benchmark.measure(cases, "cpu", repeats=1)
    finally:
        torch.set_num_threads(before)
    assert min(roofs.values()) > 0
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
        assert sum(row["parts_ms"].values()) + row["launches_ms"] == pytest.approx(row["predicted_ms"])
        assert abs(row["memory_error"]) < 0.15
    benchmark.draw(rows, tmp_path / "cost.png", "one step")
    assert (tmp_path / "cost.png").stat().st_size > 5_000
