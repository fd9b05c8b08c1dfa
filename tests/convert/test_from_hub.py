"""A repository converted without a copy on the disk, against a real server on the loopback.

The server counts what it sends, cuts connections, changes bytes and stops answering.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support import checkpoints
from support.faults import Run, Server
from support.hub_server import Handler, Hub, asking, serve

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint

MODEL = "hf://org/model"
PARTIAL = ".llamaconv-partial"
# Ranges and journals of small models, and a network that is given up soon.
SMALL = {
    "llamaconv.checkpoint.fetch_ahead.RANGE_BYTES": 20_000,
    "llamaconv.convert.disk_file._JOURNAL_BYTES": 40_000,
    "llamaconv.convert.engine._BLOCK_BYTES": 10_000,
    "llamaconv.checkpoint.hub_ranges.WAITS": [0.01, 0.02, 0.03],
}
HEADER_BYTES = 32 * 1024


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def network(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs of the command line that ask ``hub``."""
    folder = tmp_path_factory.mktemp("network")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        places = {"TMPDIR": str(folder / "tmp"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
        (folder / "tmp").mkdir()
        environment = asking(hub.endpoint, folder / "home") | places
        with Server(folder, faulty=False, environment=environment) as server:
            yield server


class Away:
    """A repository, a folder of the same files, and conversions of it."""

    def __init__(self, hub: Hub, network: Server, source: Path, home: Path) -> None:
        self.hub, self.network, self.source, self.home = hub, network, source, home
        self.target = home / "target"

    def start(self, *options: str, target: Path | None = None, **constants: Any) -> int:
        words = ["convert", MODEL, target or self.target, *options]
        return self.network.start(words, self.home, constants=SMALL | constants)

    def run(self, *options: str, target: Path | None = None, **constants: Any) -> Run:
        return self.network.wait(self.start(*options, target=target, **constants))

    def refusal(self, *options: str, status: int = 2) -> str:
        """The error of a conversion that ends with ``status``, and leaves nothing at its target."""
        run = self.run("--quiet", *options)
        assert run.status == status, run.said
        errors = [line for line in run.said.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1 and errors[0].startswith("error: "), run.said
        assert "Traceback" not in run.said
        assert not self.target.exists()
        return errors[0]

    @property
    def weights(self) -> list[Path]:
        return sorted(self.source.glob("*.safetensors"))

    @property
    def total(self) -> int:
        return size(self.source)

    def here(self, name: str = "here", **options: Any) -> dict[str, bytes]:
        """What a conversion of the folder writes."""
        plan = make_plan(open_checkpoint(self.source), Target(**options))
        convert_checkpoint(plan, self.home / name, verified=False)
        return content(self.home / name)


@pytest.fixture
def away(hub: Hub, network: Server, source: Path, tmp_path: Path) -> Away:
    (source / "tokenizer.json").write_text('{"model": {}}')
    (source / "README.md").write_text("a model")
    hub.repos = {"org/model": source}
    hub.bytes_sent = 0
    hub.requests.clear()
    hub.ranges = True
    hub.misbehave = lambda handler, path: False
    hub.send = None
    return Away(hub, network, source, tmp_path)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the receipt, which has time and place in it."""
    files = (path for path in folder.iterdir() if path.name != "llamaconv.json")
    return {path.name: path.read_bytes() for path in files}


def sends(hub: Hub, send: Callable[[Handler, BinaryIO, int, int], bool]) -> None:
    """Lets ``send`` answer ranges of weights beyond the headers; where it is false, as usual."""

    def beyond(handler: Handler, file: BinaryIO, first: int, last: int) -> bool:
        return first > 0 and file.name.endswith(".safetensors") and send(handler, file, first, last)

    hub.send = beyond


# What is written.


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({"to": "dcp", "shards": 3}, {"config.json", "tokenizer.json", "README.md"}),
        ({"to": "dcp", "generation": "titan-main"}, {"config.json", "tokenizer.json", "README.md"}),
        ({"to": "hf", "max_shard_size": 300_000}, set()),
        ({"to": "meta"}, set()),
    ],
    ids=["dcp", "dcp-main", "hf", "meta"],
)
def test_the_target_is_that_of_a_download_byte_for_byte(
    away: Away, options: dict[str, Any], small: set[str]
) -> None:
    words = [word for name, value in options.items() for word in (_option(name), str(value))]
    run = away.run("--json", *words)
    assert run.status == 0, run.said
    here = away.here(**options)
    there = content(away.target)
    assert {name: data for name, data in there.items() if name in here} == here
    assert there.keys() - here.keys() == small
    for name in small:
        assert there[name] == (away.source / name).read_bytes()
    checks = {check["name"]: check for check in json.loads(run.printed)["checks"]}
    assert list(checks) == ["structure", "repository", "rotated scores", "logits", "loss"]
    assert checks["repository"]["value"] == 0
    assert checks["repository"]["yardstick"] == 2, "q and k are in two of the three files"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_each_byte_is_fetched_once_and_none_is_stored(away: Away) -> None:
    run = away.run("--json")
    assert run.status == 0, run.said
    headers = HEADER_BYTES * len(away.weights)
    tensors = open_checkpoint(away.source).total_bytes
    assert tensors < away.hub.bytes_sent < away.total + headers + 20_000  # the listing
    assert size(away.home) - away.total < away.total + 300_000, "the target, and no copy"
    assert size(away.network.folder) < 200_000, "nor in folders for caches and temporary files"
    receipt = json.loads((away.target / "llamaconv.json").read_text())
    assert receipt["source"]["path"] == f"{MODEL}@{away.hub.commit('org/model')}"
    assert receipt["source"]["files"] == {f.name: f.stat().st_size for f in away.weights}
    # Each file is found by the Hub once, then its host is asked.
    assert away.hub.requests["cdn"] > 30 > away.hub.requests["file"]


def test_a_tied_head_is_fetched_once(away: Away) -> None:
    tensors = checkpoints.tensors(replace(checkpoints.GQA, vocab_size=4000, n_layers=2, tied=True))
    del tensors["lm_head.weight"]
    shutil.rmtree(away.source)
    params = {"vocab_size": 4000, "num_hidden_layers": 2, "tie_word_embeddings": True}
    checkpoints.write(away.source, tensors, **params)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    for name, words in {"dcp": ["--shards", "2"], "meta": ["--to", "meta"]}.items():
        before = away.hub.bytes_sent
        run = away.run("--json", *words, target=away.home / name)
        assert run.status == 0, run.said
        done = json.loads(run.printed)
        assert done["bytes_written"] > 1.7 * stored
        assert done["bytes_read"] == stored
        assert away.hub.bytes_sent - before < stored + 3 * HEADER_BYTES + 20_000
    assert content(away.home / "dcp").items() >= away.here(shards=2).items()


def test_the_way_back_finds_the_small_files_in_the_target(away: Away, tmp_path: Path) -> None:
    assert away.run("--quiet").status == 0
    assert "tokenizer" in (tmp_path / "target-train" / "train.sh").read_text()
    back = make_plan(open_checkpoint(away.target))
    assert not back.problems
    convert_checkpoint(back, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"model": {}}'


# What happens on the way.


def test_connections_that_are_cut_go_on_where_they_were(away: Away) -> None:
    turn = iter(range(1 << 30))

    def cut(handler: Handler, file: BinaryIO, first: int, last: int) -> bool:
        if next(turn) % 3 == 0:
            return False
        file.seek(first)
        handler.send_bytes(file.read((last - first + 1) // 2))
        handler.close_connection = True
        return True

    sends(away.hub, cut)
    run = away.run("--quiet")
    assert run.status == 0, run.said
    assert next(turn) > 60
    assert away.hub.bytes_sent < away.total + HEADER_BYTES * 3 + 20_000
    assert content(away.target).items() >= away.here().items()


def test_a_busy_host_and_an_address_that_expired_are_asked_again(away: Away) -> None:
    turn = iter(range(1 << 30))

    def busy(handler: Handler, path: str) -> bool:
        if not path.startswith("/cdn/") or handler.headers["range"].startswith("bytes=0-"):
            return False
        number = next(turn)
        status = 503 if number % 5 == 4 else 403 if number % 7 == 6 else 0
        if status:
            handler.answer(status)
        return bool(status)

    away.hub.misbehave = busy
    run = away.run("--quiet", **{"llamaconv.checkpoint.hub_ranges.WAITS": [0.01] * 20})
    assert run.status == 0, run.said
    assert away.hub.requests["file"] > 10, "the Hub was asked for another address"


def dies_after(away: Away, n_bytes: int) -> None:
    """From here on, connections are closed without an answer once so much was sent."""
    limit = away.hub.bytes_sent + n_bytes

    def die(handler: Handler, path: str) -> bool:
        handler.close_connection = away.hub.bytes_sent > limit
        return handler.close_connection

    away.hub.misbehave = die


@pytest.mark.parametrize(
    "options", [[], ["--to", "hf"], ["--to", "meta"]], ids=["dcp", "hf", "meta"]
)
def test_a_connection_that_dies_for_good_ends_it_and_the_next_run_fetches_the_rest(
    away: Away, options: list[str]
) -> None:
    dies_after(away, 500_000)
    said = away.refusal(*options, status=1)
    assert "no connection to" in said and "(4 attempts)" in said
    assert (away.home / f"target{PARTIAL}").is_dir()
    fetched, away.hub.bytes_sent = away.hub.bytes_sent, 0
    away.hub.misbehave = lambda handler, path: False
    run = away.run("--json", *options)
    assert run.status == 0, run.said
    done = json.loads(run.printed)
    assert done["bytes_reused"] > 200_000
    again = away.hub.bytes_sent + fetched - away.total
    # Listing and headers twice; what was on its way or not yet in a journal.
    assert again < 2 * (HEADER_BYTES * 3 + 20_000) + 20 * 20_000 + 2 * 40_000
    assert away.hub.bytes_sent < away.total - 200_000 + HEADER_BYTES * 3 + 20_000
    to = dict(zip(["to"], options[1:], strict=False))
    assert content(away.target).items() >= away.here(**to).items()


def hangs_after(away: Away, n_bytes: int) -> threading.Event:
    """The server stops sending once so much was sent; set once somebody waits for it."""
    limit, waits = away.hub.bytes_sent + n_bytes, threading.Event()

    def hang(handler: Handler, file: BinaryIO, first: int, last: int) -> bool:
        if away.hub.bytes_sent < limit:
            return False
        waits.set()
        time.sleep(20)
        handler.close_connection = True
        return True

    sends(away.hub, hang)
    return waits


def test_a_kill_leaves_what_was_written_to_the_next_run(away: Away) -> None:
    waits = hangs_after(away, 500_000)
    process = away.start("--quiet")
    assert waits.wait(30)
    time.sleep(0.3)
    os.kill(process, signal.SIGKILL)
    assert away.network.wait(process).status == -signal.SIGKILL
    assert not away.target.exists()
    away.hub.send = None
    away.hub.bytes_sent = 0
    run = away.run("--json")
    assert run.status == 0, run.said
    assert json.loads(run.printed)["bytes_reused"] > 200_000
    assert away.hub.bytes_sent < away.total - 200_000 + HEADER_BYTES * 3 + 20_000
    assert content(away.target).items() >= away.here().items()


def test_an_interruption_does_not_wait_for_the_network(away: Away) -> None:
    waits = hangs_after(away, 300_000)
    process = away.start("--quiet")
    assert waits.wait(30)
    began = time.monotonic()
    os.kill(process, signal.SIGINT)
    run = away.network.wait(process)
    assert run.status == 130, run.said
    assert "interrupted; the target was not changed" in run.said
    # The server would hold it for 20 s, its time limit for 5 s, attempts for longer.
    assert time.monotonic() - began < 5
    assert not away.target.exists()


def test_bytes_that_were_changed_on_the_way_fail_the_check(away: Away) -> None:
    def flip(handler: Handler, file: BinaryIO, first: int, last: int) -> bool:
        if not file.name.endswith("2-of-00003.safetensors") or first > 100_000 or last < 100_000:
            return False
        file.seek(first)
        block = bytearray(file.read(last - first))
        block[100_000 - first - 1] ^= 1
        handler.send_bytes(bytes(block))
        return True

    sends(away.hub, flip)
    said = away.refusal(status=1)
    assert "check repository failed: 1 files differ when rebuilt" in said
    assert "model-00002-of-00003.safetensors: its sha256 is" in said
    assert not list(away.home.glob("target*")), "nothing of it may be used again"


def test_what_is_not_compared_with_the_repository_is_said(away: Away) -> None:
    run = away.run("--json", "--dtype", "float32")
    assert run.status == 0, run.said
    checks = {check["name"]: check for check in json.loads(run.printed)["checks"]}
    assert list(checks) == ["structure", "digests"]
    detail = checks["digests"]["detail"]
    assert "not compared with the repository: model-00001-of-00003" in detail
    assert "llamaconv verify SRC DST" in detail


def test_verify_fetches_the_repository_again_and_sees_one_bit(away: Away) -> None:
    assert away.run("--quiet", "--dtype", "float32", "--to", "hf").status == 0
    before = away.hub.bytes_sent
    words = ["verify", MODEL, away.target, "--json"]
    run = away.network.run(words, away.home, constants=SMALL)
    assert run.status == 0, run.said
    assert away.hub.bytes_sent - before > away.total
    names = [check["name"] for check in json.loads(run.printed)["checks"]]
    assert names == ["structure", "bits", "rotated scores", "logits", "loss"]
    with (away.target / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    run = away.network.run(words, away.home, constants=SMALL)
    assert run.status == 1
    assert "check bits failed: 1 of 355,904 elements differ" in run.said


# What is refused.


def answers(status: int, on: str, **given: str) -> Callable[[Handler, str], bool]:
    def misbehave(handler: Handler, path: str) -> bool:
        if on in path:
            handler.answer(status, **given)
        return on in path

    return misbehave


def test_what_the_hub_refuses_is_refused_before_anything_is_written(away: Away) -> None:
    cases: list[tuple[Callable[[Handler, str], bool], str]] = [
        (answers(401, "/api/", code="RepoNotFound"), "no such repository, or it is private"),
        (answers(404, "/api/", code="RevisionNotFound"), "but not this revision"),
        (answers(403, "/resolve/", code="GatedRepo"), "is gated; accept its terms at"),
        (answers(401, "/api/", message="Invalid username or password."), "rejects the token"),
        (answers(403, "/cdn/"), "denies access (403)"),
    ]
    for misbehave, words in cases:
        away.hub.misbehave = misbehave
        assert words in away.refusal()
        assert not list(away.home.glob("target*"))


def test_a_host_without_ranges_is_refused_with_the_download(away: Away) -> None:
    away.hub.ranges = False
    said = away.refusal()
    assert "answers with whole files" in said and "hf download org/model" in said
    assert not list(away.home.glob("target*"))


def test_a_host_that_stops_sending_ranges_ends_it(away: Away) -> None:
    def whole(handler: Handler, path: str) -> bool:
        away.hub.ranges = away.hub.bytes_sent < 400_000
        return False

    away.hub.misbehave = whole
    assert "answers with the whole file" in away.refusal(status=1)


def test_a_revision_that_is_gone_under_way_ends_it(away: Away) -> None:
    def gone(handler: Handler, path: str) -> bool:
        if away.hub.bytes_sent < 400_000 or "/api/" in path:
            return False
        handler.answer(404, code="RevisionNotFound")
        return True

    away.hub.misbehave = gone
    assert "but not this revision" in away.refusal(status=1)


def test_biases_and_a_stored_tied_head_are_decided_before_anything_is_written(away: Away) -> None:
    tensors = checkpoints.tensors()
    name = "model.layers.3.self_attn.q_proj.bias"
    for bias, status in ((torch.zeros(64), 0), (torch.eye(8).view(64), 2)):
        checkpoints.write(away.source, {**tensors, name: bias.bfloat16()}, attention_bias=True)
        words = ["--quiet", "--no-verify", "--generation", "titan-0.2"]
        run = away.run(*words, target=away.home / str(status))
        assert run.status == status, run.said
    assert "1 biases are not zero" in run.said
    checkpoints.write(away.source, tensors, tie_word_embeddings=True)
    said = away.refusal()
    assert "lm_head.weight is stored too" in said and "--tie embedding" in said
    assert away.run("--quiet", "--tie", "untie").status == 0


def test_a_small_file_with_other_bytes_is_refused(away: Away) -> None:
    def other(handler: Handler, path: str) -> bool:
        if path.endswith("tokenizer.json"):
            handler.answer(200, b'{"model": []}')
        return path.endswith("tokenizer.json")

    away.hub.misbehave = other
    said = away.refusal(status=1)
    assert "tokenizer.json: its git blob id is" in said


@pytest.mark.thorough
def test_ranks_share_the_fetching_and_write_the_same_bytes(away: Away, tmp_path: Path) -> None:
    run = away.run("--quiet", "--shards", "3", target=tmp_path / "one")
    assert run.status == 0, run.said
    before = away.hub.bytes_sent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "-m", "llamaconv", "convert", MODEL, str(tmp_path / "two")]
    done = subprocess.run(
        [*command, *words, "--shards", "3", "--quiet"],
        env={**os.environ, **asking(away.hub.endpoint, tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one")
    # Each lists the repository and reads its headers.
    assert away.hub.bytes_sent - before < away.total + 2 * (HEADER_BYTES * 3 + 20_000) + 60_000
