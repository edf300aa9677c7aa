# SPDX-License-Identifier: Apache-2.0
"""What a table must say about the machine it was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from ckpt_fast import native, settings

_PACKAGES = ("torch", "megatron-core", "nvidia-resiliency-ext", "safetensors", "torchsnapshot")


def facts(path: Path) -> list[str]:
    """Return lines about the hardware, the file system under ``path`` and the software."""
    lines = [
        time.strftime("%Y-%m-%d %H:%M:%S") + f", ckpt_fast {_revision()}, {_engine()}",
        f"{_cpu_model()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB, {settings.io_threads()} I/O threads",
        f"{file_system(path)}, Linux {platform.release()}, Python {platform.python_version()}",
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        f"torch on {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return lines


def load_average() -> str:
    """Return the load average over the last minute; above the number of cores, timings are unreliable."""
    return f"{os.getloadavg()[0]:.1f}"


def file_system(path: Path) -> str:
    """Return the type of the file system that holds ``path``, such as "ext4" or "tmpfs"."""
    where, found = str(path.resolve()), ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if (where == mount or where.startswith(mount.rstrip("/") + "/")) and len(mount) > len(found[0]):
            found = (mount, kind)
    return found[1]


def bytes_read() -> int:
    """Return the bytes this process has read with system calls so far; mapped files do not count."""
    match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert match is not None
    return int(match[1])


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown revision"


def _engine() -> str:
    features = native.cpu_features()
    return f"native engine ({', '.join(features)})" if features else "Python fallback"


def _cpu_model() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
