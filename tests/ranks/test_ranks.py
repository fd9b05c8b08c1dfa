"""Conversions that several ranks of torchrun share: the bytes of one process, and one end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from llamaconv import RefusedError, Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.cli import main
from llamaconv.ranks import ALONE, Ranks, from_environment
from llamaconv.verify.results import TensorResult

HERE = Path(__file__).parents[1] / "support"
# Folders, and the target options that they are written with.
TARGETS: dict[str, dict[str, Any]] = {
    "dcp": {},  # one file: more ranks than files
    "dcp-3": {"shards": 3, "dtype": "float32"},
    "hf": {"to": "hf", "max_shard_size": 60_000},
    "meta": {"to": "meta", "shards": 2},
}


def torchrun(n: int, *words: object) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(n), *map(str, words)]


class Faulty:
    """A conversion by ranks with a fault; see ranks_side.py."""

    def __init__(self, home: Path, n: int, fault: object, *arguments: object) -> None:
        self.notes = home / "notes"
        self.notes.mkdir()
        script = HERE / "ranks_side.py"
        self.process = subprocess.Popen(
            torchrun(n, script, self.notes, fault, "convert", *arguments),
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill(self, rank: int) -> None:
        os.kill(int((self.notes / f"pid-{rank}").read_text()), signal.SIGKILL)

    def end(self, seconds: float = 60) -> tuple[list[str], dict[int, int]]:
        """What was said as errors, and the exit status of each rank that noted one."""
        _, said = self.process.communicate(timeout=seconds)
        assert self.process.returncode in (1, -signal.SIGKILL), said  # whatever its ranks return
        statuses = {
            int(path.name.removeprefix("status-")): int(path.read_text())
            for path in self.notes.glob("status-*")
        }
        return [line for line in said.splitlines() if line.startswith("error: ")], statuses


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit
        time.sleep(0.02)


def left(home: Path) -> list[str]:
    others = ("notes", "source", "target-train")
    return sorted(path.name for path in home.iterdir() if path.name not in others)


@pytest.mark.thorough
def test_every_format_has_the_bytes_of_one_process(source: Path, tmp_path: Path) -> None:
    script = HERE / "ranks_convert.py"
    home = tmp_path / "ranks"
    home.mkdir()
    command = torchrun(3, script, source, home, json.dumps(TARGETS))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in TARGETS.items():
        plan = make_plan(open_checkpoint(source), Target(**options))
        alone = convert_checkpoint(plan, tmp_path / name)
        assert {path.name for path in alone.target.iterdir()} == {
            path.name for path in (home / name).iterdir()
        }
        for path in alone.target.iterdir():
            if path.name != "llamaconv.json":
                assert path.read_bytes() == (home / name / path.name).read_bytes(), path
        wanted = alone.to_json() | {"receipt": alone.receipt.to_json()}
        assert alone.verification
        for rank in range(3):
            found = json.loads((home / f"{name}-{rank}.json").read_text())
            said = found.pop("said")
            assert bool(said) == (rank == 0)
            if rank == 0:
                # The bytes of all ranks, whole at the end of each step.
                total = plan.bytes_to_write
                assert ["write", total, total] in said and ["verify", total, total] in said
            assert found.pop("layers") == [list(layer) for layer in alone.verification.layers]
            tensors = tuple(TensorResult(**one) for one in found.pop("tensors"))
            assert tensors == alone.verification.tensors
            for other in (found, wanted):
                other["receipt"].pop("created", None)
                for varies in ("seconds", "target", "next", "older", "module", "script", "written"):
                    other.pop(varies, None)
            assert found == wanted
        stored = json.loads((home / name / "llamaconv.json").read_text())
        stored.pop("created")
        assert stored == wanted["receipt"]
        assert len(stored["tensors"][0]["digests"]) == (options.get("shards", 1))


def test_command_line_reports_once_for_all_ranks(source: Path, tmp_path: Path) -> None:
    command = torchrun(2, "-m", "llamaconv", "convert", source, tmp_path / "target", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] and said["verified"]
    assert "error:" not in done.stderr


@pytest.mark.thorough
def test_killed_rank_stops_all_ranks_and_keeps_the_old_target(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--quiet"]) == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    options = ("--shards", 3, "--overwrite")
    run = Faulty(tmp_path, 3, "slow", source, target, *options)
    wait_for(tmp_path / "target.llamaconv-partial" / "__0_0.distcp")
    run.kill(2)
    errors, statuses = run.end(seconds=15)
    assert len(errors) == 1 and errors[0].startswith("error: rank 2 has died")
    assert statuses == {0: 1, 1: 1}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert left(tmp_path) == ["target"]


@pytest.mark.thorough
def test_next_run_cleans_up_after_a_killed_rank_0(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run = Faulty(tmp_path, 2, "slow", source, target, "--shards", 3)
    wait_for(tmp_path / "target.llamaconv-partial" / "__0_0.distcp")
    run.kill(0)
    errors, statuses = run.end()
    assert len(errors) == 1 and errors[0].startswith("error: rank 0 has died")
    assert statuses == {1: 1}
    assert left(tmp_path) == ["target.llamaconv-partial"]
    assert main(["convert", str(source), str(target), "--quiet"]) == 0
    assert left(tmp_path) == ["target"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.thorough
def test_signal_to_torchrun_interrupts_all_ranks(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C reaches every process of the terminal; a scheduler's SIGTERM reaches torchrun."""
    run = Faulty(tmp_path, 2, "slow", source, tmp_path / "target", "--shards", 3)
    wait_for(tmp_path / "target.llamaconv-partial" / "__0_0.distcp")
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    errors, statuses = run.end(seconds=15)
    assert len(errors) == 1 and "interrupted; the target was not changed" in errors[0]
    assert statuses == {0: 130, 1: 130}
    assert left(tmp_path) == []


