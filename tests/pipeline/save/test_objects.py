# SPDX-License-Identifier: Apache-2.0
"""Objects as bytes: those of torch.save, and only of what can be loaded again."""

from __future__ import annotations

import argparse
import collections
import gc
import io
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given

from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.format.archive import TYPED_STORAGES
from ckpt_fast.format.inert import classes
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.save.objects import object_bytes, require_loadable
from tests.everyday import REFUSED, VALUES, Custom, Phase, same

pytestmark = pytest.mark.usefixtures("native_impl")


SHAPES = ((), (0,), (0, 7), (3,), (1, 4), (2, 3, 2), (5000,))


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", VALUES)
def test_bytes_of_torch(name: str) -> None:
    payload = object_bytes(VALUES[name](), name)
    assert payload == torch_saved(VALUES[name]())
    assert same(decode_object(payload, name, verify=True), VALUES[name]())
    require_loadable(payload, name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    value = {"a": 1, "args": argparse.Namespace(x=[None, make()])}
    with pytest.raises(
        UnsafeCheckpointError, match=rf"^state\['args'\]\['x'\]\[1\].* cannot be saved.*{reason}"
    ):
        object_bytes(value, "state")


def test_bytes_that_are_refused() -> None:
    with pytest.raises(UnsafeCheckpointError, match=r"^o cannot be saved.*tests\.everyday\.Custom"):
        require_loadable(torch_saved(Custom(1)), "o")
    with pytest.raises(UnsafeCheckpointError, match=r"^o cannot be saved"):
        require_loadable(b"not by torch", "o")


def test_large_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = torch_saved((torch.ones(1000), Phase.TRAIN))

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("the bytes of a tensor were read")

    monkeypatch.setattr(torch, "frombuffer", fail)
    require_loadable(payload, "o")


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "kept by torch.save"  # type: ignore[attr-defined]
    return tensor


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._neg_view() if tensor.dtype.is_floating_point else tensor


HOW: dict[str, Callable[[torch.Tensor], Any]] = {
    "alone": lambda tensor: tensor,
    "in a list": lambda tensor: [tensor],
    "beside plain values": lambda tensor: {"a": [1, "b"], "t": (tensor, None), 2: tensor},
    "as a parameter": lambda tensor: torch.nn.Parameter(tensor, tensor.dtype.is_floating_point),
    "that requires a gradient": lambda tensor: [tensor.requires_grad_(tensor.dtype.is_floating_point)],
    "transposed": lambda tensor: [tensor.mT if tensor.dim() > 1 else tensor],
    "expanded": lambda tensor: [tensor.expand(2, *tensor.shape)],
    "a part": lambda tensor: [tensor[1:] if tensor.dim() else tensor],
    "the first part": lambda tensor: [tensor[:1] if tensor.dim() else tensor],
    "twice": lambda tensor: [tensor, tensor],
    "in two that share memory": lambda tensor: [tensor, tensor.detach()],
    "beside another": lambda tensor: [tensor, tensor.clone()],
    "conjugate": lambda tensor: [tensor.conj()],
    "negative": lambda tensor: [negative_view(tensor)],
    "with an attribute": lambda tensor: [with_attribute(tensor)],
}


@given(
    st.sampled_from([*TYPED_STORAGES, torch.float8_e5m2, torch.uint16, torch.complex32]),
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.sampled_from(sorted(HOW)), st.integers(0, 3)), min_size=2, max_size=4),
)
@hypothesis.settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...], steps: list[tuple[str, int]]) -> None:
    nbytes = math.prod(shape) * dtype.itemsize
    for how, seed in steps:
        content = torch.arange(nbytes).add(seed).remainder(2).to(torch.uint8)
        value = HOW[how](content.view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype))
        try:
            expected = torch_saved(value)
        except Exception:
            expected = b""
        try:
            payload = object_bytes(value, "o")
        except UnsafeCheckpointError:
            payload = b""
        assert payload == expected or not payload
        assert payload or not expected or dtype not in TYPED_STORAGES


def test_what_is_the_same_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[Any] = [[None], [torch.empty(0, dtype=torch.uint8)], {"amax": torch.ones(8), "name": "n"}]
    payloads = [object_bytes(value, "o") for value in values]
    values[2]["amax"][3] = 2
    assert object_bytes(values[2], "o") == torch_saved(values[2]) != payloads[2]
    values[2]["amax"][3] = 1

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(torch, "save", fail)
    assert [object_bytes(value, "o") for value in values] == payloads


