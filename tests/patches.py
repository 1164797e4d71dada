"""Small encoders of images, for tests: what a second sense needs and no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omni_adapters.features import Features, pad_rows


class Patches(nn.Module):
    """Images (3, H, W) in squares of 4 × 4 pixels → features (B, H/4 · W/4, 48), the pixels themselves less their mean: it has
    no weights, but a statistic that it was fitted to."""

    mean: Tensor
    d_model = 48

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))

    def preprocess(self, images: Sequence[Tensor]) -> Features:
        squares = [image.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(-1, 48) for image in images]
        return pad_rows(squares)

    def forward(self, inputs: Features) -> Features:
        return Features(inputs.values - self.mean, inputs.lens)


class Eyes(Patches):
    """The same behind a layer of random weights, as an encoder has them, and dropout, which must sleep."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix, self.drop = nn.Linear(48, 48), nn.Dropout(0.5)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(48, 48, generator=torch.Generator().manual_seed(seed)) / 7)
            self.mix.bias.zero_()

    def forward(self, inputs: Features) -> Features:
        values, lens = super().forward(inputs)
        return Features(self.drop(self.mix(values)), lens)
