"""LoRA that PEFT reads, and PEFT's that we read: the same logits on the same GPT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import fingerprint, nano_gpt, reference, tiny_hf
from safetensors.torch import load_file, save_file
from torch import nn

from omni_adapters.lora import inject_lora, lora_layers, lora_parameters, merge_lora
from omni_adapters.peft_files import CONFIG, WEIGHTS, export_peft, import_peft
from omni_adapters.shapes import BadInput

peft = pytest.importorskip("peft")
IDX = torch.tensor([[1, 2, 3, 4, 5]])
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32 logits of order 1; both add the same three matmuls, in the same order


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result = model(IDX)
    return result[0] if type(result) is tuple else getattr(result, "logits", result)


def ours(gpt: nn.Module, **options: Any) -> nn.Module:
    inject_lora(gpt, **({"rank": 3, "alpha": 7.0} | options))
    rng = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(gpt)[1::2]:
        parameter.data.normal_(std=0.2, generator=rng)
    return gpt.eval()


@pytest.mark.parametrize("options", [{}, {"rslora": True, "dropout": 0.1, "targets": ("mlp",)}], ids=["plain", "rslora"])
@pytest.mark.parametrize("build", [reference, nano_gpt, tiny_hf])
def test_peft_reads_ours(tmp_path: Path, build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    gpt = ours(build(), **options)
    expected = logits(gpt)
    merge_lora(gpt)
    export_peft(gpt, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    assert not torch.allclose(logits(build().eval()), expected, **CLOSE)
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("build", [reference, tiny_hf])
def test_we_read_pefts(tmp_path: Path, build: Callable[[], nn.Module], rslora: bool) -> None:
    names = ["c_q", "c_proj"] if build is reference else ["q_proj", "fc1"]
    config = peft.LoraConfig(r=5, lora_alpha=9, target_modules=names, use_rslora=rslora, init_lora_weights=False)
    theirs = peft.get_peft_model(build(), config).eval()
    expected = logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    gpt = build().eval()
    paths = import_peft(gpt, tmp_path)
    torch.testing.assert_close(logits(gpt), expected, **CLOSE)
    assert {path.split(".")[-1] for path in paths} == set(names)
    export_peft(gpt, tmp_path / "again")
    mine, other = load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


Change = Callable[[dict[str, torch.Tensor]], Any]


def edited(folder: Path, config: dict[str, Any] | None = None, tensors: Change | None = None) -> None:
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    if tensors is not None:
        found = load_file(folder / WEIGHTS)
        tensors(found)
        save_file(found, folder / WEIGHTS)


FIRST = "base_model.model.transformer.h.0.attn.c_q.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (lambda f: edited(f, {"use_dora": True}), "use_dora = True; expected False"),
    "biases": (lambda f: edited(f, {"bias": "all"}), "bias = 'all'"),
    "ranks": (lambda f: edited(f, {"rank_pattern": {"c_q": 8}}), "rank_pattern"),
    "another method": (lambda f: edited(f, {"peft_type": "LOHA"}), "peft_type = 'LOHA'"),
    "no rank": (lambda f: edited(f, {"r": None}), "without r and lora_alpha"),
    "another rank": (lambda f: edited(f, {"r": 2}), r"h\.0\.attn\.c_k with \(3, 32\); expected \(2, 32\)"),
    "half a layer": (lambda f: edited(f, tensors=lambda t: t.pop(FIRST)), r"half of transformer\.h\.0\.attn\.c_q"),
    "a foreign layer": (lambda f: edited(f, tensors=lambda t: t.update({
        "base_model.model.encoder.q.lora_A.weight": torch.zeros(3, 4),
        "base_model.model.encoder.q.lora_B.weight": torch.zeros(4, 3)})), r"LoRA for encoder\.q"),
    "a foreign tensor": (lambda f: edited(f, tensors=lambda t: t.update({"weight": torch.zeros(1)})), "a tensor weight"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "torn weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), "does not read"),
    "torn config": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}, which is not JSON"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_ours_is_refused_and_changes_nothing(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    export_peft(ours(reference()), tmp_path)
    spoil(tmp_path)
    gpt = reference()
    before = fingerprint(gpt)
    with pytest.raises(BadInput, match=message):
        import_peft(gpt, tmp_path)
    assert fingerprint(gpt) == before


def test_nothing_is_written_for_a_gpt_without_lora_or_with_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="without LoRA"):
        export_peft(reference(), tmp_path / "a")
    gpt = ours(reference())
    lora_layers(gpt, "")[0].alpha = 8.0
    with pytest.raises(BadInput, match="layers of 2 kinds"):
        export_peft(gpt, tmp_path / "a")
    assert not (tmp_path / "a").exists()
