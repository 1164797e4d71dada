"""Cross-entropy of a linear head on CUDA: the GEMM that makes the logits ends in what the gradient needs.

With q = 1 / (1 + e^{2z/c}) = (1 − tanh(z/c)) / 2, a logit capped at c and its slope are

    l − c = −2c · q                dl/dz = 4 q (1 − q)

Notable:
- `bounded`, for a frozen weight and c ≤ 32: l − c lies in −2c … 0, so e^{l − c} needs no row maximum and stays in the range of
  fp32 and bf16. `exponentials` is hidden · weightᵀ; its epilogue writes G = e^{l−c} q (1 − q) and a tile's sums of e^{l−c}.
  `products` is G · weight; `finish` scales its rows. 4 flops a logit and channel, and no element-wise pass over G
- as nothing waits for a row's maximum or sum, G is cut by rows and by columns of the vocabulary: (1408, 7680) of (N, 32768) on an
  H200. Then G stays in L2, every SM has one tile of G · weight, and all buffers together are BYTES at any N
- a target's own entry of G is 0 and its term is computed apart, in fp32: −rest / (1 + rest) cancels nothing where it is certain
- `by_row`, for anything else: a GEMM of torch's, one program a row that reads it once and writes its gradient in place, and one
  GEMM or two. Its maximum is the row's own, so there need be no softcap; a row beyond ONE_READ columns is read twice
- no atomics: sums of tiles and of splits are added up in one order, so two runs give the same bits
- rows are named by index: an ignored row is neither read nor copied aside
(Target apart and gradients in the forward: `omni_adapters.loss`. Reading a row once: Liger-Kernel, arXiv:2410.10989.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 31_000_000  # of all buffers of `bounded` together: with a row's few scalars, below 32 MB
MOST_SPLITS = 32  # of one sum over columns of G; `finish` reads one partial sum for each
ROW_BYTES = 25_000_000  # of logits at a time in `by_row`: half an H200's L2
SLICE_BYTES = 2**24  # of a product that is added to the weight's gradient: it stays in L2
ALIGNED = 4  # rows: each block's scalars begin at a multiple of 16 bytes, or triton compiles once more for those that do not
ONE_READ = 32768  # columns that one program of 16 warps holds in registers, 64 a thread: twice as many would be spilled
AT_ONCE = 8192  # columns of a longer row
GAIN = 4096.0  # on gradients by logit, a power of two: in fp16 probabilities near 1 / V are subnormal, 4096 times them are not
LOWEST = tl.constexpr(-1e30)  # a logit that no row has: −inf − −inf would be NaN
LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))
BOUNDED = 32.0  # largest softcap of `bounded`: e^{−2c} = 1.6e-28 and e^{2c} · V are far from fp32's ends


class Tiles(NamedTuple):
    """One program's share of a GEMM: its output (rows, columns), `depth` of the sum at a time, `registers` a thread at most."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Config(NamedTuple):
    exponentials: Tiles
    products: Tiles


# The exponentials of a (128, 128) tile take about half as long as its 768-deep sum, and no tensor core works meanwhile. 128
# registers a thread and three stages (96 KiB of shared memory) let two programs share an SM of sm_90: one sums while the other
# exponentiates. On sm_80 half the columns do, three programs an SM. `products` has sums thousands deep and next to no epilogue:
# one program an SM, with a deep pipeline.
CONFIGS = {
    (9, 0): Config(Tiles(128, 128, 64, 8, 3, 128), Tiles(128, 128, 64, 8, 4)),
    (8, 0): Config(Tiles(128, 64, 32, 4, 4), Tiles(128, 128, 32, 8, 5)),
}
# What is worth timing on an H200, by name: `bounded` takes any as `config`
CANDIDATES = {
    "two a SM": CONFIGS[9, 0],
    "two a SM, four warps": Config(Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4)),
    "one a SM": Config(Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 4)),
    "wide": Config(Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3)),
    "wide, four stages": Config(Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 64, 8, 4)),
    "products of depth 128": Config(CONFIGS[9, 0].exponentials, Tiles(128, 128, 128, 8, 3)),
    "products in five stages": Config(CONFIGS[9, 0].exponentials, Tiles(128, 128, 64, 8, 5)),
}


