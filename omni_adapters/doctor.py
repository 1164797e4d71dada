"""What works here and what does not, one line each, and what to do: `omni-adapters doctor`.

Notable:
- every look is a task on a daemon thread of its own, all begun at once and waited for until one deadline: a mute server, a
  stuck driver or an import without end becomes a line that says so
- packages are imported, and CUDA is asked, in child processes: what crashes or holds the interpreter's lock does so there
- what is required and what each extra brings is read from the installed package's own metadata, so there is no second list

A finding is ✓ (works), – (absent, not asked, or not known in time) or ✗ (a problem). Only a required package that is missing or
fails to import makes the library unusable, which is `Finding.fatal`. This module imports none of them, and is what
`omni-adapters doctor` imports first: it runs where torch does not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omni_adapters.background import in_thread
from omni_adapters.encoders.weight_hubs import HUBS, is_offline
from omni_adapters.encoders.weights import CachedCopy, cache_folder, cached_copies, endpoints, in_one_line, probe
from omni_adapters.shapes import BadInput, MissingExtra

DISTRIBUTION = "omni-adapters"
GOOD, NEITHER, BAD = "✓", "–", "✗"
WITHOUT_UNICODE = str.maketrans({GOOD: "+", NEITHER: "-", BAD: "x", "→": ">", "·": ",", "…": "."})
SILENT = "no answer within"
WIDTH = 100         # columns of the page
MOST_COPIES = 8     # cached copies on the page; --json has all
LEAST_FREE = 10**9  # bytes: less is a problem, as the smaller encoders take some hundred megabytes
SOURCES = tuple(hub.label for hub in HUBS.values())
FOR_DEVELOPERS = ("dev",)
PURPOSES = {"audio": "reads sound files", "speech": "synthetic speech, offline", "train": "pictures and progress",
            "trackers": "--track", "eval": "word error rates, the cascade", "demo": "make demo"}
IMPORT_ALONE = textwrap.dedent("""
    import importlib, json, os, sys
    sys.path[:] = json.loads(sys.argv[1])
    try:
        importlib.import_module(sys.argv[2])
    except BaseException as error:
        print("\\n" + " ".join(f"{type(error).__name__}: {error}".split())[:300], file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
""")
ASK_TORCH = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from omni_adapters.doctor import ask_torch; ask_torch()"


@dataclass(frozen=True)
class Finding:
    """One line. `values` are for programs: versions, URLs, bytes; `fatal`: the library cannot do without what is broken."""

    section: str
    name: str
    mark: str
    says: str
    todo: str = ""
    fatal: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


class Requirement(NamedTuple):
    """A line of a package's metadata: `omni-adapters[audio,train]`, `torch>=2.9`; `extra` is the one that asks for it, or ""."""

    name: str
    extras: tuple[str, ...]
    minimum: str
    extra: str

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")


class Late:
    """Stands for the result of a task that was not done at the deadline."""


def examine(timeout: float = 10.0) -> list[Finding]:
    """All findings, in at most `timeout` seconds (and what a thread takes to start). Raises BadInput if that is not positive."""
    if not 0 < timeout < float("inf"):
        raise BadInput("doctor", f"--timeout {timeout}", "a positive number of seconds")
    required, extras = requirements()
    modules = {one.name: one.module for one in [*required.values(), *(one for many in extras.values() for one in many)]}
    modules["triton"] = "triton"
    modules.pop("torch", None)  # takes longest: the child that asks for devices imports it, no second one
    tasks: dict[str, Callable[[], Any]] = {f"import {name}": partial(import_failure, module, module in sys.modules, timeout)
                                           for name, module in modules.items()}
    tasks |= {name: partial(source_failure, name, timeout) for name in SOURCES if not is_offline()}
    tasks |= {"folder": free_space, "copies": cached_copies, "espeak-ng": voices_heard,
              "accelerators": partial(accelerators, timeout)}
    done = results(tasks, timeout)
    imported = {name[len("import "):]: failure for name, failure in done.items() if name.startswith("import ")}
    imported["torch"] = torch_failure(done["accelerators"])
    return [*about_versions(required, imported, timeout), *about_extras(extras, imported, timeout),
            *about_sources(done, timeout), *about_cache(done["folder"], done["copies"], timeout),
            *about_devices(done["accelerators"], imported["triton"], timeout), about_speech(done["espeak-ng"], timeout)]


def results(tasks: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """name → what its task returned, or the exception it raised, or `Late`. Tasks run at once; late ones are left behind."""
    answers = {name: in_thread(task) for name, task in tasks.items()}
    wait(answers.values(), timeout=seconds)
    return {name: (answer.exception() or answer.result()) if answer.done() else Late for name, answer in answers.items()}


# ---- packages --------------------------------------------------------------------------------------------------------


def requirements() -> tuple[dict[str, Requirement], dict[str, list[Requirement]]]:
    """What the installed package requires, by name, and what each extra brings, nested extras included. Empty for a checkout
    that was never installed."""
    try:
        package = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}, {}
    lines = [requirement(line) for line in package.requires or []]
    names = [name for name in package.metadata.get_all("Provides-Extra") or [] if name not in FOR_DEVELOPERS]
    return {one.name: one for one in lines if not one.extra}, {name: brought_by(name, lines) for name in names}


def requirement(line: str) -> Requirement:
    """`soundfile>=0.13; extra == "audio"` read. Of versions only the lower bound counts; of markers, only the extra."""
    what, _, marker = line.partition(";")
    parts = re.match(r"\s*([\w.-]+)\s*(?:\[(.*?)\])?(.*)", what)
    name, extras, bounds = parts.groups("") if parts else (what, "", "")
    least, asked = re.search(r">=\s*([\d.]+)", bounds), re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", marker)
    return Requirement(re.sub(r"[-_.]+", "-", name).lower(), tuple(part.strip() for part in extras.split(",") if part.strip()),
                       least[1] if least else "", asked[1] if asked else "")


def brought_by(extra: str, lines: Sequence[Requirement]) -> list[Requirement]:
    brought: dict[str, Requirement] = {}
    for one in lines:
        if one.extra == extra:
            more = [one] if one.name != DISTRIBUTION else [deep for inner in one.extras for deep in brought_by(inner, lines)]
            brought |= {each.name: each for each in more}
    return list(brought.values())


def import_failure(module: str, here: bool, timeout: float) -> str | None:
    """None if `module` imports; "" if it is not installed; else why it fails, in one line.

    here: whether it was imported before the tasks began, any of which may just be at it; otherwise a child process tries, and
          is ended shortly before `timeout`, since after that nobody waits for it.
    """
    if find_spec(module) is None:
        return ""
    if here:
        return None
    child = subprocess.run([sys.executable, "-c", IMPORT_ALONE, json.dumps(sys.path), module], stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", timeout=0.95 * timeout)
    if child.returncode < 0:
        return f"ends the interpreter with signal {-child.returncode}"
    return (child.stderr.split("\n")[-2:] or [""])[0] or "fails" if child.returncode else None


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def older(version: str | None, minimum: str) -> bool:
    """Whether `version` is below `minimum`, by their leading numbers. An unknown version is not."""
    if version is None or not minimum:
        return False
    have, need = ([int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])] for text in (version, minimum))
    size = max(len(have), len(need))
    return have + [0] * (size - len(have)) < need + [0] * (size - len(need))


