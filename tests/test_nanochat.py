"""Real nanochat as a host, at HEAD and at older commits spread over the history of its gpt.py.

NANOCHAT_DIR names a git checkout of nanochat with its history. A child process per commit (its modules have state) gets
the commit's own `nanochat/` package from `git archive` and runs every check on it: this file, run as a script. Hosts from
before March 2026 count on bf16 autocast and also run in plain fp32 where their dtypes allow; later ones take their dtype
from NANOCHAT_DTYPE.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import traceback
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VALUES = ("value_embeds.0", "value_embeds.2")  # of three layers: every other one, the last included


class Version(NamedTuple):
    """What a commit's GPT is like, read by hand in its gpt.py."""

    commit: str
    side_tables: tuple[str, ...] = ()
    derived_tables: tuple[str, ...] = ()
    softcap: float = 15.0
    padded: bool = True         # vocabulary padded to a multiple of 64
    smear: bool = False
    wte_is_bf16: bool = False   # runs under autocast only
    autocast: bool = True       # its scripts run it under autocast
    windows: bool = False       # cached decode heeds sliding windows (a bug before 3ba42e8)
    cache_is_exact: bool = True # False: a cached step does not see its neighbour, and hashes another bigram
    engine_fails: str = ""      # mode in which its Engine makes a cache of another dtype and fails, bare too
    borrow: str = ""            # commit to take flash_attention.py from, where its own was forgotten


VERSIONS = [
    Version("3a5e0bc", padded=False, wte_is_bf16=True),                                    # Oct 2025, the first
    Version("306bc38", padded=False),                                                      # Oct 2025, CPU and MPS
    Version("e1770a3"),                                                                    # Dec 2025
    Version("48abd7d"),                                                                    # Jan 2026, init rewritten
    Version("ccf4b7f"),                                                                    # Jan 2026
    Version("aa530cd"),                                                                    # residual and x0 scalars
    Version("8203efa", borrow="b62a5bc", engine_fails="float32"),                          # flash attention's fallback
    Version("0b58d70", side_tables=("value_embed",), engine_fails="float32"),              # one value embedding
    Version("85b3e95", side_tables=VALUES),                                                # gated value embeddings
    Version("59e36cc", side_tables=VALUES, derived_tables=("bigram_embed.embed",), cache_is_exact=False),  # bigram hashes
    Version("aba30cb", side_tables=VALUES, softcap=20.0, windows=True),                    # Mar 2026
    Version("1076f97", side_tables=VALUES, softcap=20.0, autocast=False, windows=True, engine_fails="bfloat16"),
    Version("a825e63", side_tables=VALUES, smear=True, autocast=False, windows=True, engine_fails="bfloat16"),
    Version("94b73ad", side_tables=VALUES, smear=True, autocast=False, windows=True, engine_fails="bfloat16"),
    Version("HEAD", side_tables=VALUES, smear=True, autocast=False, windows=True),
]


def modes(version: Version) -> list[str]:
    if not version.autocast:
        return ["float32", "bfloat16"]
    return ["autocast"] if version.wte_is_bf16 else ["float32", "autocast"]


# ---- in the parent: one child per commit and mode, one pytest case per check -----------------------------------------


CHECKS: dict[str, Callable[[Any], None]] = {}
CASES = [(version, mode) for version in VERSIONS for mode in modes(version)]


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS[function.__name__] = function
    return function


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", os.environ["NANOCHAT_DIR"], *arguments], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Version, str], dict[str, str]]:
    """Runs a child once per commit and mode; gives its report, {check: "" or a traceback}."""
    seen: dict[tuple[str, str], dict[str, str]] = {}

    def report(version: Version, mode: str) -> dict[str, str]:
        key = version.commit, mode
        if key not in seen:
            folder = tmp_path_factory.mktemp(version.commit)
            seen[key] = run_child(version, mode, folder)
        return seen[key]

    return report


