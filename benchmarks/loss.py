"""Cross-entropy of a linear head: omni_adapters.loss against logits written out, torch's own and Liger, interleaved.

    python -m benchmarks.loss                      # some minutes on two cores; writes benchmarks/results/<device>/loss.*
    python -m benchmarks.loss --cases frozen --repeats 3

Forward and backward of 1500 rows of width 384 at vocabulary 32768, fp32, softcap 15, mean over the rows: the weight frozen,
the weight trained, 32 rows of 1500 supervised, and no softcap, since torch's own F.linear_cross_entropy has none.
Before a time counts, loss and gradients must agree with the equation in fp64. Memory is what a step holds at most beyond what
was there before, gradients included. What cannot run here is "n/a".

`groups` hands the same comparison to the suite, on CUDA in bf16 at 4096 rows, width 768, vocabulary 32768, beside torch.compile,
Liger-Kernel and Apple's cut-cross-entropy. There an error is a root mean square, and none may be above that of logits written
out in bf16 by more than chance.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import omni_adapters
from benchmarks.group import Device, Group, Suite, Variant, worst
from benchmarks.measure import sentence
from benchmarks.report import ratio_axis
from benchmarks.step import ROOT, peak_bytes, raising, seconds
from omni_adapters.loss import linear_cross_entropy

N, C, V = 1500, 384, 32768
TOLERANCE = 1e-5  # fp32, sums of 384 to 32768 terms of order 1
FOREIGN = ("liger", "cce")  # names of other projects' kernels, which nobody has promised for this hardware, begin so
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    title: str
    softcap: float | None = 15.0
    trained: bool = False
    supervised: int = N


CASES = {"frozen": Case("weight frozen"), "trained": Case("weight trained", trained=True),
         "sparse": Case("32 of 1500 rows supervised", supervised=32), "uncapped": Case("no softcap", softcap=None)}


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """What a GPT's forward does. As there, the logits are let go of when it returns, but for what backward needs."""
    logits = F.linear(hidden, weight).float()  # a half-precision head rounds its logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1)


def variants(softcap: float | None, device: str) -> dict[str, Loss | None]:
    """Name → a loss of (hidden, weight, targets), or None where it cannot run here."""
    found: dict[str, Loss | None] = {
        "naive": partial(naive, softcap=softcap),
        "plain": partial(linear_cross_entropy, softcap=softcap, impl="plain"),
        "chunked": partial(linear_cross_entropy, softcap=softcap, impl="chunked"),
        "torch, chunked": torch_chunked(softcap), "liger": None,
    }
    if device == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, softcap=softcap)
        found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return found


def torch_chunked(softcap: float | None) -> Loss | None:
    """torch's own, where this torch has it: it takes no softcap."""
    if softcap is None and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return partial(F.linear_cross_entropy, ignore_index=-1, options=torch.nn.LinearCrossEntropyOptions())
    return None


