# SPDX-License-Identifier: Apache-2.0
"""``install``: programs that save with torch DCP or Megatron-Core, or through a framework, use ckpt_fast."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Sequence
from types import TracebackType

from ckpt_fast.doors.substitution import Substitution

logger = logging.getLogger(__name__)


class Installation:
    """What ``install`` has changed. As a context manager it undoes at the end of the block what it has made.

    Attributes:
        changed: the full names of what makes objects of ours now, whichever call of ``install`` did it.
    """

    def __init__(self) -> None:
        self.changed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join((f"<ckpt_fast took the place of {len(self.changed)} names:", *self.changed)) + ">"

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _undo([door for door, (owner, _) in _installed.items() if owner is self])


# By door: the installation that made the changes, and the changes.
_installed: dict[str, tuple[Installation, Sequence[Substitution]]] = {}


def install(*, torch_dcp: bool | None = None, megatron: bool | None = None) -> Installation:
    """Let code that saves with torch DCP or Megatron-Core use ckpt_fast, unchanged. Local; on every rank.

    Torch DCP: ``dcp.save``, ``async_save`` and ``load`` with a path or an ``msc://`` URL (``checkpoint_id``),
    and calls of ``FileSystemWriter`` and ``FileSystemReader``, wherever those have been imported, go through
    the pipeline. Background saves stage into ckpt_fast's memory, and none of them starts a process. Saves
    without a planner of the framework's own plan once. Other URLs, Hugging Face's format, stream transforms,
    and classes derived from torch's are left to torch.

    Megatron-Core: calls of its ``torch_dist`` save strategy, load strategy and fully parallel save wrapper
    (before 0.19 also: of its strategy for the common state) make ours. So ``dist_checkpointing.save`` and
    ``load`` without a strategy, the ``get_default_*_sharded_strategy`` functions, and Megatron-LM's training
    loop use the pipeline.

    The classes stay what they are, and are derived from as before. Objects made earlier stay as well. Call
    it before the training loop makes any. Calling it again changes nothing that is changed already.

    Args:
        torch_dcp: whether to change torch DCP; None: yes.
        megatron: whether to change Megatron-Core; None: if it is installed. That imports it.

    Returns:
        What is changed; ``with ckpt_fast.install():`` undoes it at the end of the block, but for what an
        earlier call had changed.

    Raises:
        CheckpointError: the installed version has something of an interface that is not known here; the text
            says which. Nothing is changed then.
        ImportError: ``megatron`` is true, and Megatron-Core is not installed.
    """
    wanted = {
        "torch DCP": torch_dcp is not False,
        "Megatron-Core": megatron or (megatron is None and _is_installed("megatron.core")),
    }
    missing = [door for door, is_wanted in wanted.items() if is_wanted and door not in _installed]
    found = {door: _substitutions(door) for door in missing}
    for substitutions in found.values():
        for each in substitutions:
            each.check()
    installation = Installation()
    for door, substitutions in found.items():
        _installed[door] = installation, substitutions
        for each in substitutions:
            each.make()
    if found:
        names = [each.name for substitutions in found.values() for each in substitutions]
        logger.info("%s in this process saves and loads with ckpt_fast: %s", " and ".join(found), names)
    installation.changed = tuple(each.name for _, all_of in _installed.values() for each in all_of)
    return installation


def uninstall() -> tuple[str, ...]:
    """Undo ``install``, if it was called. Returns the names of what makes stock objects again."""
    return _undo(list(_installed))


def _undo(doors: Sequence[str]) -> tuple[str, ...]:
    names = []
    for door in doors:
        _, substitutions = _installed.pop(door)
        for each in substitutions:
            each.undo()
            names.append(each.name)
    return tuple(names)


def _substitutions(door: str) -> Sequence[Substitution]:
    # Whoever has only one of the two waits for the import of none but that.
    if door == "torch DCP":
        from ckpt_fast.doors.dcp.substitutions import substitutions as of_torch_dcp

        return of_torch_dcp()
    from ckpt_fast.doors.megatron.substitutions import substitutions as of_megatron_core

    return of_megatron_core()


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package that it is in
        return importlib.util.find_spec(module) is not None
    return False
