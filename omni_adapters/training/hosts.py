"""Opening a host: a GPT and its tokenizer, from wherever they were trained.

    reference      a folder that `save_reference` wrote: the package's own GPT and a tokenizer of whole words
    nanochat       a checkpoint folder of nanochat, such as ~/.cache/nanochat/chatsft_checkpoints/d20; nanochat importable
    transformers   a folder or a Hub id that AutoModelForCausalLM and AutoTokenizer read
    module:function   your own loader: function(checkpoint, device) -> (gpt, tokenizer)

A tokenizer speaks nanochat: `encode(text) -> ids`, `decode(ids) -> text`, `encode_special("<|bos|>") -> id`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from omni_adapters.files import json_object, write_whole
from omni_adapters.shapes import BadInput, listing

SPECIALS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")  # nanochat's own


@runtime_checkable
class Tokenizer(Protocol):
    """What a recipe asks of a tokenizer; nanochat's RustBPETokenizer has it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def encode_special(self, text: str) -> int: ...


class Host(NamedTuple):
    gpt: nn.Module
    tokenizer: Tokenizer


def open_host(kind: str, checkpoint: str | os.PathLike[str], device: torch.device | str = "cpu") -> Host:
    """The GPT in eval mode on `device`, and its tokenizer.

    kind: reference, nanochat, transformers, or module:function. Raises BadInput for an unknown kind, a folder that is not
    one, and a loader that returns something else; ImportError where nanochat or the named module cannot be imported.
    """
    loader = LOADERS.get(kind) or named_loader(kind)
    opened = loader(checkpoint, torch.device(device))
    if not (isinstance(opened, tuple) and len(opened) == 2 and isinstance(opened[0], nn.Module)
            and isinstance(opened[1], Tokenizer)):
        raise BadInput(f"open_host({kind!r})", f"a loader that returns {type(opened).__name__}", "(gpt, tokenizer)",
                       "the tokenizer needs encode, decode and encode_special")
    return Host(opened[0].eval(), opened[1])


def named_loader(kind: str) -> Callable[[Any, torch.device], Any]:
    """A function by its name, from a module that can be imported or lies in the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, colon, function = kind.partition(":")
    if not colon:
        raise BadInput("open_host", f"kind {kind!r}", f"{listing(list(LOADERS))}, or module:function")
    loader: Callable[[Any, torch.device], Any] | None = getattr(importlib.import_module(module), function, None)
    if loader is None:
        raise BadInput("open_host", f"{kind!r}, and {module} has no {function}", "a function(checkpoint, device)")
    return loader


# ---- the package's own GPT ------------------------------------------------------------------------------------------------


class WordTokenizer:
    """Text is words between blanks, every word a token; the special tokens come first."""

    def __init__(self, words: Sequence[str]) -> None:
        self.tokens = [*SPECIALS, *words]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        strange = [word for word in words if not word or word.split() != [word] or word in SPECIALS]
        if strange or len(self.ids) != len(self.tokens):
            raise BadInput("WordTokenizer", f"{len(words)} words, {listing(strange) or 'some of them twice'}",
                           "distinct words without blanks")

    def encode(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in self.ids or word in SPECIALS]
        if unknown:
            raise BadInput("WordTokenizer", f"the word {listing(unknown)}", f"one of the {len(self.tokens)} it knows",
                           "train the GPT with a larger vocabulary, or leave the row out")
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.tokens[token] for token in ids)

    def encode_special(self, text: str) -> int:
        return self.ids[text]


def save_reference(folder: str | os.PathLike[str], gpt: nn.Module, words: Sequence[str]) -> None:
    """Write a `reference_gpt.GPT` and its words: model.safetensors, then host.json, so a folder that has one is whole."""
    tokenizer, target = WordTokenizer(words), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = vars(gpt.config)
    if config["vocab_size"] != len(tokenizer.tokens):
        raise BadInput("save_reference", f"{len(words)} words for a vocabulary of {config['vocab_size']}",
                       f"{config['vocab_size'] - len(SPECIALS)}, as {len(SPECIALS)} ids are special tokens")
    (target / "host.json").unlink(missing_ok=True)
    state = {name: tensor.contiguous() for name, tensor in gpt.state_dict().items()}
    write_whole("save_reference", target / "model.safetensors", save(state))
    content = json.dumps({"config": config, "words": list(words)}, ensure_ascii=False, indent=1)
    write_whole("save_reference", target / "host.json", content.encode())


def load_reference(folder: str | os.PathLike[str], device: torch.device) -> tuple[nn.Module, Tokenizer]:
    from omni_adapters.reference_gpt import GPT, GPTConfig

    source = Path(folder)
    if not (source / "host.json").is_file():
        raise BadInput("load_reference", f"{source}, which has no host.json", "a folder that save_reference finished")
    content = json_object("load_reference", f"{source / 'host.json'}", (source / "host.json").read_bytes(), "train the GPT again")
    try:
        gpt = GPT(GPTConfig(**content["config"]))
        gpt.load_state_dict(load_file(source / "model.safetensors"))
        return gpt.to(device), WordTokenizer(content["words"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput("load_reference", f"{source}, which does not load ({error})", "what save_reference wrote",
                       "train the GPT again") from error


# ---- others' --------------------------------------------------------------------------------------------------------------


def load_nanochat(checkpoint_dir: str | os.PathLike[str], device: torch.device) -> tuple[nn.Module, Tokenizer]:
    """The newest step in a nanochat checkpoint folder; its tokenizer lies where nanochat keeps it (NANOCHAT_BASE_DIR)."""
    try:
        from nanochat.checkpoint_manager import build_model, find_last_step
    except ImportError as error:
        raise BadInput("load_nanochat", f"no nanochat to import ({error})", "its package, and what that needs",
                       "put the checkout on PYTHONPATH") from error
    folder = Path(checkpoint_dir).expanduser()
    if not list(folder.glob("model_*.pt")):
        raise BadInput("load_nanochat", f"{folder}, which holds no model_*.pt", "a checkpoint folder of nanochat",
                       "name the folder of one model, such as ~/.cache/nanochat/chatsft_checkpoints/d20")
    gpt, tokenizer, _ = build_model(str(folder), find_last_step(str(folder)), device, "eval")
    return gpt, tokenizer


class TransformersTokenizer:
    """nanochat's words for a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def encode_special(self, text: str) -> int:
        known = self.tokenizer.get_vocab()
        if text not in known:
            raise BadInput("TransformersTokenizer", f"the special token {text}", "one that the tokenizer has",
                           "use --form plain, or add the chat tokens to the tokenizer and the model")
        return int(known[text])


def load_transformers(checkpoint: str | os.PathLike[str], device: torch.device) -> tuple[nn.Module, Tokenizer]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True)
    return gpt.to(device), TransformersTokenizer(AutoTokenizer.from_pretrained(checkpoint))


LOADERS: dict[str, Callable[[Any, torch.device], tuple[nn.Module, Tokenizer]]] = {
    "reference": load_reference, "nanochat": load_nanochat, "transformers": load_transformers,
}
