# SPDX-License-Identifier: Apache-2.0
"""CRC-32 compared with zlib's."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, noise

# native_impl is the same for all examples of a test, so its scope does no harm.
both = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
crcs = st.integers(0, 2**32 - 1)


@both
@given(content=st.binary(max_size=2000), misalign=st.integers(0, 63), seed=crcs)
def test_crc32_is_zlibs(native_impl: str, content: bytes, misalign: int, seed: int) -> None:
    memory = Memory(content, misalign)
    assert native.crc32(memory.address, len(content)) == zlib.crc32(content)
    assert native.crc32(memory.address, len(content), seed) == zlib.crc32(content, seed)


@pytest.mark.parametrize("nbytes", [*range(0, 1100, 13), 255, 256, 257, 4095, 65_537, (1 << 20) + 77])
def test_crc32_of_all_block_remainders(native_impl: str, nbytes: int) -> None:
    content = noise(nbytes)
    assert native.crc32(Memory(content).address, nbytes, 0x12345678) == zlib.crc32(content, 0x12345678)


@both
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_combine_is_crc_of_concatenation(native_impl: str, first: bytes, second: bytes) -> None:
    combined = native.crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


@both
@given(first=crcs, second=crcs, third=crcs, a=st.integers(0, 2**48), b=st.integers(0, 2**48))
def test_combine_is_associative_at_any_length(
    native_impl: str, first: int, second: int, third: int, a: int, b: int
) -> None:
    left = native.crc32_combine(native.crc32_combine(first, second, a), third, b)
    right = native.crc32_combine(first, native.crc32_combine(second, third, b), a + b)
    assert left == right


@both
@given(content=st.binary(max_size=2000), misalign=st.integers(0, 63), seed=crcs)
def test_copy_crc32_copies_and_counts(native_impl: str, content: bytes, misalign: int, seed: int) -> None:
    source, destination = Memory(content), Memory(bytes(len(content)), misalign)
    copied = native.copy_crc32(destination.address, source.address, len(content), seed)
    assert copied == zlib.crc32(content, seed)
    assert destination.content() == content
