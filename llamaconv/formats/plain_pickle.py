"""A pickle read as data: nothing that it names is looked up, nothing is called.

A pickle is a program for a machine with a stack, and Python's own machine does what it says:
imports, calls, sets attributes of classes, hashes whatever is made a key, and keeps memory for
entries of its memo that never come. This one knows only the operations that Python writes for
plain values, and makes values of its own for the rest: `Named` where a pickle names a class or a
function, `Made` where it has one called, `Persistent` where it refers to something beside it.

Limit: protocols 2 to 5, as Python 3 writes them; a pickle that was written by hand may be refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol


class Bytes(Protocol):
    """``bytes``, or a file that is mapped."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int, /) -> int: ...


class ForeignError(ValueError):
    """The pickle names something that no version of the writer needs; ``str`` is its name."""


class UnknownFormError(ValueError):
    """The content is in a form that llamaconv does not know; ``str`` says which."""


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A class, a function or another value of a module, by name."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What the pickle makes by calling ``name`` with ``args``; ``state`` is set afterwards.

    Equal to itself only, so that it can be a key, whatever it holds.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A member of an enumeration, by name; Python 3.11.0 to 3.11.3 writes it as ``getattr(class, name)``."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What lies beside the pickle, and by which words it is found there."""

    key: Any


_NO_NAME = re.compile(r"(?!)")


def read(
    content: Bytes,
    admitted: Collection[str],
    members: Collection[str] = (),
    later: re.Pattern[str] = _NO_NAME,
) -> Any:
    """Read the one value in ``content``.

    Args:
        content: The pickle.
        admitted: The names, with their modules, that it may use.
        members: The members of enumerations that it may get by ``getattr``, which gets nothing else.
        later: Matches further names and members, those that a later version of the writer may
            use. They are values like all others (`Named`, `Made`, `Member`), and the caller decides
            whether they matter. Such a class is made as Python makes a dataclass or the member of
            an enumeration: without arguments, or from one whole number.

    Raises:
        ForeignError: The pickle uses any other name.
        ValueError: It is damaged, or does what no checkpoint needs.
    """
    try:
        return _Machine(content, admitted, members, later).run()
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError("it is damaged, or was made by hand") from error


# What may be a key: what hashes in no time, however it was made.
_KEYS = (str, int, Made)
_ORDERED_DICT = "collections.OrderedDict"
# By its name of Python 3, and by that of protocol 2.
_GETATTR = ("builtins.getattr", "__builtin__.getattr")


