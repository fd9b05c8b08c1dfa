"""One row per format in every table: a new format is complete, or this fails."""

from typing import get_args

from llamaconv.checkpoint.checkpoint import Format
from llamaconv.checkpoint.open import OPENERS
from llamaconv.convert.target_files import WRITERS
from llamaconv.plan.target import CHOICES, RULES, Target
from llamaconv.verify.independent_readers import READERS


def test_every_table_has_a_row_per_format() -> None:
    formats = set(get_args(Format))
    assert formats == {"huggingface", "meta", "dcp"}
    for table in (OPENERS, RULES, READERS, WRITERS):
        assert set(table) == formats


def test_the_values_of_to_are_the_formats() -> None:
    assert {"auto", *(rules.to for rules in RULES.values())} == set(CHOICES["to"])
    for format_, rules in RULES.items():
        assert Target(to=rules.to).format == format_
