# SPDX-License-Identifier: Apache-2.0
"""Conversion into safetensors files: whole tensors, each in one file, as Hugging Face divides models.

The layout of all files follows from names, dtypes and shapes. A file has its name once it is whole and
durable, so whoever continues keeps those that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ckpt_fast.errors import CheckpointMismatchError, CheckpointWriteError
from ckpt_fast.pipeline.load.entries.kinds import SavedTensor
from ckpt_fast.storage import commit
from ckpt_fast.tools.convert.source import Source
from ckpt_fast.tools.streaming import Progress, Window, WindowBuffer, batches, boxes

# A tensor that is larger has a file of its own.
FILE_NBYTES = 4 << 30
INDEX_FILE = "model.safetensors.index.json"
_WINDOW_NBYTES = 64 << 20
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class _File(NamedTuple):
    """One file: its name, its head, its tensors in their order, and its length."""

    name: str
    head: bytes
    tensors: list[SavedTensor]
    nbytes: int


class SafetensorsWriter:
    """Writes a source's tensors into a directory; objects have no place there.

    Args:
        source: what is converted.
        directory: of the new files.
        token: names the conversion; it stands in the files.

    Raises:
        CheckpointMismatchError: a tensor is of a dtype that safetensors does not know.
    """

    def __init__(self, source: Source, directory: str, token: str) -> None:
        self._source = source
        self._directory = directory
        self._files = _layout(list(source.saved()), token)

    def is_done(self) -> bool:
        """Whether this very conversion is in the directory, to its end.

        Raises:
            CheckpointMismatchError: there are other safetensors files.
        """
        names = set(os.listdir(self._directory)) if os.path.isdir(self._directory) else set()
        others = {name for name in names if name.endswith((".safetensors", INDEX_FILE))}
        others -= {INDEX_FILE, *(file.name for file in self._files)}
        if others or any(file.name in names and not self._is_whole(file) for file in self._files):
            raise CheckpointMismatchError(
                f"{self._directory} has other safetensors files already, which are left as they are: name "
                "another directory"
            )
        wanted = {file.name for file in self._files}
        return names >= (wanted | {INDEX_FILE} if len(wanted) > 1 else wanted)

    def write(self, progress: Progress) -> bool:
        """Write the files that are not there yet; returns whether some were there.

        Raises:
            CheckpointError: the source cannot be read.
            CheckpointWriteError: a file cannot be written. What is there stays for the next call.
        """
        buffer = WindowBuffer(self._source.index, _WINDOW_NBYTES)
        total, done, resumed = sum(file.nbytes for file in self._files), 0, False
        for file in self._files:
            if self._is_whole(file):
                resumed = True
            else:
                begin = done
                self._write_file(file, buffer, lambda n, begin=begin: progress(begin + n, total))  # type: ignore[misc]
            done += file.nbytes
            progress(done, total)
        if len(self._files) > 1:
            weights = {saved.fqn: file.name for file in self._files for saved in file.tensors}
            nbytes = sum(file.nbytes - len(file.head) for file in self._files)
            index = {"metadata": {"total_size": nbytes}, "weight_map": weights}
            content = json.dumps(index, indent=1).encode()
            commit.write_file_atomic(os.path.join(self._directory, INDEX_FILE), content)
        return resumed

    def _is_whole(self, file: _File) -> bool:
        with contextlib.suppress(OSError), open(self._path(file), "rb") as stream:
            return (
                os.fstat(stream.fileno()).st_size == file.nbytes and stream.read(len(file.head)) == file.head
            )
        return False

    def _path(self, file: _File) -> str:
        return os.path.join(self._directory, file.name)

    def _write_file(self, file: _File, buffer: WindowBuffer, progress: Progress) -> None:
        path = self._path(file)
        temporary = os.path.join(self._directory, f".{file.name}.partial")
        try:
            with open(temporary, "wb", buffering=0) as stream:
                _write_all(stream.fileno(), memoryview(file.head))
                done = len(file.head)
                for batch in batches(_windows(file.tensors), self._itemsize, _WINDOW_NBYTES):
                    for tensor in buffer.read(batch):
                        content = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
                        _write_all(stream.fileno(), content)
                        done += len(content)
                        progress(done, file.nbytes)
                commit.fsync(stream.fileno())
            os.replace(temporary, path)
            commit.fsync_directory(self._directory)
        except OSError as error:
            if isinstance(error, CheckpointWriteError):
                raise
            raise CheckpointWriteError(
                f"cannot write {path}: {error.strerror or error}. Files that are whole stay: the next call "
                "goes on with them.",
                error.errno,
                path,
            ) from error

    def _itemsize(self, name: str) -> int:
        return self._source.index.tensor(name).dtype.itemsize


def _windows(tensors: Sequence[SavedTensor]) -> list[Window]:
    """In the order of the file, across the pieces."""
    return [
        Window(saved.fqn, start, extent)
        for saved in tensors
        for start, extent in boxes(saved.shape, _WINDOW_NBYTES // saved.dtype.itemsize)
        if 0 not in extent
    ]


def _layout(tensors: Sequence[SavedTensor], token: str) -> list[_File]:
    groups: list[list[SavedTensor]] = [[]]
    used = 0
    for saved in tensors:
        if groups[-1] and used + _nbytes(saved) > FILE_NBYTES:
            groups.append([])
            used = 0
        groups[-1].append(saved)
        used += _nbytes(saved)
    files = []
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        head = _head(group, token)
        files.append(_File(name, head, group, len(head) + sum(map(_nbytes, group))))
    return files


def _head(tensors: Sequence[SavedTensor], token: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "ckpt_fast_conversion": token}}
    end = 0
    for saved in tensors:
        dtype = str(saved.dtype).removeprefix("torch.")
        if dtype not in _NAMES:
            raise CheckpointMismatchError(
                f"{saved.fqn} is of {dtype}, which safetensors files cannot hold; convert to dcp"
            )
        place = [end, end + _nbytes(saved)]
        header[saved.fqn] = {"dtype": _NAMES[dtype], "shape": list(saved.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(saved: SavedTensor) -> int:
    nbytes = saved.dtype.itemsize
    for size in saved.shape:
        nbytes *= size
    return nbytes


def _write_all(descriptor: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(descriptor, content) :]
