"""Random models in every format, whole and damaged: a correct conversion, or one clear refusal.

Never another exception, a crash, a hang, gigabytes of memory, or anything left behind. Each
example runs in a fork (`forked`), so that even a crash of torch's C++ is a failure that names its
example.

    LLAMACONV_FUZZ_EXAMPLES=20000 pytest -s -m thorough tests/test_fuzz.py

is the long run, each time with other examples; ``-s`` shows how it went. Without the variable the
run is short, and the same each time.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from support import damages, forked, models, readings
from support.folders import apart, load_dcp
from torch import Tensor

from llamaconv import (
    FailedError,
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
)
from llamaconv.checkpoint.huggingface_index import INDEX
from llamaconv.checkpoint.torch_rows import one_thread
from llamaconv.convert.convert import Conversion
from llamaconv.notebook.browse import index_diff
from llamaconv.plan.target import CHOICES
from llamaconv.report.errors import LlamaconvError

pytestmark = pytest.mark.thorough

EXAMPLES = int(os.environ.get("LLAMACONV_FUZZ_EXAMPLES", "0"))
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": not EXAMPLES,
    # Every example is tiny already, and forks make shrinking slow.
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
targets = st.builds(
    dict,
    to=st.sampled_from(("dcp", "hf", "meta")),
    generation=st.sampled_from(CHOICES["generation"]),
    rope=st.sampled_from(("interleaved", "half_split")),
    shards=st.integers(1, 3),
    max_shard_size=st.sampled_from((100, 1000, 10**9)),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A fork has only one thread, whatever torch believes."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all examples; forks find torch's fake tensors imported."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.save({"a": torch.ones(1)}, folder / "a.bin")
    open_checkpoint(folder / "a.bin")
    return folder


def convert(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_checkpoint(make_plan(open_checkpoint(source), Target(**options)), target)


def read(done: Conversion) -> dict[str, Tensor]:
    """Every tensor of a target."""
    to = done.plan.target.to
    return read_as({"hf": "huggingface"}.get(to, to), done.target)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert readings.bits(found[name]) == readings.bits(tensor), name


def there_and_back(model: models.Model, options: dict[str, Any], place: Path) -> str:
    """Converts a whole model, compares with index arithmetic, and takes it back to the bit."""
    source = models.write(place / "source", model)
    params, to = model.params, options["to"]
    sizes = (params.n_heads, params.n_kv_heads, params.ffn_dim, params.vocab_size)
    impossible = to == "meta" and (
        params.q_rows != params.dim or any(size % options["shards"] for size in sizes)
    )
    assets = models.assets(source, model)
    try:
        done = convert(source, place / "there", assets=assets, **options)
    except RefusedError as error:
        if impossible or "nothing to convert" in str(error):
            return "cannot be"
        raise
    assert not impossible
    wanted = model.weights
    if to != "hf":
        naming, layout = done.plan.target.naming, done.plan.target.layout
        wanted = models.in_naming(model, wanted, naming, layout)
    assert_same(apart(read(done), params), wanted)
    back = convert(done.target, place / "back", to="hf", assets=assets)
    assert_same(read(back), model.weights)
    return f"{model.kind} to {to}"


def test_every_model_converts_in_every_direction_and_comes_back_to_the_bit(place: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES // 10 or 20, **COMMON)
    @given(model=models.models(), options=targets)
    def run(model: models.Model, options: dict[str, Any]) -> None:
        folder = place / "example"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        outcomes[forked.run(lambda: there_and_back(model, options, folder))] += 1

    run()
    show(outcomes)
    assert len(outcomes) > 4, "hardly a format was tried"


def show(outcomes: Counter[str]) -> None:
    print(f"{sum(outcomes.values())} examples, {len(outcomes)} outcomes")
    for what, count in outcomes.most_common():
        print(f"{count:6} {what}")


def outcome(model: models.Model, options: dict[str, Any], folder: Path) -> str:
    """What becomes of a damaged source: "converted", or the refusal without its particulars."""
    source, target = folder / "source", folder / "target"
    assets = models.assets(source, model)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        checkpoint = open_checkpoint(source)
        shown = [
            checkpoint.table(),
            checkpoint.folded(),
            checkpoint.to_json(),
            index_diff(checkpoint),
        ]
        plan = make_plan(checkpoint, Target(assets=assets, **options))
        shown += [plan.table(), plan.to_json(), plan.releases()]
        assert all(str(one) for one in shown)
        done = convert_checkpoint(plan, target)
    except (RefusedError, FailedError) as error:
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert after.keys() == before.keys(), "something was left behind"
        _is_clear(error, folder)
        return f"{type(error).__name__}: {_kind(error)}"
    _is_right(done, source)
    return "converted"


def _is_clear(error: LlamaconvError, folder: Path) -> None:
    """Each problem is a line that names a file, a tensor, an option or an entry."""
    assert error.problems
    for problem in error.problems:
        line = str(problem)
        assert line.startswith("error: ")
        assert len(line.splitlines()) == 1
        assert len(line) < 3000
        assert "Traceback" not in line
        names = (str(folder), ".weight", "--", "layers", "dim", *problem.names)
        assert any(name in line for name in names), line


def _kind(error: LlamaconvError) -> str:
    text = re.sub(r"/\S+/", "", error.problems[0].message)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "…", text)
    return re.sub(r"[-+]?\d[\d,.e+]*", "N", text)[:90]


def _is_right(done: Conversion, source: Path) -> None:
    """Every tensor of the target is its source's, as other readers read both."""
    here, there = read_as(done.plan.source.format, source), read(done)
    params, _ = done.plan.ready()
    here, there = (apart(side, params) for side in (here, there))
    moves = done.plan.written
    assert there.keys() == {move.target for move in moves}
    for move in moves:
        expected = here[move.source].to(getattr(torch, move.dtype))
        if move.heads:
            size = len(expected) // move.heads
            if done.plan.target.layout == "interleaved":
                order = [i // 2 + size // 2 * (i % 2) for i in range(size)]
            else:
                order = [2 * (i % (size // 2)) + i // (size // 2) for i in range(size)]
            expected = expected[[at + i for at in range(0, len(expected), size) for i in order]]
        assert readings.bits(there[move.target_name]) == readings.bits(expected), move.target_name


def read_as(form: str, folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of one format, whatever else lies in it."""
    if form == "dcp":
        return load_dcp(folder)
    if form == "meta":
        return readings.joined(readings.parts(folder))
    if (folder / INDEX).is_file() and any(folder.glob("*.safetensors")):
        return readings.indexed(folder / INDEX, readings.held)
    if files := sorted(folder.glob("*.safetensors")):
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else files
        return {k: v for file in files for k, v in readings.held(file).items()}
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        return readings.indexed(index, load_file)
    single = folder / "pytorch_model.bin"
    files = [single] if single.is_file() else sorted(folder.glob("pytorch_model*.bin"))
    return {k: v for file in files for k, v in load_file(file).items()}


def load_file(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True))


def test_a_damaged_source_converts_rightly_or_is_refused_and_nothing_is_left(place: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES or 100, **COMMON)
    @given(
        model=models.models(),
        options=targets,
        kinds=st.lists(st.sampled_from(damages.ALL), min_size=1, max_size=2),
        data=st.data(),
    )
    def run(
        model: models.Model,
        options: dict[str, Any],
        kinds: list[damages.Damage],
        data: DataObject,
    ) -> None:
        folder = place / "example"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        forked.run(lambda: models.write(folder / "source", model))
        for damage in kinds:
            if any(path.is_file() for path in (folder / "source").rglob("*")):
                damage(folder / "source", data)
        outcomes[forked.run(lambda: outcome(model, options, folder))] += 1

    run()
    show(outcomes)
    # Damage that is never refused, or never harmless, would not be worth the name.
    assert outcomes["converted"] > 2
    assert sum(what.startswith("RefusedError") for what in outcomes) > 10
