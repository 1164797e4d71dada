"""The benchmark suite: loss, LoRA, encoder, decoding and whole steps, each against its baselines in one process.

    python -m benchmarks --suite quick                                   # a laptop; writes runs/benchmarks/
    python -m benchmarks --suite full --device cuda --out benchmarks/results/h200
    python -m benchmarks --bench step decode --seconds 2
    python -m benchmarks compare A/suite.json B/suite.json --fail-above 1.1
    python -m benchmarks show benchmarks/results/h200                    # the table, and its pictures drawn again

Writes suite.json, suite.csv and pictures. Exits 1 if a variant failed or was wrong; what cannot run here is a row "n/a".
suite.json is written anew after each group, so that a run that is cut short leaves what it had measured. On a CPU several benches
run each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.group import Device, Group, Suite
from benchmarks.measure import Row, measure_group, sentence
from benchmarks.roofs import measure_roofs

ROOT = Path(__file__).parents[1]
# What runs kernels of our own comes last, as one that reads out of bounds ends the CUDA context; so do the longest to compile
BENCHES = ("lora", "decode", "encoder", "step", "loss")
SECONDS = {"quick": 5.0, "full": 20.0}                   # of timed rounds, for each group
PACKAGES = ("omni-adapters", "torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")


# ---- the header ----------------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "omni-adapters":  # run from a checkout that is not installed
            return str(importlib.import_module("omni_adapters").__version__)
        return "n/a"


def git(*command: str) -> str | None:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """The commit that runs, with "dirty" where tracked files differ from it; outside a checkout $COMMIT, or "n/a"."""
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("COMMIT", "n/a")
    return f"{head}, dirty" if git("status", "--porcelain", "--untracked-files=no") else head


def device_name(device: Device) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"


def make_header(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    return {
        "suite": args.suite, "kind": args.device, "device": device_name(args.device), "threads": torch.get_num_threads(),
        "date": date.today().isoformat(), "commit": commit(), "command": " ".join(["python -m benchmarks", *command]),
        "python": platform.python_version(), "versions": {name: version(name) for name in PACKAGES},
        "roofs": measure_roofs(args.device)._asdict(),
    }


def without_out(command: list[str]) -> list[str]:
    """A command line that says nothing of this machine's folders."""
    kept, skip = [], False
    for word in command:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


# ---- the run -------------------------------------------------------------------------------------------------------------


def groups_of(bench: str, suite: Suite, device: Device) -> Iterator[Group | Row]:
    """A bench's groups; a row where there are none, or no more, and why."""
    name = f"benchmarks.{bench}"
    if importlib.util.find_spec(name) is None:
        yield Row(bench, "all", "all", "n/a", f"there is no {name}")
        return
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "groups"):
            yield Row(bench, "all", "all", "n/a", f"{name} has no groups")
            return
        yield from module.groups(suite, device)
    except Exception as error:  # one bench that cannot build its inputs does not stop the others
        yield Row(bench, "next group", "all", "failed", sentence(error))


def let_go(device: Device) -> str:
    """Before the next group: what compiled code and graphs of the last one hold. Why it cannot, where a step has left a
    CUDA context that answers nothing but errors."""
    try:
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        return sentence(error)
    return ""


