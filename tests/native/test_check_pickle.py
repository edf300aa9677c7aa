# SPDX-License-Identifier: Apache-2.0
"""Which pickles may be passed to an unpickler; the engine and the fallback agree on every one."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import random
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native

PLAIN = [
    None,
    {"a": [1, -2, 3 << 40, 2.5, True, None, "text", "ä" * 300, b"bytes", b"x" * 300]},
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    {1, 2},
    frozenset({"a"}),
    collections.OrderedDict(a=collections.defaultdict(list, {1: [2]})),
    [[]] * 3000,
    list(range(3000)),
    {str(n): (n, [n]) for n in range(2000)},
    bytearray(b"abc"),
    range(5),
    10**100,
    np.arange(5),
    np.float32(1.5),
    random.Random(1).getstate(),
]


def archived(value: object) -> bytes:
    """Return the pickle in the archive that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("dcp")
    dcp.save({"a": torch.ones(3), "b": [torch.zeros(2, 2), {"c": 1}], "d": "e"}, checkpoint_id=directory)
    return bytes((directory / ".metadata").read_bytes())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_passes_in_every_protocol(native_impl: str, protocol: int) -> None:
    for value in PLAIN:
        content = pickle.dumps(value, protocol)
        assert native.check_pickle(content, archive=True) == len(content)
        assert native.check_pickle(pickletools.optimize(content) + b"more", True) <= len(content)


@pytest.mark.parametrize(
    "value",
    [
        {"t": torch.ones(3), "v": torch.zeros(4)[1:], "p": torch.nn.Parameter(torch.ones(1)), "b": b"x" * 9},
        torch.nn.Linear(2, 3).state_dict(),
        {"f8": torch.zeros(2, dtype=torch.float8_e4m3fn), "s": torch.Size([1, 2]), "d": torch.device("cpu")},
    ],
    ids=["tensors", "state dict of a module", "new dtypes"],
)
def test_what_torch_saves_passes(native_impl: str, value: object) -> None:
    assert native.check_pickle(archived(value), archive=True)
    with pytest.raises(ValueError, match=r"metadata has no use for it|no new object"):
        native.check_pickle(archived(value))


def test_metadata_passes_with_anything_behind_it(native_impl: str, metadata: bytes) -> None:
    assert native.check_pickle(metadata) == len(metadata)
    assert native.check_pickle(memoryview(metadata + b"\0manifest.")) == len(metadata)


def nest(levels: int) -> bytes:
    """Return the opcodes of a tuple whose hash takes 2 ** levels steps."""
    content = b"K\x01\x94"
    for level in range(levels):
        content += bytes([ord("h"), level, 0x86, 0x94])
    return content


HOSTILE = {
    "memo bomb": (b"\x80\x04]r\xff\xff\xff\x3f.", "memo has no place 1073741823"),
    "shared tuples as a key": (b"\x80\x04}" + nest(40) + b"Ns.", "repeats itself beyond measure"),
    "shared tuples": (b"\x80\x04" + nest(200) + b".", "repeats itself beyond measure"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 100_000 + b".", "nested too deep"),
    "deep lists": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested too deep"),
    "list in itself": (b"\x80\x04]\x94h\x00a.", "changes what is part of something"),
    "change of a part": (b"\x80\x04]\x94\x85h\x00Na.", "does not hold items|too short|changes what"),
    "huge integer": (b"\x80\x04\x8b\xff\xff\xff\x7f.", "metadata has no use|ends behind"),
    "negative length": (b"\x80\x04\x8b\xff\xff\xff\xff.", "metadata has no use|ends behind"),
    "huge string": (b"\x80\x04X\xff\xff\xff\xff.", "ends behind the last byte"),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "metadata has no use|ends behind"),
    "huge frame": (b"\x80\x04\x95" + b"\xff" * 8 + b".", "frame ends behind"),
    "range as a list": (
        b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
        "a range would",
    ),
    "many bytes": (
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        "as many bytes as a number says",
    ),
    "many bytes, by object": (
        b"\x80\x02c__builtin__\nbytes\nc__builtin__\nint\nX\x02\x00\x00\x0099\x85R\x85R.",
        "as many bytes as a number says",
    ),
    "long name": (b"\x80\x02c" + b"m" * 5000 + b"\nname\n.", "name is too long"),
    "name without an end": (b"\x80\x02cmodule", "ends behind the last byte"),
    "call of a value": (b"\x80\x02N)R.", "no class or function"),
    "arguments that are no tuple": (b"\x80\x02cm\nn\n]R.", "no tuple"),
    "protocol 0": (b"(lp0\n.", "does not begin like this"),
    "persistent name as text": (b"\x80\x02Pname\n.", "no use for it"),
    "instance": (b"\x80\x02(imodule\nname\n.", "no use for it"),
    "extension": (b"\x80\x02\x82\x01.", "no use for it"),
    "two values": (b"\x80\x02NN.", "not one value"),
    "open mark": (b"\x80\x02(N.", "not one value"),
    "no end": (b"\x80\x02N", "has no end"),
    "nothing": (b"", "does not begin like this"),
    "empty stack": (b"\x80\x02\x85.", "stack is too short"),
    "no mark": (b"\x80\x02Nt.", "no mark"),
    "unknown place of the memo": (b"\x80\x02h\x07.", "memo has no 7"),
}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_asks_for_more_is_refused_at_once(native_impl: str, name: str, archive: bool) -> None:
    content, reason = HOSTILE[name]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"^opcode 0x\w\w at \d+: .*({reason})"):
        native.check_pickle(content, archive)
    assert time.monotonic() - begin < 5


def test_content_is_bytes(native_impl: str) -> None:
    with pytest.raises(TypeError):
        native.check_pickle("text")  # type: ignore[arg-type]


def verdict(implementation: str, content: bytes, archive: bool) -> object:
    with native.using(implementation):  # type: ignore[arg-type]
        try:
            return native.check_pickle(content, archive)
        except ValueError as error:
            return str(error)


SEEDS = [
    *(pickle.dumps(value, protocol) for value in PLAIN[1:7] for protocol in (2, 4)),
    archived({"t": torch.ones(3), "b": b"x" * 9}),
    *(content[:300] for content, _ in HOSTILE.values()),
]
# Any byte, with a bias toward meaningful ones.
OPCODES = st.one_of(st.integers(0, 255), st.sampled_from(sorted(ord(op.code) for op in pickletools.opcodes)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(
    seed=st.integers(0, len(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 5000), OPCODES), max_size=6),
    archive=st.booleans(),
)
def test_engine_and_twin_agree(
    metadata: bytes, seed: int, changes: list[tuple[int, int]], archive: bool
) -> None:
    content = bytearray(SEEDS[seed] if seed < len(SEEDS) else metadata)
    for position, byte in changes:
        if content:
            content[position % len(content)] = byte
    damaged = bytes(content)
    assert verdict("engine", damaged, archive) == verdict("fallback", damaged, archive)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(body=st.lists(OPCODES, max_size=60), archive=st.booleans())
def test_engine_and_twin_agree_on_noise(body: list[int], archive: bool) -> None:
    content = b"\x80\x04" + bytes(body)
    assert verdict("engine", content, archive) == verdict("fallback", content, archive)
