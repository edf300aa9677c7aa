# SPDX-License-Identifier: Apache-2.0
"""Training runs of Megatron-Core models through ``save_checkpoint`` and ``load_checkpoint``."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state

from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save, save_checkpoint
from ckpt_fast.errors import CheckpointError
from ckpt_fast.trainer.save.async_save import is_empty_async_queue
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu, other, seed_everything
from tests.soak import faults
from tests.soak.faults import Fault, MistakeError, flip, is_on_this_rank
from tests.soak.subject import Subject
from tests.trainer.save.reuse import mutations
from tests.trainer.save.reuse.test_reuse import train

_SETUPS = (
    Setup(layers=2, distributed=True, bf16=True),
    Setup(distributed=True),
    Setup(layers=2, bf16=True, parallel_save=False),
    Setup(distributed=True, bf16=True, reshardable=True),
)
# What may happen to a run. Afterwards tensors may share memory, or no longer: earlier saves may not fit.
_CHANGES = (
    *(mutations.parameter_replaced, mutations.memory_replaced, mutations.data_swapped),
    *(mutations.moments_swapped, mutations.state_tensor_replaced, mutations.state_recreated),
    *(mutations.layers_frozen, mutations.parameters_swapped, mutations.buffer_changed, mutations.group_added),
)
# Megatron-Core finds a fully reshardable optimizer's parameters by identity, and counts those of a plain one.
_NOT_EVERYWHERE = (mutations.parameter_replaced, mutations.group_added)
_MOST_SAVED = 12


class _Saved(NamedTuple):
    """A save; ``is_certain`` unless it failed, and may have been published all the same."""

    version: int
    iteration: int
    tier: str
    fingerprint: dict[str, Any]
    structure: int
    is_certain: bool


class Runs(Subject):
    """One run after the other, each resumed several times."""

    def __init__(self, root: str, counts: Counter[str]) -> None:
        super().__init__(root, counts)
        self._run: Run | None = None
        self._version = 0
        self._iteration = 0  # of the save before
        self._stack = contextlib.ExitStack()

    def begin(self, chance: Random) -> None:
        """Start a run from scratch."""
        self.empty()
        self._saved: list[_Saved] = []
        self._structure = 0
        # Where the weights are the main parameters, ``train`` does not change them on all ranks alike.
        self._setup = chance.choice([each for each in _SETUPS if each.bf16 or dist.get_world_size() == 1])
        tiers = [None, "global"] + (["local"] if compat.HAVE_RESIL else [])
        self._config: dict[str, Any] = {
            "save": f"{self.root}/run",
            "load": f"{self.root}/run",
            "async_save": True,
            "async_strategy": "mcore",
            "most_recent_k": chance.choice((1, 2, 3)),
            "non_persistent_ckpt_type": chance.choice(tiers),
            "non_persistent_local_ckpt_dir": f"{self.root}/local",
        }
        self._start(chance)

    def end(self) -> None:
        """Leave the run."""
        run, self._run = self._run, None
        if run is None:
            return
        run.checkpoint.async_save = True
        with self._stack:
            try:
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
            except CheckpointError:
                self.counts["errors at the end"] += 1

    def step(self, chance: Random) -> None:
        """Do one thing; saves are the most frequent."""
        how = chance.random()
        if how < 0.65:
            self._save(chance)
        elif how < 0.8:
            self.doing = "load"
            self._load(chance)
        elif how < 0.9:
            self._damage(chance)
        elif how < 0.97 and not self._structure:
            self.doing = "resume"
            self.end()
            self._start(chance)
            self._load(chance)
        elif how > 0.97:
            self._restart(chance)

    def _restart(self, chance: Random) -> None:
        self.doing += ", from scratch"
        self.end()
        self.begin(chance)

    def _start(self, chance: Random) -> None:
        config = {
            **self._config,
            "ckpt_assume_constant_structure": chance.random() < 0.6,
            "storage_writers_per_rank": chance.choice((1, 1, 3)),
            "on_save_failure": chance.choice(("raise", "continue")),
            "max_failed_saves": 1000,
        }
        self._setup = other(self._setup)
        with megatron_on_cpu():
            run = self._stack.enter_context(Run(self._setup, **config))
            run.train(1)
            compat.give_adam_its_state(run.optimizer)
            self._context = init_checkpointing_context(run.checkpoint)
        run.state.initialize_async_checkpoint_worker()
        self._run = run

    def _save(self, chance: Random) -> None:
        run = self._run
        assert run is not None
        self._version += 1
        tier = chance.choice(("persistent", run.checkpoint.non_persistent_ckpt_type or "persistent"))
        run.checkpoint.async_save = chance.random() < 0.6
        run.checkpoint.on_save_in_progress = chance.choice(("wait", "queue"))
        self.doing = f"save {tier}{' in the background' if run.checkpoint.async_save else ''}"
        must_succeed = self._maybe_change(run, chance)
        if not self._saved or tier == "local" or chance.random() > 0.15:
            self._iteration += 1
        iteration = self._iteration
        self._train(run, chance)
        run.state.train_state.step = iteration
        run.state.train_state.floating_point_operations_so_far = float(FLOPS + self._version)
        saved = _Saved(self._version, iteration, tier, self._fingerprint(run), self._structure, True)
        fault = None if must_succeed else self._fault(run, chance)
        before = run.state.async_calls_queue.failures.count
        succeeded = self.attempt(chance, fault, lambda: self._save_now(run, chance, tier == "persistent"))
        if not succeeded:
            self._give_up(run)
        failures = run.state.async_calls_queue.failures.count
        self._note(saved._replace(is_certain=succeeded and (not failures or failures < before)))
        assert self._saved[-1].is_certain or fault is not None, "the save has failed without a reason"
        self.counts["saves"] += 1

    def _note(self, saved: _Saved) -> None:
        if saved.is_certain:
            place = (saved.tier, saved.iteration)
            self._saved = [each for each in self._saved if (each.tier, each.iteration) != place]
        self._saved = [*self._saved, saved][-_MOST_SAVED:]

    def _maybe_change(self, run: Run, chance: Random) -> bool:
        """Change the run or not; return whether it was, and earlier saves may not fit any more."""
        if chance.random() > 0.1:
            return False
        change = chance.choice(_CHANGES)
        if change in _NOT_EVERYWHERE and not (run.setup.distributed and not run.setup.reshardable):
            return False
        self.doing += f", after {change.__name__}"
        change(run, Random(chance.random()))
        self._structure += 1
        return True

    def _save_now(self, run: Run, chance: Random, is_persistent: bool) -> None:
        with self._surroundings(run):
            save_checkpoint(
                run.state,
                run.model,
                run.optimizer,
                run.scheduler,
                FLOPS + self._version,
                checkpointing_context=self._context,
                non_persistent_ckpt=not is_persistent,
            )
            position = vars(run.state.train_state).copy()
            self._train(run, chance)  # what is saved does not change any more
            vars(run.state.train_state).update(position)
            blocking = chance.random() < 0.5
            while not is_empty_async_queue(run.state):
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=blocking)

    @staticmethod
    def _surroundings(run: Run) -> Any:
        """Local checkpoints, and the fully reshardable state, ask for a GPU."""
        needs = run.checkpoint.non_persistent_ckpt_type == "local" or run.setup.reshardable
        return megatron_on_cpu() if needs else contextlib.nullcontext()

    @staticmethod
    def _train(run: Run, chance: Random) -> None:
        train(run)
        seed_everything(chance.randrange(1 << 30))

    @staticmethod
    def _fingerprint(run: Run) -> dict[str, Any]:
        buffers = mutations.model_of(run).named_buffers()
        extra = {f"buffer.{name}": each.clone() for name, each in buffers if name.endswith("auxiliary")}
        return {**run.fingerprint(), **extra}

    def _fault(self, run: Run, chance: Random) -> Fault | None:
        if chance.random() > 0.3:
            return None
        found: list[Fault] = [faults.failing_call, faults.full_disk, faults.no_room]
        if not run.setup.reshardable:  # it is collected with collectives, of Megatron-Core's own
            found.append(self._failing_collection)
        if run.checkpoint.async_save:
            found.append(faults.deadline)
        if dist.get_world_size() == 1:
            found += [faults.interruption] * 2
        return chance.choice(found)

    def _failing_collection(self, chance: Random, action: Callable[[], object]) -> bool:
        """The optimizer's state cannot be collected, on one rank."""
        assert self._run is not None
        failing = mock.patch.object(
            self._run.optimizer, "sharded_state_dict", side_effect=MistakeError("mistake")
        )
        with failing if is_on_this_rank(chance) else contextlib.nullcontext():
            action()
        return True

    @staticmethod
    def _give_up(run: Run) -> None:
        run.checkpoint.async_save = True
        while not is_empty_async_queue(run.state):
            with contextlib.suppress(CheckpointError):
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)

    def _load(self, chance: Random, damaged: _Saved | None = None) -> None:
        """Load the newest; ``damaged`` may be, and an older one be loaded."""
        run = self._run
        assert run is not None
        self._train(run, chance)
        if chance.random() < 0.5:
            with megatron_on_cpu():
                self._context = init_checkpointing_context(run.checkpoint)
        self.counts["loads"] += 1
        try:
            with self._surroundings(run):
                iteration, flops = run.load(checkpointing_context=self._context)
        except CheckpointError:
            if damaged is None or self._is_there(damaged.version):
                raise
            self.counts["loads refused"] += 1
            return self._restart(chance)
        if (iteration, flops) == (0, 0):
            assert not self._is_there(damaged.version if damaged is not None else None), "nothing is found"
            return self._restart(chance)
        version = int(flops) - FLOPS
        saved = [each for each in self._saved if each.version == version]
        assert saved, f"save {version}, of iteration {iteration}, is none of {self._described()}"
        if saved[0].structure != self._structure:  # it fits, as far as names and shapes tell
            # Of a persistent and a recovery checkpoint of one iteration, a load may find the older one.
            is_newest = version in self._newest(None)
            assert damaged is not None or is_newest, f"save {version} of {self._described()}"
            return self._restart(chance)
        wrong = differences(saved[0].fingerprint, self._fingerprint(run))
        assert not wrong, f"save {version} is loaded, but for {wrong}"
        assert version in self._newest(damaged), f"save {version} of {self._described()}"
        if damaged is not None and version < damaged.version:
            self.counts["loads of an older one"] += 1
        self._saved = [each for each in self._saved if each.iteration <= iteration]
        self._iteration = iteration
        return None

    def _described(self) -> list[str]:
        return [f"{s.version}: {s.tier} {s.iteration}{'' if s.is_certain else '?'}" for s in self._saved]

    def _newest(self, damaged: _Saved | None) -> set[int]:
        """Return the saves that a load may find."""
        allowed: set[int] = set()
        last: int | None = None
        for each in reversed(self._saved):
            if last is not None and each.iteration != last:
                break
            allowed.add(each.version)
            if each.is_certain and each is not damaged and last is None and self._exists(each):
                last = each.iteration
        return allowed

    def _exists(self, saved: _Saved) -> bool:
        """Collective. Whether it was deleted on no rank: it may be too old, or replaced by a newer one."""
        return not faults.anywhere(not os.path.exists(os.path.join(self._directory(saved), ".metadata")))

    def _directory(self, saved: _Saved) -> str:
        if saved.tier == "local":
            rank = dist.get_rank()
            return f"{self.root}/local/{rank}/iter_{saved.iteration:07d}_{rank}_local"
        middle = "run/non_persistent" if saved.tier == "global" else "run"
        return f"{self.root}/{middle}/iter_{saved.iteration:07d}"

    def _is_there(self, but: int | None = None) -> bool:
        """Whether a save of this structure is there for certain."""
        return any(
            each.is_certain
            and each.version != but
            and each.structure == self._structure
            and self._exists(each)
            for each in self._saved
        )

    def _damage(self, chance: Random) -> None:
        """Flip a bit in the newest; of a local one on every rank, in its own files."""
        if not self._saved or not self._saved[-1].is_certain or not self._exists(self._saved[-1]):
            return
        newest = self._saved[-1]
        path, back = flip(self._directory(newest), chance)
        self.doing = f"flip in {newest.tier} {os.path.basename(path)}"
        self.counts["fault: flipped bit"] += 1
        self._load(chance, newest)
        if any(each is newest for each in self._saved):  # the bit was not read
            back()


@contextlib.contextmanager
def groups_kept() -> Any:
    """A block in which all runs have the same parallel groups: torch frees none before the end."""
    initialize = parallel_state.initialize_model_parallel

    def initialize_once(*arguments: Any, **options: Any) -> None:
        if not parallel_state.model_parallel_is_initialized():
            initialize(*arguments, **options)

    with (
        mock.patch.object(parallel_state, "initialize_model_parallel", initialize_once),
        mock.patch.object(parallel_state, "destroy_model_parallel"),
    ):
        yield
