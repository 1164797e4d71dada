"""The examples run: the demo at a small size and, slowly, at its own, where it must reach its goals; the seed's smoke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FILES = {"metrics.json", "loss.png", "spectrogram_to_text.png", "hello.wav", "adapter.safetensors"}
SETS = {"unseen_sentences", "unseen_voices", "shuffled", "blank", "text_oracle"}
SMALL = "--clips 60 --test-clips 8 --lm-steps 4 --steps 4 --rows 4 --hidden 32".split()


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def demo(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    printed = run("demo.py", "--out", str(out), *arguments)
    assert {path.name for path in out.iterdir()} >= FILES
    return json.loads((out / "metrics.json").read_text()), printed


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(tmp_path: Path) -> None:
    metrics, printed = demo(tmp_path, *SMALL, "--say", "lock the red door in the attic now")
    assert metrics.keys() >= SETS
    for name in SETS:
        assert {"exact_match", "word_accuracy", "loss"} == metrics[name].keys()
        assert 0 <= metrics[name]["exact_match"] <= metrics[name]["word_accuracy"] <= 1 and metrics[name]["loss"] > 0
    weights = load_file(tmp_path / "adapter.safetensors")
    trained = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("projector."))
    assert metrics["trainable_parameters"] == trained and metrics["lm_unchanged"] and metrics["seconds"] > 0
    assert metrics["frozen_parameters"] > 0
    for line in ("unseen sentences", "shuffled audio", "given as text", "lock the red door in the attic now"):
        assert line in printed


def test_the_demo_refuses_words_its_gpt_never_saw(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--say", "open the pod bay door"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "pod, bay not among them" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_reaches_its_goals(tmp_path: Path) -> None:
    metrics, _ = demo(tmp_path)
    assert metrics["unseen_sentences"]["exact_match"] >= 0.97
    assert metrics["unseen_voices"]["exact_match"] >= 0.88
    assert metrics["shuffled"]["exact_match"] <= 0.05 and metrics["blank"]["exact_match"] <= 0.05
    assert metrics["lm_unchanged"] and [row["word"] for row in metrics["heard"]] == metrics["said"].split()


@pytest.mark.slow
def test_align_smoke(tmp_path: Path) -> None:
    assert "passed" in run("align_smoke.py", "--out", str(tmp_path))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["first_loss"] - report["last_loss"] >= 0.5 and report["passed"]
