"""Read a GPT nobody wrote for us: which tables see token ids, where the head is, what it does to logits.

Attributes first, then two forwards of two tokens each, watched from hooks that are gone afterwards. The second forward
feeds the same ids in the other order: a table fed by ids sees its input change with them, a position table does not, and
a table fed by something computed from ids (a hash of bigrams) sees neither. A third forward replaces what the head
returns by a known ramp z, so that the function from z to logits can be read off: a crop, and c·tanh(z/c) with a c that
exists only as a local variable of the host's forward. `loss_is_plain` asks the same way, with targets, what the loss is.

The model comes back bit-identical: parameters, buffers, random state, training mode, hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.shapes import BadInput, listing, shape

HUGE = 1e4      # a head output that any softcap has long flattened to its constant
RAMP = 40.0     # the probe's head outputs span ±RAMP
CacheName = Literal["kv_cache", "past_key_values", "cache"]
READS_FLAT = 2  # tokens in a probe; the least that has a neighbour


@dataclass(frozen=True)
class Anatomy:
    """Where a GPT keeps what soft tokens must meet. Names are module paths for `gpt.get_submodule`.

    wte:            token embedding (num_embeddings, n_embd).
    side_tables:    other tables fed by `idx` itself (value embeddings).
    derived_tables: tables fed by ids computed from `idx` and its neighbour (bigram hashes).
    lm_head:        module from hidden states to vocabulary.
    head_source:    module whose output carries all positions, where the host crops to the last one before `lm_head`
                    (nanoGPT without targets); None where `lm_head` itself reads every position.
    smear_gate:     gate of the previous token's embedding, or None.
    n_embd, vocab_size, padded_vocab_size: widths of hidden states, logits, head.
    softcap:        c of c·tanh(z/c), or None.
    head_is_plain:  logits are the head's output cropped and, where softcap is set, capped; False if anything else.
    position_limit: most positions one forward can have, or None if the host sets none.
    cache:          name of the forward argument that takes a KV cache, or None.
    cache_shape:    (n_layer, n_kv_head, head_dim) for hosts with `kv_cache`, else None.
    output:         what forward returns.
    dtype:          dtype of the hidden states the head reads.
    """

    wte: str
    side_tables: tuple[str, ...]
    derived_tables: tuple[str, ...]
    lm_head: str
    head_source: str | None
    smear_gate: str | None
    n_embd: int
    num_embeddings: int
    vocab_size: int
    padded_vocab_size: int
    softcap: float | None
    head_is_plain: bool
    position_limit: int | None
    cache: CacheName | None
    cache_shape: tuple[int, int, int] | None
    output: Literal["tensor", "tuple", "model_output"]
    dtype: torch.dtype


@dataclass
class Calls:
    """What hooks saw during one forward: (module name, input, output) in calling order."""

    seen: list[tuple[str, Any, Any]]
    result: Any


def discover_anatomy(gpt: nn.Module) -> Anatomy:
    """Read `gpt`. Raises BadInput listing what was looked for and what was found if it cannot be read."""
    gpt = unwrap(gpt)
    if any(p.is_meta for p in gpt.parameters()):
        raise BadInput("discover_anatomy", f"{type(gpt).__name__} on the meta device", "a model with weights",
                       "load the checkpoint first")
    head_name = find_head(gpt)
    with untouched(gpt):
        ids = torch.tensor([[1, 0]], device=next(gpt.parameters()).device)
        forward = runner(gpt, ids)
        first, swapped = watch(gpt, forward, ids), watch(gpt, forward, ids.flip(1))
        tables = sort_tables(gpt, first, swapped, ids)
        head_in, head_out = head_call(gpt, first, head_name)
        ramp, logits = probe_head(gpt, forward, ids, head_name, head_out)
    softcap, plain = read_head(ramp, logits)
    wte = find_wte(gpt, tables["ids"], head_in.size(-1))
    output: Literal["tensor", "tuple", "model_output"] = (
        "tensor" if isinstance(first.result, Tensor) else "tuple" if type(first.result) is tuple else "model_output")
    cache = find_cache(gpt, output)
    return Anatomy(
        wte=wte,
        side_tables=tuple(name for name in tables["ids"] if name != wte),
        derived_tables=tuple(tables["derived"]),
        lm_head=head_name,
        head_source=None if head_in.size(1) == READS_FLAT else find_head_source(gpt, first, head_name, head_in),
        smear_gate=next((name for name, _, _ in first.seen if name.split(".")[-1] == "smear_gate"), None),
        n_embd=head_in.size(-1),
        num_embeddings=table(gpt, wte).num_embeddings,
        vocab_size=logits.size(-1),
        padded_vocab_size=ramp.size(-1),
        softcap=softcap,
        head_is_plain=plain,
        position_limit=find_position_limit(gpt, tables["positions"]),
        cache=cache,
        cache_shape=cache_sizes(gpt) if cache == "kv_cache" else None,
        output=output,
        dtype=head_in.dtype,
    )


def unwrap(gpt: nn.Module) -> nn.Module:
    """The module torch.compile was given, if it was."""
    return getattr(gpt, "_orig_mod", gpt)


def plain_name(path: str) -> str:
    """A module's or parameter's path without what torch.compile put into it."""
    return path.replace("_orig_mod.", "")


def logits_of(result: Any) -> Tensor:
    """The logits in whatever a host returns: a tensor, (logits, loss), or an output with `.logits`."""
    found = result[0] if type(result) is tuple else getattr(result, "logits", result)
    if not isinstance(found, Tensor):
        raise BadInput("discover_anatomy", f"a forward that returns {type(result).__name__}",
                       "logits, (logits, loss), or an output with .logits")
    return found


@contextmanager
def untouched(gpt: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or compilation; training flags, buffers and random state are put back."""
    flags = [(module, module.training) for module in gpt.modules()]
    devices = {p.device for p in gpt.parameters() if p.device.type == "cuda"}
    buffers = [(module, name, buffer, buffer.clone())
               for module in gpt.modules() for name, buffer in module._buffers.items() if buffer is not None]
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]), torch.no_grad(), \
            torch.compiler.set_stance("force_eager"):
        for module, _ in flags:
            module.training = False
        try:
            yield
        finally:
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # transformers' dynamic rotary tables are replaced, others written to
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            for module, flag in flags:
                module.training = flag


