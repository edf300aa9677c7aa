# SPDX-License-Identifier: Apache-2.0
"""``check_pickle`` in Python: a pickle is followed without making anything of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

_LARGEST_PICKLE = (1 << 32) - 1
_WEIGHT_PER_BYTE = 64
_FREE_WEIGHT = 100_000
_TEXT_PER_WEIGHT = 8  # bytes; what is made of a text may look at all of it
_DEEPEST = 256  # hashing and comparing call themselves for every level
_LONGEST_INTEGER = 64
_LONGEST_NAME = 1024

# Opcode to what stands behind it: a number of so many bytes, which counts what follows if the second says so,
# and whether metadata needs it.
_ARGUMENTS = {
    **dict.fromkeys(b"().NR]abcestu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94", (0, False, True)),
    **dict.fromkeys(b"Khq", (1, False, True)),
    **dict.fromkeys(b"M", (2, False, True)),
    **dict.fromkeys(b"Jjr", (4, False, True)),
    **dict.fromkeys(b"G\x95", (8, False, True)),
    **dict.fromkeys(b"C\x8a\x8c", (1, True, True)),
    **dict.fromkeys(b"BX", (4, True, True)),
    **dict.fromkeys(b"Q\x92", (0, False, False)),
    **dict.fromkeys(b"U", (1, True, False)),
    **dict.fromkeys(b"T\x8b", (4, True, False)),
    **dict.fromkeys(b"\x8d\x8e\x96", (8, True, False)),
}
# Its keys are compared by the unpickler of metadata, which counts.
_COUNTED = (b"torch.distributed.checkpoint.metadata", b"MetadataIndex")
_MAKERS = {b"bytes": "bytes", b"bytearray": "bytes", b"range": "range", b"xrange": "range"}
_MAKERS[b"getattr"] = "attribute"  # how protocol 2 spells a class inside another class
_MADE_BY = {"range": "range", "encoded": "bytes", "counted": "counted", "attribute": "global"}
_SIZED = ("text", "bytes", "tuple", "list")


class _Value:
    """The facts known about a value without constructing it.

    ``weight`` counts the values in it, shared ones as often as they occur; a ``part`` of another value must
    not change any more; of a tuple, ``has_number`` says that it directly holds something that bytes() takes
    for a size, and ``has_range`` that it holds a range; a global ``makes`` bytes, ranges or globals when it
    is called.
    """

    __slots__ = ("depth", "has_number", "has_range", "kind", "makes", "part", "text", "weight")

    def __init__(self, kind: str, text: bytes | memoryview = b"") -> None:
        self.kind, self.text = kind, text
        self.weight, self.depth = 1 + len(text) // _TEXT_PER_WEIGHT, 0
        self.part = self.has_number = self.has_range = False
        self.makes = ""


def check_pickle(content: bytes | memoryview, archive: bool = False) -> int:
    return _Checker(memoryview(content).cast("B"), not archive).run()


class _Checker:
    def __init__(self, content: memoryview, metadata: bool) -> None:
        self._content, self._metadata = content, metadata
        self._limit = _WEIGHT_PER_BYTE * len(content) + _FREE_WEIGHT
        self._start = self._position = self._opcode = self._number = 0
        self._text = content[:0]
        self._plain = _Value("plain")
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}
        self._keys = self._comparisons = 0

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(f"opcode 0x{self._opcode:02x} at {self._start}: {reason}")

    def run(self) -> int:
        content = self._content
        if len(content) > _LARGEST_PICKLE:
            self.fail("the pickle is longer than any metadata")
        if len(content) < 2 or content[0] != 0x80 or not 2 <= content[1] <= 5:
            self.fail("a pickle of protocol 2 to 5 does not begin like this")
        self._position = 2
        while True:
            if self._position == len(content):
                self.fail("the pickle has no end")
            self._start = self._position
            self._opcode = content[self._position]
            self._position += 1
            self._read_argument()
            if self._opcode == ord("."):
                if len(self._stack) != 1 or self._marks:
                    self.fail("not one value is left")
                return self._position
            _ACTIONS[self._opcode](self)

    def _read_argument(self) -> None:
        if self._opcode not in _ARGUMENTS:
            self.fail("plain data has no use for it")
        width, counted, in_metadata = _ARGUMENTS[self._opcode]
        if self._metadata and not in_metadata:
            self.fail("metadata has no use for it")
        self._number = int.from_bytes(self._take(width), "little")
        self._text = self._take(self._number) if counted else self._content[:0]

    def _take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._content) - self._position:
            self.fail("its argument ends behind the last byte")
        self._position += nbytes
        return self._content[self._position - nbytes : self._position]

    # What an opcode does. Values are made, put together and looked up.

    def plain(self) -> None:
        self._stack.append(self._plain)

    def integer(self) -> None:
        if self._metadata and self._number > _LONGEST_INTEGER:
            self.fail("it is longer than any integer in metadata")
        self._stack.append(self._plain)

    def frame(self) -> None:
        if self._number > len(self._content) - self._position:
            self.fail("its frame ends behind the last byte")

    def push_text(self) -> None:
        self._push(_Value("text", self._text))

    def push_bytes(self) -> None:
        self._push(_Value("bytes", self._text))

    def push_empty(self, kind: str) -> None:
        self._push(_Value(kind))

    def put(self) -> None:
        self._put(self._number)

    def memoize(self) -> None:
        self._put(len(self._memo))

    def _put(self, index: int) -> None:
        # The unpickler keeps a table as long as the largest index.
        if index >= self._start:
            self.fail(f"the memo has no place {index} yet")
        self._memo[index] = self._top()

    def get(self) -> None:
        if self._number not in self._memo:
            self.fail(f"the memo has no {self._number}")
        self._stack.append(self._memo[self._number])

    def global_of_lines(self) -> None:
        module = self._line()
        self._push_global(module, self._line())

    def global_of_stack(self) -> None:
        name = self._popped_text()
        self._push_global(self._popped_text(), name)

    def _push_global(self, module: bytes, name: bytes) -> None:
        value = _Value("global")
        if module in (b"builtins", b"__builtin__"):
            value.makes = _MAKERS.get(name, "")
        elif module == b"_codecs" and name == b"encode":
            value.makes = "encoded"  # how protocol 2 spells bytes
        elif (module, name) == _COUNTED:
            value.makes = "counted"
        self._push(value)

    def _line(self) -> bytes:
        # No copy of all that is left for the names in it.
        nearby = bytes(self._content[self._position : self._position + _LONGEST_NAME + 1])
        end = nearby.find(b"\n")
        if end < 0:
            is_there = b"\n" in bytes(self._content[self._position :])
            self.fail("a name is too long" if is_there else "its argument ends behind the last byte")
        self._position += end + 1
        return nearby[:end]

    def _popped_text(self) -> bytes:
        value = self._pop()
        if value.kind != "text":
            self.fail("a name is no text")
        if len(value.text) > _LONGEST_NAME:
            self.fail("a name is too long")
        return bytes(value.text)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def make_tuple(self, first: int) -> None:
        value = _Value("tuple")
        for item in self._stack[first:]:
            value.has_number |= item.kind not in _SIZED
            value.has_range |= item.kind == "range"
            self._include(value, item)
        del self._stack[first:]
        self._push(value)

    def make_frozen_set(self) -> None:
        first = self.pop_mark()
        self._count_keys(first, 1)
        value = _Value("plain")
        for item in self._stack[first:]:
            self._include(value, item)
        del self._stack[first:]
        self._push(value)

    def extend(self, kind: str, first: int) -> None:
        if first <= self._fence():
            self.fail("the stack is too short")
        if kind == "dict" and (len(self._stack) - first) % 2:
            self.fail("a key has no value")
        target = self._stack[first - 1]
        if target.kind not in (kind, "made", "new"):
            self.fail("what it adds to does not hold items")
        if kind != "list":
            self._count_keys(first, 2 if kind == "dict" else 1)
        for item in self._stack[first:]:
            self._include(target, item)
        if target.part:
            self.fail("it changes what is part of something already")
        del self._stack[first:]

    def _count_keys(self, first: int, step: int) -> None:
        """Keys may all have the same hash; each is compared with those before it then. That of a text is
        random."""
        if not self._metadata:
            return
        for key in self._stack[first::step]:
            if key.kind in ("text", "bytes", "counted"):
                continue
            self._keys += 1
            self._comparisons += self._keys * key.weight
            if self._comparisons > self._limit:
                self.fail("it has too many keys that are no texts")

    def call(self, made: str) -> None:
        arguments, function = self._pop(), self._pop()
        if function.kind != "global":
            self.fail("what it calls is no class or function")
        if arguments.kind != "tuple":
            self.fail("its arguments are no tuple")
        if arguments.has_range:
            self.fail("a range would be written out")
        if function.makes == "bytes" and arguments.has_number:
            self.fail("it makes as many bytes as a number says")
        value = _Value(_MADE_BY.get(function.makes, made))
        self._include(value, function)
        self._include(value, arguments)
        self._push(value)

    def call_with_names(self) -> None:
        names = self._pop()
        if names.kind != "dict":
            self.fail("its named arguments are no dict")
        self.call("new")
        self._include(self._top(), names)

    def build(self) -> None:
        state, target = self._pop(), self._top()
        if target.kind not in ("new", "counted") and (self._metadata or target.kind != "made"):
            self.fail("what it changes is no new object")
        self._include(target, state)
        if target.part:
            self.fail("it changes what is part of something already")

    def persistent(self) -> None:
        storage = _Value("plain")
        self._include(storage, self._pop())
        self._push(storage)

    # The stack.

    def _fence(self) -> int:
        return self._marks[-1] if self._marks else 0

    def _top(self) -> _Value:
        if len(self._stack) <= self._fence():
            self.fail("the stack is too short")
        return self._stack[-1]

    def _pop(self) -> _Value:
        value = self._top()
        self._stack.pop()
        return value

    def last(self, count: int) -> int:
        """The start of the last ``count`` values."""
        if len(self._stack) - self._fence() < count:
            self.fail("the stack is too short")
        return len(self._stack) - count

    def pop_mark(self) -> int:
        if not self._marks:
            self.fail("there is no mark")
        return self._marks.pop()

    def _push(self, value: _Value) -> None:
        if value.weight > self._limit:
            self.fail("it repeats itself beyond measure")
        self._stack.append(value)

    def _include(self, whole: _Value, part: _Value) -> None:
        part.part = True
        whole.weight += part.weight
        whole.depth = max(whole.depth, part.depth + 1)
        if whole.weight > self._limit:
            self.fail("it repeats itself beyond measure")
        if whole.depth > _DEEPEST:
            self.fail("it is nested too deep")


_ACTIONS: dict[int, Callable[[_Checker], None]] = {
    **dict.fromkeys(b"GJKMN\x88\x89", _Checker.plain),
    **dict.fromkeys(b"\x8a\x8b", _Checker.integer),
    **dict.fromkeys(b"TUX\x8c\x8d", _Checker.push_text),
    **dict.fromkeys(b"BC\x8e\x96", _Checker.push_bytes),
    **dict.fromkeys(b"hj", _Checker.get),
    **dict.fromkeys(b"qr", _Checker.put),
    ord("("): _Checker.mark,
    ord(")"): lambda checker: checker.make_tuple(checker.last(0)),
    ord("Q"): _Checker.persistent,
    ord("R"): lambda checker: checker.call("made"),
    ord("]"): lambda checker: checker.push_empty("list"),
    ord("a"): lambda checker: checker.extend("list", checker.last(1)),
    ord("b"): _Checker.build,
    ord("c"): _Checker.global_of_lines,
    ord("e"): lambda checker: checker.extend("list", checker.pop_mark()),
    ord("s"): lambda checker: checker.extend("dict", checker.last(2)),
    ord("t"): lambda checker: checker.make_tuple(checker.pop_mark()),
    ord("u"): lambda checker: checker.extend("dict", checker.pop_mark()),
    ord("}"): lambda checker: checker.push_empty("dict"),
    0x81: lambda checker: checker.call("new"),
    0x85: lambda checker: checker.make_tuple(checker.last(1)),
    0x86: lambda checker: checker.make_tuple(checker.last(2)),
    0x87: lambda checker: checker.make_tuple(checker.last(3)),
    0x8F: lambda checker: checker.push_empty("set"),
    0x90: lambda checker: checker.extend("set", checker.pop_mark()),
    0x91: _Checker.make_frozen_set,
    0x92: _Checker.call_with_names,
    0x93: _Checker.global_of_stack,
    0x94: _Checker.memoize,
    0x95: _Checker.frame,
}
