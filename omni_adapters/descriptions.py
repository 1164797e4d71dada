"""What is the same and what is not: two nested descriptions (JSON values), compared key by key.

Notable: numbers compare by value (32 is 32.0) but True is not 1, and a tuple counts as the list that JSON makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omni_adapters.shapes import BadInput, listing

ABSENT = object()


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for every key path in which two descriptions differ, `encoder.id: saved 'a', here 'b'`, sorted.

    Where both sides have a mapping its keys are compared one by one; lists count as wholes.
    """
    return list(_differing(saved, here, ""))


def check_same(where: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained for something else: raises BadInput naming every difference with both sides.

    where: who asks, for the message. saved: as loaded. here: of the host and encoders at hand, nested likewise.
    """
    found = differences(saved, here)
    if found:
        raise BadInput(where, f"an adapter made for something else ({listing(found, len(found))})",
                       "the same description as when it was saved",
                       "load it into the host and encoders it was trained with, or train one for these")


def _differing(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted({*saved, *here}):
        theirs, ours = saved.get(key, ABSENT), here.get(key, ABSENT)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differing(theirs, ours, f"{prefix}{_label(key)}.")
        elif not _equal(theirs, ours):
            yield f"{prefix}{_label(key)}: saved {_brief(theirs)}, here {_brief(ours)}"


def _equal(one: object, other: object) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _label(key: str) -> str:
    """A key, fit for a message: as it stands, unless it would break the line."""
    return f"{key:.80}" if key.isprintable() else f"{key!r:.80}"


def _brief(value: object) -> str:
    return "nothing" if value is ABSENT else f"{value!r:.100}"