def run_child(version: Version, mode: str, folder: Path) -> dict[str, str]:
    if subprocess.run(["git", "-C", os.environ["NANOCHAT_DIR"], "cat-file", "-e", version.commit + "^{commit}"],
                      capture_output=True).returncode:
        return {"missing": f"NANOCHAT_DIR has no commit {version.commit}: a clone with its whole history is needed"}
    with tarfile.open(fileobj=io.BytesIO(git("archive", version.commit, "nanochat"))) as archive:
        archive.extractall(folder, filter="data")
    if version.borrow:
        (folder / "nanochat/flash_attention.py").write_bytes(git("show", f"{version.borrow}:nanochat/flash_attention.py"))
    environment = {key: value for key, value in os.environ.items() if key not in ("NANOCHAT_DTYPE", "PYTHONPATH")}
    if not version.autocast:
        environment["NANOCHAT_DTYPE"] = mode
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, __file__, str(folder), str(VERSIONS.index(version)), mode]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if child.returncode:
        return {"crash": child.stdout[-2000:] + child.stderr[-4000:]}
    return json.loads(child.stdout.splitlines()[-1])


def pytest_cases() -> list[Any]:
    if "NANOCHAT_DIR" not in os.environ:
        unset = pytest.mark.skip("NANOCHAT_DIR names no git checkout of nanochat")
        return [pytest.param(None, "", "", marks=unset, id="unset")]
    idle = {version: {"sliding_windows": not version.windows, "smear_is_for_text_only": not version.smear}
            for version in VERSIONS}
    return [pytest.param(version, mode, name, id=f"{version.commit}-{mode}-{name}")
            for version, mode in CASES for name in CHECKS if not idle[version].get(name)]


# ---- in the child ----------------------------------------------------------------------------------------------------


