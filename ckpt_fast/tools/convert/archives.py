# SPDX-License-Identifier: Apache-2.0
"""Conversion into files of torch DCP or Megatron-Core, part by part: each is durable before the next.

A part is a data file, ``__3_0.distcp``, and until the end a record of it, ``part_00003.metadata``: what is
in the file, its checksums, and of which conversion it is. Whoever continues trusts whole records only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from ckpt_fast.errors import CheckpointError, CheckpointMismatchError
from ckpt_fast.format.manifest import Manifest, append_manifest, file_record, new_save_id
from ckpt_fast.format.names import COMMON_FILE, METADATA_FILE, SEAL, SEAL_FILE
from ckpt_fast.format.types import Extent, ItemRecord, ObjectShard, RankRecord, Shard, TensorShard
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.load.decode import read_contents
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.pipeline.save.plan import file_prefix
from ckpt_fast.pipeline.save.seal import seal
from ckpt_fast.pipeline.save.sealed import contents_of
from ckpt_fast.pipeline.save.waves import Waves
from ckpt_fast.settings import Settings
from ckpt_fast.storage import commit
from ckpt_fast.storage.files import Directory
from ckpt_fast.tools.convert.source import Source
from ckpt_fast.tools.streaming import Progress, Window, WindowBuffer, batches, windows_of

# Bytes of the tensors in a part, all of which are in memory. A larger piece of a tensor is divided.
PART_NBYTES = 128 << 20
_NOTE = "conversion"


class ArchiveWriter:
    """Writes a source's tensors and objects into a directory.

    Args:
        source: what is converted.
        directory: of the new checkpoint.
        megatron: write a torch_dist checkpoint; otherwise one of torch DCP.
        token: names the conversion.
    """

    def __init__(self, source: Source, directory: str, megatron: bool, token: str) -> None:
        self._source = source
        self._directory = directory
        self._megatron = megatron
        self._token = token
        self._files = Directory(directory)

    def is_done(self) -> bool:
        """Whether this very conversion is in the directory, to its end.

        Raises:
            CheckpointMismatchError: there is another checkpoint.
        """
        names = set(os.listdir(self._directory)) if os.path.isdir(self._directory) else set()
        if METADATA_FILE not in names:
            if SEAL_FILE in names or COMMON_FILE in names:
                raise self._occupied()
            return False
        if self._note_of("") != self._token:
            raise self._occupied()
        return not self._megatron or SEAL_FILE in names

    def write(self, progress: Progress) -> bool:
        """Write what is not there yet, and make it a checkpoint; returns whether some of it was there.

        Raises:
            CheckpointError: the source cannot be read, or the directory not written. What is there stays for
                the next call.
        """
        parts = list(self._parts())
        total = sum(self._nbytes(part) for part in parts)
        buffer, records, done, resumed = WindowBuffer(self._source.index, PART_NBYTES), [], 0, False
        for number, part in enumerate([[], *parts]):  # the first part has the objects
            record = self._known(number)
            resumed |= record is not None
            if record is None:
                record = self._write_part(number, part, buffer)
            records.append(record)
            done += self._nbytes(part)
            progress(done, total)
        self._finish(records)
        return resumed

    def clean_up(self) -> None:
        """Remove the records of the parts: the checkpoint says the same."""
        self._files.delete(name for name in os.listdir(self._directory) if _is_record(name))

    def _parts(self) -> Iterator[list[Window]]:
        index = self._source.index
        windows = (window for saved in self._source.saved() for window in windows_of(saved, PART_NBYTES))
        return batches(windows, lambda name: index.tensor(name).dtype.itemsize, PART_NBYTES)

    def _nbytes(self, part: Sequence[Window]) -> int:
        return sum(window.numel * self._source.index.tensor(window.name).dtype.itemsize for window in part)

    def _write_part(self, number: int, part: Sequence[Window], buffer: WindowBuffer) -> RankRecord:
        index = self._source.index
        shards: list[Shard]
        if number == 0:
            shards = [ObjectShard(name, payload) for name, payload in self._objects().items()]
        else:
            shards = [
                TensorShard(window.name, tensor, window.start, index.tensor_shape(window.name))
                for window, tensor in zip(part, buffer.read(part), strict=True)
            ]
        report = SaveReport(self._directory)
        record = Waves(report, file_prefix(number), 1, settings=Settings.read()).run(shards)
        contents = contents_of([record], partial=True)
        manifest = Manifest(new_save_id(), record.files, [contents.digests], notes={_NOTE: self._token})
        self._files.write_in_order({_record_name(number): append_manifest(contents.pickled, manifest)})
        return record

    def _objects(self) -> dict[str, bytes]:
        """The objects that stand in data files."""
        source = self._source
        if self._megatron:
            # Those of torch DCP are in the common state.
            return source.payloads() if source.format == "torch_dist" else {}
        payloads = source.payloads()
        if source.format == "torch_dist":
            for key, value in source.common_state().items():
                payloads.setdefault(str(key), object_bytes(value, str(key)))
        return payloads

    def _known(self, number: int) -> RankRecord | None:
        """The record of a part that has been written; None if it has to be written."""
        prefix = _record_name(number).removesuffix(METADATA_FILE)
        with contextlib.suppress(CheckpointError):
            contents = read_contents(self._directory, prefix)
            manifest = contents.manifest
            if manifest is None or manifest.notes.get(_NOTE) != self._token:
                return None
            files = list(manifest.files.values())
            if not self._files.missing(files):
                digests = [manifest.payloads] if files else []
                return RankRecord(_items_of(contents.metadata), files, digests)
        return None

    def _finish(self, records: Sequence[RankRecord]) -> None:
        source = self._source
        known = source.paths()
        names = (item.fqn for record in records for item in record.items)
        paths = None if self._megatron else {name: known.get(name, (name,)) for name in names}
        files = [file for record in records for file in record.files]
        seals = {}
        if self._megatron:
            common = object_bytes(source.common_state(), "the common state")
            self._files.write_in_order({COMMON_FILE: common})
            seals[SEAL_FILE] = json.dumps(SEAL).encode()
            files += [file_record(COMMON_FILE, common), file_record(SEAL_FILE, seals[SEAL_FILE])]
        contents = contents_of(records, paths)
        manifest = Manifest(
            new_save_id(),
            files,
            [contents.digests],
            notes={_NOTE: self._token, "converted_from": source.name},
            encoded_table=contents.table,
        )
        seal(self._files, contents.pickled, manifest, seals)
        self.clean_up()

    def _note_of(self, prefix: str) -> str | None:
        with contextlib.suppress(CheckpointError):
            manifest = read_contents(self._directory, prefix).manifest
            return str(manifest.notes.get(_NOTE)) if manifest is not None else None
        return None

    def _occupied(self) -> CheckpointMismatchError:
        return CheckpointMismatchError(
            f"{self._directory} has a checkpoint already, which is left as it is: name another directory"
        )


def prepare_directory(directory: str) -> None:
    """Create the directory of the new checkpoint, durably, and remove what has been left half written.

    Raises:
        CheckpointWriteError: it cannot be.
    """
    commit.make_directory(os.path.abspath(directory))
    commit.remove_partial_files(directory)


def _record_name(number: int) -> str:
    return f"part_{number:05}{METADATA_FILE}"


def _is_record(name: str) -> bool:
    return name.startswith("part_") and name.endswith(METADATA_FILE)


def _items_of(metadata: Metadata) -> list[ItemRecord]:
    """The items of a part, in the order in which they were written."""
    items = []
    for index, info in (metadata.storage_data or {}).items():
        extent = Extent(info.relative_path, info.offset, info.length)
        entry = metadata.state_dict_metadata[index.fqn]
        if isinstance(entry, BytesStorageMetadata):
            items.append(ItemRecord(index.fqn, extent, None, (), (), ()))
            continue
        offsets = tuple(index.offset or ())
        (sizes,) = {tuple(chunk.sizes) for chunk in entry.chunks if tuple(chunk.offsets) == offsets}
        items.append(ItemRecord(index.fqn, extent, entry.properties.dtype, offsets, sizes, tuple(entry.size)))
    return sorted(items, key=lambda item: item.extent)
