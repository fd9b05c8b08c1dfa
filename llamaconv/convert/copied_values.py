"""The bytes of an entry that is copied as it lies, for the writer of a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.convert.output import Written


class ValueBlocks:
    """An entry as rows of one byte; see `llamaconv.convert.output.Blocks`."""

    def __init__(self, value: StoredValue | MadeValue) -> None:
        """Give the bytes of ``value``."""
        self._value = value

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:  # noqa: ARG002
        """Yield its bytes ``first`` to ``last`` (excluded); raises what its own ``blocks`` does."""
        for block in self._value.blocks(first):
            yield memoryview(block)[: last - first]
            first += len(block)

    def is_valid(self, name: str) -> bool:  # noqa: ARG002
        """Return True: nothing is cast."""
        return True

    def expect(self, name: str, first: int, last: int, kept: int) -> None:
        """Prepare nothing: an entry is read from a file that is here."""

    def is_needed_again(self, name: str) -> bool:  # noqa: ARG002
        """Return False."""
        return False

    def wrote(self, written: Written) -> None:
        """Note nothing."""