def about_versions(required: Mapping[str, Requirement], imported: Mapping[str, Any], timeout: float) -> list[Finding]:
    from omni_adapters import __version__

    found = [Finding("versions", "omni-adapters", GOOD, __version__, values={"version": __version__}),
             Finding("versions", "python", GOOD, f"{platform.python_version()} · {platform.system()} {platform.machine()}",
                     values={"version": platform.python_version()})]
    if not required:
        found[0] = Finding("versions", "omni-adapters", NEITHER, f"{__version__}, not installed: what it requires is not known",
                           "pip install -e . in its folder", values={"version": __version__})
    return [*found, *(about_package(one, imported[name], timeout) for name, one in required.items())]


def about_package(one: Requirement, failure: Any, timeout: float) -> Finding:
    version = version_of(one.name)
    here = partial(Finding, "versions", one.name, values={"version": version, "minimum": one.minimum})
    pinned = f'"{one.name}>={one.minimum}"' if one.minimum else one.name
    state = import_state(failure, timeout)
    if failure == "":
        return here(BAD, "not installed, and required", f"pip install {pinned}", True)
    if state and state.mark == BAD:
        return here(BAD, f"{version or ''} {state.says}".strip(), f"pip install --force-reinstall {pinned}", True)
    if state:
        return here(NEITHER, f"{version or ''} {state.says}".strip(), state.todo)
    if older(version, one.minimum):
        return here(BAD, f"{version}, older than {one.minimum}", f"pip install --upgrade {pinned}")
    return here(GOOD, version or "of unknown version")