@pytest.mark.thorough
def test_two_killed_ranks_are_both_named(source: Path, tmp_path: Path) -> None:
    run = Faulty(tmp_path, 3, "slow", source, tmp_path / "target", "--shards", 3)
    wait_for(tmp_path / "target.llamaconv-partial" / "__0_0.distcp")
    for rank in (0, 1):
        run.kill(rank)
    errors, statuses = run.end(seconds=15)
    assert [error[:22] for error in errors] == ["error: rank 0 has died", "error: rank 1 has died"]
    assert statuses == {2: 1}


@pytest.mark.thorough
def test_killed_torchrun_ends_all_ranks(source: Path, tmp_path: Path) -> None:
    """It keeps the store, and nobody is left to terminate the ranks."""
    run = Faulty(tmp_path, 2, "slow", source, tmp_path / "target", "--shards", 3)
    wait_for(tmp_path / "target.llamaconv-partial" / "__0_0.distcp")
    run.process.kill()
    errors, statuses = run.end(seconds=15)
    assert len(errors) == 1 and "torchrun, which keeps the store at" in errors[0]
    assert statuses == {0: 1, 1: 1}
    assert left(tmp_path) == []


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.thorough
def test_ranks_resume_what_other_ranks_wrote(source: Path, tmp_path: Path, victim: int) -> None:
    target, options = tmp_path / "target", ("--shards", "3")
    run = Faulty(tmp_path, 2, "kept", source, target, *options)
    journals = tmp_path / "target.llamaconv-partial" / ".llamaconv-journal"
    # Of three files, one rank writes two.
    for number in (0, 1):
        wait_for(journals / f"__0_{number}.distcp.jsonl")
    run.kill(victim)
    errors, _ = run.end()
    assert len(errors) == 1 and errors[0].startswith(f"error: rank {victim} has died")
    assert left(tmp_path) == ["target.llamaconv-partial"]
    command = torchrun(2, "-m", "llamaconv", "convert", source, target, *options, "--json")
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=60).stdout)
    assert done["verified"] and done["bytes_reused"] > 20_000
    assert main(["convert", str(source), str(tmp_path / "whole"), *options, "--quiet"]) == 0
    for file in (".metadata", "__0_0.distcp", "__0_1.distcp", "__0_2.distcp"):
        assert (target / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("full", 1, r"rank 1: .*: File too large; the target was not changed"),
        ("interrupted", 130, r"rank 1: interrupted; the target was not changed"),
        ("changed", 1, r"modified since it was opened"),
        ("apart", 2, r"target.llamaconv-partial: rank 1 does not see the folder that rank 0"),
        ("/nowhere", 2, r"rank 1: /nowhere: not found"),
    ],
)
@pytest.mark.thorough
def test_failed_rank_stops_all_ranks_and_its_reason_is_printed_once(
    source: Path, tmp_path: Path, fault: str, status: int, reason: str
) -> None:
    run = Faulty(tmp_path, 2, fault, source, "target", "--shards", 3)
    errors, statuses = run.end()
    assert len(errors) == 1
    assert re.search(reason, errors[0]), errors
    assert statuses == {0: status, 1: status}
    assert left(tmp_path) == []


