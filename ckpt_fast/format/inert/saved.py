# SPDX-License-Identifier: Apache-2.0
"""Files and items of ``torch.save``, read by the restricted unpickler."""

from __future__ import annotations

import functools
import io
import re
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from ckpt_fast import native
from ckpt_fast.format.archive import TYPED_STORAGES
from ckpt_fast.format.inert.kinds import RefusedPickleError, are, require
from ckpt_fast.format.inert.reader import InertUnpickler
from ckpt_fast.format.inert.tensors import StorageName
from ckpt_fast.format.torch_archive import member_content, open_archive, require_plain_pickles

# What torch.save's format before zip archives begins with: a pickled magic number, and a version.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# That of torch.save. Later ones spell names otherwise.
_PROTOCOL_2 = b"\x80\2"
# Names in a pickle of protocol 2, and those that mean the same in every program.
_NAME = re.compile(rb"c([\w.]+)\n(\w+)\n")
_SETTLED = {
    (b"_codecs", b"encode"),
    (b"_io", b"BytesIO"),
    (b"__builtin__", b"bytearray"),
    (b"__builtin__", b"complex"),
    (b"collections", b"OrderedDict"),
    (b"numpy", b"dtype"),
    (b"numpy", b"ndarray"),
    (b"numpy._core.multiarray", b"_reconstruct"),
    (b"numpy._core.multiarray", b"scalar"),
    (b"torch._utils", b"_rebuild_parameter"),
    (b"torch._utils", b"_rebuild_tensor_v2"),
    *((b"torch", name.encode()) for name in TYPED_STORAGES.values()),
    *((b"torch", str(dtype).removeprefix("torch.").encode()) for dtype in TYPED_STORAGES),
}
_LOCAL_NBYTES = 30  # the fixed part of a member's header
_DESCRIPTOR = b"PK\7\10"  # follows its bytes
_SMALL = 4 << 10

Content = Callable[[str, int], torch.UntypedStorage]


def read_saved(payload: bytes, device: str | None = "cpu") -> Any:
    """The value that ``torch.save`` has stored, made of nothing but data.

    Args:
        payload: all that it wrote.
        device: "cpu"; None: each tensor goes to the device that it was on (before archives: to the CPU).

    Raises:
        RefusedPickleError: it holds more than data, or asks for more memory or time than its length
            justifies; nothing of it has been run.
        Exception: of whatever kind, if it is damaged.
    """
    archive = open_archive(payload) if payload.startswith(b"PK") else None
    try:
        require_plain_pickles(payload, archive)
    except ValueError as error:
        raise RefusedPickleError(str(error)) from error
    return _read_archive(payload, archive, device) if archive is not None else _read_legacy(payload)


def _read_archive(payload: bytes, archive: zipfile.ZipFile, device: str | None) -> Any:
    members = {member.filename: member for member in archive.infolist()}
    (pickled,) = (name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name))
    prefix = pickled.removesuffix("data.pkl")
    order = member_content(payload, members[prefix + "byteorder"]) if prefix + "byteorder" in members else b""
    is_foreign = bool(order) and bytes(order) != sys.byteorder.encode()

    def content(key: str, nbytes: int) -> torch.UntypedStorage:
        return _storage_of(member_content(payload, members[f"{prefix}data/{key}"]), nbytes)

    storages = _Storages(content, device, is_foreign)
    stream = io.BytesIO(member_content(payload, members[pickled]))
    return InertUnpickler(stream, storages.load).load()


def require_readable(payload: bytes) -> None:
    """Nothing, if ``read_saved`` reads what ``torch.save`` has just written; no copies of tensors are made.

    Raises:
        RefusedPickleError: it would be refused.
        Exception: of whatever kind, if torch has not written it.
    """
    pickled = _first_pickle(payload)
    try:
        is_remembered = len(pickled) <= _SMALL and _is_settled(pickled)
        (_require_readable_once if is_remembered else _require_readable)(pickled)
    except ValueError:  # not all of a pickle, or one that is refused
        read_saved(payload)


