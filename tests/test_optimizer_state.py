"""Optimizer state by name: gathered, restored into fresh objects, and trained on as if nothing had been in between."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop, SparseAdam

from omni_adapters.checkpoint import load_adapter, save_adapter
from omni_adapters.shapes import BadInput
from omni_adapters.training.optimizer_state import gather_state, restore_state

SHAPES = {"fc.weight": (5, 3), "fc.bias": (5,), "fc": (2, 1, 4), "scale": (), "none": (0, 3)}  # one name begins another


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    found["turned"] = torch.randn(3, 4, generator=generator).to(dtype).T  # not contiguous, and so is its state
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def matrices(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in
            {"a": (4, 3), "b": (2, 6)}.items()}


def train(trained: dict[str, Tensor], optimizer: Optimizer, start: int, end: int, skip: str = "") -> None:
    """Gradients that depend on the step and on the values, so that an error anywhere goes on."""
    for step in range(start, end):
        for number, (name, tensor) in enumerate(trained.items()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            noise = torch.empty_like(tensor).copy_(torch.randn(tensor.shape, generator=generator))  # strides as autograd has them
            tensor.grad = None if name == skip else (noise + tensor.sin()).detach()
        optimizer.step()


def groups(trained: dict[str, Tensor], **options: Any) -> list[dict[str, Any]]:
    """Two, of other hyper-parameters and another order than `trained` has."""
    names = sorted(trained, reverse=True)
    return [{"params": [trained[name] for name in names[:2]], "lr": 0.03, **options}, {"params": [trained[n] for n in names[2:]]}]


OPTIMIZERS: dict[str, Callable[[dict[str, Tensor]], Optimizer]] = {
    "AdamW": lambda trained: AdamW(trained.values(), lr=0.01, foreach=False),
    "AdamW foreach": lambda trained: AdamW(groups(trained, weight_decay=0.1), lr=0.01, foreach=True),
    "AdamW fused": lambda trained: AdamW(groups(trained, betas=(0.8, 0.9)), lr=0.01, fused=True),
    "Adam amsgrad": lambda trained: Adam(groups(trained, amsgrad=True), lr=0.01),
    "SGD": lambda trained: SGD(trained.values(), lr=0.01),
    "SGD momentum": lambda trained: SGD(groups(trained, momentum=0.5), lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda trained: RMSprop(groups(trained, momentum=0.5), lr=0.01, centered=True),
    "NAdam": lambda trained: NAdam(groups(trained), lr=0.01),
    "Adagrad": lambda trained: Adagrad(groups(trained), lr=0.01),
    "Adafactor": lambda trained: Adafactor(groups({name: t for name, t in trained.items() if t.numel()}), lr=0.01),
}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def raw(trained: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Any]:
    """Everything that gather_state should see, read by other means: values, types, strides, of tensors and numbers."""
    index = {id(p): name for name, p in trained.items()}
    found: dict[str, Any] = {name: tensor.tolist() for name, tensor in trained.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            kind = (value.dtype, value.stride(), value.device, value.requires_grad) if isinstance(value, Tensor) else ()
            found[f"{index[id(parameter)]} {key}"] = type(value), *kind, value.tolist() if kind else value
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_training_goes_on_bit_for_bit(kind: str, cut: int, tmp_path: Path) -> None:
    """N = 8 steps = `cut` steps, a checkpoint on the disk, fresh objects, and the rest."""
    whole, part, fresh = parameters(), parameters(), parameters(seed=1)
    optimizers = [OPTIMIZERS[kind](trained) for trained in (whole, part, fresh)]
    train(whole, optimizers[0], 0, 8)
    train(part, optimizers[1], 0, cut)
    save_adapter(tmp_path / "state.safetensors", gather_state(part, optimizers[1]), {})
    restore_state(fresh, optimizers[2], load_adapter(tmp_path / "state.safetensors")[0])
    assert raw(fresh, optimizers[2]) == raw(part, optimizers[1])
    train(fresh, optimizers[2], cut, 8)
    assert raw(fresh, optimizers[2]) == raw(whole, optimizers[0])
    same(gather_state(fresh, optimizers[2]), gather_state(whole, optimizers[0]))


@pytest.mark.parametrize("kind", ["AdamW foreach", "AdamW fused", "SGD momentum", "Adam amsgrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    whole, fresh = parameters(dtype=dtype), parameters(seed=1, dtype=dtype)
    one, two = OPTIMIZERS[kind](whole), OPTIMIZERS[kind](fresh)
    train(whole, one, 0, 3)
    restore_state(fresh, two, gather_state(whole, one))
    train(whole, one, 3, 5)
    train(fresh, two, 3, 5)
    assert raw(fresh, two) == raw(whole, one)


def test_muon() -> None:
    whole, fresh = matrices(), matrices(seed=1)
    one, two = Muon(whole.values(), lr=0.01), Muon(fresh.values(), lr=0.01)
    train(whole, one, 0, 3)
    restore_state(fresh, two, gather_state(whole, one))
    train(whole, one, 3, 5)
    train(fresh, two, 3, 5)
    assert raw(fresh, two) == raw(whole, one)


@given(split=st.lists(st.integers(0, 2), min_size=6, max_size=6), order=st.permutations(range(6)), seed=st.integers(0, 9))
def test_groups_may_be_cut_otherwise(split: list[int], order: list[int], seed: int) -> None:
    """Names tie state to parameters: their numbers in the optimizer, which torch's own state_dict goes by, do not matter."""
    one, two = parameters(seed), parameters(seed + 1)
    names = list(one)
    cut = [[two[names[number]] for number in order if split[number] == group] for group in range(3)]
    first, second = AdamW(one.values()), AdamW([{"params": params} for params in cut if params])
    train(one, first, 0, 2)
    restore_state(two, second, gather_state(one, first))
    train(one, first, 2, 4)
    train(two, second, 2, 4)
    assert raw(two, second) == raw(one, first)


