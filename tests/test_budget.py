"""docs/scale.md and the arithmetic behind it (benchmarks/budget.py).

Sizes are held against real nanochat and the reference GPT, bytes against what autograd saves and what the profiler sees
allocated, FLOPs against torch's counter, traffic against what two ranks really hand to their collectives: this file, run by
torchrun. The page's tables are the command's output, and its commands parse.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import budget  # noqa: E402
from benchmarks.budget import Small  # noqa: E402
from benchmarks.measure import peak_bytes  # noqa: E402
from omni_adapters import cli  # noqa: E402
from omni_adapters.anatomy import unwrap  # noqa: E402
from omni_adapters.lora import BREAK_EVEN  # noqa: E402
from omni_adapters.reference_gpt import GPT, GPTConfig  # noqa: E402
from omni_adapters.step_counts import Batch, adapter, attended, flops, memory, sizes, traffic  # noqa: E402

PAGE = (ROOT / "docs" / "scale.md").read_text()
DTYPES = (torch.float32, torch.bfloat16)
ENGINES: tuple[budget.Engine, ...] = ("ddp", "fsdp2")

# ---- sizes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(depth=st.integers(1, 7), aspect_ratio=st.integers(24, 70), head_dim=st.sampled_from([24, 32, 48]),
       vocab_size=st.integers(50, 300))
def test_parameters_are_those_of_the_reference_gpt(depth: int, aspect_ratio: int, head_dim: int, vocab_size: int) -> None:
    found = sizes(depth, aspect_ratio=aspect_ratio, head_dim=head_dim, vocab_size=vocab_size)
    assert found.n_embd >= depth * aspect_ratio > found.n_embd - head_dim
    gpt = GPT(GPTConfig(sequence_len=64, vocab_size=vocab_size, n_layer=depth, n_head=found.n_head, n_kv_head=found.n_head,
                        n_embd=found.n_embd))
    linear = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, nn.Linear))
    tables = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, nn.Embedding))
    assert (found.matmuls, found.tables, found.total) == (linear, tables, sum(p.numel() for p in gpt.parameters()))
    assert found.vocab_rows == gpt.wte().weight.size(0) and found.num_value_tables == len(gpt.value_embeds)


COUNT = """
import json, sys, torch
from nanochat.gpt import GPT, GPTConfig
found = {}
for depth, n_head, n_embd in json.loads(sys.argv[1]):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_embd))
    found[depth] = sum(p.numel() for p in gpt.parameters()), gpt.num_matmul_params(), [w for w, _ in gpt.window_sizes]
