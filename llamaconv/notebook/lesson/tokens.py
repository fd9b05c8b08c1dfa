"""Text as the tokens of a model, and tokens as text.

The sample reads bytes. Another model reads the tokens of its own tokenizer.json. If that cannot be
used, tokens are the bytes of the text modulo the vocabulary, shown as numbers, and `Tokens.notice`
says why: such numbers mean nothing to the model.

Limit: tokenizer.json only, read by the tokenizers package; not Meta's tokenizer.model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.untrusted.files import open_file

INSTALL = "pip install 'tokenizers>=0.22.1,<1'"
"""What the optional extra ``lesson`` installs."""

BYTES = 256
"""The vocabulary of a model of bytes."""

_FILE = "tokenizer.json"
# Those of models with 262,144 tokens have some 35 MB.
_MOST_BYTES = 200_000_000
# English text of 8 kB has some 2,000.
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class Tokens:
    """How text becomes tokens, and tokens become text.

    Attributes:
        vocab_size: The number of tokens.
        tokenizer: A ``tokenizers.Tokenizer``; None for bytes and for numbers.
        notice: Why there is no tokenizer, "" if there is one or none is needed.
    """

    vocab_size: int
    tokenizer: Any = None
    notice: str = ""

    @property
    def are_bytes(self) -> bool:
        """Whether a token is a byte of the text."""
        return self.tokenizer is None and self.vocab_size == BYTES

    @property
    def are_text(self) -> bool:
        """Whether tokens can be shown as text."""
        return self.are_bytes or self.tokenizer is not None

    @property
    def unit(self) -> str:
        """What a token is called."""
        return "byte" if self.are_bytes else "token"

    def start(self) -> list[int]:
        """Return the tokens that the model expects at the start of a text."""
        return list(self.tokenizer.encode("").ids) if self.tokenizer else []

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without those of its start."""
        if self.tokenizer:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return [byte % self.vocab_size for byte in text.encode()]

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """Return the text of ``tokens`` that follow the tokens ``after``; ⏎ ends a line.

        Args:
            tokens: The tokens.
            after: What came before: a space between two words may belong to neither token.
        """
        if self.tokenizer:
            before = self._text(after)
            whole = self._text([*after, *tokens])
            text = whole[len(before) :] if whole.startswith(before) else self._text(tokens)
        elif self.are_bytes:
            text = bytes(tokens).decode(errors="replace")
        else:
            return " ".join(map(str, tokens))
        return text.replace("\n", "⏎")

    def labels(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Return one short text per token for an axis, with ␣ for a space and ⏎ for a new line."""
        return tuple(_visible(self._label(token)) for token in tokens)

    def _label(self, token: int) -> str:
        if self.are_bytes:
            return (
                chr(token)
                if (chr(token).isprintable() and token < 128) or token == 10
                else (f"\\x{token:02x}")
            )
        if not self.tokenizer:
            return str(token)
        text = self._text([token])
        # Decoding drops the space that begins a text.
        starts_word = (self.tokenizer.id_to_token(token) or "").startswith("▁")
        return f" {text}" if starts_word and not text.startswith(" ") else text

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def open_tokens(folder: Path | None, vocab_size: int, name: str, text: str) -> Tokens:
    """Find how a model reads text.

    Args:
        folder: The folder of its tokenizer.json, None if none is known.
        vocab_size: The number of its tokens. A model of 256 tokens reads bytes.
        name: What the notice calls the checkpoint.
        text: English text, to try the tokenizer.

    Returns:
        The tokens, with the tokenizer or the reason why there is none.
    """
    if vocab_size == BYTES:
        return Tokens(vocab_size)
    if folder is None or not (folder / _FILE).is_file():
        where = folder / _FILE if folder else f"{name}: {_FILE}"
        return _as_numbers(
            vocab_size, f"{where}: not found", f"Copy the model's {_FILE} next to its weights"
        )
    path = folder / _FILE
    try:
        import tokenizers
    except ImportError:
        needs = f"{path}: needs the tokenizers package, which is not installed"
        return _as_numbers(vocab_size, needs, f"Install it: {INSTALL}")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(_read(path))
        found = len(tokenizer.encode(text).ids)
    # The package raises nothing more specific than Exception.
    except Exception as error:
        wrong = f"{path}: cannot be used ({error})"
        return _as_numbers(vocab_size, wrong, "Download the file again")
    most = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    remedy = "Use the tokenizer that belongs to the weights"
    if most >= vocab_size:
        wrong = f"{path}: has token {most}, and the model has {vocab_size} tokens"
        return _as_numbers(vocab_size, wrong, remedy)
    if found < _LEAST_TOKENS:
        wrong = f"{path}: makes {found} tokens of {len(text)} characters of English"
        return _as_numbers(vocab_size, wrong, remedy)
    return Tokens(vocab_size, tokenizer)


def _as_numbers(vocab_size: int, wrong: str, remedy: str) -> Tokens:
    """Return the tokens of a model whose tokenizer cannot be used, and why."""
    consequence = "so the model reads the bytes of the text as numbers, which are no text to it"
    return Tokens(vocab_size, notice=f"{wrong}, {consequence}. {remedy}")


def _read(path: Path) -> str:
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return file.read().decode()
