# SPDX-License-Identifier: Apache-2.0
"""Load: read what is wanted to where it belongs, in one reading of the files; check it, place the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.archive import ALIGNMENT
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.jobs import trace
from ckpt_fast.pipeline.load.checks import Checks
from ckpt_fast.pipeline.load.decode import decode_object, undo_transforms
from ckpt_fast.pipeline.load.index import CheckpointIndex, RawData
from ckpt_fast.pipeline.load.parts import Part, landing_nbytes, parts_of, require_memory
from ckpt_fast.pipeline.load.place import Box, Destination, Reshaped, runs
from ckpt_fast.pipeline.load.read import MIN_DIRECT_NBYTES, ByteArena, ReadProgram
from ckpt_fast.pipeline.load.report import LoadReport, count
from ckpt_fast.pipeline.load.rows import WantedRows
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, host_buffers
from ckpt_fast.ranks.group import ranks_on_this_node

# Host memory for what cannot be read in place; more would only delay the copies.
_LANDING_NBYTES = 512 << 20


def load_tensors(
    index: CheckpointIndex, requests: Sequence[TensorRequest], verify: bool | None = None
) -> LoadReport:
    """``load_tensors_and_objects`` for those who want no objects."""
    return prepare(index, requests, ()).read(verify)[0]


def load_objects(index: CheckpointIndex, fqns: Iterable[str], verify: bool | None = None) -> dict[str, Any]:
    """``load_tensors_and_objects`` for those who want no tensors."""
    return load_tensors_and_objects(index, (), fqns, verify)


def load_tensors_and_objects(
    index: CheckpointIndex,
    requests: Sequence[TensorRequest],
    fqns: Iterable[str],
    verify: bool | None = None,
) -> dict[str, Any]:
    """Fill every request's destination, and return saved objects by name. Local, no collectives.

    Args:
        index: the checkpoint.
        requests: regions wanted; a destination of another dtype is converted, on another device copied to.
        fqns: names of objects.
        verify: compare checksums: of what is read with the manifest's, without one of every item that is
            touched, which is read whole for it; None follows ``CKPT_FAST_VERIFY``.

    Raises:
        CheckpointMismatchError: a name is missing or a region lies outside the saved tensor.
        CheckpointCorruptError: a checksum differs, a file is short or was replaced meanwhile, or pieces of a
            region are missing. Destinations then hold undefined values.
        UnsafeCheckpointError: see ``decode_object``; destinations as above.
    """
    return prepare(index, requests, fqns).read_objects(verify)


@dataclass(frozen=True)
class PreparedLoad:
    """A load that fits its checkpoint; no destination has been touched. From ``prepare``."""

    index: CheckpointIndex
    rows: WantedRows
    parts: Sequence[Part]
    fqns: Sequence[str]

    def read(self, verify: bool | None = None) -> tuple[LoadReport, dict[str, bytes]]:
        """Fill the destinations, and return the bytes of the objects by name; see ``load_parts``."""
        return load_parts(self.index, self.parts, self.fqns, verify, self.rows)

    def read_objects(self, verify: bool | None = None) -> dict[str, Any]:
        """Fill the destinations, and return the objects by name; see ``load_tensors_and_objects``."""
        verify = settings.verify_on_load() if verify is None else verify
        index = self.index
        return {
            fqn: decode_object(payload, f"{fqn} in {index.directory}/{index.object_extent(fqn).path}", verify)
            for fqn, payload in self.read(verify)[1].items()
        }


@trace.traced("plan")
@without_collections
def prepare(
    index: CheckpointIndex,
    requests: Sequence[TensorRequest],
    fqns: Iterable[str] = (),
    rows: WantedRows | None = None,
) -> PreparedLoad:
    """The first half of ``load_tensors_and_objects``: find everything that is wanted. Reads no data file.

    Args:
        index, requests, fqns: see there.
        rows: that are wanted besides.

    Raises:
        CheckpointMismatchError: a name is missing, a region lies outside the saved tensor, or a destination
            has no memory.
        CheckpointCorruptError: pieces of a region are missing.
    """
    fqns = list(fqns)
    for fqn in fqns:
        index.object_extent(fqn)
    rows = WantedRows(index) if rows is None else rows
    others = rows.take(requests)
    for request in others:
        require_memory(request.fqn, request.destination)
    return PreparedLoad(index, rows, [part for request in others for part in parts_of(index, request)], fqns)


@without_collections
def load_parts(
    index: CheckpointIndex,
    parts: Sequence[Part],
    fqns: Iterable[str] = (),
    verify: bool | None = None,
    rows: WantedRows | None = None,
) -> tuple[LoadReport, dict[str, bytes]]:
    """``load_tensors_and_objects`` for callers that know the pieces already; objects are not decoded.

    One reading opens each data file once. What cannot be read in place is read in several from 512 MiB on
    (or the bound of host buffers), and into other writers' items is looked first. No values of two saves are
    returned for that: every block read is compared with the manifest; of a checkpoint without one, or if
    nothing is to be compared, the files must be the same before and after.
    """
    begin = time.perf_counter()
    settings.Settings.warn_of_unknown()
    verify = settings.verify_on_load() if verify is None else verify
    report = LoadReport(index.directory)
    rows = WantedRows(index) if rows is None else rows
    objects = {fqn: index.object_extent(fqn) for fqn in fqns}
    is_compared = verify and index.manifest is not None
    if not is_compared:
        items = (*objects.values(), *(part.piece.item for part in parts))
        index.versions.note({*(item.path for item in items), *rows.paths()})
    located = index.locate((part.tensor.dtype, part.piece) for part in parts)
    payloads = _Reader(index, report, verify).read(rows, parts, objects, located)
    if not is_compared:
        index.versions.require_unchanged()
    report.seconds = time.perf_counter() - begin
    count(report)
    return report, payloads


class _Wanted(NamedTuple):
    """A part, and how it comes.

    Attributes:
        raw: where the piece's elements lie in its item; None if only ``torch.load`` can tell.
        landing_nbytes: host memory that the part needs besides its destination.
    """

    part: Part
    raw: RawData | None
    landing_nbytes: int


def _wanted(part: Part, raw: RawData | None) -> _Wanted:
    nbytes = landing_nbytes(part) if raw is not None else part.piece.item.nbytes
    return _Wanted(part, raw, -(-nbytes // ALIGNMENT) * ALIGNMENT)


def _cut_waves(wanted: Iterable[_Wanted], limit: int) -> list[list[_Wanted]]:
    """At least one wave; each needs at most ``limit`` bytes of host memory, or is one part."""
    waves: list[list[_Wanted]] = [[]]
    room = limit
    for each in wanted:
        if each.landing_nbytes > room and waves[-1]:
            waves.append([])
            room = limit
        waves[-1].append(each)
        room -= each.landing_nbytes
    return waves


class _Reader:
    """Parts and objects on their way out of the files.

    What cannot be read in place (other dtypes, devices, strides) goes through a small host buffer, in waves.
    """

    def __init__(self, index: CheckpointIndex, report: LoadReport, verify: bool) -> None:
        self._index, self._report, self._verify = index, report, verify

    def read(
        self,
        rows: WantedRows,
        parts: Sequence[Part],
        objects: Mapping[str, Extent],
        located: Mapping[Extent, RawData | None],
    ) -> dict[str, bytes]:
        wanted = [_wanted(part, located[part.piece.item]) for part in parts]
        may_be_direct = self._may_be_direct(wanted, rows.nbytes())
        bound = settings.host_buffer_bytes()
        limit = _LANDING_NBYTES if bound is None else min(bound, _LANDING_NBYTES)
        waves = _cut_waves(wanted, limit)
        nbytes = max(sum(each.landing_nbytes for each in wave if each.raw is not None) for wave in waves)
        buffer = host_buffers.take(nbytes, bound) if nbytes else None
        payloads: dict[str, bytes] = {}
        try:
            for number, wave in enumerate(waves):
                reading = _Wave(self._index, self._report, self._verify, buffer)
                more = (None, {}) if number else (rows, objects)
                payloads |= reading.read(wave, more[0], more[1], may_be_direct)
        finally:
            if buffer is not None:
                host_buffers.give_back(buffer, keep=False)
        return payloads

    def _may_be_direct(self, wanted: Sequence[_Wanted], more_nbytes: int) -> bool:
        """Whether to read from the device past the page cache, if the bytes are not in it: that is faster.

        They are not in it afterwards either. So ranks of one machine do so only if together they read no more
        than there is: if the same bytes are for several of them, the first brings them for all.
        """
        nbytes = sum(self._read_nbytes(each.part, each.raw) for each in wanted if each.raw is not None)
        nbytes += more_nbytes
        return (
            settings.direct_io()
            and nbytes >= MIN_DIRECT_NBYTES
            and nbytes * ranks_on_this_node() <= self._index.nbytes
        )

    def _read_nbytes(self, part: Part, raw: RawData) -> int:
        """Bytes to be read for a part, with what its checksums take besides; at most, not to the byte."""
        wanted = math.prod(part.box.shape) * part.box.itemsize
        if not self._verify or part.box.is_whole:
            return wanted
        block = max(raw.block_nbytes, 1)
        begin, end = part.box.span()
        return min(raw.extent.nbytes, -(-end // block) * block) - begin // block * block


class _Wave:
    """One reading of the files."""

    def __init__(
        self, index: CheckpointIndex, report: LoadReport, verify: bool, buffer: HostBuffer | None
    ) -> None:
        self._index, self._report, self._verify = index, report, verify
        self._buffer, self._landed = buffer, 0
        self._program = ReadProgram(index.files)
        self._arena = ByteArena(self._program)
        self._checks = Checks(index, self._program, self._arena)
        self._copies: list[tuple[Destination, torch.Tensor]] = []
        self._whole: dict[Extent, tuple[int, list[Part]]] = {}  # items for torch.load, with their handles

    def read(
        self,
        wanted: Sequence[_Wanted],
        rows: WantedRows | None,
        objects: Mapping[str, Extent],
        may_be_direct: bool,
    ) -> dict[str, bytes]:
        """Fill the destinations of parts and rows; returns the objects' bytes by name."""
        if rows is not None:
            rows.schedule(self._program, self._verify)
        handles = {fqn: self._schedule_object(fqn, item) for fqn, item in objects.items()}
        for part, raw, nbytes in wanted:
            if raw is None:
                self._schedule_whole(part)
            else:
                self._schedule(part, raw, nbytes)
        crcs = self._program.run(may_be_direct and self._program.is_cold())
        self._report.nbytes += self._program.nbytes
        count = len(wanted) + (len(rows) if rows is not None else 0)
        self._report.verified += self._verify * count
        self._report.unverified += (not self._verify) * count
        if rows is not None and self._verify:
            rows.compare(crcs)
        self._checks.compare(crcs)
        with torch.no_grad(), trace.span("place", tensors=len(self._copies) + len(self._whole)):
            for destination, source in self._copies:
                destination.copy_(source, non_blocking=True)
            for handle, parts in self._whole.values():
                self._place(self._arena.content(handle), parts)
        # The buffer is somebody else's next.
        for device in {destination.device for destination, _ in self._copies if destination.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return {
            fqn: undo_transforms(
                self._arena.content(handle), self._index.object_transforms(fqn), self._index.extensions
            )
            for fqn, handle in handles.items()
        }

    def _schedule_object(self, fqn: str, item: Extent) -> int:
        if self._verify and self._index.manifest is not None:
            self._checks.add(fqn, item, self._index.checked(item))
        return self._arena.add(item)

    def _schedule_whole(self, part: Part) -> None:
        item = part.piece.item
        if item in self._whole:
            self._whole[item][1].append(part)
            return
        raw = self._index.payload_of(item)
        if self._verify and raw is not None:
            self._checks.add(part.tensor.fqn, item, raw)
        self._whole[item] = (self._arena.add(item), [part])

    def _schedule(self, part: Part, raw: RawData, land_nbytes: int) -> None:
        box, destination = part.box, part.destination
        if self._verify:
            self._checks.add(part.tensor.fqn, part.piece.item, raw)
        if not box.has_long_runs:
            offset, rows = box.rows()
            nbytes = math.prod(rows.sizes) * box.itemsize
            raw = raw._replace(extent=Extent(raw.extent.path, raw.extent.offset + offset, nbytes))
            landing = self._land(rows.sizes, part.tensor.dtype, land_nbytes)
            region = landing
            for dimension, (start, size) in enumerate(zip(rows.start, rows.shape, strict=True)):
                region = region.narrow(dimension, start, size)
            self._copies.append((destination, region))
            box, destination = Box(rows.sizes, (0,) * len(rows.sizes), rows.sizes, box.itemsize), landing
        elif land_nbytes:
            landing = self._land(box.shape, part.tensor.dtype, land_nbytes)
            self._copies.append((destination, landing))
            destination = landing
        if box.is_whole and isinstance(destination, torch.Tensor) and destination.is_contiguous():
            # As many bytes as have memory, whatever a file says of itself.
            nbytes = math.prod(box.shape) * box.itemsize
            self._program.add(raw.extent._replace(nbytes=nbytes), destination.data_ptr())
        else:
            self._program.add_runs(raw.extent.path, runs(box, raw.extent, destination))

    def _land(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        """Memory of the host buffer for a tensor; ``nbytes`` of it are taken."""
        if self._buffer is None:
            return torch.empty(tuple(shape), dtype=dtype)
        used = math.prod(shape) * dtype.itemsize
        memory = self._buffer.memory[self._landed : self._landed + used]
        self._landed += nbytes
        return memory.view(dtype).view(tuple(shape))

    def _place(self, content: bytes, parts: Sequence[Part]) -> None:
        """Parts of an item that is not one stored tensor: of whatever ``torch.load`` makes of it."""
        saved, piece = parts[0].tensor, parts[0].piece
        where = f"{saved.fqn} in {self._index.directory}/{piece.item.path}"
        payload = undo_transforms(content, piece.transforms, self._index.extensions)
        tensor = decode_object(payload, where, self._verify)
        if (
            not isinstance(tensor, torch.Tensor)
            or tuple(tensor.shape) != piece.sizes
            or tensor.dtype != saved.dtype
        ):
            raise CheckpointCorruptError(
                f"{where} is not the {saved.dtype} tensor of shape {piece.sizes} that .metadata says; load "
                "an earlier iteration"
            )
        for part in parts:
            region = tensor
            try:
                for dimension, (start, size) in enumerate(zip(part.box.start, part.box.shape, strict=True)):
                    if size != region.shape[dimension]:  # not every kind of tensor can be narrowed
                        region = region.narrow(dimension, start, size)
                _fill(part.destination, region)
            except (RuntimeError, ValueError) as error:
                raise CheckpointMismatchError(
                    f"{where} is a {_kind(tensor)}, whose region of shape {part.box.shape} at "
                    f"{part.box.start} cannot be copied into a {_kind(part.destination)}: {error}"
                ) from error


def _fill(destination: Destination, source: torch.Tensor) -> None:
    if isinstance(destination, torch.Tensor) and destination.layout == source.layout != torch.strided:
        destination.resize_as_sparse_(source)
    destination.copy_(source)


def _kind(tensor: Destination) -> str:
    if isinstance(tensor, Reshaped):
        tensor = tensor.tensor
    layout = f" of layout {tensor.layout}" if tensor.layout != torch.strided else ""
    return f"{type(tensor).__name__} of shape {tuple(tensor.shape)}{layout}"
