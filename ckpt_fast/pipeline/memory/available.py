# SPDX-License-Identifier: Apache-2.0
"""Host memory that a save may take without the kernel killing the job: of the machine, and of its cgroups."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_fast.pipeline.memory.host_buffer import host_buffers
from ckpt_fast.ranks.group import ranks_on_this_node

# What stays free: the trainer goes on allocating, and ranks look at different moments.
_MARGIN_SHARE = 16
_MOST_MARGIN = 8 << 30
# With less than that a save would crawl. It takes this much even if there is less.
LEAST_NBYTES = 64 << 20

_PROC, _CGROUPS = "/proc", "/sys/fs/cgroup"
# Of cgroup v1: a limit that is none.
_NO_LIMIT = 1 << 60


def default_bound(nbytes: int) -> int | None:
    """The bound on this rank's host buffers for a save that would stage so many bytes.

    Returns:
        None if they fit into idle buffers, or into this rank's share of what is available; otherwise the
        bytes that all buffers in use may have together.
    """
    idle = host_buffers.idle_nbytes
    if nbytes <= idle:
        return None
    spare = spare_nbytes()
    if spare is None or nbytes <= spare + idle:
        return None
    return max(spare + idle, LEAST_NBYTES) + host_buffers.used_nbytes


def is_tight() -> bool:
    """Whether others have taken half of the margin: what is kept for the next save must be given back."""
    return any(available < _margin(limit) // 2 for limit, available in _rooms())


def spare_nbytes() -> int | None:
    """Bytes that this rank may allocate: its share of what is available, less a margin; None if unknown."""
    rooms = list(_rooms())
    if not rooms:
        return None
    least = min(available - _margin(limit) for limit, available in rooms)
    return max(least, 0) // ranks_on_this_node()


def _margin(limit: int) -> int:
    return min(limit // _MARGIN_SHARE, _MOST_MARGIN)


def _rooms() -> Iterator[tuple[int, int]]:
    """(size, available) in bytes of the machine, and of every cgroup that limits this process."""
    machine = _numbers(f"{_PROC}/meminfo")
    if "MemTotal:" in machine and "MemAvailable:" in machine:
        yield machine["MemTotal:"] << 10, machine["MemAvailable:"] << 10
    for hierarchy, path in _memberships():
        if hierarchy == "memory":
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), f"{_CGROUPS}/memory"
            reclaimable = "total_inactive_file"
        else:
            names, root = ("memory.max", "memory.current"), _CGROUPS
            reclaimable = "inactive_file"
        # A limit of any cgroup above holds as well. In a container its own is mounted as the root.
        for directory in _upwards(root, path):
            limit, used = (_number(f"{directory}/{name}") for name in names)
            if limit is None or used is None or limit >= _NO_LIMIT:
                continue
            used -= min(used, _numbers(f"{directory}/memory.stat").get(reclaimable, 0))
            yield limit, max(limit - used, 0)


def _memberships() -> Iterator[tuple[str, str]]:
    """("memory", path) for cgroup v1, ("", path) for v2."""
    for line in _text(f"{_PROC}/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            yield "memory", path
        elif number == "0" and not controllers:
            yield "", path


def _upwards(root: str, path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        yield "/".join([root, *parts[:length]])


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    """The number in a file; None if there is none, or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _numbers(path: str) -> dict[str, int]:
    """The first number of each line of a file, by the word before it."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
