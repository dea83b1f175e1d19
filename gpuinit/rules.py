"""Rules and report of `initialize`, which fills a whole model; nothing here knows a framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

Pattern = str | Callable[[Any, str], bool]
Rule = tuple[Pattern, Any]

TABLE_WIDTH = 80

WANTED = "rules must be None or a sequence of pairs (glob or function, initialiser), got "


class Row(NamedTuple):
    """What `initialize` did to one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str  # the initialiser; "-" for a parameter that was left alone
    std: float | None  # of the distribution drawn from; None for an initialiser that is not gpuinit's


class Report(tuple[Row, ...]):
    """The rows in the order of the model. `print(report)` shows a table of 80 columns."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("name", "shape", "dtype", "rule", "std")]
        for row in self:
            std = "-" if row.std is None else f"{row.std:.4g}"
            shape = "x".join(map(str, row.shape)) or "()"
            rule = row.rule.partition("(")[0]  # without arguments
            rows.append((row.name, shape, row.dtype, rule, std))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for column, least in ((3, 20), (0, 12)):  # the rule gives way first, then the name
            excess = sum(widths) + 2 * 4 - TABLE_WIDTH
            widths[column] -= max(0, min(excess, widths[column] - least))
        lines = []
        for name, shape, dtype, rule, std in rows:
            cells = (shorten(name[::-1], widths[0])[::-1], shape, dtype, shorten(rule, widths[3]), std)
            line = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(line.rstrip())
        elements = sum(prod(row.shape) for row in self)
        return "\n".join([*lines, f"{len(self)} parameters, {elements:,} elements"])


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def parse_rules(rules: Sequence[Rule]) -> list[Rule]:
    if isinstance(rules, str | bytes | dict):
        raise TypeError(WANTED + repr(rules))
    try:
        pairs = [(pattern, initializer) for pattern, initializer in rules]
    except (TypeError, ValueError):
        raise TypeError(WANTED + repr(rules)) from None
    for pair in pairs:
        if not (isinstance(pair[0], str) or callable(pair[0])):
            raise TypeError(WANTED + repr(pair))
    return pairs


def find_rule(rules: list[Rule], owner: Any, name: str) -> Any:
    """The initialiser of the first rule that fits, or None."""
    for pattern, initializer in rules:
        if fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern(owner, name):
            return initializer
    return None


def refuse_uncovered(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            "rules must cover every parameter; add a pair (pattern, initialiser), or pass strict=False to "
            f"leave them alone, got none for {', '.join(names)}"
        )
