"""LoRA on a host's linear layers: y = W x + s · B A x, with W frozen.

             x
        ┌────┴─────┐
        W          A   (rank, in),  fp32
        │          B   (out, rank), fp32, zero at first
        │          · s
        └────(+)───┘
             y

Notable:
- `LoRALinear(base)` is an instance of `type(base)` too: a host that counts, casts or compiles its own linear class goes on
  doing so, and `base.weight` is the same Parameter under the same key
- A and B are fp32 masters, cast to the activation's dtype, whatever dtype the host has or is cast to later
- what is saved is always W, A and B apart, merged or not; `remove_lora(gpt, merged=True)` leaves W + s · B A behind
- a forward of many rows runs x (W + s · B A)ᵀ as one matmul (`lora_matmul`); few rows, dropout, and a base with arithmetic
  of its own take the two paths of the picture
(Hu et al., LoRA, arXiv:2106.09685; s = alpha / rank, or alpha / √rank: rsLoRA, arXiv:2312.03732)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.anatomy import plain_name, unwrap
from omni_adapters.host_linear import LinearForm, linear_form
from omni_adapters.lora_matmul import merged_linear
from omni_adapters.shapes import BadInput, listing

Form = Literal["auto", "merged", "two_path"]
FORMS = ("auto", "merged", "two_path")
# Rows × (in + out) from which one matmul is faster, in units of in × out. Making W + s · B A costs by the size of W, a second
# path by what it reads and writes of x and y. Measured on CPU, fp32, rank 16, five shapes from 384 × 1536 to 3072 × 768.
BREAK_EVEN = 2.0


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; a drop-in for `base`, whose weight it shares.

    base:    nn.Linear (out_features, in_features) or a subclass with a forward of its own, which stays in use. Its weight
             (and bias) are frozen; `remove_lora` gives them their flags back.
    rank:    of the update; at most min(in_features, out_features).
    alpha:   the update is scaled by alpha / rank, or alpha / √rank with `rslora`.
    dropout: share of the update's inputs that is dropped in training mode, drawn from torch's generator of the device.

    lora_a (rank, in_features) is uniform within ±1/√in_features, lora_b (out_features, rank) is zero, so the layer starts
    as `base` bit for bit. `enabled = False` is `base` again, where the update is not merged. Raises BadInput.

    `form` says how a forward computes: "auto", the faster of the two; "merged", W + s · B A first, wherever that is the same
    equation; "two_path", never that. They differ by rounding. It is not saved with an adapter.
    """

    form: Form = "auto"
    base_form: LinearForm = "own"
    base: nn.Linear
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __new__(cls, base: nn.Linear, *args: Any, **kwargs: Any) -> LoRALinear:
        if not isinstance(base, nn.Linear) or isinstance(base, LoRALinear):
            raise BadInput("LoRALinear", f"a {type(base).__name__}", "an nn.Linear without LoRA")
        return super().__new__(joined(type(base)))

    def __init__(self, base: nn.Linear, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, *, rslora: bool = False,
                 generator: torch.Generator | None = None) -> None:
        check_base(base)
        most = min(base.weight.shape)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
            raise BadInput("LoRALinear", f"rank = {rank!r}", f"an integer, 1 ≤ rank ≤ {most}, the smaller side of the weight")
        if isinstance(alpha, str) or not 0 < alpha < math.inf:
            raise BadInput("LoRALinear", f"alpha = {alpha!r}", "a finite alpha > 0")
        if not 0 <= dropout < 1:
            raise BadInput("LoRALinear", f"dropout = {dropout}", "0 ≤ dropout < 1")
        vars(self).update(vars(base))  # hooks are shared, whoever takes them away; so is what the base's own class keeps
        self._parameters = base._parameters.copy()
        self._compiled_call_impl = None  # what base.compile() made knows nothing of lora_a
        vars(self)["base"] = base      # not a sub-module: the weight has one key
        self.base_form = linear_form(base)
        self.flags = {name: p.requires_grad for name, p in base.named_parameters()}
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (rank**0.5 if rslora else rank)
        self.enabled = True
        self.unmerged: Tensor | None = None  # W, while W + s · B A stands in its place
        out_features, in_features = base.weight.shape
        a = torch.empty(rank, in_features, dtype=torch.float32).uniform_(-1, 1, generator=generator) / in_features**0.5
        self.lora_a = nn.Parameter(a.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device=base.weight.device))
        base.requires_grad_(False)

    @property
    def merged(self) -> bool:
        return self.unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if self.runs_merged(x):
            return merged_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling)
        y = super().forward(x)  # the base class's own: joined() puts it next in line
        if self.merged or not self.enabled:
            if self.merged and self.training and torch.is_grad_enabled():
                raise BadInput("LoRALinear", "a training step while merged", "lora_a and lora_b apart from the weight",
                               "call unmerge_lora(gpt) before training")
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.to(x.dtype))
        return y + self.scaling * F.linear(low, self.lora_b.to(x.dtype))

    def runs_merged(self, x: Tensor) -> bool:
        """Whether this forward makes W + s · B A: where the base has no arithmetic of its own, nothing is dropped, W gets no
        gradient, and there are rows enough to pay for it; with gradients or without, so that what is validated is what trains."""
        if self.form not in FORMS:
            raise BadInput("LoRALinear", f"form = {self.form!r}", f"one of {', '.join(FORMS)}")
        if self.form == "two_path" or self.merged or not self.enabled:
            return False
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        learns = x.requires_grad or self.lora_a.requires_grad or self.lora_b.requires_grad
        if not learns or (self.dropout > 0 and self.training) or not self.computes_linear(x):
            return False
        out_features, in_features = self.weight.shape
        rows = x.numel() // in_features
        return self.form == "merged" or rows * (in_features + out_features) >= BREAK_EVEN * in_features * out_features

    def computes_linear(self, x: Tensor) -> bool:
        """Whether the base would compute x Wᵀ + bias of this x, in the dtype of x or autocast's."""
        if self.base_form == "own" or type(self.weight) not in (nn.Parameter, Tensor) or x.dim() == 0 or x.numel() == 0:
            return False
        if not x.is_floating_point() or x.size(-1) != self.weight.size(1):
            return False
        return self.base_form == "casting" or x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type)

    @torch.no_grad()
    def update(self) -> Tensor:
        """s · B A, (out_features, in_features) in fp32, or in fp64 where the weight is; autocast changes nothing."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.scaling * (self.lora_b.to(wide) @ self.lora_a.to(wide))

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s · B A, computed in fp32 or wider; the old W is kept beside it. Merging twice is merging once."""
        if not self.enabled:
            raise BadInput("LoRALinear", "a merge while disabled", "a layer whose update counts", "leave lora_disabled first")
        if not self.merged:
            self.unmerged = self.weight.detach().clone()
            update = self.update()
            self.weight.copy_(self.weight.to(update.dtype) + update)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W back, bit for bit."""
        if self.unmerged is not None:
            self.weight.copy_(self.unmerged)
            self.unmerged = None

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        super()._apply(keeping_dtype(fn, (self.lora_a, self.lora_b)), recurse)
        if self.unmerged is not None:
            self.unmerged = fn(self.unmerged)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged is not None:
            destination[prefix + "weight"] = self.unmerged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # the joined class has no name that pickle could look up
        return blank, (type(self.base),), vars(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def keeping_dtype(fn: Callable[[Tensor], Tensor], masters: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` as nn.Module._apply takes it, but a cast only moves `masters` and their gradients: an update of 1e-4 of a weight
    is lost in bf16, whose steps are 2⁻⁸ of it."""
    kept = {id(tensor) for master in masters for tensor in (master, master.grad) if tensor is not None}

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

    return apply


