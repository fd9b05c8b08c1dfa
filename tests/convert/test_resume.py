"""A run that ended early: what the next one takes over, and what it does not."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import checkpoints

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.convert import disk_file, engine, journal
from llamaconv.convert.convert import Conversion
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import FailedError, RefusedError

TARGETS = {
    "dcp": Target(),
    "shards": Target(shards=3),
    "hf": Target(to="hf", max_shard_size=300_000),
    "meta": Target(to="meta"),
    "parts": Target(to="meta", shards=2),
    "half_split": Target(rope="half_split"),
    "cast": Target(dtype="float32"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "source")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; the command line in its own has the true ones."""
    monkeypatch.setattr(disk_file, "_JOURNAL_BYTES", 10_000)
    monkeypatch.setattr(engine, "_BLOCK_BYTES", 4_000)


def convert(source: Path, target: Path, wanted: Target, **options: object) -> Conversion:
    options = {"verified": False, "workers": 2, **options}
    return convert_checkpoint(make_plan(open_checkpoint(source), wanted), target, **options)  # type: ignore[arg-type]


def end_early(source: Path, target: Path, wanted: Target, share: float = 0.8) -> str:
    """Converts until ``share`` of the bytes is written; what the interruption says."""

    def interrupt(step: str, done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        convert(source, target, wanted, progress=interrupt)
    assert not target.exists()
    return "".join(caught.value.__notes__)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the receipt, which has the time in it."""
    files = (path for path in folder.iterdir() if path.name != "llamaconv.json")
    return {path.name: path.read_bytes() for path in files}


def partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.llamaconv-partial")


@pytest.mark.parametrize("wanted", TARGETS.values(), ids=TARGETS)
def test_the_next_run_goes_on_and_writes_the_same_bytes(
    source: Path, tmp_path: Path, wanted: Target
) -> None:
    whole = convert(source, tmp_path / "whole", wanted)
    said = end_early(source, tmp_path / "target", wanted)
    assert "target.llamaconv-partial keeps" in said and "the same command continues" in said
    done = convert(source, tmp_path / "target", wanted, verified=True)
    assert content(tmp_path / "target") == content(tmp_path / "whole")
    assert done.receipt.tensors == whole.receipt.tensors
    assert done.bytes_reused > 0.5 * whole.bytes_written
    assert done.bytes_written + done.bytes_reused == whole.bytes_written
    assert "reused from an interrupted run" in str(done.table())
    assert not partial(tmp_path / "target").exists()


def test_bytes_whose_fsync_failed_are_not_reused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a sync that failed the bytes can still be read back, from memory, with their digest."""
    whole = convert(source, tmp_path / "whole", Target(shards=3))
    sync, refused = os.fsync, []

    def refuse(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "__0_1.distcp":
            # The writer's own open file: it is told what went wrong before the sync.
            refused.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(FailedError, match=r"__0_1\.distcp: Input"):
            convert(source, tmp_path / "target", Target(shards=3))
    assert refused in ([os.O_WRONLY], [os.O_RDWR])
    journals = partial(tmp_path / "target") / journal.FOLDER
    assert not (journals / "__0_1.distcp.jsonl").exists()
    assert (journals / "__0_0.distcp.jsonl").exists(), "the test can fail"
    done = convert(source, tmp_path / "target", Target(shards=3))
    assert 0 < done.bytes_reused < 0.7 * whole.bytes_written
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_it_may_end_early_many_times(source: Path, tmp_path: Path) -> None:
    whole = convert(source, tmp_path / "whole", Target())
    for share in (0.2, 0.3, 0.5, 0.6, 0.8, 0.9):
        end_early(source, tmp_path / "target", Target(), share)
    done = convert(source, tmp_path / "target", Target())
    assert done.bytes_reused > 0.7 * whole.bytes_written
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_after_a_kill_the_next_run_goes_on(source: Path, tmp_path: Path) -> None:
    def killed(step: str, done: int, total: int) -> None:
        if done >= 0.8 * total:
            os.kill(os.getpid(), signal.SIGKILL)

    whole = convert(source, tmp_path / "whole", Target())
    child = os.fork()
    if child == 0:
        convert(source, tmp_path / "target", Target(), progress=killed)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert partial(tmp_path / "target").exists() and not (tmp_path / "target").exists()
    done = convert(source, tmp_path / "target", Target())
    assert done.bytes_reused > 0.5 * whole.bytes_written
    assert content(tmp_path / "target") == content(tmp_path / "whole")


@pytest.mark.parametrize("to", ["dcp", "hf", "meta"])
@pytest.mark.thorough
def test_after_a_kill_at_80_percent_at_most_a_quarter_is_written(tmp_path: Path, to: str) -> None:
    params = LlamaParams(256, 2, 8, 2, 32, 512, 400_000, 1e-5, 1e4)
    source = checkpoints.write(
        tmp_path / "source",
        checkpoints.tensors(params, torch.bfloat16),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        vocab_size=400_000,
    )
    target = tmp_path / "target"
    script = (
        "import os, signal, sys; from llamaconv.convert.engine import Engine; from llamaconv.cli import main\n"
        "count = Engine.count\n"
        "def killing(self, *numbers):\n"
        "    count(self, *numbers)\n"
        "    if self.bytes_written > 0.8 * self.total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Engine.count = killing\n"
        "main(['convert', *sys.argv[1:], '--quiet', '--workers', '2'])\n"
    )
    command = [sys.executable, "-c", script, str(source), str(target), "--to", to]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "source",
        "target.llamaconv-partial",
    ]
    done, whole = (
        subprocess.run(
            [sys.executable, "-m", "llamaconv", "convert", source, place, "--to", to, "--json"],
            stdout=subprocess.PIPE,
            check=True,
        )
        for place in (target, tmp_path / "whole")
    )
    done, whole = json.loads(done.stdout), json.loads(whole.stdout)
    assert whole["bytes_reused"] == 0
    assert done["bytes_written"] <= 0.25 * whole["bytes_written"]
    assert done["bytes_reused"] == whole["bytes_written"] - done["bytes_written"]
    assert content(target) == content(tmp_path / "whole")


def kept_file(target: Path) -> Path:
    return max(partial(target).glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip(path: Path, at: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


def lines(path: Path, *added: str) -> None:
    with open(partial(path) / journal.FOLDER / f"{kept_file(path).name}.jsonl", "a") as file:
        file.write("\n".join(added))


DAMAGES = {
    "a bit of a tensor": lambda target: flip(kept_file(target), 100_000),
    "a bit of what is around": lambda target: flip(kept_file(target), 10),
    "cut": lambda target: os.truncate(kept_file(target), 60_000),
    "empty": lambda target: os.truncate(kept_file(target), 0),
    "longer": lambda target: os.truncate(kept_file(target), 10_000_000),
    "gone": lambda target: kept_file(target).unlink(),
    "its journal says too much": lambda target: lines(
        target, *(json.dumps({"number": n, "rows": 1_000_000, "digest": "00"}) for n in range(200))
    ),
    "its journal is damaged": lambda target: lines(
        target,
        "{",
        "[1]",
        "3",
        '{"number": "a"}',
        '{"number": 0, "rows": 1.5, "digest": 0}',
        '{"number": 1, "rows": -1, "digest": ""}',
        "[" * 100_000,
        '{"number": 2, "row',
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_rows_with_another_digest_are_written_again(
    source: Path, tmp_path: Path, damage: object
) -> None:
    convert(source, tmp_path / "whole", Target())
    end_early(source, tmp_path / "target", Target())
    damage(tmp_path / "target")  # type: ignore[operator]
    convert(source, tmp_path / "target", Target(), verified=True)
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def another_plan(source: Path) -> Target:
    return Target(generation="titan-0.2")


def another_source(source: Path) -> Target:
    (source / "model-00001-of-00003.safetensors").touch()
    return Target()


def another_fingerprint(source: Path) -> Target:
    folder = partial(source.with_name("target")) / journal.FOLDER
    (folder / "fingerprint").write_bytes(b"\xff" * 10_000)
    return Target()


@pytest.mark.parametrize("change", [another_plan, another_source, another_fingerprint])
def test_another_conversion_takes_nothing_over(
    source: Path, tmp_path: Path, change: object
) -> None:
    end_early(source, tmp_path / "target", Target())
    wanted = change(source)  # type: ignore[operator]
    done = convert(source, tmp_path / "target", wanted, verified=True)
    assert done.bytes_reused == 0


def test_a_link_in_the_unfinished_target_is_not_written_through(
    source: Path, tmp_path: Path
) -> None:
    end_early(source, tmp_path / "target", Target())
    treasure = tmp_path / "treasure"
    file = kept_file(tmp_path / "target")
    os.rename(file, treasure)
    before = treasure.read_bytes()
    for link in (os.symlink, os.link):
        link(treasure, file)
        end_early(source, tmp_path / "target", Target())
        assert treasure.read_bytes() == before
        assert not file.is_symlink() and file.stat().st_nlink == 1
        file.unlink()


def test_an_overflow_is_found_again(tmp_path: Path) -> None:
    """What was cast with overflow is not taken over, else the next run would not count it."""
    tensors = checkpoints.tensors(dtype=torch.float32)
    tensors["model.embed_tokens.weight"][1, 1] = 1e30
    tensors["model.norm.weight"][0] = 1e30
    source = checkpoints.write(tmp_path / "source", tensors)
    wanted = Target(dtype="float16")
    end_early(source, tmp_path / "target", wanted)
    with pytest.raises(FailedError) as caught:
        convert(source, tmp_path / "target", wanted)
    assert len(caught.value.problems) == 2
    assert all("1 finite values become infinite" in str(p) for p in caught.value.problems)
    # And nothing of such a run is kept.
    assert not partial(tmp_path / "target").exists()


def test_what_fails_its_checks_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamaconv.verify import verify

    def fail(*options: object) -> verify.Verification:
        return verify.Verification((verify.Check("bits", False, 1.0, None, "on purpose"),))

    monkeypatch.setattr(verify, "verify_plan", fail)
    with pytest.raises(FailedError, match="on purpose"):
        convert(source, tmp_path / "target", Target(), verified=True)
    assert not partial(tmp_path / "target").exists()


def test_what_is_there_already_needs_no_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    end_early(source, tmp_path / "target", Target())
    total = make_plan(open_checkpoint(source), Target()).bytes_to_write
    usage = shutil.disk_usage(tmp_path)._replace(free=total // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RefusedError, match="are free"):
        convert(source, tmp_path / "other", Target())
    assert convert(source, tmp_path / "target", Target()).bytes_reused


def test_command_line_reports_kept_and_reused_bytes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llamaconv.cli import main

    end_early(source, tmp_path / "target", Target())
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    assert "reused from an interrupted run" in capsys.readouterr().out


@pytest.fixture
def limited_files() -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fails_keeps_what_it_took(
    source: Path, tmp_path: Path, limited_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from llamaconv.cli import main

    assert main(["convert", str(source), str(tmp_path / "target"), "--quiet"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("error: ") and said[0].endswith("the target was not changed")
    assert said[1].startswith(f"note: {partial(tmp_path / 'target')} keeps ")
