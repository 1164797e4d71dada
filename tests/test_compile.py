"""torch.compile: one graph for all values and lengths, equal to eager, forward and backward; compiled hosts and blocks too.

Tolerance: two layers of fp32 sums of at most 128 terms, of logits within ±15: 1e-6 relative, so 5e-5 for logits, 5e-6 for
losses and gradients, which are of order 1. aot_eager traces forward and backward as inductor does, without its C++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import bigram_gpt, nano_gpt, reference, tiny_hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from omni_adapters.anatomy import logits_of
from omni_adapters.features import Features, pad_rows
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.projector import Projector
from omni_adapters.shapes import BadInput

P, Q = 500, 501
LOGITS, LOSS = 5e-5, 5e-6


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def close(came: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(came, expected, rtol=0, atol=atol)


def text(B: int = 2, T: int = 6, vocab: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    idx = torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))
    return idx, idx.roll(-1, 1)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def prefix_batches(width: int) -> list[tuple[Tensor, Tensor, Any]]:
    return [(*text(seed=i), values(2, 3, width, seed=i)) for i in range(3)]


def ragged_batches(width: int) -> list[tuple[Tensor, Tensor, Any]]:
    lens = [[3, 1], [0, 2], [3, 3], [0, 0]]
    return [(*text(seed=i), Features(values(2, 3, width, seed=i), torch.tensor(row))) for i, row in enumerate(lens)]


def placeholder_batches(width: int) -> list[tuple[Tensor, Tensor, Any]]:
    """Two kinds of clips, one row without any in the last batch; places, lengths and values differ."""
    batches = []
    places = [([0, 3], [1], [5, 0]), ([2], [4, 5], [0, 1]), ([1, 2, 3], [], [5, 4])]
    for i, (first, second, other) in enumerate(places):
        idx, targets = text(seed=i)
        idx[0, first], idx[1, second] = P, P
        idx[0, other[0]], idx[1, other[1]] = Q, Q
        sounds = Features(values(3, 3, width, seed=i), torch.tensor([1 + (i + j) % 3 for j in range(3)]))
        pictures = Features(values(2, 2, width, seed=10 + i), torch.tensor([2, 1 + i % 2]))
        batches.append((idx, targets, {P: sounds, Q: pictures}))
    return batches


KINDS = {"prefix": prefix_batches, "ragged": ragged_batches, "placeholders": placeholder_batches}


def leaves(soft: Any) -> list[Tensor]:
    if isinstance(soft, dict):
        return [leaf for clips in soft.values() for leaf in leaves(clips)]
    return [soft.values] if isinstance(soft, Features) else [] if soft is None else [soft]


def loss_and_gradients(run: Callable[..., Any], gpt: nn.Module, batch: tuple[Tensor, Tensor, Any]) -> list[Tensor]:
    idx, targets, soft = batch
    result = run(idx, targets, soft)
    loss = result if isinstance(result, Tensor) else result[1] if type(result) is tuple else result.loss
    wanted = leaves(soft) + [parameter for parameter in gpt.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def prepender_of(gpt: nn.Module, kind: str, **options: Any) -> SoftTokenPrepender:
    prepender = SoftTokenPrepender(gpt, **options)
    prepender.pad_to = 20 if kind == "placeholders" else None
    return prepender


def compare(backend: str, gpt: nn.Module, kind: str, **options: Any) -> None:
    """Same losses and gradients for soft tokens and for every parameter as eager, from a single graph."""
    prepender = prepender_of(gpt, kind, **options)
    batches = KINDS[kind](prepender.anatomy.n_embd)
    expected = [loss_and_gradients(prepender, prepender, batch) for batch in batches]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(prepender, backend=counter, fullgraph=True, dynamic=False)
    for batch, eager in zip(batches, expected):
        for mine, theirs in zip(loss_and_gradients(compiled, prepender, batch), eager):
            close(mine, theirs, LOSS)
    assert counter.frame_count == 1
    again = loss_and_gradients(prepender, prepender, batches[0])  # and eager is as it was
    for mine, theirs in zip(again, expected[0]):
        assert torch.equal(mine, theirs)


# ---- the compiled prepender ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str) -> None:
    compare("aot_eager", reference(), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_inductor(kind: str) -> None:
    compare("inductor", reference(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_side_rows_after_the_first_token(kind: str) -> None:
    options = {"value_embeds": "learned"} | ({} if kind == "placeholders" else {"insert_at": 1})
    compare("aot_eager", reference(), kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [nano_gpt, bigram_gpt, lambda: bigram_gpt(checkpointed=True), tiny_hf],
                         ids=["nano_gpt", "bigram", "bigram checkpointed", "transformers"])
def test_other_hosts(build: Callable[[], nn.Module], kind: str) -> None:
    compare("aot_eager", build(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str) -> None:
    prepender = prepender_of(reference(), kind)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(prepender, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for idx, _, soft in KINDS[kind](32):
            close(compiled(idx, None, soft), prepender(idx, None, soft), LOGITS)
    assert counter.frame_count == 1


@pytest.mark.parametrize("placed", [False, True], ids=["ragged", "placeholders"])
def test_a_row_beyond_pad_to_is_nan_and_its_neighbours_are_not(placed: bool) -> None:
    """Compiled code cannot raise: row 0 of 3 + 2 slots is as in eager mode, row 1 of 3 + 4 slots is NaN throughout."""
    prepender = SoftTokenPrepender(reference())
    clips = Features(torch.randn(2, 4, 32), torch.tensor([2, 4]))
    idx, soft = torch.tensor([[1, 2, 3], [4, 5, 6]]), clips
    if placed:
        idx, soft = torch.tensor([[1, 2, P, 3], [4, 5, 6, P]]), {P: clips}
    with torch.no_grad():
        expected = prepender(idx, None, soft)
        prepender.pad_to = 6
        one, two = torch.compile(prepender, backend="eager", fullgraph=True, dynamic=False)(idx, None, soft)
    close(one, expected[0], LOGITS)
    assert two.isnan().all()


def test_rows_that_fit_are_right_where_text_and_sound_of_the_longest_rows_would_not() -> None:
    """Shapes alone bound a row by 36 + 16 slots, of which the GPT has 48; row 0 takes 36 + 4 and row 1 too many."""
    gpt = nano_gpt()
    prepender = SoftTokenPrepender(gpt)
    assert prepender.anatomy.position_limit == 48
    idx = text(T=36)[0]
    soft = Features(torch.randn(2, 16, prepender.anatomy.n_embd), torch.tensor([4, 16]))
    with torch.no_grad():
        expected = prepender.hidden_states(idx[:1], Features(soft.values[:1], soft.lens[:1]))
        one, two = torch.compile(prepender.hidden_states, backend="eager", fullgraph=True, dynamic=False)(idx, soft)
    close(one, expected[0], LOGITS)
    assert two.isnan().all()


@pytest.mark.parametrize("kind", ["ragged", "placeholders"])
def test_hidden_states(kind: str) -> None:
    prepender = prepender_of(reference(), kind)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(prepender.hidden_states, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for idx, _, soft in KINDS[kind](32):
            close(compiled(idx, soft), prepender.hidden_states(idx, soft), LOGITS)
    assert counter.frame_count == 1


def test_without_soft_tokens() -> None:
    """The bare GPT's bits, where the backend keeps them, from one graph; taking turns with soft tokens makes one more."""
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(prepender, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            idx, targets = text(seed=seed)
            assert torch.equal(compiled(idx, targets), gpt(idx, targets))
        assert counter.frame_count == 1
        for seed in range(3):
            idx, targets = text(seed=seed)
            soft = values(2, 3, 32, seed=seed)
            close(compiled(idx, targets, soft), prepender(idx, targets, soft), LOSS)
            assert torch.equal(compiled(idx, targets), gpt(idx, targets))
        assert counter.frame_count == 2


def test_other_shapes_compile_once_each_and_stay_right() -> None:
    prepender = SoftTokenPrepender(reference())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(prepender, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for T_soft in (1, 2, 4, 1, 2, 4):
            idx, targets = text(seed=T_soft)
            soft = values(2, T_soft, 32, seed=T_soft)
            close(compiled(idx, targets, soft), prepender(idx, targets, soft), LOSS)
    assert counter.frame_count == 3


def test_dynamic_shapes_stay_right() -> None:
    """Not promised to be fast: what changes its shape may be compiled again or break the graph."""
    prepender = SoftTokenPrepender(reference())
    compiled = torch.compile(prepender, backend="eager")
    with torch.no_grad():
        for T_soft in (2, 3, 5):
            idx, targets = text(seed=T_soft, T=4 + T_soft)
            soft = Features(values(2, T_soft, 32, seed=T_soft), torch.tensor([T_soft, 1]))
            close(compiled(idx, targets, soft), prepender(idx, targets, soft), LOSS)


def test_bf16() -> None:
    """bf16 rounds each of some ten sums to 2⁻⁸; eager and aot_eager round at the same places but for fused casts."""
    prepender = SoftTokenPrepender(reference().bfloat16())
    compiled = torch.compile(prepender, backend="aot_eager", fullgraph=True, dynamic=False)
    for idx, targets, soft in ragged_batches(32)[:2]:
        close(compiled(idx, targets, soft), prepender(idx, targets, soft), 0.05)


class Ears(nn.Module):
    """Projector and prepender as one trainable module around a frozen GPT."""

    def __init__(self, gpt: nn.Module, stack: int = 2) -> None:
        super().__init__()
        self.projector = Projector(10, 32, 16, stack=stack, zero_init=False)
        self.prepender = SoftTokenPrepender(gpt.requires_grad_(False))

    def forward(self, idx: Tensor, targets: Tensor, frames: Tensor, lens: Tensor) -> Tensor:
        return self.prepender(idx, targets, self.projector(Features(frames, lens)))


def test_a_training_loop_of_projector_and_prepender() -> None:
    torch.manual_seed(0)
    gpt, steps = reference(), []
    for compiled in (False, True):
        torch.manual_seed(1)
        ears = Ears(gpt)
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(ears, backend=counter, fullgraph=True, dynamic=False) if compiled else ears
        optimizer = torch.optim.SGD(ears.projector.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            idx, targets = text(seed=step)
            loss = run(idx, targets, values(2, 7, 10, seed=step).detach(), torch.tensor([7 - step, 2 * step]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert counter.frame_count == int(compiled)
        steps.append(torch.stack(losses))
        ears.prepender.remove()
    close(*steps, LOSS)
    assert len(set(steps[0].tolist())) == 4


# ---- refusals while tracing ------------------------------------------------------------------------------------------


REFUSED = {
    "another width": (lambda: (*text(), torch.zeros(2, 3, 31)), "31 wide"),
    "rows": (lambda: (*text(), torch.zeros(3, 3, 32)), "3 rows of soft tokens for 2 rows of idx"),
    "too long": (lambda: (*text(), torch.zeros(2, 640, 32)), "at most 640"),
    "no pad_to": (lambda: placeholder_batches(32)[0], "without pad_to"),
    "targets": (lambda: (text()[0], text(T=9)[1], torch.zeros(2, 9, 32)), "targets (2, 9)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_shapes_show_to_be_wrong_is_refused(case: str) -> None:
    build, said = REFUSED[case]
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    idx, targets = text()
    bare = gpt(idx, targets)
    compiled = torch.compile(prepender, backend="eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception) as error:  # dynamo wraps what is raised while it traces
        compiled(*build())
    assert said in str(error.value)
    assert torch.equal(gpt(idx, targets), bare) and torch.equal(prepender(idx, targets), bare)
    soft = values(2, 2, 32)
    close(compiled(idx, targets, soft), prepender(idx, targets, soft), LOSS)


# ---- compiled hosts --------------------------------------------------------------------------------------------------


def call_all(prepender: SoftTokenPrepender, width: int) -> list[Tensor]:
    """With soft tokens, without, with, from lengths that differ; logits and loss."""
    came = []
    with torch.no_grad():
        for idx, targets, soft in ragged_batches(width)[:2]:
            came += [logits_of(prepender(idx, None, soft)), logits_of(prepender(idx))]
            loss = prepender(idx, targets, soft)
            came.append(loss[1] if type(loss) is tuple else loss)
    return came


@pytest.mark.parametrize("warm", [pytest.param(False, id="fresh"), pytest.param(True, id="already run", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [reference, bigram_gpt, nano_gpt], ids=["reference", "bigram", "nano_gpt"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_a_compiled_host_hears(build: Callable[[], nn.Module], how: str, warm: bool) -> None:
    """A host that was compiled, and perhaps run, before the prepender came. By default torch.compile does not look whether
    hooks have come since: a graph from before would hear nothing. Equal to the bare host, or refused."""
    eager = SoftTokenPrepender(build())
    expected = call_all(eager, eager.anatomy.n_embd)
    gpt = build()
    if how == "wrapped":
        gpt = torch.compile(gpt, backend="eager", dynamic=False)
    elif how == "in place":
        gpt.compile(backend="eager", dynamic=False)
    else:
        for block in gpt.transformer["h"]:
            block.compile(backend="eager", dynamic=False)
    if warm:
        with torch.no_grad():
            for T in (6, 8, 9):  # the lengths that follow, fused and bare
                idx, targets = text(T=T)
                gpt(idx)
                gpt(idx, targets)
    try:
        came = call_all(SoftTokenPrepender(gpt), eager.anatomy.n_embd)
    except BadInput as refusal:
        assert warm and "compile" in str(refusal)
        return
    for mine, theirs in zip(came, expected):
        close(mine, theirs, LOGITS)


def test_a_compiled_host_after_remove() -> None:
    gpt = torch.compile(reference(), backend="eager", dynamic=False)
    prepender = SoftTokenPrepender(gpt)
    idx, targets = text()
    bare = reference()(idx, targets)
    prepender(idx, targets, values(2, 3, 32))
    assert prepender.remove() is gpt
    assert torch.equal(gpt(idx, targets), bare)
    again = SoftTokenPrepender(gpt)
    soft = values(2, 3, 32)
    close(again(idx, targets, soft), SoftTokenPrepender(reference())(idx, targets, soft), LOSS)


def test_a_compiled_host_in_bind() -> None:
    gpt = reference()
    prepender = SoftTokenPrepender(gpt)
    soft = values(1, 3, 32).detach()
    ids = torch.tensor([prepender.expand([5, 6, 7], soft)])
    compiled = torch.compile(gpt, backend="eager", dynamic=False)
    with torch.no_grad():
        with prepender.bind(soft):
            expected = gpt(ids)
            close(expected[:, -1], prepender(torch.tensor([[5, 6, 7]]), None, soft)[:, -1], LOGITS)
            close(compiled(ids), expected, LOGITS)
        close(compiled(ids), gpt(ids), LOGITS)


def test_compiled_wrappers_are_blocks_too() -> None:
    """A host must not skip blocks that were wrapped: this library's own GPT included."""
    gpt, idx = reference(), text()[0]
    bare = gpt(idx)
    for layer in range(2):
        gpt.transformer["h"][layer] = torch.compile(gpt.transformer["h"][layer], backend="eager")
    close(gpt(idx), bare, LOGITS)


@pytest.mark.parametrize("build", [reference, bigram_gpt], ids=["reference", "bigram"])
def test_anatomy_of_hosts_compiled_in_place_or_by_block(build: Callable[[], nn.Module]) -> None:
    from omni_adapters.anatomy import discover_anatomy

    expected = discover_anatomy(build())
    whole, blocks = build(), build()
    whole.compile(backend="eager")
    for block in blocks.transformer["h"]:
        block.compile(backend="eager")
    for gpt in (whole, blocks):
        for _ in range(2):
            assert discover_anatomy(gpt) == expected
            gpt(text()[0])


def test_pad_rows_feeds_a_compiled_prepender() -> None:
    prepender = prepender_of(reference(), "placeholders")
    compiled = torch.compile(prepender, backend="eager", fullgraph=True, dynamic=False)
    soft = {P: pad_rows([torch.randn(2, 32), torch.randn(3, 32)])}
    idx = torch.tensor([[P, 5, 6], [7, P, 8]])
    with torch.no_grad():
        close(compiled(idx, None, soft), prepender(idx, None, soft), LOGITS)