def _first_pickle(payload: bytes) -> bytes:
    """The pickle that an archive begins with, as those of ``torch.save`` do.

    Anything else if there is none, and a part of it if it contains what follows the members of an archive.
    """
    lengths = payload[26:_LOCAL_NBYTES]
    names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    start = _LOCAL_NBYTES + names
    is_archive = payload.startswith(b"PK\3\4")
    return payload[start : payload.find(_DESCRIPTOR, start)] if is_archive else b""


def _is_settled(pickled: bytes) -> bool:
    """Whether what becomes of a pickle that torch has made does not depend on what the program allows."""
    return pickled.startswith(_PROTOCOL_2) and _SETTLED.issuperset(_NAME.findall(pickled))


def _require_readable(pickled: bytes) -> None:
    if native.check_pickle(pickled, archive=True) != len(pickled):
        raise ValueError("there is more than a pickle")
    if pickled.startswith(_PROTOCOL_2) and not _NAME.search(pickled):
        return  # plain data
    storages = _Storages(lambda _, nbytes: _new_storage(nbytes, device="meta"))
    InertUnpickler(io.BytesIO(pickled), storages.load).load()


# The pickles of tensors of one shape and dtype are the same: their bytes are elsewhere.
_require_readable_once = functools.lru_cache(maxsize=2048)(_require_readable)


class _Storages:
    """The storages that a pickle names, each made once."""

    def __init__(self, content: Content, device: str | None = "cpu", swap: bool = False) -> None:
        self._content, self._device, self._swap = content, device, swap
        self._made: dict[str, Any] = {}

    def load(self, pid: Any) -> Any:
        require(type(pid) is tuple and len(pid) == 5 and pid[0] == "storage", "a storage")
        _, name, key, location, count = pid
        require(type(name) is StorageName and are((key, location), str), "a storage")
        require(type(count) is int and 0 <= count < 1 << 62, "a storage")
        if key not in self._made:
            storage = self._content(key, count * name.dtype.itemsize)
            if self._swap and name.dtype.itemsize > 1:
                storage.byteswap(name.dtype)  # type: ignore[no-untyped-call]
            if self._device is None:
                storage = torch.serialization.default_restore_location(  # type: ignore[no-untyped-call]
                    storage, location
                )
            self._made[key] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=storage, dtype=name.dtype, _internal=True
            )
        return self._made[key]

    def load_legacy(self, pid: Any) -> Any:
        """``load`` for the format before archives, where a storage could be a part of another one."""
        require(type(pid) is tuple and len(pid) == 6 and pid[5] is None, "a storage")
        return self.load(pid[:5])


def _new_storage(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


def _storage_of(content: memoryview, nbytes: int) -> torch.UntypedStorage:
    """A storage with a copy of these bytes."""
    require(len(content) == nbytes, "a storage")
    if not nbytes:
        return _new_storage(0)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()


def _read_legacy(payload: bytes) -> Any:
    """What ``torch.save`` wrote before there were archives: five pickles, and the storages behind them."""
    stream = io.BytesIO(payload)
    magic, version, system = (InertUnpickler(stream).load() for _ in range(3))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise ValueError("it does not begin as a file of torch.save does")
    if system.get("little_endian", True) != (sys.byteorder == "little"):
        raise ValueError("it was written on a machine with the other byte order")
    begin = stream.tell()
    lengths: dict[str, int] = {}

    def note(key: str, nbytes: int) -> torch.UntypedStorage:
        lengths[key] = nbytes
        return _new_storage(nbytes, device="meta")

    # Where storages are is known only when all of them are; so the value is read twice.
    InertUnpickler(stream, _Storages(note).load_legacy).load()
    contents: dict[str, memoryview] = {}
    keys = InertUnpickler(stream).load()
    start = stream.tell()
    for key in keys:
        start += 8  # the number of elements
        contents[key] = memoryview(payload)[start : start + lengths[key]]
        start += lengths[key]
    stream.seek(begin)
    storages = _Storages(lambda key, nbytes: _storage_of(contents[key], nbytes))
    return InertUnpickler(stream, storages.load_legacy).load()
