"""Cross-entropy of a linear head, softcap included, without the logits of a whole batch.

    z = hidden · weightᵀ          (N, V)
    l = c · tanh(z / c)           the softcap c of nanochat (15, 20) and Gemma (30); without one, l = z
    loss = −log softmax(l)[target]

Notable:
- rows whose target is `ignore_index` never meet the weight: what stands in them, NaN included, is never read
- `plain` is this equation in torch and the specification. `chunked` makes loss and gradients together, some rows at a time
  in one reused buffer, and keeps only what has the shape of `hidden` or `weight`
- with t a row's target and rest = Σ_{j≠t} e^{l_j − l_t}, `chunked` computes loss = log(1 + rest), ∂loss/∂l_j =
  e^{l_j − l_t} / (1 + rest) and ∂loss/∂l_t = −rest / (1 + rest): nothing cancels where the target is nearly certain
- |l_j − l_t| ≤ 2c, so e^{l_j − l_t} stays in range by itself and no row maximum is looked for
- both compute in fp32 (fp64 where an input is fp64), whatever the inputs or autocast say: e^l turns an absolute error of l
  into a relative one of the loss's gradient, and a bf16 logit near 15 is off by up to 0.03
- on CUDA, `triton` and `cublas` multiply in the inputs' own dtype and sum in fp32, on tensor cores
  (`omni_adapters.kernels.linear_cross_entropy`); everything around that, from ignored rows to torch.compile, is shared
(Rows in chunks, gradients in the forward: Liger-Kernel, arXiv:2410.10989.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from omni_adapters.shapes import BadInput, MissingExtra, listing, shape

WHERE = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
DEVICE_FORMS = ("triton", "cublas")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.finfo(torch.float32).max
CHUNK_BYTES = 2**26  # of logits at a time: 512 rows of 32768 in fp32. A chunk reads the whole weight: 64 rows take 1.3 × the time
CHUNK_ROWS = 128  # at least, where a vocabulary is so large that CHUNK_BYTES hold fewer rows
BLOCK_BYTES = 2**22  # of logits that go through all element-wise passes together: they and their copy stay in L2 and L3
RANGE = 64.0  # logits: e^64 = 6e27 times any vocabulary is far from fp32's largest, e^88, and e^−64 from its smallest
WORTH_CHUNKING = 2**18  # logits (rows not ignored × V) from which chunks win: below, plain's tensors stay in cache too


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None,
                         ignore_index: int = -1, reduction: Literal["mean", "sum", "none"] = "mean",
                         impl: Literal["auto", "plain", "chunked", "triton", "cublas"] = "auto") -> Tensor:
    """−log softmax(softcap · tanh(hidden · weightᵀ / softcap))[targets]; gradients to `hidden` and `weight`.

    hidden:    (..., C), fp16, bf16, fp32 or fp64.
    weight:    (V, C), of these dtypes too. Its gradient is computed only where it requires one.
    targets:   (...) int64, in 0 … V − 1, or `ignore_index`.
    softcap:   in logits, > 0; None leaves logits as they are.
    reduction: "mean" over the rows not ignored, "sum", or "none": one loss a row, 0 at ignored rows.
    impl:      "plain" or "chunked", or on CUDA, beside triton, "triton" (a frozen weight, a softcap up to 32, both inputs bf16
               or both fp32) or "cublas" (any). "auto" is chunked where that is faster than plain: from 2¹⁸ logits on, and with
               a trained weight from C / 2 rows on. Rows not ignored count; under torch.compile, which cannot count those, all
               do. On CUDA it is triton where both inputs are bf16 and that can run, else cublas, and without triton as above.

    Returns a scalar, or (...) for "none", in fp32, or fp64 where an input is fp64, whatever autocast says; plain's backward
    multiplies in autocast's dtype where it runs, or is compiled, under autocast. Gradients have their input's dtype, rounded
    once. Ignored rows get a gradient of exactly 0.

    The operator behind all other forms has no rules for torch.func and forward-mode differentiation: there "auto" is plain, and
    the others are refused, but not under torch.compile, where nobody looks.

    Chunked holds a copy of half-precision weights in fp32, one buffer of 64 MiB (128 rows where V is larger than 2¹⁷) and,
    where the weight is trained, its gradient in fp32; it refuses double backward. With reduction="none" and a trained weight,
    backward computes the logits again, since each row's share of the weight's gradient waits for that row's upstream.

    Triton and cublas hold 32 MB of buffers at any N and the gradient of hidden, in hidden's dtype for a mean: that is rounded
    twice where what comes back to the mean is no power of two. With "sum" and "none" it is held in fp32 until backward. Where
    the weight is trained, its gradient in fp32 is held, and logits of as many bytes. Cublas logits have the inputs' dtype, as
    in a GPT that casts its logits to fp32 after its head. The same bits come twice.

    Raises BadInput for shapes that do not meet, targets out of range, softcap ≤ 0, and a mean over no rows. Under
    torch.compile values are not looked at: there a mean over no rows is NaN.
    """
    check_form(hidden, weight, targets, softcap, reduction)
    V, C = weight.shape
    flat_hidden, flat_targets = hidden.reshape(-1, C), targets.reshape(-1)
    if impl != "plain" and transformed(hidden, weight):
        if impl != "auto":
            raise BadInput(WHERE, f"impl = {impl!r} under torch.func or forward-mode differentiation", "plain backward passes",
                           'use impl="plain"')
        impl = "plain"
    rows = check_values(flat_targets, V, ignore_index, reduction)
    if impl in DEVICE_FORMS or (impl == "auto" and beside_triton(hidden, weight)):
        form = device_form(impl, hidden, weight, softcap)
        return on_device(form, flat_hidden, weight, flat_targets, softcap, ignore_index, reduction).reshape(
            targets.shape if reduction == "none" else ())
    compute = implementation(impl, rows, weight)
    losses = compute(flat_hidden, weight, flat_targets, softcap, ignore_index, reduction == "none")
    if reduction == "mean":
        return losses / (flat_targets != ignore_index).sum()
    return losses.reshape(targets.shape) if reduction == "none" else losses


def implementation(impl: str, rows: int, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor, float | None, int, bool], Tensor]:
    """(hidden (N, C), weight, targets (N,), softcap, ignore_index, by_row) → losses (N,) if by_row, else their sum."""
    named = {"plain": plain, "chunked": chunked}
    if impl == "auto":
        return chunked if worth_chunking(rows, weight) else plain
    if impl not in named:
        raise BadInput(WHERE, f"impl = {impl!r}", f"one of auto, {', '.join((*named, *DEVICE_FORMS))}")
    return named[impl]


def saves_logits(targets: Tensor, weight: Tensor, ignore_index: int = -1) -> bool:
    """Whether `impl="auto"` is the better of itself and logits written out. On CUDA: where the kernels can run, but not under
    torch.compile, whose CUDA graphs they would cut in two. Elsewhere by rows, which torch.compile cannot count."""
    compiling = torch.compiler.is_compiling()
    if targets.is_cuda:
        return not compiling and beside_triton(weight, weight)
    rows = targets.numel() if compiling else int((targets != ignore_index).sum())
    return implementation("auto", rows, weight) is not plain


def worth_chunking(rows: int, weight: Tensor) -> bool:
    """Measured on two CPU threads, V = 512 … 32768. A trained weight costs chunks more passes over its gradient (V · C),
    which the passes they save over logits (rows · V) must pay for."""
    V, C = weight.shape
    return rows * V >= WORTH_CHUNKING and (rows >= C / 2 or not wants_gradient(weight))


def wants_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def check_form(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, reduction: str) -> None:
    """Everything that can be said without looking at values."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.size(-1) != weight.size(-1):
        raise BadInput(WHERE, f"hidden {shape(hidden.shape)}, weight {shape(weight.shape)}", "hidden (..., C), weight (V, C)",
                       "weight is lm_head.weight as it is, not transposed")
    if 0 in weight.shape:
        raise BadInput(WHERE, f"weight {shape(weight.shape)}", "a row for each word, of at least one channel")
    if hidden.device != weight.device or targets.device != hidden.device:
        raise BadInput(WHERE, f"hidden on {hidden.device}, weight on {weight.device}, targets on {targets.device}", "one device")
    if targets.shape != hidden.shape[:-1]:
        raise BadInput(WHERE, f"targets {shape(targets.shape)}", f"one a row of hidden, {shape(hidden.shape[:-1])}")
    if targets.dtype != torch.int64:
        raise BadInput(WHERE, f"targets of {targets.dtype}", "torch.int64")
    if not (hidden.dtype in DTYPES and weight.dtype in DTYPES):
        raise BadInput(WHERE, f"hidden of {hidden.dtype}, weight of {weight.dtype}", listing(DTYPES), "cast them first")
    if softcap is not None and (isinstance(softcap, str) or not 0 < softcap <= LARGEST):
        raise BadInput(WHERE, f"softcap = {softcap!r}", "a finite softcap > 0", "softcap=None leaves logits as they are")
    if reduction not in REDUCTIONS:
        raise BadInput(WHERE, f"reduction = {reduction!r}", f"one of {', '.join(REDUCTIONS)}")


