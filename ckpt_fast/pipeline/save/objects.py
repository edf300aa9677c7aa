# SPDX-License-Identifier: Apache-2.0
"""Objects as the bytes of ``torch.save``, encoded once where they are plain values."""

from __future__ import annotations

import io
import pickle
from functools import lru_cache
from typing import Any, NoReturn

import torch

# Of pickled plain values. Most objects of a run are far smaller, and hundreds of them are equal.
_LONGEST = 4 << 10


def object_bytes(value: Any) -> bytes:
    """``torch.save`` in memory.

    Most of a run's objects are small, plain, and the same as at the last save. Those cost a fiftieth.
    """
    buffer = io.BytesIO()
    try:
        _PlainPickler(buffer, protocol=4).dump(value)
    except Exception:  # not plain, or not to be pickled at all, which torch.save says better
        return _torch_saved(value)
    pickled = buffer.getvalue()
    return _saved_plain(pickled) if len(pickled) <= _LONGEST else _torch_saved(value)


class _PlainPickler(pickle.Pickler):
    """Pickles nothing but Python's own values: numbers, strings, and containers of them."""

    def reducer_override(self, obj: Any) -> NoReturn:
        raise pickle.PicklingError(f"{type(obj).__name__} is not plain")


@lru_cache(maxsize=2048)
def _saved_plain(pickled: bytes) -> bytes:
    return _torch_saved(pickle.loads(pickled))


def _torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
