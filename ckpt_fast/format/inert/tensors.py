# SPDX-License-Identifier: Apache-2.0
"""torch's values: tensors and parameters, storages, sizes, dtypes, devices, layouts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ckpt_fast.format.archive import TYPED_STORAGES
from ckpt_fast.format.inert.kinds import Kind, Named, are, attributes, refuse, require

# torch's own makers.
_utils: Any = torch._utils
_rebuild_from_type: Any = torch._tensor._rebuild_from_type_v2
_ONE_OF_A_KIND = (torch.dtype, torch.qscheme, torch.memory_format)


class StorageName(NamedTuple):
    """Stands for a storage class in a pickle; ``dtype`` is that of its elements."""

    dtype: torch.dtype


def torch_value(name: str) -> Any:
    """What ``torch.<name>`` is, if a pickle may have that as a value; None otherwise."""
    if name == "UntypedStorage":
        return StorageName(torch.uint8)
    if name in _STORAGES:
        return StorageName(_STORAGES[name])
    # Looked up without getattr, for which torch imports modules.
    found = vars(torch).get(name)
    return found if isinstance(found, _ONE_OF_A_KIND) else None


def tensor_kinds() -> Mapping[tuple[str, str], Kind]:
    """Kinds by module and name."""
    utils: dict[str, Callable[..., Any]] = {
        "_rebuild_tensor": _tensor,
        "_rebuild_tensor_v2": _tensor_v2,
        "_rebuild_tensor_v3": _tensor_v3,
        "_rebuild_qtensor": _quantized,
        "_rebuild_sparse_tensor": _sparse,
        "_rebuild_meta_tensor_no_storage": _meta,
        "_rebuild_parameter": _parameter,
        "_rebuild_parameter_with_state": _parameter_with_state,
    }
    kinds = {("torch._utils", name): Kind(make) for name, make in utils.items()}
    kinds["torch._utils", "_rebuild_wrapper_subclass"] = Kind(_wrapper, takes_names=True)
    kinds["torch._tensor", "_rebuild_from_type_v2"] = Kind(_of_type, takes_names=True)
    kinds["torch.serialization", "_get_layout"] = Kind(_layout)
    kinds["torch", "Size"] = Kind(_size)
    kinds["torch", "device"] = Kind(_device)
    # Only as an argument of _rebuild_from_type_v2.
    for module, name in (
        ("torch", "Tensor"),
        ("torch._tensor", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
    ):
        kinds[module, name] = Kind()
    return kinds


_STORAGES = {name: dtype for dtype, name in TYPED_STORAGES.items()} | {
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


def _size(sizes: Any) -> torch.Size:
    require(type(sizes) in (tuple, list) and are(sizes, int), "a Size")
    return torch.Size(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    require(type(kind) is str and (index is None or type(index) is int), "a device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> Any:
    require(type(name) is str, "a layout")
    found = vars(torch).get(name.removeprefix("torch."))
    require(isinstance(found, torch.layout), "a layout")
    return found


def _is_storage(storage: Any) -> bool:
    return type(storage) is torch.storage.TypedStorage


def _require_inside(storage: Any, itemsize: int, offset: Any, size: Any, stride: Any) -> None:
    """Refuse a view that is not inside its storage: torch would make the storage longer."""
    require(_is_storage(storage), "a tensor")
    require(all(type(each) in (tuple, list, torch.Size) for each in (size, stride)), "a tensor")
    require(len(size) == len(stride) and are((offset, *size, *stride), int), "a tensor")
    require(min((offset, *size, *stride)) >= 0, "a tensor")
    if 0 not in size:
        last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        require((offset + last + 1) * itemsize <= storage._untyped_storage.nbytes(), "a tensor")
    else:
        require(max((offset, *size, *stride)) < 1 << 62, "a tensor")


def _require_plain_rest(requires_grad: Any, hooks: Any, metadata: Any = None) -> None:
    require(type(requires_grad) is bool, "a tensor")
    require(hooks is None or (type(hooks) is collections.OrderedDict and not hooks), "a tensor with hooks")
    # Which bits of a view are to be flipped when it is read.
    is_bits = type(metadata) is dict and metadata.keys() <= {"conj", "neg"} and are(metadata.values(), bool)
    require(metadata is None or is_bits, "a tensor")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    require(_is_storage(storage), "a tensor")
    _require_inside(storage, storage.dtype.itemsize, offset, size, stride)
    return _utils._rebuild_tensor(storage, offset, size, stride)


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Any:
    require(_is_storage(storage), "a tensor")
    _require_inside(storage, storage.dtype.itemsize, offset, size, stride)
    _require_plain_rest(requires_grad, hooks, metadata)
    return _utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    require(type(dtype) is torch.dtype, "a tensor")
    _require_inside(storage, dtype.itemsize, offset, size, stride)
    _require_plain_rest(requires_grad, hooks, metadata)
    return _utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)


def _quantized(
    storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, requires_grad: Any, hooks: Any
) -> Any:
    require(_is_storage(storage), "a tensor")
    _require_inside(storage, storage.dtype.itemsize, offset, size, stride)
    _require_plain_rest(requires_grad, hooks)
    require(type(quantizer) is tuple and len(quantizer) in (3, 4), "a quantized tensor")
    scheme, scale, zero = quantizer[:3]
    require(type(scheme) is torch.qscheme, "a quantized tensor")
    if len(quantizer) == 3:
        require(type(scale) is float and type(zero) is int, "a quantized tensor")
    else:
        # torch trusts these lengths.
        axis = quantizer[3]
        require(type(axis) is int and 0 <= axis < len(size), "a quantized tensor")
        require(all(isinstance(each, torch.Tensor) for each in (scale, zero)), "a quantized tensor")
        require(scale.shape == zero.shape == (size[axis],), "a quantized tensor")
    if storage.device.type == "meta":
        return _placeholder()
    return _utils._rebuild_qtensor(storage, offset, size, stride, quantizer, requires_grad, hooks)


def _sparse(layout: Any, data: Any) -> Any:
    require(type(layout) is torch.layout and type(data) is tuple and len(data) in (3, 4), "a sparse tensor")
    count = 2 if layout is torch.sparse_coo else 3
    tensors, rest = data[:count], data[count:]
    require(all(isinstance(each, torch.Tensor) for each in tensors), "a sparse tensor")
    require(type(rest[0]) is torch.Size if rest else False, "a sparse tensor")
    if any(tensor.is_meta for tensor in tensors):
        return _placeholder()
    # An index that is outside would let others read and write memory that is not the tensor's.
    make: Any = torch.sparse_compressed_tensor
    if layout is not torch.sparse_coo:
        return make(*tensors, rest[0], layout=layout, check_invariants=True)
    make, is_coalesced = torch.sparse_coo_tensor, rest[1] if len(rest) == 2 else None
    require(is_coalesced is None or type(is_coalesced) is bool, "a sparse tensor")
    return make(*tensors, rest[0], is_coalesced=is_coalesced, check_invariants=True)


def _placeholder() -> Any:
    """Takes the place of a tensor that cannot be made without bytes, where there are only lengths."""
    return torch.empty(0, device="meta")


def _meta(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Any:
    require(type(dtype) is torch.dtype and type(requires_grad) is bool, "a tensor")
    require(are((*size, *stride), int), "a tensor")
    return _utils._rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    require(isinstance(data, torch.Tensor), "a parameter")
    _require_plain_rest(requires_grad, hooks)
    return torch.nn.Parameter(data, requires_grad)


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> torch.nn.Parameter:
    made = _parameter(data, requires_grad, hooks)
    _set_attributes(made, state)
    return made


def _set_attributes(made: torch.Tensor, state: Any) -> None:
    """The attributes a program has given a tensor; none of torch's own."""
    if type(state) is tuple:
        require(len(state) == 2 and not state[1], "a tensor")
        state = state[0]
    for name, value in attributes(state or {}, "a tensor").items():
        require(not hasattr(torch.Tensor, name), f"a tensor with another {name}")
        vars(made)[name] = value


def _of_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    require(type(args) is tuple, "a tensor")
    if isinstance(function, Named) and function.kind.make is not None and isinstance(cls, Named):
        require(
            cls.name in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"), "a tensor"
        )
        made = function.kind.make(*args)
        require(isinstance(made, torch.Tensor), "a tensor")
        _set_attributes(made, state)
        return made
    # A class of tensors that the program has allowed.
    real = getattr(_utils, function.name.rpartition(".")[2]) if isinstance(function, Named) else function
    if isinstance(cls, Named):
        refuse(f"Restricted unpickler refused to load '{cls.name}' as a class of tensors")
    return _rebuild_from_type(real, cls, args, state)


def _wrapper(cls: Any, *args: Any) -> Any:
    require(isinstance(cls, type) and issubclass(cls, torch.Tensor), "a tensor of this class")
    return _utils._rebuild_wrapper_subclass(cls, *args)
