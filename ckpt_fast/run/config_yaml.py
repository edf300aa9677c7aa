# SPDX-License-Identifier: Apache-2.0
"""Configuration objects as plain data and YAML: the content of ``run_config.yaml``.

Each dataclass becomes a mapping of its fields with the class's dotted name under ``_target_``; enums, dtypes,
functions and partials become small mappings of the kind that Megatron's own readers understand. An object of
any other kind becomes ``{_type_: ..., _repr_: ...}``: a note for people, read back as None.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import marshal
import os
import sys
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.documents import parse_yaml
from ckpt_fast.run import config_targets
from ckpt_fast.run.config_targets import ARGS, CALL, NAME, PARTIAL, TARGET, ForeignConfig
from ckpt_fast.storage.commit import write_file_atomic
from ckpt_fast.storage.small_files import LARGEST_TEXT, read_small_file

logger = logging.getLogger(__name__)

# In a dataclass field's metadata: the value is not to be written anywhere.
SECRET = "ckpt_fast_secret"

_TYPE, _REPR = "_type_", "_repr_"
_REPR_LIMIT = 200
_T = TypeVar("_T")
_SCALARS = frozenset((str, int, float, bool))
# That in C is five times as fast.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def to_dict(config: Any) -> dict[str, Any]:
    """``config`` (a dataclass, or an object that describes itself) as nested dicts; leaves as they are.

    Secrets, and fields whose names begin with an underscore, are left out.
    """
    described: dict[str, Any] = _describe(config, _keep, ())
    return described


def to_yaml(config: Any) -> str:
    """The text of ``run_config.yaml`` for our container or Megatron Bridge's; never fails on a value."""
    return as_yaml(plain(config))


def plain(config: Any) -> Any:
    """``config`` as it is now, in new containers and the types that YAML's safe reader knows."""
    return _describe(config, _plain, ())


_last_text = (b"", "")  # what was described, and as what


def as_yaml(described: Any) -> str:
    """The text of what ``plain`` returned; made once for a configuration that stays the same."""
    global _last_text
    try:
        content = marshal.dumps(described, 2)
    except ValueError:  # it has dates
        return _dumped(described)
    known, text = _last_text
    if known != content:
        text = _dumped(described)
        _last_text = content, text
    return text


def _dumped(described: Any) -> str:
    # Escaped, because PyYAML writes some line breaks of Unicode as they are and reads them as spaces.
    options = {"default_flow_style": False, "sort_keys": False, "allow_unicode": False}
    try:
        return str(yaml.dump(described, Dumper=_Dumper, **options))
    except UnicodeEncodeError:  # a path that is no UTF-8
        return str(yaml.dump(described, Dumper=yaml.SafeDumper, **options))


def write_yaml(config: Any, path: str) -> None:
    """Create or replace ``path``. See ``ConfigContainer.to_yaml``."""
    data = to_yaml(config).encode("utf-8")
    objects = _objects(path)
    if objects is None:
        write_file_atomic(path, data)
    else:
        objects.write(path, data)


