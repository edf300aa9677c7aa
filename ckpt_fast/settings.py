# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that ckpt_fast reads, with its meaning and default.

Variables are read at call time, so a test or a launcher may change them between two saves. A save reads all
of them at once (``Settings.read``), before it touches anything.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

logger = logging.getLogger(__name__)

StagingMode = Literal["auto", "blocking", "overlapped", "device"]
OnUnloadable = Literal["refuse", "warn"]
OnSaveFailure = Literal["raise", "continue"]

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PREFIX = "CKPT_FAST_"
# Used by the build and the benchmarks.
_OTHERS = {
    "CKPT_FAST_CUDA",
    "CKPT_FAST_CUDA_ARCHS",
    "CKPT_FAST_CUDA_LINK",
    "CKPT_FAST_BENCH_MB",
    "CKPT_FAST_BENCH_TENSORS",
}
_warned: set[str] = set()
_pickle_is_refused: ContextVar[bool] = ContextVar("pickle_is_refused", default=False)

# Each thread holds several chunks in memory.
_MOST_CHUNK = 1 << 30
_MOST_THREADS = 1024
_MOST_RETRIES = 100
# A year, in seconds: clocks and locks accept it.
_MOST_TIMEOUT = 366 * 24 * 3600


@dataclass(frozen=True)
class Settings:
    """All settings of one save, as of its start; each field is the value of the function of that name."""

    native_enabled: bool
    io_threads: int
    chunk_bytes: int
    direct_io: bool
    fsync_enabled: bool
    host_buffer_bytes: int | None
    staging_mode: StagingMode
    write_retries: int
    space_check: bool
    timeout_s: float
    outage_s: float

    @classmethod
    def read(cls) -> Settings:
        """The current settings. Unknown variables cause a warning (``warn_of_unknown``).

        Raises:
            ValueError: names the variable and its valid values.
        """
        cls.warn_of_unknown()
        # Not save settings, but an invalid value should be found now rather than at the next load.
        verify_on_load()
        pickle_allowed()
        on_unloadable()
        on_save_failure()
        max_failed_saves()
        return cls(
            native_enabled(),
            io_threads(),
            chunk_bytes(),
            direct_io(),
            fsync_enabled(),
            host_buffer_bytes(),
            staging_mode(),
            write_retries(),
            space_check(),
            timeout_s(),
            outage_s(),
        )

    @staticmethod
    @contextlib.contextmanager
    def refusing_pickle() -> Iterator[None]:
        """A block in which ``pickle_allowed`` is False, for this thread: a search for damage runs nothing."""
        token = _pickle_is_refused.set(True)
        try:
            yield
        finally:
            _pickle_is_refused.reset(token)

    @staticmethod
    def warn_of_unknown() -> None:
        """Warn once per process about each unknown variable with our prefix, and suggest the nearest name."""
        for name in sorted(os.environ):
            if name.startswith(_PREFIX) and name not in _names() | _OTHERS | _warned:
                _warned.add(name)
                names = [known.removeprefix(_PREFIX) for known in sorted(_names())]
                nearest = difflib.get_close_matches(name.removeprefix(_PREFIX).upper(), names, n=1)
                hint = f"did you mean {_PREFIX}{nearest[0]}?" if nearest else "see docs/configuration.md"
                logger.warning("%s has no meaning here: %s", name, hint)


def native_enabled() -> bool:
    """``CKPT_FAST_NATIVE`` (1): 0 replaces every native function by its pure-Python/torch fallback."""
    return _flag("CKPT_FAST_NATIVE", default=True)


def io_threads() -> int:
    """``CKPT_FAST_THREADS``: I/O and copy threads per rank. Default: 2 to 8, by core count."""
    value = os.environ.get("CKPT_FAST_THREADS")
    if value is None:
        return max(2, min(8, os.cpu_count() or 1))
    return _positive("CKPT_FAST_THREADS", value, _MOST_THREADS)


def chunk_bytes() -> int:
    """``CKPT_FAST_CHUNK`` (4M): bytes per read or write, a multiple of 4096 and at most 1G. Accepts the
    suffixes K, M, G."""
    value = _size("CKPT_FAST_CHUNK", 4 << 20)
    if value % 4096:
        raise ValueError(f"CKPT_FAST_CHUNK={value} is not a multiple of 4096 bytes")
    if value > _MOST_CHUNK:
        raise ValueError(f"CKPT_FAST_CHUNK={os.environ['CKPT_FAST_CHUNK']!r} is more than 1G")
    return value


def direct_io() -> bool:
    """``CKPT_FAST_DIRECT`` (1): bypass the page cache (O_DIRECT) for writes, and for reads of data that is
    not cached."""
    return _flag("CKPT_FAST_DIRECT", default=True)


def fsync_enabled() -> bool:
    """``CKPT_FAST_FSYNC`` (1): 0 gives up durability against power loss, for scratch runs only."""
    return _flag("CKPT_FAST_FSYNC", default=True)


def host_buffer_bytes() -> int | None:
    """``CKPT_FAST_HOST_BUFFER`` (what is available): limit on host memory per rank for staged state. Accepts
    the suffixes K, M, G.

    Used for snapshots (background saves) and for state that is not contiguous CPU memory. State that does
    not fit is staged in waves; ``dcp.async_save``, which cannot wait for a wave, refuses it.
    """
    return _size("CKPT_FAST_HOST_BUFFER", 0) or None


def staging_mode() -> StagingMode:
    """``CKPT_FAST_STAGING`` (auto): how GPU tensors of a background save are copied: blocking, overlapped
    or device."""
    value = os.environ.get("CKPT_FAST_STAGING", "auto")
    if value not in get_args(StagingMode):
        raise ValueError(f"CKPT_FAST_STAGING={value!r}: use one of {', '.join(get_args(StagingMode))}")
    return cast(StagingMode, value)


