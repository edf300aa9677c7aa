# SPDX-License-Identifier: Apache-2.0
"""nvidia-resiliency-ext's local checkpoints, written and read by the pipeline.

Which rank keeps whose state, and how replicas travel, stays with nvidia-resiliency-ext. Files, checksums,
durability and what happens when a rank fails or a replica is damaged are ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Container, Iterable
from types import MappingProxyType
from typing import Any

import torch

from ckpt_fast import compat, native
from ckpt_fast.doors.local.branches import Notes, gather_notes, is_left, notes_at, without_left
from ckpt_fast.doors.local.files import (
    NAME,
    Origin,
    Packed,
    memory_of,
    pack_local,
    read_local,
    remove_all_local,
    remove_local,
    save_id_of,
    take_place,
    write_local,
)
from ckpt_fast.doors.local.replicas import complete, exchange
from ckpt_fast.doors.local.save import LocalSave, begin
from ckpt_fast.doors.megatron.stock_queue import as_request
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    also_raised_as,
)
from ckpt_fast.format.manifest import new_save_id
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.lost import in_touch
from ckpt_fast.storage import replacement
from ckpt_fast.storage.files import absolute

logger = logging.getLogger(__name__)

try:
    LocalCheckpointManager, _ = compat.import_local_checkpointing()
    CheckpointingException = compat.import_local_checkpointing_error()
except ImportError as error:
    raise compat.UnavailableError(
        f"FastLocalCheckpointManager needs nvidia-resiliency-ext, which cannot be imported ({error}): "
        "pip install nvidia-resiliency-ext, or use non_persistent_ckpt_type='global'"
    ) from error


class FastLocalCheckpointManager(LocalCheckpointManager):  # type: ignore[misc, valid-type]
    """nvidia-resiliency-ext's LocalCheckpointManager, with its arguments, on the ckpt_fast pipeline.

    A rank's state is a directory of its own: flat, with checksums, synced, renamed when it is complete. It is
    read without running any code, and compared with its checksums. If what a rank has is damaged, that is
    logged and a replica taken instead; if there is none, the newest iteration that is whole on all ranks.

    Neither a GPU nor a second process is needed: in the background, threads of this process write.
    Every CheckpointError can be caught as nvidia-resiliency-ext's CheckpointingException as well.
    """

    root_local_ckpt_dir: str | os.PathLike[str]
    latest_iteration: int
    globally_available_ids: list[set[Any]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.root_local_ckpt_dir = absolute(self.root_local_ckpt_dir)
        # Of what was read last.
        self._save_ids: set[str | None] = set()

    @also_raised_as(CheckpointingException)
    @in_touch()
    def find_latest(self) -> int:
        """Collective. The newest iteration of which each rank's state is somewhere; -1 if there is none.

        Raises:
            CheckpointError: on every rank: one could not look, or has ended.
        """
        return int(ControlGroup().agree(super().find_latest))

    @also_raised_as(CheckpointingException)
    @in_touch()
    def save(
        self, state_dict: Any, iteration: int, is_async: bool = False, notes: Notes | None = None
    ) -> Any:
        """Collective. Replicate and save; ``state_dict`` belongs to the manager from now on.

        Args:
            state_dict: MCoreTensorAwareStateDict or BasicTensorAwareStateDict.
            iteration: greater than that of any local checkpoint known, but for those that the run has left.
            is_async: return when the state is copied.
            notes: what the checkpoint notes of its run; those of the first rank count.

        Returns:
            With ``is_async`` nvidia-resiliency-ext's AsyncRequest, for a queue; else None.

        Raises:
            CheckpointMismatchError: a newer local checkpoint exists.
            CheckpointError: on every rank, naming the rank that failed. Earlier ones are untouched.
        """
        if iteration <= self.latest_iteration:
            self._forget_left(iteration, notes or {})
        if iteration <= self.latest_iteration:
            raise CheckpointMismatchError(
                f"cannot save the local checkpoint of iteration {iteration}: that of "
                f"{self.latest_iteration} exists. Use another session_id or directory for another run."
            )
        flag = ControlGroup().agree(lambda: begin(state_dict, is_async))
        own = self._ckpt_id(iteration)
        states = {own: state_dict}
        if self.repl_strategy is not None:
            strategy = self.repl_strategy
            replicas, ids = ControlGroup().agree(lambda: strategy.replicate(state_dict, own))
            states = dict(zip(ids, replicas, strict=True))
        live = memory_of(states[own]) if is_async else set()
        if is_async or torch.cuda.is_available():
            states[own].copy_tensors_to_cpu(non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.latest_iteration = -1
        job = LocalSave(self, iteration, states, live, notes or {}, flag.set if flag is not None else None)
        if flag is not None:
            return as_request(job, flag, compat.NVRxAsyncRequest, CheckpointingException)
        try:
            job.write()
            job.commit()
        except BaseException:
            job.abandon(LEAVE_S)
            raise
        return None

    @also_raised_as(CheckpointingException)
    @in_touch()
    def load(self) -> tuple[Any, Any]:
        """Collective, after ``find_latest``. The newest state of this rank that can be had, and its id.

        Raises:
            CheckpointNotFoundError: there is no local checkpoint.
            CheckpointCorruptError: on every rank: none is whole, with all replicas.
        """
        if self.latest_iteration == -1:
            raise CheckpointNotFoundError(
                f"no local checkpoint is known in {self.root_local_ckpt_dir}: call find_latest first, and "
                "load only if it has found one"
            )
        available = [set(ids) for ids in self.globally_available_ids]
        while True:
            wanted = self._ckpt_id(self.latest_iteration)
            states, receive, _ = self._attempt(wanted, available)
            if receive is not None:
                return receive(states), wanted
            self.latest_iteration = max(complete(available), default=-1)
            if self.latest_iteration == -1:
                raise CheckpointCorruptError(
                    f"no local checkpoint in {self.root_local_ckpt_dir} is whole on every rank, nor are its "
                    "replicas; what is damaged was logged. Load a global checkpoint."
                )

    def iterations(self) -> list[int]:
        """After ``find_latest``: every iteration of which each rank's state is somewhere, newest first."""
        if self.latest_iteration == -1:
            return []
        return sorted(complete(self.globally_available_ids), reverse=True)

    def notes(self) -> dict[int, Notes]:
        """Collective. What each local checkpoint notes of its run, by iteration; the same on all ranks."""
        paths = ((each[0], os.fspath(self._local_ckpt_path_from_id(each))) for each in self._my_ckpt_ids())
        return gather_notes(paths)

    @also_raised_as(CheckpointingException)
    @in_touch()
    def load_iteration(self, iteration: int) -> tuple[Any, Any]:
        """Collective, after ``find_latest``. This rank's state of one iteration, and its id.

        Raises:
            CheckpointCorruptError: on every rank: it is not whole, with all replicas. The manager has
                forgotten it then, so that this iteration can be saved again.
        """
        available = [set(ids) for ids in self.globally_available_ids]
        wanted = self._ckpt_id(iteration)
        states, receive, damages = self._attempt(wanted, available)
        if receive is not None:
            self.latest_iteration = iteration
            return receive(states), wanted
        self.globally_available_ids = available
        self.latest_iteration = max(complete(available), default=-1)
        raise CheckpointCorruptError(
            f"the local checkpoint of iteration {iteration} in {self.root_local_ckpt_dir} is not whole on "
            f"every rank, nor are its replicas: {'; '.join(damages)}"
        )

    def _attempt(
        self, wanted: Any, available: list[set[Any]]
    ) -> tuple[dict[Any, Any], Callable[[dict[Any, Any]], Any] | None, list[str]]:
        """Collective. What this rank has to read of iteration ``wanted[0]``, and how all get theirs from it.

        What turns out to be damaged is taken from ``available``, on all ranks alike; the second value is None
        then, and the third says of each rank what is.
        """
        plan, needed = None, {wanted}
        failed: dict[Any, str] = {}
        try:
            if self.repl_strategy is not None:
                plan = self.repl_strategy.retrieve_plan(available, [wanted])
                needed = plan.required_ids()
        except Exception as error:
            # No replica partner of this rank has its state: the whole iteration is unusable.
            logger.error("rank %d: local checkpoint %s cannot be had: %s", self.rank, wanted, error)
            failed, needed = {None: str(error)}, set()
        states, all_failed, save_ids = self._read(needed, failed)
        if len(save_ids) > 1 and self._settle(needed):
            states, all_failed, save_ids = self._read(needed, failed)
        if len(save_ids) > 1:
            # There is no way to tell which of them the ranks should continue with.
            all_failed[0][None] = (
                f"the local checkpoints of iteration {wanted[0]} are of different saves "
                f"({', '.join(sorted(map(str, save_ids)))}): none is used"
            )
            logger.error("rank %d: %s", self.rank, all_failed[0][None])
        for rank, failures in enumerate(all_failed):
            available[rank] -= failures.keys()
            if None in failures:
                for ids in available:
                    ids -= {identity for identity in ids if identity[0] == wanted[0]}
        if any(all_failed):
            damages = [
                f"rank {rank}: {next(iter(failures.values()))}"
                for rank, failures in enumerate(all_failed)
                if failures
            ]
            return states, None, damages
        if plan is None:
            return states, lambda states: states[wanted], []
        return states, lambda states: exchange(self.repl_strategy, plan, states)[wanted], []

    def _read(
        self, needed: set[Any], failed: dict[Any, str]
    ) -> tuple[dict[Any, Any], list[dict[Any, str]], set[str | None]]:
        """Collective. The states in ``needed``, what failed on each rank, and of which saves the states are.

        Args:
            needed: ids of states on this rank.
            failed: what has failed before.
        """
        states, failed = {}, dict(failed)
        self._save_ids = set()
        for identity in sorted(needed):
            try:
                states[identity] = self._load_fn(identity)
            except CheckpointError as error:
                logger.error("rank %d: a local checkpoint is damaged and not used: %s", self.rank, error)
                failed[identity] = str(error)
        gathered = ControlGroup().all_gather((failed, self._save_ids))
        all_failed = [each for each, _ in gathered]
        return states, all_failed, set[str | None]().union(*(ids for _, ids in gathered))

    def _settle(self, needed: set[Any]) -> bool:
        """Collective. A crash has left states of two saves in place: continue with one that all ranks have.

        Some ranks had taken their places, the others had not; the other one of each lies beside it.

        Returns:
            Whether the states in their places are of one save now, and this rank may read again.
        """
        found = {identity: self._found(identity) for identity in needed}
        gathered = ControlGroup().all_gather([set(each) for each in found.values()])
        of_each = [ids for rank in gathered for ids in rank]
        common = set.intersection(*of_each) if of_each else set()
        if not common:
            return False
        chosen = min(common, key=str)
        logger.warning(
            "rank %d: the local checkpoints are of two saves of one iteration, the later of which was "
            "interrupted; all ranks go on with save %s",
            self.rank,
            chosen,
        )
        moved = []
        try:
            for identity, places in found.items():
                if places[chosen]:
                    self._take_places([identity])
                moved.append(identity)
        except CheckpointError as error:
            logger.error("rank %d: %s", self.rank, error)
        return all(ControlGroup().all_gather(len(moved) == len(found)))

    def _found(self, identity: Any) -> dict[str | None, bool]:
        """Local. The saves of which this rank has a state, and whether it lies beside its place."""
        found = {}
        for is_beside in (True, False):
            path = os.fspath(self._local_ckpt_path_from_id(identity, is_beside))
            with contextlib.suppress(CheckpointError):
                found[save_id_of(path)] = is_beside
        return found

    # --- what the base class asks of a store of checkpoints ---------------------------------------------

    def _my_ckpt_ids(self) -> Iterable[Any]:
        try:
            for path in replacement.replaced_in(self.local_ckpt_dir):
                replacement.put_back(path)
            names = [entry.name for entry in os.scandir(self.local_ckpt_dir) if entry.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.error("rank %d cannot look for local checkpoints: %s", self.rank, error)
            return []
        return [self._filename_to_id(name) for name in names if NAME.fullmatch(name)]

    def _pack(self, state_dict: Any, ckpt_id: Any, live: Container[int] = ()) -> Packed:
        return pack_local(state_dict, os.fspath(self._local_ckpt_path_from_id(ckpt_id)), live)

    def _write(self, packed: Packed, origin: Origin, report: SaveReport, progress: native.Progress) -> None:
        ckpt_id = (origin.iteration, origin.rank, self.session_id)
        partial = os.fspath(self._local_ckpt_path_from_id(ckpt_id, True))
        directory = os.fspath(self._local_ckpt_path_from_id(ckpt_id))
        write_local(packed, directory, partial, origin, report, progress)

    def _save(self, state_dict: Any, ckpt_id: Any) -> None:
        directory = os.fspath(self._local_ckpt_path_from_id(ckpt_id))
        packed = self._pack(state_dict, ckpt_id)
        origin = Origin(new_save_id(), ckpt_id[0], ckpt_id[1])
        self._write(packed, origin, SaveReport(directory), native.Progress())
        self._take_places([ckpt_id])

    def _load(self, ckpt_id: Any) -> Any:
        directory = os.fspath(self._local_ckpt_path_from_id(ckpt_id))
        state_dict, save_id = read_local(directory, ckpt_id[0], ckpt_id[1])
        self._save_ids.add(save_id)
        return state_dict

    def _cleanup(self, iteration: int, notes: Notes = MappingProxyType({})) -> None:
        """Delete older ones, and newer ones that the run has left for this one: nobody loads them again."""

        def is_past(other: int, path: str) -> bool:
            return other < iteration or (
                other > iteration and is_left(notes, iteration, other, notes_at(path))
            )

        self._remove(is_past)

    def _forget_left(self, iteration: int, notes: Notes) -> None:
        """Collective. What the run has left for what it saves now is no local checkpoint any more."""
        self.globally_available_ids = without_left(
            self.globally_available_ids, ControlGroup().broadcast(dict(notes)), iteration, self.notes()
        )
        self.latest_iteration = max(complete(self.globally_available_ids), default=-1)

    def _has(self, ckpt_id: Any) -> bool:
        return os.path.lexists(self._local_ckpt_path_from_id(ckpt_id))

    def _take_places(self, ckpt_ids: Iterable[Any]) -> None:
        for ckpt_id in ckpt_ids:
            partial = os.fspath(self._local_ckpt_path_from_id(ckpt_id, True))
            take_place(partial, os.fspath(self._local_ckpt_path_from_id(ckpt_id)))

    def _discard_replaced(self, ckpt_ids: Iterable[Any]) -> None:
        """Delete what has changed places with newer states. At once: the next save may use the name."""
        for ckpt_id in ckpt_ids:
            partial = os.fspath(self._local_ckpt_path_from_id(ckpt_id, True))
            shutil.rmtree(partial, ignore_errors=True)
            if os.path.lexists(partial):
                logger.warning("rank %d could not delete %s: it costs disk space only", self.rank, partial)

    def _withdraw(self, replaced: Container[Any], written: Iterable[Any]) -> None:
        """Delete what a save that failed has written; what was there before stays. Problems are logged."""
        for ckpt_id in written:
            partial = os.fspath(self._local_ckpt_path_from_id(ckpt_id, True))
            directory = os.fspath(self._local_ckpt_path_from_id(ckpt_id))
            try:
                shutil.rmtree(partial, ignore_errors=True)
                if ckpt_id not in replaced and os.path.lexists(directory):
                    remove_local(directory, f"{directory}.old")
            except OSError as error:
                logger.warning("rank %d could not delete %s: %s", self.rank, directory, error)

    def _cleanup_failed_save(self, iteration: int) -> None:
        self._remove(lambda other, _: other == iteration)

    def _remove(self, is_meant: Callable[[int, str], bool]) -> None:
        remove_all_local(self.local_ckpt_dir, is_meant, self.rank)

    def _filename_from_template(self, iteration: int | str, rank: int | str, extra_suffix: str = "") -> str:
        return f"iter_{str(iteration).zfill(7)}_{rank}_local{extra_suffix}"
