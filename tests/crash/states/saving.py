# SPDX-License-Identifier: Apache-2.0
"""Series of saves, the last of which a crash interrupts, and the loads that follow.

Everything in a checkpoint differs from one save to the next, even for the same iteration: weights, optimizer,
scheduler, counters, and every rank's data position.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageReader, FastStorageWriter, resume_dataloader
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save, save_checkpoint
from ckpt_fast.compat import SoloGroup
from ckpt_fast.config import TokenizerConfig
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.save.async_save import is_empty_async_queue
from tests.manifests import find_damage
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu
from tests.trainer.training import Loader, iterator

ROOT = "of/a/run"  # of the checkpoints on disk; none of it exists at first


@dataclass(frozen=True)
class Scenario:
    """A series of saves.

    Attributes:
        iterations: the iterations of the saves, in order; those for recovery only are negative.
        config: fields of CheckpointConfig.
        with_data: there is a data loader, whose position is saved with the checkpoint or, with a name,
            in a directory of that name.
        with_tokenizer: there is a tokenizer.
        door: "dcp" or "dcp-async" instead of ``save_checkpoint``.
        native: saved by the engine; False for the fallback.
        makes_directory: the program creates the checkpoint's directory itself, and syncs nothing.
    """

    iterations: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    with_data: bool | str = False
    with_tokenizer: bool = False
    door: str = "documented"
    native: bool = True
    makes_directory: bool = False

    @property
    def is_dcp(self) -> bool:
        return self.door.startswith("dcp")

    @property
    def is_local(self) -> bool:
        return self.config.get("non_persistent_ckpt_type") == "local"


BACKGROUND = {"async_save": True, "async_strategy": "mcore"}
BOUND = 8192  # bytes of host memory: a fraction of what a rank saves
SCENARIOS = {
    "first": Scenario((1,), with_data=True),
    "later": Scenario((1, 2, 3), {"most_recent_k": 1}, with_data=True),
    "tokenizer": Scenario((1, 2), with_data="elsewhere", with_tokenizer=True),
    "background": Scenario((1, 2, 3), {"most_recent_k": 1, **BACKGROUND}, with_data=True),
    "recovery": Scenario((1, -2, -3, -4), {"non_persistent_ckpt_type": "global"}, with_data=True),
    "local": Scenario((1, -2, -3), {"non_persistent_ckpt_type": "local"}, with_data=True),
    "background-local": Scenario(
        (1, -2, -3), {"non_persistent_ckpt_type": "local", **BACKGROUND}, with_data=True
    ),
    "again": Scenario((1, 2, 2), with_data=True),
    "recovery-again": Scenario((1, -2, -2), {"non_persistent_ckpt_type": "global"}, with_data=True),
    "local-again": Scenario((1, -2, -2), {"non_persistent_ckpt_type": "local"}, with_data=True),
    "background-again": Scenario((1, 2, 2), {"most_recent_k": 1, **BACKGROUND}, with_data=True),
    "again-elsewhere": Scenario((1, 2, 2), with_data="elsewhere", with_tokenizer=True),
    "rolled-back": Scenario((1, 2, 3, 2), {"most_recent_k": 2}, with_data=True),
    "several-files": Scenario((1, 2, 2), {"storage_writers_per_rank": 3}, with_data=True),
    "background-recovery": Scenario(
        (1, -2, -3), {"non_persistent_ckpt_type": "global", **BACKGROUND}, with_data=True
    ),
    "background-in-waves": Scenario((1, 2, 3), {"host_buffer_bytes": BOUND, **BACKGROUND}, with_data=True),
    "background-reused": Scenario((1, 2, 3), {"ckpt_assume_constant_structure": True, **BACKGROUND}),
    "fallback": Scenario((1, 2, 3), {"most_recent_k": 1}, with_data=True, native=False),
    "fallback-again": Scenario((1, 2, 2), with_data=True, native=False),
    "dcp": Scenario((1,), door="dcp"),
    "dcp-made": Scenario((1,), door="dcp", makes_directory=True),
    "dcp-again": Scenario((1, 1), door="dcp"),
    "dcp-async": Scenario((1,), door="dcp-async"),
    "dcp-async-again": Scenario((1, 1), door="dcp-async"),
    "dcp-fallback-again": Scenario((1, 1), door="dcp", native=False),
}


class Job(ABC):
    """Saves and loads for one scenario.

    Args:
        scenario: what to do.
        disk: the directory that is its disk.
    """

    def __init__(self, scenario: Scenario, disk: str) -> None:
        self.scenario = scenario
        self.disk = disk

    @abstractmethod
    def save(self, version: int) -> Any:
        """Save, and return what was saved once it is published. Versions count from 1."""

    @abstractmethod
    def load(self) -> Any:
        """Load the newest checkpoint; None if there is none."""

    @abstractmethod
    def differences(self, expected: Any, found: Any) -> list[str]:
        """Return how a load differs from a save."""

    def version_in(self, expected: list[Any]) -> int:
        """Return which save is loaded, as a whole; 0 if there is nothing to load.

        Raises:
            AssertionError: it is none of them.
            Exception: it cannot be loaded.
        """
        self.check_names()
        found = self.load()
        if found is None:
            return 0
        wrong = [self.differences(each, found) for each in expected]
        assert [] in wrong, f"of no save; from the one that is nearest it differs in {min(wrong, key=len)}"
        return wrong.index([]) + 1

    def check_names(self) -> None:  # noqa: B027
        """Check that sealed checkpoints are complete and tracked ones sealed: other readers rely on it."""

    def check_what_lies_beside(self, version: int, ranks: int) -> None:  # noqa: B027
        """Check what a load does not return, or not on one rank."""


class Training(Job):
    """``save_checkpoint`` and ``load_checkpoint`` with a small model."""

    def __init__(self, scenario: Scenario, disk: str, run: Run, context: dict[str, Any]) -> None:
        super().__init__(scenario, disk)
        self._run, self._context = run, context

    def save(self, version: int) -> dict[str, Any]:
        iteration = self.scenario.iterations[version - 1]
        expected = self.prepare(version, abs(iteration))
        self.write(version, non_persistent=iteration < 0)
        return expected

    def save_later(self, version: int) -> dict[str, Any]:
        """Save once more, an iteration later than all others."""
        expected = self.prepare(version, 1 + max(map(abs, self.scenario.iterations)))
        self.write(version)
        return expected

    @property
    def iteration(self) -> int:
        """Return the last iteration that was prepared or loaded."""
        return int(self._run.state.train_state.step)

    def prepare(self, version: int, iteration: int) -> dict[str, Any]:
        """Train up to an iteration, and return what the save of this version is to contain."""
        run = self._run
        run.train(1)
        run.state.train_state.step = iteration
        run.state.train_state.floating_point_operations_so_far = float(FLOPS + version)
        return run.fingerprint()

    def write(self, version: int, *, non_persistent: bool = False) -> None:
        """Save what was prepared, and return once it is published."""
        run = self._run
        self._go_to_disk()
        save_checkpoint(
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            FLOPS + version,
            checkpointing_context=self._context,
            non_persistent_ckpt=non_persistent,
            train_data_iterator=iterator(Loader(position_in_data(version, dist.get_rank())))
            if self.scenario.with_data
            else None,
        )
        while not is_empty_async_queue(run.state):  # as training does, which lets a thread publish
            maybe_finalize_async_save(run.state, run.checkpoint)
            time.sleep(0.001)

    def load(self) -> dict[str, Any] | None:
        run = self._run
        self._spoil()
        self._go_to_disk()
        self._context = init_checkpointing_context(run.checkpoint)
        iteration, flops = run.load(checkpointing_context=self._context)
        if (iteration, flops) == (0, 0):
            return None
        found = run.fingerprint()
        state = found["train_state"]
        assert (iteration, flops) == (state["step"], state["floating_point_operations_so_far"])
        return found

    def differences(self, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
        return differences(expected, found)

    def check_names(self) -> None:
        root = os.path.join(self.disk, ROOT)
        sealed = {os.path.dirname(seal) for seal in glob.glob(f"{root}/**/metadata.json", recursive=True)}
        for directory in sealed:
            damage = find_damage(directory)
            assert not damage, damage
        for tracker in glob.glob(f"{root}/**/latest_*", recursive=True):
            if tracker.endswith(".pt"):
                iteration = int(torch.load(tracker, weights_only=True)["step"])
            else:
                iteration = int(Path(tracker).read_text())
            directory = os.path.join(os.path.dirname(tracker), f"iter_{iteration:07}")
            assert directory in sealed, f"{os.path.basename(tracker)} names {iteration}, which is not sealed"

    def check_what_lies_beside(self, version: int, ranks: int) -> None:
        wrong = []
        # A local checkpoint contains only the rank's own position.
        looked_at = [dist.get_rank()] if self.scenario.is_local else range(ranks)
        for rank in looked_at if self.scenario.with_data else ():
            loader = Loader(-1)
            groups: Any = SimpleNamespace(dp=_Rank(rank))
            resume_dataloader(self._run.state, iterator(loader), self._context, pg_collection=groups)
            if loader.position != (expected := position_in_data(version, rank)):
                wrong.append(f"rank {rank} is at {loader.position} in the data, not {expected}")
        assert wrong == [], "; ".join(wrong)

    def _go_to_disk(self) -> None:
        checkpoint, data = self._run.checkpoint, self._run.state.cfg.dataset
        checkpoint.save = checkpoint.load = os.path.join(self.disk, ROOT)
        checkpoint.non_persistent_local_ckpt_dir = os.path.join(self.disk, "local")
        if isinstance(self.scenario.with_data, str):
            data.dataloader_save = data.dataloader_load = os.path.join(self.disk, self.scenario.with_data)
        if not self._context:
            self._context = init_checkpointing_context(checkpoint)

    def _spoil(self) -> None:
        """Overwrite everything, so that a value the load leaves alone cannot pass for loaded."""
        run = self._run
        with torch.no_grad():
            for group in run.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(0.5)
            for parameter in run.model[0].parameters():
                parameter.fill_(0.5)
            for states in _adam_states(run.optimizer):
                for value in states.values():
                    value.fill_(0.5)
        run.scheduler.num_steps = 0
        run.state.train_state = TrainState()
        torch.manual_seed(0)


def _adam_states(optimizer: Any) -> Iterator[dict[str, torch.Tensor]]:
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from member.optimizer.state.values()


class _Rank(SoloGroup):  # type: ignore[misc]
    """A position in a group that is never communicated with."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