def check_base(base: nn.Linear) -> None:
    if "weight" not in base._parameters:
        raise BadInput("LoRALinear", f"a {type(base).__name__} whose weight is computed", "a weight that is a parameter",
                       "remove parametrizations such as weight_norm first")
    if base.state_dict()["weight"].dtype != base.weight.dtype:
        raise BadInput("LoRALinear", f"a weight cast to {base.weight.dtype}, and saved as it came", "the weight as it came",
                       "put LoRA in first and call cast_frozen afterwards, or call its restore() now")
    if "forward" in vars(base):
        raise BadInput("LoRALinear", f"a {type(base).__name__} with a forward of its own instance", "its class's forward",
                       "inject LoRA before anything wraps the layer")


JOINED: dict[type, type[LoRALinear]] = {}


def joined(base_class: type[nn.Linear]) -> type[LoRALinear]:
    """A class that is both: LoRALinear first, then the base's; the same one each time, as code that compares types expects."""
    if base_class is nn.Linear:
        return LoRALinear
    if base_class not in JOINED:
        JOINED[base_class] = type(f"LoRA{base_class.__name__}", (LoRALinear, base_class), {"__module__": __name__})
    return JOINED[base_class]


def blank(base_class: type[nn.Linear]) -> LoRALinear:
    """An empty instance for copy and pickle to fill."""
    return nn.Module.__new__(joined(base_class))


