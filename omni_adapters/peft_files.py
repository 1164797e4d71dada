"""LoRA to and from PEFT's folder: adapter_config.json and adapter_model.safetensors.

    base_model.model.{path}.lora_A.weight   (r, in_features)    our lora_a
    base_model.model.{path}.lora_B.weight   (out_features, r)   our lora_b

Both scale by lora_alpha / r, or lora_alpha / √r with use_rslora (peft/tuners/lora/layer.py, peft/utils/save_and_load.py).
Only LoRA on linear layers of one rank goes either way: that is all there is here. Projectors and side rows stay in the
adapter file (`OmniGPT.save_adapter`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from omni_adapters.anatomy import plain_name, unwrap
from omni_adapters.files import json_object, write_whole
from omni_adapters.lora import LoRALinear, inject_at, lora_by_path, lora_layers, lora_settings, remove_lora
from omni_adapters.shapes import BadInput, listing, shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change the arithmetic, and the only values that mean what LoRALinear computes.
PLAIN: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
                         "alpha_pattern": {}, "modules_to_save": None, "lora_bias": False, "layer_replication": None}


def export_peft(gpt: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the GPT's LoRA so that `PeftModel.from_pretrained(the same GPT, folder)` computes the same.

    Merged or not, lora_a and lora_b are written as they are. Raises BadInput where there is no LoRA or layers differ in
    rank, alpha, dropout or rslora; nothing is written then.
    """
    shared = lora_settings(lora_layers(gpt, "export_peft"), "export_peft")
    layers = lora_by_path(gpt)
    config = PLAIN | {"r": shared["rank"], "lora_alpha": shared["alpha"], "lora_dropout": shared["dropout"],
                      "use_rslora": shared["rslora"], "inference_mode": True, "target_modules": list(layers),
                      "base_model_name_or_path": None, "task_type": None}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_whole("export_peft", target / WEIGHTS, save(tensors, {"format": "pt"}))
    write_whole("export_peft", target / CONFIG, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def import_peft(gpt: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Inject the LoRA that PEFT saved for this GPT; returns the paths of its layers.

    Raises BadInput, and leaves the GPT as it came, for settings that LoRALinear does not have (DoRA, biases, ranks that
    differ), for layers the GPT does not have, and for a GPT that has LoRA already.
    """
    where = f"import_peft({os.fspath(folder)})"
    config, tensors = read(where, Path(folder))
    pairs = by_path(where, tensors)
    gpt = unwrap(gpt)
    linears = {plain_name(name): name for name, module in gpt.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(pairs) - set(linears))
    if unknown:
        raise BadInput(where, f"LoRA for {listing(unknown)}", "paths of linear layers of this GPT",
                       "load the GPT it was made for")
    inject_at(gpt, [linears[name] for name in pairs], config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
              rslora=config.get("use_rslora", False))
    try:
        for name, (a, b) in pairs.items():
            copy_into(where, name, gpt.get_submodule(linears[name]), a, b)
    except Exception:
        remove_lora(gpt)
        raise
    return list(pairs)


def read(where: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        contents = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    except FileNotFoundError as error:
        raise BadInput(where, f"no {Path(error.filename).name}", f"a folder with {CONFIG} and {WEIGHTS}") from error
    config = json_object(where, CONFIG, contents[0])
    try:
        tensors = load(contents[1])
    except (ValueError, SafetensorError) as error:
        raise BadInput(where, f"{WEIGHTS}, which does not read ({error})", "the file as PEFT writes it") from error
    if not isinstance(config.get("r"), int) or "lora_alpha" not in config:
        raise BadInput(where, f"a {CONFIG} without r and lora_alpha", "what PEFT's LoraConfig saves")
    for name, plain in PLAIN.items():
        found = config.get(name, plain)
        if found != plain and (found or plain):  # PEFT writes "nothing" as null, false or empty
            raise BadInput(where, f"{name} = {found!r}", f"{plain!r}, all that LoRALinear does")
    return config, tensors


def by_path(where: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a layer → (A, B)."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        path, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or kind not in ("A.weight", "B.weight"):
            raise BadInput(where, f"a tensor {key}", f"{PREFIX}….lora_A.weight or ….lora_B.weight")
        found.setdefault(path, {})[kind] = tensor
    half = [path for path, pair in found.items() if len(pair) < 2]
    if half or not found:
        raise BadInput(where, f"half of {listing(half)}" if half else "no tensors", "lora_A and lora_B for each layer")
    return {path: (pair["A.weight"], pair["B.weight"]) for path, pair in found.items()}


@torch.no_grad()
def copy_into(where: str, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> None:
    assert isinstance(layer, LoRALinear)
    for tensor, own in ((a, layer.lora_a), (b, layer.lora_b)):
        if tensor.shape != own.shape:
            raise BadInput(where, f"{name} with {shape(tensor.shape)}", shape(own.shape), "load the GPT it was made for")
        own.copy_(tensor)
