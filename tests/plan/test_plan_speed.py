"""Looking into and planning the largest Llama: headers only, no torch, work in proportion.

Work is counted in calls, which do not depend on the machine; `tests/bench/plan_time.py` prints
seconds. The limit: a loop inside one C function is one call.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import inputs
import pytest
from support.imported import HEAVY, imported_by

from llamaconv import make_plan, open_checkpoint
from llamaconv.model.params import LlamaParams

LARGE = inputs.SHAPES["405B"]
SMALL = replace(LARGE, n_layers=LARGE.n_layers // 2)


def folder_of(params: LlamaParams, folder: Path) -> Path:
    return inputs.write(folder, params, sparse=True, longest_file=4.7e9)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(LARGE, tmp_path_factory.mktemp("large") / "405B")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(SMALL, tmp_path_factory.mktemp("small") / "half")


def calls(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, are called while ``work`` runs."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def growth(work: Callable[[int], Any], sizes: tuple[int, int]) -> float:
    """How many times faster than its size the work grows; 1 is in proportion."""
    few, many = (calls(lambda n=n: work(n)) for n in sizes)
    return (many / few) / (sizes[1] / sizes[0])


def test_405b_is_191_files_of_812_gb_and_plans_without_a_problem(large: Path) -> None:
    checkpoint = open_checkpoint(large)
    assert len(list(large.glob("*.safetensors"))) == 191
    assert len(checkpoint.tensors) == 9 * 126 + 3  # embedding, norm and head
    assert checkpoint.total_bytes == inputs.size(LARGE)
    plan = make_plan(checkpoint)
    assert not plan.problems
    assert plan.bytes_to_write == checkpoint.total_bytes
    assert sum(file.stat().st_blocks for file in large.iterdir()) * 512 < 10e6


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_it_is_looked_into_and_planned_without_torch(large: Path, command: str) -> None:
    code = f"from llamaconv.cli import main; main([{command!r}, {str(large)!r}])"
    assert not imported_by(code) & HEAVY


def test_work_grows_with_the_tensors_and_no_faster(small: Path, large: Path) -> None:
    folders = {len(open_checkpoint(folder).tensors): folder for folder in (small, large)}
    sizes = min(folders), max(folders)
    for work in (
        lambda n: open_checkpoint(folders[n]),
        lambda n: make_plan(open_checkpoint(folders[n])),
        lambda n: str(make_plan(open_checkpoint(folders[n])).table(most=10_000)),
    ):
        work(sizes[0])  # what is computed once and kept is not counted
        assert 0.8 < growth(work, sizes) < 1.1


def test_the_test_above_can_fail() -> None:
    def all_pairs(n: int) -> None:
        for i in range(n):
            for j in range(n):
                max(i, j)

    assert growth(all_pairs, (50, 100)) > 1.9
