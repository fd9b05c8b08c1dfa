"""Files of a repository, rebuilt from a target: each kind of damage to the target shows in a digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.remote import open_elsewhere

from llamaconv import Target, convert_checkpoint, make_plan
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.convert.convert import Conversion
from llamaconv.model import rope
from llamaconv.verify.rebuilt import Rebuilt
from llamaconv.verify.results import Check
from llamaconv.verify.verify import verify_fetched

Q = "model.layers.5.self_attn.q_proj.weight"
K = "model.layers.5.self_attn.k_proj.weight"


def converted(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_checkpoint(make_plan(open_elsewhere(source), Target(**options)), target)


def check(done: Conversion, folder: Path | None = None) -> dict[str, Check]:
    found = verify_fetched(done.plan, folder or done.target, done.receipt)
    return {check.name: check for check in found.checks}


@pytest.mark.parametrize(
    ("options", "control"),
    [
        ({"shards": 5}, 2),
        ({"generation": "titan-main", "shards": 2}, 2),
        ({"generation": "titan-0.2"}, 2),
        ({"rope": "half_split"}, 2),
        ({"to": "hf", "max_shard_size": 100_000}, 2),
        ({"to": "meta", "shards": 2}, 2),
    ],
    ids=str,
)
def test_every_target_gives_the_files_back(
    source: Path, tmp_path: Path, options: dict[str, Any], control: int
) -> None:
    done = converted(source, tmp_path / "target", **options)
    assert done.verification is not None and done.verification.ok
    names = [one.name for one in done.verification.checks]
    assert names == ["structure", "repository", "rotated scores", "logits", "loss"]
    assert done.verification.checks[1].control == control
    assert len(done.verification.layers) == 12


def _flip(tensors: dict[str, Any]) -> None:

    tensors["model.layers.7.mlp.up_proj.weight"].view(torch.int16)[3, 5] ^= 1


def _swap_rows(tensors: dict[str, Any]) -> None:
    tensors[Q] = tensors[Q].flip(0).contiguous()


def _other_layout(tensors: dict[str, Any]) -> None:
    tensors[K] = rope.relayout(tensors[K], 2, "half_split", "interleaved").contiguous()


def _exchange(tensors: dict[str, Any]) -> None:
    one, other = (f"model.layers.2.{name}_layernorm.weight" for name in ("input", "post_attention"))
    tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize("damage", [_flip, _swap_rows, _other_layout, _exchange])
def test_damage_to_a_target_changes_a_digest(source: Path, tmp_path: Path, damage: Any) -> None:
    done = converted(source, tmp_path / "target", to="hf")
    copy = shutil.copytree(tmp_path / "target", tmp_path / "copy")
    assert check(done, copy)["repository"].ok
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = check(done, copy)
    assert list(found) == ["structure", "repository"]
    assert not found["repository"].ok and found["repository"].value >= 1
    assert "files differ when rebuilt from the target" in found["repository"].detail


def test_a_tied_head_that_differs_from_its_embedding_is_seen(tmp_path: Path) -> None:
    params = replace(checkpoints.GQA, n_layers=1, tied=True)
    tensors = checkpoints.tensors(params)
    del tensors["lm_head.weight"]
    config = {"tie_word_embeddings": True, "num_hidden_layers": 1}
    source = checkpoints.write(tmp_path / "source", tensors, **config)
    done = converted(source, tmp_path / "target", to="meta")
    assert check(done)["repository"].ok
    file = tmp_path / "target" / "consolidated.00.pth"
    content = file.read_bytes()
    row = tensors["model.embed_tokens.weight"][11].view(torch.uint8)
    at = content.rindex(bytes(row.tolist()))
    assert at > content.index(bytes(row.tolist())), "the second is the head's"
    file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    found = check(done)["repository"]
    assert not found.ok
    assert found.detail == "output.weight: not the same as what it is tied to"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "float32"}, "the target does not have all of its bytes"),
        ({"tie": "embedding"}, "the target does not have all of its bytes"),
    ],
    ids=str,
)
def test_files_that_cannot_be_rebuilt_are_named(
    source: Path, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    done = converted(source, tmp_path / "target", **options)
    found = check(done)
    assert found["digests"].ok
    assert "not compared with the repository: model-0000" in found["digests"].detail
    assert why in found["digests"].detail
    assert "rotated scores" not in found


def test_a_file_without_a_listed_digest_cannot_be_compared(source: Path) -> None:
    opened: Checkpoint = open_elsewhere(source)
    assert opened.remote is not None
    name = "model-00002-of-00003.safetensors"
    del opened.remote.digests[name]
    rebuilt = Rebuilt(make_plan(opened))
    assert rebuilt.unknown == {name: "the repository lists no digest of it"}
    assert len(rebuilt.files) == 2


def test_damage_shows_without_any_file_that_can_be_rebuilt(source: Path, tmp_path: Path) -> None:
    done = converted(source, tmp_path / "target", to="hf", dtype="float32")
    file = tmp_path / "target" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = check(done)
    assert "repository" not in found and not found["digests"].ok