class Stub(types.ModuleType):
    """A module of which any name can be imported: for what a commit imports and these checks never use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class NoSpecialTokens:
    """The Engine asks for ids that end a row or start a tool call; none of these is ever sampled."""

    def encode_special(self, name: str) -> int:
        return -2

    def get_bos_token_id(self) -> int:
        return -1


NUM_SOFT, WIDTH, VOCAB, STEPS = 6, 64, 97, 7
PROMPT = [5, 17, 3, 41, 8, 29]


class Bench:
    """One commit's GPT with random weights, everything that surrounds it, and greedy decoding in its plainest form."""

    def __init__(self, version: Version, mode: str) -> None:
        import importlib

        from hosts import randomise

        for name in ("rustbpe", "tiktoken", "wandb", "filelock", "psutil", "pyarrow", "datasets"):
            if importlib.util.find_spec(name) is None:
                sys.modules[name] = Stub(name)
        self.version, self.mode, self.randomise = version, mode, randomise
        self.module = importlib.import_module("nanochat.gpt")
        self.engine_module = importlib.import_module("nanochat.engine")
        self.fresh(0)

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.mode == "autocast" else nullcontext()

    @property
    def low_precision(self) -> bool:
        return self.mode != "float32"

    def fresh(self, seed: int) -> nn.Module:
        """A new GPT of random weights."""
        sizes = {"sequence_len": 64, "vocab_size": VOCAB, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": WIDTH}
        self.gpt = self.module.GPT(self.module.GPTConfig(**sizes))
        self.redraw(seed)
        return self.gpt

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Parameters anew; rotary tables and dtypes as the GPT's own init_weights leaves them."""
        torch.manual_seed(seed)
        self.gpt.init_weights()
        if self.version.smear:  # not all commits initialise these two
            self.gpt.backout_lambda.fill_(0.2)
        self.randomise(self.gpt, seed)
        if self.version.smear:
            self.gpt.smear_lambda.fill_(0.7)

    def prepender(self, **options: Any) -> Any:
        from omni_adapters.prepender import SoftTokenPrepender

        return SoftTokenPrepender(self.gpt, **options)  # outside autocast, as a training script would

    def soft(self, num: int = NUM_SOFT, seed: int = 7) -> Tensor:
        return torch.randn(1, num, WIDTH, generator=torch.Generator().manual_seed(seed))

    def last_logits(self, prepender: Any, tokens: list[int], soft: Any) -> Tensor:
        with torch.no_grad(), self.context():
            return prepender(torch.tensor([tokens]), None, soft)[0, -1].float()

    def uncached(self, prepender: Any, tokens: list[int], soft: Any, margin: float) -> list[int] | None:
        """Greedy ids with everything computed again each step; None where the two best logits are closer than `margin`,
        or where a placeholder's id is the best."""
        ids = list(tokens)
        for _ in range(STEPS):
            logits = self.last_logits(prepender, ids, soft)
            best = logits.topk(2)
            if best.values[0] - best.values[1] < margin or (isinstance(soft, dict) and int(best.indices[0]) in soft):
                return None
            ids.append(int(best.indices[0]))
        return ids[len(tokens) :]

    def decisive(self, tokens: list[int], soft: Any, **options: Any) -> tuple[Any, list[int]]:
        """A prepender and its greedy ids, of the first seed at which no rounding could tip a choice.

        Two ways to the same logit differ by roundings only: a gap of 1e-3 is 100 × what fp32 gives here; in bf16 (2⁻⁸ at
        each of some ten sums, logits of up to 15 units) the gap must be 0.5.
        """
        prepender = self.prepender(**options)
        for seed in range(1000):
            self.redraw(seed)
            ids = self.uncached(prepender, tokens, soft, 0.5 if self.low_precision else 1e-3)
            if ids is not None:
                return prepender, ids
        raise AssertionError("no decisive seed")

    def engine(self, tokens: list[int], num_samples: int = 1, steps: int = STEPS) -> list[list[int]]:
        """The commit's own Engine, greedy: one list of ids per sample."""
        engine = self.engine_module.Engine(self.gpt, NoSpecialTokens())
        with self.context():
            columns = engine.generate(list(tokens), num_samples=num_samples, max_tokens=steps, temperature=0.0)
            rows = [column for column, _ in columns]
        return [list(row) for row in zip(*rows)]

    @property
    def has_engine(self) -> bool:
        return self.mode != self.version.engine_fails

    def cached_by_hand(self, prepender: Any, tokens: list[int], soft: Any) -> list[int]:
        """Greedy ids by prepender(…, kv_cache=…) with the commit's own cache: a prefill, then single steps."""
        import inspect

        sizes = {"batch_size": 1, "num_heads": 2, "seq_len": 128, "head_dim": WIDTH // 4, "num_layers": 3, "device": "cpu",
                 "dtype": torch.bfloat16 if self.mode == "bfloat16" else torch.float32}
        kind = self.engine_module.KVCache
        cache = kind(**{name: sizes[name] for name in inspect.signature(kind).parameters})
        ids: list[int] = []
        with torch.inference_mode(), self.context():
            logits = prepender(torch.tensor([tokens]), None, soft, kv_cache=cache)
            for _ in range(STEPS):
                ids.append(int(logits[0, -1].argmax()))
                logits = prepender(torch.tensor([ids[-1:]]), kv_cache=cache)
        return ids


def clips(values: Tensor) -> dict[int, Any]:
    """Two clips of the placeholder VOCAB − 1, of 2 and the remaining soft tokens."""
    from omni_adapters import Features

    first, second = values[0, :2], values[0, 2:]
    padded = torch.stack([F.pad(first, (0, 0, 0, len(second) - 2)), second])
    return {VOCAB - 1: Features(padded, torch.tensor([2, len(second)]))}


PLACES: dict[str, Callable[[Bench], tuple[list[int], Any, dict[str, Any]]]] = {
    "prefix": lambda bench: (PROMPT, bench.soft(), {}),
    "after the first token": lambda bench: (PROMPT, bench.soft(), {"insert_at": 1}),
    "at the end": lambda bench: (PROMPT, bench.soft(), {"insert_at": len(PROMPT)}),
    "clips": lambda bench: ([5, VOCAB - 1, 17, VOCAB - 1, 3], clips(bench.soft()), {}),
    "prompt ends in a clip": lambda bench: ([5, VOCAB - 1, 17, 3, VOCAB - 1], clips(bench.soft()), {}),
}


@check
def anatomy(bench: Bench) -> None:
    from hosts import fingerprint

    from omni_adapters.anatomy import discover_anatomy

    version, gpt = bench.version, bench.gpt
    gpt.train()
    gpt.transformer.h[1].eval()
    before = fingerprint(gpt)
    found = discover_anatomy(gpt)
    assert fingerprint(gpt) == before
    assert found.wte == "transformer.wte" and found.lm_head == "lm_head" and found.head_source is None
    assert found.side_tables == version.side_tables and found.derived_tables == version.derived_tables
    assert found.smear_gate == ("smear_gate" if version.smear else None)
    assert (found.n_embd, found.vocab_size) == (WIDTH, VOCAB)
    assert found.padded_vocab_size == found.num_embeddings == (128 if version.padded else VOCAB)
    assert found.softcap == version.softcap and found.head_is_plain
    assert found.position_limit == 640 and found.output == "tensor"
    assert found.cache == "kv_cache" and found.cache_shape == (3, 2, WIDTH // 4)


@check
def without_soft_tokens_bit_identical(bench: Bench) -> None:
    from omni_adapters import Features

    idx = torch.tensor([PROMPT, PROMPT[::-1]])
    targets = idx.roll(-1, 1)
    with bench.context():
        logits, loss = bench.gpt(idx), bench.gpt(idx, targets)
        keys = list(bench.gpt.state_dict())
        prepender = bench.prepender()
        none = Features(torch.zeros(2, 3, WIDTH), torch.zeros(2, dtype=torch.int64))
        for soft in (None, torch.zeros(2, 0, WIDTH)):
            assert torch.equal(prepender(idx, None, soft), logits) and torch.equal(prepender(idx, targets, soft), loss)
        close(prepender(idx, None, none), logits, bench)  # rows of length 0 pass through the gather
        gpt = prepender.remove()
        assert list(gpt.state_dict()) == keys
        assert torch.equal(gpt(idx), logits) and torch.equal(gpt(idx, targets), loss)


def close(came: Tensor, expected: Tensor, bench: Bench, scale: float = 1.0) -> None:
    """fp32: 1e-4 of logits within ±20 is 100 × the rounding of three layers; bf16: 2⁻⁸ of 20 in each of some five sums."""
    atol = (0.4 if bench.low_precision else 1e-4) * scale
    torch.testing.assert_close(came.float(), expected.float(), rtol=0, atol=atol)


@check
def form_and_shape(bench: Bench) -> None:
    prepender, soft = bench.prepender(), bench.soft().expand(2, -1, -1)
    idx = torch.tensor([PROMPT, PROMPT[::-1]])
    targets = idx.roll(-1, 1)
    with bench.context():
        bare = bench.gpt(idx), bench.gpt(idx, targets), bench.gpt(idx, targets, loss_reduction="none")
        ours = (prepender(idx, None, soft), prepender(idx, targets, soft),
                prepender(idx, targets, soft, loss_reduction="none"))
        for mine, theirs in zip(ours, bare):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and not torch.equal(mine, theirs)
        logits = ours[0]
        expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours[1].float(), expected, rtol=0, atol=1e-5)
        assert prepender.hidden_states(idx, soft).shape == (2, len(PROMPT), WIDTH)


def silence(bench: Bench, soft_ids: list[int], fused: Tensor, is_soft: Tensor) -> None:
    """Zero what side tables give at soft slots, and only there: text keeps its own. Smear as a whole goes."""
    gpt, version = bench.gpt, bench.version
    with torch.no_grad():
        for name in version.side_tables:
            gpt.get_submodule(name).weight[soft_ids] = 0
        for name in version.derived_tables:
            table = gpt.get_submodule(name)
            fed: list[Tensor] = []
            handle = table.register_forward_pre_hook(lambda module, args, fed=fed: fed.append(args[0]))
            with bench.context():
                gpt(fused)
            handle.remove()
            edge = is_soft | F.pad(is_soft[:, :-1], (1, 0))
            assert not set(fed[0][edge].tolist()) & set(fed[0][~edge].tolist())  # the hash keeps them apart here
            table.weight[fed[0][edge]] = 0
        if version.smear:
            gpt.smear_lambda.zero_()


@check
def rows_of_wte_equal_the_plain_forward(bench: Bench) -> None:
    """Guarantee 4: what the head reads is equal bit for bit; the logits too, up to the order of one dot product's sum,
    which the matmul may choose by the number of rows."""
    soft_ids = [60, 61, 62, 63, 64, 65]
    for insert_at in (0, 1, 4):
        gpt = bench.fresh(insert_at)
        fused = torch.tensor([PROMPT[:insert_at] + soft_ids + PROMPT[insert_at:]])
        is_soft = torch.isin(fused, torch.tensor(soft_ids))
        silence(bench, soft_ids, fused, is_soft)
        read: list[Tensor] = []
        handle = gpt.lm_head.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))
        with torch.no_grad(), bench.context():
            logits = gpt(fused)
        handle.remove()
        answers = [slot for slot in range(fused.size(1)) if not is_soft[0, slot]]
        if insert_at:
            answers[insert_at - 1] = insert_at + len(soft_ids) - 1
        prepender = bench.prepender(insert_at=insert_at)
        soft = gpt.transformer.wte.weight[soft_ids].detach().unsqueeze(0)
        idx = torch.tensor([PROMPT])
        with torch.no_grad(), bench.context():
            assert torch.equal(prepender.hidden_states(idx, soft), read[0][:, answers])
            ours = prepender(idx, None, soft)
        # |Δz| ≤ 2·n·ε·Σ|x||w| of an n-term sum in another order, then one rounding of z where it is stored in bf16.
        x, w = read[0].float().abs(), gpt.lm_head.weight.float().abs()
        bound = float(2 * WIDTH * 2**-24 * (x @ w.T).max()) + (bench.low_precision and 3 * 2**-8 * 20)
        torch.testing.assert_close(ours.float(), logits[:, answers].float(), rtol=0, atol=bound)


