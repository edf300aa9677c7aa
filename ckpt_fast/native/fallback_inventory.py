# SPDX-License-Identifier: Apache-2.0
"""The inventory of the engine, in Python: what modules and optimizers hold, and where tensors are."""

from __future__ import annotations

import contextlib
import operator
import weakref
from array import array
from collections.abc import Sequence
from typing import Any


def walk_modules(roots: Sequence[object]) -> tuple[list[Any], list[Any], bytes]:
    modules: list[Any] = []
    tensors: list[Any] = []
    names: list[str] = []
    for root in roots:
        _take(root, modules, tensors, names)
    return modules, tensors, "".join(names).encode()


def walk_optimizer(
    groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], tensor: type
) -> tuple[list[Any], bytes]:
    tensors: list[Any] = []
    facts: list[str] = []
    for group in groups:
        if not isinstance(group, dict):
            raise TypeError("a group of parameters is no dictionary")
        if not isinstance(group["params"], list):
            raise TypeError("the parameters of a group are no list")
        facts.append(f"{len(group['params'])}:")
        for parameter in group["params"]:
            tensors.append(parameter)
            own = state.get(parameter)
            if own is None:
                continue
            if not isinstance(own, dict):
                raise TypeError("the state of a parameter is no dictionary")
            found = [(name, value) for name, value in own.items() if isinstance(value, tensor)]
            if not all(isinstance(name, str) for name, _ in found):
                raise TypeError("a name in the state of a parameter is no string")
            facts += [f"{name}\0" for name, _ in found]
            tensors += [value for _, value in found]
            facts.append(";")
    return tensors, "".join(facts).encode()


def refer_to(references: list[weakref.ref[Any]], objects: list[Any]) -> bool:
    return len(references) == len(objects) and all(
        map(operator.is_, (reference() for reference in references), objects)
    )


def _take(module: object, modules: list[Any], tensors: list[Any], names: list[str]) -> None:
    modules.append(module)
    attributes = vars(module)
    names.append(f"{id(type(module))}-")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _part(attributes, kind).items():
            names.append(f"{name}\0")
            if tensor is None:
                names.append("0")
            else:
                tensors.append(tensor)
        names.append(";")
    names += [f"{name}\0" for name in sorted(_part(attributes, "_non_persistent_buffers_set"))]
    names.append(",")
    for kind in ("_state_dict_hooks", "_state_dict_pre_hooks"):
        # torch numbers hooks in the order in which they are registered, and no number is used twice.
        names += [f"{operator.index(number)}\0" for number in _part(attributes, kind)]
        names.append(",")
    for method in ("sharded_state_dict", "state_dict", "_save_to_state_dict"):
        names.append(f"{id(attributes[method])}-" if method in attributes else "-")
    for name, child in _part(attributes, "_modules").items():
        names.append(f"{name}\0")
        if child is not None:
            _take(child, modules, tensors, names)
        names.append(")")


def _part(attributes: dict[str, Any], name: str) -> Any:
    found = attributes.get(name)
    if found is None:
        raise TypeError(f"not a torch module: it has no {name}")
    if name != "_non_persistent_buffers_set" and not isinstance(found, dict):
        raise TypeError(f"{name} of a module is no dictionary")
    return found


def describe_tensors(
    values: list[Any], types: tuple[type, ...], layout: object
) -> tuple[bytearray, bytearray, list[tuple[Any, ...]]]:
    forms, addresses = array("q"), array("q")
    numbers: dict[tuple[Any, ...], int] = {}
    for value in values:
        form, address = -1, 0
        # What cannot be described is the caller's to find out about.
        with contextlib.suppress(Exception):
            if type(value) in types and value.layout is layout:
                described, address = _form(value), value.data_ptr()
                form = numbers.setdefault(described, len(numbers))
        forms.append(form)
        addresses.append(address)
    return bytearray(forms.tobytes()), bytearray(addresses.tobytes()), list(numbers)


def _form(tensor: Any) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.get_device(),
        tensor.is_cpu,
        tensor.is_meta,
        tensor.is_conj() or tensor.is_neg(),
        tensor.is_meta or _has_all_elements(tensor),
    )


def _has_all_elements(tensor: Any) -> bool:
    if not tensor.numel():
        return True
    if tensor.data_ptr() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1
    return bool(end * tensor.dtype.itemsize <= tensor.untyped_storage().nbytes())
