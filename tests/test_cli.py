"""The command: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_whisper import make_tiny_whisper

from omni_adapters.cli import main
from omni_adapters.cost import cost
from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.manifest import ManifestRow, write_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.encoders.conv import ConvEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.log_mel_pitch import LogMelPitchEncoder
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.fingerprints import describe_encoder
from omni_adapters.shapes import BadInput
from omni_adapters.training.sources import open_source


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for number, seconds in enumerate((0.5, 0.3, 0.4)):
        path = tmp_path / f"{number}.wav"
        save_audio(path, np.sin(np.arange(int(16_000 * seconds)) / (9 + number)).astype(np.float32) / 2, 16_000)
        rows.append(ManifestRow(str(path), f"tone {number}", seconds))
    write_manifest(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize("name, kind", [("log_mel", LogMelEncoder), ("log_mel_pitch", LogMelPitchEncoder)])
def test_extract_log_mel(name: str, kind: type[LogMelEncoder], manifest: Path, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    command = ["extract", "--manifest", str(manifest), "--encoder", name, "--out", str(out), "--samples-per-shard", "2",
               "--dtype", "float32"]
    assert main(command) == 0 and capsys.readouterr().out == f"{out}\n"
    reader = ShardReader(out, verify=True)
    assert reader.config["description"]["type"] == kind.__name__ and len(reader) == 3
    heard, rows = reader.load_batch([2, 0, 1])
    encoder = kind()
    for row, values, steps in zip(rows, heard.values, heard.lens):
        sound = load_audio(tmp_path / row["audio"], 16_000)
        alone = encoder(encoder.preprocess([sound]))
        assert torch.equal(values[:steps], alone.values[0])
    inputs, _ = open_source(out, encoder).load_batch([0])
    assert torch.equal(encoder(inputs).values[0], reader.load_batch([0])[0].values[0])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 0 and "already finished" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_extract_with_ears_of_ones_own(manifest: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(width=16, num_blocks=1)
    encoder.save(tmp_path / "ears")
    assert main(["extract", "--manifest", str(manifest), "--encoder", str(tmp_path / "ears"), "--out", str(tmp_path / "shards"),
                 "--dtype", "float32"]) == 0
    heard, rows = open_source(tmp_path / "shards", ConvEncoder.load(tmp_path / "ears")).load_batch([0])
    alone = encoder(encoder.preprocess([load_audio(tmp_path / rows[0]["audio"], 16_000)]))
    torch.testing.assert_close(heard.values, alone.values, rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="shards of another encoder"):
        open_source(tmp_path / "shards", LogMelEncoder())


def test_extract_whisper_and_its_fingerprint(manifest: Path, tmp_path: Path) -> None:
    folder = make_tiny_whisper(tmp_path / "whisper")
    assert main(["extract", "--manifest", str(manifest), "--encoder", str(folder), "--out", str(tmp_path / "a")]) == 0
    config = ShardReader(tmp_path / "a").config
    assert config["description"]["sha256"] == describe_encoder(WhisperEncoder(folder))["sha256"]
    assert "source" not in config["description"]


def test_ranks_of_torchrun_share_the_work(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(out: str) -> dict[str, bytes]:
        assert main(["extract", "--manifest", str(manifest), "--encoder", "log_mel", "--out", str(tmp_path / out),
                     "--samples-per-shard", "1"]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    alone = extract("alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert len([name for name in extract("shared") if name.endswith(".tar")]) == 1
    monkeypatch.setenv("RANK", "0")
    assert extract("shared") == alone


def test_bad_clips_are_refused_together_or_skipped(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.wav").write_bytes(b"")
    (tmp_path / "2.wav").unlink()
    command = ["extract", "--manifest", str(manifest), "--encoder", "log_mel", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "line 1: " in printed and "line 3: " in printed and "line 2: " not in printed and "--skip-bad" in printed
    assert not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad"]) == 0 and "2 of them without frames" in capsys.readouterr().err
    reader = ShardReader(tmp_path / "out", verify=True)
    assert len(reader) == 1 and reader.row(0)["text"] == "tone 1"
    assert [key for key, _ in reader.skipped] == ["000000000", "000000002"]


@pytest.mark.parametrize(("change", "message"), [
    ({"--manifest": "missing.jsonl"}, "missing.jsonl"),
    ({"--encoder": "no/such/folder/here"}, "WhisperEncoder"),
    ({"--samples-per-shard": "0"}, "samples_per_shard 0"),
])
def test_refusals_are_one_line_and_exit_code_2(manifest: Path, tmp_path: Path, change: dict[str, str], message: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--manifest": str(manifest), "--encoder": "log_mel", "--out": str(tmp_path / "out")} | change
    assert main(["extract", *(word for pair in options.items() for word in pair)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and not printed.out
    assert not (tmp_path / "out").exists()


def test_the_installed_command() -> None:
    done = subprocess.run([Path(sys.executable).parent / "omni-adapters", "extract", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--samples-per-shard" in done.stdout


COST = ["cost", "--depth", "12", "--soft", "188", "--text", "256", "--batch", "16", "--gpu", "h200", "--stage", "1"]


def test_cost_prints_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COST) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Computed, not measured.") and "USD per 1,000 h" in printed and "| 1,000 |" in printed
    assert main([*COST, "--gpus", "4", "--price", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = cost(gpus=[4], price=6.0)[0]
    assert [row["num_gpus"] for row in told["computed"]] == [4] and told["price_per_gpu_hour"] == 6
    assert told["computed"][0]["price_per_1000_hours"] == found.price_per_1000_hours


def test_cost_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COST, "--gpu", "h900"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "h200, h100, a100, l40s, rtx4090, cpu" in printed.err and not printed.out