def position_in_data(version: int, rank: int) -> int:
    return 100 * version + rank


class Tokenizer:
    """A tokenizer that saves itself as Hugging Face's do."""

    def save_pretrained(self, directory: str) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(directory, name).write_text('{"kind": "none"}')


@dataclass
class Data:
    """The data part of a configuration."""

    tokenizer: Any = None
    dataloader_save: str | None = None
    dataloader_load: str | None = None


class Dcp(Job):
    """``dcp.save`` and ``dcp.load``."""

    def save(self, version: int) -> dict[str, Any]:
        state = self._state(float(version))
        if self.scenario.makes_directory:
            os.makedirs(os.path.join(self.disk, ROOT), exist_ok=True)
        writer = FastStorageWriter(os.path.join(self.disk, ROOT))
        if self.scenario.door == "dcp-async":
            dcp.async_save(state, storage_writer=writer).result()
        else:
            dcp.save(state, storage_writer=writer)
        return state

    save_later = save

    def load(self) -> dict[str, Any] | None:
        path, state = os.path.join(self.disk, ROOT), self._state(-1.0)
        try:
            dcp.load(state, storage_reader=FastStorageReader(path))
        except CheckpointException:
            if os.path.exists(os.path.join(path, ".metadata")):
                raise
            return None
        return state

    def differences(self, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
        return differences(expected, found)

    def check_what_lies_beside(self, version: int, ranks: int) -> None:
        damage = find_damage(os.path.join(self.disk, ROOT))
        assert not damage, damage

    @staticmethod
    def _state(number: float) -> dict[str, Any]:
        tensors = {f"w{each}": torch.full((40, 100), number + each) for each in range(4)}
        return {**tensors, "step": number}


@contextlib.contextmanager
def job_of(scenario: Scenario, disk: str, seed: int = 1234) -> Iterator[Any]:
    """Yield this rank's job for a scenario."""
    if scenario.is_dcp:
        yield Dcp(scenario, disk)
        return
    needs_gpu = megatron_on_cpu() if scenario.is_local else contextlib.nullcontext()
    with needs_gpu, Run(Setup(seed=seed), **scenario.config) as run:
        run.state.cfg.dataset = Data(Tokenizer() if scenario.with_tokenizer else None)
        run.state.cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer")
        run.checkpoint.save = "set by each save"  # without one there is no queue
        run.state.initialize_async_checkpoint_worker()
        assert (run.state.async_calls_queue is not None) == run.checkpoint.async_save
        yield Training(scenario, disk, run, {})


def wait_for_deletions() -> None:
    """Wait for the threads that delete old checkpoints after background saves."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


_LEFT = re.compile(r".*\.(partial|dirty|old|ckpt_fast-new|ckpt_fast-old)")


def left_in(disk: str) -> list[str]:
    """Return files and directories of saves that were not completed, and of deletions."""
    walked = [(path, [*folders, *files]) for path, folders, files in os.walk(disk)]
    return [os.path.join(path, name) for path, names in walked for name in names if _LEFT.fullmatch(name)]
