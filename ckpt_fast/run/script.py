# SPDX-License-Identifier: Apache-2.0
"""Runs a training script that knows nothing of ckpt_fast, with ckpt_fast installed."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from typing import Any, NoReturn

from ckpt_fast.doors.install import install

_HELP = """\
usage: {prog} [--no-torch-dcp] [--no-megatron] SCRIPT [ARGUMENTS ...]
       {prog} [--no-torch-dcp] [--no-megatron] -m MODULE [ARGUMENTS ...]

Run a training script with ckpt_fast in the place of the storage of torch DCP and Megatron-Core. The script
needs no change. On several ranks: torchrun ... -m ckpt_fast.run SCRIPT [ARGUMENTS ...]

  -m MODULE       run a module, as python -m does
  --no-torch-dcp  leave torch DCP as it is
  --no-megatron   leave Megatron-Core as it is, and do not import it
"""
_LEFT_OUT = {"--no-torch-dcp": "torch_dcp", "--no-megatron": "megatron"}


def run(arguments: Sequence[str], prog: str = "python -m ckpt_fast.run") -> None:
    """Install ckpt_fast, then run a script or a module as Python itself would.

    It is ``__main__``, with ``sys.argv`` and ``sys.path`` as it knows them. What it raises is raised.

    Args:
        arguments: options, the script (or ``-m`` and a module), and what is for that.
        prog: the command, for messages.

    Raises:
        SystemExit: wrong use (2), or whatever the script exits with.
        CheckpointError: ckpt_fast cannot be installed.
    """
    rest, left_out = list(arguments), {}
    while rest and rest[0] in _LEFT_OUT:
        left_out[_LEFT_OUT[rest.pop(0)]] = False
    if rest and rest[0] in ("-h", "--help"):
        sys.stdout.write(_HELP.format(prog=prog))
        sys.exit(0)
    is_module = rest[:1] == ["-m"]
    rest = rest[1:] if is_module else rest
    if not rest or rest[0].startswith("-"):
        _misused(prog, f"unknown option {rest[0]}" if rest else "which script?")
    if is_module:
        _set_first_path(os.getcwd())
        code, file, spec = _module(prog, rest[0])
        rest[0] = file
    else:
        code, file, spec = *_script(prog, rest[0]), None
        _set_first_path(os.path.dirname(os.path.realpath(file)))
    install(**left_out)
    sys.argv[:] = rest
    _execute(code, file, spec)


def _script(prog: str, path: str) -> tuple[Any, str]:
    file = os.path.abspath(path)
    if os.path.isdir(file):
        file = os.path.join(file, "__main__.py")
    try:
        with io.open_code(file) as source:
            # The script has its own ``from __future__`` imports, and not those of this file.
            return compile(source.read(), file, "exec", dont_inherit=True), file
    except OSError as error:
        _misused(prog, f"cannot open {path}: {error.strerror}")


def _module(prog: str, name: str) -> tuple[Any, str, ModuleSpec]:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    loader: Any = spec.loader if spec is not None else None
    if spec is None or spec.origin is None or not hasattr(loader, "get_code"):
        _misused(prog, f"there is no module {name} to run")
    return loader.get_code(spec.name), spec.origin, spec


def _set_first_path(directory: str) -> None:
    """The directory that Python itself puts first, unless it is told not to (-P)."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = directory


def _execute(code: Any, file: str, spec: ModuleSpec | None) -> None:
    main = types.ModuleType("__main__")
    # Processes that the script starts find it by its spec or file, and pickle finds its classes.
    main.__dict__.update(
        __file__=file,
        __spec__=spec,
        __package__=spec.parent if spec is not None else None,
        __loader__=spec.loader if spec is not None else SourceFileLoader("__main__", file),
        __builtins__=builtins,
    )
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _misused(prog: str, problem: str) -> NoReturn:
    sys.stderr.write(f"{prog}: {problem}; see {prog} --help\n")
    sys.exit(2)
