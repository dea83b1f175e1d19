"""What the system lets this process have: a share of the cores' time, and address space.

Paths are plain text here, as pathlib is slow to import.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache

from gpuinit import loading

PROCESS = "/proc/self"


@cache
def cpu_quota(process: str = PROCESS) -> float | None:
    """How many cores' time the control groups of a container allow; None where they set no limit.

    The least on the way from the process's own group to the top, as each binds all below it. It is read
    once, and a change while the process runs is not seen.
    """
    try:
        return min(quotas(process), default=None)
    except ValueError:  # lines of another form, as of a Linux that is imitated: no limit that is known
        return None


def quotas(process: str) -> Iterator[float]:
    """What each group sets: Linux, Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst."""
    for mount, names in cpu_groups(process):
        for depth in range(len(names) + 1):
            quota, period = quota_and_period("/".join([mount, *names[:depth]]))
            if quota > 0 and period > 0:
                yield quota / period


def cpu_groups(process: str) -> Iterator[tuple[str, list[str]]]:
    """Where each hierarchy that may limit the time is mounted, and the names from there to the group."""
    groups = {}  # by the type of the file system
    for line in lines_of(f"{process}/cgroup"):  # 1:cpu,cpuacct:/a/group, or 0::/a/group in version 2
        number, controllers, path = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            groups["cgroup2" if number == "0" else "cgroup"] = names_in(path)
    for line in lines_of(f"{process}/mountinfo"):  # proc_pid_mountinfo(5)
        mounted, _, what = line.partition(" - ")
        top, mount = (unescape(field) for field in mounted.split(" ")[3:5])
        kind, _, options = what.split(" ", 2)
        if kind in groups and (kind == "cgroup2" or "cpu" in options.split(",")):
            names, above = groups[kind], names_in(top)
            # A mount whose top is no group above the process's is a container's, and its top that group.
            below = names[: len(above)] == above and ".." not in names
            yield mount, names[len(above) :] if below else []


def names_in(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def quota_and_period(folder: str) -> tuple[int, int]:
    """Microseconds of all cores together in a period, and the period; 0 where no limit is set."""
    words = " ".join(lines_of(f"{folder}/cpu.max")).split()
    words = words or [*lines_of(f"{folder}/cpu.cfs_quota_us"), *lines_of(f"{folder}/cpu.cfs_period_us")]
    if len(words) == 2 and all(re.fullmatch(r"\d{1,18}", word, re.ASCII) for word in words):
        return int(words[0]), int(words[1])
    return 0, 0  # "max" in version 2, -1 in version 1, or there are no such files


def unescape(field: str) -> str:
    r"""A field of mountinfo, in which a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def lines_of(path: str) -> list[str]:
    """Of a file of the kernel's; none where it is not there or cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
            return file.read().split("\n")[:-1]
    except OSError:
        return []


def free_address_space(process: str = PROCESS) -> float:
    """Bytes that the process may still map under `ulimit -v` and `ulimit -d`; infinite without a limit."""
    try:
        with loading.brief:
            import resource
    except ImportError:  # Windows, which has no such limits
        return math.inf
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if limits == [resource.RLIM_INFINITY] * 2:
        return math.inf
    pages = " ".join(lines_of(f"{process}/statm")).split()  # all, resident, shared, text, 0, data and stack
    if len(pages) < 6:  # no Linux, and so no limit that is kept
        return math.inf
    used = [int(pages[place]) * resource.getpagesize() for place in (0, 5)]
    left = zip(limits, used, strict=True)
    return min(limit - size if limit != resource.RLIM_INFINITY else math.inf for limit, size in left)
