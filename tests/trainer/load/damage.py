# SPDX-License-Identifier: Apache-2.0
"""Damages every file of a run's checkpoints in every way, and classifies the resulting loads."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from ckpt_fast import resume_dataloader
from tests.helpers import run_ranks
from tests.models import FLOPS, Run, Setup, differences, other, seed_everything
from tests.trainer.training import Loader, iterator, saved_fingerprint

Outcome = Literal["right", "older", "scratch", "error", "WRONG"]


class Damage(NamedTuple):
    """A change to one file: ``name`` is relative to the root of the checkpoints.

    ``value`` is the bit to flip, the length to truncate to, or the name of the replacement file.
    """

    kind: Literal["flip", "remove", "empty", "cut", "exchange"]
    name: str
    value: int | str = 0


class Case(NamedTuple):
    """One damage, its outcome, and the error or the names of the wrong values."""

    damage: Damage
    outcome: Outcome
    detail: str = ""


def inflict(root: str, damage: Damage) -> None:
    """Damage a file."""
    path = Path(root, damage.name)
    content = path.read_bytes()
    if damage.kind == "remove":
        path.unlink()
    elif damage.kind == "exchange":
        path.write_bytes(Path(root, str(damage.value)).read_bytes())
    elif damage.kind == "flip":
        byte, bit = divmod(int(damage.value), 8)
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :])
    else:
        path.write_bytes(content[: int(damage.value)])


def files_of(root: str, step: int) -> list[str]:
    """Return the names, relative to the root, of all files of an iteration, its data loaders and trackers."""
    directories = [os.path.join(root, parent, f"iter_{step:07d}") for parent in ("", "energon")]
    inner = [
        os.path.join(parent, name)
        for directory in directories
        for parent, _, names in os.walk(directory)
        for name in names
    ]
    trackers = [entry.path for entry in os.scandir(root) if entry.is_file()]
    return sorted(os.path.relpath(path, root) for path in inner + trackers)


def flips(root: str, name: str, every: int = 1, first: int = 0) -> list[Damage]:
    """Return flips of every n-th bit of a file."""
    return [Damage("flip", name, bit) for bit in range(first, 8 * os.path.getsize(f"{root}/{name}"), every)]


def sampled_flips(root: str, step: int, per_file: int, per_item: int) -> list[Damage]:
    """Return flips of a number of bits of every file, and of every item in the data files.

    They are spread over all bytes, more densely at the ends of files and items. Equal calls return equal
    flips.
    """
    flips: list[Damage] = []
    extents = _items(root, step)
    for name in files_of(root, step):
        nbytes = os.path.getsize(os.path.join(root, name))
        parts = [(0, nbytes, per_file)]
        parts += [(begin, end, per_item) for path, begin, end in extents if path == name]
        chance = random.Random(f"{name} {per_file} {per_item}")
        bits = {
            8 * _position(chance, begin, end, number) + chance.randrange(8)
            for begin, end, count in parts
            for number in range(count)
        }
        flips += [Damage("flip", name, bit) for bit in sorted(bits)]
    return flips


def _items(root: str, step: int) -> list[tuple[str, int, int]]:
    """Return file, start and end of every item in the data files."""
    directory = f"iter_{step:07d}"
    storage = FileSystemReader(os.path.join(root, directory)).read_metadata().storage_data
    return sorted(
        {
            (f"{directory}/{item.relative_path}", item.offset, item.offset + item.length)
            for item in storage.values()
        }
    )


def _position(chance: random.Random, begin: int, end: int, number: int) -> int:
    """In turn: anywhere, near the start, and near the end of a range."""
    edge = min(512, end - begin)
    low, high = [(begin, end), (begin, begin + edge), (end - edge, end)][number % 3]
    return chance.randrange(low, high)


def whole_file_damages(root: str, step: int, older: int) -> list[Damage]:
    """Return each file removed, emptied, cut, and exchanged with the older iteration's."""
    damages: list[Damage] = []
    for name in files_of(root, step):
        size = os.path.getsize(os.path.join(root, name))
        damages += [Damage("remove", name), Damage("empty", name), Damage("cut", name, size // 2)]
        counterpart = name.replace(f"iter_{step:07d}", f"iter_{older:07d}")
        if counterpart != name and os.path.exists(os.path.join(root, counterpart)):
            damages.append(Damage("exchange", name, counterpart))
    return damages


def outcomes(
    rank: int,
    setup: Setup,
    root: str,
    steps: tuple[int, int],
    damages: Sequence[Damage],
    config: dict[str, Any] | None = None,
    resharded: bool = False,
) -> list[Case]:
    """On every rank: inflict one damage after another, each on intact files, and load.

    Args:
        setup: the setup of the run that loads.
        root: the root of ``training.save_steps``, with the fingerprints beside it.
        steps: the newest iteration, and the one to fall back to.
        config: fields of CheckpointConfig besides ``load``.
        resharded: the layout differs from the one that saved. The reference is then a load of the intact
            files, because the ranks that saved had other pieces.
    """
    cases = []
    with Run(other(setup), load=root, **(config or {})) as run:
        run.train(1)
        if resharded:
            expected = [_values_of_sound_files(run, step) for step in steps]
            assert differences(*expected)
        else:
            expected = [saved_fingerprint(root, step, rank) for step in steps]
        for damage in damages:
            path = Path(root, damage.name)
            content = path.read_bytes()
            _on_rank_0(rank, lambda damage=damage: inflict(root, damage))
            _scramble(run)
            cases.append(_load(run, damage, expected))
            _on_rank_0(rank, lambda path=path, content=content: path.write_bytes(content))
    return cases


def _values_of_sound_files(run: Run, step: int) -> dict[str, Any]:
    run.checkpoint.ckpt_step = step
    _scramble(run)
    context: dict[str, Any] = {}
    assert run.load(checkpointing_context=context) == (step, FLOPS)
    run.checkpoint.ckpt_step = None
    return _found(run, context)


def _found(run: Run, context: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint, and the data position that the context leads to."""
    loader = Loader(-1)
    try:
        resume_dataloader(run.state, iterator(loader), context)
        position: Any = loader.position
    except Exception as error:  # ranks beyond those that saved have no positions
        position = type(error).__name__
    return {**run.fingerprint(), "data": position}


def _load(run: Run, damage: Damage, expected: list[dict[str, Any]]) -> Case:
    context: dict[str, Any] = {}
    try:
        result = run.load(checkpointing_context=context)
    except (Exception, SystemExit) as error:
        return Case(damage, "error", f"{type(error).__name__}: {error}")
    found = _found(run, context) if "data" in expected[0] else run.fingerprint()
    wrong = [differences(values, found) for values in expected]
    if result == (0, 0):
        return Case(damage, "scratch")
    for outcome, values, names in zip(("right", "older"), expected, wrong, strict=True):
        if not names and result == (values["train_state"]["step"], FLOPS):
            return Case(damage, outcome)  # type: ignore[arg-type]
    return Case(damage, "WRONG", ", ".join(wrong[0][:5]))


def _scramble(run: Run) -> None:
    """Destroy everything that the last load restored."""
    with torch.no_grad():
        for parameter in run.model[0].parameters():
            parameter.fill_(7.0)
        for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
            for group in part.optimizer.param_groups:
                group["lr"], group["weight_decay"] = 7.0, 7.0
                for parameter in group["params"]:
                    parameter.fill_(7.0)
                    for value in part.optimizer.state[parameter].values():
                        if isinstance(value, torch.Tensor):
                            value.fill_(7.0)
    run.scheduler.num_steps = 1_000_000
    seed_everything(99)
    run.state.train_state.step = 1_000_000
    run.state.train_state.consumed_train_samples = 1_000_000


def _on_rank_0(rank: int, action: Any) -> None:
    dist.barrier()
    if rank == 0:
        action()
    dist.barrier()


def same_on_all(
    ranks: int,
    setup: Setup,
    root: str,
    steps: tuple[int, int],
    damages: list[Damage],
    resharded: bool = False,
) -> list[Case]:
    """Return the ``outcomes`` of rank 0, which are those of all ranks."""
    first: list[Case]
    first, *others = run_ranks(outcomes, ranks, setup, root, steps, damages, {}, resharded, timeout_s=7000)
    for cases in others:
        assert [case.outcome for case in cases] == [case.outcome for case in first]
    return first


def count(cases: Iterable[Case]) -> dict[str, int]:
    """Return how often each outcome occurred."""
    return dict(Counter(case.outcome for case in cases))


def unwanted(cases: Iterable[Case], *wanted: Outcome) -> list[Case]:
    """Return the cases with any other outcome."""
    return [case for case in cases if case.outcome not in wanted]
