# SPDX-License-Identifier: Apache-2.0
"""No pickle takes more memory or time than its length justifies, and no tensor leaves its storage."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckpt_fast.format.inert.kinds import RefusedPickleError
from ckpt_fast.format.inert.saved import read_saved
from tests.format.inert import hostile
from tests.format.inert.hostile import (
    HUGE,
    STATES,
    Call,
    Name,
    Storage,
    nothing_happens,
    pickled,
    read,
    refused,
)

# Memory and time.


F8 = Call(("numpy", "dtype"), ("f8",))
MULTIARRAY, NUMERIC = "numpy._core.multiarray", "numpy._core.numeric"
BOMBS = {
    "bytes": Call(("builtins", "bytes"), (HUGE,)),
    "bytearray": Call(("builtins", "bytearray"), (HUGE,)),
    "bytes of a list": Call(("builtins", "bytes"), ([1],)),
    "deque": Call(("collections", "deque"), (Call(("builtins", "range"), (HUGE,)),)),
    "set": Call(("builtins", "set"), (Call(("builtins", "range"), (HUGE,)),)),
    "Counter": Call(("collections", "Counter"), (Call(("builtins", "range"), (HUGE,)),)),
    "Fraction": Call(("fractions", "Fraction"), ("1e999999999",)),
    "long Fraction": Call(("fractions", "Fraction"), (1 << 80_000, 3)),
    "scalar": Call((MULTIARRAY, "scalar"), (Call(("numpy", "dtype"), ("V999999999",)), b"x")),
    "array": Call((MULTIARRAY, "_reconstruct"), (Name("numpy", "ndarray"), (HUGE,), b"b")),
    "array of a class": Call((MULTIARRAY, "_reconstruct"), (Name("builtins", "list"), (0,), b"b")),
    "buffer": Call((NUMERIC, "_frombuffer"), (b"x", F8, (HUGE,), "C")),
    "negative": Call((NUMERIC, "_frombuffer"), (b"x" * 8, F8, (-1,), "C")),
    "objects": Call((MULTIARRAY, "scalar"), (Call(("numpy", "dtype"), ("O8",)), b"x")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    assert refused(BOMBS[name])


@pytest.mark.parametrize("state", ["array", "objects", "dtype", "flags", "list", "attributes"])
def test_states_of_arrays(state: str) -> None:
    made = Call(("numpy._core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b"))
    made.state = STATES[state]
    assert refused(made)


def test_dtypes_that_contradict_themselves() -> None:
    f8 = Call(("numpy", "dtype"), ("f8",))
    for state in (
        (3, "|", None, ("a",), {"a": (f8, 4)}, 8, 1, 0),  # behind the end
        (3, "|", None, ("a",), {"a": (f8, -8)}, 8, 1, 0),
        (3, "|", None, ("a", "b"), {"a": (f8, 0)}, 8, 1, 0),
        (3, "|", None, ("a",), {"a": (f8, 0)}, 8, 1, 63),  # flags of objects
        (3, "|", (f8, (HUGE, HUGE)), None, None, 8, 1, 0),
        (3, "<", None, None, None, 8, 1, 0),
        (4, "<", None, None, None, -1, -1, 0, ({"a": 1}, (b"D", 1, 1, 1))),
    ):
        with nothing_happens(), pytest.raises((RefusedPickleError, ValueError, TypeError)):
            read(pickled(Call(("numpy", "dtype"), ("V8", False, True), state=state)))


# Tensors. The storage has four bytes.


def tensor(*args: Any, maker: str = "_rebuild_tensor_v2") -> Call:
    return Call(("torch._utils", maker), (Storage(), *args))


@pytest.mark.parametrize(
    "view",
    [(0, (2,), (1,)), (1, (1,), (1,)), (0, (HUGE,), (1,)), (0, (1,), (1, 1)), (-1, (1,), (1,)),
     (0, (2,), (-1,)), (0, (1 << 63, 0), (1, 1)), (0, (True,), (1,)), (0, 1, 1)],
    ids=str,
)  # fmt: skip
def test_tensors_outside_their_storage(view: tuple[Any, ...]) -> None:
    with nothing_happens():
        assert read(pickled(tensor(0, (1,), (1,), False, None))).shape == (1,)
    assert refused(tensor(*view, False, None, False))
    assert refused(tensor(*view, False, None))
    assert refused(tensor(*view, maker="_rebuild_tensor"))


def test_tensors_with_more() -> None:
    hooks = Call(("collections", "OrderedDict"), ())
    one = (0, (1,), (1,))
    assert read(pickled(tensor(*one, False, hooks))) is not None
    assert refused(tensor(*one, False, {"a": 1}))
    assert refused(tensor(*one, "yes", None))
    assert refused(tensor(*one, False, None, {"hacked": 1}))


@pytest.mark.parametrize(
    "name", ["data", "grad", "requires_grad", "backward", "__class__", "_backward_hooks"]
)
def test_attributes_of_tensors_that_mean_something(name: str) -> None:
    inner = (torch.float32, (2,), (1,), False)
    maker, cls = Name("torch._utils", "_rebuild_meta_tensor_no_storage"), Name("torch._tensor", "Tensor")
    content = Call(("torch._tensor", "_rebuild_from_type_v2"), (maker, cls, inner, {name: 1}))
    assert "tensor" in refused(content)
    content.args = (maker, Name(hostile.__name__, "Plain"), inner, {})
    assert refused(content)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(payload: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """Return an archive of torch.save with other contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_indices_of_sparse_tensors_outside() -> None:
    sparse = torch.sparse_coo_tensor([[1]], [1.0], (3,))
    outside = (5).to_bytes(8, "little")
    inside = (1).to_bytes(8, "little")
    payload = changed(saved(sparse), lambda _, content: outside if content == inside else content)
    with pytest.raises(RuntimeError, match="size is inconsistent"):
        read_saved(payload)


def test_storages_of_another_length() -> None:
    payload = changed(
        saved(torch.ones(4)), lambda name, content: content * 2 if name.endswith("/0") else content
    )
    with nothing_happens(), pytest.raises(RefusedPickleError, match="a storage"):
        read_saved(payload)


@pytest.mark.parametrize("key", ["../byteorder", "/etc/passwd", "7"])
def test_storages_that_are_not_in_the_archive(key: str) -> None:
    named = b"X\x01\0\0\0000"
    other = b"X" + len(key).to_bytes(4, "little") + key.encode()
    payload = changed(
        saved(torch.ones(4)),
        lambda name, content: content.replace(named, other) if name.endswith(".pkl") else content,
    )
    with nothing_happens(), pytest.raises(KeyError):
        read_saved(payload)


@pytest.mark.parametrize(
    "opcode", [pickle.INST, pickle.OBJ, pickle.EXT1, pickle.PERSID, pickle.NEXT_BUFFER, pickle.DUP]
)
def test_opcodes_that_data_does_not_need(opcode: bytes) -> None:
    with nothing_happens(), pytest.raises(KeyError):
        read(b"\x80\x02(" + opcode + b"os\nsystem\n\x01.")
