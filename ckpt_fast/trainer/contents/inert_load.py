# SPDX-License-Identifier: Apache-2.0
"""Reading a ``torch.save`` file of a data loader without letting it run code.

``torch.load(weights_only=True)`` is not enough: data loaders keep their state in dataclasses and dict
subclasses. What may be made here is data only: containers, scalars, tensors, arrays, enum members, and the
state classes of megatron-energon, if the program uses it, or that were registered.
"""

from __future__ import annotations

import _compat_pickle
import collections
import dataclasses
import enum
import functools
import io
import pickle
import sys
import types
import zipfile
from typing import IO, Any

import numpy as np
import torch

from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.format.torch_archive import open_archive, require_plain_pickles

_ENERGON = "megatron.energon."
_ENERGON_NAMES = ("State", "Checkpoint")

_registered: set[type] = set()


class RefusedPickleError(UnsafeCheckpointError, pickle.UnpicklingError):
    """The file names a class or function that is not plain data."""


def register_dataloader_state_class(cls: type) -> None:
    """Allow a data loader's own state class in its state files. It is made without calling ``__init__``,
    and its ``__setstate__``, if any, is called with what the file says."""
    _registered.add(cls)


def inert_load(stream: IO[bytes]) -> Any:
    """The object in a ``torch.save`` file; tensors on the CPU, shared storages shared.

    Args:
        stream: the file, from its beginning.

    Raises:
        RefusedPickleError: (an UnpicklingError) the file is no data; nothing of it has been run.
    """
    payload = stream.read()
    if not zipfile.is_zipfile(io.BytesIO(payload)):
        raise RefusedPickleError("not a file that torch.save wrote")
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        # torch.load would hand a TorchScript archive to another, unrestricted reader.
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise RefusedPickleError("a TorchScript archive instead of the state of a data loader")
    try:
        require_plain_pickles(payload, open_archive(payload))
    except Exception as error:
        raise RefusedPickleError(f"not the state of a data loader: {error}") from error
    stream = io.BytesIO(payload)
    return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_inert_pickle)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        # Pickle protocol 2, which torch.save uses, spells standard names as Python 2 did.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        known = _known().get((module, name))
        if known is not None:
            return known
        # Looked up without getattr, for which torch imports modules.
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        found = _loaded(module, name)
        if found in _registered or _is_energon_state(module, found) or _is_inert_enum(found):
            return found
        raise RefusedPickleError(
            f"Restricted unpickler refused to load '{module}.{name}'. If the data loader's state needs this "
            "class and you trust the file, call ckpt_fast.register_dataloader_state_class."
        )


_inert_pickle = types.ModuleType("ckpt_fast_inert_pickle", "What torch.load takes as its pickle module.")
_inert_pickle.Unpickler = _Unpickler  # type: ignore[attr-defined]


@functools.cache
def _known() -> dict[tuple[str, str], Any]:
    """Constructors that only hold what they are given."""
    builtin = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
    known: dict[tuple[str, str], Any] = {("builtins", cls.__name__): cls for cls in (*builtin, range, slice)}
    for cls in (collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque):
        known["collections", cls.__name__] = cls
    known["_codecs", "encode"] = _bytes_of_protocol_2
    known["torch._utils", "_rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
    known["torch", "Size"] = torch.Size
    known["torch", "device"] = torch.device
    for module in ("torch", "torch.storage"):
        known[module, "UntypedStorage"] = torch.UntypedStorage
    array = np.zeros(1)
    makers: list[Any] = [array.__reduce__()[0], array.__reduce_ex__(5)[0], np.float64(0).__reduce__()[0]]
    for core in ("numpy.core", "numpy._core"):
        for maker in makers:
            known[f"{core}.{maker.__module__.rpartition('.')[2]}", maker.__name__] = maker
    known["numpy", "ndarray"] = np.ndarray
    known["numpy", "dtype"] = np.dtype
    return known


def _bytes_of_protocol_2(text: str, encoding: str) -> bytes:
    """The representation of a bytes object in pickle protocol 2."""
    if encoding != "latin1":
        raise RefusedPickleError(f"Restricted unpickler refused to use the codec {encoding!r}")
    return text.encode("latin1")


def _loaded(module: str, name: str) -> Any:
    """The named object of a module the program has imported already; None when there is none."""
    try:
        return functools.reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return None


def _is_energon_state(module: str, found: Any) -> bool:
    if not isinstance(found, type) or not module.startswith(_ENERGON) or found.__module__ != module:
        return False
    named = any(word in found.__name__ for word in _ENERGON_NAMES)
    return named and (dataclasses.is_dataclass(found) or issubclass(found, dict))


def _is_inert_enum(found: Any) -> bool:
    """Enums whose look-up by value is the standard one, and so runs no code of theirs."""
    if not isinstance(found, type) or not issubclass(found, enum.Enum):
        return False
    return found._missing_.__func__.__module__ == "enum"  # type: ignore[attr-defined, no-any-return]
