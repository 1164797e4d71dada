"""One layer of an encoder's many, by learned weights: deep layers know words, early ones how they were said.

Notable: SUPERB's weighted sum (arXiv:2105.01051), which starts as the plain mean. It is trained with the projector and saved in
it, and what it learned can be read: `weights()` says how much each layer is listened to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.shapes import BadInput, shape


class LayerMix(nn.Module):
    """Σ_l softmax(scores)_l · layer_l.

        (B, T, L·width), layer by layer side by side → (B, T, width)

    `scores` (L,) begin at zero and are fp32 masters: the softmax is taken in fp32, then cast to the dtype of the features.

    num_layers: L.
    width:      of one layer.
    normalize:  each frame of each layer first gets mean 0 and variance 1 over `width`, without affine parameters, as s3prl's
                `normalize` does: layers of louder features then count no more than others.

    Raises BadInput for sizes below 1 and for features whose width is not L·width.
    """

    def __init__(self, num_layers: int, width: int, *, normalize: bool = False) -> None:
        super().__init__()
        for name, size in (("num_layers", num_layers), ("width", width)):
            if size < 1:
                raise BadInput("LayerMix", f"{name} = {size}", f"{name} ≥ 1")
        self.num_layers, self.width, self.normalize = num_layers, width, normalize
        self.scores = nn.Parameter(torch.zeros(num_layers))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scores.zero_()

    def weights(self) -> Tensor:
        """(L,), sum 1: the share of each layer, without its graph."""
        return self.scores.detach().softmax(dim=0)

    def forward(self, values: Tensor) -> Tensor:
        if values.size(-1) != self.num_layers * self.width:
            raise BadInput("LayerMix", f"values {shape(values.shape)}, {values.size(-1)} wide",
                           f"{self.num_layers} layers of {self.width}, {self.num_layers * self.width} in all",
                           "ask the encoder for that many layers")
        layers = values.unflatten(-1, (self.num_layers, self.width))  # (B, T, L, width)
        if self.normalize:
            layers = F.layer_norm(layers, (self.width,))
        return torch.einsum("l,...lw->...w", self.scores.softmax(dim=0).to(values.dtype), layers)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, width={self.width}, normalize={self.normalize}"
