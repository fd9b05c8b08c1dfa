"""The bytes of an entry that is copied as it lies, for the writer of a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.report.errors import FailedError

_BLOCK_BYTES = 1 << 20


class ValueBlocks:
    """An entry as rows of one byte; see `llamaconv.convert.output.Blocks`."""

    def __init__(self, value: StoredValue | MadeValue) -> None:
        """Give the bytes of ``value``."""
        self._value = value

    def blocks(self, name: str, first: int, last: int) -> Iterator[memoryview]:
        """Yield its bytes ``first`` to ``last`` (excluded).

        Raises:
            OSError: Its file cannot be read.
            FailedError: The file is shorter than its metadata says.
        """
        if isinstance(self._value, MadeValue):
            yield memoryview(self._value.read())[first:last]
            return
        with self._value.file.open("rb") as file:
            file.seek(self._value.offset + first)
            while first < last:
                block = file.read(min(_BLOCK_BYTES, last - first))
                if not block:
                    raise FailedError(
                        f"{self._value.file}: {name} ends {last - first} bytes early; the file was "
                        "modified after it was opened. Try again when nothing writes to it"
                    )
                first += len(block)
                yield memoryview(block)

    def is_valid(self, name: str) -> bool:  # noqa: ARG002
        """Return True: nothing is cast."""
        return True
