"""Coverage-guided fuzzing of everything that reads bytes of strangers, by atheris (libFuzzer).

    pip install atheris            # 3.0.0 was used; no extra of the package names it
    python tests/fuzz/readers.py TARGET [-max_total_time=120] [-rss_limit_mb=2048] [-timeout=20]

TARGET is one of `TARGETS`. Seeds are made by code in a temporary folder. What a reader may do
with any bytes is to return, or to raise `RefusedError` (``ValueError`` where its docstring says
so); everything else ends the run, and libFuzzer leaves the input as ``crash-…``. What was found
so far is in ``tests/checkpoint/untrusted/test_fuzz_findings.py``, its bytes made by code.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

with atheris.instrument_imports(
    include=["llamaconv", "json", "zipfile", "pickletools"],
):
    import torch
    from safetensors.torch import save_file
    from support import checkpoints, damages, stores
    from torch.distributed.checkpoint import save

    from llamaconv import RefusedError, Target, convert_checkpoint, make_plan
    from llamaconv.checkpoint import dcp, huggingface, receipt, torch_checkpointing
    from llamaconv.checkpoint.checkpoint import Checkpoint
    from llamaconv.checkpoint.folder import LocalFolder
    from llamaconv.checkpoint.huggingface_index import index_diff
    from llamaconv.checkpoint.untrusted import files, safetensors_header, torch_archive, torch_file
    from llamaconv.checkpoint.untrusted.files import json_object
    from llamaconv.model.config_json import from_config
    from llamaconv.model.params_json import from_params_json

PLACE = Path(tempfile.mkdtemp(prefix="llamaconv-fuzz-", dir="/dev/shm"))
SHAPES = {"tok_embeddings": (80, 64), "wq": (64, 64), "w1": (96, 64)}
STATE = {"norm.weight": torch.ones(3), "output.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
HELD = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


def header(content: bytes) -> None:
    """The JSON of a safetensors header, with its length before it and some bytes behind."""
    whole = len(content).to_bytes(8, "little") + content
    safetensors_header.parse_header(PLACE / "x", whole, len(whole) + 64)


def header_bytes(content: bytes) -> None:
    safetensors_header.parse_header(PLACE / "x", content, len(content))


def metadata(content: bytes) -> None:
    (PLACE / "dcp" / ".metadata").write_bytes(content)
    _shown(dcp.open_dcp(LocalFolder(PLACE / "dcp")))


def store_metadata(content: bytes) -> None:
    (PLACE / "stores" / "fsdp" / "metadata.pkl").write_bytes(content)
    _shown(torch_checkpointing.open_torch_checkpointing(PLACE / "stores" / "fsdp"))


def rank_file(content: bytes) -> None:
    """A rank's file, with DTensors in it."""
    (PLACE / "stores" / "fsdp" / "model_1.pt").write_bytes(content)
    _shown(torch_checkpointing.open_torch_checkpointing(PLACE / "stores" / "fsdp"))


def torch_header(content: bytes) -> None:
    (PLACE / "x.bin").write_bytes(content)
    with files.open_bytes(PLACE / "x.bin") as opened:
        torch_file.read_torch_header(PLACE / "x.bin", opened)


def archive(content: bytes) -> None:
    (PLACE / "x.zip").write_bytes(content)
    with open(PLACE / "x.zip", "rb") as file, suppress(ValueError):
        found = torch_archive.Archive(files.LocalBytes(file), 0, len(content))
        for made in found.value.values() if isinstance(found.value, dict) else [found.value]:
            found.tensor(made)


def config(content: bytes) -> None:
    params, problems = from_config(json_object("config.json", content), SHAPES)
    assert params or problems
    assert str(params)


def params_json(content: bytes) -> None:
    params, problems = from_params_json(json_object("x", content), SHAPES, "params.json")
    assert params or problems
    assert str(params)


def receipt_json(content: bytes) -> None:
    found = receipt.from_json("llamaconv.json", json_object("x", content))
    assert str(found)
    # What was accepted has to serve everything that asks a receipt.
    assert receipt.from_json("x", json.loads(json.dumps(found.to_json()))) == found


