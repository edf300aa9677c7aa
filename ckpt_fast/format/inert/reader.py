# SPDX-License-Identifier: Apache-2.0
"""The restricted unpickler."""

from __future__ import annotations

import _compat_pickle
import collections
import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar

from ckpt_fast.format.inert.arrays import array_kinds
from ckpt_fast.format.inert.classes import build_trusted, class_named, is_trusted, program_kind, trusted
from ckpt_fast.format.inert.kinds import (
    ATTRIBUTE,
    Kind,
    Named,
    RefusedPickleError,
    refuse,
    require_keys,
    standard_kinds,
)
from ckpt_fast.format.inert.tensors import StorageName, tensor_kinds, torch_value

_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
LoadStorage = Callable[[Any], Any]
# What pickles of containers and data need; the others could call and change things.
_OPCODES = (
    b"().BCGJKMNQRTUX]abcehjqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f"
    b"\x90\x91\x92\x93\x94\x95\x96"
)


# The one in C calls and changes what it likes, out of reach of a subclass.
_PythonUnpickler: Any = pickle._Unpickler


class InertUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Builds what is on the list of kinds, and refuses everything else.

    A pickle gets hold of no class and no function: a name in it becomes a ``Named``, which may be called, if
    its kind says so, but be no part of a value. (What the program has allowed is itself.)

    Args:
        stream: the pickle.
        load_storage: gives the storage that a persistent id describes; None: there are none.
    """

    dispatch: ClassVar[dict[int, Any]] = {code: _PythonUnpickler.dispatch[code] for code in _OPCODES}

    def __init__(self, stream: IO[bytes], load_storage: LoadStorage | None = None) -> None:
        super().__init__(stream)
        self._load_storage = load_storage
        self._names: dict[tuple[str, str], Any] = {}
        self._builders: dict[type, Callable[[Any, Any], None]] = {}

    def load(self) -> Any:
        """The value that the pickle describes.

        Raises:
            RefusedPickleError: it is not on the list; nothing of it has been run.
            Exception: of whatever kind, if it is no sound pickle.
        """
        value = super().load()
        self._require_values((value,))
        return value

    def find_class(self, module: str, name: str) -> Any:
        # Pickle protocol 2, which torch.save uses, spells standard names as Python 2 did.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        return self._named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._load_storage is None:
            refuse("Restricted unpickler refused to load a storage, of which there are none here")
        return self._load_storage(pid)

    def _attribute(self, owner: Any, name: Any) -> Any:
        """What a pickle gets by ``getattr``: protocol 2 spells a class inside a class like this, and some
        versions of Python the member of an enum."""
        where = next((key for key, known in self._names.items() if known is owner), None)
        if where is None or type(name) is not str or not name.isidentifier():
            refuse(
                "Restricted unpickler refused to load 'builtins.getattr': what it asks for is no class in a "
                "class"
            )
        members = owner.kind.members if isinstance(owner, Named) else None
        if members is not None and name in members:
            return members[name]
        return self._named(where[0], f"{where[1]}.{name}")

    def _named(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            self._names[module, name] = _resolve(module, name)
        return self._names[module, name]

    def _require_values(self, values: Iterable[Any]) -> None:
        """Refuse names among values; lists, dicts and sets have been looked at when they were filled."""
        if not self._names:
            return
        for value in values:
            if isinstance(value, tuple) and not isinstance(value, StorageName):
                self._require_values(value)
            elif isinstance(value, (Named, StorageName)):
                if isinstance(value, Named) and value.refusal:
                    refuse(value.refusal)
                what = value.name if isinstance(value, Named) else "a storage class"
                refuse(f"Restricted unpickler refused to load '{what}' itself: it is no data")

    # --- what opcodes do ------------------------------------------------------------------------------

    def _call(self, function: Any, args: Any, how: str) -> None:
        if not isinstance(function, Named):
            # Allowed by the program, or something that find_class has not given.
            if not any(function is known for known in self._names.values()) or not callable(function):
                refuse("Restricted unpickler refused to call a value")
            self._require_values(args)
            made = function(*args) if how == "make" else function.__new__(function, *args)
            self.stack[-1] = made
            return
        if function.kind is ATTRIBUTE and how == "make" and len(args) == 2:
            self.stack[-1] = self._attribute(*args)
            return
        maker = getattr(function.kind, how)
        if function.refusal:
            refuse(function.refusal)
        if maker is None:
            refuse(f"Restricted unpickler refused to load '{function.name}': no data is made like this")
        if not function.kind.takes_names:
            self._require_values(args)
        made = maker(*args)
        if function.kind.build is not None:
            self._builders[type(made)] = function.kind.build
        self.stack[-1] = made

    def _reduce(self) -> None:
        args = self.stack.pop()
        self._call(self.stack[-1], args, "make")

    def _new_object(self) -> None:
        args = self.stack.pop()
        self._call(self.stack[-1], args, "new")

    def _new_object_with_names(self) -> None:
        named, args = self.stack.pop(), self.stack.pop()
        if named:
            refuse("Restricted unpickler refused to make an object with named arguments")
        self._call(self.stack[-1], args, "new")

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        builder = self._builders.get(type(made))
        if builder is not None:
            self._require_values(state if isinstance(state, tuple) else (state,))
            builder(made, state)
        elif is_trusted(type(made)):
            build_trusted(made, state)
        else:
            refuse(f"Restricted unpickler refused to change a {type(made).__name__}")

    def _append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def _extend(self, made: Any, values: list[Any]) -> None:
        self._require_values(values)
        if type(made) not in (list, collections.deque) and not is_trusted(type(made)):
            refuse(f"Restricted unpickler refused to append to a {type(made).__name__}")
        made.extend(values)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key], [value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items[::2], items[1::2])

    def _set(self, made: Any, keys: list[Any], values: list[Any]) -> None:
        if self._names:
            self._require_values(keys)
            self._require_values(values)
            require_keys(keys)
        if type(made) in _DICTS or is_trusted(type(made)):
            set_item = type(made).__setitem__
        elif isinstance(made, dict):
            set_item = dict.__setitem__  # and no code of the program
        else:
            refuse(f"Restricted unpickler refused to set items of a {type(made).__name__}")
        for key, value in zip(keys, values, strict=True):
            set_item(made, key, value)

    def _add_items(self) -> None:
        items = self.pop_mark()
        self._require_values(items)
        require_keys(items)
        made = self.stack[-1]
        if type(made) is not set:
            refuse(f"Restricted unpickler refused to add items to a {type(made).__name__}")
        made.update(items)

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self._require_values(items)
        require_keys(items)
        self.append(frozenset(items))

    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _new_object,
            pickle.NEWOBJ_EX[0]: _new_object_with_names,
            pickle.BUILD[0]: _build,
            pickle.APPEND[0]: _append,
            pickle.APPENDS[0]: _appends,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.ADDITEMS[0]: _add_items,
            pickle.FROZENSET[0]: _frozen_set,
        }
    )


@functools.cache
def _listed() -> Mapping[tuple[str, str], Kind]:
    return {**standard_kinds(), **array_kinds(), **tensor_kinds()}


def _resolve(module: str, name: str) -> Any:
    """What a name in a pickle stands for: a value, a Named, or what the program has allowed."""
    if (module, name) == ("builtins", "Ellipsis"):
        return ...
    if module in ("torch", "torch.storage"):
        value = torch_value(name)
        if value is not None:
            return value
    kind = _listed().get((module, name))
    if kind is None:
        allowed = trusted(module, name)
        if allowed is not None:
            return allowed
        try:
            kind = program_kind(module, name)
        except RefusedPickleError as error:
            around = class_named(module, name)
            if around is None or not any(isinstance(value, type) for value in vars(around).values()):
                raise
            # It may be named for the sake of a class inside it. Nothing is made of it itself.
            return Named(f"{module}.{name}", Kind(), str(error))
    return Named(f"{module}.{name}", kind)
