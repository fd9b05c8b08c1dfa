"""Two hosts as two network namespaces of Linux, which share a folder and a cable, no more.

Each has its own name, its own processes and its own interface, so that the ranks know of each
other only what the store tells. Needs root (`ip netns`, of iproute2), so it is run by name:

    pytest tests/netns
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import convert_checkpoint, make_plan, open_checkpoint

SIDE = Path(__file__).parents[1] / "support" / "ranks_side.py"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    names = [f"llamaconv-{os.getpid()}-{side}" for side in "ab"]
    cables = [f"lc{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.231.77.{number}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Run:
    """A conversion by two hosts with ``each`` ranks per host; ``fault`` as in ranks_side.py."""

    def __init__(
        self, hosts: list[str], home: Path, fault: str, *arguments: object, each: int = 1
    ) -> None:
        self.notes = home / "notes"
        self.notes.mkdir()
        self.sides = []
        for number, name in enumerate(hosts):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            torchrun += ["--node-rank", str(number), "--nproc-per-node", str(each)]
            torchrun += ["--master-addr", "10.231.77.1", "--master-port", "29400"]
            words = [*torchrun, SIDE, self.notes, fault, "convert", *arguments]
            apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            named = ["sh", "-c", 'hostname "$0" && exec "$@"', f"host-{'ab'[number]}"]
            self.sides.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *apart, *named, *map(str, words)],
                    cwd=home,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self) -> tuple[list[int], list[list[str]]]:
        """Exit status and errors of each host."""
        said = [side.communicate(timeout=120)[1] for side in self.sides]
        errors = [
            [line for line in text.splitlines() if line.startswith("error: ")] for text in said
        ]
        return [side.returncode for side in self.sides], errors


def wait_for_files(folder: Path) -> None:
    """Until both ranks write."""
    limit = time.monotonic() + 90
    while not folder.is_dir() or len(list(folder.glob("*.distcp"))) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(0.5)


def pid_of(home: Path, rank: int) -> int:
    """The process of a rank, by this namespace's number for it."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            environment = (status.parent / "environ").read_bytes().split(b"\0")
            words = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        here = str(home / "notes").encode() in words
        if (
            here
            and b"torch.distributed.run" not in words
            and f"RANK={rank}".encode() in environment
        ):
            return int(status.parent.name)
    raise AssertionError(f"no rank {rank}")


def test_two_hosts_write_what_one_process_writes(
    hosts: list[str], source: Path, tmp_path: Path
) -> None:
    run = Run(hosts, tmp_path, "none", source, tmp_path / "target", "--shards", 3)
    statuses, errors = run.end()
    assert statuses == [0, 0], errors
    from llamaconv import Target

    plan = make_plan(open_checkpoint(source), Target(shards=3))
    alone = convert_checkpoint(plan, tmp_path / "alone")
    for path in alone.target.iterdir():
        if path.name != "llamaconv.json":
            assert path.read_bytes() == (tmp_path / "target" / path.name).read_bytes()
    assert not (tmp_path / "target.llamaconv-partial").exists()


def test_a_host_that_does_not_share_the_target_is_refused(
    hosts: list[str], source: Path, tmp_path: Path
) -> None:
    statuses, errors = Run(hosts, tmp_path, "apart", source, "target").end()
    assert statuses == [1, 1]
    assert len(errors[0]) == 1 and "rank 1 does not see the folder" in errors[0][0]
    assert not errors[1]


def test_a_host_with_another_source_is_named(
    hosts: list[str], source: Path, tmp_path: Path
) -> None:
    other = checkpoints.write(tmp_path / "other", shards=2)
    _, errors = Run(hosts, tmp_path, str(other), source, tmp_path / "target").end()
    assert "rank 1 and rank 0 do not agree on the source's files" in errors[0][0]
    assert not errors[1] and not (tmp_path / "target").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_on_one_host_ends_the_other(
    hosts: list[str], source: Path, tmp_path: Path, rank: int
) -> None:
    run = Run(hosts, tmp_path, "slow", source, tmp_path / "target", "--shards", 40)
    wait_for_files(tmp_path / "target.llamaconv-partial")
    os.kill(pid_of(tmp_path, rank), signal.SIGKILL)
    statuses, errors = run.end()
    assert statuses == [1, 1]
    said = [line for side in errors for line in side]
    assert len(said) == 1 and re.search(rf"rank {rank}\b.*(no sign of life|was lost)", said[0])
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "target.llamaconv-partial").exists() == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_reported_by_its_host_before_the_other_notices(
    hosts: list[str], source: Path, tmp_path: Path, rank: int
) -> None:
    run = Run(hosts, tmp_path, "slow", source, tmp_path / "target", "--shards", 40, each=2)
    wait_for_files(tmp_path / "target.llamaconv-partial")
    os.kill(pid_of(tmp_path, rank), signal.SIGKILL)
    statuses, errors = run.end()
    assert statuses == [1, 1]
    assert len(errors[0]) == 1 and not errors[1]
    # Not after 15 s, as the other host would notice it: torchrun's SIGTERM made its host look.
    assert f"rank {rank} on host-a has died: no sign of life for 3 s" in errors[0][0]


@pytest.fixture
def few_retries(hosts: list[str]) -> None:
    """The kernel of the second host gives up a connection after 25 seconds, not after 15 minutes.

    By then, rank 0 has noticed the silence and removed the folder that rank 1 writes to.
    """
    path = "/proc/sys/net/ipv4/tcp_retries2"
    done = subprocess.run(
        ["ip", "netns", "exec", hosts[1], "sh", "-c", f"echo 6 > {path} && cat {path}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "6", done.stderr


def test_a_cut_cable_ends_both(
    hosts: list[str], few_retries: None, source: Path, tmp_path: Path
) -> None:
    run = Run(hosts, tmp_path, "slow", source, tmp_path / "target", "--shards", 40)
    wait_for_files(tmp_path / "target.llamaconv-partial")
    cable = f"lc{os.getpid() % 100000}b"
    ip("-n", hosts[1], "link", "set", cable, "down")
    statuses, errors = run.end()
    assert all(statuses)
    assert "rank 1 on host-b has died: no sign of life for 15 s" in errors[0][0]
    # The second host has lost the store, and waits for as long as its kernel does.
    assert len(errors[1]) == 1 and "which keeps the store" in errors[1][0]
    assert not (tmp_path / "target").exists()
