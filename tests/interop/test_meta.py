"""Meta's own model computes from our files what transformers computes from the source, and back.

The idea: nobody here wrote either side. `transformers` makes a model and its logits, the command line
converts it, and Meta's reference model (`llama-models` from PyPI, on fairscale's model-parallel layers)
loads the files strictly and computes; and Meta's model saves itself, and transformers computes from
what the command line made of that. Each figure stands beside the same one with rows of q and k in
Hugging Face's order, which Meta's rotation misreads. The limit: small random models, one or two
processes on a CPU, fp32; embeddings cut by rows, as Llama 3's are, not by columns as Llama 2's.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from hf_side import KINDS, LLAMA_3_1, POSITIONS, VOCABULARY, logits, save, tokens
from titan_env import convert, make_environment, run_side

LIMIT = 1e-4  # between two programs in fp32, for logits of up to about 10
FAR = 100 * LIMIT  # what a conversion done wrong must exceed

RELEASE = "0.3.0"
# Of all that llama-models and fairscale declare, Meta's model imports torch and numpy.
INSTALLS = ("numpy", "--no-deps fairscale==0.4.13", f"--no-deps llama-models=={RELEASE}")

GROUPED, EACH, SCALED, TIED = "grouped", "a head each", "factor 8", "tied"
# Base, epsilon and width of the second are none of Meta's defaults, which would stand in for an entry
# of params.json that Meta's code does not find.
SOURCES = {
    GROUPED: KINDS["plain"],
    EACH: replace(KINDS["a head each"], norm_eps=1e-3, ffn_dim=256),
    SCALED: KINDS["factor 8"],
    TIED: replace(KINDS["tied"], rope_scaling=LLAMA_3_1),
}
ONE, TWO, CUT, JOINED = "one file", "two files", "one file on two ranks", "two files on one rank"
LAYOUTS = {ONE: (1, 1), TWO: (2, 2), CUT: (1, 2), JOINED: (2, 1)}  # files, and ranks that load them
WIDTHS = {"multiple_of": 32, "ffn_dim_multiplier": 1.3}  # 224 for a dim of 64, by Meta's formula

META: dict[str, Any] = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": VOCABULARY,
    **WIDTHS,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "use_scaled_rope": True,
}
SAVED = {
    "one rank": {"params": META, "dtype": "float32", "ranks": 1, "seed": 100},
    "two ranks": {"params": META, "dtype": "bfloat16", "ranks": 2, "seed": 200},
    # As Llama 2 has it: a head each by leaving n_kv_heads out, and no scaling.
    "as Llama 2": {
        "params": {
            name: META[name] for name in META if name not in ("n_kv_heads", "use_scaled_rope")
        }
        | {"rope_theta": 10_000.0},
        "dtype": "float32",
        "ranks": 2,
        "seed": 300,
    },
}
WRONG, UNSCALED = ", rows misread", ", scaling left out"


@dataclass(frozen=True)
class Judged:
    """Folders in Meta's format, written by us or by Meta's model, and Meta's logits for each."""

    home: Path
    logits: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sources")
    return {name: save(kind, home / name, i) for i, (name, kind) in enumerate(SOURCES.items())}


@pytest.fixture(scope="module")
def meta(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """What Meta's model makes of each conversion, right or wrong, and what it saves itself.

    All in one process for each number of ranks, since importing takes longer than a small model.
    """
    python = make_environment(f"llama-models-{RELEASE}", INSTALLS)
    home = tmp_path_factory.mktemp("meta")
    loads = []
    for kind, source in models.items():
        for files in (1, 2):
            written = home / f"{kind}, {files}"
            convert(source, written, "--to", "meta", "--shards", f"{files}")
            misread(written, home / f"{written.name}{WRONG}", SOURCES[kind].head_dim)
        for layout, (files, ranks) in LAYOUTS.items():
            for how in ("", WRONG):
                folder = str(home / f"{kind}, {files}{how}")
                loads.append({"name": f"{kind}, {layout}{how}", "folder": folder, "ranks": ranks})
    unscaled = without_scaling(home / f"{SCALED}, 1", home / "unscaled")
    loads.append({"name": f"{SCALED}{UNSCALED}", "folder": str(unscaled), "ranks": 1})
    saves = [run | {"name": name, "folder": str(home / name)} for name, run in SAVED.items()]
    job = {"tokens": tokens().tolist(), "load": loads, "save": saves}
    saved, _ = run_side(python, ["meta_side.py"], job, home / "job")
    return Judged(home, saved)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, torch.Tensor]:
    """What transformers makes of each model."""
    return {name: logits(folder, tokens()) for name, folder in models.items()}