def test_objects_that_are_never_the_same_take_little_memory() -> None:
    """Counters and dates are other ones at every save."""
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(2500):
            object_bytes([number, "x" * 3000], "o")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "f8,i4", ">i8"])
def test_arrays(dtype: str) -> None:
    array = np.zeros(2, dtype)
    if array.dtype.hasobject:
        with pytest.raises(UnsafeCheckpointError, match="an array of objects"):
            object_bytes([array], "o")
    else:
        assert same(
            decode_object(object_bytes(array, "o"), "o", True), np.zeros(2, np.dtype(dtype).newbyteorder("="))
        )


def test_text_that_looks_like_the_end_of_a_member() -> None:
    value = [Phase.TRAIN, "PK\7\10" * 2, torch.ones(2)]
    payload = object_bytes(value, "o")
    assert decode_object(payload, "o", verify=True)[1] == value[1]
    with pytest.raises(UnsafeCheckpointError, match=r"^o\[1\].*Custom"):
        object_bytes(["PK\7\10", Custom(1)], "o")


def test_what_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UnsafeCheckpointError, match="part of something"):
        object_bytes(value, "o")
    with pytest.raises(UnsafeCheckpointError, match="part of something"):
        object_bytes([value, "x" * 10_000], "o")


def test_warning_instead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_UNLOADABLE", "warn")
    assert object_bytes(Custom(1), "o") == torch_saved(Custom(1))
    assert "o (a tests.everyday.Custom) cannot be saved" in caplog.text
    with pytest.raises(UnsafeCheckpointError, match="lambda"):
        object_bytes(lambda: 1, "o")
    monkeypatch.setenv("CKPT_FAST_ON_UNLOADABLE", "maybe")
    with pytest.raises(ValueError, match="CKPT_FAST_ON_UNLOADABLE='maybe': use one of refuse, warn"):
        object_bytes(Custom(1), "o")


def test_nothing_is_refused_where_code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    payload = object_bytes(Custom(1), "o")
    assert decode_object(payload, "o", verify=True) == Custom(1)


def test_a_permission_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_allowed", set())
    with pytest.raises(UnsafeCheckpointError):
        object_bytes(Custom(1), "o")
    classes.allow_class(Custom)
    assert object_bytes(Custom(1), "o") == torch_saved(Custom(1))


class Interval(collections.namedtuple("Interval", "low high")):  # type: ignore[misc]
    """Is pickled by what its own ``__new__`` takes, which is not what its fields are."""

    def __new__(cls, center: float, width: float) -> Interval:
        return super().__new__(cls, center - width, center + width)

    def __getnewargs__(self) -> tuple[float, float]:
        return (self.low + self.high) / 2, (self.high - self.low) / 2


def ordered(**attributes: Any) -> Any:
    made = collections.OrderedDict(a=1)
    vars(made).update(attributes)
    return made


UNREADABLE = {
    "a named tuple that is made otherwise": Interval(5, 1),
    **{
        f"{value}, in a container": {"f": (value,)}
        for value in (complex, bytearray, collections.OrderedDict, np.ndarray, np.dtype, io.BytesIO)
    },
    "a class after an instance": [io.BytesIO(), io.BytesIO],
    "a class as a key": {collections.OrderedDict: 1},
    "a storage class": [torch.ones(1), torch.FloatStorage],
    "metadata of a dtype": [np.zeros(2, "f4"), np.zeros(2, np.dtype("f4", metadata={"a": 1}))],
    "an attribute with underscores": ordered(__v__=1),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_a_load_would_refuse_is_refused(kind: str) -> None:
    for _ in range(2):  # nor is it remembered as good
        with pytest.raises(UnsafeCheckpointError, match="cannot be saved"):
            object_bytes(UNREADABLE[kind], "o")
    with pytest.raises(UnsafeCheckpointError):
        decode_object(torch_saved(UNREADABLE[kind]), "o", verify=True)


def test_what_was_allowed_for_a_while_is_not_remembered() -> None:
    with torch.serialization.safe_globals([Custom]):
        object_bytes(Custom(1), "o")
    with pytest.raises(UnsafeCheckpointError, match="Custom"):
        object_bytes(Custom(1), "o")


def test_what_torch_wrote_before_archives_is_checked_as_well() -> None:
    def legacy(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()

    require_loadable(legacy({"a": 1, "t": torch.ones(2)}), "o")
    with pytest.raises(UnsafeCheckpointError, match="Custom"):
        require_loadable(legacy(Custom(1)), "o")
    for content in (b"", b"PK", b"PK\3\4", b"no pickle"):
        with pytest.raises(UnsafeCheckpointError, match=r"^o cannot be saved"):
            require_loadable(content, "o")