def test_the_names() -> None:
    trained = parameters()
    optimizer = Adam(trained.values(), amsgrad=True)
    train(trained, optimizer, 0, 1)
    keys = ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    expected = {f"trained.{name}" for name in trained} | {f"optimizer.{name}.{key}" for name in trained for key in keys}
    found = gather_state(trained, optimizer)
    assert set(found) == expected
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())


def test_what_is_gathered_and_restored_is_a_copy() -> None:
    trained = parameters()
    optimizer = AdamW(trained.values())
    train(trained, optimizer, 0, 2)
    found = gather_state(trained, optimizer)
    before = {name: tensor.clone() for name, tensor in found.items()}
    train(trained, optimizer, 2, 4)
    same(found, before)
    for _ in range(2):  # twice from the same
        restore_state(trained, optimizer, found)
        same(gather_state(trained, optimizer), before)
        train(trained, optimizer, 2, 4)
        same(found, before)


def test_parameters_that_never_had_a_gradient() -> None:
    """They have no state; and none is left from another life."""
    one, two = parameters(), parameters(seed=1)
    first, second = AdamW(one.values()), AdamW(two.values())
    train(one, first, 0, 3, skip="fc")
    train(two, second, 0, 3)
    restore_state(two, second, gather_state(one, first))
    assert two["fc"] not in second.state and raw(two, second) == raw(one, first)
    train(one, first, 3, 5)
    train(two, second, 3, 5)
    assert raw(two, second) == raw(one, first)


def test_hyper_parameters_and_gradients_are_the_callers() -> None:
    one, two = parameters(), parameters(seed=1)
    first, second = AdamW(one.values(), lr=0.5), AdamW(two.values(), lr=0.1, weight_decay=0.3)
    train(one, first, 0, 2)
    options = {key: value for key, value in second.param_groups[0].items() if key != "params"}
    gradient = two["fc"].grad = torch.ones(2, 1, 4)
    restore_state(two, second, gather_state(one, first))
    assert {key: value for key, value in second.param_groups[0].items() if key != "params"} == options
    assert two["fc"].grad is gradient and second.param_groups[0]["params"][0] is two["fc.weight"]


def test_tensors_that_the_optimizer_does_not_train() -> None:
    """Fitted statistics, for one: values without state."""
    one, two = parameters(), parameters(seed=1)
    first, second = AdamW(one.values()), AdamW(two.values())
    train(one, first, 0, 2)
    one["mean"], two["mean"] = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    restore_state(two, second, gather_state(one, first))
    assert two["mean"].tolist() == [0, 1, 2, 3]


# Numbers in the state, and optimizers of others


