"""The doctor: each thing that can be missing, broken or mute, made so on this machine, and the line that says it.

Packages are folders in tmp_path with metadata of their own, sources are servers on 127.0.0.1. What is late is late for good, so
that no test depends on how fast the machine is: only that all is over `timeout` + 3 s after it began.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

from omni_adapters import doctor
from omni_adapters.cli import main
from omni_adapters.doctor import BAD, GOOD, NEITHER, Finding
from omni_adapters.encoders.weights import CachedCopy
from omni_adapters.shapes import BadInput

PATIENT = 60.0  # seconds: for what ends by itself, however busy the machine
SHORT = 1.0     # seconds: for what never does


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *about: Any) -> None:
        """Silence."""


class Server(HTTPServer):
    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.requests = status, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def serve() -> Iterator[Callable[[int], Server]]:
    servers: list[Server] = []

    def start(status: int = 200) -> Server:
        servers.append(Server(status))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mute() -> Iterator[str]:
    """The URL of a socket that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    """A URL where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install("ears", "1.2", code)`: a package of that version whose import runs `code`, with lines of metadata."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def package(name: str, version: str, code: str | None = "", *lines: str) -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]))
        if code is not None:
            module = folder / name.replace("-", "_")
            module.mkdir()
            (module / "__init__.py").write_text(code)

    return package


@pytest.fixture
def well(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Callable[..., Server]) -> Server:
    """A machine on which all is well: a package to require, one of an extra, one server for both sources, an empty cache."""
    install("omni-adapters", "0.1.0", None, "Requires-Dist: first-need>=1.5", 'Requires-Dist: second; extra == "audio"',
            "Provides-Extra: audio")
    install("first-need", "1.10")
    install("second", "3")
    server = serve()
    monkeypatch.setattr(doctor, "endpoints", lambda: dict.fromkeys(doctor.SOURCES, server.url))
    monkeypatch.setattr(doctor, "cached_copies", list)
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path / "not" / "yet")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return server


def look(timeout: float = PATIENT) -> dict[str, Finding]:
    return {one.name: one for one in doctor.examine(timeout)}


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", metadata.requires("omni-adapters") or [])
def test_requirements_are_read_as_packaging_reads_them(line: str) -> None:
    ours, theirs = doctor.requirement(line), Requirement(line)
    assert (ours.name, set(ours.extras)) == (theirs.name, theirs.extras)
    assert (f">={ours.minimum}" if ours.minimum else "") == str(theirs.specifier)
    assert ours.extra == "" if theirs.marker is None else f'extra == "{ours.extra}"' in str(theirs.marker)


@pytest.mark.parametrize("line, name, minimum, extra", [
    ("Some_Thing.more (>=1.2,<3) ; extra=='x-y'", "some-thing-more", "1.2", "x-y"), ("plain", "plain", "", ""),
    ("a==2", "a", "", "")])
def test_requirements_in_other_spellings(line: str, name: str, minimum: str, extra: str) -> None:
    assert doctor.requirement(line) == (name, (), minimum, extra)


def test_extras_bring_what_the_extras_in_them_bring(install: Callable[..., None]) -> None:
    install("omni-adapters", "0.1.0", None, "Requires-Dist: base", 'Requires-Dist: a; extra == "one"', "Provides-Extra: one",
            'Requires-Dist: omni-adapters[one]; extra == "two"', 'Requires-Dist: b; extra == "two"', "Provides-Extra: two",
            'Requires-Dist: omni-adapters[two,one]; extra == "all"', "Provides-Extra: all",
            'Requires-Dist: linter; extra == "dev"', "Provides-Extra: dev")
    required, extras = doctor.requirements()
    assert list(required) == ["base"]
    assert {extra: [one.name for one in brought] for extra, brought in extras.items()} == {
        "one": ["a"], "two": ["a", "b"], "all": ["a", "b"]}


@given(*[st.lists(st.integers(0, 12), min_size=1, max_size=4)] * 2)
def test_older_is_the_order_of_versions(have: list[int], need: list[int]) -> None:
    version, minimum = (".".join(map(str, parts)) for parts in (have, need))
    assert doctor.older(version, minimum) == (Version(version) < Version(minimum))


@pytest.mark.parametrize("version, minimum", [("2.13.0+cpu", "2.13"), ("3.0rc1", "2.9"), (None, "1"), ("1", "")])
def test_versions_that_are_not_older(version: str | None, minimum: str) -> None:
    assert not doctor.older(version, minimum)


def test_all_is_well(well: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--timeout", str(PATIENT)]) == 0
    page = capsys.readouterr().out
    assert "0 problems" in page and max(map(len, page.splitlines())) <= doctor.WIDTH
    assert "versions  ✓ omni-adapters" in page and "✓ first-need" in page and "1.10" in page
    assert "extras    ✓ audio" in page and "reads sound files: second" in page and f"{well.url} answers" in page
    assert "nothing cached yet" in page and "✓ cpu" in page


@pytest.mark.parametrize("code, says", [
    ("raise OSError('libears.so.3: cannot open\\n shared object')", "1.10 OSError: libears.so.3: cannot open shared object"),
    ("import no_such_module_at_all", "1.10 ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ("import sys; print('noise', file=sys.stderr); sys.exit(3)", "1.10 SystemExit: 3"),
    ("import os; os.kill(os.getpid(), 11)", "1.10 ends the interpreter with signal 11"),
    ("import os; os._exit(5)", "1.10 fails"),
])
def test_a_required_package_that_does_not_import(
        well: Server, tmp_path: Path, code: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site" / "first_need" / "__init__.py").write_text(code)
    assert main(["doctor", "--timeout", str(PATIENT)]) == 1
    page = capsys.readouterr()
    assert says in page.out and 'pip install --force-reinstall "first-need>=1.5"' in page.out
    assert "Traceback" not in page.out + page.err and "1 problem; the library cannot work" in page.out


def test_a_required_package_that_is_missing_or_blocked(well: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "first_need", None)
    found = look()["first-need"]
    assert (found.mark, found.fatal, found.todo) == (BAD, True, 'pip install "first-need>=1.5"') and "not installed" in found.says
    monkeypatch.delitem(sys.modules, "first_need")
    (tmp_path / "site" / "first_need").rename(tmp_path / "elsewhere")
    assert look()["first-need"].fatal and main(["doctor", "--timeout", str(PATIENT)]) == 1


def test_what_is_imported_already_is_not_imported_again(well: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "first_need" / "__init__.py").write_text("raise RuntimeError")
    there = types.ModuleType("first_need")
    there.__spec__ = __spec__
    monkeypatch.setitem(sys.modules, "first_need", there)
    assert look()["first-need"].mark == GOOD


def test_a_required_package_that_is_too_old(well: Server, tmp_path: Path) -> None:
    info = tmp_path / "site" / "first_need-1.10.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: first-need\nVersion: 1.4\n")
    found = look()["first-need"]
    assert (found.mark, found.says, found.todo) == (BAD, "1.4, older than 1.5", 'pip install --upgrade "first-need>=1.5"')


def test_an_extra_is_missing_or_broken_and_the_library_still_works(well: Server, tmp_path: Path) -> None:
    module = tmp_path / "site" / "second"
    (module / "__init__.py").write_text("raise OSError('libsecond')")
    found = look()["audio"]
    assert (found.mark, found.says, found.todo, found.fatal) == (
        BAD, "second OSError: libsecond", "pip install --force-reinstall second", False)
    module.rename(tmp_path / "elsewhere")
    found = look()["audio"]
    assert (found.mark, found.says, found.todo) == (
        NEITHER, "reads sound files: without second", 'pip install "omni-adapters[audio]"')
    assert main(["doctor", "--timeout", str(PATIENT)]) == 0


def test_a_checkout_that_was_never_installed(well: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    found = doctor.examine(PATIENT)
    assert found[0].mark == NEITHER and "pip install -e ." in found[0].todo and doctor.healthy(found)


# ---- sources and cache -----------------------------------------------------------------------------------------------


def test_a_source_that_refuses_and_one_that_answers_not_found(well: Server, serve: Callable[[int], Server], refusing: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "endpoints", lambda: {"Hugging Face": refusing, "ModelScope": serve(404).url})
    found = look()
    assert found["ModelScope"].mark == GOOD and found["Hugging Face"].mark == BAD
    assert found["Hugging Face"].says.startswith(f"{refusing}: ") and "HF_ENDPOINT" in found["Hugging Face"].todo
    assert "ms:owner/name" in found["Hugging Face"].todo and doctor.healthy(found.values())


def test_with_no_source_there_is_the_cache(well: Server, refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "endpoints", lambda: dict.fromkeys(doctor.SOURCES, refusing))
    found = look()
    assert all("cached" in found[name].todo and found[name].mark == BAD for name in doctor.SOURCES)


@pytest.mark.parametrize("value, asked", [("1", False), ("yes", False), ("0", True), ("", True)])
def test_offline_nobody_is_asked(well: Server, monkeypatch: pytest.MonkeyPatch, value: str, asked: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    found = look()
    assert bool(well.requests) == asked
    for name in doctor.SOURCES:
        assert found[name].mark == (GOOD if asked else NEITHER) and ("not asked" in found[name].says) != asked


def test_cached_copies(well: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copies = [CachedCopy(f"hf:some/copy-{number}", f"{number}0123456789", tmp_path / str(number), 290_400_000, True)
              for number in range(doctor.MOST_COPIES + 3)]
    copies += [CachedCopy("ms:torn/one", "main", tmp_path / "torn", 12, False),
               CachedCopy("hf:never/hashed", "main", tmp_path, 1_500_000_000_000, None)]
    monkeypatch.setattr(doctor, "cached_copies", lambda: copies)
    found = look()
    assert (found["hf:some/copy-0"].mark, found["hf:some/copy-0"].says) == (GOOD, "00123456 · 290 MB · whole")
    assert found["ms:torn/one"].mark == BAD and found["ms:torn/one"].todo == f"delete {tmp_path / 'torn'} and load it again"
    assert (found["hf:never/hashed"].mark, found["hf:never/hashed"].says) == (NEITHER, "main · 1.5 TB · not checked")
    assert main(["doctor", "--timeout", str(PATIENT)]) == 0
    page = capsys.readouterr().out
    assert "1 problem; 4 more cached copies" in page and "ms:torn/one" in page and "copy-7" in page and "copy-8" not in page


def test_a_full_disk_and_a_cache_that_cannot_be_read(well: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))

    def unreadable() -> list[CachedCopy]:
        raise PermissionError("not yours")

    monkeypatch.setattr(doctor, "cached_copies", unreadable)
    found = look()
    assert found["folder"].mark == BAD and "5 MB free" in found["folder"].says and "OMNI_ADAPTERS_CACHE" in found["folder"].todo
    assert (found["copies"].mark, found["copies"].says) == (BAD, "PermissionError: not yours")


@pytest.mark.parametrize("num_bytes, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (141 * 10**9, "141 GB"),
    (2 * 10**15, "2000 TB")])
def test_sizes(num_bytes: int, text: str) -> None:
    assert doctor.size(num_bytes) == text


# ---- devices and speech ----------------------------------------------------------------------------------------------


DEVICES = '{"devices": [["NVIDIA H200", 150000000000]]}'


def cuda(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A torch built for CUDA whose child runs `code`."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor, "ASK_TORCH", code)
    monkeypatch.setattr(doctor, "version_of", lambda name: "3.6.0")


@pytest.mark.parametrize("code, mark, says", [
    (f"print('''{DEVICES}'''); print('''{{\"kernels\": null}}''')", GOOD, "the kernels run"),
    (f"print('''{DEVICES}'''); print('''{{\"kernels\": \"no C compiler\"}}''')", BAD, "no C compiler"),
    (f"print('noise'); print('''{DEVICES}''', flush=True); import os; os.kill(os.getpid(), 6)", BAD, "ends with code -6"),
])
def test_gpus_and_their_kernels(well: Server, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, code: str, mark: str,
                                says: str) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    sys.modules["triton"].__spec__ = __spec__
    cuda(monkeypatch, code)
    found = look()
    assert (found["cuda:0"].mark, found["cuda:0"].says) == (GOOD, "NVIDIA H200 · 150 GB")
    assert found["triton"].mark == mark and says in found["triton"].says and doctor.healthy(found.values())


def test_a_gpu_without_triton(well: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert look()["triton"].todo == ""
    cuda(monkeypatch, f"print('''{DEVICES}''')")
    assert look()["triton"].mark == NEITHER and look()["triton"].todo == "pip install triton"


def test_cuda_without_a_device(well: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    doctor.ask_cuda()
    answer = json.loads(capsys.readouterr().out)
    assert answer["devices"] == [] and answer["error"]  # as this torch words it
    broken = answer | {"error": "RuntimeError: CUDA driver initialization failed"}
    cuda(monkeypatch, f"print({json.dumps(broken)!r})")
    found = look()
    assert found["cuda"].mark == BAD and broken["error"] in found["cuda"].says and "nvidia-smi" in found["cuda"].todo


def test_a_torch_built_for_cuda_on_a_machine_without_a_gpu_is_no_problem(well: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip installs on Linux by itself."""
    answer = {"built": True, "devices": [], "error": "RuntimeError: Found no NVIDIA driver on your system. Please check …"}
    cuda(monkeypatch, f"print({json.dumps(answer)!r})")
    found = look()
    assert (found["cuda"].mark, found["cuda"].says) == (NEITHER, "torch is built for it; no NVIDIA driver here")
    assert doctor.healthy(found.values())


