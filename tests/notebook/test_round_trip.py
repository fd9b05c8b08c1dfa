"""Round trips, deliberate damage, and the notebook that shows both."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import checkpoints, headless

from llamaconv import FailedError, verify_checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.notebook import damage
from llamaconv.notebook.panels.verify import tensors
from llamaconv.notebook.round_trip import round_trip

Convert = Callable[..., Conversion]
NOTEBOOK = headless.NOTEBOOKS / "5-verify.ipynb"


@pytest.mark.parametrize(
    ("first", "to"),
    [
        ({"to": "hf"}, "dcp"),
        ({"to": "dcp", "shards": 3}, "meta"),
        pytest.param({"to": "hf"}, "meta", marks=pytest.mark.thorough),
        pytest.param({"to": "meta"}, "dcp", marks=pytest.mark.thorough),
        pytest.param({"to": "meta"}, "meta", marks=pytest.mark.thorough),
        pytest.param({"to": "dcp", "shards": 3}, "dcp", marks=pytest.mark.thorough),
    ],
)
def test_round_trip_returns_every_tensor_and_leaves_no_files(
    source: Path, convert: Convert, to: str, first: dict[str, object]
) -> None:
    start = convert(source, "start", **first).target if first["to"] != "hf" else source
    options = {"to": to, "shards": 2} | ({"generation": "titan-0.2"} if to == "dcp" else {})
    target = convert(start, "there", **options).target
    before = set(target.parent.iterdir())
    back = round_trip(start, target)
    assert back.ok
    assert len(back.equal) == 111
    assert set(target.parent.iterdir()) == before


def test_round_trip_after_a_cast_is_reported_as_irreversible(
    source: Path, convert: Convert
) -> None:
    back = round_trip(source, convert(source, dtype="float32").target)
    assert back.ok
    assert "cast to float32" in str(back)


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_round_trip_of_a_damaged_target_names_the_tensor(
    source: Path, convert: Convert, name: str
) -> None:
    target = convert(source).target
    where = damage.DAMAGES[name](target)
    back = round_trip(source, target)
    assert not back.ok
    assert len(back.different) == 1
    verification = verify_checkpoint(target, source=source)
    (row,) = verification.tensor_table(only_different=True).rows
    assert row[1] == where
    with pytest.raises(FailedError, match="check bits failed"):
        verification.raise_for_errors()


@pytest.mark.parametrize("to", ["dcp", "meta", "hf"])
def test_damage_fails_the_bits_and_the_receipt(source: Path, convert: Convert, to: str) -> None:
    start = convert(source, "start").target if to == "hf" else source
    target = convert(start, "there", to=to).target
    rows = damage.catch(start, target).rows
    assert [row[0] for row in rows] == list(damage.DAMAGES)
    for _, _, failed, alone in rows:
        assert "bits" in str(failed)
        assert "digests" in str(alone)
    assert "rotated scores" in str(rows[1][2])
    assert verify_checkpoint(target, source=start).ok, "the target itself is untouched"


def test_panel_filters_tensors_that_differ(source: Path, convert: Convert) -> None:
    target = convert(source).target
    damage.flip_one_bit(target)
    made = tensors(verify_checkpoint(target, source=source))
    made.show(interactive=True)
    assert "111 of 111 tensors, 1 differ" in made.output.value
    made.widgets["only_different"].value = True
    assert "1 of 111 tensors, 1 differ" in made.output.value
    made.widgets["text"].value = "norm"
    assert "0 of 111 tensors" in made.output.value


@pytest.mark.thorough
def test_notebook_writes_a_missing_target(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "hf")
    assert headless.run(NOTEBOOK.name, tmp_path, f"source={source}", "target=out").returncode == 0
    assert verify_checkpoint(tmp_path / "out", source=source).ok


@pytest.mark.thorough
def test_notebook_fails_on_a_damaged_target(source: Path, convert: Convert, tmp_path: Path) -> None:
    convert(source, "out", verified=False)
    where = damage.flip_one_bit(tmp_path / "out")
    done = headless.run(NOTEBOOK.name, tmp_path, f"source={source}", "target=out")
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("error: check ")
    assert "error: check bits failed: 1 of" in done.stderr
    assert where in done.stderr
