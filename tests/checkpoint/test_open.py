"""Which opener a folder gets, and what an opened checkpoint keeps of config.json and params.json."""

from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.open import OPENERS


@pytest.mark.parametrize(("to", "expected"), [("hf", "huggingface"), ("meta", "meta")])
def test_config_is_kept_with_its_entries_and_parameters(
    tmp_path: Path, to: str, expected: str
) -> None:
    source = checkpoints.write(tmp_path / "source", eos_token_id=7)
    target = tmp_path / "target"
    convert_checkpoint(make_plan(open_checkpoint(source), Target(to=to)), target)
    found = open_checkpoint(target)
    assert found.format == expected
    assert found.config is not None
    assert found.config.path.parent == target  # type: ignore[union-attr]
    assert found.config.params == found.params or expected == "meta"
    assert "rope_theta" in found.config.entries
    assert ("eos_token_id" in found.config.entries) == (expected == "huggingface")


def test_config_with_an_impossible_size_is_kept_without_parameters(tmp_path: Path) -> None:
    found = open_checkpoint(checkpoints.write(tmp_path / "source", num_attention_heads=-8))
    assert found.params is None
    assert found.config is not None
    assert found.config.params is None
    assert any("num_attention_heads" in str(problem) for problem in found.config.problems)


def test_plan_keeps_config_of_the_assets_and_refuses_one_that_cannot_be_read(
    tmp_path: Path,
) -> None:
    source = checkpoints.write(tmp_path / "source")
    meta = tmp_path / "meta"
    convert_checkpoint(make_plan(open_checkpoint(source), Target(to="meta")), meta)
    target = Target(to="hf", assets=str(source))
    plan = make_plan(open_checkpoint(meta), target)
    assert plan.config is not None
    assert plan.config.path == source / "config.json"
    (source / "config.json").write_text("{")
    with pytest.raises(RefusedError, match=r"config\.json: not valid JSON"):
        make_plan(open_checkpoint(meta), target).raise_for_errors()


def test_dcp_beside_safetensors_is_opened_as_dcp(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source")
    convert_checkpoint(make_plan(open_checkpoint(source), Target(to="dcp")), tmp_path / "dcp")
    for file in source.iterdir():
        file.rename(tmp_path / "dcp" / file.name)
    assert open_checkpoint(tmp_path / "dcp").format == "dcp"


def test_openers_are_named_by_the_formats_that_they_open() -> None:
    assert set(OPENERS) == {"huggingface", "meta", "dcp", "torch_checkpointing"}