def config_of(device: torch.device) -> Config:
    """By the device's capability: sm_90's from there on, sm_80's below; small tiles where the interpreter runs."""
    if INTERPRETED:
        return Config(Tiles(32, 64, 32, 4, 1), Tiles(32, 32, 64, 4, 1))
    return CONFIGS[9, 0] if torch.cuda.get_device_capability(device) >= (9, 0) else CONFIGS[8, 0]


def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


# ---- bounded logits --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How (N, V) is cut: G has `rows` and `columns`, and a sum over its columns `splits` parts."""

    rows: int
    columns: int
    splits: int


def plan(n: int, C: int, V: int, itemsize: int, sms: int, config: Config) -> Plan:
    """Rows so that two splits of `products` give each SM one tile (fewer rows: more splits), columns as BYTES allow, in
    whole rounds of the SMs."""
    e, p = config
    across = -(-C // p.columns)
    most = max(1, sms // (2 * across)) * p.rows
    by_sums = BYTES // 3 // (4 * -(-V // e.columns))  # rows whose sums of tiles take a third, for V in the millions
    rows = evenly(n, max(p.rows, min(most, by_sums // p.rows * p.rows)))
    rows = -(-rows // ALIGNED) * ALIGNED
    splits = max(1, min(MOST_SPLITS, sms // (-(-rows // p.rows) * across)))
    left = BYTES - 4 * rows * (splits * C + -(-V // e.columns))
    high, wide = -(-rows // e.rows), max(1, left // (rows * itemsize * e.columns))
    if high * wide >= sms:
        wide = high * wide // sms * sms // high
    return Plan(rows, min(max(wide, 1), -(-V // e.columns)) * e.columns, splits)


def evenly(n: int, most: int) -> int:
    """Size of the fewest parts of n that are at most `most`: no last part of a single row."""
    return -(-n // -(-n // most))


def parts(n: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, n)) for begin in range(0, n, size))


def bounded(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, softcap: float, factor: float, dx: Tensor | None, *,
            config: Config | None = None) -> Tensor:
    """Losses (n,) in fp32 of `rows`; dx[rows] becomes factor · ∂loss/∂hidden.

    hidden:  (N, C), contiguous; weight: (V, C), contiguous, of hidden's dtype: bf16, or fp32 (fp16 only for small logits: the
             range of G is e^{−2c} … 1).
    targets: (N,) int64; rows: (n,) int64, n > 0, which of the N count.
    softcap: at most BOUNDED.
    dx:      (N, C), any floating dtype, rounded to once; None computes losses only.
    config:  tiles in place of the device's own.
    """
    (n,), (V, C) = rows.shape, weight.shape
    config = config or config_of(hidden.device)
    cut = plan(n, C, V, hidden.element_size(), multiprocessors(hidden.device), config)
    rest = hidden.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        buffers = Buffers.of(hidden, cut, C, V, config, dx is not None)
        for block in parts(n, cut.rows):
            bounded_block(hidden, weight, targets, rows[block], softcap, factor, rest[block], dx, buffers, cut, config)
    return torch.log1p(rest)


class Buffers(NamedTuple):
    g: Tensor        # (rows, columns) G, of hidden's dtype
    sums: Tensor     # (rows, tiles of V) Σ e^{l − c} over a tile's columns, the target's left out
    partial: Tensor  # (splits, rows, C) G · weight over columns so far

    @classmethod
    def of(cls, like: Tensor, cut: Plan, C: int, V: int, config: Config, gradient: bool) -> Buffers:
        tiles = -(-V // config.exponentials.columns)
        sizes = (cut.rows, tiles), (cut.splits, cut.rows, C) if gradient else (0,)
        return cls(like.new_empty((cut.rows, cut.columns) if gradient else (0,)),
                   *(like.new_empty(size, dtype=torch.float32) for size in sizes))


def bounded_block(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, softcap: float, factor: float, rest: Tensor,
                  dx: Tensor | None, buffers: Buffers, cut: Plan, config: Config) -> None:
    """`rest` (rows,) becomes Σ e^{l_j − l_target} over the other columns, dx[rows] what `bounded` says."""
    (n,), (V, C), (e, p), (g, sums, partial) = rows.shape, weight.shape, config, buffers
    if hidden.dtype == torch.float32:  # no tensor core: its dot is made of registers
        e = e._replace(registers=None)
    tiles, steep, low = sums.size(1), 2 * LOG2E / softcap, -2 * LOG2E * softcap
    columns = cut.columns if dx is not None else tiles * e.columns
    for chunk in parts(V, columns):
        width = chunk.stop - chunk.start
        exponentials[triton.cdiv(n, e.rows) * triton.cdiv(width, e.columns),](
            hidden, weight, targets, rows, g, sums, n, chunk.start, cut.columns, tiles, steep, low, C=C, V=V,
            BLOCK_M=e.rows, BLOCK_N=e.columns, BLOCK_K=e.depth, GRADIENT=dx is not None, **e.options())
        if dx is not None:
            span = triton.cdiv(triton.cdiv(width, cut.splits), p.depth) * p.depth
            products[triton.cdiv(n, p.rows) * triton.cdiv(C, p.columns), cut.splits](
                g, weight, partial, n, chunk.start, width, cut.columns, C=C, SPAN=span, BLOCK_M=p.rows, BLOCK_N=p.columns,
                BLOCK_K=p.depth, EVEN=width == span * cut.splits, FIRST=chunk.start == 0, **p.options())
    finish[n,](hidden, weight, targets, rows, sums, partial, rest, rest if dx is None else dx, n, tiles, steep, low, 4 * factor,
               C=C, SPLITS=cut.splits, TILES=triton.next_power_of_2(tiles), BLOCK=min(1024, triton.next_power_of_2(C)),
               GRADIENT=dx is not None, num_warps=4)


@triton.jit(do_not_specialize=["n", "start"])
def exponentials(hidden, weight, targets, rows, g, sums, n, start, g_stride, tiles, steep, low, C: tl.constexpr,
                 V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GRADIENT: tl.constexpr):
    """One tile of z = hidden · weightᵀ, columns from `start` on: e^{l−c} q (1−q) to g, Σ e^{l−c} to sums, 0 at targets.

    steep = 2 log₂e / c and low = −2c log₂e: e^{2z/c} = 2^{steep z}, e^{l − c} = 2^{low q}. Neighbouring programs share columns:
    their weight is read from memory once, while the rows' hidden states stay in L2. g has whole tiles of columns: 0 beyond V.
    """
    high = tl.cdiv(n, BLOCK_M)
    r = tl.program_id(0) % high * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.program_id(0) // high * BLOCK_N + tl.arange(0, BLOCK_N)
    v, k = start + local, tl.arange(0, BLOCK_K)
    place = tl.load(rows + tl.minimum(r, n - 1))  # beyond the last row, that again: nothing of it is stored
    hidden_at = hidden + place[:, None] * C + k[None, :]
    weight_at = weight + tl.minimum(v, V - 1).to(tl.int64)[None, :] * C + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, C, BLOCK_K):
        if C % BLOCK_K == 0:
            a, b = tl.load(hidden_at), tl.load(weight_at)
        else:
            left = k < C - done
            a = tl.load(hidden_at, mask=left[None, :], other=0.0)
            b = tl.load(weight_at, mask=left[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
        hidden_at += BLOCK_K
        weight_at += BLOCK_K
    q = 1.0 / (1.0 + tl.exp2(z * steep))
    mine = (v[None, :] != tl.load(targets + place).to(tl.int32)[:, None]) & (v < V)[None, :]
    e = tl.where(mine, tl.exp2(q * low), 0.0)
    tl.store(sums + r * tiles + (start // BLOCK_N + tl.program_id(0) // high), tl.sum(e, 1), mask=r < n)
    if GRADIENT:
        tl.store(g + r[:, None] * g_stride + local[None, :], (e * (q - q * q)).to(g.dtype.element_ty), mask=(r < n)[:, None])


@triton.jit(do_not_specialize=["n", "start", "SPAN"])
def products(g, weight, partial, n, start, width, g_stride, SPAN, C: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr):
    """One tile of one split of partial += g · weight[start : start + width], or = where FIRST; a split sums SPAN columns of g,
    whole BLOCK_Ks. SPAN follows from n: as a constant it would make a kernel for every few n."""
    high = tl.cdiv(n, BLOCK_M)
    r = tl.program_id(0) % high * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) // high * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, k = tl.program_id(1) * (SPAN // BLOCK_K) * BLOCK_K, tl.arange(0, BLOCK_K)  # known to be aligned, unlike SPAN
    g_at = g + tl.minimum(r, n - 1)[:, None] * g_stride + (begin + k)[None, :]
    weight_at = weight + (start + begin + k).to(tl.int64)[:, None] * C + c[None, :]
    out = partial + (tl.program_id(1) * n + r)[:, None] * C + c[None, :]
    mine = (r < n)[:, None] & (c < C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, SPAN, BLOCK_K):
        if EVEN:
            a, b = tl.load(g_at), tl.load(weight_at, mask=(c < C)[None, :], other=0.0)
        else:
            left = k < width - begin - done
            a = tl.load(g_at, mask=left[None, :], other=0.0)
            b = tl.load(weight_at, mask=left[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        g_at += BLOCK_K
        weight_at += BLOCK_K * C
    if not FIRST:
        total += tl.load(out, mask=mine, other=0.0)
    tl.store(out, total, mask=mine)


@triton.jit(do_not_specialize=["n", "SPLITS"])
def finish(hidden, weight, targets, rows, sums, partial, rest, dx, n, tiles, steep, low, scale, SPLITS, C: tl.constexpr,
           TILES: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row: rest = S / e^{l_t − c}, dx = scale / (S + e^{l_t − c}) · (Σ partial − S q_t (1 − q_t) · weight[target])."""
    i, c = tl.program_id(0), tl.arange(0, BLOCK)
    place = tl.load(rows + i)
    hidden_at, weight_at = hidden + place * C, weight + tl.load(targets + place) * C
    dot = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, C, BLOCK):
        x = tl.load(hidden_at + done + c, mask=c < C - done, other=0.0).to(tl.float32)
        dot += x * tl.load(weight_at + done + c, mask=c < C - done, other=0.0).to(tl.float32)
    q = 1.0 / (1.0 + tl.exp2(tl.sum(dot, 0) * steep))
    e, tile = tl.exp2(q * low), tl.arange(0, TILES)
    S = tl.sum(tl.load(sums + i * tiles + tile, mask=tile < tiles, other=0.0), 0)
    tl.store(rest + i, S / e)
    if GRADIENT:
        for done in range(0, C, BLOCK):
            inside, total = c < C - done, tl.zeros((BLOCK,), tl.float32)
            for split in range(0, SPLITS):
                total += tl.load(partial + (split * n + i) * C + done + c, mask=inside, other=0.0)
            own = tl.load(weight_at + done + c, mask=inside, other=0.0).to(tl.float32)
            d = scale / (S + e) * (total - S * (q - q * q) * own)
            tl.store(dx + place * C + done + c, d.to(dx.dtype.element_ty), mask=inside)


# ---- any logits ------------------------------------------------------------------------------------------------------


def by_row(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, upstream: Tensor | None, softcap: float | None,
           factor: float, dx: Tensor | None, dw: Tensor | None) -> Tensor:
    """Losses (n,) in fp32 of `rows`; dx[rows] becomes factor · upstream · ∂loss/∂hidden, and that of the weight is added to dw.

    hidden, weight: (N, C) and (V, C) of one dtype, bf16, fp16 or fp32, which the logits have as well.
    upstream:       (n,) fp32, None for ones.
    dw:             (V, C) fp32 zeros, or None. With it a chunk has as many bytes as dw, since each chunk reads and writes dw.
    """
    (n,), (V, C) = rows.shape, weight.shape
    room = ROW_BYTES if dw is None else max(ROW_BYTES, 4 * dw.numel())
    at_once = evenly(n, max(1, room // (V * hidden.element_size())))
    scale, back = amplified(hidden.new_ones(n, dtype=torch.float32) if upstream is None else upstream, factor)
    rest, below = hidden.new_empty(2, n, dtype=torch.float32)
    buffer, every = hidden.new_empty(at_once, V), n == hidden.size(0)
    with torch.cuda.device_of(hidden):
        for chunk in parts(n, at_once):
            x = hidden[chunk] if every else hidden[rows[chunk]]
            z = torch.mm(x, weight.T, out=buffer[:x.size(0)])
            differentiate(z, targets[chunk] if every else targets[rows[chunk]], scale[chunk], rest[chunk], below[chunk], softcap,
                          dx is not None or dw is not None)
            if dx is not None:
                put(dx, None if every else rows[chunk], chunk, product(z, weight).mul_(back))
            if dw is not None:
                for part in parts(V, max(1, SLICE_BYTES // (4 * C))):
                    dw[part].addcmul_(product(z[:, part].T, x), back)
    return torch.log1p(rest + torch.expm1(below)) - below


def amplified(upstream: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """upstream (n,) fp32 brought to a largest finite size of GAIN, and what takes products of it back to factor · upstream: a
    scalar on the device, so that no host waits for it."""
    tiny = torch.finfo(torch.float32).tiny
    peak = upstream.abs().nan_to_num(0.0, posinf=0.0).max().clamp(min=tiny)
    return upstream / peak * GAIN, peak * (factor / GAIN)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in fp32, whatever their dtype: on CUDA without a copy."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def put(dx: Tensor, places: Tensor | None, chunk: slice, value: Tensor) -> None:
    if places is None:
        dx[chunk] = value
    else:
        dx.index_copy_(0, places, value.to(dx.dtype))


def differentiate(z: Tensor, targets: Tensor, scale: Tensor, rest: Tensor, below: Tensor, softcap: float | None, gradient: bool,
                  block: int | None = None) -> None:
    """Logits z (b, V), contiguous, become scale · ∂loss/∂z where `gradient`. With m a row's largest logit, below = l_t − m and
    rest = Σ e^{l_j − m} over the other columns, each (b,) fp32: loss = log(rest + e^below) − below."""
    b, V = z.shape
    block = block or (triton.next_power_of_2(V) if V <= ONE_READ else AT_ONCE)
    cap = softcap or 1.0
    rows_differentiated[b,](z, targets, scale, rest, below, 2 * LOG2E / cap, -2 * LOG2E * cap if softcap else LOG2E,
                            V=V, CAPPED=softcap is not None, GRADIENT=gradient, BLOCK=block, ONE=block >= V,
                            num_warps=max(4, min(16, block // 1024)))


@triton.jit
def log2_odds(z, inside, steep, low, CAPPED: tl.constexpr):
    """log₂ e^l of logits z, softcap included, up to what a row's maximum takes away again."""
    odds = low / (1.0 + tl.exp2(z.to(tl.float32) * steep)) if CAPPED else z.to(tl.float32) * low
    return tl.where(inside, odds, LOWEST)


@triton.jit
def slope(odds, low, CAPPED: tl.constexpr):
    """dl/dz: 4 q (1 − q) with q = odds / low; 1 without a softcap."""
    return 4.0 * (odds / low - (odds / low) * (odds / low)) if CAPPED else odds * 0.0 + 1.0


@triton.jit
def rows_differentiated(z, targets, scale, rest, below, steep, low, V: tl.constexpr, CAPPED: tl.constexpr,
                        GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """One row, as `differentiate` says: held in registers where ONE block has room for it, else read twice."""
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    z_at, target = z + row.to(tl.int64) * V, tl.load(targets + row)
    if ONE:
        inside, other = lane < V, (lane < V) & (lane != target)
        odds = log2_odds(tl.load(z_at + lane, mask=inside, other=0.0), inside, steep, low, CAPPED)
        top, l_t = tl.max(odds, 0), tl.sum(tl.where(lane == target, odds, 0.0), 0)
        S = tl.sum(tl.where(other, tl.exp2(odds - top), 0.0), 0)
    else:
        m, s, t = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + lane
            part = log2_odds(tl.load(z_at + v, mask=v < V, other=0.0), v < V, steep, low, CAPPED)
            higher = tl.maximum(m, part)
            s = s * tl.exp2(m - higher) + tl.where((v < V) & (v != target), tl.exp2(part - higher), 0.0)
            t += tl.where(v == target, part, 0.0)
            m = higher
        top, l_t = tl.max(m, 0), tl.sum(t, 0)
        S = tl.sum(s * tl.exp2(m - top), 0)
    tl.store(rest + row, S)
    tl.store(below + row, (l_t - top) * LN2)
    if GRADIENT:
        factor = tl.load(scale + row) / (S + tl.exp2(l_t - top))
        own = -S * slope(l_t, low, CAPPED) * factor
        if ONE:
            d = tl.where(lane == target, own, tl.exp2(odds - top) * slope(odds, low, CAPPED) * factor)
            tl.store(z_at + lane, d.to(z.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK):
                v = start + lane
                part = log2_odds(tl.load(z_at + v, mask=v < V, other=0.0), v < V, steep, low, CAPPED)
                d = tl.where(v == target, own, tl.exp2(part - top) * slope(part, low, CAPPED) * factor)
                tl.store(z_at + v, d.to(z.dtype.element_ty), mask=v < V)


INTERPRETED = not isinstance(exponentials, triton.JITFunction)  # TRITON_INTERPRET=1 when this module was imported
