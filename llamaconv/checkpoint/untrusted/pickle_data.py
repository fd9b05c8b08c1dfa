"""A pickle read as data: nothing that it names is looked up, nothing is called.

A pickle is a program for a machine with a stack, and Python's own machine does what it says:
imports, calls, sets attributes of classes, hashes whatever is made a key, and keeps memory for
entries of its memo that never come. This machine knows only the operations that Python writes for
plain values. For the rest it creates values of its own: `PickledName` if a pickle names a class or
a function, `PickledCall` if it calls one, `PersistentId` if it refers to data outside the pickle.

Limit: protocols 2 to 5, as Python 3 writes them; a pickle that was written by hand may be refused.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from typing import Any, Protocol


class Bytes(Protocol):
    """``bytes``, or a file that is mapped."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int, /) -> int:
        """Return the offset of ``sub`` from ``start`` on, or -1."""


class ForbiddenNameError(ValueError):
    """The pickle names something that no version of the writer needs; ``str`` is its name."""


class UnknownFormError(ValueError):
    """The content is in a form that llamaconv does not know; ``str`` says which."""


@dataclass(frozen=True, slots=True, eq=False)
class PickledName:
    """A class, a function or another value of a module, by name."""

    name: str


@dataclass(slots=True, eq=False)
class PickledCall:
    """The result of calling ``name`` with ``args``; ``state`` is set afterwards.

    Equal only to itself, so that it can be a key, whatever it holds.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class EnumMember:
    """A member of an enumeration, by name.

    Python 3.11.0 to 3.11.3 writes it as ``getattr(class, name)``.
    """

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """Data outside the pickle, and the key by which it is found there."""

    key: Any


_NO_NAME = re.compile(r"(?!)")


def read(
    content: Bytes,
    admitted: Collection[str],
    members: Collection[str] = (),
    later: re.Pattern[str] = _NO_NAME,
    inert: Container[str] = (),
) -> Any:
    """Read the one value in ``content``.

    Args:
        content: The pickle.
        admitted: The names, with their modules, that it may use.
        members: The members of enumerations that it may get by ``getattr``; nothing else.
        later: Matches further names and members that a later version of the writer may use.
            They become values like all others (`PickledName`, `PickledCall`, `EnumMember`), and
            the caller decides whether they matter. Such a class is called as Python calls a
            dataclass or the member of an enumeration: without arguments, with one whole number, or
            with one word if ``inert`` is given.
        inert: Names that may be called with any arguments. What these and ``later`` give may be
            filled with any state and items, which are dropped: nobody needs such values.

    Raises:
        ForbiddenNameError: The pickle uses any other name.
        ValueError: It is damaged, or does what no checkpoint needs.
    """
    try:
        return _Machine(content, admitted, members, later, inert).run()
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError("it is damaged, or was written by hand") from error


# Types of keys: their hash takes no time, whatever the value.
_KEYS = (str, int, float, bool, type(None), PickledCall)
_ORDERED_DICT, _DEFAULT_DICT = "collections.OrderedDict", "collections.defaultdict"
# An enumeration's value, such as "no" or "linear_with_warmup".
_WORD = re.compile(r"[A-Za-z0-9_.-]{0,64}", re.ASCII)
# By its name of Python 3, and by that of protocol 2.
_GETATTR = ("builtins.getattr", "__builtin__.getattr")
# Longest name of a module or a class, in bytes.
_MOST_NAME = 500


def _is_plain(args: tuple[Any, ...], words: bool) -> bool:
    """Return whether a later class may be called with these arguments, as an enumeration is."""
    if len(args) != 1:
        return False
    is_word = words and type(args[0]) is str and _WORD.fullmatch(args[0]) is not None
    return type(args[0]) is int or is_word


class _Machine:
    """The stack, the marks and the memo, and one method per operation.

    A method is given the offset after its opcode and returns the offset of the next opcode.
    """

    def __init__(
        self,
        content: Bytes,
        admitted: Collection[str],
        members: Collection[str],
        later: re.Pattern[str],
        inert: Container[str],
    ) -> None:
        self.content = content
        self.inert = inert
        self.admitted = {*admitted, *_GETATTR} if members else admitted
        self.members = members
        self.later = later
        self.names: dict[str, PickledName] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        content, at = self.content, 0
        methods = [self._unknown_operation] * 256
        for code, method in _METHODS.items():
            methods[code] = method.__get__(self)
        while at != _STOPPED:
            at = methods[content[at]](at + 1)
        if len(self.stack) != 1:
            raise ValueError("it ends with more than one value")
        return self.stack[0]

    # Values.

    def _none(self, at: int) -> int:
        self.stack.append(None)
        return at

    def _true(self, at: int) -> int:
        self.stack.append(True)
        return at

    def _false(self, at: int) -> int:
        self.stack.append(False)
        return at

    def _int_1(self, at: int) -> int:
        self.stack.append(self.content[at])
        return at + 1

    def _int_2(self, at: int) -> int:
        self.stack.append(int.from_bytes(self._take(at, 2), "little"))
        return at + 2

    def _int_4(self, at: int) -> int:
        self.stack.append(int.from_bytes(self._take(at, 4), "little", signed=True))
        return at + 4

    def _long(self, at: int) -> int:
        content, end = self._counted(at, 1)
        self.stack.append(int.from_bytes(content, "little", signed=True))
        return end

    def _float(self, at: int) -> int:
        self.stack.append(struct.unpack(">d", self._take(at, 8))[0])
        return at + 8

    def _short_text(self, at: int) -> int:
        return self._text(at, 1)

    def _text_4(self, at: int) -> int:
        return self._text(at, 4)

    def _text_8(self, at: int) -> int:
        return self._text(at, 8)

    def _text(self, at: int, width: int) -> int:
        content, end = self._counted(at, width)
        self.stack.append(content.decode("utf-8", "surrogatepass"))
        return end

    def _short_bytes(self, at: int) -> int:
        return self._bytes(at, 1)

    def _bytes_4(self, at: int) -> int:
        return self._bytes(at, 4)

    def _bytes(self, at: int, width: int) -> int:
        content, end = self._counted(at, width)
        self.stack.append(content)
        return end

    def _counted(self, at: int, width: int) -> tuple[bytes, int]:
        """Return bytes after their length (``width`` bytes), and the offset behind them."""
        length = int.from_bytes(self._take(at, width), "little")
        return self._take(at + width, length), at + width + length

    # Collections.

    def _mark(self, at: int) -> int:
        self.marks.append(len(self.stack))
        return at

    def _empty_dict(self, at: int) -> int:
        self.stack.append({})
        return at

    def _empty_list(self, at: int) -> int:
        self.stack.append([])
        return at

    def _empty_tuple(self, at: int) -> int:
        self.stack.append(())
        return at

    def _tuple_1(self, at: int) -> int:
        self.stack[-1] = (self.stack[-1],)
        return at

    def _tuple_2(self, at: int) -> int:
        stack = self.stack
        stack[-2:] = [(stack[-2], stack[-1])]
        return at

    def _tuple_3(self, at: int) -> int:
        stack = self.stack
        stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
        return at

    def _tuple(self, at: int) -> int:
        start = self.marks.pop()
        self.stack[start:] = [tuple(self.stack[start:])]
        return at

    def _append(self, at: int) -> int:
        self._extend(len(self.stack) - 1)
        return at

    def _appends(self, at: int) -> int:
        self._extend(self.marks.pop())
        return at

    def _extend(self, start: int) -> None:
        items = self._popped(start)
        if self._is_inert(self.stack[-1]):
            return
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to a value that is not a list")
        self.stack[-1].extend(items)

    def _set_item(self, at: int) -> int:
        self._update(len(self.stack) - 2)
        return at

    def _set_items(self, at: int) -> int:
        self._update(self.marks.pop())
        return at

    def _update(self, start: int) -> None:
        items = self._popped(start)
        keys = items[::2]
        if self._is_inert(self.stack[-1]):
            return
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise ValueError("it sets items of a value that is not a dict")
        if not all(type(key) in _KEYS for key in keys):
            raise ValueError("it has a key that is neither a text nor a number")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def _popped(self, start: int) -> list[Any]:
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # The memo.

    def _memoize(self, at: int) -> int:
        self.memo.append(self.stack[-1])
        return at

    def _get_1(self, at: int) -> int:
        self.stack.append(self.memo[self.content[at]])
        return at + 1

    def _get_4(self, at: int) -> int:
        self.stack.append(self.memo[int.from_bytes(self.content[at : at + 4], "little")])
        return at + 4

    def _put_1(self, at: int) -> int:
        return self._put(at, 1)

    def _put_4(self, at: int) -> int:
        return self._put(at, 4)

    def _put(self, at: int, width: int) -> int:
        if int.from_bytes(self.content[at : at + width], "little") != len(self.memo):
            raise ValueError("its memo is not filled in order")
        self.memo.append(self.stack[-1])
        return at + width

    # Names and calls.

    def _stack_global(self, at: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self._named(module, name))
        return at

    def _global(self, at: int) -> int:
        middle = self.content.find(b"\n", at)
        end = self.content.find(b"\n", middle + 1)
        if not 0 < middle - at < _MOST_NAME or not 0 < end - middle < _MOST_NAME:
            raise ValueError("it ends early")
        module, name = self.content[at:middle], self.content[middle + 1 : end]
        self.stack.append(self._named(module.decode("ascii"), name.decode("ascii")))
        return end + 1

    def _named(self, module: object, name: object) -> PickledName:
        if type(module) is not str or type(name) is not str:
            raise ValueError("it names something by a value that is not a text")
        full = f"{module}.{name}"
        # Refuses "torch" with "serialization.os.system", and every other way to cut a name.
        known = full in self.admitted or full in self.inert or self.later.fullmatch(full)
        if "." in name or not known:
            raise ForbiddenNameError(full)
        return self.names.setdefault(full, PickledName(full))

    def _new_object(self, at: int) -> int:
        return self._make(at, lambda args: not args)

    def _reduce(self, at: int) -> int:
        return self._make(at, lambda args: _is_plain(args, words=bool(self.inert)))

    def _make(self, at: int, is_plain: Callable[[tuple[Any, ...]], bool]) -> int:
        """Record a call; ``is_plain`` tells which arguments a later class may have."""
        args, named = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(named) is not PickledName:
            raise ValueError("it calls a value that is not a name")
        name = named.name
        if name in _GETATTR:
            self.stack.append(self._member(args))
        elif name not in self.admitted and name not in self.inert and not is_plain(args):
            raise ForbiddenNameError(name)
        else:
            plain = name == _DEFAULT_DICT or (name == _ORDERED_DICT and not args)
            self.stack.append({} if plain else PickledCall(name, args))
        return at

    def _is_inert(self, made: object) -> bool:
        """Return whether nobody needs this value, so that what it is filled with is dropped."""
        return (
            bool(self.inert)
            and type(made) is PickledCall
            and (made.name in self.inert or made.name not in self.admitted)
        )

    def _member(self, args: tuple[Any, ...]) -> EnumMember:
        if len(args) == 2 and type(args[0]) is PickledName and type(args[1]) is str:
            full = f"{args[0].name}.{args[1]}"
            if full in self.members or ("." not in args[1] and self.later.fullmatch(full)):
                return EnumMember(full)
        raise ForbiddenNameError("builtins.getattr")

    def _build(self, at: int) -> int:
        state, made = self.stack.pop(), self.stack[-1]
        # The attributes of an OrderedDict are not items. The result of a call with arguments may
        # be shared, as the member of an enumeration is.
        if type(made) is PickledCall and made.state is None and not made.args:
            made.state = state
        elif type(made) is not dict and not self._is_inert(made):
            raise ValueError("it sets the state of a value that it did not create")
        return at

    def _persistent_id(self, at: int) -> int:
        self.stack.append(PersistentId(self.stack.pop()))
        return at

    # Protocol, frames and end.

    def _protocol(self, at: int) -> int:
        if not 2 <= self.content[at] <= 5:
            raise ValueError("it is not a pickle of the protocols 2 to 5")
        return at + 1

    def _frame(self, at: int) -> int:
        return at + 8

    def _stop(self, _: int) -> int:
        return _STOPPED

    def _unknown_operation(self, at: int) -> int:
        code = self.content[at - 1]
        raise ValueError(f"it has the operation {code:#x}, which no checkpoint needs")

    def _take(self, at: int, length: int) -> bytes:
        if at + length > len(self.content):
            raise ValueError("it ends early")
        taken: bytes = self.content[at : at + length]
        return taken


_STOPPED = -1
# Every operation that is read, by Python's names; `pickletools` explains them.
_METHODS: dict[int, Callable[[_Machine, int], int]] = {
    code[0]: method
    for code, method in (
        (pickle.NONE, _Machine._none),
        (pickle.NEWTRUE, _Machine._true),
        (pickle.NEWFALSE, _Machine._false),
        (pickle.BININT1, _Machine._int_1),
        (pickle.BININT2, _Machine._int_2),
        (pickle.BININT, _Machine._int_4),
        (pickle.LONG1, _Machine._long),
        (pickle.BINFLOAT, _Machine._float),
        (pickle.SHORT_BINUNICODE, _Machine._short_text),
        (pickle.BINUNICODE, _Machine._text_4),
        (pickle.BINUNICODE8, _Machine._text_8),
        (pickle.SHORT_BINBYTES, _Machine._short_bytes),
        (pickle.BINBYTES, _Machine._bytes_4),
        (pickle.MARK, _Machine._mark),
        (pickle.EMPTY_DICT, _Machine._empty_dict),
        (pickle.EMPTY_LIST, _Machine._empty_list),
        (pickle.EMPTY_TUPLE, _Machine._empty_tuple),
        (pickle.TUPLE1, _Machine._tuple_1),
        (pickle.TUPLE2, _Machine._tuple_2),
        (pickle.TUPLE3, _Machine._tuple_3),
        (pickle.TUPLE, _Machine._tuple),
        (pickle.APPEND, _Machine._append),
        (pickle.APPENDS, _Machine._appends),
        (pickle.SETITEM, _Machine._set_item),
        (pickle.SETITEMS, _Machine._set_items),
        (pickle.MEMOIZE, _Machine._memoize),
        (pickle.BINGET, _Machine._get_1),
        (pickle.LONG_BINGET, _Machine._get_4),
        (pickle.BINPUT, _Machine._put_1),
        (pickle.LONG_BINPUT, _Machine._put_4),
        (pickle.STACK_GLOBAL, _Machine._stack_global),
        (pickle.GLOBAL, _Machine._global),
        (pickle.NEWOBJ, _Machine._new_object),
        (pickle.REDUCE, _Machine._reduce),
        (pickle.BUILD, _Machine._build),
        (pickle.BINPERSID, _Machine._persistent_id),
        (pickle.PROTO, _Machine._protocol),
        (pickle.FRAME, _Machine._frame),
        (pickle.STOP, _Machine._stop),
    )
}
