# SPDX-License-Identifier: Apache-2.0
"""Dotted names in a configuration file and the Python objects they stand for.

A ``run_config.yaml`` travels with a checkpoint, so it is as trustworthy as whoever made the checkpoint.
Reading one therefore builds nothing but

* dataclasses and enum members of the allowed packages, by their fields;
* Hugging Face configurations, through their ``from_dict``;
* references to functions of ``torch.nn``, ``megatron`` and to torch's own operators and dtypes, which are
  handed out (or bound to arguments in a ``functools.partial``), never called.

Anything else is refused before its module is imported.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import itertools
import logging
import re
import sys
import types
from typing import Any

import torch

from ckpt_fast.errors import CheckpointMismatchError, UnsafeCheckpointError

logger = logging.getLogger(__name__)

TARGET, CALL, PARTIAL, ARGS, NAME = "_target_", "_call_", "_partial_", "_args_", "_name_"

_CLASS_PREFIXES = ["ckpt_fast.", "megatron.", "torch.", "nvidia_resiliency_ext."]
_FUNCTION_PREFIXES = ["torch.nn.", "megatron."]
_HF_PREFIX = "transformers."
_FROM_DICT = ".from_dict"

# Files of Megatron Bridge name its classes; ours have the same fields.
_BRIDGE = "megatron.bridge."
_OURS_FOR_BRIDGES = {
    "megatron.bridge.training.config.ConfigContainer": "ckpt_fast.config.ConfigContainer",
    "megatron.bridge.training.config.CheckpointConfig": "ckpt_fast.config.CheckpointConfig",
    "megatron.bridge.training.config.LoggerConfig": "ckpt_fast.config.LoggerConfig",
    "megatron.bridge.training.config.RNGConfig": "ckpt_fast.config.RNGConfig",
    "megatron.bridge.training.config.DistributedInitConfig": "ckpt_fast.config.DistributedInitConfig",
    "megatron.bridge.training.tokenizers.config.TokenizerConfig": "ckpt_fast.config.TokenizerConfig",
}


class ForeignConfig(types.SimpleNamespace):
    """The fields of a configuration class that cannot be imported here, under the same attribute names.

    ``_target_`` keeps the class's dotted name, so writing the object again gives the same YAML.
    """


def register_config_target(prefix: str) -> None:
    """Allow configuration files to name classes and functions of a package of your own.

    Args:
        prefix: a dotted name ending in a dot, for instance ``"mypackage.configs."``. Its dataclasses and
            enums will be constructed and its functions handed out when a file names them.
    """
    if not prefix.endswith(".") or not prefix[:-1].replace(".", "").isidentifier():
        raise ValueError(
            f"prefix {prefix!r}: use a package's dotted name followed by a dot, as in 'mypackage.'"
        )
    for prefixes in (_CLASS_PREFIXES, _FUNCTION_PREFIXES):
        if prefix not in prefixes:
            prefixes.append(prefix)


def dotted_name(value: Any) -> str | None:
    """The public dotted name under which a class or function can be imported; None when there is none."""
    # Operators have private homes (torch._C._nn.gelu) and public names (torch.nn.functional.gelu).
    homes = (getattr(value, "__module__", None) or "", "torch.nn.functional", "torch")
    names = (getattr(value, "__qualname__", None), getattr(value, "__name__", None))
    for home, name in itertools.product(homes, names):
        target = f"{home}.{name}"
        if home not in sys.modules or "._" in target:
            continue
        try:
            if functools.reduce(getattr, str(name).split("."), sys.modules[home]) is value:
                return target
        except AttributeError:
            continue
    return None


def build(node: dict[str, Any]) -> Any:
    """The object that a mapping with a ``_target_`` stands for; its values are built already.

    Raises:
        UnsafeCheckpointError: the target is not allowed.
        CheckpointMismatchError: the target refuses the values.
    """
    target = node[TARGET]
    if not isinstance(target, str):
        raise CheckpointMismatchError(f"a configuration file names {target!r} as a target: not a dotted name")
    target = _OURS_FOR_BRIDGES.get(target, target)
    fields = {key: value for key, value in node.items() if key not in (TARGET, CALL, PARTIAL, ARGS, NAME)}
    args = node.get(ARGS) or []
    if node.get(PARTIAL):
        return functools.partial(_function(target), *args, **fields)
    if node.get(CALL) is False:
        return _reference(target)
    if target.startswith(_HF_PREFIX) and target.endswith(_FROM_DICT):
        return _hf_config(target, fields)
    _check(target, _CLASS_PREFIXES)
    try:
        cls = _locate(target)
    except ImportError as error:
        logger.debug("%s cannot be imported (%s): its fields are kept as they are", target, error)
        return ForeignConfig(**{TARGET: node[TARGET], **fields})
    return _instance(cls, target, node.get(NAME), args, fields)


def _instance(cls: Any, target: str, member: Any, args: list[Any], fields: dict[str, Any]) -> Any:
    if not isinstance(cls, type) or not _allowed(f"{cls.__module__}.", _CLASS_PREFIXES):
        raise _refusal(target, "it is not a class of an allowed package")
    if issubclass(cls, enum.Enum):
        if member in cls.__members__:
            return cls[member]
        if len(args) == 1:
            return cls(args[0])
        raise CheckpointMismatchError(f"{target} has no member {member!r}")
    if not dataclasses.is_dataclass(cls):
        raise _refusal(target, "only dataclasses and enums are built from a configuration file")
    declared = {item.name: item for item in dataclasses.fields(cls)}
    unknown = fields.keys() - declared.keys()
    if unknown:
        logger.warning("%s has no fields %s here: ignored", target, ", ".join(sorted(map(str, unknown))))
    known = {key: value for key, value in fields.items() if key in declared and declared[key].init}
    try:
        return cls(**{key: _as_declared(value, declared[key].type) for key, value in known.items()})
    except TypeError as error:
        raise CheckpointMismatchError(
            f"{target} cannot be built from the configuration file: {error}"
        ) from error


def _as_declared(value: Any, annotation: Any) -> Any:
    """YAML has lists only; a field that is declared as a tuple or set gets one."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    words = set(re.findall(r"\w+", text.lower()))
    if isinstance(value, list) and not words & {"list", "sequence", "any"}:
        for kind in (tuple, frozenset, set):
            if kind.__name__ in words:
                return kind(value)
    return value


