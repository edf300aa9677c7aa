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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ckpt_fast import megatron
from ckpt_fast.doors.common_state import COMMON_FILE, COMMON_STATE_KEY, load_common_state_dict
from ckpt_fast.doors.glu_factory import in_place
from ckpt_fast.doors.sharded_state import load_sharded, merge_in_place, shards_of, torch_bytes
from ckpt_fast.doors.stock_queue import Flag, as_request
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.pipeline import commit
from ckpt_fast.pipeline.device_copy import StagingPolicy
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.index import CheckpointIndex
from ckpt_fast.pipeline.save import Save

CONTENT_METADATA_KEY = "content_metadata"
# All four keys: versions before 0.19 want each of them and accept no other.
_SEAL = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class FastSaveStrategy(megatron.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron-Core save strategy on the ckpt_fast pipeline.

    Args:
        backend, version: as Megatron-Core passes them; always "torch_dist", 1 on disk.
        thread_count: files per rank; None: as many as are fastest there.
    """

    def __init__(
        self,
        backend: str = "torch_dist",
        version: int = 1,
        *,
        thread_count: int | None = None,
        **options: Any,
    ) -> None:
        # Megatron-Core's attribute is a number.
        super().__init__(
            backend, version, thread_count=1 if thread_count is None else thread_count, **options
        )
        self.writers = thread_count

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
        """Collective. Save the sharded part; Megatron-Core itself writes ``metadata.json`` afterwards."""
        job = self._staged(sharded_state_dict, checkpoint_dir)
        job.write()
        job.commit()

    def async_save(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        async_strategy: str = "mcore",
    ) -> Any:
        """Collective. Copy the state and begin to write it; training may go on when this returns.

        Args:
            sharded_state_dict: as for ``save``.
            checkpoint_dir: the same on every rank.
            async_strategy: "mcore" or "nvrx", the package whose queue will get the request.

        Returns:
            That package's ``AsyncRequest``, to which Megatron-Core adds the writing of ``metadata.json``.
        """
        _, request_class = megatron.get_async_strategy(async_strategy, "AsyncRequest")
        flag = Flag()
        try:
            job = self._staged(sharded_state_dict, checkpoint_dir, snapshot=True, when_written=flag.set)
        except BaseException:
            flag.set()
            flag.remove()
            raise
        return as_request(job, flag, request_class)

    def _staged(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str], **options: Any
    ) -> Save:
        common = [
            entry
            for entry in megatron.nested_values(sharded_state_dict)
            if isinstance(entry, megatron.ShardedObject) and entry.unique_key == COMMON_STATE_KEY
        ]
        job = Save(
            shards_of(sharded_state_dict),
            os.fspath(checkpoint_dir),
            writers=self.writers,
            # Versions before 0.19 wrote the file already, and read nothing else.
            keep_files=() if common else (COMMON_FILE,),
            common_files={COMMON_FILE: torch_bytes(common[0].data)} if common else None,
            **options,
        )
        job.stage()
        return job


class FastLoadStrategy(megatron.TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Megatron-Core load strategy on the ckpt_fast pipeline: tensors by offset, no code from pickles.

    Args:
        verify: compare the CRC-32 of every item that is read whole; None follows ``CKPT_FAST_VERIFY``.
    """

    def __init__(self, verify: bool | None = None) -> None:
        super().__init__()
        self._verify = verify

    def load(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        async_strategy: str = "mcore",
    ) -> dict[str, Any]:
        """Local. A dict of the same nesting with every sharded entry replaced by its loaded value."""
        index = CheckpointIndex(os.fspath(checkpoint_dir))
        self.cached_global_metadata = index.metadata
        return load_sharded(sharded_state_dict, index, self._verify)

    def load_tensors_metadata(
        self, checkpoint_dir: str | os.PathLike[str], metadata: Any = None
    ) -> dict[str, Any]:
        """Name to ShardedTensor without data, of the whole global shape, for every saved tensor."""
        metadata = metadata or CheckpointIndex(os.fspath(checkpoint_dir)).metadata
        return {
            fqn: megatron.ShardedTensor.from_rank_offsets(
                fqn, torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            ).without_data()
            for fqn, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks")
        }

    def load_sharded_metadata(self, checkpoint_dir: str | os.PathLike[str]) -> dict[str, Any]:
        """``load_tensors_metadata`` and, by unique key, a ShardedObject without data per saved object."""
        metadata = CheckpointIndex(os.fspath(checkpoint_dir)).metadata
        objects = {
            fqn: megatron.ShardedObject.empty_from_unique_key(fqn)
            for fqn, entry in metadata.state_dict_metadata.items()
            if not hasattr(entry, "chunks") and fqn != COMMON_STATE_KEY
        }
        return {**objects, **self.load_tensors_metadata(checkpoint_dir, metadata)}


@without_collections
def start_save(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    strategy: Any,
    *,
    validate_access_integrity: bool = True,
    preprocess_common_before_consistency_check: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    content_metadata: dict[str, Any] | None = None,
    sidecar_notes: Mapping[str, Any] | None = None,
    snapshot: bool = False,
    staging: StagingPolicy | None = None,
    host_buffer: int | None = None,
) -> Save:
    """Collective. Everything up to and including staging; the caller then runs ``write`` and ``commit``.

    Args:
        sharded_state_dict: Megatron-Core's sharded state dict.
        checkpoint_dir: the same on every rank.
        strategy: FastSaveStrategy, or FullyParallelSaveStrategyWrapper around one.
        validate_access_integrity: check that all ranks together save every element exactly once.
        preprocess_common_before_consistency_check: applied to the common state before ranks compare it.
        content_metadata: stored in the common state under ``content_metadata``.
        sidecar_notes: entries of the sidecar besides its own.
        snapshot: the shards' memory may change as soon as this returns, as far as ``staging`` allows.
        staging: how tensors on GPUs are copied then; see ``Save``.
        host_buffer: bound on the host memory staged into; see ``Save``.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing has been written.
    """
    group = ControlGroup()
    if content_metadata is not None:
        sharded_state_dict[CONTENT_METADATA_KEY] = content_metadata
    distributed = dist.is_available() and dist.is_initialized()

    def preprocess() -> tuple[dict[str, Any], dict[str, Any]]:
        with _mismatches(f"nothing was saved to {checkpoint_dir}"):
            result: tuple[dict[str, Any], dict[str, Any]] = megatron.save_preprocess(
                in_place(sharded_state_dict),
                validate_access_integrity and distributed,
                preprocess_common_before_consistency_check,
            )
            return result

    sharded, common = group.agree(preprocess)
    base = strategy
    if isinstance(strategy, megatron.FullyParallelSaveStrategyWrapper):
        strategy.apply_saving_parallelization(sharded)
        base = strategy.base_strategy
    job = Save(
        group.agree(lambda: shards_of(sharded)),
        checkpoint_dir,
        writers=base.writers,
        common_files={COMMON_FILE: torch_bytes(common)} if group.is_coordinator else None,
        seal_files={commit.SEAL_FILE: json.dumps(_SEAL).encode()},
        sidecar_notes=sidecar_notes,
        snapshot=snapshot,
        staging=staging,
        host_buffer=host_buffer,
    )
    job.stage()
    return job


@without_collections
def load(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    *,
    strategy: Any = None,
    strict: Any = megatron.StrictHandling.ASSUME_OK_UNEXPECTED,
    validate_access_integrity: bool = True,
) -> Any:
    """Collective. Load what the sharded state dict asks for.

    Args:
        sharded_state_dict: what to load; tensors with data are filled in place.
        checkpoint_dir: directory of a torch_dist checkpoint, of ours or of stock Megatron-Core.
        strategy: FastLoadStrategy (default), or a wrapper around one.
        strict: Megatron-Core's ``StrictHandling`` or its string value.
        validate_access_integrity: check that the ranks' requests fit together.

    Returns:
        The state dict with the common state merged in; with the two ``return_*`` modes of ``strict`` a tuple
        (state dict, missing keys, unexpected keys).

    Raises:
        CheckpointError: on every rank, naming the rank that failed.
    """
    strategy = strategy or FastLoadStrategy()
    group = ControlGroup()
    strict = megatron.parse_strict_flag(strict)
    megatron.force_all_tensors_to_non_fp8(sharded_state_dict)
    if isinstance(strategy, FastLoadStrategy):  # a wrapper exchanges tensors, which views are not
        sharded_state_dict = group.agree(lambda: in_place(sharded_state_dict))
    state_dict = group.agree(lambda: load_common_state_dict(checkpoint_dir))
    wanted, nonpersistent, factories = megatron.load_preprocess(merge_in_place(sharded_state_dict))
    megatron.merge(state_dict, nonpersistent)
    wanted, _ = megatron.extract_sharded_base(wanted)
    wanted, missing, unexpected = _check_keys(
        wanted, checkpoint_dir, strategy, strict, validate_access_integrity
    )
    loaded = group.agree(lambda: strategy.load(wanted, checkpoint_dir))
    megatron.merge(state_dict, loaded)
    state_dict = megatron.apply_factory_merges(state_dict, factories)
    if megatron.StrictHandling.requires_returning_mismatch_keys(strict):
        return state_dict, missing, unexpected
    return state_dict


def _check_keys(
    wanted: dict[str, Any], checkpoint_dir: str, strategy: Any, strict: Any, validate_access_integrity: bool
) -> tuple[dict[str, Any], set[str], set[str]]:
    group = ControlGroup()
    validate = validate_access_integrity and dist.is_available() and dist.is_initialized()
    saved = None
    if megatron.StrictHandling.requires_explicit_ckpt_mismatch_check(strict):
        saved = group.agree(lambda: strategy.load_sharded_metadata(checkpoint_dir))
    local = everyone = None
    if validate:
        local, everyone = megatron.determine_global_metadata(wanted)
    elif megatron.StrictHandling.requires_global_app_metadata(strict):
        local = [entry.without_data() for entry in megatron.nested_values(wanted)]
        everyone = [local]

    def check() -> tuple[dict[str, Any], set[str], set[str]]:
        with _mismatches(f"{checkpoint_dir} does not fit what is asked of it"):
            result: tuple[dict[str, Any], set[str], set[str]] = megatron.validate_integrity_and_strict_load(
                wanted, strict, validate, local, everyone, saved
            )
            return result

    return group.agree(check)


@contextlib.contextmanager
def _mismatches(consequence: str) -> Iterator[None]:
    """Megatron-Core's complaints about keys and sharding, as an error of ours."""
    try:
        yield
    except megatron.CheckpointingException as error:
        raise CheckpointMismatchError(
            f"{consequence}: {error}. Check that all ranks build the same model, with the configuration of "
            "the checkpoint."
        ) from error
