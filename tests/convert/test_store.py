"""Targets in stores: an S3 server of moto's, and fsspec's memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from support.s3_server import S3Server, s3_server
from torch.distributed.checkpoint import _fsspec_filesystem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from llamaconv import (
    FailedError,
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
)
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.cli import main
from llamaconv.convert import partial, store, uploading
from llamaconv.convert.guard import Guard
from llamaconv.convert.store import LAST, Store, part_bytes
from llamaconv.notebook.panels.convert import ConvertPanel
from llamaconv.notebook.parameters import Parameters
from llamaconv.plan.plan import Plan

BUCKET = "models"
MARKER = partial.MARKER
LONG = checkpoints.LlamaParams(
    dim=256,
    n_layers=11,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    ffn_dim=768,
    vocab_size=8192,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=128,
)
"""Its files have several parts of 5 MiB, which is the least that S3 takes."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training files of a target in a store are written here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", name="server")
def _server() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(name="s3")
def _s3(server: S3Server) -> Iterator[S3Server]:
    """The server of the module, without faults of other tests."""
    server.recover()
    yield server
    server.recover()


@pytest.fixture(scope="module", name="long")
def _long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_model(tmp_path_factory.mktemp("long"), LONG)


@pytest.fixture(name="quick")
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not try for long."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def plan_of(source: Path, **options: Any) -> Plan:
    return make_plan(open_checkpoint(source), Target(**options))


def address() -> tuple[str, str]:
    """A folder of the bucket that no other test has: its address, and its prefix."""
    name = f"run-{uuid.uuid4().hex[:8]}"
    return f"s3://{BUCKET}/{name}", f"{name}/"


def content(target: str) -> dict[str, bytes]:
    fs, path = fsspec.url_to_fs(target)
    fs.invalidate_cache()
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


def assert_nothing_left(server: S3Server, prefix: str) -> None:
    assert server.objects(BUCKET, prefix) == {}
    assert [key for key in server.uploads(BUCKET) if key.startswith(prefix)] == []


KINDS = [
    {"to": "dcp", "shards": 3},
    {"to": "dcp", "generation": "titan-main"},
    {"to": "hf"},
    {"to": "hf", "max_shard_size": 50_000},
    {"to": "meta", "shards": 2},
]


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        (KINDS[0], "s3"),
        *(pytest.param(one, "s3", marks=pytest.mark.thorough) for one in KINDS[1:]),
        *((one, "memory") for one in KINDS),
    ],
    ids=str,
)
def test_store_gets_the_bytes_of_a_local_target(
    source: Path, tmp_path: Path, s3: S3Server, scheme: str, options: dict[str, Any]
) -> None:
    (source / "tokenizer.json").write_text('{"model": {}}')
    local = convert_checkpoint(plan_of(source, **options), tmp_path / "local")
    target = address()[0].replace("s3://", f"{scheme}://")
    done = convert_checkpoint(plan_of(source, **options), target)
    assert done.verification is not None and done.verification.ok
    assert str(done.target) == target
    here = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    there = content(target)
    for both in (here, there):
        receipt = json.loads(both.pop("llamaconv.json"))
        for name in ("created", "verified"):
            receipt.pop(name)
        both["receipt"] = json.dumps(receipt).encode()
    assert there == here
    assert local.receipt.tensors == done.receipt.tensors
    assert s3.uploads(BUCKET) == []