def _reference(target: str) -> Any:
    """A dtype, class or function by name."""
    owner, _, name = target.rpartition(".")
    found = getattr(torch, name, None) if owner == "torch" else None
    if isinstance(found, (torch.dtype, types.BuiltinFunctionType)):
        return found
    if _allowed(target, _FUNCTION_PREFIXES) or not _allowed(target, _CLASS_PREFIXES):
        return _function(target)
    _check(target, _CLASS_PREFIXES)
    found = _locate(target)
    if not isinstance(found, type) or not _allowed(f"{found.__module__}.", _CLASS_PREFIXES):
        raise _refusal(target, "it is not a class of an allowed package")
    return found


def _function(target: str) -> Any:
    target = target.replace("torch._C._nn.", "torch.nn.functional.")
    _check(target, _FUNCTION_PREFIXES)
    found = _locate(target)
    home = getattr(found, "__module__", None) or ""
    # torch.nn.functional re-exports operators whose own module is private.
    operator = isinstance(found, types.BuiltinFunctionType) and home in ("torch._C._nn", "torch._C", "")
    if not callable(found) or not (operator or _allowed(f"{home}.", _FUNCTION_PREFIXES)):
        raise _refusal(target, "it is not a function of an allowed package")
    return found


def _hf_config(target: str, fields: dict[str, Any]) -> Any:
    target = target.removesuffix(_FROM_DICT)
    _check(target, [_HF_PREFIX])
    try:
        cls = _locate(target)
    except ImportError as error:
        logger.warning("%s cannot be imported (%s): left out of the configuration", target, error)
        return None
    theirs = isinstance(cls, type) and _allowed(f"{cls.__module__}.", [_HF_PREFIX])
    if not theirs or not cls.__name__.endswith("Config") or not hasattr(cls, "from_dict"):
        raise _refusal(target, "it is not a configuration of transformers")
    return cls.from_dict(fields.get("config_dict", {}))


def _locate(target: str) -> Any:
    """Import the longest module that ``target`` begins with and walk the rest.

    Raises:
        ImportError: no such module, or it has no such attribute.
    """
    if target.startswith(_BRIDGE) and "megatron.bridge" not in sys.modules:
        raise ImportError("this program does not use Megatron Bridge")
    parts = target.split(".")
    for split in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:split])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue
            raise
        try:
            return functools.reduce(getattr, parts[split:], module)
        except AttributeError as error:
            raise ImportError(f"{name} has no {'.'.join(parts[split:])}") from error
    raise ImportError(f"no module named {parts[0]!r}")


def _allowed(target: str, prefixes: list[str]) -> bool:
    return any(target.startswith(prefix) for prefix in prefixes)


def _check(target: str, prefixes: list[str]) -> None:
    if not _allowed(target, prefixes):
        raise _refusal(target, "its package is not allowed")
    if any(not part.isidentifier() or part.startswith("_") for part in target.split(".")):
        raise _refusal(target, "private names are not allowed")


def _refusal(target: str, reason: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"the configuration file names {target!r}, and {reason}. If you trust the file's origin, call "
        "ckpt_fast.register_config_target('<package>.') first, or remove the entry."
    )