def inject_lora(gpt: nn.Module, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, *,
                targets: str | Sequence[str] = ("attn", "mlp"), rslora: bool = False, seed: int = 0) -> list[str]:
    """Put a LoRALinear in the place of every linear layer whose path has one of `targets` in it; returns their paths. One
    target may come as a plain string.

    Layers with a side smaller than `rank` (nanochat's value gates) stay as they are. A layer that stands in several places
    gets one LoRA. lora_a is drawn from `seed` alone. Load the GPT's checkpoint before: keys of the base stay, those of
    lora_a and lora_b are new. Raises BadInput where nothing matches, layers share a weight, or LoRA is there already; the
    GPT is then as it came.
    """
    targets = (targets,) if isinstance(targets, str) else targets
    linears = {name: m for name, m in gpt.named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name, m in linears.items() if "weight" in m._parameters and rank <= min(m.weight.shape)
              and any(target in part for target in targets for part in name.split("."))]
    if not chosen:
        raise BadInput("inject_lora", f"targets {tuple(targets)} at rank {rank}",
                       f"parts of a path among [{listing(list(linears))}], of a layer at least rank wide on both sides")
    inject_at(gpt, chosen, rank, alpha, dropout, rslora=rslora, seed=seed)
    return chosen


def inject_at(gpt: nn.Module, paths: Sequence[str], rank: int, alpha: float, dropout: float = 0.0, *, rslora: bool = False,
              seed: int = 0) -> None:
    """`inject_lora` for exactly these paths."""
    if any(isinstance(m, LoRALinear) for m in gpt.modules()):
        raise BadInput("inject_lora", "a GPT that has LoRA already", "one without", "call remove_lora(gpt) first")
    found = {id(m): m for m in map(gpt.get_submodule, paths)}
    if len({id(getattr(m, "weight", m)) for m in found.values()}) < len(found):
        raise BadInput("inject_lora", f"layers of [{listing(paths)}] that share a weight", "a weight for each",
                       "narrow `targets` down to one of them")
    generator = torch.Generator().manual_seed(seed)
    flags = [(p, p.requires_grad) for p in gpt.parameters()]
    try:
        layers = {key: LoRALinear(m, rank, alpha, dropout, rslora=rslora, generator=generator)  # type: ignore[arg-type]
                  for key, m in found.items()}
    except BadInput:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    swap(gpt, lambda module: layers.get(id(module)))