def loss_of(result: Any) -> Tensor:
    """The loss in what a host returns for targets: itself, (logits, loss), or an output with `.loss`."""
    if isinstance(result, Tensor):
        return result
    loss = result[1] if isinstance(result, tuple) else result.loss
    assert isinstance(loss, Tensor)
    return loss


def runner(gpt: nn.Module, ids: Tensor) -> Callable[..., Any]:
    """A forward that runs: as it is, or under bf16 autocast, which hosts with mixed parameter dtypes count on."""
    device = ids.device.type
    failures = []
    for name, context in (("plain", nullcontext), ("bf16 autocast", lambda: torch.autocast(device, torch.bfloat16))):
        def forward(*args: Tensor, context: Any = context) -> Any:
            with context():
                return gpt(*args)
        try:
            forward(ids)
            return forward
        except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
            failures.append(f"{name}: {error}")
    raise BadInput("discover_anatomy", f"{type(gpt).__name__}, whose forward of two tokens fails ({'; '.join(failures)})",
                   "a GPT that runs gpt(idx) on a (1, 2) tensor of ids")


def watch(gpt: nn.Module, forward: Callable[[Tensor], Any], ids: Tensor) -> Calls:
    """Run once and write down every sub-module call that takes or gives one tensor."""
    seen: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            seen.append((name, given, output if isinstance(output, Tensor) else None))
        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in gpt.named_modules() if name]
    try:
        return Calls(seen, forward(ids))
    finally:
        for handle in handles:
            handle.remove()


def table(gpt: nn.Module, name: str) -> nn.Embedding:
    module = gpt.get_submodule(name)
    assert isinstance(module, nn.Embedding)
    return module


