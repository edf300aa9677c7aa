# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast --version``: what is installed."""

from __future__ import annotations

from importlib.util import find_spec

from ckpt_fast import native
from ckpt_fast.version import installed, version


def versions() -> list[str]:
    """The installed versions: ckpt_fast, its native parts, and the packages it works with."""
    release = native.cuda_release()
    return [
        f"ckpt-fast {version()}",
        f"native engine: {'built' if find_spec('ckpt_fast.native._engine') else 'not built'}",
        f"CUDA module: {'not built' if release is None else f'built with CUDA {release[0]}.{release[1]}'}",
        *(f"{package}: {installed(package)}" for package in ("torch", "megatron-core")),
    ]
