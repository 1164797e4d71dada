"""What ranks do together, alone the identity: sharded tensors gathered whole, work that the first one does for all."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. By its method: not every build of torch has the class, and to import it takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The values, without their graph; a sharded tensor is gathered, which all ranks have to do together."""
    values: Tensor = getattr(tensor.detach(), "full_tensor", tensor.detach)()
    return values


def on_first_rank(write: Callable[[], None]) -> None:
    """Call `write` on rank 0 while the others wait; its exception is raised on all, so that none waits for ever."""
    if not (dist.is_available() and dist.is_initialized()):
        return write()
    outcome: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
