"""What the measurements rest on: bytes stay, memory of children is seen, failures are rows."""

import sys
from pathlib import Path

import inputs
import measure
import pytest
import report

from llamaconv import make_plan, open_checkpoint


def test_memory_and_bytes_of_children_count() -> None:
    child = "import time; held = bytearray(b'x') * (150 << 20); time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = measure.run([sys.executable, "-c", code])
    assert not done.failure
    assert done.anonymous > 150 << 20


def test_bytes_that_a_child_reads_and_writes_count(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(20 << 20))
    code = "open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read())"
    words = [str(tmp_path / "in"), str(tmp_path / "out")]
    done = measure.run([sys.executable, "-c", f"import sys; {code}", *words])
    assert 20 << 20 <= done.handed < 21 << 20
    assert 20 << 20 <= done.asked < 40 << 20


def test_command_that_would_exhaust_memory_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(measure, "_RESERVE", 1 << 60)
    done = measure.run([sys.executable, "-c", "import time; time.sleep(60)"])
    assert "the machine had no more" in done.failure
    row = report.failed("hf-dcp", "a peer", "loads everything", done.failure, done)
    about = {"bytes": 1, "pairs": 1, "cache": "warm", "torch": "", "date": "", **measure.machine()}
    assert "did not end: stopped at" in report.markdown(about, [row])


def test_a_program_that_fails_says_why() -> None:
    done = measure.run([sys.executable, "-c", "raise ValueError('of this')"])
    assert done.failure == "exit status 1: ValueError: of this"


@pytest.mark.parametrize("n_bytes", [0.2e9, 0.5e9, 3e9, 16e9])
def test_inputs_are_as_long_as_asked_and_convert(tmp_path: Path, n_bytes: float) -> None:
    params = inputs.of_size(n_bytes)
    folder = inputs.write(tmp_path / "hf", params, sparse=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.total_bytes == pytest.approx(n_bytes, rel=0.05)
    assert not make_plan(checkpoint).problems


def test_random_inputs_are_weights_that_scores_can_be_made_of(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tiny = inputs.replace(inputs.of_size(0.2e9), dim=64, ffn_dim=96, vocab_size=99, n_layers=1)
    (file,) = inputs.write(tmp_path / "hf", tiny).glob("*.safetensors")
    weights = load_file(file)
    assert all(weight.abs().min() > 0.001 and weight.max() < 1.5 for weight in weights.values())
    assert not torch.equal(weights["model.norm.weight"], weights["lm_head.weight"][0])
