"""The recipes on a real nanochat checkpoint with its own tokenizer, trained here on the corpus' words.

NANOCHAT_DIR names a checkout; its tokenizer needs the packages rustbpe and tiktoken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import ROOT, build_corpus

NANOCHAT = os.environ.get("NANOCHAT_DIR")

MAKE = """
import sys, torch
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
base = sys.argv[1]
tokenizer = RustBPETokenizer.train_from_iterator(iter(["do re mi fa so la ti ut what"] * 9), 256 + 9 + 9)
tokenizer.save(f"{base}/tokenizer")
sizes = dict(sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
torch.manual_seed(0)
gpt = GPT(GPTConfig(**sizes))
gpt.init_weights()
save_checkpoint(f"{base}/base_checkpoints/d2", 7, gpt.state_dict(), None, {"model_config": sizes})
"""


def test_both_stages_on_a_nanochat_checkpoint(tmp_path: Path) -> None:
    if not NANOCHAT:
        pytest.skip("NANOCHAT_DIR is not set: it names a checkout of nanochat")
    pytest.importorskip("rustbpe", reason="nanochat's tokenizer needs rustbpe")
    pytest.importorskip("tiktoken", reason="nanochat's tokenizer needs tiktoken")
    base = tmp_path / "base"
    environment = {**os.environ, "PYTHONPATH": NANOCHAT, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-c", MAKE, str(base))
    corpus = build_corpus(tmp_path / "corpus")
    common = ["--nanochat", str(base / "base_checkpoints" / "d2"), *corpus.options(tmp_path / "align")[2:], "--question", "what"]
    said = run(str(ROOT / "examples" / "align.py"), *common)
    assert "GPT        GPT" in said and "GPT: 0" not in said
    adapter = str(tmp_path / "align" / "adapter.safetensors")
    run(str(ROOT / "examples" / "instruct.py"), *common, "--adapter", adapter, "--out", str(tmp_path / "instruct"),
        "--distill", "0.5", "--lr", "1e-3")
    for stage in ("align", "instruct"):
        rows = [json.loads(line) for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 20 and all(0 < loss < 20 for loss in losses)
    assert losses[-1] < losses[0]  # stage 2 has begun to learn