@check
def smear_is_for_text_only(bench: Bench) -> None:
    """What the first block reads: soft slots and those right after one are as if there were no smear; text is smeared."""
    if not bench.version.smear:
        return
    gpt, prepender = bench.gpt, bench.prepender(insert_at=2)
    read: list[Tensor] = []
    gpt.transformer.h[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), bench.context():
        for smear in (0.7, 0.0):
            gpt.smear_lambda.fill_(smear)
            prepender.hidden_states(torch.tensor([PROMPT]), bench.soft())
    equal = (read[0] == read[1]).all(dim=-1)[0].tolist()
    assert equal == [True, False] + [True] * (NUM_SOFT + 1) + [False] * (len(PROMPT) - 3)


@check
def a_ragged_batch_equals_its_rows(bench: Bench) -> None:
    from omni_adapters import Features

    prepender = bench.prepender()
    values = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([5, 0, 2])
    idx = torch.tensor([PROMPT, PROMPT[::-1], [1, 2, 3, 4, 5, 6]])
    with torch.no_grad(), bench.context():
        together = prepender(idx, None, Features(values, lens))
        for row, length in enumerate(lens.tolist()):
            alone = prepender(idx[row : row + 1], None, values[row : row + 1, :length])
            close(together[row : row + 1], alone, bench)


