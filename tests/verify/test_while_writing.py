"""What is compared while it is written counts only for the place where it was read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import checkpoints

from llamaconv import Target, convert_checkpoint, make_plan, open_checkpoint
from llamaconv.checkpoint.tensors import Piece
from llamaconv.convert.engine import Engine
from llamaconv.plan.plan import Plan
from llamaconv.report.errors import FailedError
from llamaconv.verify import independent_readers, while_writing
from llamaconv.verify.bits_and_scores import Comparison
from llamaconv.verify.while_writing import WhileWriting

TARGETS = {
    "dcp": Target(),
    "dcp in chunks": Target(shards=3),
    "titan-0.2": Target(generation="titan-0.2", dtype="float32"),
    "hf": Target(to="hf", max_shard_size=150_000),
}


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch reads tensors up to this size, by an index that is not there yet.
    monkeypatch.setattr(independent_readers, "WHOLE_BYTES", 200)


@pytest.fixture(params=TARGETS)
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    source = open_checkpoint(checkpoints.write(tmp_path / "source"))
    return make_plan(source, TARGETS[request.param])


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Every tensor that is compared, and whether the finished target was."""
    found: list[tuple[bool, str]] = []
    compare = Comparison.compare

    def noting(self: Comparison, moves: list, count: Callable[[int], None]) -> None:
        is_late = self.target.checkpoint.receipt is not None or hasattr(self, "late")
        found.extend((is_late, move.target_name) for move in moves)
        compare(self, moves, count)

    monkeypatch.setattr(Comparison, "compare", noting)
    return found


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark the comparisons that are made once the target is complete."""
    still_there = WhileWriting.still_there

    def marking(self: WhileWriting, target: object) -> object:
        found = still_there(self, target)  # type: ignore[arg-type]
        monkeypatch.setattr(Comparison, "late", True, raising=False)
        return found

    monkeypatch.setattr(WhileWriting, "still_there", marking)


def test_every_tensor_is_compared_once(
    plan: Plan, tmp_path: Path, compared: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch)
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    assert sorted(name for _, name in compared) == sorted(m.target_name for m in plan.stored)
    early = {name for is_late, name in compared if not is_late}
    assert len(early) > len(plan.stored) / 2
    fresh = [
        check for check in done.verification.checks if check.name in ("bits", "rotated scores")
    ]
    assert [check.control for check in fresh if check.control]


def test_results_are_those_of_the_finished_target(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = convert_checkpoint(plan, tmp_path / "beside").verification
    monkeypatch.setattr(WhileWriting, "n_bytes", 0)
    after = convert_checkpoint(plan, tmp_path / "after").verification
    assert beside is not None
    assert after is not None
    assert beside.tensors == after.tensors
    assert beside.checks == after.checks
    assert beside.layers == after.layers


def test_a_wrong_byte_is_found(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Engine.blocks
    name = next(
        m.target_name
        for m in plan.stored
        if m.target_name.endswith(("w2.weight", "down_proj.weight"))
    )

    def damaged(self: Engine, tensor: str, first: int, last: int) -> Iterator[memoryview]:
        for block in blocks(self, tensor, first, last):
            if tensor == name:
                block[-1] ^= 1
            yield block

    monkeypatch.setattr(Engine, "blocks", damaged)
    with pytest.raises(FailedError, match=name):
        convert_checkpoint(plan, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_another_place_is_compared_again(
    plan: Plan, tmp_path: Path, compared: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch)
    wrote = WhileWriting.wrote
    name = plan.stored[-1].target_name

    def elsewhere(
        self: WhileWriting, tensor: str, n_bytes: int, piece: Callable[[], Piece]
    ) -> None:
        def moved() -> Piece:
            found = piece()
            return replace(found, offset=found.offset - 2) if tensor == name else found

        wrote(self, tensor, n_bytes, moved)

    monkeypatch.setattr(WhileWriting, "wrote", elsewhere)
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    if plan.target.format == "dcp":  # other people's readers have their own places
        assert (True, name) in compared


@pytest.mark.parametrize("error", [OSError("disk"), FailedError("reader"), ValueError("entry")])
def test_what_cannot_be_compared_early_is_compared_later(
    plan: Plan,
    tmp_path: Path,
    compared: list,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    late(monkeypatch)
    wrote = WhileWriting.wrote

    def unreadable(self: WhileWriting, name: str, n_bytes: int, _: object) -> None:
        def fail() -> Piece:
            raise error

        wrote(self, name, n_bytes, fail)

    monkeypatch.setattr(WhileWriting, "wrote", unreadable)
    monkeypatch.setattr(while_writing, "_MOST_WAITING_BYTES", 0)
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
    assert {name for is_late, name in compared if is_late} == {m.target_name for m in plan.stored}


def test_writers_wait_for_the_comparison(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(while_writing, "_MOST_WAITING_BYTES", 0)
    wrote, most = WhileWriting.wrote, 0

    def noting(self: WhileWriting, *what: object) -> None:
        nonlocal most
        wrote(self, *what)  # type: ignore[arg-type]
        most = max(most, self._waiting_bytes)

    monkeypatch.setattr(WhileWriting, "wrote", noting)
    done = convert_checkpoint(plan, tmp_path / "target", workers=1)
    assert done.verification is not None
    assert done.verification.ok
    assert most == 0


def test_failed_writer_ends_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(checkpoints.write(tmp_path / "source"))
    plan = make_plan(source, TARGETS["hf"])
    monkeypatch.setattr(while_writing, "_MOST_WAITING_BYTES", 0)
    begun, failed = threading.Event(), threading.Event()
    compare, blocks = Comparison.compare, Engine.blocks

    def hangs(self: Comparison, moves: list, count: Callable[[int], None]) -> None:
        begun.set()
        assert failed.wait(60)
        compare(self, moves, count)

    def fails(self: Engine, name: str, first: int, last: int) -> Iterator[memoryview]:
        if name != plan.stored[0].target_name:
            assert begun.wait(60)
            failed.set()
            raise FailedError("the source is gone")
        yield from blocks(self, name, first, last)

    monkeypatch.setattr(Comparison, "compare", hangs)
    monkeypatch.setattr(Engine, "blocks", fails)
    before = threading.active_count()
    with pytest.raises(FailedError, match="the source is gone"):
        convert_checkpoint(plan, tmp_path / "target", workers=4)
    assert threading.active_count() == before


@pytest.mark.parametrize("target", [Target(to="meta"), Target(generation="titan-main")])
def test_what_has_to_be_complete_is_compared_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    monkeypatch.setattr(WhileWriting, "__enter__", lambda _: pytest.fail("compared too early"))
    plan = make_plan(open_checkpoint(checkpoints.write(tmp_path / "source")), target)
    done = convert_checkpoint(plan, tmp_path / "target")
    assert done.verification is not None
    assert done.verification.ok
