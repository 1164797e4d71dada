"""What a training step reads and changes, as named CPU tensors, and back: trained values and the optimizer's state.

Notable:
- names instead of the running numbers of `Optimizer.state_dict()`: groups may be ordered and cut otherwise on the way back
- bit for bit: training k steps, gathering, restoring into fresh objects and training N − k more equals training N. State
  keeps its own dtype, where `Optimizer.load_state_dict` casts it to the parameter's
- what FSDP2 shards is gathered whole and sharded again, so a run may go on with another number of ranks, or with none
- an AdamW's state in an SGD is refused before anything changes: torch's own optimizers are asked what state they keep

Hyper-parameters (learning rate, betas, weight decay, …) are not among it: they are the caller's, who knows them from the
configuration and the step.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from omni_adapters.collective import is_sharded, whole
from omni_adapters.shapes import BadInput, listing, shape

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}  # a bool is an int, too: the first that fits counts
KINDS = {kind.__name__: kind for kind in NUMBERS}


class Form(NamedTuple):
    """What is checked of a tensor before another is copied over it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{shape(self.shape)} of {str(self.dtype).removeprefix('torch.')}"


def gather_state(trained: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies, on the CPU, of everything that training has changed: `trained.{name}` for each tensor of `trained`, and
    `optimizer.{name}.{key}` for each piece of state that the optimizer holds for it (exp_avg, exp_avg_sq, step, …).

    trained:   name → tensor, the very objects that the optimizer has: parameters, and whatever else training changes.
    optimizer: any whose state is a flat dict a parameter, of tensors and numbers. A number comes as a 0-d tensor under
               `optimizer.{name}.{key}:int` (or float, or bool), which restores its type; None is left out.

    With DTensors (FSDP2) this is a collective: all ranks call it, with the names in the same order, and all get the whole.
    Raises BadInput, on all ranks alike and before the first collective: a parameter that the optimizer trains and
    `trained` does not name, state of another kind, state that a rank keeps to itself beside a sharded parameter.
    """
    where = "gather_state"
    _check_named(where, trained, optimizer)
    states = {name: dict(_labelled(where, name, tensor, optimizer)) for name, tensor in trained.items()}
    found = {}
    for name, tensor in trained.items():
        found[f"trained.{name}"] = _copy(tensor)
        for label in sorted(states[name]):  # one order on all ranks, wherever their state came from
            found[f"optimizer.{name}.{label}"] = _copy(states[name][label])
    return found


def restore_state(trained: Mapping[str, Tensor], optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `gather_state` returned into `trained` and `optimizer`, which may be fresh ones of the same kind.

    Values are copied into the tensors of `trained` where they are: plain ones on any device, or DTensors, whether they
    were sharded when gathered or not. The optimizer's state is replaced by new tensors, sharded like their parameter;
    a parameter without state in `tensors` (it never had a gradient) has none afterwards. No rank waits for another.
    Gradients and hyper-parameters stay as they are. `tensors` is not kept and may be restored again.

    Raises BadInput, naming both sides, before anything is changed: names missing or unknown, another shape or dtype, state
    other than this optimizer keeps. What that is, is read off its present state, or else off one step of its class on
    stand-ins. An optimizer without state that is not of torch.optim is trusted with whatever was saved.
    """
    where = "restore_state"
    _check_named(where, trained, optimizer)
    states = _check_names(where, trained, tensors)
    for name, tensor in trained.items():
        _check_form(where, f"trained.{name}", _form(tensors[f"trained.{name}"]), _form(tensor))
    _check_states(where, trained, optimizer, states)
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(_placed_like(tensor, tensors[f"trained.{name}"]))
        for name, tensor, group in _optimized(trained, optimizer):
            state = dict(_rebuilt(tensor, group, label, value) for label, value in states[name].items())
            optimizer.state.pop(tensor, None)
            if state:
                optimizer.state[tensor] = state


# Gathering


def _check_named(where: str, trained: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """What the optimizer trains and nobody names would be lost without a word."""
    known = {id(tensor) for tensor in trained.values()}
    for number, group in enumerate(optimizer.param_groups):
        lost = [p for p in group["params"] if id(p) not in known and (p.requires_grad or optimizer.state.get(p))]
        if lost:
            raise BadInput(where, f"{len(lost)} parameters in the optimizer's group {number} that `trained` does not have, "
                           f"the first of {_form(lost[0])}", "each parameter of the optimizer under a name",
                           "after sharding or moving a module, take its parameters anew, for `trained` and the optimizer")


def _labelled(where: str, name: str, parameter: Tensor, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The state of one parameter; numbers as tensors, their type in the label."""
    for key, value in optimizer.state.get(parameter, {}).items():
        came = f"optimizer state {key!r:.80} of {name!r:.80} "
        if not isinstance(key, str) or not key or "." in key or ":" in key:
            raise BadInput(where, came.rstrip(), "keys that are text without '.' and ':'", "names are made of them")
        if isinstance(value, Tensor):
            _check_sharding(where, came, parameter, value, is_sharded(value))
            yield key, value
        elif isinstance(value, bool | int | float):
            kind = next(kind for kind in NUMBERS if isinstance(value, kind))
            yield f"{key}:{kind.__name__}", torch.tensor(value, dtype=NUMBERS[kind])
        elif value is not None:
            raise BadInput(where, f"{came}of type {type(value).__name__}", "a tensor or a number")


def _check_sharding(where: str, came: str, parameter: Tensor, value: Tensor, sharded: bool) -> None:
    """Beside a sharded parameter, state is sharded alike or one value: anything else is a rank's own affair."""
    if is_sharded(parameter) and value.ndim and not (sharded and value.shape == parameter.shape):
        raise BadInput(where, f"{came}that is {_form(value)}, beside a sharded parameter of {_form(parameter)}",
                       "a DTensor of its shape, or a 0-d tensor", "train it unsharded, or with another optimizer")


def _copy(tensor: Tensor) -> Tensor:
    """The whole of it, with memory of its own, since training goes on."""
    return whole(tensor).to("cpu", copy=True, memory_format=torch.contiguous_format)


# Checking


def _form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.dtype)


def _check_form(where: str, name: str, came: Form, expected: Form) -> None:
    if came != expected:
        raise BadInput(where, f"{name} {came}", f"{expected}, as it is here", "build what was trained then")


def _check_names(where: str, trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The saved state by name and label, once every name is known to belong somewhere."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    unknown = []
    for full, tensor in tensors.items():
        first, _, rest = full.partition(".")
        name, _, label = rest.rpartition(".")  # labels have no dots, names may
        if first == "optimizer" and name in states and _is_label(label, tensor):
            states[name][label] = tensor
        elif first != "trained" or rest not in states:
            unknown.append(full)
    missing = [f"trained.{name}" for name in trained if f"trained.{name}" not in tensors]
    if unknown or missing:
        raise BadInput(where, f"tensors without {listing(missing) or 'any missing'}, and with {listing(unknown) or 'none'} that "
                       "belong to nothing here", f"exactly the state of {listing(list(trained))}", "build what was trained then")
    return states


def _is_label(label: str, tensor: Tensor) -> bool:
    key, colon, kind = label.partition(":")
    return bool(key) and (not colon or (kind in KINDS and _form(tensor) == Form((), NUMBERS[KINDS[kind]])))


def _check_states(where: str, trained: Mapping[str, Tensor], optimizer: Optimizer,
                  states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A parameter's state is all that this optimizer keeps for it, or nothing."""
    optimized = {name: (parameter, group) for name, parameter, group in _optimized(trained, optimizer)}
    models = _StandIns(optimizer)
    for name, state in states.items():
        if not state:
            continue
        if name not in optimized:
            raise BadInput(where, f"optimizer state ({listing(sorted(state))}) of {name!r:.80}",
                           "none: this optimizer does not train it", "give the optimizer the parameters it had then")
        expected = _expected(where, name, *optimized[name], optimizer, models)
        if expected is not None and set(state) != set(expected):
            raise BadInput(where, f"optimizer state of {name!r:.80} with {listing(sorted(state))}",
                           f"{listing(sorted(expected)) or 'none'}, which {type(optimizer).__name__} keeps as it is set here",
                           "build the optimizer that was used then")
        for label, tensor in state.items():
            came = f"optimizer.{name}.{label}"
            _check_sharding(where, f"{came} ", optimized[name][0], tensor, True)
            _check_form(where, came, _form(tensor), _form(tensor) if expected is None else expected[label])


def _optimized(trained: Mapping[str, Tensor], optimizer: Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return ((name, tensor, groups[id(tensor)]) for name, tensor in trained.items() if id(tensor) in groups)


def _expected(where: str, name: str, parameter: Tensor, group: dict[str, Any], optimizer: Optimizer,
              models: _StandIns) -> dict[str, Form] | None:
    """Label → form of the state that the optimizer keeps for a parameter; None where nobody can tell."""
    if optimizer.state.get(parameter):
        return {label: _form(value) for label, value in _labelled(where, name, parameter, optimizer)}
    return models.forms(parameter, group) if type(optimizer).__module__.startswith("torch.optim") else None


class _StandIns:
    """Small tensors that an optimizer's class takes one step with, to show what state it keeps.

    Axes of a stand-in are 2, 3, 4, … long: a size in its state tells which of the parameter's axes is meant, also where
    the state has fewer values than the parameter, as Adafactor's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.seen: dict[tuple[int, int, torch.dtype], dict[str, Form] | None] = {}

    def forms(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Form] | None:
        """Label → form; None for an optimizer that cannot step like this, as SparseAdam."""
        key = id(group), parameter.ndim, parameter.dtype
        if key not in self.seen:
            try:
                self.seen[key] = self._step(parameter.ndim, parameter.dtype, group)
            except RuntimeError:
                self.seen[key] = None
        seen, sizes = self.seen[key], {axis + 2: size for axis, size in enumerate(parameter.shape)}
        return seen and {label: Form(tuple(sizes.get(size, size) for size in form.shape), form.dtype)
                         for label, form in seen.items()}

    def _step(self, axes: int, dtype: torch.dtype, group: dict[str, Any]) -> dict[str, Form]:
        stand_in = torch.zeros(tuple(range(2, 2 + axes)), dtype=dtype, requires_grad=True)
        stand_in.grad = torch.zeros_like(stand_in)
        plain = {"foreach": False, "fused": None, "capturable": False, "lr": 0.0}  # the same state, on a CPU
        double = copy.copy(self.optimizer)  # shares the hyper-parameters, not the hooks
        double.state = defaultdict(dict)
        double.param_groups = [{**group, **{key: plain[key] for key in plain if key in group}, "params": [stand_in]}]
        double.step()
        return {label: _form(value) for label, value in _labelled("restore_state", "a stand-in", stand_in, double)}


# Restoring


def _placed_like(like: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which each rank has, as a DTensor where `like` is one; without communication."""
    whole = whole.to(like.device)
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = cast(DTensor, like)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _rebuilt(parameter: Tensor, group: dict[str, Any], label: str, value: Tensor) -> tuple[str, Any]:
    """Key and value as the optimizer itself would hold them: where, of which type, and with which strides."""
    key, _, kind = label.partition(":")
    if kind:
        return key, KINDS[kind](value.item())
    if key != "step" and value.shape == parameter.shape:
        return key, torch.empty_like(parameter, dtype=value.dtype).copy_(_placed_like(parameter, value))
    on_host = key == "step" and not group.get("capturable") and not group.get("fused")  # torch's own rule
    return key, value.to("cpu" if on_host else parameter.device, copy=True)
