"""One error voice: every refusal says where, what came, what was expected, and what to do.

    raise BadInput("Projector", f"features of width {came}", f"in_dim = {expected}", "build it with in_dim=…")

reads

    Projector: got features of width 80; expected in_dim = 384. Build it with in_dim=…

Axes, the same letters in every file: B rows (or clips), T steps of text, T_soft soft tokens, T_fused text and soft
tokens together, T_mel mel frames, d the width of one feature frame, n_embd the width of the GPT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING


class BadInput(ValueError):
    """Input that cannot be used. Nothing has been changed when it is raised.

    `where` names what was called, `came` what it got, `expected` what it takes, `todo` the way out.
    """

    args: tuple[str, ...]

    if TYPE_CHECKING:  # there is none: torch.compile, which before torch 2.13 traces no __init__ of an error's own, shows `args`
        def __init__(self, where: str, came: str, expected: str, todo: str = "", /) -> None: ...

    def __str__(self) -> str:
        if len(self.args) < 3:  # DataLoader and DDP make a new one of the text of one that a worker raised
            return super().__str__()
        advice = f" {self.todo[0].upper()}{self.todo[1:].rstrip('.')}." if self.todo else ""
        return f"{self.where}: got {self.came}; expected {self.expected}.{advice}"

    where = property(lambda self: self.part(0))
    came = property(lambda self: self.part(1))
    expected = property(lambda self: self.part(2))
    todo = property(lambda self: self.part(3))

    def part(self, place: int) -> str:
        return self.args[place] if place < len(self.args) else ""


class MissingExtra(ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""

    def __init__(self, where: str, module: str, extra: str) -> None:
        self.where, self.module, self.extra = where, module, extra
        super().__init__(f'{where} needs {module}, which is not installed. Do: pip install "omni-adapters[{extra}]"')

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return MissingExtra, (self.where, self.module, self.extra)


def shape(sizes: Sequence[int | str]) -> str:
    """`(2, 5, 64)` as people write shapes; names may stand for free axes: `shape(["B", "T", 64])`."""
    return f"({', '.join(str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"


def listing(items: Sequence[object], most: int = 6) -> str:
    """The first `most` items, and how many more there are: error messages stay one line long."""
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text}, … ({len(items) - most} more)"
