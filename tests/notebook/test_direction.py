"""The prose of a notebook follows the direction of its conversion."""

from dataclasses import replace

import pytest

from llamaconv import Target, make_plan, open_checkpoint, sample_path
from llamaconv.notebook import direction

SAMPLE = open_checkpoint(sample_path())
META = replace(SAMPLE, format="meta", rope="interleaved")
DCP = replace(META, format="dcp", naming="titan-0.3")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            Target(),
            "to dcp titan-0.3: the rows of every head of q and k go from half_split to inter",
        ),
        (
            Target(rope="half_split"),
            "no row moves, because both keep the rows of q and k half_split",
        ),
        (Target(to="hf"), "From Hugging Face to Hugging Face: no row moves"),
    ],
)
def test_plan_says_whether_its_rows_move(target: Target, said: str) -> None:
    assert said in str(direction.of_plan(make_plan(SAMPLE, target)))


def test_two_checkpoints_say_whether_rows_moved_between_them() -> None:
    assert "go from interleaved to half_split" in str(direction.between(DCP, SAMPLE))
    assert "From Meta to dcp titan-0.3: no row moves" in str(direction.between(META, DCP))
    assert "is not known" in str(direction.between(replace(DCP, rope=None), SAMPLE))