@check
def gradients_reach_soft_tokens(bench: Bench) -> None:
    prepender = bench.prepender()
    bench.gpt.requires_grad_(False)
    soft = bench.soft().requires_grad_()
    idx = torch.tensor([PROMPT])
    with bench.context():
        prepender(idx, idx.roll(-1, 1), soft).backward()
    assert soft.grad is not None and bool((soft.grad.abs().sum(-1) > 0).all())
    assert all(parameter.grad is None for parameter in bench.gpt.parameters())


@check
def the_loss_without_its_logits(bench: Bench) -> None:
    """The host's own to rounding, gradients too. In bf16 it is the host that rounds, its logits."""
    prepender = bench.prepender()
    bench.gpt.requires_grad_(False)
    soft = bench.soft().requires_grad_()
    idx = torch.tensor([PROMPT])
    targets = idx.roll(-1, 1)
    found = {}
    with bench.context():
        for form in ("host", "fused"):
            prepender.loss, soft.grad = form, None
            for reduction in ("mean", "sum", "none"):
                value = prepender(idx, targets, soft, loss_reduction=reduction)
                value.float().sum().backward()
                found[form, reduction] = value.detach().float()
            found[form, "gradient"] = soft.grad.float()
    for name in ("mean", "sum", "none", "gradient"):
        mine, theirs = found["fused", name], found["host", name]
        assert mine.shape == theirs.shape
        # bf16: logits of order 5 are rounded by 2⁻⁹ of themselves, gradients pass layers that round them so
        rtol, share = (0.05, 0.05) if bench.low_precision else (1e-4, 1e-5)
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=share * float(theirs.abs().max()))


@check
def the_commits_engine_runs_bare(bench: Bench) -> None:
    if bench.has_engine:
        assert len(bench.engine(PROMPT)[0]) == STEPS
    else:
        with pytest.raises(RuntimeError):
            bench.engine(PROMPT)