print(json.dumps(found))
"""


@pytest.mark.skipif("NANOCHAT_DIR" not in os.environ, reason="NANOCHAT_DIR names no checkout of nanochat")
def test_parameters_are_those_of_real_nanochat() -> None:
    asked = [(depth, sizes(depth).n_head, sizes(depth).n_embd) for depth in budget.DEPTHS]
    done = subprocess.run([sys.executable, "-c", COUNT, json.dumps(asked)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.environ["NANOCHAT_DIR"]})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for depth in budget.DEPTHS:
        gpt = sizes(depth)
        total, matmuls, windows = found[str(depth)]
        assert (gpt.total, gpt.matmuls) == (total, matmuls)
        assert flops(gpt, adapter(gpt), Batch(1, 3000, 64))["attention"] == 12 * gpt.n_embd * sum(
            attended(3064, window) for window in windows)


@pytest.mark.parametrize(("d_model", "n_layer", "n_mels"), [(512, 6, 80), (1280, 32, 128)])
def test_parameters_of_the_encoder_are_whispers(d_model: int, n_layer: int, n_mels: int) -> None:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig(d_model=d_model, encoder_layers=n_layer, num_mel_bins=n_mels,
                                               encoder_ffn_dim=4 * d_model,
                                               encoder_attention_heads=d_model // 64))
    assert budget.whisper_encoder(d_model, n_layer, n_mels) == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("rank", [0, 8, 16])
def test_what_is_trained_is_what_an_omni_gpt_trains(rank: int) -> None:
    small, batch = Small(), Batch(rows=1, soft=2, text=3, stack=4)
    omni, _ = budget.small_step(small, batch, rank)
    own = small.adapter(batch, rank)
    assert own.total == sum(p.numel() for p in omni.parameters() if p.requires_grad)


# ---- bytes -------------------------------------------------------------------------------------------------------------


def check_saved(small: Small, batch: Batch, rank: int, dtype: torch.dtype) -> None:
    """The formula leaves out masks, indices and casts of a few vectors, each of them counted in `uncounted`."""
    missed = budget.saved_bytes(small, batch, rank, dtype) - budget.computed_bytes(small, batch, rank, dtype)
    assert 0 <= missed <= budget.uncounted(small, batch, dtype)


@pytest.mark.parametrize("case", budget.CHECKS, ids=str)
def test_saved_bytes_are_the_formulas(case: tuple[Small, Batch, int, torch.dtype]) -> None:
    check_saved(*case)
    assert budget.uncounted(case[0], case[1], case[3]) < 0.002 * budget.computed_bytes(*case)  # so a term cannot hide in it


@settings(max_examples=25)
@given(depth=st.integers(1, 5), head_dim=st.sampled_from([16, 32]), hidden=st.integers(1, 100), rows=st.integers(1, 3),
       soft=st.integers(1, 20), text=st.integers(2, 12), stack=st.integers(1, 4), rank=st.sampled_from([0, 16]),
       dtype=st.sampled_from(DTYPES))
def test_saved_bytes_are_the_formulas_at_any_size(depth: int, head_dim: int, hidden: int, rows: int, soft: int, text: int,
                                                  stack: int, rank: int, dtype: torch.dtype) -> None:
    check_saved(Small(depth, 32, head_dim, 128, hidden), Batch(rows, soft, text, stack), rank, dtype)


MERGING = Small(depth=2), Batch(rows=4, soft=24, text=12, stack=4)  # C = 64, 144 slots: rows enough on every matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_lora_keeps_less_than_the_formula(dtype: torch.dtype) -> None:
    """r of each of six products in each slot, and, in bf16, casts of the matrices."""
    small, batch = MERGING
    gpt, own = small.sizes(), small.adapter(batch, 16)
    assert batch.slots * 5 * gpt.n_embd >= BREAK_EVEN * 4 * gpt.n_embd**2
    less = 6 * 16 * gpt.n_layer * batch.slots * dtype.itemsize + (2 * (gpt.matrices + own.lora) if dtype is torch.bfloat16 else 0)
    missed = budget.saved_bytes(small, batch, 16, dtype, "auto") - (budget.computed_bytes(small, batch, 16, dtype) - less)
    assert 0 <= missed <= budget.uncounted(small, batch, dtype)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_of_a_step_is_the_formulas(rank: int, dtype: torch.dtype) -> None:
    """Where logits outweigh a block's backward, as `memory` says; parameters and what trains them are there before."""
    small, batch = Small(vocab_size=8192), Batch(rows=2, soft=24, text=12, stack=4)
    C, logits = small.sizes().n_embd, 16 * 8192 * batch.rows * batch.text
    assert logits > 13 * C * 4 * batch.slots
    omni, forward = budget.small_step(small, batch, rank, dtype)
    forward().backward()  # what is made once
    peak = peak_bytes(lambda: forward().backward(), list(omni.parameters()), "cpu")
    own = small.adapter(batch, rank)
    terms = memory(small.sizes(), own, batch, a=dtype.itemsize, norm=4, d_model=small.d_model)
    missed = peak - terms["activations"] - terms["casts"] - terms["logits"]
    assert 0 <= missed <= budget.uncounted(small, batch, dtype) + 128  # and some scalars of the loss


def test_fsdp2_divides_frozen_and_trained_and_nothing_else() -> None:
    gpt = sizes(12)
    own = adapter(gpt, rank=16)
    one = memory(gpt, own, Batch(), engine="fsdp2", num_gpus=1)
    ddp, four = (memory(gpt, own, Batch(), engine=engine, num_gpus=4) for engine in ENGINES)
    assert one == memory(gpt, own, Batch())
    assert {name for name in one if ddp[name] != one[name]} == {"trained"} and ddp["trained"] == one["trained"] * 20 / 16
    assert {name for name in one if four[name] != one[name]} == {"frozen", "trained", "gathered"}
    assert four["frozen"] * 4 == one["frozen"] and four["trained"] * 4 == one["trained"]


@given(depth=st.sampled_from(budget.DEPTHS), rank=st.sampled_from([0, 16]), num_gpus=st.sampled_from([1, 8]),
       engine=st.sampled_from(ENGINES))
