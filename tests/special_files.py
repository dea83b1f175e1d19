"""What is at a path and is no regular file, for tests."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def make(kind: str, path: Path) -> None:
    """A pipe, a folder, a device or a socket."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        raise ValueError(f"kind must be pipe, folder, device or socket, got {kind!r}")
