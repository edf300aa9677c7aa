# SPDX-License-Identifier: Apache-2.0
"""The restricted reader: data round-trips, everything else is refused without effect."""

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

from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.format.inert import classes
from ckpt_fast.format.inert.classes import allow_class
from ckpt_fast.format.inert.kinds import RefusedPickleError
from ckpt_fast.format.inert.saved import read_saved, require_readable
from tests.everyday import VALUES, same


class Token(enum.Enum):
    NEXT = "next"


class Level(enum.IntEnum):
    LOW = 1


class Talkative(enum.Enum):
    ONE = 1

    @classmethod
    def _missing_(cls, value):
        raise AssertionError("code of the enum was run")


class OwnState:
    def __init__(self, position):
        self.position = position

    def __eq__(self, other):
        return self.position == other.position

    __hash__ = None


def reload(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return read_saved(buffer.getvalue())


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
    with pytest.raises(pickle.UnpicklingError, match="Restricted unpickler refused to load '") as caught:
        read_saved(buffer.getvalue())
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
    with pytest.raises(RefusedPickleError, match=r"not_imported_yet.*has not been imported"):
        read_saved(buffer.getvalue())
    assert "not_imported_yet" not in sys.modules


def test_allowed_classes(monkeypatch):
    monkeypatch.setattr(classes, "_allowed", set())
    assert allow_class(OwnState) is OwnState
    assert reload(OwnState(4)) == OwnState(4)
    with pytest.raises(TypeError, match="takes a class, not"):
        allow_class(len)


def test_safe_globals_of_torch():
    with torch.serialization.safe_globals([OwnState]):
        assert reload(OwnState(4)) == OwnState(4)
    with torch.serialization.safe_globals([(OwnState, f"{__name__}.OwnState")]):
        assert reload(OwnState(4)) == OwnState(4)
    with pytest.raises(RefusedPickleError, match="OwnState"):
        reload(OwnState(4))


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

    @dataclasses.dataclass(slots=True)
    class SystemRngState:
        random: tuple

    for cls in (SavableDatasetState, FlexState, Launcher, SystemRngState):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    back = reload([SavableDatasetState(3), FlexState(a=1)])
    assert back == [SavableDatasetState(3), {"a": 1}]
    assert type(back[1]) is FlexState
    assert reload(SystemRngState((3, (1, 2)))) == SystemRngState((3, (1, 2)))
    with pytest.raises(RefusedPickleError, match="Launcher"):
        reload(Launcher())


def test_states_of_the_real_energon():
    energon = pytest.importorskip("megatron.energon.savable_loader", exc_type=ImportError)
    from megatron.energon.flavors.webdataset.sample_loader import SliceState
    from megatron.energon.rng import SystemRng
    from megatron.energon.state import FlexState

    position = FlexState(index=1, parts=[FlexState(c=2)], slices=[SliceState(index=3, current=4), None])
    dataset = energon.SavableDatasetState(rng=SystemRng.save_state(), dataset_state=position, sample_index=5)
    worker = energon.SavableDatasetCheckpoint(state=dataset, offset=2)
    state = energon.SavableDataLoaderState(worker_states=[worker], next_worker_id=1, micro_batch_size=4)
    checkpoint = energon.SavableCheckpoint(state=dataset, checkpoint_time=1.5, sample_index=7)
    for value in (state, checkpoint):
        back = reload(value)
        assert type(back) is type(value)
        assert repr(back) == repr(value)  # not all of these classes can be compared
    back = reload(state).worker_states[0].state.dataset_state
    assert (type(back), type(back["slices"][0])) == (FlexState, SliceState)


def test_torchscript_archives_are_refused():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), buffer)
    with pytest.raises(ValueError, match="compressed"):
        read_saved(buffer.getvalue())


@pytest.mark.parametrize("content", [b"", b"rubbish", pickle.dumps({"dataloader_state_dict": 1})])
def test_other_files_are_refused(content):
    with pytest.raises(RefusedPickleError, match="a pickle"):
        read_saved(content)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "options",
    [{"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}],
    ids=str,
)
def test_everyday_values(name, options):
    assert same(reload(VALUES[name](), **options), VALUES[name]())


TENSORS = {
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "strides": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "with attributes": lambda: with_attributes(torch.ones(2)),
    "parameter with attributes": lambda: with_attributes(torch.nn.Parameter(torch.ones(2))),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.quint8
    ),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "complex32": lambda: torch.ones(2, dtype=torch.complex32),
    "conjugate": lambda: torch.full((2,), 1 + 2j).conj(),
    "empty": lambda: torch.ones(0, 3),
    "meta": lambda: torch.ones(2, device="meta"),
}


def with_attributes(tensor):
    tensor.tensor_model_parallel = True
    return tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, legacy):
    tensor = TENSORS[name]()
    back = reload(tensor, _use_new_zipfile_serialization=not legacy)
    assert type(back) is type(tensor) and repr(back) == repr(tensor)
    assert (back.dtype, back.layout) == (tensor.dtype, tensor.layout)
    assert vars(back) == vars(tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*VALUES, *TENSORS])
def test_what_is_read_may_be_saved(name):
    buffer = io.BytesIO()
    torch.save({**VALUES, **TENSORS}[name](), buffer)
    require_readable(buffer.getvalue())


def test_a_dataclass_of_a_module_that_defines_it_later():
    """The decision is made anew for each pickle."""
    module = types.ModuleType("defined_later")
    module.Late = dataclasses.make_dataclass("Late", ["x"])
    module.Late.__module__ = "defined_later"
    sys.modules["defined_later"] = module
    try:
        buffer = io.BytesIO()
        torch.save(module.Late(3), buffer)
        late = module.Late
        del module.Late
        with pytest.raises(RefusedPickleError, match="defined_later"):
            read_saved(buffer.getvalue())
        module.Late = late
        assert read_saved(buffer.getvalue()) == late(3)
    finally:
        del sys.modules["defined_later"]
