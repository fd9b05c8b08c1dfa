"""Pickles of any content: calls, and objects of any state, as Python writes those."""

from __future__ import annotations

import copyreg
from typing import Any


class Call:
    """Pickled as a call of a function with arguments, a state set afterwards."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, *([state] if state is not None else []))

    def __reduce__(self) -> Any:
        return self.reduced


class Of:
    """Pickled as an object of the class ``kind`` with any state, as Python writes those."""

    def __init__(self, kind: type, state: Any) -> None:
        self.kind, self.state = kind, state

    # The pickler writes a state only for what says that it is of the class.
    __class__ = property(lambda self: self.kind)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg.__newobj__, (self.kind,), self.state  # type: ignore[attr-defined]