def write_retries() -> int:
    """``CKPT_FAST_RETRIES`` (2): how often a write is retried after a transient error."""
    value = os.environ.get("CKPT_FAST_RETRIES", "2")
    return 0 if value == "0" else _positive("CKPT_FAST_RETRIES", value, _MOST_RETRIES)


def space_check() -> bool:
    """``CKPT_FAST_SPACE_CHECK`` (1): refuse a save if the file system reports too little free space."""
    return _flag("CKPT_FAST_SPACE_CHECK", default=True)


def spool_directory() -> str | None:
    """``CKPT_FAST_SPOOL`` (the system's temporary directory): local directory for staging checkpoints to and
    from object storage. Each rank creates and removes its own subdirectory. If the default is in memory
    (tmpfs), choose one on disk."""
    return os.environ.get("CKPT_FAST_SPOOL") or None


def timeout_s() -> float:
    """``CKPT_FAST_TIMEOUT`` (1800): seconds after which a background save counts as failed. Until then,
    uploads to object storage are tried again."""
    value = os.environ.get("CKPT_FAST_TIMEOUT", "1800")
    return float(_positive("CKPT_FAST_TIMEOUT", value, _MOST_TIMEOUT))


def outage_s() -> float:
    """``CKPT_FAST_OUTAGE`` (300): seconds during which any other request to object storage is tried again
    while its error may pass (no connection, 429, 5xx). 0 tries once."""
    value = os.environ.get("CKPT_FAST_OUTAGE", "300")
    return 0.0 if value == "0" else float(_positive("CKPT_FAST_OUTAGE", value, _MOST_TIMEOUT))


def on_save_failure() -> OnSaveFailure:
    """``CKPT_FAST_ON_SAVE_FAILURE`` (raise): what training does if a background save of
    ``save_checkpoint`` or ``CheckpointManager`` fails: raise, or continue with a warning."""
    value = os.environ.get("CKPT_FAST_ON_SAVE_FAILURE", "raise")
    if value not in get_args(OnSaveFailure):
        choices = ", ".join(get_args(OnSaveFailure))
        raise ValueError(f"CKPT_FAST_ON_SAVE_FAILURE={value!r}: use one of {choices}")
    return cast(OnSaveFailure, value)


def max_failed_saves() -> int:
    """``CKPT_FAST_MAX_FAILED_SAVES`` (3): how many background saves may fail in a row, if training continues
    then; one more raises."""
    return _positive("CKPT_FAST_MAX_FAILED_SAVES", os.environ.get("CKPT_FAST_MAX_FAILED_SAVES", "3"))


def visible_timeout_s() -> float:
    """``CKPT_FAST_VISIBLE_TIMEOUT`` (30): seconds that the other ranks keep looking for the checkpoint that
    rank 0 sees before the load fails."""
    return float(_positive("CKPT_FAST_VISIBLE_TIMEOUT", os.environ.get("CKPT_FAST_VISIBLE_TIMEOUT", "30")))


def metrics_file() -> str | None:
    """``CKPT_FAST_METRICS`` (none): file to which each rank appends one line of JSON per save."""
    return os.environ.get("CKPT_FAST_METRICS") or None


def trace_file() -> str | None:
    """``CKPT_FAST_TRACE`` (none): file to which each rank appends a timeline of its saves and loads, for
    Perfetto or chrome://tracing."""
    return os.environ.get("CKPT_FAST_TRACE") or None


def verify_on_load() -> bool:
    """``CKPT_FAST_VERIFY`` (1): verify the checksums of everything that is read, including partially read
    items."""
    return _flag("CKPT_FAST_VERIFY", default=True)


def pickle_allowed() -> bool:
    """``CKPT_FAST_ALLOW_PICKLE`` (0): 1 lets pickles in a checkpoint name any class, which can run arbitrary
    code."""
    return _flag("CKPT_FAST_ALLOW_PICKLE", default=False) and not _pickle_is_refused.get()


def on_unloadable() -> OnUnloadable:
    """``CKPT_FAST_ON_UNLOADABLE`` (refuse): what a save does with an object that a load would refuse: refuse
    it as well, or warn and save it."""
    value = os.environ.get("CKPT_FAST_ON_UNLOADABLE", "refuse")
    if value not in get_args(OnUnloadable):
        raise ValueError(f"CKPT_FAST_ON_UNLOADABLE={value!r}: use one of {', '.join(get_args(OnUnloadable))}")
    return cast(OnUnloadable, value)


@cache
def _names() -> set[str]:
    """The variables that this module reads, taken from its code so that no list has to be maintained."""
    functions = [value for value in globals().values() if inspect.isfunction(value)]
    constants = [constant for function in functions for constant in function.__code__.co_consts]
    return {name for name in constants if isinstance(name, str) and re.fullmatch(_PREFIX + "[A-Z_]+", name)}


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name)
    if value is None:
        return default
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r}: use 0 or 1")
    return value == "1"


def _positive(name: str, value: str, most: int | None = None) -> int:
    if not (value.isascii() and value.isdigit()) or not value.strip("0"):
        raise ValueError(f"{name}={value!r} is not a positive whole number")
    # Check the length first: Python refuses to convert thousands of digits, with a message of its own.
    if len(value.lstrip("0")) > 18 or (most is not None and int(value) > most):
        raise ValueError(f"{name}={value[:20]!r} is more than {most if most is not None else 10**18 - 1}")
    return int(value)


def _size(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    digits, suffix = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
    if suffix and suffix not in _SUFFIXES:
        raise ValueError(f"{name}={value!r}: use a number of bytes, or a number followed by K, M, G or T")
    return _positive(name, digits) * _SUFFIXES.get(suffix, 1)