def sort_tables(gpt: nn.Module, first: Calls, swapped: Calls, ids: Tensor) -> dict[str, list[str]]:
    """Names of embedding tables by what feeds them: "ids", "positions", or ids "derived" from neighbours."""
    kinds: dict[str, list[str]] = {"ids": [], "positions": [], "derived": []}
    again = {name: given for name, given, _ in swapped.seen}
    for name, given, _ in first.seen:
        if given is None or not isinstance(gpt.get_submodule(name), nn.Embedding):
            continue
        if torch.equal(given, ids) and torch.equal(again[name], ids.flip(1)):
            kind = "ids"
        elif torch.equal(given, again[name]):
            kind = "positions"
        else:
            kind = "derived"
        if name not in kinds[kind]:
            kinds[kind].append(name)
    return kinds


def find_head(gpt: nn.Module) -> str:
    """By name, or by transformers' accessor."""
    names = {id(module): name for name, module in gpt.named_modules()}
    accessor = getattr(gpt, "get_output_embeddings", None)
    for candidate in (getattr(gpt, "lm_head", None), accessor() if callable(accessor) else None):
        if isinstance(candidate, nn.Module) and id(candidate) in names:
            return names[id(candidate)]
    raise unreadable(gpt, "a module named lm_head, or get_output_embeddings()")


def find_wte(gpt: nn.Module, fed_by_ids: list[str], width: int) -> str:
    """The first table that ids reach and that is as wide as the hidden states."""
    wide = [name for name in fed_by_ids if table(gpt, name).embedding_dim == width]
    for name in wide:
        if name.split(".")[-1] in ("wte", "embed_tokens", "tok_embeddings"):
            return name
    if wide:
        return wide[0]
    raise unreadable(gpt, f"an nn.Embedding fed by idx and {width} wide, as the head's input is")


def head_call(gpt: nn.Module, calls: Calls, head_name: str) -> tuple[Tensor, Tensor]:
    """The head's input (1, 2 or 1, n_embd) and output."""
    for name, given, output in calls.seen:
        if name == head_name and given is not None and output is not None:
            return given, output
    raise unreadable(gpt, f"a call of {head_name} with hidden states during forward")


def find_head_source(gpt: nn.Module, calls: Calls, head_name: str, head_in: Tensor) -> str:
    """The last module that gives all positions, of which the head reads only the last."""
    names = [
        name for name, _, output in calls.seen
        if name != head_name and output is not None and output.shape == (1, READS_FLAT, head_in.size(-1))
        and torch.equal(output[:, -1:], head_in)
    ]
    if not names:
        raise unreadable(gpt, f"a module whose output {shape([1, READS_FLAT, head_in.size(-1)])} is cropped to the last "
                              f"position before {head_name}")
    return names[-1]


def find_position_limit(gpt: nn.Module, position_tables: list[str]) -> int | None:
    """Length of a position table, of a rotary table `cos` (1, S, 1, D/2) or (S, D/2), or what the config names."""
    limits = [table(gpt, name).num_embeddings for name in position_tables]
    for name, buffer in gpt.named_buffers():
        if name.split(".")[-1] == "cos" and buffer.ndim >= 2:
            limits.append(buffer.size(1) if buffer.ndim == 4 else buffer.size(0))
    if not limits:
        limits = [n for n in (getattr(getattr(gpt, "config", None), "max_position_embeddings", None),) if n]
    return min(limits, default=None)


def find_cache(gpt: nn.Module, output: str) -> CacheName | None:
    """nanochat's, or transformers', which comes back in a ModelOutput; "cache" is its name from transformers 5.24 on."""
    parameters = inspect.signature(gpt.forward).parameters
    if "kv_cache" in parameters:
        return "kv_cache"
    names: tuple[CacheName, ...] = ("cache", "past_key_values") if output == "model_output" else ()
    return next((name for name in names if name in parameters), None)


def cache_sizes(gpt: nn.Module) -> tuple[int, int, int] | None:
    """(n_layer, n_kv_head, head_dim), read from a nanochat-style config."""
    config = getattr(gpt, "config", None)
    try:
        return config.n_layer, config.n_kv_head, config.n_embd // config.n_head  # type: ignore[union-attr]
    except AttributeError:
        return None


