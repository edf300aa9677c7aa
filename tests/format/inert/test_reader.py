# SPDX-License-Identifier: Apache-2.0
"""Files of data loaders: plain data round-trips, everything else is refused without effect."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import io
import os
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from ckpt_fast.trainer.contents.inert_load import (
    RefusedPickleError,
    inert_load,
    register_dataloader_state_class,
)

from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.trainer.contents import inert_load as inert_load_module


class Token(enum.Enum):
    NEXT = "next"


class Level(enum.IntEnum):
    LOW = 1


class Talkative(enum.Enum):
    ONE = 1

    @classmethod
    def _missing_(cls, value):
        raise AssertionError("code of the enum was run")


@dataclasses.dataclass
class OwnState:
    position: int


def reload(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    buffer.seek(0)
    return inert_load(buffer)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, True, None, "x", b"\x00\xff", (1, 2), 1j], "b": {"c": {3}}},
        collections.OrderedDict(a=1),
        collections.deque([1, 2], maxlen=2),
        collections.Counter("aab"),
        {frozenset([1]): bytearray(b"ab")},
        [range(3), slice(1, 2), torch.Size([2]), torch.bfloat16, torch.device("cpu")],
        random.getstate(),
        [Token.NEXT, Level.LOW],
        [np.float32(2.5), np.int64(3)],
    ],
)
def test_data_comes_back(value, protocol):
    assert reload(value, pickle_protocol=protocol) == value


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays(protocol):
    state = np.random.RandomState(3).get_state()
    back = reload({"state": state, "grid": np.arange(6, dtype=">i4").reshape(2, 3)}, pickle_protocol=protocol)
    assert back["state"][0] == state[0]
    np.testing.assert_array_equal(back["state"][1], state[1])
    np.testing.assert_array_equal(back["grid"], np.arange(6).reshape(2, 3))


def test_tensors_share_storage_as_they_did():
    base = torch.arange(6.0)
    back = reload({"base": base, "view": base[2:4], "half": torch.ones(2, dtype=torch.bfloat16)})
    assert torch.equal(back["base"], base)
    assert torch.equal(back["half"], torch.ones(2, dtype=torch.bfloat16))
    back["base"][2] = 9.0
    assert back["view"][0] == 9.0


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.system, "touch PWNED"),
        Evil(eval, "open('PWNED', 'w')"),
        Evil(getattr, Token, "mro"),
        Evil(functools.partial, os.system, "touch PWNED"),
        Evil(open, "PWNED", "w"),
        Evil(torch.load, "PWNED"),
        Evil(torch.hub.load, "x", "y"),
        Evil(Talkative, 2),
        OwnState(1),
    ],
    ids=["system", "eval", "getattr", "partial", "open", "torch.load", "torch.hub", "enum", "class"],
)
def test_anything_else_is_refused(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"dataloader_state_dict": evil}, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Restricted unpickler refused to load '") as caught:
        inert_load(buffer)
    assert isinstance(caught.value, UnsafeCheckpointError)
    assert os.listdir(tmp_path) == []


def test_codecs_other_than_the_one_for_bytes(tmp_path):
    import _codecs

    with pytest.raises(RefusedPickleError, match="codec"):
        reload(Evil(_codecs.encode, "x", "rot13"))


def test_modules_are_not_imported():
    module = types.ModuleType("not_imported_yet")
    module.Sneaky = enum.Enum("Sneaky", "A", module="not_imported_yet")
    sys.modules["not_imported_yet"] = module
    buffer = io.BytesIO()
    torch.save(module.Sneaky.A, buffer)
    del sys.modules["not_imported_yet"]
    buffer.seek(0)
    with pytest.raises(RefusedPickleError, match="not_imported_yet"):
        inert_load(buffer)
    assert "not_imported_yet" not in sys.modules


def test_registered_classes(monkeypatch):
    monkeypatch.setattr(inert_load_module, "_registered", set())
    register_dataloader_state_class(OwnState)
    assert reload(OwnState(4)) == OwnState(4)


def test_energon_states(monkeypatch):
    """Energon's own classes would need its loaders; these have the same names and kinds."""
    module = types.ModuleType("megatron.energon.savable_loader")

    @dataclasses.dataclass
    class SavableDatasetState:
        sample_index: int

    class FlexState(dict):
        pass

    class Launcher:
        pass

    for cls in (SavableDatasetState, FlexState, Launcher):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    back = reload([SavableDatasetState(3), FlexState(a=1)])
    assert back == [SavableDatasetState(3), {"a": 1}]
    assert type(back[1]) is FlexState
    with pytest.raises(RefusedPickleError, match="Launcher"):
        reload(Launcher())


def test_torchscript_archives_are_refused():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), buffer)
    buffer.seek(0)
    with pytest.raises(RefusedPickleError, match="TorchScript"):
        inert_load(buffer)


@pytest.mark.parametrize("content", [b"", b"rubbish", pickle.dumps({"dataloader_state_dict": 1})])
def test_other_files_are_refused(content):
    with pytest.raises(RefusedPickleError, match=r"torch\.save"):
        inert_load(io.BytesIO(content))
