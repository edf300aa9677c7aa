# SPDX-License-Identifier: Apache-2.0
"""NumPy's scalars, arrays and dtypes. Arrays of objects are refused: they hold pickles of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckpt_fast.format.inert.kinds import Kind, Named, are, require

_SPECIFIER = re.compile(r"[biufcSUVmM][0-9]{1,9}")
_ARRAY = np.zeros(1)
# NumPy's own makers, whose home depends on its version.
_reconstruct: Any = _ARRAY.__reduce__()[0]
_frombuffer: Any = _ARRAY.__reduce_ex__(5)[0]
_scalar: Any = np.float64(0).__reduce__()[0]
_MOST_DIMENSIONS = 64


def _dtype(specifier: Any, align: Any = False, copy: Any = True) -> Any:
    require(type(specifier) is not str or not specifier.startswith("O"), "an array of objects")
    require(type(specifier) is str and _SPECIFIER.fullmatch(specifier) is not None, "a dtype")
    require(are((align, copy), bool), "a dtype")
    # A copy always: what there is only once must not get a state.
    return np.dtype(specifier, align, True)


def _build_dtype(made: Any, state: Any) -> None:
    require(type(state) is tuple and len(state) in (8, 9) and state[0] in (3, 4), "a dtype")
    expected = _described(made, state)
    require(not expected.hasobject, "a dtype of objects")
    # The state that NumPy itself gives the dtype described by the parts of it that can be checked.
    known: Any = expected.__reduce__()[2]
    require(_same(known[1:], state[1:]), "a dtype")
    made.__setstate__(state)


def _described(made: Any, state: tuple[Any, ...]) -> Any:
    order, subarray, names, fields, nbytes = state[1:6]
    require(order in ("<", ">", "|", "="), "a dtype")
    if subarray is not None:
        require(
            type(subarray) is tuple and len(subarray) == 2 and isinstance(subarray[0], np.dtype), "a dtype"
        )
        require(_is_shape(subarray[1]), "a dtype")
        return np.dtype(subarray)
    if names is not None:
        require(type(names) is tuple and type(fields) is dict and type(nbytes) is int, "a dtype")
        require(are(names, str) and set(names) == fields.keys(), "a dtype")
        parts = [fields[name] for name in names]
        require(all(type(part) is tuple and len(part) == 2 for part in parts), "a dtype")
        require(all(isinstance(part[0], np.dtype) and type(part[1]) is int for part in parts), "a dtype")
        description: Any = {
            "names": list(names),
            "formats": [part[0] for part in parts],
            "offsets": [part[1] for part in parts],
            "itemsize": nbytes,
        }
        return np.dtype(description, align=state[7] & 0x80 != 0)
    text = made.str[1:]
    if made.kind in "mM" and len(state) == 9:
        metadata = state[8]
        require(type(metadata) is tuple and len(metadata) == 2 and type(metadata[1]) is tuple, "a dtype")
        require(
            len(metadata[1]) == 4 and type(metadata[1][0]) is bytes and are(metadata[1][1:], int), "a dtype"
        )
        unit, number = metadata[1][0].decode("ascii"), metadata[1][1]
        require(re.fullmatch("[a-zA-Z]{1,2}|generic", unit) is not None and 0 < number < 1 << 31, "a dtype")
        text = made.kind + "8" + (f"[{number}{unit}]" if unit != "generic" else "")
    return np.dtype(text).newbyteorder(order if order != "|" else "=")


def _same(known: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    return len(known) == len(given) and repr(known) == repr(given)


def _is_shape(shape: Any) -> bool:
    return (
        type(shape) is tuple
        and len(shape) <= _MOST_DIMENSIONS
        and are(shape, int)
        and all(0 <= size < 1 << 62 for size in shape)
    )


def _require_data(dtype: Any, content: Any, shape: Any = ()) -> None:
    require(isinstance(dtype, np.dtype) and not dtype.hasobject, "an array of objects")
    require(type(content) in (bytes, bytearray) and _is_shape(shape), "an array")
    require(len(content) == math.prod(shape) * dtype.itemsize, "an array")


def _make_scalar(dtype: Any, content: Any) -> Any:
    _require_data(dtype, content)
    return _scalar(dtype, content)


def _make_array(cls: Any, shape: Any, character: Any) -> Any:
    require(isinstance(cls, Named) and cls.name == "numpy.ndarray", "an array")
    require(shape == (0,) and character in (b"b", "b"), "an array")
    return _reconstruct(np.ndarray, (0,), b"b")


def _build_array(made: Any, state: Any) -> None:
    require(type(state) is tuple and len(state) == 5 and state[0] == 1, "an array")
    _, shape, dtype, in_columns, content = state
    require(type(in_columns) is bool, "an array")
    _require_data(dtype, content, shape)
    made.__setstate__((1, shape, dtype, in_columns, bytes(content)))


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Any:
    _require_data(dtype, content, shape)
    require(order in ("C", "F"), "an array")
    return _frombuffer(content, dtype, shape, order)


def array_kinds() -> Mapping[tuple[str, str], Kind]:
    """Kinds by module and name."""
    kinds = {
        ("numpy", "dtype"): Kind(_dtype, build=_build_dtype),
        # Only as an argument of the functions below.
        ("numpy", "ndarray"): Kind(build=_build_array),
    }
    # NumPy 2 has renamed the package.
    for core in ("numpy.core", "numpy._core"):
        kinds[f"{core}.multiarray", "scalar"] = Kind(_make_scalar)
        kinds[f"{core}.multiarray", "_reconstruct"] = Kind(_make_array, build=_build_array, takes_names=True)
        kinds[f"{core}.numeric", "_frombuffer"] = Kind(_array_of_buffer)
    return kinds