@pytest.mark.thorough
def test_ranks_with_different_sources_are_refused(source: Path, tmp_path: Path) -> None:
    other = checkpoints.write(tmp_path / "other", shards=2)
    run = Faulty(tmp_path, 3, other, source, tmp_path / "target")
    errors, statuses = run.end()
    assert "rank 1 and rank 0 do not agree on the source's files" in errors[0]
    assert "do not agree on the plan" in errors[1]
    assert len(errors) == 2 and statuses == {0: 2, 1: 2, 2: 2}
    assert left(tmp_path) == ["other"]


@pytest.mark.thorough
def test_source_that_differs_between_ranks_fails_the_bits_check(
    source: Path, tmp_path: Path
) -> None:
    other = checkpoints.write(tmp_path / "other")
    file = other / "model-00001-of-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = Faulty(tmp_path, 2, other, source, tmp_path / "target", "--shards", 2)
    errors, statuses = run.end()
    assert len(errors) == 1 and "check bits failed: " in errors[0]
    assert statuses == {0: 1, 1: 1}
    assert left(tmp_path) == ["other"]


class Rank(Ranks):
    """One of several, for what needs no other."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8, 50])
def test_shares_hold_every_file_once_and_are_balanced(size: int) -> None:
    sizes = [5, 300, 7, 7, 100, 200, 90, 1, 1, 1, 250, 30]
    for shift in (0, 1):
        shares = [Rank(rank, size).share(sizes, shift) for rank in range(size)]
        assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
        loads = [sum(sizes[place] for place in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
    assert size == 1 or Rank(0, size).share(sizes) == Rank(1, size).share(sizes, shift=1)


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert from_environment() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(RefusedError, match=r"rank 4 of 4\); start several ranks with torchrun"):
        from_environment()


def test_only_rank_0_inspects(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", str(source)]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", str(source)]) == 0
    assert "12" in capsys.readouterr().out


def test_missing_piece_of_a_rank_is_an_error(source: Path, tmp_path: Path) -> None:
    """What all ranks say they wrote is compared with the plan, and with the disk."""

    class Losing(Ranks):
        def share(self, sizes: list[int], shift: int = 0) -> list[int]:  # type: ignore[override]
            return super().share(sizes, shift)[:-1]

    plan = make_plan(open_checkpoint(source), Target(shards=3))
    with pytest.raises(Exception, match="differ from the plan"):
        convert_checkpoint(plan, tmp_path / "target", ranks=Losing())

    class Deaf(Ranks):
        """A rank whose files do not reach rank 0's disk."""

        def all_gather(self, value: Any) -> list[Any]:
            if isinstance(value, dict) and "__0_1.distcp" in value:
                (tmp_path / "target.llamaconv-partial" / "__0_1.distcp").unlink()
            return [value]

    with pytest.raises(Exception, match=r"rank 0 does not see __0_1.distcp \(.* 0 seen\)"):
        convert_checkpoint(plan, tmp_path / "target", ranks=Deaf())
    assert left(tmp_path) == []