def batch(case: Case, device: str, dtype: torch.dtype = torch.float32,
          size: tuple[int, int, int] = (N, C, V)) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as after a norm; a weight that spreads the logits by 1, as early in training. size: N, C, V."""
    rng, (rows, width, vocabulary) = torch.Generator().manual_seed(0), size
    hidden, weight = torch.randn(rows, width, generator=rng), torch.randn(vocabulary, width, generator=rng) / width**0.5
    targets = torch.randint(vocabulary, (rows,), generator=rng)
    targets[graded(case, rows):] = -1
    return (hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(case.trained), targets.to(device))


def graded(case: Case, rows: int) -> int:
    return rows * case.supervised // N


def step(loss_of: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    loss = loss_of(hidden, weight, targets)
    loss.backward()
    return loss.detach()


def error(loss_of: Loss, case: Case, device: str, expected: list[Tensor]) -> float:
    """Largest difference from fp64: of the loss relative to it, of a gradient relative to its largest element."""
    came = results(loss_of, case, device, torch.float32)
    return worst(float((one - other).abs().max() / other.abs().max()) for one, other in zip(came, expected))


def results(loss_of: Loss, case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, targets = batch(case, device, dtype)
    loss = step(loss_of, hidden, weight, targets)
    return [value.double() for value in (loss, hidden.grad, weight.grad) if value is not None]


# ---- for the suite ---------------------------------------------------------------------------------------------------

SIZES: dict[tuple[Suite, Device], tuple[int, int, int]] = {
    ("quick", "cpu"): (256, 128, 8192), ("full", "cpu"): (N, C, V), ("quick", "cuda"): (1024, 768, 32768),
    ("full", "cuda"): (4096, 768, 32768)}


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    size, dtype = SIZES[suite, device], torch.bfloat16 if device == "cuda" else torch.float32
    for case in CASES.values():
        yield group(case, size, dtype, suite, device)


def group(case: Case, size: tuple[int, int, int], dtype: torch.dtype, suite: Suite, device: Device) -> Group:
    """Every variant over the same tensors; a step begins by letting go of the gradients of the one before."""
    tensors = batch(case, device, dtype, size)
    exact = came(partial(linear_cross_entropy, softcap=case.softcap, impl="chunked"),
                 tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
                       for tensor in tensors))
    rows, width, vocabulary = graded(case, size[0]), *size[1:]
    element, made = dtype.itemsize, [variant(name, loss_of, tensors, exact) for name, loss_of in contenders(case, suite, device)]
    flops = (6 if case.trained else 4) * rows * width * vocabulary
    least = element * width * (2 * rows + (3 if case.trained else 2) * vocabulary)  # inputs read, gradients written, once each
    made = [one._replace(flops=flops, bytes=least) if one.step else one for one in made]
    own = made[0].error or 0.0
    bound = TOLERANCE if dtype == torch.float32 else 1.05 * own
    title = case.title if case.supervised == N else f"{rows} rows supervised"
    return Group("loss", f"{title}, {size[0]} × {width} × {vocabulary}, {dtype}".replace("torch.", ""), "naive", made, bound)


def contenders(case: Case, suite: Suite, device: Device) -> Iterator[tuple[str, Loss | str]]:
    """Name and loss, or why there is none. The first is what ratios and errors are held against."""
    written_out = partial(naive, softcap=case.softcap)
    yield "naive", written_out
    slow_start = device == "cpu" and suite == "quick"
    yield "torch.compile", "takes seconds to compile" if slow_start else torch.compile(written_out)
    for impl in ("plain", "chunked", "triton", "cublas"):
        yield impl, why_not(impl, case, device) or partial(linear_cross_entropy, softcap=case.softcap, impl=impl)
    yield "torch, chunked", torch_chunked(case.softcap) or "not in this torch, or not with a softcap"
    yield from others(case, device)


def why_not(impl: str, case: Case, device: Device) -> str:
    if impl not in ("triton", "cublas"):
        return ""
    if device == "cpu" or not find_spec("triton"):
        return "needs CUDA and triton"
    return "needs a frozen weight and a softcap" if impl == "triton" and (case.trained or case.softcap is None) else ""


def others(case: Case, device: Device) -> Iterator[tuple[str, Loss | str]]:
    """Liger-Kernel as it comes and with larger chunks; cut-cross-entropy as it comes and with no gradient left out."""
    for name, extra in (("liger", {}), ("liger, chunk_mem_const=16", {"chunk_mem_const": 16})):
        yield name, missing("liger_kernel", device) or built(partial(liger, case, extra))
    for name, extra in (("cce", {}), ("cce, exact", {"filter_eps": None})):
        yield name, missing("cut_cross_entropy", device) or built(partial(cut_cross_entropy, case, extra))


def missing(package: str, device: Device) -> str:
    return "needs CUDA" if device == "cpu" else "" if find_spec(package) else f"{package} is not installed"


def built(make: Callable[[], Loss | str]) -> Loss | str:
    """Another project's loss, or why importing it fails: installed is not yet importable."""
    try:
        return make()
    except Exception as failure:
        return sentence(failure)


def liger(case: Case, extra: dict[str, int]) -> Loss | str:
    from inspect import signature

    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function
    names = list(signature(Function.forward).parameters)[1:]  # after ctx: apply takes no names, so defaults fill the places
    if any(name not in names for name in extra):
        return f"this version has no {', '.join(extra)}"
    known = {name: parameter.default for name, parameter in signature(Function.forward).parameters.items()}
    known |= {"ignore_index": -1, "softcap": case.softcap} | extra
    rest = [known[name] for name in names[3:]]
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = Function.apply(hidden, weight, targets, *rest)
        return result[0] if isinstance(result, tuple) else result
    return loss


def cut_cross_entropy(case: Case, extra: dict[str, None]) -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cut
    return lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=-1, softcap=case.softcap, **extra)


def variant(name: str, loss_of: Loss | str, tensors: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]) -> Variant:
    """A foreign loss that cannot run is "n/a"; ours, torch's and the one written out must run: theirs is a row "failed"."""
    if isinstance(loss_of, str):
        return Variant(name, why=loss_of)
    try:
        off = [float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
               for one, other in zip(came(loss_of, tensors), exact)]
    except Exception as failure:
        return Variant(name, why=sentence(failure)) if name.startswith(FOREIGN) else raising(name, failure)
    return Variant(name, partial(step, loss_of, *tensors), error=worst(off), trained=tensors[:2])


