# SPDX-License-Identifier: Apache-2.0
"""What of this machine and environment matters for checkpoints: what is slow, and how to mend it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ckpt_fast import native, settings, system
from ckpt_fast.format.types import readable
from ckpt_fast.storage import replacement
from ckpt_fast.storage.space import file_system_of
from ckpt_fast.version import installed, version

Level = Literal["ok", "note", "slow", "broken"]

# Files that a rank has open at once while it loads; each file of a checkpoint is open only once.
_FEW_FILES = 4096
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        section: what it is about: "software", "engine", "machine", "storage".
        name, value: the fact.
        level: "ok"; "note": it may matter; "slow": saves or loads take longer for it; "broken": something
            cannot work.
        remedy: what to do about it; "" if nothing.
    """

    section: str
    name: str
    value: str
    level: Level = "ok"
    remedy: str = ""


def examine(directory: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Look at software, engine, machine and, with a directory, at the storage there. Local.

    A small file is written in ``directory``, and removed.
    """
    found = [*_software(), *_engine(), *_machine()]
    if directory is not None:
        found += _storage(os.path.abspath(os.fspath(directory)))
    return found


# --- Software ----------------------------------------------------------------------------------------------


def _software() -> Iterator[Finding]:
    section = "software"
    yield Finding(section, "ckpt_fast", version())
    yield Finding(section, "Python", sys.version.split()[0])
    yield Finding(section, "torch", str(torch.__version__))
    for name, package in (
        ("Megatron-Core", "megatron-core"),
        ("nvidia-resiliency-ext", "nvidia-resiliency-ext"),
        ("Megatron Bridge", "megatron-bridge"),
        ("multi-storage-client", "multi-storage-client"),
    ):
        yield Finding(section, name, installed(package))
    built = torch.version.cuda
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = sorted({torch.cuda.get_device_name(number) for number in range(devices)})
    what = f"torch is built with CUDA {built}" if built else "torch is built without CUDA"
    yield Finding(section, "CUDA", ", ".join([what, f"{devices} devices", *names]))
    yield Finding(section, "nvcc", _nvcc())


def _nvcc() -> str:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return "not found"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
        match = re.search(r"release ([\d.]+)", ran.stdout)
        return f"{match[1]} ({path})" if match else path
    return f"{path} does not run"


# --- Engine ------------------------------------------------------------------------------------------------


def _engine() -> Iterator[Finding]:
    section = "engine"
    name = native.engine().__name__
    is_native = name.endswith("_engine")
    if is_native:
        yield Finding(section, "engine", f"native ({name})")
    elif sys.platform != "linux":
        yield Finding(section, "engine", name, "note", "the compiled engine, which is faster, is for Linux")
    elif not settings.native_enabled():
        yield Finding(section, "engine", name, "slow", "unset CKPT_FAST_NATIVE=0")
    else:
        remedy = "install ckpt_fast where there is a C++17 compiler: pip install --force-reinstall ."
        yield Finding(section, "engine", name, "slow", remedy)
    features = native.cpu_features()
    text = ", ".join(features) or "portable code"
    yield Finding(section, "CPU features", text, "ok" if features or not is_native else "note")
    release = native.cuda_release()
    has_gpu = torch.cuda.is_available()
    if release is not None:
        yield Finding(section, "CUDA module", f"built with CUDA {release[0]}.{release[1]}")
    else:
        remedy = "install ckpt_fast where nvcc is on the path" if has_gpu else ""
        yield Finding(section, "CUDA module", "not built", "slow" if has_gpu else "ok", remedy)
    yield Finding(
        section, "transfers", f"{settings.io_threads()} threads, chunks of {settings.chunk_bytes() >> 10} KiB"
    )
    if not settings.direct_io():
        yield Finding(section, "direct I/O", "off", "slow", "unset CKPT_FAST_DIRECT=0")
    if not settings.fsync_enabled():
        remedy = "unset CKPT_FAST_FSYNC=0: a power failure may take finished checkpoints"
        yield Finding(section, "fsync", "off", "note", remedy)
    if not settings.verify_on_load():
        yield Finding(section, "checksums", "not compared by loads", "note", "unset CKPT_FAST_VERIFY=0")


# --- Machine -----------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    section = "machine"
    yield Finding(section, "cores", f"{system.usable_cores()} of {os.cpu_count()} may be used")
    total = system.memory_nbytes()
    yield Finding(section, "memory", readable(total) if total is not None else "not known")
    if sys.platform == "linux":
        yield _cgroup_memory(section)
        yield _huge_pages(section)
    if sys.platform != "win32":
        yield from _limits(section, total or 0)


def _limits(section: str, memory: int) -> Iterator[Finding]:
    yield _limit(
        section,
        "open files",
        "RLIMIT_NOFILE",
        lambda soft: soft < _FEW_FILES,
        f"raise it to {_FEW_FILES} or more (ulimit -n): a load opens every file of a checkpoint",
    )
    yield _limit(
        section,
        "locked memory",
        "RLIMIT_MEMLOCK",
        lambda soft: torch.cuda.is_available() and soft < memory // 4,
        "raise it (ulimit -l unlimited): copies from GPUs go through page-locked memory",
    )
    yield _limit(section, "file size", "RLIMIT_FSIZE", lambda _: True, "raise it (ulimit -f unlimited)")


def _limit(section: str, name: str, which: str, is_low: Callable[[int], bool], remedy: str) -> Finding:
    soft = system.soft_limit(which)
    if soft is None:
        return Finding(section, name, "unlimited")
    low = is_low(soft)
    value = readable(soft) if which != "RLIMIT_NOFILE" else str(soft)
    return Finding(section, name, value, "note" if low else "ok", remedy if low else "")


def _cgroup_memory(section: str) -> Finding:
    name = "memory of the cgroup"
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        text = _read(limit)
        if text is None:
            continue
        if not text.isdigit() or int(text) >= 1 << 60:
            return Finding(section, name, "no limit")
        left = int(text) - int(_read(used) or 0)
        value = f"{readable(int(text))}, {readable(max(left, 0))} not used"
        remedy = "background saves copy the state: set CKPT_FAST_HOST_BUFFER to what may be used for it"
        return Finding(section, name, value, "note", remedy)
    return Finding(section, name, "not known")


def _huge_pages(section: str) -> Finding:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text or "")
    if match is None:
        return Finding(section, "huge pages", "not known")
    if match[1] == "never":
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: host buffers map faster"
        return Finding(section, "huge pages", match[1], "slow", remedy)
    return Finding(section, "huge pages", match[1])


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text().strip()
    return None


# --- Storage -----------------------------------------------------------------------------------------------


def _storage(directory: str) -> Iterator[Finding]:
    section = "storage"
    if not os.path.isdir(directory):
        yield Finding(section, directory, "does not exist", "broken", "create it, or name another directory")
        return
    kind, device = file_system_of(directory)
    level: Level = "ok"
    remedy = ""
    if kind in _MEMORY:
        level, remedy = "note", "it is in memory: what is saved here does not outlive the machine"
    elif kind in _NETWORK:
        level, remedy = "note", "local disks are faster; for background saves that hardly matters"
    elif kind == "overlay":
        level, remedy = "note", "it is the container's own layer: mount a volume for checkpoints"
    yield Finding(section, "file system", f"{kind} ({device})" if kind else "not known", level, remedy)
    free, size = system.disk_space(directory)
    yield Finding(section, "free space", f"{readable(free)} of {readable(size)}")
    if not os.access(directory, os.W_OK | os.X_OK):
        yield Finding(section, "writable", "no", "broken", "give this user the right to write there")
        return
    yield from _trial(section, directory)


def _trial(section: str, directory: str) -> Iterator[Finding]:
    """What only trying tells."""
    try:
        with tempfile.TemporaryDirectory(prefix=".ckpt_fast-doctor-", dir=directory) as place:
            if sys.platform == "linux":
                yield _direct(section, place)
            names = [os.path.join(place, name) for name in ("a", "b")]
            for name in names:
                os.mkdir(name)
            yield _exchange(section, *names)
    except OSError as error:
        yield Finding(section, "writing", f"fails: {error.strerror or error}", "broken", "see the error")


def _direct(section: str, place: str) -> Finding:
    try:
        flags = os.O_RDWR | os.O_CREAT | system.open_flags("O_DIRECT")
        descriptor = os.open(os.path.join(place, "file"), flags)
    except OSError:
        return Finding(
            section, "O_DIRECT", "not supported", "note", "reads and writes go through the page cache"
        )
    os.close(descriptor)
    return Finding(section, "O_DIRECT", "supported")


def _exchange(section: str, one: str, other: str) -> Finding:
    if replacement.try_exchange(one, other):
        return Finding(section, "exchange of two names", "supported")
    return Finding(
        section,
        "exchange of two names",
        "not supported",
        "note",
        "saving an iteration again takes two renames; the next save or load mends a crash between them",
    )