def test_rows_that_fit_fit_and_one_more_does_not(depth: int, rank: int, num_gpus: int, engine: budget.Engine) -> None:
    gpt, batch = sizes(depth), Batch()
    own = adapter(gpt, rank=rank)
    rows = budget.rows_that_fit(gpt, own, batch, engine=engine, num_gpus=num_gpus)
    small, large = (sum(memory(gpt, own, batch._replace(rows=n), engine=engine, num_gpus=num_gpus).values())
                    for n in (rows, rows + 1))
    assert small <= 0.9 * budget.GPU_BYTES < large


# ---- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", budget.CHECKS[::2], ids=str)  # one dtype: the same multiplications
def test_flops_of_matmuls_are_torchs_count(case: tuple[Small, Batch, int, torch.dtype]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    small, batch, rank, dtype = case
    _, forward = budget.small_step(small, batch, rank, dtype)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.bmm", "aten.addmm"))
    parts = flops(small.sizes(), small.adapter(batch, rank), batch)
    assert counted == sum(parts.values()) - parts["attention"]


def test_merged_lora_has_no_more_flops_than_the_formula() -> None:
    """4 for each LoRA parameter and slot instead of 6, and 4 r for each weight: as many at BREAK_EVEN = 2, fewer above."""
    from torch.utils.flop_counter import FlopCounterMode

    small, batch = MERGING
    gpt, own = small.sizes(), small.adapter(batch, 16)
    _, forward = budget.small_step(small, batch, 16, form="auto")
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.bmm", "aten.addmm"))
    parts = flops(gpt, own, batch)
    assert counted == sum(parts.values()) - parts["attention"] - 2 * own.lora * batch.slots + 4 * 16 * gpt.matrices
    assert 4 * 16 * gpt.matrices < 2 * own.lora * batch.slots and BREAK_EVEN == 2


@given(T=st.integers(1, 40), window=st.integers(0, 50))
def test_attended_keys_are_the_masks_ones(T: int, window: int) -> None:
    mask = [(query, key) for query in range(T) for key in range(T) if 0 <= query - key <= window]
    assert attended(T, window) == len(mask)


@settings(max_examples=30)
@given(depth=st.integers(1, 9), soft=st.integers(1, 400))
def test_attention_heeds_the_reference_gpts_windows(depth: int, soft: int) -> None:
    found = sizes(depth, aspect_ratio=32, head_dim=32, vocab_size=64)
    gpt = GPT(GPTConfig(sequence_len=300, vocab_size=64, n_layer=depth, n_head=found.n_head, n_kv_head=found.n_head,
                        n_embd=found.n_embd))
    keys = sum(attended(soft + 5, window) for window in gpt.windows)
    batch = Batch(rows=3, soft=soft, text=5)
    assert flops(found, adapter(found), batch, sequence_len=300)["attention"] == 3 * 12 * found.n_embd * keys


def test_an_encoder_costs_where_it_runs() -> None:
    gpt = sizes(12)
    assert flops(gpt, adapter(gpt), Batch())["encoder"] == 0
    assert flops(gpt, adapter(gpt), Batch(), encoder=7, frames=5)["encoder"] == 70


# ---- two ranks ---------------------------------------------------------------------------------------------------------

SMALL, BATCH = Small(), Batch(rows=2, soft=24, text=12, stack=4)


def told_by_a_rank(folder: Path) -> None:
    """What a second step hands to collectives, in bytes; and under FSDP2, what stands whole while each block is at work."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from omni_adapters.training.ranks import find_blocks, join_ranks, wrap

    class Sent(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).split(".")[1] if str(func).startswith("c10d.") else ""
            tensors = [t for part in args for t in (part if isinstance(part, (list, tuple)) else [part])
                       if isinstance(t, torch.Tensor)]
            if name and tensors:
                told[case][name] += min(t.nbytes for t in tensors)  # of a gather and a scatter, one rank's share
            return func(*args, **(kwargs or {}))

    def count_whole(*_: Any) -> None:
        states = [m._get_fsdp_state()._fsdp_param_group for m in omni.modules() if hasattr(m, "_get_fsdp_state")]
        params = [p._unsharded_param for group in states if group for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
        told[case]["whole"] = max(told[case]["whole"], sum(p.untyped_storage().nbytes() for p in params))

    torch.set_num_threads(1)
    told: dict[str, Counter[str]] = {}
    with join_ranks("cpu") as ranks:
        for engine in ENGINES:
            for rank in (0, 16):
                case = f"{engine}, {rank}"
                omni, _ = budget.small_step(SMALL, BATCH, rank)
                model = wrap(omni, ranks, engine)
                features = budget.Features(torch.randn(2, 96, SMALL.d_model), torch.full((2,), 96))
                idx = torch.randint(0, SMALL.vocab_size, (2, 12))
                for block in find_blocks(unwrap(omni.gpt)) if engine == "fsdp2" else []:
                    block.get_submodule("mlp").register_forward_pre_hook(count_whole)
                for _ in range(2):
                    told[case] = Counter()
                    with Sent():
                        model(idx, idx.roll(-1, dims=1), audio_features=features).backward()
        if ranks.is_first:
            (folder / "told.json").write_text(json.dumps(told))
        dist.barrier()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("ranks")
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                           str(folder)], capture_output=True, text=True, timeout=120,
                          env=outside | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
def test_ddp_reduces_what_is_trained_and_nothing_else(told: dict[str, dict[str, int]], rank: int) -> None:
    own = SMALL.adapter(BATCH, rank)
    assert told[f"ddp, {rank}"]["allreduce_"] == 4 * own.total == traffic(SMALL.sizes(), own, "ddp", 2)  # 2 (N − 1) / N = 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
def test_fsdp2_gathers_every_weight_twice(told: dict[str, dict[str, int]], rank: int) -> None:
    """Shares are padded: each parameter by at most a row, and only scalars have rows that do not divide."""
    gpt, own = SMALL.sizes(), SMALL.adapter(BATCH, rank)
    came = told[f"fsdp2, {rank}"]
    padding = came["_allgather_base_"] + came["_reduce_scatter_base_"] - traffic(gpt, own, "fsdp2", 2, a=4)
    assert 0 <= padding <= 1024
    assert came["_reduce_scatter_base_"] == 4 * own.total / 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
def test_under_fsdp2_the_root_and_up_to_two_blocks_stand_whole(told: dict[str, dict[str, int]], rank: int) -> None:
    gpt, own = SMALL.sizes(), SMALL.adapter(BATCH, rank)
    projector = 8 * (own.fc1 + own.fc2)
    most = memory(gpt, own, BATCH, engine="fsdp2", num_gpus=2, a=4)["gathered"] - projector
    block = 4 * (gpt.matrices + own.lora) / gpt.n_layer
    assert most - block <= told[f"fsdp2, {rank}"]["whole"] <= most + 1024  # on the CPU nothing arrives ahead in forward


# ---- the page ----------------------------------------------------------------------------------------------------------


def test_the_tables_are_the_commands_output() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.budget"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE)
    written = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    assert len(printed) == len(budget.TABLES) and printed == written[: len(printed)]


def test_the_results_file_is_the_scripts() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "budget.json").read_text())
    assert report["computed"] == json.loads(json.dumps(budget.computed()))
    for row in report["measured_on_cpu"]:
        assert 0 <= row["saved_bytes"] - row["computed_bytes"] <= row["may_miss_bytes"]


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def recipe(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_program(words: list[str]) -> Any:
    """The parsed options of `omni-adapters …` or `examples/x.py …`."""
    program, *rest = words
    if program in ("omni-adapters", "omni_adapters.cli"):
        return cli.parser(rest[0]).parse_args(rest)
    assert program.startswith("examples/"), program
    return recipe(program).options().parse_args(rest)


def test_the_page_shows_every_way_to_start() -> None:
    text = [" ".join(words) for words in commands()]
    for way in ("--nproc_per_node=8", "--nnodes", "--max-restarts", "--engine fsdp2", "--engine ddp", "omni_adapters.cli extract",
                "examples/synthetic.py", "examples/align.py", "examples/instruct.py"):
        assert any(way in line for line in text), way


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_of_the_page_parse(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    ranks = 1
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        ranks = int(launch.nproc_per_node) * int(str(launch.nnodes).split(":")[0])
        words = [launch.training_script, *launch.training_script_args]
    elif words[0] == "python":
        words = words[1:]
    options = parse_program(words)
    assert getattr(options, "micro_batches", ranks) % ranks == 0, f"{ranks} ranks do not divide the micro-batches"


def test_tests_that_the_page_names_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) >= 4
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert f"def {function}" in (ROOT / file).read_text(), f"{file}::{function}"


if __name__ == "__main__":
    told_by_a_rank(Path(sys.argv[1]))
