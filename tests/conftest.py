"""What the test files share: one thread, hypothesis without a clock, and one tiny GPT in which every feature is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import reference
from hypothesis import settings

from omni_adapters.reference_gpt import GPT

# No deadline: a first call warms torch up. The same examples on every run: a red build is a change of the code.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

TINY = {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "vocab_size": 50, "sequence_len": 64}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On tensors this small a second thread gains nothing, and beside other work its spinning costs up to 20 ×."""
    torch.set_num_threads(1)


def tiny_gpt(dtype: torch.dtype = torch.float32, **sizes: Any) -> GPT:
    """Every parameter random, two query heads to a key head, value embeddings in layers 1 and 3, 50 ids in 64 rows.

    The library rounds short windows up to 128 positions. Here they are 3 and 5, so that even ten slots are cut off.
    """
    gpt = reference(seed=1, **(TINY | sizes))
    gpt.windows[:-1] = [(3, 5)[layer % 2] for layer in range(gpt.config.n_layer - 1)]
    return gpt.to(dtype)


@pytest.fixture(scope="session")
def make_gpt() -> Callable[..., GPT]:
    """`tiny_gpt`, for tests that want another dtype or other sizes, or several GPTs."""
    return tiny_gpt


@pytest.fixture
def gpt() -> GPT:
    return tiny_gpt()