def import_state(failure: Any, timeout: float) -> Finding | None:
    """None for an import that went well; else a nameless finding with what is to be said."""
    if failure is None:
        return None
    if failure is Late or isinstance(failure, subprocess.TimeoutExpired):
        return Finding("", "", NEITHER, f"still importing after {timeout:g} s", waits_longer(4 * timeout))
    return Finding("", "", BAD, in_one_line(failure) if isinstance(failure, BaseException) else failure or "not installed")


def about_extras(extras: Mapping[str, Sequence[Requirement]], imported: Mapping[str, Any], timeout: float) -> list[Finding]:
    return [about_extra(extra, brought, imported, timeout) for extra, brought in extras.items()]


def about_extra(extra: str, brought: Sequence[Requirement], imported: Mapping[str, Any], timeout: float) -> Finding:
    """✓ with all of its packages, – if some are not installed, ✗ if one that is there does not import."""
    missing = [one.name for one in brought if imported[one.name] == ""]
    states = {one.name: import_state(imported[one.name], timeout) for one in brought if one.name not in missing}
    broken = {name: state.says for name, state in states.items() if state and state.mark == BAD}
    slow = [name for name, state in states.items() if state and state.mark == NEITHER]
    here = partial(Finding, "extras", extra, values={
        "packages": {one.name: version_of(one.name) for one in brought}, "missing": missing, "broken": broken, "late": slow})
    purpose = f"{PURPOSES[extra]}: " if extra in PURPOSES else ""
    if broken:
        return here(BAD, "; ".join(f"{name} {says}" for name, says in broken.items()),
                    f"pip install --force-reinstall {' '.join(broken)}")
    if missing:
        return here(NEITHER, f"{purpose}without {', '.join(missing)}", f'pip install "{DISTRIBUTION}[{extra}]"')
    if slow:
        return here(NEITHER, f"{purpose}{', '.join(slow)} still importing after {timeout:g} s", waits_longer(4 * timeout))
    return here(GOOD, purpose + ", ".join(one.name for one in brought))


# ---- sources and cache -----------------------------------------------------------------------------------------------


def source_failure(name: str, timeout: float) -> tuple[str, str | None]:
    """The URL that is asked, and None if it answers or why not. A little is left of `timeout` to say so."""
    url = endpoints()[name]
    return url, probe(url, 0.9 * timeout)


def about_sources(done: Mapping[str, Any], timeout: float) -> list[Finding]:
    if any(name not in done for name in SOURCES):
        return [Finding("sources", name, NEITHER, "not asked: HF_HUB_OFFLINE is set",
                        values={"asked": False, "url": None, "error": None}) for name in SOURCES]
    asked: dict[str, tuple[str | None, str | None]] = {
        name: done[name] if isinstance(done[name], tuple) else (None, unanswered(done[name], timeout)) for name in SOURCES}
    any_answers = any(failure is None for _, failure in asked.values())
    return [about_source(name, url, failure, any_answers) for name, (url, failure) in asked.items()]


