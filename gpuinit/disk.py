"""Files: read where they are files, and made without trust in what a file system says of itself.

Object stores that are mounted, network disks and disks in memory may offer no fsync, no rename or no statfs.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # by a file system


def open_file(path: Path, buffering: int = -1) -> Any:
    """A file opened to be read. To open a pipe would wait for its writer, and a device may do anything."""
    try:
        check_regular(path, path.stat())
        wait_not = getattr(os, "O_NONBLOCK", 0)  # should it become a pipe meanwhile
        file = open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | wait_not))  # noqa: SIM115
    except ValueError:
        raise ValueError(
            f"a path must have no null character and no half of a surrogate pair, got {str(path)!r}"
        ) from None
    try:
        check_regular(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_text(path: Path) -> str:
    with TextIOWrapper(open_file(path), encoding="utf-8") as file:
        return file.read()


def check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"must be a regular file, got {kind}", str(path))


def exists(path: Path) -> bool:
    """Whether the name is taken, by a link that leads nowhere too. What no name can be is an error."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def named(path: object) -> Iterator[None]:
    """Errors name the file, as those of write, fsync and close do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None and path is not None:
            error.filename = str(path)
        raise


def sync(file: BinaryIO, path: Path) -> None:
    """What was written is on the disk; or a warning, where the file system has no way to tell."""
    with named(path):
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            warnings.warn(
                f"{path.parent} has no fsync: what is written may not survive a loss of power", stacklevel=2
            )


def sync_folder(folder: Path) -> None:
    """Make new names survive a loss of power; Windows and some network disks have no way to.

    Nor is there one for a folder that may be written and not read.
    """
    if os.name != "posix":
        return
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, *NOT_OFFERED):
            raise
        return
    try:
        with named(folder):
            os.fsync(number)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(number)
