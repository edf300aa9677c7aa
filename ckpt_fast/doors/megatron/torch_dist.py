# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's sharded state dicts, saved and loaded by the pipeline in Megatron-Core's own files.

``start_save`` and ``load`` are what the documented API uses. They take and return exactly what
``megatron.core.dist_checkpointing.save`` and ``load`` do, and need neither a GPU nor unsafe unpickling.
``FastSaveStrategy`` and ``FastLoadStrategy`` are the same behind Megatron-Core's strategy interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ckpt_fast import compat
from ckpt_fast.doors.megatron.collecting import Collecting
from ckpt_fast.doors.megatron.common_state import (
    common_bytes,
    common_bytes_of,
    open_checkpoint,
    plain_numbers,
)
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.doors.megatron.load_wanted import check_keys, divided, load_wanted, prepare
from ckpt_fast.doors.megatron.reuse import Collector, KnownTensors
from ckpt_fast.doors.megatron.sharded_state import Path, mismatches, require_distinct_objects, shards_of
from ckpt_fast.doors.megatron.sharding import ValidatedSharding
from ckpt_fast.doors.megatron.stock_queue import Flag, as_request
from ckpt_fast.errors import also_raised_as
from ckpt_fast.format.names import COMMON_FILE, COMMON_STATE_KEY, SEAL, SEAL_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.glu.factory import in_place
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions, Share
from ckpt_fast.pipeline.save.program import ProgramCache
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.lost import in_touch
from ckpt_fast.settings import Settings
from ckpt_fast.storage.files import absolute
from ckpt_fast.storage.objects.client import as_url, checkpoint_files

CONTENT_METADATA_KEY = "content_metadata"