@check
def lora_goes_in_and_out(bench: Bench) -> None:
    """The commit's counters, Engine and generate run with LoRA as without; its checkpoint still loads before injection."""
    from hosts import fingerprint

    from omni_adapters.lora import inject_lora, lora_parameters, remove_lora

    gpt, idx = bench.gpt, torch.tensor([PROMPT])
    gpt.load_state_dict(gpt.state_dict(), strict=True)
    before, counters = fingerprint(gpt), [getattr(gpt, name) for name in COUNTERS if hasattr(gpt, name)]
    with bench.context(), torch.no_grad():
        expected = gpt(idx)
    counted = [total(counter()) for counter in counters]
    keys = list(gpt.state_dict())
    paths = inject_lora(gpt, rank=4)
    assert {path.split(".", 3)[3] for path in paths} >= {"attn.c_q", "attn.c_v", "mlp.c_fc", "mlp.c_proj"}
    assert [key for key in gpt.state_dict() if "lora_" not in key] == keys
    with bench.context(), torch.no_grad():
        assert torch.equal(gpt(idx), expected)
        assert len(list(gpt.generate(PROMPT, STEPS, temperature=0.0))) == STEPS
    if bench.has_engine:
        assert len(bench.engine(PROMPT)[0]) == STEPS
    num_lora = sum(parameter.numel() for parameter in lora_parameters(gpt))
    for number, counter in zip(counted, counters):  # FLOPs are of the matmuls that were there, parameters of all there are
        assert total(counter()) in (number, number + num_lora) or counter.__name__ == "estimate_flops"
    with bench.context():
        gpt(idx, idx.roll(-1, 1)).backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(gpt))
    gpt.zero_grad(set_to_none=True)
    remove_lora(gpt)
    assert fingerprint(gpt) == before


COUNTERS = ("estimate_flops", "num_scaling_params", "num_matmul_params")


def total(counted: Any) -> float:
    return counted["total"] if isinstance(counted, dict) else counted


def greedy(bench: Bench, tokens: list[int], soft: Any, **options: Any) -> None:
    """Five ways to the same ids: everything again each step, our cache, the commit's cache by hand, the commit's Engine on
    one row and on three, and its naive generate."""
    prepender, expected = bench.decisive(tokens, soft, **options)
    with bench.context():
        assert list(prepender.generate(tokens, soft, max_tokens=STEPS, temperature=0.0)) == expected
        if bench.has_engine:
            cached = bench.cached_by_hand(prepender, tokens, soft)
            assert cached == expected or not bench.version.cache_is_exact
    expanded = prepender.expand(tokens, soft)
    num_placeholders = sum(token in soft for token in tokens) if isinstance(soft, dict) else 0
    num_soft = soft[VOCAB - 1].lens.sum() if isinstance(soft, dict) else soft.size(1)
    assert len(expanded) == len(tokens) + num_soft - num_placeholders
    with prepender.bind(soft):
        with bench.context():
            assert list(bench.gpt.generate(expanded, STEPS, temperature=0.0)) == expected
        if bench.has_engine:
            assert bench.engine(expanded) == [cached]
            assert bench.engine(expanded, num_samples=3) == [cached] * 3
    with bench.context(), torch.no_grad():  # inert again
        assert torch.equal(prepender(torch.tensor([PROMPT])), bench.gpt(torch.tensor([PROMPT])))


def greedy_at(place: str) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        tokens, soft, options = PLACES[place](bench)
        greedy(bench, tokens, soft, **options)

    return run


CHECKS.update({f"greedy {place}": greedy_at(place) for place in PLACES})


@check
def sliding_windows(bench: Bench) -> None:
    """With 80 soft tokens the layers' windows (32 or 64 positions) slide, in the prefill and in cached steps."""
    if bench.version.windows:
        greedy(bench, PROMPT, bench.soft(80))




@pytest.mark.parametrize(("version", "mode", "name"), pytest_cases())
def test_nanochat(version: Version, mode: str, name: str, outcome: Callable[[Version, str], dict[str, str]]) -> None:
    report = outcome(version, mode)
    if "missing" in report:
        pytest.skip(report["missing"])
    assert "crash" not in report, report["crash"]
    assert report[name] == "", f"{version.commit} {mode} {name}\n{report[name]}"


def main(folder: str, number: int, mode: str) -> None:
    sys.path.insert(0, folder)
    sys.path.append(str(Path(__file__).parent))
    torch.set_num_threads(1)  # the models are tiny
    version = VERSIONS[number]
    bench = Bench(version, mode)
    report = {}
    for name, run in CHECKS.items():
        bench.fresh(0)
        try:
            run(bench)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()[-3000:]
    print()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
