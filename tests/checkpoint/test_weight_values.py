"""NaN, infinities and tensors that are all zero: named with their counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import checkpoints

from llamaconv import FailedError
from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.value_statistics import folded_statistics
from llamaconv.checkpoint.weight_values import (
    OddValues,
    copies,
    histogram,
    scan_statistics,
    scan_values,
    value_problems,
)
from llamaconv.cli import main
from llamaconv.convert.convert import Conversion

SMALL = replace(checkpoints.GQA, n_layers=2)
Q, NORM, W1 = (
    f"model.layers.1.{name}.weight"
    for name in ("self_attn.q_proj", "input_layernorm", "mlp.gate_proj")
)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    weights = checkpoints.tensors(SMALL)
    weights[Q][3, :5] = float("nan")
    weights[Q][60, 0] = -float("inf")
    weights[W1][0, 0] = float("inf")
    weights[NORM][:] = -0.0
    folder = checkpoints.write_model(tmp_path / "broken", SMALL)
    return checkpoints.write(folder, weights, json.loads((folder / "config.json").read_text()))


def test_odd_values_are_counted_in_every_window(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.checkpoint.weight_values._BLOCK_BYTES", 256)
    steps: list[tuple[str, int, int]] = []
    found = open_checkpoint(broken)
    odd = {one.name: one for one in scan_values(found, lambda *step: steps.append(step))}
    assert odd == {
        Q: OddValues(Q, 5, 1),
        W1: OddValues(W1, 0, 1),
        NORM: OddValues(NORM, is_zero=True),
    }
    assert steps[-1] == ("read", found.total_bytes, found.total_bytes)
    error, warned = value_problems(broken, list(odd.values()))
    assert (error.level, warned.level) == ("error", "warning")
    for words in ("2 tensors", "5 NaN and 2 infinite", f"{Q} (5 NaN, 1 inf)"):
        assert words in error.message
    assert NORM in warned.message


def test_inspect_with_values_ends_with_2_and_has_them_in_its_json(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(broken), "--values", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert {"name": Q, "nan": 5, "inf": 1, "zero": False} in shown["values"]
    assert Q in shown["problems"][0]
    assert main(["inspect", str(broken), "--json"]) == 0
    assert "values" not in json.loads(capsys.readouterr().out)


def test_good_values_are_said_to_be_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.write_model(tmp_path / "good", SMALL)
    assert main(["inspect", str(folder), "--values"]) == 0
    assert "are finite" in capsys.readouterr().out


def test_conversion_of_broken_values_fails_with_the_tensors_and_nothing_else(
    broken: Path, convert: Callable[..., Conversion], tmp_path: Path
) -> None:
    with pytest.raises(FailedError) as caught:
        convert(broken, "target")
    (problem,) = caught.value.problems
    assert "layers.1.attention.qkv_linear.wq.weight (5 NaN, 1 inf)" in problem.message
    assert "--no-verify" in problem.message
    assert not (tmp_path / "target").exists()
    assert convert(broken, "all the same", verified=False).target.is_dir()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.float64])
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = checkpoints.tensors(SMALL)
    weights["other"] = torch.zeros(8, 8).to(dtype)
    odd = scan_values(open_checkpoint(checkpoints.write(tmp_path / "hf", weights)))
    assert odd == [OddValues("other", is_zero=True)]


def test_statistics_of_windows_are_those_of_the_whole_tensor(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.checkpoint.weight_values._BLOCK_BYTES", 256)
    found = {one.name: one for one in scan_statistics(open_checkpoint(broken))}
    for name, values in checkpoints.tensors(SMALL).items():
        if name in (Q, W1, NORM):
            continue
        one, wide = found[name], values.double()
        assert one.n_elements == one.n_finite == wide.numel()
        assert (one.minimum, one.maximum) == (wide.min(), wide.max())
        assert one.mean == pytest.approx(float(wide.mean()), abs=1e-6)
        assert one.deviation == pytest.approx(float(wide.std(correction=0)), rel=1e-5)
        expected = float((wide - wide.mean()).abs().max() / wide.std(correction=0))
        assert one.furthest == pytest.approx(expected, rel=1e-4)
    assert (found[Q].n_nan, found[Q].n_infinite, found[Q].n_finite) == (5, 1, 64 * 64 - 6)
    assert found[Q].maximum < 10, "of the finite values"
    assert found[NORM].is_zero and found[NORM].n_zero_rows == 0, "a norm has no rows"
    merged = {one.name: one for one in folded_statistics(found.values())}
    q = merged["model.layers.{0..1}.self_attn.q_proj.weight"]
    assert (q.n_elements, q.n_nan) == (2 * 64 * 64, 5)
    json.dumps([one.to_json() for one in found.values()], allow_nan=False)


def test_rows_of_zeros_copies_and_random_bits_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoints.tensors(SMALL)
    weights[W1][2:5] = 0
    weights["model.embed_tokens.weight"][7] = 0
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[Q] = torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(torch.bfloat16)
    weights[Q] = torch.nan_to_num(weights[Q], 1e30, 1e30, -1e30)
    folder = checkpoints.write_model(tmp_path / "hf", SMALL)
    folder = checkpoints.write(folder, weights, json.loads((folder / "config.json").read_text()))
    found = open_checkpoint(folder)
    statistics = scan_statistics(found)
    (pair,) = copies(found, statistics)
    assert set(pair) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {one.name: one.n_zero_rows for one in statistics}[W1] == 3
    assert main(["inspect", str(folder), "--values"]) == 0
    shown = capsys.readouterr()
    assert "same values: model.embed_tokens.weight = lm_head.weight" in shown.out
    assert "1 tensors hold values up to" in shown.err and f"{Q}. Trained" in shown.err
    assert f"1 tensors of layers have rows that are all zero: {W1} (3 rows)" in shown.err


def test_histogram_counts_every_value_once_and_outliers_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaconv.checkpoint.weight_values._BLOCK_BYTES", 256)
    weights = checkpoints.tensors(SMALL)
    weights[W1][0, :2] = torch.tensor([50.0, -50.0])
    weights[W1][1, 0] = float("nan")
    folder = checkpoints.write_model(tmp_path / "hf", SMALL)
    folder = checkpoints.write(folder, weights, json.loads((folder / "config.json").read_text()))
    found = histogram(open_checkpoint(folder).tensors[W1])
    assert (found.n_below, found.n_above, found.n_far) == (1, 1, 2)
    assert sum(found.counts) + 2 == 96 * 64 - 1
    assert max(found.counts) == max(found.counts[8:16]), "the middle"
    constant = histogram(open_checkpoint(folder).tensors["model.norm.weight"])
    assert sum(constant.counts) == 64
    assert main(["inspect", str(folder), "--tensor", W1]) == 0
    assert "2 values are more than 6 deviations" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--tensor", W1, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["histogram"]["below"] == 1
    assert main(["inspect", str(folder), "--tensor", W1.removesuffix(".weight")]) == 2
    assert f"did you mean {W1}" in capsys.readouterr().err
