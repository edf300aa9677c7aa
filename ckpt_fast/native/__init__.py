# SPDX-License-Identifier: Apache-2.0
"""Chooses between the compiled engine, its Python fallback and the CUDA part.

Callers write ``from ckpt_fast import native; native.write_files(...)``. Names are looked up in the
implementation in force at each use: the compiled module, unless ``CKPT_FAST_NATIVE=0`` or it is not built.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from ckpt_fast import settings

if TYPE_CHECKING:
    from ckpt_fast.native._engine import (
        Progress,
        Supply,
        check_pickle,
        copy_crc32,
        copy_runs,
        cpu_features,
        crc32,
        crc32_combine,
        describe_tensors,
        permute_rows,
        read_extents,
        refer_to,
        walk_modules,
        walk_optimizer,
        write_files,
    )

__all__ = [
    "Progress",
    "Supply",
    "check_pickle",
    "copy_crc32",
    "copy_runs",
    "cpu_features",
    "crc32",
    "crc32_combine",
    "cuda",
    "cuda_release",
    "describe_tensors",
    "engine",
    "permute_rows",
    "read_extents",
    "refer_to",
    "using",
    "walk_modules",
    "walk_optimizer",
    "write_files",
]

Implementation = Literal["engine", "fallback"]

_logger = logging.getLogger(__name__)
_forced: Implementation | None = None


def engine() -> ModuleType:
    """The active implementation: ``_engine`` or ``fallback``."""
    if _forced == "engine":
        return importlib.import_module("ckpt_fast.native._engine")
    if _forced is None and settings.native_enabled():
        compiled = _compiled_engine()
        if compiled is not None:
            return compiled
    return importlib.import_module("ckpt_fast.native.fallback")


def cuda() -> ModuleType | None:
    """The CUDA part, or None: not built, no driver or device, or native code is switched off."""
    native = _forced == "engine" or (_forced is None and settings.native_enabled())
    return _compiled_cuda() if native else None


def cuda_release() -> tuple[int, int] | None:
    """The release of CUDA that the CUDA part was compiled with, usable here or not; None if not built."""
    try:
        module = importlib.import_module("ckpt_fast.native._cuda")
    except ImportError:
        return None
    return module.cuda_version // 1000, module.cuda_version % 1000 // 10


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Force one implementation in this process, for tests and benchmarks. Not for concurrent use."""
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def __getattr__(name: str) -> object:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(engine(), name)


@cache
def _compiled_engine() -> ModuleType | None:
    try:
        return importlib.import_module("ckpt_fast.native._engine")
    except ImportError as error:
        # Elsewhere there is no engine, and nothing to do about it.
        _logger.log(
            logging.WARNING if sys.platform == "linux" else logging.DEBUG,
            "ckpt_fast runs without its compiled engine (%s): its Python twin does the same, but slower. "
            "Installing ckpt_fast where there is a C++17 compiler builds the engine.",
            error,
        )
        return None


@cache
def _compiled_cuda() -> ModuleType | None:
    try:
        module = importlib.import_module("ckpt_fast.native._cuda")
    except ImportError:
        return None
    return module if module.device_count() > 0 else None
