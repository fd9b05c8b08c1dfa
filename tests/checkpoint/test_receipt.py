"""The receipt: what it carries, and what it refuses to be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support import checkpoints
from torch import Tensor

from llamaconv import RefusedError
from llamaconv.checkpoint import receipt
from llamaconv.convert.convert import Conversion


def test_receipt_has_parameters_layout_and_a_digest_of_every_piece(
    source: Path,
    convert: Callable[..., Conversion],
    load_dcp: Callable[[Path], dict[str, Tensor]],
) -> None:
    done = convert(source, shards=3)
    read = receipt.read(done.target)
    assert read == done.receipt
    assert read.params == checkpoints.GQA
    assert read.source.rope == "half_split"
    assert read.target.rope == "interleaved"
    assert read.verified is not None
    assert read.verified.ok
    state = load_dcp(done.target)
    assert {entry.target for entry in read.tensors} == state.keys()
    for entry in read.tensors:
        chunks = torch.chunk(state[entry.target], 3)
        digests = tuple(
            xxhash.xxh3_128_hexdigest(chunk.contiguous().view(torch.uint8).numpy().tobytes())
            for chunk in chunks
        )
        assert entry.digests == digests


def test_a_folder_without_one(source: Path) -> None:
    assert receipt.read(source) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"llamaconv_receipt": 2}', "<html>", '{"llamaconv_receipt": 1}']
)
def test_damaged_receipt_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "llamaconv.json").write_text(content)
    with pytest.raises(RefusedError, match=r"llamaconv\.json"):
        receipt.read(tmp_path)


def test_receipt_with_unknown_layout_is_refused(
    source: Path, convert: Callable[..., Conversion]
) -> None:
    target = convert(source, verified=False).target
    path = target / "llamaconv.json"
    entries = json.loads(path.read_text())
    entries["target"]["rope"] = "sideways"
    path.write_text(json.dumps(entries))
    with pytest.raises(RefusedError, match="sideways"):
        receipt.read(target)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r["target"].update(shards="3"), "target/shards must be a whole number; got '3'"),
        (
            lambda r: r["target"].update(shards=True),
            "target/shards must be a whole number; got True",
        ),
        (lambda r: r["tensors"][7].pop("digests"), "tensors/7/digests is missing"),
        (
            lambda r: r["tensors"][7]["shape"].append(1.5),
            "tensors/7/shape/2 must be a whole number; got 1.5",
        ),
        (lambda r: r.update(tensors={}), "tensors must be a list; got {}"),
        (lambda r: r.update(source=None), "source must be an object; got None"),
        (lambda r: r["params"].update(dim=0), "dim must be a whole number from 1"),
        (
            lambda r: r["params"].update(n_layers=10**9),
            "n_layers must be a whole number from 1 to 1024",
        ),
        (
            lambda r: r["params"].update(rope_theta=float("nan")),
            "rope_theta must be a positive number; got nan",
        ),
        (lambda r: r["params"].update(n_kv_heads=3), "n_heads a multiple of n_kv_heads"),
        (lambda r: r["params"].update(tied=1), "tied must be true or false; got 1"),
        (lambda r: r["params"].update(rope_scaling={"factor": 8.0}), "missing 3 required"),
        (lambda r: r["params"].update(colour=8.0), "colour"),
    ],
)
def test_receipt_with_an_entry_of_wrong_type_is_refused_by_its_name(
    source: Path, convert: Callable[..., Conversion], edit: Callable[[Any], Any], said: str
) -> None:
    target = convert(source, verified=False).target
    checkpoints.edit_json(target / "llamaconv.json", edit)
    with pytest.raises(RefusedError, match=re.escape(said)):
        receipt.read(target)