def test_espeak_speaks_or_says_why_not(well: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    found = look()["espeak-ng"]
    assert (found.mark, found.todo) == (NEITHER, 'pip install "omni-adapters[speech]"')
    broken = types.ModuleType("espeakng_loader")  # without get_data_path
    monkeypatch.setitem(sys.modules, "espeakng_loader", broken)
    found = look()["espeak-ng"]
    assert found.mark == BAD and found.says.startswith("AttributeError") and not found.fatal
    monkeypatch.delitem(sys.modules, "espeakng_loader")
    pytest.importorskip("espeakng_loader")
    found = look()["espeak-ng"]
    assert found.mark == GOOD and found.values["voices"] > 50


# ---- time and form ---------------------------------------------------------------------------------------------------


def test_never_later_than_the_timeout(well: Server, mute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    asleep = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "site" / "first_need" / "__init__.py").write_text(asleep.format(str(tmp_path / "pid")))
    (tmp_path / "site" / "second" / "__init__.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "endpoints", lambda: dict.fromkeys(doctor.SOURCES, mute))
    for name in ("cached_copies", "cache_folder", "voices_heard"):
        monkeypatch.setattr(doctor, name, forever.wait)
    cuda(monkeypatch, f"print('''{DEVICES}''', flush=True); import time; time.sleep(600)")
    began = time.monotonic()
    found = look(SHORT)
    assert time.monotonic() - began < SHORT + 3
    forever.set()
    for name in ("first-need", "audio"):
        assert (found[name].mark, found[name].todo) == (NEITHER, "--timeout 4 waits longer")
        assert "still importing after 1 s" in found[name].says
    for name in (*doctor.SOURCES, "folder", "copies", "espeak-ng"):
        assert found[name].mark == BAD and found[name].todo, found[name]
    assert found["copies"].says == "no answer within 1 s"
    assert doctor.healthy(found.values())
    if (tmp_path / "pid").exists():  # on a busy machine the child may be ended before it is that far
        until = time.monotonic() + PATIENT
        while Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists():
            assert time.monotonic() < until, "the child that imports outlives the doctor"
            time.sleep(0.02)


def test_gpus_are_told_though_their_kernels_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, f"print('''{DEVICES}''', flush=True); import time; time.sleep(600)")
    seen = doctor.accelerators(2.0)
    rows = {one.name: one for one in doctor.about_devices(seen, None, 2.0)}
    assert rows["triton"].mark == NEITHER and "--timeout 24" in rows["triton"].todo
    assert ("cuda:0" in rows) == bool(seen.get("devices"))


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none(timeout: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="positive number of seconds"):
        doctor.examine(timeout)
    assert main(["doctor", f"--timeout={timeout}"]) == 2 and "--timeout" in capsys.readouterr().err


def test_json(well: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "cached_copies", lambda: [CachedCopy("hf:a/b", "main", tmp_path, 7, None)])
    assert main(["doctor", "--json", "--timeout", str(PATIENT)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"healthy", "findings"} and report["healthy"] is True
    for one in report["findings"]:
        assert set(one) == {"section", "name", "mark", "says", "todo", "fatal", "values"} and one["mark"] in (GOOD, NEITHER, BAD)
        assert one["todo"] or one["mark"] != BAD
    values = {one["name"]: one["values"] for one in report["findings"]}
    assert values["first-need"] == {"version": "1.10", "minimum": "1.5"}
    assert values["Hugging Face"] == {"asked": True, "url": well.url, "error": None}
    assert values["hf:a/b"] == {"source": "hf:a/b", "revision": "main", "directory": str(tmp_path), "num_bytes": 7, "ok": None}
    assert values["folder"]["free_bytes"] > 0 and values["cpu"]["cores"] >= 1


def test_terminals_without_the_marks() -> None:
    assert doctor.in_encoding("✓ a – b ✗ c → d · e 耳", "ascii") == "+ a - b x c > d , e ?"
    assert doctor.in_encoding("✓ 耳", "utf-8") == "✓ 耳" and doctor.in_encoding("– é", "latin-1") == "- é"


def run_with(site: Path, package: str, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, with the packages of this environment, but for one whose import runs `code`."""
    (site / package).mkdir()
    (site / package / "__init__.py").write_text(code)
    paths = os.pathsep.join([str(site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMNI_ADAPTERS_CACHE": str(site)}
    return subprocess.run([sys.executable, "-m", "omni_adapters.cli", "doctor", "--timeout", str(PATIENT), *options], text=True,
                          capture_output=True, env={**os.environ, **settings})


@pytest.mark.parametrize("package, code, says", [
    ("torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')", "OSError: libtorch_cpu.so: cannot open shared"),
    ("torch", "import os; os.kill(os.getpid(), 11)", "ends with code -11"),
    ("numpy", "raise ImportError('numpy.core.multiarray failed')", "ImportError: numpy.core.multiarray failed"),
])
def test_what_the_library_is_made_of_is_broken(tmp_path: Path, package: str, code: str, says: str) -> None:
    ran = run_with(tmp_path, package, code)
    assert ran.returncode == 1 and ran.stderr == ""
    line = next(line for line in ran.stdout.splitlines() if f"{BAD} {package} " in line)
    assert says in line and f'pip install --force-reinstall "{package}>=' in ran.stdout
    assert "the library cannot work before" in ran.stdout and "Traceback" not in ran.stdout
    if package == "torch":
        assert f"{NEITHER} cuda " in ran.stdout and "not known" in ran.stdout and "built for it" not in ran.stdout


@pytest.mark.parametrize("found, failure", [
    ({"built": False}, None), ({"built": True, "error": "ends with code -6"}, None),
    ({"error": "no answer within 5 s"}, doctor.Late), (doctor.Late, doctor.Late),
    ({"error": "torch does not import", "torch": "OSError: lib"}, "OSError: lib"),
    ({"error": "ends with code -11: "}, "ends with code -11: ")])
def test_whether_torch_imports_is_what_its_child_says(found: Any, failure: Any) -> None:
    assert doctor.torch_failure(found) == failure


def test_the_command_itself(tmp_path: Path) -> None:
    """A transformers that is broken: exit code 1, no traceback."""
    ran = run_with(tmp_path, "transformers", "raise ImportError('cannot import name ears')", "--json")
    assert ran.returncode == 1 and ran.stderr == ""
    found = {one["name"]: one for one in json.loads(ran.stdout)["findings"]}
    assert found["transformers"]["fatal"] and "ImportError: cannot import name ears" in found["transformers"]["says"]
    assert found["torch"]["values"]["version"] == metadata.version("torch") and found["torch"]["mark"] == GOOD
    assert {"audio", "speech", "train", "trackers", "eval", "demo"} <= set(found) and "dev" not in found
    assert "not asked" in found["ModelScope"]["says"]
