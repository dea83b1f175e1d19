"""Rules and report of `initialize`, which fills a whole model; nothing here knows a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from itertools import takewhile
from math import prod
from textwrap import wrap
from typing import Any, NamedTuple

Pattern = str | Callable[[Any, str], bool]
Rule = tuple[Pattern, Any]

TABLE_WIDTH = 80

# What the error for uncovered parameters shows: names where there are few, else kinds of them.
NAMES_SHOWN = 5
GROUPS_SHOWN = 4
NAME_WIDTH = 18

WANTED = "rules must be None or a sequence of pairs (glob or function, initialiser), got "


class Row(NamedTuple):
    """What `initialize` did to one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str  # the initialiser; "-" for a parameter that was left alone
    std: float | None  # of the distribution drawn from; None for an initialiser that is not gpuinit's
    written: str = "whole"  # or "part", "frozen", "not written", "meta, not written"


class Report(list[Row]):
    """The rows in the order of the model, and notes on it. `print(report)` shows a table of 80 columns."""

    def __init__(self, rows: Iterable[Row] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "shape", "dtype", "rule", "std", "written")]
        for row in self:
            std = "-" if row.std is None else f"{row.std:.4g}"
            shape = "x".join(map(str, row.shape)) or "()"
            rule = row.rule.partition("(")[0]  # without arguments
            rows.append((row.name, shape, row.dtype, rule, std, row.written.partition(",")[0]))
        if all(row.written == "whole" for row in self):
            rows = [cells[:-1] for cells in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = max(len(cells[3].partition(" ")[2]) for cells in rows)
        # The rule gives way first, but for its numbers, then the name, then whatever is left.
        for column, least in ((3, max(20, 5 + numbers)), (0, 12), (1, 10), (3, 12)):
            excess = sum(widths) + 2 * (len(widths) - 1) - TABLE_WIDTH
            widths[column] -= max(0, min(excess, widths[column] - least))
        lines = []
        for name, shape, dtype, rule, *rest in rows:
            name, shape = shorten(name[::-1], widths[0])[::-1], shorten(shape, widths[1])
            cells = (name, shape, dtype, shorten_rule(rule, widths[3]), *rest)
            line = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(line.rstrip())
        elements = sum(prod(row.shape) for row in self)
        lines.append(f"{len(self)} parameters, {elements:,} elements")
        return "\n".join([*lines, *(line for note in self.notes for line in wrap(note, TABLE_WIDTH))])


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def shorten_rule(rule: str, width: int) -> str:
    """Its name gives way first: "trunc... std=0.02"."""
    name, space, numbers = rule.partition(" ")
    return shorten(shorten(name, max(4, width - len(space + numbers))) + space + numbers, width)


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


def find_rule(rules: list[Rule], owner: Any, *names: str) -> Any:
    """The initialiser of the first rule that fits, or None: a glob any of the names, a function the last."""
    for pattern, initializer in rules:
        if isinstance(pattern, str):
            fits = any(fnmatchcase(name, pattern) for name in names)
        else:
            fits = pattern(owner, names[-1])
        if fits:
            return initializer
    return None


def spare_frozen(rules: Sequence[Rule], defaults: Sequence[Rule]) -> list[Rule]:
    """The rules as what is frozen sees them: those of the caller, but for "*", which names nothing."""
    return [(pattern, None if pattern == "*" or (pattern, f) in defaults else f) for pattern, f in rules]


@contextmanager
def noting(note: str) -> Iterator[None]:
    """An error says which parameter it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


class Uncovered(NamedTuple):
    """A parameter that no rule covers."""

    name: str
    shape: tuple[int, ...]
    owner: str = ""  # the class of what owns it
    initializer: str = "initialiser"  # as a rule for it may have it


def refuse_uncovered(
    uncovered: Sequence[Uncovered],
    wanted: str = "rules must cover every parameter",
    spared: Sequence[str] = (),
) -> None:
    """Raise where there are any, with rules for them that fit none of those spared."""
    if not uncovered:
        return
    groups: dict[tuple[str, int, str], list[Uncovered]] = {}
    for parameter in uncovered:
        own_name = parameter.name.replace("/", ".").rpartition(".")[2]
        title = f"{parameter.owner}.{own_name}".removeprefix(".")
        groups.setdefault((title, len(parameter.shape), parameter.initializer), []).append(parameter)
    names = [parameter.name for parameter in uncovered]
    shown = sorted(groups.items(), key=lambda item: len(item[1]), reverse=True)[:GROUPS_SHOWN]
    pairs = [
        f'("{glob}", {group[0].initializer})'
        for _, group in shown
        for glob in find_globs(group, [*names, *spared])
    ]
    if len(names) <= NAMES_SHOWN:
        listing = ", ".join(names)
    else:
        lines = [
            f"{title} {group[0].shape}: {len(group)}, e.g. {shorten(group[0].name, NAME_WIDTH)}"
            for (title, *_), group in shown
        ]
        left = len(names) - sum(len(group) for _, group in shown)
        lines += [f"and {left} more"] if left else []
        listing = "\n".join([f"{len(names)} parameters:", *lines])
    raise ValueError(
        f"{wanted}; append [{', '.join(pairs)}], or pass strict=False to skip them, got none for {listing}"
    )


def find_globs(group: Sequence[Uncovered], names: Sequence[str]) -> list[str]:
    """A short pattern that fits the names of a group and no others of these, or some of the names."""
    wanted = {parameter.name for parameter in group}
    ends = zip(*(name[::-1] for name in wanted), strict=False)
    end = "".join(letter for letter, *_ in takewhile(lambda letters: len({*letters}) == 1, ends))[::-1]
    starts = [place for place in reversed(range(len(end))) if end[place] in "./"]
    globs = [*(f"*{escape(end[start:])}" for start in starts), ("" if wanted == {end} else "*") + escape(end)]
    others = set(names) - wanted
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in others):
            return [glob]
    return [escape(parameter.name) for parameter in group[:NAMES_SHOWN]]


def unwrap(initializer: Any) -> tuple[Any, dict[str, Any]]:
    """The function below any partials, and their keywords."""
    words: dict[str, Any] = {}
    while isinstance(initializer, partial):
        words = {**initializer.keywords, **words}
        initializer = initializer.func
    return initializer, words


def format_argument(value: object) -> str:
    """As a report has it."""
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