def probe_head(gpt: nn.Module, forward: Callable[[Tensor], Any], ids: Tensor, head_name: str,
               head_out: Tensor) -> tuple[Tensor, Tensor]:
    """Let the head return HUGE, then a ramp of ±RAMP; gives what it returned and the logits, both (V,) in fp32."""
    ramp = torch.linspace(-RAMP, RAMP, head_out.size(-1), device=head_out.device)
    ramp[0] = HUGE
    ramp = ramp.to(head_out.dtype)
    with saying(gpt.get_submodule(head_name), ramp):
        logits = logits_of(forward(ids))
    return ramp.float(), logits[0, -1].float()


@contextmanager
def saying(head: nn.Module, row: Tensor) -> Iterator[list[nn.Module]]:
    """Inside, the head returns `row` (V,) at every position; what is yielded grows by it with each call."""
    asked: list[nn.Module] = []

    def say(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        asked.append(module)
        return row.to(out.dtype).expand_as(out).clone()

    handle = head.register_forward_hook(say)
    try:
        yield asked
    finally:
        handle.remove()


def loss_is_plain(gpt: nn.Module, anatomy: Anatomy) -> bool:
    """Whether what `gpt(idx, targets)` returns as its loss is the mean cross-entropy of its logits: not a sum, nothing added,
    nothing smoothed, in training mode too. True where the host takes no `targets`, or returns a ModelOutput, whose loss the
    prepender computes. The model comes back as from `discover_anatomy`.

    The head says 0 but for two targets, so that no term of some hundredths is lost beside the loss. A host that goes round its
    head is asked about its own logits, in evaluation mode. Tolerances: 1e-4 in fp32, three roundings of 12 to 2⁻⁹ in halves.
    """
    gpt = unwrap(gpt)
    if anatomy.output == "model_output" or "targets" not in inspect.signature(gpt.forward).parameters or anatomy.vocab_size < 2:
        return True
    ids = torch.tensor([[1, 0]], device=next(gpt.parameters()).device)
    targets = torch.tensor([[anatomy.vocab_size // 3, anatomy.vocab_size - 1]], device=ids.device)
    row = torch.zeros(anatomy.padded_vocab_size, device=ids.device)
    row[targets[0]] = row.new_tensor([12.0, 11.0])
    with untouched(gpt):
        forward = runner(gpt, ids)
        try:
            with saying(gpt.get_submodule(anatomy.lm_head), row) as asked:
                logits = logits_of(forward(ids))[0, -1:]
                asked.clear()
                for module in gpt.modules():
                    module.training = True
                loss = loss_of(forward(ids, targets))
            if not asked:
                for module in gpt.modules():
                    module.training = False
                logits, loss = logits_of(forward(ids))[0], loss_of(forward(ids, targets))
        except Exception:  # a host's loss may fail in any way it likes: it is not this one then
            return False
    expected = F.cross_entropy(logits.float().expand(2, -1), targets[0])
    off = 1e-4 if logits.dtype == torch.float32 else 3 * 12 * 2.0**-9
    return loss.numel() == 1 and bool((loss.float() - expected).abs() <= off * (1 + expected))


def read_head(ramp: Tensor, logits: Tensor) -> tuple[float | None, bool]:
    """(softcap or None, whether crop and softcap explain the logits).

    The tolerance is one bf16 step (2⁻⁸) of the cap on each of z/c, tanh and the product: hosts cap in bf16 or fp32.
    """
    z = ramp[: logits.size(-1)]
    if torch.equal(z, logits):
        return None, True
    cap = float(logits[0])
    if not 0 < cap < HUGE / 2:
        return None, False
    explained = torch.allclose(cap * torch.tanh(z / cap), logits, rtol=0, atol=3 * cap * 2**-8)
    return (cap, True) if explained else (None, False)


def unreadable(gpt: nn.Module, expected: str) -> BadInput:
    tables = [f"{name} {shape(m.weight.shape)}" for name, m in gpt.named_modules() if isinstance(m, nn.Embedding)]
    children = [f"{name}: {type(m).__name__}" for name, m in gpt.named_children()]
    came = (f"{type(gpt).__name__} with embeddings [{listing(tables)}] and children [{listing(children)}]")
    return BadInput("discover_anatomy", came, expected, "write to us with this message if it is a GPT")
