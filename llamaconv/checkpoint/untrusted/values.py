"""Rules for single values that appear in several formats: sizes of tensors, and names of files."""

from __future__ import annotations

from typing import Any, TypeGuard

from llamaconv.checkpoint.untrusted.pickle_data import PickledCall

# A tensor of a Llama has two at most; torch's own limit is 64.
_MOST_DIMENSIONS = 8


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether ``value`` is a whole number from 0 on that fits in a signed 64-bit integer."""
    return type(value) is int and 0 <= value < 2**63


def sizes(value: Any, container: type[list[Any] | tuple[Any, ...]] = tuple) -> tuple[int, ...]:
    """Return a shape, strides, or offsets, in elements or bytes, as a tuple.

    Args:
        value: What a file holds. A ``torch.Size`` in a pickle counts as a tuple.
        container: The type that it must have: ``list`` in JSON, ``tuple`` in a pickle.

    Raises:
        ValueError: It is something else, or longer than the shape of any weight.
    """
    if type(value) is PickledCall and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not container or not all(map(is_whole, value)):
        raise ValueError(
            f"a shape, strides or offsets must be a {container.__name__} of whole numbers from 0 on"
        )
    if len(value) > _MOST_DIMENSIONS:
        raise ValueError(f"{len(value)} dimensions found; no weight has more than two")
    return tuple(value)


def is_bare_name(text: object) -> TypeGuard[str]:
    """Return whether ``text`` names a file in its folder, and can lead nowhere else."""
    return type(text) is str and text not in ("", ".", "..") and {"/", "\\", "\0"}.isdisjoint(text)
