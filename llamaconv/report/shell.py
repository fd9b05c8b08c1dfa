"""Commands to copy: every word is quoted, and every character is printable.

A path may contain characters that a terminal acts on, or that reverse the direction of writing;
bash and zsh have escapes for them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def quote(word: str) -> str:
    """Return one word, quoted for a shell."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def join(words: Iterable[str]) -> str:
    """Return a command of several words."""
    return " ".join(map(quote, words))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return f"\\{letter}" if letter in "\\'" else letter
    # Python represents bytes that are not UTF-8 as lone surrogates.
    surrogate = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", surrogate))