def remove_lora(gpt: nn.Module, *, merged: bool = False) -> nn.Module:
    """Every base layer back in its place, as it came; with `merged`, W + s · B A stays in its weight for good."""
    if merged:
        check_own_weights(gpt, "remove_lora")
    relink_bases(gpt)
    for layer in lora_layers(gpt, "remove_lora"):
        layer.unmerge()
        if merged:
            layer.merge()
        for name, flag in layer.flags.items():
            layer.base.get_parameter(name).requires_grad_(flag)
        layer.base.train(layer.training)
    swap(gpt, lambda module: module.base if isinstance(module, LoRALinear) else None)
    return gpt


def relink_bases(gpt: nn.Module) -> None:
    """Give every base layer the parameters that its LoRALinear has now. Module.to and fully_shard may have made new ones,
    and a base that held on to the old would keep a second copy of each weight in memory."""
    for layer in lora_by_path(gpt).values():
        for name in layer.flags:
            layer.base.register_parameter(name, layer.get_parameter(name))


def merge_lora(gpt: nn.Module) -> None:
    """W + s · B A into every weight: no extra work per call, for decoding and export. `unmerge_lora` takes it back."""
    check_own_weights(gpt, "merge_lora")
    for layer in lora_layers(gpt, "merge_lora"):
        layer.merge()


def check_own_weights(gpt: nn.Module, where: str) -> None:
    """An update merged into a weight that an embedding shares would change the embedding."""
    owners = Counter(id(p) for module in gpt.modules() for p in module._parameters.values())
    tied = [name for name, m in gpt.named_modules() if isinstance(m, LoRALinear) and owners[id(m.weight)] > 1]
    if tied:
        raise BadInput(where, f"{listing(tied)}, whose weight another module shares", "weights of their own",
                       "keep LoRA apart from it")


def unmerge_lora(gpt: nn.Module) -> None:
    for layer in lora_layers(gpt, "unmerge_lora"):
        layer.unmerge()


@contextmanager
def lora_disabled(gpt: nn.Module) -> Iterator[None]:
    """Inside, the GPT is as it was before LoRA, bit for bit: for text-only calls, and for a teacher that shares weights.

    Where activations are checkpointed, backward must run inside as well: what is computed again has the LoRA of that moment.
    """
    layers = lora_layers(gpt, "lora_disabled")
    if any(layer.merged for layer in layers):
        raise BadInput("lora_disabled", "a GPT whose LoRA is merged", "LoRA apart from the weights",
                       "call unmerge_lora(gpt) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def lora_parameters(gpt: nn.Module) -> list[nn.Parameter]:
    """All lora_a and lora_b: what stage 2 trains of the GPT."""
    return [parameter for layer in lora_layers(gpt, "lora_parameters") for parameter in (layer.lora_a, layer.lora_b)]


def lora_settings(layers: Sequence[LoRALinear], where: str) -> dict[str, Any]:
    """Rank, alpha, dropout and rslora that all layers have; refused where they differ, as no file format here can say so."""
    kinds = {(m.rank, m.alpha, m.dropout, m.rslora) for m in layers}
    if len(kinds) > 1:
        raise BadInput(where, f"layers of {len(kinds)} kinds, (rank, alpha, dropout, rslora) {listing(sorted(kinds))}",
                       "one kind", "inject one LoRA with one call")
    return dict(zip(("rank", "alpha", "dropout", "rslora"), kinds.pop()))


def lora_by_path(gpt: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRA layer by the path of its module, as an uncompiled GPT has it; empty without LoRA."""
    return {plain_name(name): module for name, module in unwrap(gpt).named_modules() if isinstance(module, LoRALinear)}


def lora_layers(gpt: nn.Module, where: str) -> list[LoRALinear]:
    layers = list(lora_by_path(gpt).values())
    if not layers:
        raise BadInput(where, f"a {type(gpt).__name__} without LoRA", "one with", "call inject_lora(gpt) first")
    return layers


def swap(gpt: nn.Module, successor: Any) -> None:
    """Replace every module that has a successor, in all the places that hold it."""
    for parent in list(gpt.modules()):
        for name, child in parent._modules.items():
            new = None if child is None else successor(child)
            if new is not None:
                parent._modules[name] = new
