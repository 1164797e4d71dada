"""What frozen encoders from checkpoints share: reading a directory without trust, and which hidden layers are asked for.

Notable:
- whatever json or transformers make of a broken file becomes BadInput that names the file
- tensors are checked by name and shape: transformers' from_pretrained would fill a gap with random numbers and a warning
- layers are numbered as transformers' `hidden_states` are: 0 enters the first layer, i leaves the i-th
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni_adapters.encoders.weights import weight_files
from omni_adapters.shapes import BadInput, listing

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Layer = int | Sequence[int] | Literal["all"] | None
REQUIRED_FILES = ("config.json", "preprocessor_config.json")
AGAIN = "fetch the directory again, as a whole"
WAYS_OUT = ("Ways out: pass a local directory with config.json, preprocessor_config.json and model.safetensors, or several "
            'places to try in order, ["ms:owner/name", "hf:owner/name", "path/to/it"]; point HF_ENDPOINT or MODELSCOPE_ENDPOINT '
            "at a mirror that answers, in the environment of the process.")


def places(where: str, source: Source) -> list[str | Path]:
    """The places that a source names, in the order in which they are tried, as `fetch_weights` takes them: one, or several.
    BadInput for none."""
    several = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not several or not all(isinstance(place, str | os.PathLike) and os.fspath(place) for place in several):
        raise BadInput(where, f"source {source!r:.60}", "a directory, the id of a model, or several of them to try in order")
    return [place if isinstance(place, str) else Path(place) for place in several]


def selected_layers(where: str, layer: Layer, num_hidden_layers: int) -> tuple[int, ...] | None:
    """Hidden states of an encoder of N layers, as numbers from 0 to N: (7,) for 7, (N,) for −1, (0, …, N) for "all", in the
    order in which they were asked for; None for None, the last hidden state. BadInput for what names no hidden state."""
    if layer is None:
        return None
    if isinstance(layer, str) and layer == "all":
        return tuple(range(num_hidden_layers + 1))
    asked = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    found = tuple(one + num_hidden_layers + 1 if isinstance(one, int) and one < 0 else one for one in asked)
    numbers = [one for one in found if isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= num_hidden_layers]
    if not numbers or len(numbers) < len(found) or len(set(numbers)) < len(numbers):
        raise BadInput(where, f"layer {layer!r:.60}", f"None, 'all', or different numbers from 0 to {num_hidden_layers}",
                       f"negative numbers count from the end: -1 is {num_hidden_layers}")
    return tuple(numbers)


def recorded_layers(layers: tuple[int, ...] | None, num_hidden_layers: int) -> dict[str, int | list[int] | str]:
    """`layer` as an adapter writes it: nothing for the last hidden state, a number, a list, or "all"."""
    if layers is None:
        return {}
    if layers == tuple(range(num_hidden_layers + 1)):
        return {"layer": "all"}
    return {"layer": layers[0] if len(layers) == 1 else list(layers)}


def side_by_side(hidden: Mapping[int, Tensor], layers: Sequence[int]) -> Tensor:
    """Hidden states (B, T, width) by number → (B, T, L · width), layer by layer in the order of `layers`."""
    return hidden[layers[0]] if len(layers) == 1 else torch.cat([hidden[number] for number in layers], dim=-1)


def read_object(where: str, path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file."""
    with refusing(where, path):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise BadInput(where, f"{path} with a JSON {type(found).__name__}", "a JSON object", AGAIN)
    return found


@contextmanager
def refusing(where: str, path: Path) -> Iterator[None]:
    """Inside, whatever json and transformers make of a file they cannot use becomes BadInput that names it."""
    try:
        yield
    except Exception as error:  # transformers raises ValueError, TypeError, KeyError, its validators their own
        raise BadInput(where, f"{path}, which does not load ({type(error).__name__}: {error!s:.200})",
                       f"a checkpoint's file that {where} reads", AGAIN) from error


def read_tensors(where: str, directory: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names that `rename` gives them; what it renames to None is never read."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, a safetensors file is not a dict
                    name = rename(key)
                    if name is not None:
                        tensors[name] = file.get_tensor(key)
        except SafetensorError as error:
            raise BadInput(where, f"{path}, which does not read ({error})", "a whole safetensors file",
                           "delete it and fetch it again") from error
    return tensors


def check_names(where: str, directory: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape than the config in the same directory implies."""
    wrong = [name for name, tensor in expected.items() if name not in found or found[name].shape != tensor.shape]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise BadInput(where, f"a checkpoint in {directory} that disagrees with its config on {listing(wrong)}",
                       f"the {len(expected)} encoder tensors of that config", AGAIN)


def copies(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`, others as they are. What safe_open returns is the mapped file itself, gone when
    somebody truncates it; a copy is not."""
    return {name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in tensors.items()}
