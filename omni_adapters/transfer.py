"""A projector moves house: trained with one GPT, it starts at another of the same tokenizer instead of at nothing.

    soft = fc2 · h                    in the old GPT, n_embd = from_dim
    soft = (M · fc2) · h              in the new one, n_embd = to_dim

M (to_dim, from_dim) sends the old token embeddings to the new ones, in least squares: a soft token that meant what some words
mean should mean the same words there. Embedding spaces of two trainings agree up to a linear map where they agree at all
(Mikolov, Le and Sutskever, arXiv:1309.4168); how far they do is `EmbeddingMap.r2`, measured on tokens the map has not seen.

Notable: M comes from Gram matrices, (from_dim, from_dim) in fp64, so that a vocabulary of any size costs one pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omni_adapters.anatomy import Anatomy, discover_anatomy, logits_of, runner, table, untouched, unwrap
from omni_adapters.collective import whole
from omni_adapters.projector import Projector, settings_of, wording
from omni_adapters.shapes import BadInput, listing

WHERE = "transfer_projector"
RIDGE = 1e-3    # of the mean eigenvalue of the Gram matrix
NUM_FOLDS = 5   # of the cross-validation
STRETCH = 4.0   # of the embeddings, in the probe for a norm right behind them: a power of two, exact in any dtype
SAME = 2**-6    # of the largest logit: a norm's own eps (2⁻⁷ in bf16) moves its output by half of that


class PoorTransfer(UserWarning):
    """The two embedding spaces do not agree: on tokens it has not seen, the map is no better than their mean."""


class EmbeddingMap(NamedTuple):
    """matrix: (to_dim, from_dim) fp64 on the CPU, from embeddings as the old GPT sees them to those as the new one does.

    r2:         share of the new embeddings' variance that it explains on tokens it was not fitted to (five-fold
                cross-validation), 1 at best; 0 is as good as their mean, less than 0 is worse.
    fitted_r2:  the same on the tokens it was fitted to. With fewer tokens than from_dim it is near 1 whatever r2 is.
    num_tokens: that it was fitted to.
    """

    matrix: Tensor
    r2: float
    fitted_r2: float
    num_tokens: int


def transfer_projector(projector: Projector, from_gpt: nn.Module, to_gpt: nn.Module, *, ridge: float = RIDGE,
                       tokens: Sequence[int] | Tensor | None = None) -> Projector:
    """A new projector for `to_gpt` that says there what `projector` says in `from_gpt`; the old one stays as it is.

    Everything before the last layer is copied, and fc2 becomes M · fc2, with M of `embedding_map`, to which the other
    arguments go. Warns `PoorTransfer`, with both shares of variance, where M explains nothing of tokens it has not seen; ask
    `embedding_map(from_gpt, to_gpt).r2` beforehand. The rows of fc2 that a zero-initialised projector has stay zero.

    Raises BadInput for a projector that is not as wide as `from_gpt` or has parts behind fc2 (a norm "out", a pool), which no
    linear map passes, and as `embedding_map` does.
    """
    if "out" in projector.norm or projector.pool is not None:
        raise BadInput(WHERE, f"a projector with {wording(settings_of(projector))}",
                       "one that ends in fc2: without norm out, without pool")
    here = discover_anatomy(from_gpt)
    if projector.out_dim != here.n_embd:
        raise BadInput(WHERE, f"a projector to {projector.out_dim}", f"{here.n_embd}, the n_embd of the GPT it was trained with",
                       "give the GPTs in the order from, to")
    found = embedding_map(from_gpt, to_gpt, ridge=ridge, tokens=tokens)
    if not found.r2 > 0:
        warnings.warn(f"{WHERE}: the map between the embeddings of {found.num_tokens} tokens explains {found.fitted_r2:.3f} of "
                      f"their variance, and {found.r2:.3f} of that of tokens it has not seen: only soft tokens made of the "
                      "fitted ones can arrive", PoorTransfer, stacklevel=2)
    return mapped(projector, found.matrix)


def mapped(projector: Projector, matrix: Tensor) -> Projector:
    """A copy of `projector` whose fc2 is matrix (to_dim, from_dim) · fc2, computed in fp64."""
    new = copy.deepcopy(projector)
    old = whole(projector.fc2.weight)
    weight = matrix.to(old.device, torch.float64) @ old.double()
    new.out_dim = new.fc2.out_features = weight.size(0)
    new.fc2.weight = nn.Parameter(weight.to(old.dtype), requires_grad=projector.fc2.weight.requires_grad)
    return new


def embedding_map(from_gpt: nn.Module, to_gpt: nn.Module, *, ridge: float = RIDGE,
                  tokens: Sequence[int] | Tensor | None = None) -> EmbeddingMap:
    """Least squares from the token embeddings x_i of one GPT to those y_i of another, as each GPT sees them.

        M = argmin Σ_i |y_i − M x_i|² + λ |M|²,   λ = ridge · mean eigenvalue of Σ_i x_i x_iᵀ

    ridge:  0 is plain least squares, of least norm where tokens are fewer than from_dim.
    tokens: ids to fit, distinct ones; all of the vocabulary by default. Rows that pre-training hardly touched are noise:
            name the frequent ones where you know them.

    A GPT that norms its embeddings (nanochat) sees directions only: its rows are normed to root mean square 1 first. Whether
    it does is found out with two forwards. Padding of the vocabulary has no part. Raises BadInput for vocabularies that differ,
    ids outside them, fewer than five tokens, new embeddings that are all the same, and a negative ridge.
    """
    here, there = discover_anatomy(from_gpt), discover_anatomy(to_gpt)
    if here.vocab_size != there.vocab_size:
        raise BadInput(WHERE, f"GPTs of {here.vocab_size} and {there.vocab_size} tokens", "two that share one tokenizer")
    if not 0 <= ridge < float("inf"):
        raise BadInput(WHERE, f"ridge = {ridge}", "ridge ≥ 0")
    ids = chosen(tokens, min(here.vocab_size, here.num_embeddings, there.num_embeddings))
    x, y = seen_embeddings(from_gpt, here)[ids], seen_embeddings(to_gpt, there)[ids]
    variance = float((y - y.mean(dim=0)).square().sum())
    if not variance > 0:
        raise BadInput(WHERE, f"{len(ids)} embeddings of the new GPT that are all the same", "those of a trained GPT")
    folds = [products(x[fold::NUM_FOLDS], y[fold::NUM_FOLDS]) for fold in range(NUM_FOLDS)]
    matrix = solve(*total(folds), ridge)
    left = sum(squared_error(solve(*total(folds[:fold] + folds[fold + 1 :]), ridge), x[fold::NUM_FOLDS], y[fold::NUM_FOLDS])
               for fold in range(NUM_FOLDS))
    return EmbeddingMap(matrix, 1 - left / variance, 1 - squared_error(matrix, x, y) / variance, len(ids))


def chosen(tokens: Sequence[int] | Tensor | None, num: int) -> Tensor:
    """Ids to fit, in an order without meaning, so that folds are alike whatever the tokenizer's order is."""
    ids = torch.arange(num) if tokens is None else torch.as_tensor(tokens, device="cpu")
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids.unique()) < len(ids):
        raise BadInput(WHERE, f"tokens {listing(ids.flatten().tolist())}", "distinct ids, integers in one dimension")
    if len(ids) < NUM_FOLDS or int(ids.min()) < 0 or int(ids.max()) >= num:
        raise BadInput(WHERE, f"{len(ids)} tokens, {listing(ids.tolist())}", f"at least {NUM_FOLDS} ids from 0 to {num - 1}")
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def seen_embeddings(gpt: nn.Module, anatomy: Anatomy) -> Tensor:
    """Rows of wte (num_embeddings, n_embd) in fp64 on the CPU; of root mean square 1 where the GPT norms them."""
    rows = whole(table(unwrap(gpt), anatomy.wte).weight).cpu().double()
    if not norms_embeddings(gpt, anatomy):
        return rows
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def norms_embeddings(gpt: nn.Module, anatomy: Anatomy) -> bool:
    """Whether embeddings STRETCH times as long give the same logits: then only their directions count."""
    gpt = unwrap(gpt)
    module = table(gpt, anatomy.wte)
    ids = torch.arange(min(8, anatomy.vocab_size), device=module.weight.device).unsqueeze(0)
    with untouched(gpt):
        forward = runner(gpt, ids)
        plain = logits_of(forward(ids)).double()
        handle = module.register_forward_hook(lambda _module, _args, output: STRETCH * output)
        try:
            stretched = logits_of(forward(ids)).double()
        finally:
            handle.remove()
    return bool((stretched - plain).abs().max() <= SAME * plain.abs().max())


def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀx (from_dim, from_dim) and yᵀx (to_dim, from_dim)."""
    return x.T @ x, y.T @ x


def total(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Their sums: tokens taken together. Never a difference, which would leave rounding where there is no data."""
    return torch.stack([gram for gram, _ in parts]).sum(dim=0), torch.stack([cross for _, cross in parts]).sum(dim=0)


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """cross · (gram + λ)⁻¹ by eigenvalues; directions without any data, to rounding, map to zero."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    floor = len(values) * torch.finfo(values.dtype).eps * values[-1]
    inverse = torch.where(values > floor, 1 / (values + ridge * values.mean()), 0.0)
    return (cross @ vectors) * inverse @ vectors.T


def squared_error(matrix: Tensor, x: Tensor, y: Tensor) -> float:
    return float((y - x @ matrix.T).square().sum())
