"""The way back, damage on purpose, and the notebook that shows both."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import headless
import pytest

from llamaconv import FailedError, damage, verify_checkpoint
from llamaconv.convert import Conversion
from llamaconv.panels.verify import tensors
from llamaconv.roundtrip import way_back

Convert = Callable[..., Conversion]
NOTEBOOK = headless.NOTEBOOKS / "5-verify.ipynb"


@pytest.mark.parametrize("to", ["dcp", "meta"])
@pytest.mark.parametrize("first", [{"to": "hf"}, {"to": "meta"}, {"to": "dcp", "shards": 3}])
def test_every_tensor_comes_back_and_nothing_is_left_behind(
    source: Path, convert: Convert, to: str, first: dict[str, object]
) -> None:
    start = convert(source, "start", **first).target if first["to"] != "hf" else source
    options = {"to": to, "shards": 2} | ({"generation": "titan-0.2"} if to == "dcp" else {})
    target = convert(start, "there", **options).target
    before = set(target.parent.iterdir())
    back = way_back(start, target)
    assert back.ok
    assert len(back.equal) == 111
    assert set(target.parent.iterdir()) == before


def test_a_cast_is_said_to_be_not_reversible(source: Path, convert: Convert) -> None:
    back = way_back(source, convert(source, dtype="float32").target)
    assert back.ok
    assert "cast to float32" in str(back)


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_damage_does_not_come_back_equal_and_its_tensor_is_named(
    source: Path, convert: Convert, name: str
) -> None:
    target = convert(source).target
    where = damage.DAMAGES[name](target)
    back = way_back(source, target)
    assert not back.ok
    assert len(back.different) == 1
    verification = verify_checkpoint(source, target)
    (row,) = verification.tensor_table(only_different=True).rows
    assert row[1] == where
    with pytest.raises(FailedError, match="check bits failed"):
        verification.check()


@pytest.mark.parametrize("to", ["dcp", "meta", "hf"])
def test_no_damage_gets_past_bits_and_receipt(source: Path, convert: Convert, to: str) -> None:
    start = convert(source, "start").target if to == "hf" else source
    target = convert(start, "there", to=to).target
    rows = damage.catch(start, target).rows
    assert [row[0] for row in rows] == list(damage.DAMAGES)
    for _, _, failed, alone in rows:
        assert "bits" in str(failed)
        assert "digests" in str(alone)
    assert "rotated scores" in str(rows[1][2])
    assert verify_checkpoint(start, target).ok, "the target itself is untouched"


def test_the_panel_shows_only_what_differs(source: Path, convert: Convert) -> None:
    target = convert(source).target
    damage.flip_one_bit(target)
    made = tensors(verify_checkpoint(source, target))
    made.show(interactive=True)
    assert "111 of 111 tensors, 1 differ" in made.output.value
    made.widgets["only_different"].value = True
    assert "1 of 111 tensors, 1 differ" in made.output.value
    made.widgets["text"].value = "norm"
    assert "0 of 111 tensors" in made.output.value


def test_the_notebook_writes_what_is_not_there_and_fails_on_what_is_damaged(
    tmp_path: Path,
) -> None:
    source = checkpoints.write(tmp_path / "hf")
    assert headless.run(NOTEBOOK.name, tmp_path, f"source={source}", "target=out").returncode == 0
    where = damage.flip_one_bit(tmp_path / "out")
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}", "target=out")
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("error: check ")
    assert "error: check bits failed: 1 of" in done.stderr
    assert where in done.stderr
