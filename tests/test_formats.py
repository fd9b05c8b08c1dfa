"""One row per format in every table: a new format is complete, or this fails."""

from typing import get_args

from llamaconv.checkpoint.checkpoint import Format
from llamaconv.checkpoint.open import OPENERS
from llamaconv.convert.target_files import WRITERS
from llamaconv.plan.target import CHOICES, RULES, Target
from llamaconv.verify.independent_readers import READERS


def test_every_table_has_a_row_per_format() -> None:
    formats = set(get_args(Format))
    assert formats == {"huggingface", "meta", "dcp", "torch_checkpointing"}
    for table in (OPENERS, RULES, READERS):
        assert set(table) == formats


def test_what_is_written_can_be_chosen_and_the_rest_cannot() -> None:
    assert set(WRITERS) == {name for name, rules in RULES.items() if rules.to}
    assert set(RULES) - set(WRITERS) == {"torch_checkpointing"}


def test_the_values_of_to_are_the_formats() -> None:
    assert {"auto", *(RULES[one].to for one in WRITERS)} == set(CHOICES["to"])
    for format_ in WRITERS:
        assert Target(to=RULES[format_].to).format == format_