def run_benches(args: argparse.Namespace, header: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    roofs = report.Roofs(**header["roofs"])
    end = None if args.minutes is None else time.perf_counter() + 60 * args.minutes
    with tqdm(unit="group", disable=None) as bar:
        for place, bench in enumerate(args.bench):
            now = time.perf_counter()
            deadline = None if end is None else now + (end - now) / (len(args.bench) - place)
            for group in groups_of(bench, args.suite, args.device):
                if isinstance(group, Row):
                    rows.append(group)
                else:
                    bar.set_description(f"{bench}: {group.case}")
                    found = measure_group(group, args.device, roofs, args.seconds)
                    print(report.table(found), flush=True)  # now: a run may be cut short
                    rows += found
                del group
                lost = let_go(args.device)
                rows += [Row(bench, "the groups after these", "all", "failed", lost)] if lost else []
                report.write(args.out, header, rows)
                bar.update()
                if lost:
                    break
                if deadline is not None and time.perf_counter() > deadline:
                    rows.append(Row(bench, "the groups after these", "all", "n/a", f"--minutes {args.minutes:g} are spent"))
                    break
    report.write(args.out, header, rows)
    return rows


def run_apart(args: argparse.Namespace, header: dict[str, Any]) -> list[Row]:
    """Each bench in a process of its own. On a CPU a fresh process pages large tensors in anew in every step, and one in which
    another bench has left the allocator room does not: logits written out then take half the time, in no training run's
    circumstances."""
    rows: list[Row] = []
    end = None if args.minutes is None else time.perf_counter() + 60 * args.minutes
    for place, bench in enumerate(args.bench):
        folder = args.out.resolve() / bench
        words = ["--suite", args.suite, "--bench", bench, "--seconds", f"{args.seconds:g}", "--out", str(folder)]
        if end is not None:
            words += ["--minutes", f"{max(0.0, end - time.perf_counter()) / 60 / (len(args.bench) - place):g}"]
        code = subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT).returncode
        found = report.read(folder)[1] if (folder / "suite.json").exists() else []
        rows += found
        if code not in (0, 1) or not found:  # 1 says that a row says why
            rows.append(Row(bench, "the groups after these", "all", "failed", f"their process ended with code {code}"))
        report.write(args.out, header, rows)
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def run(command: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0],
                                     epilog="also: python -m benchmarks compare A B; python -m benchmarks show FOLDER")
    parser.add_argument("--suite", default="quick", choices=("quick", "full"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder")
    parser.add_argument("--bench", nargs="+", default=list(BENCHES), metavar="NAME", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--seconds", type=float, help="of timed rounds for each group; default 5 (quick) or 20 (full)")
    parser.add_argument("--minutes", type=float, help="for all: each bench may begin groups in its share of what is left")
    args = parser.parse_args(command)
    unknown = [name for name in args.bench if name not in BENCHES]
    if unknown:
        parser.error(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    args.seconds = SECONDS[args.suite] if args.seconds is None else args.seconds
    try:  # before minutes of measuring
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    header = make_header(args, without_out(command))
    print(report.header_lines(header), flush=True)
    rows = run_apart(args, header) if args.device == "cpu" and len(args.bench) > 1 else run_benches(args, header)
    draw(args.out, header, rows)
    bad = [row for row in rows if row.status in ("failed", "invalid")]
    if bad:
        print(f"\n{len(bad)} of {len(rows)} rows failed or are invalid", file=sys.stderr)
    return 1 if bad else 0


def draw(out: Path, header: dict[str, Any], rows: list[Row]) -> None:
    print("\n" + "\n".join([f"{out / 'suite.json'}", *report.draw_all(out, header, rows)]))


def show(command: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks show", description="A report's table, and its pictures again.")
    parser.add_argument("out", type=Path, help="a suite.json, or its folder")
    out = parser.parse_args(command).out
    header, rows = report.read(out)
    out = out if out.is_dir() else out.parent
    print(report.header_lines(header))
    print(report.table(rows))
    draw(out, header, rows)
    return 0


def compare(command: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description="Two reports, row by row.")
    parser.add_argument("a", type=Path, help="suite.json, or its folder: the one before")
    parser.add_argument("b", type=Path, help="the one after")
    parser.add_argument("--fail-above", type=float, metavar="RATIO",
                        help="exit 1 if a row takes more than RATIO × its former time, beyond its spread, or was ok and is "
                        "not, or is not there")
    args = parser.parse_args(command)
    if args.fail_above is not None and not 0 < args.fail_above < math.inf:
        parser.error(f"--fail-above {args.fail_above}: a finite ratio above 0")
    found = report.compare(report.read(args.a), report.read(args.b), args.fail_above)
    print("\n".join(found.lines))
    if found.worse:
        print("\nworse:\n  " + "\n  ".join(found.worse), file=sys.stderr)
    return 1 if found.worse else 0


def main(command: list[str] | None = None) -> int:
    command = sys.argv[1:] if command is None else command
    other = {"compare": compare, "show": show}.get(command[0] if command else "")
    return run(command) if other is None else other(command[1:])


if __name__ == "__main__":
    sys.exit(main())