def about_source(name: str, url: str | None, failure: str | None, other_answers: bool) -> Finding:
    here = partial(Finding, "sources", name, values={"asked": True, "url": url, "error": failure})
    if failure is None:
        return here(GOOD, f"{url} answers")
    other, variable = {"Hugging Face": ("ms:", "HF_ENDPOINT"), "ModelScope": ("hf:", "MODELSCOPE_ENDPOINT")}[name]
    instead = f"{other}owner/name" if other_answers else "what is cached or a directory of weights"
    return here(BAD, f"{url}: {failure}" if url else failure, f"take {instead}, or set {variable} to a mirror")


def free_space() -> tuple[Path, int]:
    """The cache's folder, and the bytes free on its disk. The folder need not exist yet."""
    folder = cache_folder()
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return folder, shutil.disk_usage(there).free


def about_cache(folder: Any, copies: Any, timeout: float) -> list[Finding]:
    found = [about_folder(folder, timeout)]
    if not isinstance(copies, list):
        return [*found, Finding("cache", "copies", BAD, unanswered(copies, timeout), "look into the folder above")]
    found += [about_copy(copy) for copy in copies]
    return found if copies else [*found, Finding("cache", "copies", NEITHER, "nothing cached yet")]


def about_folder(result: Any, timeout: float) -> Finding:
    if not isinstance(result, tuple):
        return Finding("cache", "folder", BAD, unanswered(result, timeout), "set OMNI_ADAPTERS_CACHE to one that can be read")
    folder, free = result
    little = free < LEAST_FREE
    return Finding("cache", "folder", BAD if little else GOOD, f"{folder} · {size(free)} free",
                   "make room, or set OMNI_ADAPTERS_CACHE to a folder on another disk" if little else "",
                   values={"directory": str(folder), "free_bytes": free})


def about_copy(copy: CachedCopy) -> Finding:
    mark, state = {True: (GOOD, "whole"), False: (BAD, "not whole"), None: (NEITHER, "not checked")}[copy.ok]
    return Finding("cache", copy.source, mark, f"{copy.revision[:8]} · {size(copy.num_bytes)} · {state}",
                   f"delete {copy.directory} and load it again" if copy.ok is False else "",
                   values=copy._asdict() | {"directory": str(copy.directory)})


# ---- devices and speech ----------------------------------------------------------------------------------------------


