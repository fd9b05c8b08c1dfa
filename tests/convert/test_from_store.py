"""Checkpoints in a bucket, converted without a copy here, against a real S3 server on the loopback.

moto serves S3's protocol, and its requests fail as a test asks. The reference is always the conversion of
the same folder here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints
from support.faults import Run, Server
from support.s3_server import S3Server, s3_server

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.convert import engine
from llamaconv.verify.compare import compare_checkpoints

PARTIAL = ".llamaconv-partial"
# Ranges and journals of small models, and a store that is given up soon.
SMALL = {
    "llamaconv.checkpoint.fetch_ahead.RANGE_BYTES": 20_000,
    "llamaconv.convert.disk_file._JOURNAL_BYTES": 40_000,
    "llamaconv.convert.engine._BLOCK_BYTES": 10_000,
    "llamaconv.checkpoint.stores.WAITS": [0.01, 0.02],
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def runs(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs of the command line that find ``s3``."""
    folder = tmp_path_factory.mktemp("runs")
    with Server(folder, faulty=False, environment=s3.environment) as server:
        yield server


class Bucket:
    """A bucket with a model in it, a folder of the same files, and conversions of it."""

    def __init__(self, s3: S3Server, runs: Server, source: Path, home: Path, name: str) -> None:
        import s3fs

        self.s3, self.runs, self.source, self.home = s3, runs, source, home
        self.target = home / "target"
        self.address = f"{s3.create_bucket(name)}/models/m"
        s3fs.S3FileSystem.clear_instance_cache()
        self.fs = s3fs.S3FileSystem()
        self.put(source)

    def put(self, folder: Path, address: str = "") -> str:
        """Copies a folder to the bucket."""
        address = address or self.address
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.fs.pipe_file(f"{address}/{file.relative_to(folder)}", file.read_bytes())
        return address

    def start(self, *options: str, target: Path | None = None, **constants: Any) -> int:
        words = ["convert", self.address, target or self.target, *options]
        return self.runs.start(words, self.home, constants=SMALL | constants)

    def run(self, *options: str, target: Path | None = None, **constants: Any) -> Run:
        return self.runs.wait(self.start(*options, target=target, **constants))

    def refusal(self, *options: str, status: int = 2, **constants: Any) -> str:
        """The error of a conversion that ends with ``status``, and leaves nothing at its target."""
        run = self.run("--quiet", *options, **constants)
        assert run.status == status, run.said
        errors = [line for line in run.said.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1 and errors[0].startswith("error: "), run.said
        assert "Traceback" not in run.said
        assert not self.target.exists()
        return errors[0]

    def here(self, name: str = "here", **options: Any) -> dict[str, bytes]:
        """What a conversion of the folder writes."""
        plan = make_plan(open_checkpoint(self.source), Target(**options))
        convert_checkpoint(plan, self.home / name, verified=False)
        return content(self.home / name)


@pytest.fixture
def bucket(s3: S3Server, runs: Server, source: Path, tmp_path: Path) -> Iterator[Bucket]:
    (source / "tokenizer.json").write_text('{"model": {}}')
    (source / "README.md").write_text("a model")
    s3.recover()
    yield Bucket(s3, runs, source, tmp_path, f"bucket-{time.time_ns()}")
    s3.recover()


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the receipt, which has time and place in it."""
    files = (path for path in folder.iterdir() if path.name != "llamaconv.json")
    return {path.name: path.read_bytes() for path in files}


# What is written.


@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({"to": "dcp", "shards": 3}, {"config.json", "tokenizer.json", "README.md"}),
        ({"to": "hf", "max_shard_size": 300_000}, set()),
        ({"to": "meta"}, set()),
    ],
    ids=["dcp", "hf", "meta"],
)
def test_target_is_that_of_a_copy_byte_for_byte(
    bucket: Bucket, options: dict[str, Any], small: set[str]
) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = bucket.run("--json", *[word.replace("_", "-") for word in words])
    assert run.status == 0, run.said
    here, there = bucket.here(**options), content(bucket.target)
    assert {name: data for name, data in there.items() if name in here} == here
    assert there.keys() - here.keys() == small
    for name in small:
        assert there[name] == (bucket.source / name).read_bytes()
    checks = {check["name"]: check for check in json.loads(run.printed)["checks"]}
    assert list(checks) == ["structure", "fetched", "rotated scores", "logits", "loss"]
    assert (checks["fetched"]["value"], checks["fetched"]["yardstick"]) == (0, 2)
    receipt = json.loads((bucket.target / "llamaconv.json").read_text())
    assert receipt["source"]["path"] == bucket.address


@pytest.mark.parametrize(
    "options", [{"to": "dcp", "shards": 3}, {"to": "meta", "shards": 2}], ids=["dcp", "meta"]
)
def test_dcp_and_metas_files_in_a_bucket_convert_as_here(
    bucket: Bucket, options: dict[str, Any]
) -> None:
    folder = bucket.home / "middle"
    convert_checkpoint(make_plan(open_checkpoint(bucket.source), Target(**options)), folder)
    bucket.address = bucket.put(folder, f"{bucket.address}-2")
    bucket.source = folder
    run = bucket.run("--json", "--to", "hf")
    assert run.status == 0, run.said
    assert content(bucket.target) == bucket.here(to="hf")
    assert verify_checkpoint(bucket.target, source=bucket.address).ok


def test_ranges_are_exchanged_in_parts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_RANGES_AT_ONCE", 1)
    done = convert_checkpoint(make_plan(open_checkpoint(bucket.address), Target()), bucket.target)
    assert done.verification is not None
    fetched = next(check for check in done.verification.checks if check.name == "fetched")
    assert fetched.ok
    assert fetched.control > 1  # files, of some ranges each


def test_pickled_weights_in_a_bucket_are_read(bucket: Bucket, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for file in bucket.source.glob("*.safetensors"):
        tensors |= load_file(file)
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    shutil.copy(bucket.source / "config.json", folder)
    bucket.address = bucket.put(folder, f"{bucket.address}-bin")
    bucket.source = folder
    run = bucket.run("--quiet")
    assert run.status == 0, run.said
    assert content(bucket.target).items() >= bucket.here().items()


def test_verify_fetches_again_and_sees_one_bit(bucket: Bucket) -> None:
    assert bucket.run("--quiet").status == 0
    found = verify_checkpoint(bucket.target, source=bucket.address)
    assert found.ok and [check.name for check in found.checks][:2] == ["structure", "bits"]
    name = "model-00002-of-00003.safetensors"
    damaged = bytearray((bucket.source / name).read_bytes())
    damaged[-1000] ^= 1
    bucket.fs.pipe_file(f"{bucket.address}/{name}", bytes(damaged))
    found = verify_checkpoint(bucket.target, source=bucket.address)
    bits = next(check for check in found.checks if check.name == "bits")
    assert not bits.ok and bits.value == 1


def test_each_byte_is_fetched_once(bucket: Bucket) -> None:
    before = len(bucket.s3.requests())
    run = bucket.run("--json", **{"llamaconv.checkpoint.fetch_ahead.RANGE_BYTES": 4 << 20})
    assert run.status == 0, run.said
    asked = [one for one in bucket.s3.requests()[before:] if one.endswith(".safetensors")]
    # One for each header, and one for each tensor that the target's order parts from its neighbour.
    assert len(asked) <= 3 + len(open_checkpoint(bucket.source).tensors)
    assert json.loads(run.printed)["bytes_read"] == open_checkpoint(bucket.source).total_bytes


def test_tied_head_is_fetched_once(bucket: Bucket) -> None:
    tensors = checkpoints.tensors(replace(checkpoints.GQA, vocab_size=4000, n_layers=2, tied=True))
    del tensors["lm_head.weight"]
    shutil.rmtree(bucket.source)
    params = {"vocab_size": 4000, "num_hidden_layers": 2, "tie_word_embeddings": True}
    checkpoints.write(bucket.source, tensors, **params)
    bucket.address = bucket.put(bucket.source, f"{bucket.address}-tied")
    run = bucket.run("--json", "--shards", "2")
    assert run.status == 0, run.said
    assert json.loads(run.printed)["bytes_read"] == sum(t.nbytes for t in tensors.values())
    assert content(bucket.target).items() >= bucket.here(shards=2).items()


@pytest.mark.thorough
def test_two_ranks_write_what_one_writes(bucket: Bucket) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "llamaconv", "convert", bucket.address, str(bucket.target)]
    environment = {**os.environ, **bucket.s3.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--shards", "3", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [check["name"] for check in printed["checks"]][:2] == ["structure", "fetched"]
    assert content(bucket.target).items() >= bucket.here(shards=3).items()


# What happens on the way.


def test_connections_that_are_cut_are_asked_again(bucket: Bucket) -> None:
    bucket.s3.fail("GET", ".safetensors", after=6, times=2, action="half")
    bucket.s3.fail("GET", ".safetensors", after=12, times=2)
    bucket.s3.fail("GET", ".safetensors", after=20, times=2, status=503, code="SlowDown")
    run = bucket.run("--quiet")
    assert run.status == 0, run.said
    assert content(bucket.target).items() >= bucket.here().items()


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        pytest.param({"status": 500}, "a server error", marks=pytest.mark.thorough),
        ({"status": 403, "code": "AccessDenied"}, "access denied"),
        ({"status": 404, "code": "NoSuchKey"}, "not found"),
        ({"status": 403, "code": "ExpiredToken"}, "rejects the credentials (ExpiredToken)"),
    ],
    ids=["server", "denied", "gone", "expired"],
)
def test_store_that_fails_for_good_ends_it_and_the_next_run_fetches_the_rest(
    bucket: Bucket, failure: dict[str, Any], says: str
) -> None:
    bucket.s3.fail("GET", ".safetensors", after=25, **failure)
    said = bucket.refusal(status=1)
    assert says in said and f"error: {bucket.address}/model-0000" in said
    assert (bucket.home / f"target{PARTIAL}").is_dir()
    bucket.s3.recover()
    run = bucket.run("--json")
    assert run.status == 0, run.said
    done = json.loads(run.printed)
    assert done["bytes_reused"] > 40_000
    assert content(bucket.target).items() >= bucket.here().items()
    digests = next(check for check in done["checks"] if check["name"] == "digests")
    assert "an interrupted run fetched a part of it" in digests["detail"]


def slow(bucket: Bucket, seconds: float) -> int:
    """Starts a conversion whose store takes long for a range, and waits until it does."""
    before = sum(".safetensors" in one for one in bucket.s3.requests())
    bucket.s3.fail("GET", ".safetensors", after=25, status=200, seconds=seconds)
    process = bucket.start("--quiet")
    until = time.monotonic() + 30
    while sum(".safetensors" in one for one in bucket.s3.requests()) < before + 30:
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def test_replaced_object_is_noticed_and_nothing_is_left(bucket: Bucket) -> None:
    name = "model-00002-of-00003.safetensors"
    process = slow(bucket, 0.5)
    changed = bytearray((bucket.source / name).read_bytes())
    changed[-1] ^= 1
    bucket.fs.pipe_file(f"{bucket.address}/{name}", bytes(changed))
    bucket.s3.recover()
    run = bucket.runs.wait(process)
    assert run.status == 1, run.said
    assert f"error: {bucket.address}/{name}: replaced since it was opened" in run.said
    assert not bucket.target.exists()
    assert not (bucket.home / f"target{PARTIAL}").exists(), "what is mixed is of no use"


def test_interruption_does_not_wait_for_the_store(bucket: Bucket) -> None:
    process = slow(bucket, 20)
    began = time.monotonic()
    os.kill(process, signal.SIGINT)
    run = bucket.runs.wait(process)
    assert run.status == 130, run.said
    assert "interrupted; the target was not changed" in run.said
    assert time.monotonic() - began < 10, "the store would hold it for 20 s"
    assert not bucket.target.exists()


# What is refused.


def test_store_without_ranges_is_refused_before_a_model_is_fetched_whole(bucket: Bucket) -> None:
    bucket.s3.fail("GET", "/models/m/", action="whole")
    before = len(bucket.s3.requests())
    said = bucket.refusal()
    assert "answers with more than the range that is needed" in said
    assert not any(".safetensors" in one for one in bucket.s3.requests()[before:])


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ({"status": 403, "code": "AccessDenied"}, "access denied"),
        ({"status": 403, "code": "InvalidAccessKeyId"}, "rejects the credentials"),
        ({"status": 403, "code": "SignatureDoesNotMatch"}, "rejects the credentials"),
        ({"status": 400, "code": "IllegalLocationConstraintException"}, "another region"),
        ({"status": 404, "code": "NoSuchBucket"}, "no such bucket"),
    ],
    ids=["denied", "key", "signature", "region", "bucket"],
)
def test_bucket_that_is_not_for_us_is_one_line(
    bucket: Bucket, failure: dict[str, Any], says: str
) -> None:
    bucket.s3.fail(part="bucket-", **failure)
    said = bucket.refusal()
    assert says in said and said.startswith(f"error: {bucket.address}: ")


def test_bucket_and_folder_that_are_not_there_are_one_line(bucket: Bucket) -> None:
    bucket.address = "s3://no-such-bucket/m"
    assert bucket.refusal().startswith("error: s3://no-such-bucket/m: no such bucket")
    bucket.address = "s3://no-such-bucket"
    assert bucket.refusal().startswith("error: s3://no-such-bucket: no such bucket")


def test_truncated_object_is_named(bucket: Bucket) -> None:
    name = "model-00002-of-00003.safetensors"
    whole = (bucket.source / name).read_bytes()
    bucket.fs.pipe_file(f"{bucket.address}/{name}", whole[:-10])
    assert "10 bytes are missing" in bucket.refusal()


def test_torch_checkpointing_in_a_bucket_is_refused_with_the_way_out(bucket: Bucket) -> None:
    bucket.fs.rm(bucket.address, recursive=True)
    bucket.fs.pipe_file(f"{bucket.address}/metadata.pkl", b"x")
    said = bucket.refusal()
    assert "torch_checkpointing" in said
    assert said.endswith(f"Copy it here: aws s3 cp --recursive {bucket.address} m")


def test_what_needs_files_here_says_so(bucket: Bucket) -> None:
    plan = make_plan(open_checkpoint(bucket.source), Target(assets=bucket.address))
    copy = f"aws s3 cp --recursive {bucket.address} m"
    assert plan.errors[0].message.endswith(f"--assets must be a local folder. Copy it here: {copy}")
    with pytest.raises(RefusedError, match="this needs the files here") as refused:
        compare_checkpoints(bucket.address, bucket.source)
    assert copy in str(refused.value)