def check_values(targets: Tensor, V: int, ignore_index: int, reduction: str) -> int:
    """How many rows are not ignored; all of them under torch.compile, where nothing is checked."""
    if torch.compiler.is_compiling():
        return targets.numel()
    graded = targets != ignore_index
    kept = targets.where(graded, 0)
    found = torch.stack([graded.sum(), *kept.aminmax()]).cpu() if targets.numel() else (0, 0, 0)  # one read of the device
    count, low, high = (int(value) for value in found)
    if count == 0 and reduction == "mean":
        raise BadInput(WHERE, f"{targets.numel()} rows, all of them ignored", "a row to take the mean over",
                       "leave such a batch out")
    if count and (low < 0 or high >= V):
        low, high = torch.stack(targets[graded].aminmax()).tolist()
        raise BadInput(WHERE, f"targets from {low} to {high}", f"0 … {V - 1}, or {ignore_index}")
    return count


def transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


# ---- the specification -----------------------------------------------------------------------------------------------


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, by_row: bool) -> Tensor:
    """The equation. Ignored rows are left out; under torch.compile, where that has no shape, they count as zeros."""
    graded, dtype = targets != ignore_index, accumulation_dtype(hidden, weight)
    if torch.compiler.is_compiling():
        losses = equation(hidden.where(graded[:, None], 0), weight, targets, softcap, ignore_index, dtype)
    else:
        losses = equation(hidden[graded], weight, targets[graded], softcap, ignore_index, dtype)
        if by_row:
            losses = losses.new_zeros(targets.shape).masked_scatter(graded, losses)
    return losses if by_row else losses.sum()


