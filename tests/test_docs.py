"""What is written is run: every ```python block of README.md and docs/ executes, block after block, in one namespace a
page. `nanochat` there is a stand-in: the reference GPT and a byte tokenizer behind nanochat's names."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from omni_adapters.data.audio import save_audio
from omni_adapters.reference_gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_ITS_OWN_TEST = {"train_your_own.md"}  # whose blocks need what its commands have made


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


class Tokenizer:
    def encode(self, text: str, prepend: str | None = None) -> list[int]:
        return [256] * (prepend is not None) + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def nanochat() -> dict[str, ModuleType]:
    def load_model(source: str, *args: Any, **kwargs: Any) -> tuple[GPT, Tokenizer, dict[str, Any]]:
        return GPT(GPTConfig(vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)).eval(), Tokenizer(), {}

    manager = ModuleType("nanochat.checkpoint_manager")
    manager.load_model = load_model
    return {"nanochat": ModuleType("nanochat"), manager.__name__: manager}


RUN_HERE = [page for page in PAGES if blocks(page) and page.name not in WITH_ITS_OWN_TEST]


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, module in nanochat().items():
        monkeypatch.setitem(sys.modules, name, module)
    save_audio(Path("hello.wav"), np.sin(np.arange(16_000) / 20).astype(np.float32), 16_000)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
