"""What the commands print, and how they end.

An error is one line on stderr. The exit status is 0, or 1 where `verify` finds a difference and nowhere else;
2 for every error; 128 + its number for a signal, and that of SIGPIPE where the reader of the output has had
enough, as the shell tells it of any program.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from gpuinit.disk import FULL, named

COMMANDS = {
    "sample": "Fill one array and compare it with theory.",
    "doctor": "Describe this installation and check the bytes it makes.",
    "checkpoint": "Make a whole model's initial weights.",
    "verify": "Make the weights again and compare them, tensor by tensor.",
    "fingerprint": "Print a digest of all weights, and one of each tensor.",
    "plot": "Draw histograms of weights over the exact densities.",
}

ERROR = 2
OUTPUT = "standard output"
PIPE_CLOSED = 128 + 13  # Windows has no SIGPIPE

# Schedulers end a job with SIGTERM, and a terminal that is closed with SIGHUP, which Windows has not.
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# What a message quotes is cut: a string in quotes, or a word such as a path; and the message as a whole.
MOST_QUOTED = 200
MOST = 1000
QUOTED = re.compile(
    rf"""(?<!\w)(['"])(?:\\.|(?!\1).){{{MOST_QUOTED},}}?\1(?!\w)|\S{{{MOST_QUOTED + 1},}}""", re.DOTALL
)


class Interrupt(KeyboardInterrupt):
    """A signal that ends the process, raised in the main thread as that of Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Parser(argparse.ArgumentParser):
    """A parser whose errors are messages like all others."""

    def error(self, message: str) -> NoReturn:
        """Not argparse's own, of several lines."""
        stop(f"{message}. See {self.prog} -h", ERROR)

    def print_help(self, file: Any = None) -> None:
        """As other output."""
        say(*self.format_help().rstrip("\n").split("\n"))


@contextmanager
def explained() -> Iterator[None]:
    """Around a command: errors and signals as one line, with their notes, and an exit status."""
    with raised(), warnings.catch_warnings():
        warnings.showwarning = tell  # type: ignore[assignment]
        try:
            yield
        except KeyboardInterrupt as error:
            stop(noted("stopped", error), 128 + getattr(error, "number", signal.SIGINT))
        except OSError as error:
            if error.errno is not None and error.filename in (None, OUTPUT) and let_go(sys.stdout):
                error.filename = OUTPUT  # which click writes without a name
            if isinstance(error, BrokenPipeError) and error.filename in (OUTPUT, None):
                sys.exit(PIPE_CLOSED)
            stop(noted(explain_os_error(error), error), ERROR)
        except (TypeError, ValueError, ImportError, MemoryError, RuntimeError, Warning) as error:
            stop(noted(str(error) or type(error).__name__, error), ERROR)
        except Exception as error:  # a fault of ours
            print_to(sys.stderr, *"".join(traceback.format_exception(error)).rstrip("\n").split("\n"))
            sys.exit(ERROR)


@contextmanager
def raised() -> Iterator[None]:
    """Signals that would end the process are raised, so that it cleans up; those that are ignored stay so."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in ENDING}
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: handler for number, handler in found.items() if handler in usual}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: object) -> None:
    # A second one, as of an impatient user or a scheduler, must not end the cleaning up after the first.
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
        raise Interrupt(number)


def explain_os_error(error: OSError) -> str:
    name = error.filename
    words = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        words += ". Free some of the disk, or choose another"
    return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {words}" if name else words


def noted(message: str, error: BaseException) -> str:
    """With the notes of the error, which say what was left behind."""
    return ". ".join([message.rstrip("."), *getattr(error, "__notes__", [])])


def tell(message: Warning | str, *_: object) -> None:
    """A message as one line on stderr."""
    print_to(sys.stderr, f"gpuinit: {cut(visible(cut(str(message)))).rstrip('.')}.")


def stop(message: str, status: int) -> NoReturn:
    tell(message)
    sys.exit(status)


def say(*lines: str) -> None:
    """Lines of the output."""
    print_to(sys.stdout, *lines)


def print_to(stream: TextIO | None, *lines: str) -> None:
    """Without what a terminal would obey, or the stream cannot encode; at once."""
    if stream is None:  # closed when Python started
        return
    shown = [readable(line, stream.encoding or "utf-8") for line in lines]
    try:
        with named(OUTPUT):
            print(*shown, sep="\n", file=stream, flush=True)
    except OSError:
        let_go(stream)
        if stream is not sys.stderr:
            raise
        # Nobody can be told, and the exit status stays what it is.


def let_go(stream: TextIO | None) -> bool:
    """Whether a stream cannot be written: Python must not try again as it ends, and change the status."""
    if stream is None:
        return False
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False


def readable(text: str, encoding: str) -> str:
    """With escapes for what cannot be printed."""
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    if text.isprintable():  # as most are: a table may have a million
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str) -> str:
    """A message that is not too long, nor is what it quotes: of each the beginning and the end stay."""
    text = QUOTED.sub(lambda found: f"{found[0][:120]}...{found[0][-40:]}", text)
    return text if len(text) <= MOST else f"{text[:700]} ... {text[-200:]}"