class FastSaveStrategy(compat.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-Core save strategy on the ckpt_fast pipeline.

    The plan of a save is kept and used again while the structure of what this rank saves is the same. That is
    compared at every save, whatever is promised: there is nothing that a rank whose structure changed could
    leave stale. Errors of a save, and of finalizing one in the background, are those of ``FastLoadStrategy``.

    Args:
        backend, version: as Megatron-Core passes them; always "torch_dist", 1 on disk.
        keep_only_main_replica: only True, Megatron-Core's default, is there.
        thread_count: files per rank; None: as many as are fastest there.
        cached_metadata: accepted, and without effect.
        separation_hint: tensors whose key begins so get files of their own, whose names begin so as well.
        options: of the installed Megatron-Core's strategy.

    Raises:
        ValueError: another backend or version, or ``keep_only_main_replica=False``.
    """

    def __init__(
        self,
        backend: str = "torch_dist",
        version: int = 1,
        keep_only_main_replica: bool = True,
        thread_count: int | None = None,
        cached_metadata: bool = False,
        separation_hint: str | None = None,
        **options: Any,
    ) -> None:
        if (backend, version) != ("torch_dist", 1):
            raise ValueError(
                f"FastSaveStrategy writes the backend 'torch_dist', version 1; asked for {backend!r}, "
                f"version {version}. Use ckpt_format='torch_dist'."
            )
        if not keep_only_main_replica:
            raise ValueError(
                "keep_only_main_replica=False is not available: each piece is saved by its main replica"
            )
        # Megatron-Core's attribute is a number.
        super().__init__(
            backend,
            version,
            thread_count=1 if thread_count is None else thread_count,
            cached_metadata=cached_metadata,
            separation_hint=separation_hint,
            **options,
        )
        self.writers = thread_count
        self.forget()

    def forget(self) -> None:
        """Local. Let the next save collect, plan and compile everything, as the first did."""
        self.programs = ProgramCache()
        self.known = KnownTensors()
        self.sharding = ValidatedSharding()

    @also_raised_as(compat.DistCheckpointingError)
    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
        """Collective. Save the sharded part; Megatron-Core itself writes ``metadata.json`` afterwards."""
        job = self._staged(sharded_state_dict, checkpoint_dir)
        job.write()
        job.commit()

    @also_raised_as(compat.DistCheckpointingError)
    def async_save(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        async_strategy: str = "mcore",
    ) -> Any:
        """Collective. Copy the state and start writing it; training may continue when this returns.

        Args:
            sharded_state_dict: as for ``save``.
            checkpoint_dir: the same on every rank.
            async_strategy: "mcore" or "nvrx", the package whose queue will get the request.

        Returns:
            That package's ``AsyncRequest``, to which Megatron-Core adds the writing of ``metadata.json``.
        """
        _, request_class = compat.get_async_strategy(async_strategy, "AsyncRequest")
        flags: list[Flag] = []

        def prepare() -> None:
            flags.append(Flag())

        def when_written() -> None:
            flags[0].set()

        job = self._staged(
            sharded_state_dict, checkpoint_dir, prepare, snapshot=True, when_written=when_written
        )
        return as_request(job, flags[0], request_class, compat.DistCheckpointingError)

    def _staged(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        prepare: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Save:
        """Collective. ``prepare`` is local: if it fails on one rank, the save fails on all."""
        directory = absolute(as_url(checkpoint_dir))
        common: dict[str, bytes] = {}

        def collect() -> Share:
            prepare()
            if ControlGroup().is_coordinator:
                common.update(_common_file(sharded_state_dict, directory))
            return Share(shards_of(sharded_state_dict), common, files=checkpoint_files(directory))

        job = Save(
            directory,
            collect,
            # The seal is Megatron-Core's, and comes later: an older one may not vouch for these files.
            SaveOptions(
                writers=self.writers,
                separate=self.separation_hint,
                replace=False,
                # Megatron-Core has validated what it was asked to; beyond that torch's planner only counts
                # elements, and only of several ranks.
                partial=ControlGroup().size == 1,
                programs=self.programs,
                **options,
            ),
            Completion(finish=lambda _: _restore(common, directory)),
        )
        job.stage()
        return job


@without_collections
@in_touch()
def start_save(
    sharded_state_dict: dict[str, Any] | Callable[[], dict[str, Any]] | Collector,
    checkpoint_dir: str,
    strategy: Any,
    options: SaveOptions | None = None,
    completion: Completion | None = None,
    *,
    validate_access_integrity: bool = True,
    preprocess_common_before_consistency_check: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    content_metadata: dict[str, Any] | None = None,
    write_beside: Callable[[str], Sequence[FileRecord]] = lambda _: (),
    reuse: bool = True,
) -> Save:
    """Collective. Everything up to and including staging; the caller then runs ``write`` and ``commit``.

    Args:
        sharded_state_dict: Megatron-Core's sharded state dict, or what collects it. A rank where collecting
            fails does not leave the others alone. A Collector is asked for objects only while its tensors
            are those of the strategy's last save.
        checkpoint_dir: the same on every rank.
        strategy: FastSaveStrategy, or FullyParallelSaveStrategyWrapper around one.
        options: see ``SaveOptions``; the strategy says how many files there are.
        completion: see ``Completion``; its seal files are Megatron-Core's.
        validate_access_integrity: check that all ranks together save every element exactly once, unless the
            strategy's last save was described by the same shards on every rank.
        preprocess_common_before_consistency_check: applied to the common state before ranks compare it.
        content_metadata: stored in the common state under ``content_metadata``.
        write_beside: see ``Share``.
        reuse: collect objects only, where the tensors are proven to be those of the strategy's last save.
            Without it all is collected; the ranks validate and divide it if some rank's part has changed, and
            the compiled program of the last save is executed if that comes to the same structure.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing has been written.
        TypeError: the strategy is of another class.
    """
    _require_class(strategy, FastSaveStrategy)
    checkpoint_dir = absolute(as_url(checkpoint_dir))
    options = options or SaveOptions()
    group = ControlGroup()
    validate = validate_access_integrity and dist.is_available() and dist.is_initialized()
    is_wrapped = isinstance(strategy, compat.FullyParallelSaveStrategyWrapper)

    base = strategy.base_strategy if is_wrapped else strategy

    def preprocess(state_dict: dict[str, Any], compare: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        if content_metadata is not None:
            state_dict[CONTENT_METADATA_KEY] = content_metadata
        split: tuple[dict[str, Any], dict[str, Any]]
        with mismatches(f"nothing was saved to {checkpoint_dir}"):
            try:
                split = compat.save_preprocess(in_place(state_dict), False, None)
                if compare:
                    to_compare = preprocess_common_before_consistency_check or (lambda common: common)
                    base.sharding.require_valid(split[0], to_compare(split[1]))
            except (pickle.PicklingError, AttributeError, TypeError):
                # Megatron-Core pickles the common state to compare it. Our error says which part is to blame.
                common_bytes(compat.save_preprocess(state_dict, False, None)[1])
                raise
        if validate_access_integrity and not validate:
            require_distinct_objects(split[0])
        return split

    known = base.known if reuse else None
    collecting = Collecting(sharded_state_dict, strategy, preprocess, known, base.programs)
    if validate:  # with collectives, in which no rank may wait for one that cannot collect its part
        collecting.collect(group)

    def collect() -> Share:
        bound = options.host_buffer
        if bound is None:
            bound = Settings.read().host_buffer_bytes
        share, common = collecting.share(options.snapshot, bound)
        return replace(
            share,
            common_files={COMMON_FILE: common_bytes(common)} if group.is_coordinator else {},
            files=checkpoint_files(checkpoint_dir),
            write_beside=write_beside,
        )

    job = Save(
        checkpoint_dir,
        collect,
        replace(
            options,
            writers=base.writers,
            programs=base.programs,
            partial=not validate_access_integrity and group.size == 1,
        ),
        replace(completion or Completion(), seal_files={SEAL_FILE: json.dumps(SEAL).encode()}),
    )
    job.stage()
    collecting.learn(job.structure)
    return job


@without_collections
@in_touch()
def load(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    *,
    checkpoint: OpenCheckpoint | None = None,
    common: dict[str, Any] | None = None,
    strategy: Any = None,
    strict: Any = compat.StrictHandling.ASSUME_OK_UNEXPECTED,
    validate_access_integrity: bool = True,
    accept_missing: Callable[[Collection[Path], Collection[Path]], None] = lambda *_: None,
) -> Any:
    """Collective. Load what the sharded state dict asks for.

    Sections of the checkpoint that no rank asks for are one line of warning, if an optimizer is loaded.

    Args:
        sharded_state_dict: what to load; tensors with data are filled in place.
        checkpoint_dir: directory of a torch_dist checkpoint, of ours or of stock Megatron-Core.
        checkpoint: the same, where the caller has opened it already.
        common: its common state, where the caller has read it already. It becomes the state dict returned.
        strategy: FastLoadStrategy (default), or a wrapper around one.
        strict: Megatron-Core's ``StrictHandling`` or its string value.
        validate_access_integrity: check that the ranks' requests fit together.
        accept_missing: gets the paths of this rank's entries that the checkpoint lacks and ``strict``
            tolerates, and those of the others, before anything is filled. An error it raises refuses the load
            on all ranks.

    Returns:
        The state dict with the common state merged in; with the two ``return_*`` modes of ``strict`` a tuple
        (state dict, missing keys, unexpected keys).

    Raises:
        CheckpointError: on every rank, naming the rank that failed.
        TypeError: the strategy is of another class.
    """
    strategy = strategy or FastLoadStrategy()
    _require_class(strategy, FastLoadStrategy)
    group = ControlGroup()
    strict = compat.parse_strict_flag(strict)
    compat.force_all_tensors_to_non_fp8(sharded_state_dict)
    base = getattr(strategy, "base_strategy", strategy)
    with contextlib.ExitStack() as stack:
        opened = checkpoint or stack.enter_context(open_checkpoint(checkpoint_dir))
        if checkpoint is None:
            opened.share(group)
        stack.enter_context(base.reading(opened))
        wanted = group.agree(
            # A wrapper exchanges tensors, which views are not.
            lambda: prepare(sharded_state_dict, opened, common, into_views=strategy is base)
        )
        sharded, missing, unexpected = check_keys(
            wanted.sharded, checkpoint_dir, strategy, strict, validate_access_integrity
        )
        group.agree(lambda: accept_missing(*divided(wanted.sharded, sharded)))
        state_dict = wanted.state_dict
        compat.merge(state_dict, load_wanted(sharded, checkpoint_dir, strategy, opened))
    state_dict = compat.apply_factory_merges(state_dict, wanted.factories)
    if compat.StrictHandling.requires_returning_mismatch_keys(strict):
        return state_dict, missing, unexpected
    return state_dict


def _common_file(sharded_state_dict: dict[str, Any], directory: str) -> dict[str, bytes]:
    """The common state as ``common.pt`` must hold it, by that name; empty if Megatron-Core gave none."""
    for entry in compat.nested_values(sharded_state_dict):
        if isinstance(entry, compat.ShardedObject) and entry.unique_key == COMMON_STATE_KEY:
            entry.data = plain_numbers(entry.data)
            return {COMMON_FILE: common_bytes(entry.data)}
    # Versions before 0.19 have written the file already, not durably, and read nothing else.
    with checkpoint_files(directory) as files:
        try:
            written = files.read(COMMON_FILE)
        except FileNotFoundError:
            return {}
    return {COMMON_FILE: common_bytes_of(written)}


def _restore(common: dict[str, bytes], directory: str) -> list[FileRecord]:
    """Write again what Megatron-Core has replaced for another save to the directory, which was then refused.

    Versions before 0.19 write ``common.pt`` before they ask the strategy.
    """
    with checkpoint_files(directory) as files:
        replaced = {name: content for name, content in common.items() if files.read(name) != content}
        files.write_in_order(replaced)
    return []


def _require_class(strategy: Any, wanted: type) -> None:
    base = getattr(strategy, "base_strategy", strategy)
    if not isinstance(base, wanted):
        got = f"the class {base.__name__} itself" if isinstance(base, type) else f"a {type(base).__name__}"
        raise TypeError(
            f"this door takes a {wanted.__name__}, alone or in Megatron-Core's wrapper; got {got}"
        )