def accelerators(timeout: float) -> dict[str, Any]:
    """What `ask_torch` prints, gathered, as far as it came: {"built": whether torch is built for GPUs, "mps": whether it has an
    Apple one, "devices": [[name, bytes], …], "kernels": None if they run, or why not}, or {"torch": why it does not import}. A
    torch that is here says the first two by itself."""
    here = sys.modules.get("torch")
    built = {} if here is None else built_for(here)
    if built.get("built") is False:
        return built
    child = subprocess.Popen([sys.executable, "-c", ASK_TORCH, json.dumps(sys.path)], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        printed, errors = child.communicate(timeout=0.95 * timeout)
        last = f"ends with code {child.returncode}: {' '.join(errors.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        child.kill()
        output = error.stdout or b""  # bytes, whatever `text` says: bpo-43423
        printed, last = output.decode(errors="replace"), f"{SILENT} {timeout:g} s"
    found: dict[str, Any] = built | {"kernels": last}
    for line in re.findall(r"^\{.*\}$", printed, re.MULTILINE):
        found |= json.loads(line)
    return {"error": last} | found


def torch_failure(found: Any) -> Any:
    """Of what `accelerators` returned, or why there is nothing, the same as `import_failure` says of other packages."""
    if find_spec("torch") is None:
        return ""
    if not isinstance(found, dict):
        return found
    if "built" in found:
        return None
    return Late if found["error"].startswith(SILENT) else found.get("torch", found["error"])


def built_for(torch: Any) -> dict[str, bool]:
    return {"built": torch.version.cuda is not None or torch.version.hip is not None, "mps": torch.backends.mps.is_available()}


def ask_torch() -> None:
    """The child's part of `accelerators`: prints lines of JSON, what comes soon before what may hang."""
    try:
        import torch
    except BaseException as error:  # a broken package may raise anything
        print(json.dumps({"error": "torch does not import", "torch": in_one_line(error)}), flush=True)
        return
    built = built_for(torch)
    print(json.dumps(built), flush=True)
    if built["built"]:
        ask_cuda()


def ask_cuda() -> None:
    """Prints a line of JSON on the devices, and one on the kernels, which takes longer."""
    import torch

    try:
        torch.cuda.init()
        each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        print(json.dumps({"devices": [], "error": in_one_line(error), "kernels": "no CUDA device"}), flush=True)
        return
    print(json.dumps({"devices": [[one.name, one.total_memory] for one in each]}), flush=True)
    try:
        run_a_kernel()
    except Exception as error:
        print(json.dumps({"kernels": in_one_line(error)}), flush=True)
    else:
        print(json.dumps({"kernels": None}), flush=True)


def run_a_kernel() -> None:
    """The loss on 64 rows by the kernels. Raises what hinders them."""
    import torch

    from omni_adapters.loss import beside_triton, linear_cross_entropy

    hidden, weight = (torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (64, 256))
    if not beside_triton(hidden, weight):
        raise RuntimeError("this GPU has no bf16 tensor cores, or torch is built for ROCm, or triton is missing")
    loss = linear_cross_entropy(hidden, weight, torch.arange(64, device="cuda"), softcap=15.0, impl="triton")
    if not loss.isfinite():
        raise RuntimeError(f"the kernels' loss is {loss.item()}")


def about_devices(found: Any, triton: Any, timeout: float) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = cpu_memory()
    rows = [Finding("devices", "cpu", GOOD, f"{cores} cores" + (f" · {size(memory)}" if memory else ""),
                    values={"cores": cores, "bytes": memory})]
    answer = found if isinstance(found, dict) else {"error": unanswered(found, timeout)}
    rows += [Finding("devices", f"cuda:{index}", GOOD, f"{name} · {size(memory)}", values={"bytes": memory})
             for index, (name, memory) in enumerate(answer.get("devices", []))]
    if len(rows) == 1:
        rows.append(about_no_cuda(answer))
    if answer.get("mps"):
        rows.append(Finding("devices", "mps", GOOD, "Apple GPU, in the memory above"))
    return [*rows, about_kernels(answer, triton, timeout)]


def about_no_cuda(answer: Mapping[str, Any]) -> Finding:
    if answer.get("built") is False:
        return Finding("devices", "cuda", NEITHER, "this torch is built without it", values={"error": None})
    if "built" not in answer:
        return Finding("devices", "cuda", NEITHER, f"not known: {answer.get('error')}", values={"error": answer.get("error")})
    error = answer.get("error", "no device")
    if "no NVIDIA driver" in error:  # what pip installs on any Linux machine is built for CUDA
        return Finding("devices", "cuda", NEITHER, "torch is built for it; no NVIDIA driver here", values={"error": error})
    return Finding("devices", "cuda", BAD, f"torch is built for it; {error}",
                   "see what nvidia-smi says of the driver, and CUDA_VISIBLE_DEVICES", values={"error": answer.get("error")})


def about_kernels(answer: Mapping[str, Any], triton: Any, timeout: float) -> Finding:
    """– without a GPU or triton, which the library does without; ✗ where both are there and the kernels fail all the same."""
    version, state = version_of("triton"), import_state(triton, timeout)
    devices, failure = answer.get("devices"), answer.get("kernels", "no CUDA device")
    here = partial(Finding, "devices", "triton", values={"version": version, "kernels": failure})
    if triton == "":
        return here(NEITHER, "not installed: the loss takes its chunked form", "pip install triton" if devices else "")
    if state:
        return here(state.mark, f"{version} {state.says}", state.todo or "pip install --force-reinstall triton")
    if not devices:
        return here(NEITHER, f"{version} · " + ("without a CUDA device the loss takes its chunked form" if "built" in answer else
                                                "not tried: whether there is a CUDA device is not known"))
    if failure is None:
        return here(GOOD, f"{version} · the kernels run")
    if failure.startswith(SILENT):
        return here(NEITHER, f"{version} · the kernels: {failure}", waits_longer(12 * timeout))
    return here(BAD, f"{version} · {failure}", 'impl="cublas" and impl="chunked" do without; triton needs a C compiler (CC)')


def cpu_memory() -> int | None:
    """Bytes, where the system says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def voices_heard() -> int:
    """How many voices espeak-ng has, once it has said a word."""
    from omni_adapters.data.speech import speak, voices

    speak("ears")
    return len(voices())


def about_speech(result: Any, timeout: float) -> Finding:
    if isinstance(result, int):
        return Finding("devices", "espeak-ng", GOOD, f"speaks, {result} voices", values={"voices": result})
    if isinstance(result, MissingExtra):
        return Finding("devices", "espeak-ng", NEITHER, f"without {result.module}: no synthetic speech",
                       f'pip install "{DISTRIBUTION}[{result.extra}]"', values={"voices": 0})
    return Finding("devices", "espeak-ng", BAD, unanswered(result, timeout),
                   "pip install --force-reinstall espeakng-loader soxr numpy", values={"voices": 0})


# ---- the page --------------------------------------------------------------------------------------------------------


def waits_longer(seconds: float) -> str:
    return f"--timeout {seconds:g} waits longer"


def unanswered(result: Any, timeout: float) -> str:
    """Why there is no result: the task was late, or raised."""
    return in_one_line(result) if isinstance(result, BaseException) else f"{SILENT} {timeout:g} s"


def size(num_bytes: int) -> str:
    """`290 MB`, `141 GB`: powers of a thousand, as disks and cards are sold."""
    shown = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if shown < 999.5:
            return f"{shown:.3g} {unit}"
        shown /= 1000
    return f"{shown:.0f} TB" if shown >= 999.5 else f"{shown:.3g} TB"


def healthy(findings: Iterable[Finding]) -> bool:
    return not any(one.fatal for one in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: {"healthy": bool, "findings": [{section, name, mark, says, todo, fatal, values}, …]}."""
    return {"healthy": healthy(findings), "findings": [asdict(one) for one in findings]}


def describe(findings: Sequence[Finding]) -> str:
    """One page: section, mark, name, what there is to say; below a problem, what to do."""
    shown, hidden = shortened(findings)
    widths = max(len(one.section) for one in shown), max(len(one.name) for one in shown)
    lines, section = [], ""
    for one in shown:
        head = f"{one.section if one.section != section else '':{widths[0]}}  {one.mark} {one.name:{widths[1]}}  "
        lines += wrapped(head, one.says) + (wrapped(" " * len(head) + "→ ", one.todo) if one.todo else [])
        section = one.section
    problems = sum(one.mark == BAD for one in findings)
    lines.append(f"{problems} problem{'s' * (problems != 1)}" + (f"; {hidden} more cached copies" if hidden else "")
                 + ("" if healthy(findings) else "; the library cannot work before those it requires are mended"))
    return "\n".join(lines)


def shortened(findings: Sequence[Finding]) -> tuple[list[Finding], int]:
    """Without the sound copies that outgrow the page, and how many those are; problems always stay."""
    copies = [one for one in findings if one.section == "cache" and one.name != "folder" and one.mark != BAD]
    dropped = copies[MOST_COPIES:]
    return [one for one in findings if not any(one is gone for gone in dropped)], len(dropped)


def wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, max(WIDTH, len(head) + 30), initial_indent=head, subsequent_indent=" " * len(head),
                         break_on_hyphens=False, break_long_words=False) or [head.rstrip()]


def in_encoding(text: str, encoding: str | None) -> str:
    """`text` as a terminal of that encoding can show it."""
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(WITHOUT_UNICODE).encode(encoding or "ascii", "replace").decode(encoding or "ascii")
    return text