class _Machine:
    def __init__(
        self,
        content: Bytes,
        admitted: Collection[str],
        members: Collection[str],
        later: re.Pattern[str],
    ) -> None:
        self.content = content
        self.admitted = {*admitted, *_GETATTR} if members else admitted
        self.members = members
        self.later = later
        self.names: dict[str, Named] = {}
        self.at = 0

    def run(self) -> Any:
        content, at = self.content, 0
        stack: list[Any] = []
        marks: list[int] = []
        memo: list[Any] = []
        push, pop = stack.append, stack.pop
        # The operations stand in about the order in which they are frequent.
        while True:
            op = content[at]
            at += 1
            if op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif op == 0x68:  # BINGET
                push(memo[content[at]])
                at += 1
            elif op == 0x6A:  # LONG_BINGET
                push(memo[int.from_bytes(content[at : at + 4], "little")])
                at += 4
            elif op in (0x71, 0x72):  # BINPUT, LONG_BINPUT
                width = 1 if op == 0x71 else 4
                if int.from_bytes(content[at : at + width], "little") != len(memo):
                    raise ValueError("its memo is not filled in order")
                memo.append(stack[-1])
                at += width
            elif op == 0x4B:  # BININT1
                push(content[at])
                at += 1
            elif op == 0x4D:  # BININT2
                push(int.from_bytes(self._take(at, 2), "little"))
                at += 2
            elif op == 0x4A:  # BININT
                push(int.from_bytes(self._take(at, 4), "little", signed=True))
                at += 4
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif op == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif op in _LENGTHS:
                width, decode = _LENGTHS[op]
                length = int.from_bytes(self._take(at, width), "little")
                at += width
                push(decode(self._take(at, length)))
                at += length
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op == 0x7D:  # EMPTY_DICT
                push({})
            elif op == 0x5D:  # EMPTY_LIST
                push([])
            elif op == 0x29:  # EMPTY_TUPLE
                push(())
            elif op == 0x74:  # TUPLE
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            elif op in (0x75, 0x73):  # SETITEMS, SETITEM
                start = marks.pop() if op == 0x75 else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                self._set_items(stack[-1], items)
            elif op in (0x65, 0x61):  # APPENDS, APPEND
                start = marks.pop() if op == 0x65 else len(stack) - 1
                items = stack[start:]
                del stack[start:]
                if type(stack[-1]) is not list:
                    raise ValueError("it appends to what is no list")
                stack[-1].extend(items)
            elif op == 0x93:  # STACK_GLOBAL
                name, module = pop(), pop()
                push(self._named(module, name))
            elif op == 0x63:  # GLOBAL
                middle = content.find(b"\n", at)
                end = content.find(b"\n", middle + 1)
                # Names of modules and classes; a line without an end is none.
                if not 0 < middle - at < 500 or not 0 < end - middle < 500:
                    raise ValueError("it ends early")
                push(
                    self._named(
                        content[at:middle].decode("ascii"),
                        content[middle + 1 : end].decode("ascii"),
                    )
                )
                at = end + 1
            elif op in (0x81, 0x52):  # NEWOBJ, REDUCE
                args, made = pop(), pop()
                if type(args) is not tuple or type(made) is not Named:
                    raise ValueError("it calls what has no name")
                if made.name in _GETATTR:
                    push(self._member(args))
                elif made.name not in self.admitted and not _is_plain(op, args):
                    raise ForeignError(made.name)
                else:
                    plain = made.name == _ORDERED_DICT and not args
                    push({} if plain else Made(made.name, args))
            elif op == 0x62:  # BUILD
                state, made = pop(), stack[-1]
                # The attributes of an OrderedDict are none of its items. What a call gave may be
                # something that others use too, as the member of an enumeration is.
                if type(made) is Made and made.state is None and not made.args:
                    made.state = state
                elif type(made) is not dict:
                    raise ValueError("it sets the state of what it has not made")
            elif op == 0x4E:  # NONE
                push(None)
            elif op == 0x88:  # NEWTRUE
                push(True)
            elif op == 0x89:  # NEWFALSE
                push(False)
            elif op == 0x47:  # BINFLOAT
                push(struct.unpack(">d", self._take(at, 8))[0])
                at += 8
            elif op == 0x51:  # BINPERSID
                push(Persistent(pop()))
            elif op == 0x80:  # PROTO
                if not 2 <= content[at] <= 5:
                    raise ValueError("it is no pickle of the protocols 2 to 5")
                at += 1
            elif op == 0x95:  # FRAME
                at += 8
            elif op == 0x2E:  # STOP
                if len(stack) != 1:
                    raise ValueError("it ends with more than one value")
                return stack[0]
            else:
                raise ValueError(f"it has the operation {op:#x}, which no checkpoint needs")

    def _take(self, at: int, length: int) -> bytes:
        if at + length > len(self.content):
            raise ValueError("it ends early")
        taken: bytes = self.content[at : at + length]
        return taken

    def _named(self, module: object, name: object) -> Named:
        if type(module) is not str or type(name) is not str:
            raise ValueError("it names something by what is no name")
        full = f"{module}.{name}"
        # Neither "torch" with "serialization.os.system" nor any other cut of a name that is admitted.
        if "." in name or not (full in self.admitted or self.later.fullmatch(full)):
            raise ForeignError(full)
        return self.names.setdefault(full, Named(full))

    def _member(self, args: tuple[Any, ...]) -> Member:
        if len(args) == 2 and type(args[0]) is Named and type(args[1]) is str:
            full = f"{args[0].name}.{args[1]}"
            if full in self.members or ("." not in args[1] and self.later.fullmatch(full)):
                return Member(full)
        raise ForeignError("builtins.getattr")

    def _set_items(self, target: object, items: list[Any]) -> None:
        keys = items[::2]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is no dict")
        if not all(type(key) in _KEYS for key in keys):
            raise ValueError("it has a key that is neither a text nor a number")
        target.update(zip(keys, items[1::2], strict=True))


def _is_plain(op: int, args: tuple[Any, ...]) -> bool:
    """Whether Python makes a dataclass (NEWOBJ) or the member of an enumeration (REDUCE) like this."""
    return not args if op == 0x81 else len(args) == 1 and type(args[0]) is int


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


# Bytes of the length that stands before the value, and what the value is made of.
_LENGTHS: dict[int, tuple[int, Any]] = {
    0x8C: (1, _text),  # SHORT_BINUNICODE
    0x58: (4, _text),  # BINUNICODE
    0x8D: (8, _text),  # BINUNICODE8
    0x43: (1, bytes),  # SHORT_BINBYTES
    0x42: (4, bytes),  # BINBYTES
    0x8A: (1, lambda content: int.from_bytes(content, "little", signed=True)),  # LONG1
}