class Counting(Optimizer):
    """Keeps what torch's own do not: Python numbers, None, an integer tensor, momentum in less than the parameter's precision."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"steps": 0, "rate": 0.1, "warm": False, "nothing": None, "seen": torch.zeros((), dtype=torch.int32),
                              "momentum": torch.zeros_like(p, dtype=torch.bfloat16), "rows": torch.zeros(p.shape[:1])}
                state["steps"] += 1
                state["rate"] *= 0.9
                state["warm"] = not state["warm"]
                state["seen"] += 3
                state["momentum"].mul_(0.9).add_(p.grad)
                with torch.no_grad():
                    p.sub_(state["rate"] * state["momentum"])


def test_numbers_come_back_as_what_they_were(tmp_path: Path) -> None:
    whole, fresh = matrices(), matrices(seed=1)
    one, two = Counting(whole.values()), Counting(fresh.values())
    train(whole, one, 0, 3)
    found = gather_state(whole, one)
    assert {name for name in found if name.startswith("optimizer.a.")} == {
        f"optimizer.a.{label}" for label in ("steps:int", "rate:float", "warm:bool", "seen", "momentum", "rows")}
    save_adapter(tmp_path / "state.safetensors", found, {})
    restore_state(fresh, two, load_adapter(tmp_path / "state.safetensors")[0])
    state = two.state[fresh["a"]]
    assert type(state["steps"]) is int and type(state["rate"]) is float and type(state["warm"]) is bool
    for state in one.state.values():
        del state["nothing"]
    assert raw(fresh, two) == raw(whole, one)
    train(whole, one, 3, 6)
    train(fresh, two, 3, 6)
    assert raw(fresh, two) == raw(whole, one)


def test_sparse_adam_counts_with_a_python_number() -> None:
    tables = [nn.Embedding(5, 3, sparse=True) for _ in range(2)]
    one, two = (SparseAdam(table.parameters()) for table in tables)

    def look_up(table: nn.Embedding, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        table(torch.tensor([1, 1, 3])).sin().sum().backward()
        optimizer.step()

    look_up(tables[0], one)
    found = gather_state({"w": tables[0].weight}, one)
    assert found["optimizer.w.step:int"].item() == 1
    restore_state({"w": tables[1].weight}, two, found)
    for table, optimizer in zip(tables, (one, two)):
        look_up(table, optimizer)
    assert raw({"w": tables[0].weight}, one) == raw({"w": tables[1].weight}, two)


@pytest.mark.parametrize("options, device", [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")])
def test_where_the_step_count_lives(options: dict[str, bool], device: str) -> None:
    """On the host, unless the optimizer's kernel reads it: then with the parameter, for which meta stands in here. Also
    where the parameter is a single value, too."""
    one = {"scale": torch.ones((), requires_grad=True)}
    first = AdamW(one.values())
    train(one, first, 0, 2)
    two = {"scale": torch.ones((), device="meta", requires_grad=True)}
    second = AdamW(two.values(), **options)
    restore_state(two, second, gather_state(one, first))
    state = second.state[two["scale"]]
    assert state["step"].device.type == device and state["exp_avg"].device.type == "meta"


# Refusals


def test_what_cannot_be_gathered_is_refused() -> None:
    trained = parameters()
    optimizer = AdamW([*trained.values(), nn.Parameter(torch.ones(2, 7))])
    with pytest.raises(BadInput, match=r"1 parameters in the optimizer's group 0 .* the first of \(2, 7\) of float32"):
        gather_state(trained, optimizer)
    with pytest.raises(BadInput, match="1 parameters in the optimizer's group 0"):
        restore_state(trained, optimizer, {})
    optimizer = AdamW([*trained.values(), nn.Parameter(torch.ones(2, 7), requires_grad=False)])  # nothing of it changes
    gather_state(trained, optimizer)
    for key, value, words in (("old", [1, 2], "of type list"), ("a.b", torch.ones(1), "keys that are text"),
                              ("a:int", 1, "keys that are text"), (3, torch.ones(1), "keys that are text")):
        optimizer.state[trained["fc"]] = {key: value}
        with pytest.raises(BadInput, match=words):
            gather_state(trained, optimizer)


def refusals() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], Any], str]]:
    def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
        return lambda found: found.__setitem__(name, tensor)

    yield "missing", lambda found: found.pop("trained.fc.bias"), r"without trained\.fc\.bias, and with none that"
    yield "unknown", replaced("trained.new", torch.ones(1)), r"without any missing, and with trained\.new that"
    yield "foreign", replaced("rng", torch.ones(1)), r"with rng that belong to nothing here"
    yield "no label", replaced("optimizer.fc", torch.ones(2)), r"with optimizer\.fc that"
    yield "no such type", replaced("optimizer.fc.step:complex", torch.ones(())), r"with optimizer\.fc\.step:complex that"
    yield "no number", replaced("optimizer.fc.step:int", torch.ones(2).long()), r"with optimizer\.fc\.step:int that"
    right = r"expected \(2, 1, 4\) of float32"
    yield "shape", replaced("trained.fc", torch.ones(2, 4, 1)), rf"trained\.fc \(2, 4, 1\) of float32; {right}"
    yield "dtype", replaced("trained.fc", torch.ones(2, 1, 4).half()), rf"\(2, 1, 4\) of float16; {right}"
    yield "state's shape", replaced("optimizer.fc.exp_avg", torch.ones(2, 1, 1)), rf"exp_avg \(2, 1, 1\) of float32; {right}"
    yield "state's dtype", replaced("optimizer.fc.exp_avg", torch.ones(2, 1, 4).double()), rf"of float64; {right}"
    yield "step's shape", replaced("optimizer.fc.step", torch.ones(1)), r"step \(1,\) of float32; expected \(\) of float32"
    yield "a key less", lambda found: found.pop("optimizer.fc.exp_avg_sq"), r" exp_avg, step; expected exp_avg, exp_avg_sq, step"
    yield "a key more", replaced("optimizer.fc.sum", torch.ones(2, 1, 4)), r"with exp_avg, exp_avg_sq, step, sum; expected"
    yield "another type", lambda found: found.update(
        {"optimizer.fc.step:int": found.pop("optimizer.fc.step").long()}), r"step:int; expected exp_avg, exp_avg_sq, step"
    yield "not trained here", replaced("optimizer.mean.step", torch.ones(())), r"state \(step\) of 'mean'; expected none"


CASES = {case: (change, words) for case, change, words in refusals()}


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_both_sides_and_changes_nothing(case: str, stepped: bool) -> None:
    """The last in order is changed, too: checks come before the first copy."""
    one, two = parameters(), parameters(seed=1)
    one["mean"], two["mean"] = torch.zeros(3), torch.ones(3)
    first, second = (AdamW([t for name, t in trained.items() if name != "mean"]) for trained in (one, two))
    train({name: t for name, t in one.items() if name != "mean"}, first, 0, 2)
    if stepped:
        train({name: t for name, t in two.items() if name != "mean"}, second, 0, 1)
    found = gather_state(one, first)
    change, words = CASES[case]
    change(found)
    before = copy.deepcopy(raw(two, second))
    with pytest.raises(BadInput, match=words):
        restore_state(two, second, found)
    assert raw(two, second) == before


@pytest.mark.parametrize("one, two", [("AdamW", "SGD momentum"), ("SGD momentum", "AdamW fused"), ("AdamW", "SGD"),
                                      ("Adam amsgrad", "AdamW"), ("Adafactor", "AdamW"), ("RMSprop", "Adafactor")])
def test_the_state_of_another_optimizer_is_refused_by_a_fresh_one(one: str, two: str) -> None:
    """Some of these would else train on without a word: an SGD looks for its momentum, finds none and begins anew."""
    trained, fresh = ({name: t for name, t in parameters(seed).items() if t.numel()} for seed in (0, 1))
    first, second = OPTIMIZERS[one](trained), OPTIMIZERS[two](fresh)
    train(trained, first, 0, 2)
    before = raw(fresh, second)
    with pytest.raises(BadInput, match=f"which {type(second).__name__} keeps as it is set here"):
        restore_state(fresh, second, gather_state(trained, first))
    assert raw(fresh, second) == before


def test_asking_an_optimizer_leaves_its_hooks_and_its_schedule_alone() -> None:
    one, two = parameters(), parameters(seed=1)
    first, second = AdamW(one.values()), AdamW(two.values(), lr=0.5)
    calls: list[int] = []
    second.register_step_pre_hook(lambda *_: calls.append(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.5**step)
    train(one, first, 0, 2)
    restore_state(two, second, gather_state(one, first))
    assert calls == [] and schedule.last_epoch == 0 and second.param_groups[0]["lr"] == 0.5
    train(two, second, 2, 3)
    assert calls == [1]


# Two processes


class Net(nn.Module):
    """Rows that two ranks share unevenly (5, 3, 1), and one without a gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2, self.out = nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1)
        self.idle = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc2(self.fc1(x).tanh()).tanh())