def misread(folder: Path, copy: Path, head_dim: int) -> Path:
    """A copy of Meta's files in which rows of q and k have Hugging Face's order, by einops."""
    shutil.copytree(folder, copy)
    for path in copy.glob("consolidated.*.pth"):
        state = torch.load(path, weights_only=True)
        for name, weight in state.items():
            if name.endswith(("attention.wq.weight", "attention.wk.weight")):
                order = "(h f two) c -> (h two f) c"
                state[name] = einops.rearrange(weight, order, two=2, f=head_dim // 2).contiguous()
        torch.save(state, path)
    return copy


def without_scaling(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    params = json.loads((copy / "params.json").read_text())
    assert params["use_scaled_rope"] is True
    (copy / "params.json").write_text(json.dumps(params | {"use_scaled_rope": False}))
    return copy


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two logits."""
    assert found.shape == expected.shape == (2, POSITIONS, VOCABULARY)
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SOURCES)
def test_metas_model_gives_the_logits_of_transformers(
    meta: Judged, expected: dict[str, torch.Tensor], kind: str, layout: str
) -> None:
    right = gap(meta.logits[f"{kind}, {layout}"], expected[kind])
    wrong = gap(meta.logits[f"{kind}, {layout}{WRONG}"], expected[kind])
    size = expected[kind].abs().max().item()
    print(f"{kind}, {layout}: {right:.1e}, rows misread {wrong:.1f}, logits up to {size:.0f}")
    assert right <= LIMIT
    assert wrong > FAR, "rows in Hugging Face's order pass, so this test could not have failed"


@pytest.mark.parametrize("kind", SOURCES)
def test_weights_keep_their_dtype(meta: Judged, kind: str) -> None:
    """Logits in fp32 would hide weights that were widened on the way."""
    state = torch.load(meta.home / f"{kind}, 1" / "consolidated.00.pth", weights_only=True)
    assert {f"{weight.dtype}" for weight in state.values()} == {f"torch.{SOURCES[kind].dtype}"}


def test_the_scaling_is_in_params_json(meta: Judged, expected: dict[str, torch.Tensor]) -> None:
    wrong = gap(meta.logits[f"{SCALED}{UNSCALED}"], expected[SCALED])
    print(f"{SCALED}, use_scaled_rope false: {wrong:.1f}")
    assert wrong > FAR


@pytest.mark.parametrize("name", SAVED)
def test_transformers_gives_the_logits_of_metas_model(
    meta: Judged, tmp_path: Path, name: str
) -> None:
    source = meta.home / name
    params = SAVED[name]["params"]
    assert len(list(source.glob("consolidated.*.pth"))) == SAVED[name]["ranks"]
    wrong_order = misread(source, tmp_path / "misread", params["dim"] // params["n_heads"])
    gaps = []
    for folder, target in ((source, tmp_path / "hf"), (wrong_order, tmp_path / "wrong")):
        convert(folder, target, "--to", "hf")
        gaps.append(gap(logits(target, tokens()), meta.logits[name]))
    right, wrong = gaps
    size = meta.logits[name].abs().max().item()
    print(f"saved by {name}: {right:.1e}, rows misread {wrong:.1f}, logits up to {size:.0f}")
    assert right <= LIMIT
    assert wrong > FAR, "rows in Hugging Face's order pass, so this test could not have failed"
