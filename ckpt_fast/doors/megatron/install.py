# SPDX-License-Identifier: Apache-2.0
"""Our strategies in the place of Megatron-Core's own, for programs that build strategies themselves."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import TracebackType

from ckpt_fast import compat
from ckpt_fast.doors.megatron.common_save import FastCommonSaveStrategy
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.doors.megatron.torch_dist import FastSaveStrategy
from ckpt_fast.errors import CheckpointError

_REPLACEMENTS: dict[type, type] = {
    compat.TorchDistSaveShardedStrategy: FastSaveStrategy,
    compat.TorchDistLoadShardedStrategy: FastLoadStrategy,
    compat.FullyParallelSaveStrategyWrapper: FastParallelSaveWrapper,
}
if compat.TorchCommonSaveStrategy is not None:
    _REPLACEMENTS[compat.TorchCommonSaveStrategy] = FastCommonSaveStrategy
_STOCK_NAMES = {stock.__name__ for stock in _REPLACEMENTS}
# What of the stock classes dist_checkpointing and the wrappers call.
_METHODS = {
    compat.TorchDistSaveShardedStrategy: ("save", "async_save"),
    compat.TorchDistLoadShardedStrategy: (
        "load",
        "load_tensors_metadata",
        "load_sharded_metadata",
        "remove_sharded_tensors",
    ),
    compat.FullyParallelSaveStrategyWrapper: ("apply_saving_parallelization",),
    compat.TorchCommonSaveStrategy: ("save_common",),
}


class Installation:
    """The changes that ``install`` made. As a context manager it undoes them at the end of the block.

    Attributes:
        changed: the full names that stand for our classes now, as "module.name".
    """

    def __init__(self, changed: tuple[str, ...]) -> None:
        self.changed = changed

    def __repr__(self) -> str:
        return "\n".join((f"<ckpt_fast took the place of {len(self.changed)} names:", *self.changed)) + ">"

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        uninstall()


_installed: list[tuple[str, str]] = []  # module and name of each global that was changed


def install() -> Installation:
    """Let code that builds Megatron-Core's ``torch_dist`` strategies build ours. Local; on every rank.

    In every module imported so far, the global names of Megatron-Core's save strategy, load strategy and
    fully parallel save wrapper (before 0.19 also: of its strategy for the common state) are bound to our
    classes; modules imported later get those. So ``dist_checkpointing.save`` and ``load`` without a strategy,
    the ``get_default_*_sharded_strategy`` functions, and Megatron-LM's training loop use the pipeline. Call
    it before strategies are built. Calling it again extends it to modules imported since.

    Returns:
        What was changed; ``with ckpt_fast.install():`` undoes it at the end of the block.

    Raises:
        CheckpointError: the installed Megatron-Core has strategies of an interface that is not known here;
            nothing is changed then.
    """
    for stock, ours in _REPLACEMENTS.items():
        _require_known(stock, ours)
    for stock, ours in _REPLACEMENTS.items():
        _installed.extend(_rebind(stock, ours))
    _replace_common_strategies(compat.TorchCommonSaveStrategy, FastCommonSaveStrategy)
    return Installation(tuple(f"{module}.{name}" for module, name in _installed))


def uninstall() -> tuple[str, ...]:
    """Undo ``install``; nothing, if it was not called. Returns the names that are Megatron-Core's again."""
    if not _installed:
        return ()
    changed = set(_installed)
    _installed.clear()
    restored: list[tuple[str, str]] = []
    _replace_common_strategies(FastCommonSaveStrategy, compat.TorchCommonSaveStrategy)
    for stock, ours in _REPLACEMENTS.items():
        # Modules imported since have the stock name for our class as well; ours by its own name stays.
        restored += _rebind(
            ours, stock, lambda module, name: name in _STOCK_NAMES or (module, name) in changed
        )
    return tuple(f"{module}.{name}" for module, name in restored)


def _rebind(
    old: type, new: type, is_meant: Callable[[str, str], bool] = lambda _module, _name: True
) -> list[tuple[str, str]]:
    """Bind every global that is ``old``, outside this package, to ``new``: (module, name) of each."""
    rebound = []
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == __package__.partition(".")[0]:
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old and is_meant(module_name, name):
                setattr(module, name, new)
                rebound.append((module_name, name))
    return rebound


def _replace_common_strategies(old: type | None, new: type | None) -> None:
    """Replace what Megatron-Core has built already, to take it where no strategy is named."""
    for strategies in compat.default_strategies.values():
        for place, strategy in strategies.items():
            if old is not None and new is not None and type(strategy) is old:
                strategies[place] = new(*place)


def _require_known(stock: type, ours: type) -> None:
    """Raise unless our class takes every argument that the stock one does, by the same names."""
    for method in _METHODS[stock]:
        theirs = getattr(stock, method, None)
        if theirs is None:
            problem = f"{stock.__name__} has no method {method}"
        else:
            known = inspect.signature(getattr(ours, method)).parameters
            unknown = [name for name in inspect.signature(theirs).parameters if name not in known]
            if not unknown:
                continue
            problem = f"{stock.__name__}.{method} takes {', '.join(unknown)}"
        raise CheckpointError(
            f"the installed megatron-core is of a generation that ckpt_fast does not know: {problem}. "
            "Nothing was installed. 0.16 to 0.19 are known; newer ones need a newer ckpt_fast."
        )