def came(loss_of: Loss, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients, in fp64; nothing of them is left behind."""
    hidden, weight, targets = tensors
    loss = step(loss_of, hidden, weight, targets)
    values = [value.double() for value in (loss, hidden.grad, weight.grad) if value is not None]
    hidden.grad = weight.grad = None
    return values


# ---- on its own ------------------------------------------------------------------------------------------------------


def measure_case(case: Case, device: str, repeats: int, bar: tqdm) -> dict[str, Any]:
    losses = variants(case.softcap, device)
    # The expectation is the chunked path in fp64, which tests hold to the equation by hand: written out it takes 2 GB
    expected = results(partial(linear_cross_entropy, softcap=case.softcap, impl="chunked"), case, device, torch.float64)
    runs, errors, tensors = {}, {}, batch(case, device)
    for name, loss_of in losses.items():
        if loss_of is not None:
            errors[name] = error(loss_of, case, device, expected)  # the first, slow run of each as well
            runs[name] = partial(step, loss_of, *tensors)
    if not worst(errors.values()) <= TOLERANCE:  # NaN is not ≤
        raise SystemExit(f"{case.title}: off by {errors}: a fast wrong loss is no loss")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
            bar.update()
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: peak_bytes(run, list(tensors[:2]), device) for name, run in runs.items()}
    return {"case": case.title, "ms": table(losses, {name: 1e3 * value for name, value in medians.items()}),
            "ratio": table(losses, {name: medians["naive"] / value for name, value in medians.items()}),
            "peak_mb": table(losses, {name: value / 1e6 for name, value in peaks.items()}),
            "peak_ratio": table(losses, {name: peaks["naive"] / value for name, value in peaks.items()}),
            "error": table(losses, errors)}


def table(names: dict[str, Loss | None], values: dict[str, float]) -> dict[str, float | str]:
    return {name: values.get(name, "n/a") for name in names}


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    colours = {"plain": "#8d99ae", "chunked": "#2a6f97", "torch, chunked": "#e07a5f", "liger": "#81b29a"}
    shown = [name for name in colours if any(row["ratio"][name] != "n/a" for row in rows)]
    for axis, key, label in zip(axes, ("ratio", "peak_ratio"), ("time, forward and backward", "peak memory")):
        for place, name in enumerate(shown):
            at = [(i, row[key][name]) for i, row in enumerate(rows) if row[key][name] != "n/a"]
            bars = axis.bar([i + (place - (len(shown) - 1) / 2) * 0.8 / len(shown) for i, _ in at], [value for _, value in at],
                            0.76 / len(shown), color=colours[name], label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set_yscale("log")
        axis.set_xticks(range(len(rows)), [row["case"].replace(" rows ", "\nrows ") for row in rows], fontsize=8)
        ratio_axis(axis, label, "logits written out ÷ this")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':28} {'':15} {'ms':>8} {'ratio':>7} {'peak MB':>8} {'ratio':>7} {'error':>8}"]
    for row in rows:
        for name in row["ms"]:
            values = [row[key][name] for key in ("ms", "ratio", "peak_mb", "peak_ratio", "error")]
            shown = ("n/a",) * 5 if "n/a" in values else (f"{values[0]:.0f}", f"{values[1]:.2f}", f"{values[2]:.0f}",
                                                          f"{values[3]:.2f}", f"{values[4]:.0e}")
            lines.append("{:28} {:15} {:>8} {:>7} {:>8} {:>7} {:>8}".format(row["case"], name, *shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=9, help="timed steps per variant; the median counts")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/<device>")
    args = parser.parse_args()
    total = args.repeats * sum(sum(loss is not None for loss in variants(CASES[name].softcap, args.device).values())
                               for name in args.cases)
    with tqdm(total=total, desc="steps") as bar:
        rows = [measure_case(CASES[name], args.device, args.repeats, bar) for name in args.cases]
    out = args.out or ROOT / "benchmarks" / "results" / args.device
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    (out / "loss.json").write_text(json.dumps({
        "what": "cross-entropy of a linear head, forward and backward, fp32; ratios are naive ÷ this",
        "command": "python -m benchmarks.loss", "date": date.today().isoformat(), "device": name, "torch": torch.__version__,
        "omni_adapters": omni_adapters.__version__, "N": N, "C": C, "V": V, "repeats": args.repeats, "rows": rows,
    }, indent=1) + "\n")
    draw(rows, out / "loss.png", f"Cross-entropy of {N} rows of width {C}, vocabulary {V}, fp32 ({name})")
    print(report(rows))


if __name__ == "__main__":
    main()
