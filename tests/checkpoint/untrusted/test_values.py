"""The rules for sizes and file names that every format shares."""

from typing import Any

import pytest

from llamaconv.checkpoint.untrusted.pickle_data import PickledCall
from llamaconv.checkpoint.untrusted.values import is_bare_name, sizes


def test_sizes_of_json_and_of_pickles_become_tuples() -> None:
    assert sizes([2, 0], list) == (2, 0)
    assert sizes((2, 0)) == (2, 0)
    assert sizes(PickledCall("torch.Size", ((2, 0),))) == (2, 0)


@pytest.mark.parametrize("value", [None, 2, "2", [True], [2.0], [-1], [2**63], [[2]], {2: 2}, (2,)])
def test_invalid_sizes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        sizes(value, list)


def test_list_in_a_pickle_is_refused() -> None:
    with pytest.raises(ValueError, match="a tuple of whole numbers"):
        sizes([2])


def test_eight_dimensions_are_accepted_and_nine_refused() -> None:
    assert sizes((1,) * 8) == (1,) * 8
    with pytest.raises(ValueError, match="9 dimensions"):
        sizes((1,) * 9)


@pytest.mark.parametrize("name", ["a.safetensors", "..a", "a b", "ä"])
def test_file_names_are_bare(name: str) -> None:
    assert is_bare_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "a\\b", "a\0", 1, None])
def test_paths_and_other_values_are_not_bare_names(name: object) -> None:
    assert not is_bare_name(name)
