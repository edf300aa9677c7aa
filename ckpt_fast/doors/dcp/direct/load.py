# SPDX-License-Identifier: Apache-2.0
"""State dicts loaded from torch DCP's files without ``dcp.load``: checked by all ranks, then read by each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner_helpers import _init_state_dict

from ckpt_fast.doors.dcp.agreement import report_unasked, require_same_save
from ckpt_fast.doors.dcp.direct.local_state import Flattened, is_stateful, shards_of_tensor
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex, missing_keys_message
from ckpt_fast.pipeline.load.load import PreparedLoad, prepare
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.report import one_load
from ckpt_fast.pipeline.load.rows import WantedRows
from ckpt_fast.pipeline.memory.forms import PLAIN_TENSORS
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.files import Directory

_MOST_SHOWN = 5


class Seen(NamedTuple):
    """What the coordinator has to know of a rank: its save, and the names it asks for; None means all."""

    identity: str
    asked: list[str] | None


def load_state_dict(
    state_dict: dict[str, Any], directory: str, group: ControlGroup, *, allow_partial_load: bool = False
) -> None:
    """Collective. See ``ckpt_fast.load``."""
    with one_load(directory, group.global_rank):
        _load(state_dict, directory, group, allow_partial_load)


def _load(state_dict: dict[str, Any], directory: str, group: ControlGroup, allow_partial_load: bool) -> None:
    opened = OpenCheckpoint(Directory(directory))
    opened.share(group)
    is_url = "://" in directory
    loading = DirectLoad(
        opened.directory,
        lambda: CheckpointIndex(directory) if is_url else opened.index,
        allow_partial_load=allow_partial_load,
    )

    stateful: list[str] = []

    def prepare() -> Seen:
        values = dict(state_dict)
        if not set(map(type, values.values())) <= PLAIN_TENSORS:
            # In the same order on all ranks: an object's state_dict may be collective.
            stateful.extend(sorted((key for key in values if is_stateful(values[key])), key=str))
            for key in stateful:
                values[key] = values[key].state_dict()
        loading.prepare(values)
        return loading.seen

    seen = group.collect(prepare)
    group.decide(lambda: loading.agree([each.value for each in seen if each.value is not None]), seen)
    group.agree(loading.read)
    loaded = loading.place()
    states = [(state_dict[key], loaded.pop(key)) for key in stateful]
    state_dict.update(loaded)
    for value, state in states:
        value.load_state_dict(state)


class DirectLoad:
    """One rank's part of one load: ``prepare``, ``read`` and ``place``, in this order.

    Args:
        directory: the checkpoint.
        index: gives its table of contents; called by ``prepare``.
        allow_partial_load: see ``ckpt_fast.load``.

    Attributes:
        seen: what the coordinator has to know; since ``prepare``.
    """

    def __init__(
        self, directory: str, index: Callable[[], CheckpointIndex], *, allow_partial_load: bool
    ) -> None:
        self._directory = directory
        self._open = index
        self._is_partial = allow_partial_load
        self._values: dict[str, Any] = {}
        self._prepared: PreparedLoad | None = None
        self._objects: list[tuple[str, Any, Any]] = []  # name, container, key
        self._materialized: list[tuple[torch.Tensor, Any, Any]] = []  # tensor, container, key
        self._loaded: dict[str, Any] = {}

    @without_collections
    def prepare(self, values: dict[str, Any]) -> None:
        """Local. Look what of the state dict is in the checkpoint, and where it goes.

        Raises:
            CheckpointError: see ``ckpt_fast.load``.
        """
        self._index = self._open()
        self._values = values
        flat = Flattened(values)
        flat.require_unique()
        index = self._index
        rows = WantedRows(index)
        requests: list[TensorRequest] = []
        missing, misfits = [], []
        with torch.no_grad():
            for number in rows.take_whole(flat.names, flat.values):
                name, value, parent = flat.names[number], flat.values[number], flat.parents[number]
                key = flat.keys[number]
                try:
                    shape = index.shape(name)
                except KeyError:
                    missing.append(name)
                    continue
                if not isinstance(value, torch.Tensor) and shape is None:
                    self._objects.append((name, parent.container, key))
                elif not isinstance(value, torch.Tensor) or value.size() != shape:
                    misfits.append(_misfit(name, value, shape))
                elif type(value) in PLAIN_TENSORS and not value.is_meta:
                    requests.append(TensorRequest(name, value, (0,) * len(shape)))
                else:
                    target = value
                    if not isinstance(value, ShardedTensor) and value.is_meta:
                        target = _materialized(value)
                        self._materialized.append((target, parent.container, key))
                    for region, local in shards_of_tensor(name, target):
                        if local.is_meta:
                            misfits.append(f"{name} is on the meta device there and has no memory")
                        requests.append(TensorRequest(name, local, region.offsets))
        if misfits:
            more = f" (and {len(misfits) - _MOST_SHOWN} more)" if len(misfits) > _MOST_SHOWN else ""
            raise CheckpointMismatchError(
                f"{self._directory} does not fit the state dict: {'; '.join(misfits[:_MOST_SHOWN])}{more}. "
                "Nothing was loaded; load into the model that was saved."
            )
        if missing and not self._is_partial:
            remedy = (
                "Load it into what was saved, or pass allow_partial_load=True to leave the rest as it is."
            )
            raise CheckpointMismatchError(missing_keys_message(self._directory, missing, index.names, remedy))
        with torch.no_grad():
            self._prepared = prepare(index, requests, {name for name, _, _ in self._objects}, rows)
        left_out = set(missing)
        asked = [name for name in flat.names if name not in left_out]
        self.seen = Seen(index.identity, None if len(asked) == len(index.names) else asked)

    def agree(self, seen: list[Seen]) -> None:
        """Coordinator. All ranks see one save; what none of them asks for is reported."""
        require_same_save(
            self._directory, self.seen.identity, {rank: each.identity for rank, each in enumerate(seen)}
        )
        asked = [each.asked for each in seen]
        if None not in asked:
            names = {name for each in asked if each is not None for name in each}
            report_unasked(self._directory, self._index.metadata, names, is_partial=self._is_partial)

    def read(self) -> None:
        """Local. Fill the tensors."""
        assert self._prepared is not None, "read before prepare"
        with torch.no_grad():
            self._loaded = self._prepared.read_objects()
        # A save ends the checkpoint that it overwrites before it touches the data files.
        self._index.versions.require_unchanged()

    def place(self) -> dict[str, Any]:
        """Local. The state dict, with the loaded objects where others were."""
        for tensor, container, key in self._materialized:
            container[key] = tensor
        for name, container, key in self._objects:
            container[key] = self._loaded[name]
        return self._values


def _misfit(name: str, value: Any, shape: tuple[int, ...] | None) -> str:
    wanted = f"a tensor of shape {tuple(value.size())}" if isinstance(value, torch.Tensor) else "an object"
    saved = "an object" if shape is None else f"a tensor of shape {shape}"
    return f"{name} is {wanted} there and {saved} in the checkpoint"


def _materialized(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with memory in the place of one on the meta device: where the process group's tensors are."""
    if not (dist.is_available() and dist.is_initialized()):
        return torch.empty_like(tensor, device=torch.get_default_device())
    box = {"": tensor}
    _init_state_dict(box)
    return box[""]
