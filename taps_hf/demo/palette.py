"""Who proposed a token, as the page shows it: a colour, and never by colour alone.

The colours are those of Okabe and Ito, told apart with every common colour vision deficiency.
Beside them every drafter has a line style (under its tokens) and a mark (at its nodes).
"""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00")
LINES = ("solid", "dashed", "dotted", "wavy", "solid")
MARKS = ("\u25cf", "\u25a0", "\u25b2", "\u25c6", "\u2605")
SEVERAL = "#CC79A7"
OWN = "#8A8A8A"


def css_class(origin: Sequence[int]) -> str:
    """The class of a token or node by the drafters that proposed it; none: the target's own."""
    if len(origin) == 1:
        return f"d{origin[0] % len(COLOURS)}"
    return "several" if origin else "own"


def mark(drafter: int) -> str:
    """A drafter's mark."""
    return MARKS[drafter % len(MARKS)]


def colour(drafter: int) -> str:
    """A drafter's colour."""
    return COLOURS[drafter % len(COLOURS)]


def label(origin: Sequence[int], names: Sequence[str]) -> str:
    """In words."""
    return " + ".join(names[i] for i in origin) or "target's own"


def stylesheet() -> str:
    """Rules that set `--hue` and `--line` of every class."""
    rules = [
        f".d{i} {{ --hue: {hue}; --line: {line}; }}"
        for i, (hue, line) in enumerate(zip(COLOURS, LINES))
    ]
    rules.append(f".several {{ --hue: {SEVERAL}; --line: double; }}")
    rules.append(f".own {{ --hue: {OWN}; --line: none; }}")
    return "\n".join(rules) + "\n"