def read_yaml(cls: type[_T], path: str) -> _T:
    """Read what ``write_yaml`` or Megatron Bridge wrote. See ``ConfigContainer.from_yaml``."""
    if not path_exists(path):
        raise FileNotFoundError(f"there is no configuration file {path}")
    objects = _objects(path)
    text = read_small_file(path, LARGEST_TEXT) if objects is None else objects.read(path)
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise CheckpointMismatchError(f"{path} is not a configuration: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointMismatchError(f"{path} is not a configuration: it holds {type(content).__name__}")
    return from_dict(cls, content)


def from_dict(cls: type[_T], described: Mapping[str, Any]) -> _T:
    """Rebuild a ``cls`` from ``to_dict``'s result or from YAML.

    Only allowed classes are built and nothing is called (see ``config_targets``). Fields that a class does
    not have (any more) are ignored with a warning.

    Raises:
        UnsafeCheckpointError: a ``_target_`` is not allowed.
        CheckpointMismatchError: the values do not make a ``cls``.
    """
    own = f"{cls.__module__}.{cls.__qualname__}"
    built = _rebuild({TARGET: own, **described})
    if isinstance(built, cls):
        return built
    raise CheckpointMismatchError(f"the configuration is of type {described.get(TARGET)!r}, not {own}")


def path_exists(path: str) -> bool:
    """Whether there is a file or directory of that name, on disk or behind multi-storage-client."""
    objects = _objects(path)
    return os.path.exists(path) if objects is None else objects.kind_of(path) is not None


def _objects(path: str) -> Any:
    """``storage.objects`` for paths of multi-storage-client, None for files."""
    # Megatron takes seconds to import, which those who only build a configuration need not wait for.
    from ckpt_fast.storage import objects
    from ckpt_fast.storage.objects.client import object_storage

    return None if object_storage(path) is None else objects


# --- To plain data ---------------------------------------------------------------------------------------


def _describe(value: Any, leaf: Callable[[Any], Any], above: tuple[int, ...]) -> Any:
    """Containers recursively, everything else through ``leaf``; ``above`` are the ids of those around it."""
    if value is None or type(value) in _SCALARS:
        return leaf(value)
    if id(value) in above:
        return leaf(_Cycle())
    if leaf is _plain and isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    recurse = functools.partial(_describe, leaf=leaf, above=(*above, id(value)))
    if isinstance(value, (list, tuple)):
        return [recurse(item) for item in value]
    items = _items(value)
    if items is None and leaf is _plain:
        items = _call_items(value)
    return leaf(value) if items is None else {_key(key, leaf): recurse(item) for key, item in items.items()}


def _items(value: Any) -> dict[Any, Any] | None:
    """The fields of a configuration object or the entries of a dict; None for anything else."""
    if isinstance(value, (type, enum.Enum)):
        return None
    if isinstance(value, ForeignConfig):
        return vars(value)
    for method in ("as_dict", "to_cfg_dict"):
        if callable(getattr(value, method, None)):
            own = getattr(value, method)()
            return own if isinstance(own, dict) else None
    if dataclasses.is_dataclass(value):
        shown = [item for item in dataclasses.fields(value) if not item.metadata.get(SECRET)]
        names = [item.name for item in shown if not item.name.startswith("_")]
        # A field that was deleted, or declared with init=False and never set, has no value to write.
        return {TARGET: _class_name(value)} | {n: getattr(value, n) for n in names if hasattr(value, n)}
    return value if isinstance(value, dict) else None


def _call_items(value: Any) -> dict[str, Any] | None:
    """Partials and Hugging Face configurations: a target and what to call it with."""
    if isinstance(value, functools.partial):
        name = config_targets.dotted_name(value.func)
        if name is not None:
            return {TARGET: name, PARTIAL: True, ARGS: list(value.args), **value.keywords}
    if _is_hf_config(value):
        return {TARGET: f"{_class_name(value)}.from_dict", CALL: True, "config_dict": value.to_dict()}
    return None


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Cycle:
    """Stands where an object contains itself."""

    def __repr__(self) -> str:
        return "the enclosing object"


def _keep(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    """A leaf in the types that YAML's safe reader knows."""
    if isinstance(value, enum.Enum):
        return {TARGET: _class_name(value), CALL: True, ARGS: [_plain(value.value)], NAME: value.name}
    if value is None or isinstance(value, (bool, bytes, date)):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    # Subclasses of these would not be represented.
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, (torch.device, os.PathLike)):
        return str(value)
    if isinstance(value, torch.dtype):
        name: str | None = str(value)
    else:
        name = config_targets.dotted_name(value) if callable(value) else None
    return {TARGET: name, CALL: False} if name is not None else _note(value)


def _key(key: Any, leaf: Callable[[Any], Any]) -> Any:
    """Keys other than scalars could be written but not read again."""
    if leaf is _keep or key is None or type(key) in (str, int, float, bool):
        return key
    return str(key)


def _note(value: Any) -> dict[str, str]:
    if isinstance(value, torch.Tensor):
        # A tensor's own repr would copy it from the device.
        text = f"tensor of shape {tuple(value.shape)}, {value.dtype}"
    else:
        try:
            text = repr(value)
        except Exception as error:
            text = f"<repr failed: {error!r}>"
    return {
        _TYPE: _class_name(value),
        _REPR: text if len(text) <= _REPR_LIMIT else text[: _REPR_LIMIT - 3] + "...",
    }


def _is_hf_config(value: Any) -> bool:
    transformers = sys.modules.get("transformers")
    kinds = [getattr(transformers, name, None) for name in ("PretrainedConfig", "GenerationConfig")]
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


# --- And back --------------------------------------------------------------------------------------------


def _rebuild(node: Any) -> Any:
    if isinstance(node, list):
        return [_rebuild(item) for item in node]
    if not isinstance(node, dict):
        return node
    if _TYPE in node and TARGET not in node:
        logger.warning("an object of type %s cannot be rebuilt from the configuration: None", node[_TYPE])
        return None
    built = {key: _rebuild(item) for key, item in node.items()}
    return config_targets.build(built) if TARGET in built else built
