"""Commands that are shown to be copied: every word quoted, and nothing in them that does not print.

The path of a folder may have letters that a terminal acts on, or that turn the direction of
writing; bash and zsh have escapes for them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def quote(word: str) -> str:
    """One word for a shell."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def join(words: Iterable[str]) -> str:
    """A command of several words."""
    return " ".join(map(quote, words))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return f"\\{letter}" if letter in "\\'" else letter
    # Bytes of a name that are no text stand in it as lone surrogates.
    surrogate = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", surrogate))