def equation(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int,
             dtype: torch.dtype) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


# ---- in chunks -------------------------------------------------------------------------------------------------------


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, by_row: bool) -> Tensor:
    """`plain` without its (N, V) tensors."""
    return loss_and_gradients(hidden, weight, targets, None, None if softcap is None else float(softcap), ignore_index, by_row,
                              wants_gradient(hidden), wants_gradient(weight))[0]


# An operator of its own: torch.compile takes it into its graph as it is, with loops and row counts that depend on values.
# How many rows count is read on the host, which a CUDA graph cannot do: the tag keeps the operator out of one.
@torch.library.custom_op("omni_adapters::linear_cross_entropy", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None, softcap: float | None,
                       ignore_index: int, by_row: bool, hidden_wanted: bool, weight_wanted: bool, form: str = "chunked",
                       mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, Σ upstream · ∂loss/∂hidden, Σ upstream · ∂loss/∂weight), in the accumulation dtype.

    upstream (N,), None for ones. Losses are (N,) if by_row, else their sum. A gradient that is not wanted has no elements.
    By rows and with the weight wanted, gradients wait for their upstream: without one, both are left out.
    form "triton" or "cublas": on the device; with `mean`, loss and gradients are those of the mean, hidden's in its own dtype.
    """
    if form != "chunked":
        return device_loss_and_gradients(hidden, weight, targets, upstream, softcap, ignore_index, by_row, hidden_wanted,
                                         weight_wanted, form, mean)
    dtype = accumulation_dtype(hidden, weight)
    if deferred(upstream, by_row, weight_wanted):
        hidden_wanted = weight_wanted = False
    rows = (targets != ignore_index).nonzero().squeeze(1)
    every = rows.numel() == targets.numel()
    x, t = (hidden, targets) if every else (hidden[rows], targets[rows])
    scale = torch.ones_like(t, dtype=dtype) if upstream is None else upstream[rows].to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        losses, dx, dw = graded_rows(x.to(dtype), weight.to(dtype), t, scale, softcap, hidden_wanted, weight_wanted)
    if not every and by_row:
        losses = losses.new_zeros(targets.shape).index_copy_(0, rows, losses)
    if not every and hidden_wanted:
        dx = dx.new_zeros(hidden.shape).index_copy_(0, rows, dx)
    return losses if by_row else losses.sum(), dx, dw


def deferred(upstream: Tensor | None, by_row: bool, weight_wanted: bool) -> bool:
    """Whether gradients are computed in backward: a sum over rows cannot be scaled by row afterwards."""
    return by_row and weight_wanted and upstream is None


def graded_rows(x: Tensor, w: Tensor, targets: Tensor, upstream: Tensor, softcap: float | None, hidden_wanted: bool,
                weight_wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (n,), dx (n, C) and dw (V, C) of n rows none of which is ignored; everything in one dtype."""
    n, V = x.size(0), w.size(0)
    losses = x.new_empty(n)
    dx, dw = x.new_empty(x.shape if hidden_wanted else 0), w.new_zeros(w.shape if weight_wanted else 0)
    at_once = max(CHUNK_ROWS, CHUNK_BYTES // (V * x.element_size()))
    in_cache = max(1, BLOCK_BYTES // (V * x.element_size()))
    buffer = x.new_empty(min(n, at_once), V)
    for chunk in even_slices(n, at_once):
        z = torch.mm(x[chunk], w.T, out=buffer[:chunk.stop - chunk.start])
        for block in even_slices(z.size(0), in_cache):
            rows = slice(chunk.start + block.start, chunk.start + block.stop)
            losses[rows] = differentiate(z[block], targets[rows], upstream[rows], softcap, hidden_wanted or weight_wanted)
        if hidden_wanted:
            torch.mm(z, w, out=dx[chunk])
        if weight_wanted:
            dw.addmm_(z.T, x[chunk])
    return losses, dx, dw


def even_slices(n: int, most: int) -> Iterator[slice]:
    """0 … n in as few slices of at most `most` as it takes, equal to within one: no last chunk of a single row."""
    parts = -(-n // most)
    for part in range(parts):
        yield slice(n * part // parts, n * (part + 1) // parts)


def differentiate(z: Tensor, targets: Tensor, upstream: Tensor, softcap: float | None, gradient: bool) -> Tensor:
    """Losses (b,) of logits z (b, V). In place z becomes upstream · ∂loss/∂z where `gradient`, else of no use."""
    at = targets[:, None]
    l_t = z.gather(1, at)  # (b, 1)
    slope_t, p, bounded = torch.ones_like(l_t), z, softcap is not None and softcap <= RANGE / 2
    if softcap is not None:
        u_t = torch.tanh(l_t / softcap)
        l_t, slope_t = softcap * u_t, 1 - u_t.square()
        u = fast_tanh_(z.div_(softcap)) if bounded else z.div_(softcap).tanh_()
        p = u * softcap
    shift = l_t if bounded else torch.maximum(l_t, p.amax(1, keepdim=True) - RANGE)
    below = l_t - shift  # 0, unless the target is RANGE below the largest
    p.sub_(shift).exp_().scatter_(1, at, 0)
    rest = p.sum(1, keepdim=True)
    if gradient:
        scale = upstream[:, None] / (rest + below.exp())
        p.mul_(scale)
        if softcap is not None:
            torch.mul(p, u.square_().neg_().add_(1), out=z)
        z.scatter_(1, at, -rest * slope_t * scale)
    return (torch.log1p(rest + torch.expm1(below)) - below).squeeze(1)


def fast_tanh_(x: Tensor) -> Tensor:
    """tanh in place, to 4 · 2⁻²⁴ in fp32 (torch.tanh: to 2⁻²⁴), in a quarter of its time on CPU."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


# ---- on CUDA ---------------------------------------------------------------------------------------------------------


def beside_triton(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can run: fp64, ROCm, for which none was ever compiled, and GPUs before sm_80, which have no bf16 tensor
    cores, are left to torch."""
    return (hidden.is_cuda and weight.is_cuda and torch.version.hip is None
            and accumulation_dtype(hidden, weight) == torch.float32 and find_spec("triton") is not None
            and torch.cuda.get_device_capability(hidden.device) >= (8, 0))


def device_form(impl: str, hidden: Tensor, weight: Tensor, softcap: float | None) -> str:
    """"triton" or "cublas", as `linear_cross_entropy` says, or why not."""
    kinds = {hidden.dtype, weight.dtype}
    can = {"a frozen weight": not wants_gradient(weight), "a softcap up to 32": softcap is not None and softcap <= RANGE / 2,
           "both inputs bf16 or both fp32": kinds in ({torch.bfloat16}, {torch.float32})}
    if impl == "auto":
        return "triton" if all(can.values()) and kinds == {torch.bfloat16} else "cublas"
    if torch.float64 in kinds:
        raise BadInput(WHERE, f"impl = {impl!r} with hidden of {hidden.dtype}, weight of {weight.dtype}", "no fp64",
                       'use impl="chunked"')
    if find_spec("triton") is None:
        raise MissingExtra(WHERE, "triton", "dev")
    if not ((hidden.is_cuda and weight.is_cuda) or interpreted()):
        raise BadInput(WHERE, f"impl = {impl!r} on {hidden.device}", "tensors on CUDA", 'use impl="chunked"')
    missing = [need for need, met in can.items() if not met]
    if impl == "triton" and missing:
        raise BadInput(WHERE, "impl = 'triton' without " + ", ".join(missing), ", ".join(can), 'use impl="cublas"')
    return impl


def interpreted() -> bool:
    from omni_adapters.kernels.linear_cross_entropy import INTERPRETED
    return INTERPRETED


def on_device(form: str, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int,
              reduction: str) -> Tensor:
    return loss_and_gradients(hidden, weight, targets, None, None if softcap is None else float(softcap), ignore_index,
                              reduction == "none", wants_gradient(hidden), wants_gradient(weight), form, reduction == "mean")[0]


def device_loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None, softcap: float | None,
                              ignore_index: int, by_row: bool, hidden_wanted: bool, weight_wanted: bool, form: str,
                              mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_and_gradients` by the kernels: rows are named to them by index, and their results have their place from the start."""
    from omni_adapters.kernels import linear_cross_entropy as kernels

    if deferred(upstream, by_row, weight_wanted):
        hidden_wanted = weight_wanted = False
    rows = (targets != ignore_index).nonzero().squeeze(1)
    n, kept = rows.numel(), hidden.dtype if mean else torch.float32
    new = hidden.new_empty if n == targets.numel() else hidden.new_zeros
    dx = new(hidden.shape if hidden_wanted else 0, dtype=kept)
    dw = weight.new_zeros(weight.shape if weight_wanted else 0, dtype=torch.float32)
    factor = 1 / n if mean and n else 1.0
    losses = hidden.new_empty(0, dtype=torch.float32)
    if n:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        x, w = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
        into = dx if hidden_wanted else None
        scale = None if upstream is None else upstream[rows].float()
        with torch.autocast(hidden.device.type, enabled=False):
            if form == "triton":
                losses = kernels.bounded(x, w, targets, rows, softcap or 0.0, factor, into)
            else:
                losses = kernels.by_row(x, w, targets, rows, scale, softcap, factor, into, dw if weight_wanted else None)
    if by_row:
        return losses if n == targets.numel() else losses.new_zeros(targets.shape).index_copy_(0, rows, losses), dx, dw
    return losses.sum() * factor if n or not mean else losses.sum() / 0, dx, dw


@loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None, softcap: float | None, ignore_index: int,
      by_row: bool, hidden_wanted: bool, weight_wanted: bool, form: str = "chunked",
      mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden, weight)
    later = deferred(upstream, by_row, weight_wanted)
    return (hidden.new_empty(targets.shape if by_row else (), dtype=dtype),
            hidden.new_empty(hidden.shape if hidden_wanted and not later else (0,), dtype=hidden.dtype if mean else dtype),
            weight.new_empty(weight.shape if weight_wanted and not later else (0,), dtype=dtype))


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, upstream, *ctx.options = inputs
    _, _, by_row, _, weight_wanted, *_ = ctx.options
    ctx.deferred = deferred(upstream, by_row, weight_wanted)
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(targets, *((hidden, weight) if ctx.deferred else output[1:]))


def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """upstream (N,) by rows, else a scalar. It may hold anything at ignored rows, whose gradient is 0 all the same."""
    if torch.is_grad_enabled():
        raise BadInput(f"{WHERE}, impl {ctx.options[5]}", "a backward with create_graph=True", "one derivative",
                       'use impl="plain"')
    targets, first, second = ctx.saved_tensors
    _, ignore_index, _, hidden_wanted, weight_wanted, _, mean = ctx.options
    scale = upstream.where(targets != ignore_index, 0)  # (N,)
    if ctx.deferred:
        _, dx, dw = loss_and_gradients(first, second, targets, scale, *ctx.options)
    elif mean and hidden_wanted and type(first) is Tensor:
        dx = torch.mul(first, scale[:, None], out=first if last_use() else torch.empty_like(first))
        dw = second * upstream if weight_wanted else second
    else:
        dx = first * scale[:, None] if hidden_wanted else first
        dw = second * upstream if weight_wanted else second
    return (dx.to(ctx.dtypes[0]) if hidden_wanted else None, dw.to(ctx.dtypes[1]) if weight_wanted else None,
            *[None] * 9)


def last_use() -> bool:
    """Whether autograd lets go of what it saved after this backward, so that it may be written over."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


loss_and_gradients.register_autograd(backward, setup_context=remember)