NETS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: AdamW(params, lr=0.01, foreach=False),
    "AdamW foreach": lambda params: AdamW(params, lr=0.01, foreach=True),
    "AdamW fused": lambda params: AdamW(params, lr=0.01, fused=True),
    "SGD momentum": lambda params: SGD(params, lr=0.01, momentum=0.9),
}


def net_and_optimizer(kind: str, seed: int, sharded: bool) -> tuple[Net, dict[str, Tensor], Optimizer]:
    net = Net(seed)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net.fc1)
        fully_shard(net)
    trained = dict(net.named_parameters())
    return net, trained, NETS[kind](net.parameters())


def net_steps(net: Net, optimizer: Optimizer, start: int, end: int) -> None:
    for step in range(start, end):
        optimizer.zero_grad()
        net(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def rank_results(kind: str) -> dict[str, dict[str, Tensor]]:
    results = {}
    net, trained, optimizer = net_and_optimizer(kind, 0, sharded=True)
    net_steps(net, optimizer, 0, 3)
    results["at 3"] = gather_state(trained, optimizer)
    net_steps(net, optimizer, 3, 6)
    results["at 6"] = gather_state(trained, optimizer)
    fresh, again, second = net_and_optimizer(kind, 1, sharded=True)
    restore_state(again, second, results["at 3"])
    for name, parameter in again.items():
        for key, value in second.state.get(parameter, {}).items():
            if key != "step":
                assert value.placements == parameter.placements and value.device_mesh == parameter.device_mesh, name
                assert value.to_local().shape == parameter.to_local().shape
    results["restored"] = gather_state(again, second)
    net_steps(fresh, second, 3, 6)
    results["trained on"] = gather_state(again, second)
    alone = net_and_optimizer(kind, 2, sharded=False)
    restore_state(alone[1], alone[2], results["at 3"])
    results["unsharded"] = gather_state(alone[1], alone[2])
    net_steps(alone[0], alone[2], 3, 5)
    results["unsharded at 5"] = gather_state(alone[1], alone[2])
    back = net_and_optimizer(kind, 3, sharded=True)
    restore_state(back[1], back[2], results["unsharded at 5"])
    results["back"] = gather_state(back[1], back[2])
    net_steps(back[0], back[2], 5, 6)
    results["back at 6"] = gather_state(back[1], back[2])
    return results


def refused_when_sharded() -> list[str]:
    """Each rank must refuse by itself, without waiting for the other."""
    said = []
    net, trained, optimizer = net_and_optimizer("AdamW", 0, sharded=True)
    net_steps(net, optimizer, 0, 1)
    found = gather_state(trained, optimizer)
    before = {name: tensor.clone() for name, tensor in found.items()}
    for change in ({"trained.fc2.weight": torch.ones(2, 5)}, {"optimizer.fc2.weight.exp_avg": torch.ones(3, 1)}):
        try:
            restore_state(trained, optimizer, {**found, **change})
        except BadInput as error:
            said.append(str(error))
    same(gather_state(trained, optimizer), before)
    optimizer.state[trained["fc2.weight"]]["exp_avg"] = torch.ones(2, 5)  # a rank's own
    try:
        gather_state(trained, optimizer)
    except BadInput as error:
        said.append(str(error))
    return said


def process(rank: int, folder: str) -> None:
    import traceback

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, work in {**{kind: lambda kind=kind: rank_results(kind) for kind in NETS}, "refused": refused_when_sharded}.items():
        try:
            results[name] = work()
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other rank may wait in a collective of this case
    torch.save(results, f"{folder}/rank{rank}.pt")
    if len(results) == len(NETS) + 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", NETS)
def test_sharded_state_is_gathered_restored_and_trained_on(kind: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        found = results[kind]
        assert isinstance(found, dict), found
        assert found["at 3"]["trained.fc1.weight"].shape == (5, 4) and "trained.idle" in found["at 3"]
        assert not any(name.startswith("optimizer.idle") for name in found["at 3"])
        same(found["restored"], found["at 3"])
        same(found["trained on"], found["at 6"])
        same(found["unsharded"], found["at 3"])
        same(found["back"], found["unsharded at 5"])
        for name, tensor in found["back at 6"].items():  # sums over a batch may run in another order
            torch.testing.assert_close(tensor, found["at 6"][name], rtol=0, atol=1e-6)
        for name in ("at 3", "at 6", "back"):
            same(found[name], ranks[0][kind][name])


def test_sharded_training_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """So that what was compared above is the state of a run, not of nothing."""
    net, trained, optimizer = net_and_optimizer("AdamW", 0, sharded=False)
    net_steps(net, optimizer, 0, 3)
    expected = gather_state(trained, optimizer)
    came = ranks[0]["AdamW"]["at 3"]
    assert came.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(came[name], tensor, rtol=0, atol=1e-6)


def test_refusals_beside_sharded_parameters(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        said = results["refused"]
        assert isinstance(said, list), said
        assert "trained.fc2.weight (2, 5) of float32; expected (3, 5) of float32" in said[0]
        assert "optimizer.fc2.weight.exp_avg" in said[1] and "(3, 1) of float32, beside a sharded parameter of (3, 5)" in said[1]
        assert "'exp_avg' of 'fc2.weight' that is (2, 5) of float32, beside a sharded" in said[2]
