"""The receipt: what it carries, and what it refuses to be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import xxhash
from torch import Tensor

from llamaconv import RefusedError, receipt
from llamaconv.convert import Conversion


def test_it_carries_what_no_weight_does_and_a_digest_of_every_piece(
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
def test_a_damaged_one_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "llamaconv.json").write_text(content)
    with pytest.raises(RefusedError, match=r"llamaconv\.json"):
        receipt.read(tmp_path)


def test_one_with_a_layout_that_is_none_is_refused(
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
        (lambda r: r["target"].update(shards="3"), "target/shards is '3'; a whole number"),
        (lambda r: r["target"].update(shards=True), "target/shards is True; a whole number"),
        (lambda r: r["tensors"][7].pop("digests"), "tensors/7/digests is absent"),
        (lambda r: r["tensors"][7]["shape"].append(1.5), "tensors/7/shape/2 is 1.5"),
        (lambda r: r.update(tensors={}), "tensors is {}; a list was expected"),
        (lambda r: r.update(source=None), "source is None; an object was expected"),
        (lambda r: r["params"].update(dim=0), "dim is 0; a positive whole number"),
        (lambda r: r["params"].update(n_layers=10**9), "no Llama has more than 1024"),
        (lambda r: r["params"].update(rope_theta=float("nan")), "rope_theta is nan"),
        (lambda r: r["params"].update(n_kv_heads=3), "share kv heads in equal groups"),
        (lambda r: r["params"].update(tied=1), "tied is 1"),
        (lambda r: r["params"].update(rope_scaling={"factor": 8.0}), "missing 3 required"),
        (lambda r: r["params"].update(colour=8.0), "colour"),
    ],
)
def test_one_with_an_entry_of_another_type_is_refused_by_its_name(
    source: Path, convert: Callable[..., Conversion], edit: Callable[[Any], Any], said: str
) -> None:
    target = convert(source, verified=False).target
    checkpoints.edit_json(target / "llamaconv.json", edit)
    with pytest.raises(RefusedError, match=re.escape(said)):
        receipt.read(target)
