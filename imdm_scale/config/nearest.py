"""What lies near a value that is not allowed: for mistyped names, for paths and for numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that look like `word`, best first; empty if none does.

    A dotted name is compared whole and by its last part, so that `size` finds `model.size`.
    """

    def likeness(a: str, b: str) -> float:
        return SequenceMatcher(None, a, b, autojunk=False).ratio()

    scored = []
    for name in known:
        whole = likeness(word.lower(), name.lower())
        last = likeness(word.lower().rpartition(".")[2], name.lower().rpartition(".")[2])
        if whole >= 0.55 or last >= 0.8:
            scored.append((whole + last, name))
    best = max((score for score, _ in scored), default=0.0)
    scored.sort(key=lambda pair: -pair[0])
    return [name for score, name in scored if score >= best - 0.2][:3]


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The question "did you mean ...?", or `otherwise` if nothing looks like `word`."""
    names = nearest(word, known)
    return f"did you mean {' or '.join(names)}?" if names else otherwise


def near_files(path: Path) -> str:
    """Says what lies near a path that does not exist: similar names, or the nearest folder that exists."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        return f"there is no folder {path.parent} either, the path exists up to {folder.resolve()}."
    return did_you_mean(
        path.name,
        sorted(p.name for p in folder.iterdir()),
        f"nothing in {folder.resolve()} has a similar name.",
    )


def nearest_numbers(allowed: Iterable[int], wanted: int) -> str:
    """The largest allowed number below `wanted` and the smallest above it, in words."""
    allowed = sorted(allowed)
    below, above = [n for n in allowed if n < wanted], [n for n in allowed if n > wanted]
    return either(below[-1:] + above[:1])


def either(choices: Sequence[object]) -> str:
    """The choices in words: "a", "a or b", "a, b or c"."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