@pytest.mark.parametrize(
    "to",
    [
        "dcp",
        pytest.param("hf", marks=pytest.mark.thorough),
        pytest.param("meta", marks=pytest.mark.thorough),
    ],
)
def test_verify_reads_what_is_in_a_store(
    source: Path, s3: S3Server, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    target = address()[0]
    convert_checkpoint(plan_of(source, to=to), target)
    assert main(["verify", str(source), target]) == 0
    assert main(["verify", target]) == 0
    fs, path = fsspec.url_to_fs(target)
    name = next(one for one in fs.find(path) if one.endswith((".distcp", ".safetensors", ".pth")))
    data = fs.cat_file(name)
    half = len(data) // 2
    fs.pipe_file(name, data[:half] + bytes(255 - one for one in data[half:]))
    assert main(["verify", str(source), target]) == 1
    assert main(["verify", target]) == 1


def test_other_peoples_readers_read_it(source: Path, tmp_path: Path, s3: S3Server) -> None:
    weights = checkpoints.tensors()
    dcp, hf = address()[0], address()[0]
    plan = plan_of(source, rope="half_split", shards=3)
    convert_checkpoint(plan, dcp)
    names = {move.target_name: move.source for move in plan.written}
    state = {
        name: torch.empty(weights[origin].shape, dtype=torch.bfloat16)
        for name, origin in names.items()
    }
    dcp_load(state, storage_reader=_fsspec_filesystem.FsspecReader(dcp), no_dist=True)
    for name, origin in names.items():
        assert torch.equal(state[name], weights[origin])
    convert_checkpoint(plan_of(source, to="hf"), hf)
    fs, path = fsspec.url_to_fs(hf)
    fs.get(path, str(tmp_path / "hf"), recursive=True)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.thorough
def test_transformers_loads_what_is_copied_from_it(
    source: Path, tmp_path: Path, s3: S3Server
) -> None:
    from transformers import AutoModelForCausalLM

    target = address()[0]
    convert_checkpoint(plan_of(source, to="hf", max_shard_size=50_000), target)
    fs, path = fsspec.url_to_fs(target)
    fs.get(path, str(tmp_path / "hf"), recursive=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    weights = checkpoints.tensors()
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("to", ["dcp", "hf", "meta"])
def test_what_makes_a_checkpoint_is_put_last_after_the_checks(
    source: Path, tmp_path: Path, s3: S3Server, to: str
) -> None:
    target, prefix = address()
    before = len(s3.requests())
    plan = plan_of(source, to=to)
    convert_checkpoint(plan, target)
    asked = [one for one in s3.requests()[before:] if prefix in one]
    puts = [at for at, one in enumerate(asked) if one.startswith(("PUT", "POST"))]
    last = f"PUT /{BUCKET}/{prefix}{LAST[plan.target.format]}"
    assert asked[puts[-1]] == last and sum(one == last for one in asked) == 1
    assert MARKER in asked[puts[0]]
    is_weight = (".distcp", ".safetensors", ".pth")
    reads = [at for at, one in enumerate(asked) if "GET" in one and one.endswith(is_weight)]
    assert reads and max(reads) < puts[-1]
    assert MARKER in asked[-1] and asked[-1].startswith("DELETE")


def test_files_are_sent_in_parts(
    long: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    target, prefix = address()
    convert_checkpoint(plan_of(long, to="hf"), target)
    parts = [one for one in s3.requests() if prefix in one and "partNumber=" in one]
    assert len(parts) >= 3
    convert_checkpoint(plan_of(long, to="hf"), tmp_path / "local")
    name = "model.safetensors"
    assert content(target)[name] == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize("n_bytes", [0, 1, 5 * 10**9, 10**11, 10**12, 5 << 40])
def test_no_file_has_more_parts_than_s3_takes(n_bytes: int) -> None:
    assert part_bytes(n_bytes) % (1 << 20) == 0
    # What is around the tensors is little: a header, and 64 bytes for each.
    assert -(-(n_bytes + (100 << 20)) // part_bytes(n_bytes)) <= 10_000
    assert part_bytes(5 * 10**9) == 8 << 20


def test_existing_target_is_refused(source: Path, s3: S3Server) -> None:
    target, _prefix = address()
    fs, path = fsspec.url_to_fs(target)
    fs.pipe_file(f"{path}/notes.txt", b"mine")
    for overwrite, said in ((False, "exists already (notes.txt)"), (True, "--overwrite is for")):
        with pytest.raises(RefusedError) as caught:
            convert_checkpoint(plan_of(source), target, overwrite=overwrite)
        assert said in str(caught.value)
    assert content(target) == {"notes.txt": b"mine"}


def test_what_cannot_be_written_is_refused_in_one_line(
    source: Path, s3: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> str:
        assert main(["convert", str(source), *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no such bucket" in refused("s3://no-such-bucket/x")
    target, prefix = address()
    s3.fail("PUT", prefix, status=403, code="AccessDenied")
    assert f"{target}: access denied" in refused(target)
    s3.recover()
    assert_nothing_left(s3, prefix)
    for option in ("--as-step-0", "--every-step"):
        assert option in refused(target, option)
    assert "nothing is written to the Hub" in refused("hf://org/model")
    assert "nothing is written to the Hub" in refused("hf://buckets/org/model")
    assert "names no bucket" in refused("s3://")
    assert "http" in refused("https://example.com/x")
    assert "which ends with it" in refused("memory://x/y")
    assert_nothing_left(s3, prefix)


def test_failed_check_removes_everything(
    source: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of an object is damaged between its upload and the checks."""
    target, prefix = address()
    to_check = Store.to_check

    def damaged(self: Store, ranks: Any) -> Any:
        name = next(name for name in self.sent if name.endswith(".distcp"))
        data = bytearray(self.fs.cat_file(self.path_of(name)))
        half = len(data) // 2  # more than what is between two tensors
        data[half : half + 1000] = bytes(255 - one for one in data[half : half + 1000])
        self.fs.pipe_file(self.path_of(name), bytes(data))
        return to_check(self, ranks)

    monkeypatch.setattr(Store, "to_check", damaged)
    with pytest.raises(FailedError, match=r"check [a-z]+ failed"):
        convert_checkpoint(plan_of(source), target)
    assert_nothing_left(s3, prefix)


@pytest.mark.parametrize("at", ["write", "verify"])
def test_interruption_removes_everything(source: Path, s3: S3Server, at: str) -> None:
    target, prefix = address()

    def interrupt(step: str, done: int, total: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(plan_of(source), target, progress=interrupt)
    assert_nothing_left(s3, prefix)


def test_used_up_quota_removes_everything(
    long: Path, s3: S3Server, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PART_BYTES", 5 << 20)
    target, prefix = address()
    s3.fail("PUT", "partNumber=2", status=507, code="QuotaExceeded")
    with pytest.raises(FailedError, match="quota is used up") as caught:
        convert_checkpoint(plan_of(long, to="hf"), target)
    assert not getattr(caught.value, "__notes__", ())
    assert_nothing_left(s3, prefix)


def test_last_file_that_is_refused_removes_everything(
    source: Path, s3: S3Server, quick: None
) -> None:
    target, prefix = address()
    s3.fail("PUT", f"{prefix}.metadata", status=403, code="AccessDenied")
    with pytest.raises(FailedError, match="access denied"):
        convert_checkpoint(plan_of(source), target)
    assert_nothing_left(s3, prefix)


def test_faults_that_pass_do_no_harm(long: Path, s3: S3Server) -> None:
    target, _prefix = address()
    s3.fail("PUT", "partNumber=1", times=1, status=500)
    s3.fail("GET", "model.safetensors", after=2, times=2)
    convert_checkpoint(plan_of(long, to="hf"), target)
    assert open_checkpoint(target).params == LONG


def test_server_that_is_gone_is_named_with_what_is_left(
    source: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        server.create_bucket(BUCKET)

        def kill(step: str, done: int, total: int) -> None:
            if step == "verify" and server.process.poll() is None:
                server.kill()

        monkeypatch.setattr("llamaconv.checkpoint.stores.WAITS", (0.01,))
        with pytest.raises(FailedError) as caught:
            convert_checkpoint(plan_of(source), f"s3://{BUCKET}/x", progress=kill)
    assert "no connection" in str(caught.value)
    (note,) = caught.value.__notes__
    assert "could not be deleted" in note and "no checkpoint without .metadata" in note


def test_second_conversion_is_refused_until_the_first_is_dead(
    source: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prefix = address()
    there = Store(StoreAddress(target))
    mine = partial.own_marker("first", ".metadata")
    there.send(MARKER, mine.content())
    there.send("__0_0.distcp", b"unfinished")
    there.send("notes.txt.bak", b"somebody's")
    with pytest.raises(RefusedError, match="another conversion is writing to it") as caught:
        convert_checkpoint(plan_of(source), target)
    assert f"process {os.getpid()}" in str(caught.value)
    # On another host, the time tells.
    elsewhere = partial.Marker("first", ".metadata", "elsewhere", 1, "other")
    there.send(MARKER, elsewhere.content())
    with pytest.raises(RefusedError, match="on elsewhere"):
        convert_checkpoint(plan_of(source), target)
    monkeypatch.setattr(partial, "_STALE_SECONDS", -1.0)
    file = there.fs.open(there.path_of("__0_1.distcp"), "wb", autocommit=False)
    file.write(b"x" * (60 << 20))
    assert s3.uploads(BUCKET) == [f"{prefix}__0_1.distcp"]
    convert_checkpoint(plan_of(source), target)
    assert sorted(content(target)) == [
        *(".metadata", "__0_0.distcp", "llamaconv.json", "notes.txt.bak")
    ]
    assert s3.uploads(BUCKET) == []
    file.closed = True


def test_conversion_whose_marker_is_another_ones_puts_no_checkpoint(
    source: Path, s3: S3Server
) -> None:
    target, _prefix = address()
    there = Store(StoreAddress(target))

    def take_over(step: str, done: int, total: int) -> None:
        if step == "verify":
            there.send(MARKER, partial.own_marker("second", ".metadata").content())

    with pytest.raises(FailedError, match="another conversion"):
        convert_checkpoint(plan_of(source), target, progress=take_over)
    assert ".metadata" not in content(target)


@pytest.mark.parametrize("has_conditions", [True, False])
def test_of_two_that_begin_at_once_one_is_refused(
    source: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, has_conditions: bool
) -> None:
    """The second begins after it has looked, and before it has put its marker."""
    target, _prefix = address()
    there = Store(StoreAddress(target))
    put = there.fs.pipe_file

    def late(path: str, value: bytes, **options: Any) -> None:
        if options:
            put(path, partial.own_marker("first", ".metadata").content())
            if not has_conditions:
                raise NotImplementedError("conditions")
        put(path, value, **options)

    monkeypatch.setattr(there.fs, "pipe_file", late)
    with pytest.raises(RefusedError, match="has just begun"):
        convert_checkpoint(plan_of(source), target)
    assert list(content(target)) == [MARKER]


def test_store_without_conditions_is_written(
    source: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prefix = address()
    fs = Store(StoreAddress(target)).fs
    put, refused = fs.pipe_file, []

    def plain(path: str, value: bytes, **options: Any) -> None:
        if options:
            refused.append(path)
            raise NotImplementedError("conditions")
        put(path, value)

    monkeypatch.setattr(fs, "pipe_file", plain)
    convert_checkpoint(plan_of(source, to="hf"), target)
    assert len(refused) == 1 and f"{prefix}config.json" in s3.objects(BUCKET, prefix)


def test_marker_is_put_again_while_a_conversion_runs(
    source: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "BEAT_SECONDS", 0.05)
    target, prefix = address()
    convert_checkpoint(plan_of(source, to="hf"), target)
    put = f"PUT /{BUCKET}/{prefix}{MARKER}"
    assert sum(one == put for one in s3.requests()) > 2
    assert f"{prefix}{MARKER}" not in s3.objects(BUCKET, prefix)


def test_complete_checkpoint_stays_if_its_conversion_is_killed_then(
    source: Path, s3: S3Server
) -> None:
    target, _prefix = address()
    convert_checkpoint(plan_of(source), target)
    complete = content(target)
    there, mine = Store(StoreAddress(target)), partial.own_marker("this", ".metadata")
    there.send(MARKER, mine.content())
    with pytest.raises(RefusedError, match="exists already"):
        convert_checkpoint(plan_of(source), target)
    assert partial.remove(there.fs, there.path, mine, even_complete=False)
    assert content(target) == complete


def _taken_over(there: Store) -> dict[str, bytes]:
    """Put what another conversion has completed, with the names of this one's files."""
    for name in (".metadata", "__0_0.distcp", "llamaconv.json"):
        there.send(name, b"another's")
    there.fs.rm_file(there.path_of(MARKER))
    return content(str(there.address))


def test_one_that_wakes_up_late_does_not_touch_what_another_has_completed(source: Path) -> None:
    there = Store(StoreAddress(address()[0].replace("s3://", "memory://")))
    complete: dict[str, bytes] = {}

    def meanwhile(step: str, done: int, total: int) -> None:
        if step == "verify" and not complete:
            complete.update(_taken_over(there))

    with pytest.raises(FailedError):
        convert_checkpoint(plan_of(source), str(there.address), progress=meanwhile)
    assert content(str(there.address)) == complete


def test_live_conversion_is_not_removed_by_one_that_looked_before(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first puts its marker and a file between the look of the second and its own marker."""
    there = Store(StoreAddress(address()[0].replace("s3://", "memory://")))
    begin = uploading._begin

    def begins(store: Store, marker: partial.Marker) -> None:
        there.send(MARKER, partial.own_marker("first", ".metadata").content())
        there.send("__0_0.distcp", b"the first's")
        begin(store, marker)

    monkeypatch.setattr(uploading, "_begin", begins)
    with pytest.raises(RefusedError, match="has just begun"):
        convert_checkpoint(plan_of(source), str(there.address))
    assert content(str(there.address))["__0_0.distcp"] == b"the first's"
    assert MARKER in content(str(there.address))


def test_checkpoint_that_came_meanwhile_is_not_overwritten(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Store(StoreAddress(address()[0].replace("s3://", "memory://")))
    begin = uploading._begin

    def begins(store: Store, marker: partial.Marker) -> None:
        there.send(MARKER, b"")
        _taken_over(there)
        begin(store, marker)

    monkeypatch.setattr(uploading, "_begin", begins)
    with pytest.raises(RefusedError, match="exists already"):
        convert_checkpoint(plan_of(source), str(there.address))
    assert set(content(str(there.address)).values()) == {b"another's"}


def test_uploads_of_others_are_not_aborted(source: Path, s3: S3Server) -> None:
    target, prefix = address()
    there = Store(StoreAddress(target))
    path = there.path_of("big.safetensors")
    other = there.fs.call_s3(
        "create_multipart_upload", Bucket=BUCKET, Key=f"{prefix}big.safetensors"
    )
    convert_checkpoint(plan_of(source), target)
    assert s3.uploads(BUCKET) == [f"{prefix}big.safetensors"]
    there.fs.abort_mpu(*there.fs.split_path(path)[:2], other["UploadId"])


def test_guard_imports_nothing_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("open('ran', 'w')\n")
    Guard(StoreAddress("s3://bucket/x"), partial.own_marker("this", ".metadata")).dismiss()
    assert not (tmp_path / "ran").exists()


def start(source: Path, target: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llamaconv", "convert", str(source), target, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def until(is_so: Any, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["upload", "check"])
def test_killed_conversion_leaves_nothing(
    long: Path, tmp_path: Path, s3: S3Server, number: signal.Signals, moment: str
) -> None:
    target, prefix = address()
    if moment == "upload":
        s3.fail("PUT", "partNumber=2", status=200, seconds=4.0)
    else:
        s3.fail("GET", "model.safetensors", status=200, seconds=1.0)
    running = start(long, target, "--to", "hf")
    with running:
        if moment == "upload":
            until(lambda: f"{prefix}model.safetensors" in s3.uploads(BUCKET))
        else:
            until(lambda: f"{prefix}model.safetensors" in s3.objects(BUCKET, prefix))
        running.send_signal(number)
        assert running.wait(60) == (-number if number == signal.SIGKILL else 130)
        until(lambda: s3.objects(BUCKET, prefix) == {} and s3.uploads(BUCKET) == [])
        time.sleep(6)
        assert_nothing_left(s3, prefix)


@pytest.mark.thorough
def test_next_conversion_removes_what_one_killed_with_its_guard_left(
    long: Path, s3: S3Server
) -> None:
    target, prefix = address()
    s3.fail("PUT", "partNumber=2", status=200, seconds=4.0, times=1)
    with start(long, target, "--to", "hf") as running:
        until(lambda: f"{prefix}model.safetensors" in s3.uploads(BUCKET))
        until(lambda: len(children(running.pid)) == 1)
        (guard,) = children(running.pid)
        os.kill(guard, signal.SIGKILL)
        running.kill()
    left = s3.objects(BUCKET, prefix)
    assert f"{prefix}{MARKER}" in left and f"{prefix}config.json" not in left
    assert f"{prefix}model.safetensors" in s3.uploads(BUCKET)
    with start(long, target, "--to", "hf") as again:
        assert again.wait(60) == 0
    assert s3.uploads(BUCKET) == [] and f"{prefix}config.json" in s3.objects(BUCKET, prefix)
    assert f"{prefix}{MARKER}" not in s3.objects(BUCKET, prefix)


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_panel_of_notebook_4_converts_to_a_store(source: Path, s3: S3Server, scheme: str) -> None:
    target = address()[0].replace("s3://", f"{scheme}://")
    given = {
        "source": str(source),
        "target": target,
        "to": "hf",
        "overwrite": False,
        "interactive": "no",
    }
    parameters = Parameters.of("4-convert", given)
    assert f"llamaconv convert {source} {target} --to hf" in parameters.headless()
    panel = ConvertPanel(open_checkpoint(source), parameters)
    assert panel.convert() is panel.convert()
    panel.raise_if_gone()
    assert open_checkpoint(target).format == "huggingface"
    fs, path = fsspec.url_to_fs(target)
    fs.rm(path, recursive=True)
    with pytest.raises(FailedError, match="deleted after the conversion"):
        panel.raise_if_gone()


def test_guard_ends_with_the_conversion(source: Path, tmp_path: Path, s3: S3Server) -> None:
    before = children(os.getpid())
    convert_checkpoint(plan_of(source), address()[0])
    assert children(os.getpid()) == before


def torchrun(n: int, *words: object) -> list[str]:
    ours = ["--standalone", "--nproc-per-node", str(n), "-m", "llamaconv", "convert"]
    return [sys.executable, "-m", "torch.distributed.run", *ours, *map(str, words)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options", [("--shards", "4"), ("--to", "hf", "--max-shard-size", "50kB")], ids=str
)
def test_ranks_send_the_bytes_of_one_process(
    source: Path, tmp_path: Path, s3: S3Server, options: tuple[str, ...]
) -> None:
    target, prefix = address()
    run = subprocess.run(torchrun(2, source, target, *options), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert main(["convert", str(source), str(tmp_path / "local"), *options]) == 0
    here = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    there = content(target)
    assert here.pop("llamaconv.json") and there.pop("llamaconv.json")
    assert there == here and len(there) > 4
    assert [key for key in s3.uploads(BUCKET) if key.startswith(prefix)] == []


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_is_killed_leaves_nothing(long: Path, s3: S3Server, rank: int) -> None:
    target, prefix = address()
    s3.fail("PUT", "partNumber=1", status=200, seconds=2.0)
    command = torchrun(2, long, target, "--shards", "2")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        until(lambda: sum(key.startswith(prefix) for key in s3.uploads(BUCKET)) == 2)
        os.kill(_rank(running.pid, rank), signal.SIGKILL)
        _, said = running.communicate(timeout=120)
        assert running.returncode != 0 and said.count("\nerror: ") == 1
    until(lambda: s3.objects(BUCKET, prefix) == {} and s3.uploads(BUCKET) == [])
    time.sleep(8)
    assert_nothing_left(s3, prefix)


def _rank(parent: int, rank: int) -> int:
    """The process of a rank of torchrun."""
    for pid in children(parent):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError("no such rank")
