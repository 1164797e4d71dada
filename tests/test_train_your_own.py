"""docs/train_your_own.md, by copy and paste: every block in its order, at small sizes, against a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import WRITER, hub_for_the_client

from omni_adapters.checkpoint import load_adapter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import stages  # noqa: E402

PAGE = (ROOT / "docs" / "train_your_own.md").read_text()
SMALL = {  # what a command gets besides what the page says; the last of two equal options counts
    "examples/synthetic.py": "--clips 48 --test-clips 6 --words 12 --gpt-steps 8 --rows 8 --n-layer 2 --n-embd 32 --workers 1",
    "examples/align.py": "--steps 6 --max-tokens 800 --validate-every 3 --validate-rows 4 --save-every 2",
    "examples/instruct.py": "--steps 4 --max-tokens 800 --validate-every 2 --validate-rows 4 --save-every 2",
}


def commands(block: str, small: bool = True) -> list[list[str]]:
    """A bash block's commands, to be run by this interpreter."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            own = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "omni_adapters.cli"]
            assert words[0] in ("python", "omni-adapters"), f"who is to run {line!r}?"
            found.append([*own, *words[1:], *(SMALL.get(words[1], "").split() if small else [])])
    return found


@pytest.mark.slow
def test_the_page_is_run_from_a_manifest_to_a_published_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with hub_for_the_client(tmp_path, monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", WRITER)
        namespace: dict[str, Any] = {}
        for kind, block in re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
            if kind == "python":
                exec(compile(block, "train_your_own.md", "exec"), namespace)
                continue
            for command in commands(block):
                done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
                assert done.returncode == 0, done.stderr
        (published,) = hub.repositories
        assert published == "you/ears"
    assert capsys.readouterr().out.count("said  ") == 3
    saved, _ = load_adapter(tmp_path / "runs" / "instruct" / "adapter.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in namespace["again"].trained().items())
    assert namespace["again"].trained().keys() == saved.keys()
    for stage in ("align", "instruct"):
        metrics = json.loads((tmp_path / "runs" / stage / "metrics.json").read_text())
        assert {"right", "shuffled", "blank", "text_oracle", "gap", "pca"} <= set(metrics)
        for picture in ("loss.png", "pca.png"):
            assert (tmp_path / "runs" / stage / picture).stat().st_size > 5000


def test_the_tables_are_the_committed_results() -> None:
    results = json.loads((stages.RESULTS / "stages.json").read_text())
    assert results["scale"] == 1.0
    for text in (PAGE, (ROOT / "README.md").read_text()):
        assert stages.table(results["rows"]) in text


def test_the_page_trains_as_the_benchmark_does() -> None:
    """Commands on the page have the benchmark's settings, but for how often it looks."""
    measured = stages.commands(Path("runs"), 1.0)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        for _, script, *given in (command for command in commands(block, small=False) if command[1] in SMALL):
            known = measured[Path(script).stem]
            pairs = dict(zip(known[1::2], known[2::2]))
            for name, value in zip(given[::2], given[1::2]):
                assert pairs[name].endswith(value.removeprefix("runs")) or name == "--out", (script, name)
