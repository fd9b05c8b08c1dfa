"""Ranges that a store sent, rebuilt from a target: each kind of damage to the target shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.remote import FolderElsewhere

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.huggingface import open_repository
from llamaconv.convert.engine import Engine
from llamaconv.model import rope
from llamaconv.plan.plan import Plan
from llamaconv.verify.rebuilt_ranges import RebuiltRanges
from llamaconv.verify.verify import verify_fetched

Q = "model.layers.5.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaconv.checkpoint.fetch_ahead.RANGE_BYTES", 20_000)


def planned(source: Path, **options: Any) -> Plan:
    """A plan for a source that lists no digests."""
    folder = FolderElsewhere(source)
    folder.digests.clear()
    return make_plan(open_repository(folder), Target(**options))


def converted(
    plan: Plan, target: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[Any], Any]:
    """The checks of a conversion by name, what it fetched, and its receipt."""
    fetched: list[Any] = []
    sum_up = Engine._sum_up

    def noted(engine: Engine) -> None:
        sum_up(engine)
        fetched.extend(engine.fetched)

    monkeypatch.setattr(Engine, "_sum_up", noted)
    done = convert_checkpoint(plan, target)
    assert done.verification is not None
    return {one.name: one for one in done.verification.checks}, fetched, done.receipt


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 5},
        {"generation": "titan-main", "shards": 2},
        {"rope": "half_split"},
        {"to": "hf", "max_shard_size": 100_000},
        {"to": "meta", "shards": 2},
        {"tie": "embedding"},
    ],
    ids=str,
)
def test_every_target_gives_the_ranges_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    checks, _, _ = converted(planned(source, **options), tmp_path / "target", monkeypatch)
    assert checks["fetched"].ok and checks["fetched"].control == 2
    assert "nothing was fetched again" in checks["fetched"].detail
    assert "rotated scores" in checks


def _flip(tensors: dict[str, Any]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"].view(torch.int16)[3, 5] ^= 1


def _swap_rows(tensors: dict[str, Any]) -> None:
    tensors[Q] = tensors[Q].flip(0).contiguous()


def _other_layout(tensors: dict[str, Any]) -> None:
    heads = checkpoints.GQA.n_heads
    tensors[Q] = rope.relayout(tensors[Q], heads, "half_split", "interleaved").contiguous()


@pytest.mark.parametrize("damage", [_flip, _swap_rows, _other_layout])
def test_damage_to_a_target_changes_a_digest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    plan = planned(source, to="hf")
    _, fetched, written = converted(plan, tmp_path / "target", monkeypatch)
    copy = shutil.copytree(tmp_path / "target", tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = verify_fetched(plan, copy, written, fetched=fetched).checks
    assert [one.name for one in found] == ["structure", "fetched"]
    assert found[0].ok and not found[1].ok and found[1].value == 1
    assert "differ from what the store sent" in found[1].detail


def test_wrong_byte_that_came_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is of what came: the same target, and another byte fetched."""
    plan = planned(source)
    _, fetched, written = converted(plan, tmp_path / "target", monkeypatch)
    name, first, last, digest = fetched[7]
    fetched[7] = (name, first, last, digest[::-1])
    found = verify_fetched(plan, tmp_path / "target", written, fetched=fetched).checks
    assert not found[1].ok


@pytest.mark.parametrize(
    ("options", "why"), [({"dtype": "float32"}, "after a cast"), ({}, "an interrupted run")]
)
def test_files_that_cannot_be_rebuilt_are_named(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    why: str,
) -> None:
    plan = planned(source, **options)
    _, fetched, written = converted(plan, tmp_path / "target", monkeypatch)
    one_file = [one for one in fetched if one[0].startswith("model-00001")]
    if not options:
        fetched = [one for one in fetched if one not in one_file[3:5]]
    checks = verify_fetched(plan, tmp_path / "target", written, fetched=fetched).checks
    digests = next(one for one in checks if one.name == "digests")
    assert digests.ok and why in digests.detail and "model-00001" in digests.detail
    assert "rotated scores" not in [one.name for one in checks]


def test_every_gap_in_what_was_fetched_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(source)
    _, fetched, _ = converted(plan, tmp_path / "target", monkeypatch)
    assert not RebuiltRanges(plan, fetched).unknown
    for left_out in range(0, len(fetched), 7):
        name = fetched[left_out][0]
        some = [one for number, one in enumerate(fetched) if number != left_out]
        assert RebuiltRanges(plan, some).unknown.keys() == {name}


def test_a_tied_head_that_differs_from_its_embedding_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoints.tensors(replace(checkpoints.GQA, n_layers=1, tied=True))
    del tensors["lm_head.weight"]
    config = {"tie_word_embeddings": True, "num_hidden_layers": 1}
    source = checkpoints.write(tmp_path / "source", tensors, **config)
    plan = planned(source, to="meta")
    checks, fetched, written = converted(plan, tmp_path / "target", monkeypatch)
    assert checks["fetched"].ok
    file = tmp_path / "target" / "consolidated.00.pth"
    content = file.read_bytes()
    row = bytes(tensors["model.embed_tokens.weight"][11].view(torch.uint8).tolist())
    at = content.rindex(row)
    assert at > content.index(row), "the second is the head's"
    file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    found = verify_fetched(plan, tmp_path / "target", written, fetched=fetched).checks[1]
    assert not found.ok
    assert found.detail == "output.weight: not the same as what it is tied to"


def test_columns_of_metas_files_are_rebuilt(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta's files cut wo and w2 by columns, and a DCP's chunks may begin inside a head."""
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, options in {"meta": {"to": "meta", "shards": 2}, "dcp": {"shards": 5}}.items():
        plan = make_plan(open_checkpoint(source), Target(**options))  # type: ignore[arg-type]
        convert_checkpoint(plan, tmp_path / name, verified=False)
        fs.put(str(tmp_path / name), f"/ranges-{name}", recursive=True)
        plan = make_plan(open_checkpoint(f"memory://ranges-{name}"), Target(to="hf"))
        checks, _, _ = converted(plan, tmp_path / f"{name}-hf", monkeypatch)
        assert checks["fetched"].ok and checks["fetched"].value == 0
        assert "rotated scores" in checks
        fs.rm(f"/ranges-{name}", recursive=True)
