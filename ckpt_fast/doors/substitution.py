# SPDX-License-Identifier: Apache-2.0
"""What ``install`` changes, one thing at a time: what a stock class makes when it is called, or a global.

A stock class stays what it is, under its name, wherever it has been imported; only calling it makes an object
of ours, whose class is derived from it. Classes that others have derived, or will, are not affected.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ckpt_fast.errors import CheckpointError

Arguments = dict[str, Any]


class Substitution(Protocol):
    """One change.

    Attributes:
        name: what is changed, as "module.name".
    """

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raise CheckpointError if it cannot be made; see ``refused``."""

    def make(self) -> None:
        """Make it. It has been checked, and is not in place."""

    def undo(self) -> None:
        """Leave everything as it was before ``make``."""


class Constructed:
    """Calling a stock class makes an object of ours.

    Args:
        stock: the class.
        ours: derived from it.
        methods: what of the stock class others call; ours must take all that those take.
        suits: says whether ours can serve for the arguments of a call, by name; else a stock object is made.
    """

    def __init__(
        self,
        stock: type,
        ours: type,
        methods: Sequence[str],
        suits: Callable[[Arguments], bool] = lambda _: True,
    ) -> None:
        self.stock, self.ours = stock, ours
        self._methods = methods
        self._suits = suits
        self._stock_initializer: Any = None  # None: the class inherits it

    @property
    def name(self) -> str:
        return f"{self.stock.__module__}.{self.stock.__qualname__}"

    def check(self) -> None:
        for method in self._methods:
            require_known(self.name, getattr(self.stock, method, None), getattr(self.ours, method), method)

    def make(self) -> None:
        stock, ours, suits = self.stock, self.ours, self._suits
        initialize: Any = stock.__init__  # type: ignore[misc]
        initializer = inspect.signature(initialize)

        # Not ``__new__``: that is called to copy and to unpickle stock objects as well, and Python does not
        # forget it when it is deleted.
        @functools.wraps(initialize)
        def initialize_ours(self: Any, *args: Any, **kwargs: Any) -> None:
            # What is wrong with the arguments, the stock class says best.
            arguments = None
            if type(self) is stock:
                with contextlib.suppress(TypeError):
                    arguments = initializer.bind(self, *args, **kwargs).arguments
            if arguments is not None and suits(arguments):
                self.__class__ = ours
                ours.__init__(self, *args, **kwargs)  # type: ignore[misc]
            else:
                initialize(self, *args, **kwargs)

        self._stock_initializer = vars(stock).get("__init__")
        stock.__init__ = initialize_ours  # type: ignore[misc]

    def undo(self) -> None:
        if self._stock_initializer is None:
            del self.stock.__init__  # type: ignore[misc]
        else:
            self.stock.__init__ = self._stock_initializer  # type: ignore[misc]


class Rebound:
    """A global of a module is of ours, where only that module looks it up.

    Args:
        module: its full name.
        attribute: the global.
        ours: makes what takes its place from what is there.
        method: what is called of it.
    """

    def __init__(self, module: str, attribute: str, ours: Callable[[Any], Any], method: str) -> None:
        self._module, self._attribute = module, attribute
        self._ours, self._method = ours, method
        self._stock: Any = None

    @property
    def name(self) -> str:
        return f"{self._module}.{self._attribute}"

    def check(self) -> None:
        stock = getattr(importlib.import_module(self._module), self._attribute, None)
        if stock is None:
            raise refused(f"there is no {self.name}")
        require_known(self.name, getattr(stock, self._method, None), None, self._method)

    def make(self) -> None:
        module = importlib.import_module(self._module)
        self._stock = getattr(module, self._attribute)
        setattr(module, self._attribute, self._ours(self._stock))

    def undo(self) -> None:
        setattr(importlib.import_module(self._module), self._attribute, self._stock)


def require_known(name: str, theirs: Any, ours: Any, method: str) -> None:
    """Raise unless a method of ours takes every argument that the stock one does, by the same names.

    Args:
        name: of the stock class, for the message.
        theirs: its method; None: it has none.
        ours: ours; None: takes whatever there is.
        method: what it is called.

    Raises:
        CheckpointError: see ``refused``.
    """
    if theirs is None:
        raise refused(f"{name} has no method {method}")
    if ours is None:
        return
    known = inspect.signature(ours).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes = inspect.signature(theirs).parameters.values()
    unknown = [each.name for each in takes if each.name not in known and each.kind not in anything]
    if unknown:
        raise refused(f"{name}.{method} takes {', '.join(unknown)}")


def refused(problem: str) -> CheckpointError:
    """The error that says that nothing can be installed, and why."""
    return CheckpointError(
        f"ckpt_fast.install() does not know this generation of the installed package: {problem}. Nothing was "
        "installed. Leave this part out, with install(torch_dcp=False) or install(megatron=False), or use a "
        "newer ckpt_fast."
    )