def index(content: bytes) -> None:
    (PLACE / "hf" / huggingface.INDEX).write_bytes(content)
    checkpoint = huggingface.open_huggingface(PLACE / "hf")
    _shown(checkpoint)
    str(index_diff(checkpoint))


def _shown(checkpoint: Checkpoint) -> None:
    str(checkpoint.table())
    str(checkpoint.folded())
    json.dumps(checkpoint.to_json())
    plan = make_plan(checkpoint, Target(to="meta"))
    str(plan.table())
    assert plan.params or plan.errors


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "header_bytes": header_bytes,
    "metadata": metadata,
    "store_metadata": store_metadata,
    "rank_file": rank_file,
    "torch_header": torch_header,
    "archive": archive,
    "config": config,
    "params_json": params_json,
    "receipt": receipt_json,
    "index": index,
}


def seeds(target: str) -> list[bytes]:
    """Good inputs of a target."""
    source = checkpoints.write(PLACE / "seed", shards=2)
    save_file(HELD, PLACE / "one.safetensors")
    whole = (PLACE / "one.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    (PLACE / "hf").mkdir()
    for name, tensor in HELD.items():
        save_file({name: tensor}, PLACE / "hf" / f"{name}.safetensors")
    named = {"weight_map": {n: f"{n}.safetensors" for n in HELD}, "metadata": {"total_size": 20}}
    save(STATE, checkpoint_id=PLACE / "dcp", no_dist=True)
    stored = stores.unpack(PLACE / "stores") / "fsdp"
    torch.save(STATE, PLACE / "seed.bin")
    torch.save({"a": torch.ones(2)[1:], "b": None}, PLACE / "other.bin")
    archives = [(PLACE / name).read_bytes() for name in ("seed.bin", "other.bin")]
    ours = convert_checkpoint(
        make_plan(dcp_source(source), Target()), PLACE / "t"
    ).receipt.to_json()
    # Long lists only slow the search down.
    ours["tensors"] = ours["tensors"][:1]
    scaled = {**checkpoints.CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    new = {**checkpoints.CONFIG, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    meta = {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "use_scaled_rope": True}
    return {
        "header": [whole[8:end]],
        "header_bytes": [whole],
        "metadata": [(PLACE / "dcp" / ".metadata").read_bytes()],
        "store_metadata": [(stored / "metadata.pkl").read_bytes()],
        "rank_file": [(stored / "model_1.pt").read_bytes()],
        "torch_header": archives,
        "archive": archives,
        "config": [json.dumps(one).encode() for one in (checkpoints.CONFIG, scaled, new)],
        "params_json": [json.dumps({**meta, "multiple_of": 32, "vocab_size": -1}).encode()],
        "receipt": [json.dumps(ours).encode()],
        "index": [json.dumps(named).encode()],
    }[target]


def dcp_source(folder: Path) -> Checkpoint:
    return huggingface.open_huggingface(folder)


def mutate_json(content: bytes, most: int, seed: int) -> bytes:
    """One place of the JSON is another value, or taken out; bytes at random would seldom be JSON."""
    rng = random.Random(seed)
    try:
        value = json.loads(content)
        path = rng.choice([path for path in damages.paths(value) if path])
    except (ValueError, IndexError):
        return bytes(atheris.Mutate(content, most))
    if rng.random() < 0.1:
        return bytes(atheris.Mutate(content, most))
    inside = value
    for step in path[:-1]:
        inside = inside[step]
    if rng.random() < 0.2:
        del inside[path[-1]]
    else:
        other = inside
        for step in rng.choice(damages.paths(inside)):
            other = other[step]
        inside[path[-1]] = rng.choice((*damages.ODD, copy.deepcopy(other)))
    changed = json.dumps(value).encode()
    return changed if len(changed) <= most else content


JSON = ("header", "config", "params_json", "receipt", "index")


def main() -> None:
    name, *options = sys.argv[1:]
    target = TARGETS[name]
    corpus = PLACE / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)

    def one(content: bytes) -> None:
        try:
            target(content)
        except RefusedError as error:
            assert str(error)  # noqa: PT017

    mutator = {"custom_mutator": mutate_json} if name in JSON else {}
    atheris.Setup([sys.argv[0], "-max_len=20000", *options, str(corpus)], one, **mutator)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


if __name__ == "__main__":
    main()
