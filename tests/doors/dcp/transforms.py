# SPDX-License-Identifier: Apache-2.0
"""A torch DCP stream transform (compression is one) to save with. torch 2.6 has none: ImportError."""

from __future__ import annotations

import io
from typing import IO

from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension


class Inverted(StreamTransformExtension):
    """A stream transform for tests: every byte becomes its complement."""

    table = bytes(255 - value for value in range(256))

    @staticmethod
    def registry_name() -> str:
        return "test.inverted"

    @staticmethod
    def from_descriptor(version: str) -> Inverted:
        assert version == "1"
        return Inverted()

    def get_descriptor(self) -> str:
        return "test.inverted/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _InvertedSink(output)

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(input.read().translate(self.table))


class _InvertedSink(io.BytesIO):
    def __init__(self, output: IO[bytes]) -> None:
        super().__init__()
        self._output = output

    def close(self) -> None:
        if not self.closed:
            self._output.write(self.getvalue().translate(Inverted.table))
        super().close()


def registry() -> ExtensionRegistry:
    """Return what a reader needs to undo the transform."""
    extensions = ExtensionRegistry()
    extensions.register(Inverted)
    return extensions
