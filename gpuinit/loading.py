"""What is loaded late, and what a fork in the middle of that leaves behind.

A forked child has the one thread that forked, and every lock as it was. What another thread was importing or
compiling never ends there, and whoever waits for it waits for ever. So the child does without: it makes the
same weights with what is there. A fork that waited until all is loaded would take seconds, and for ever
where the thread that loads waits for the one that forks.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

brief = threading.RLock()  # held over imports of milliseconds, and over a fork, which waits for them
forking = threading.local()

under_way: list[tuple[int, str]] = []  # the thread, and what this package is loading there
lost: set[str] = set()  # in a forked child: what other threads were loading at the fork


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever imports or compiles for long, on the way to this module."""
    entry = threading.get_ident(), name
    try:
        under_way.append(entry)
        yield
    finally:
        if entry in under_way:  # not where Ctrl-C came before it
            under_way.remove(entry)


def hold_back_brief_imports() -> None:
    """Before a fork. No longer than a second, as an import may wait for the thread that forks."""
    forking.holds = False
    forking.holds = brief.acquire(timeout=1)


def let_go_of_brief_imports() -> None:
    """After it, in the parent."""
    if forking.holds:
        brief.release()


def renew_brief() -> None:
    """After it, in the child, where the thread that would let go of it may not be."""
    global brief
    brief = threading.RLock()


def unfinished() -> set[str]:
    """What will not be loaded for this thread, however long it waits.

    That is, what was lost at a fork, and in the handler of a signal what the thread itself was loading.
    """
    mine = threading.get_ident()
    return lost.union(name for thread, name in under_way if thread == mine)


def can_load(name: str) -> bool:
    """Whether this module is there, or can be imported without waiting for ever.

    What a module imports in turn is not known: where any import is unfinished, none is begun.
    """
    never = unfinished()
    return not never or (name in sys.modules and name not in never)


def place_of(module: Any) -> str:
    """Where a module lies: its file, or the folder of one that has none."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "made in memory")


def note_what_is_lost() -> None:
    """In a child, at once after the fork."""
    mine = threading.get_ident()
    lost.update(name for thread, name in under_way if thread != mine)
    lost.update(imports_of_others(mine))
    if numba_compiles_elsewhere():
        lost.add("numba")
    under_way[:] = [entry for entry in under_way if entry[0] == mine]


def imports_of_others(mine: int) -> list[str]:
    """The modules that other threads have under import, whoever began it, where Python lets one look."""
    locks: dict[str, Any] = getattr(getattr(importlib, "_bootstrap", None), "_module_locks", {})
    held = ((name, getattr(reference(), "owner", None)) for name, reference in list(locks.items()))
    return [name for name, owner in held if owner not in (None, mine)]


def numba_compiles_elsewhere() -> bool:
    """Whether another thread holds the lock of Numba's compiler, for a function of whomever."""
    compiler = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    lock = getattr(compiler, "_lock", None)
    if lock is None:
        return False
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        before=hold_back_brief_imports,
        after_in_parent=let_go_of_brief_imports,
        after_in_child=renew_brief,
    )
    os.register_at_fork(after_in_child=note_what_is_lost)
