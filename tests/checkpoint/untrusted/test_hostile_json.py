"""Headers, indices and configurations of strangers: nothing in them crashes, hangs or is believed.

Whatever stands in a file, the outcome is a refusal in words, or a checkpoint without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from support import checkpoints, hostile

from llamaconv import make_plan, open_checkpoint
from llamaconv.cli import main
from llamaconv.model.params import LlamaParams


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return hostile.sharded(tmp_path / "source")


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def shard(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    said = len(header) if length is None else length
    return said.to_bytes(8, "little") + header + data


def entry(name: str = "a", **changes: Any) -> bytes:
    content = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({name: content}).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = b"9" * 5000

HEADERS: dict[str, tuple[bytes, str]] = {
    "length of all ones": (b"\xff" * 8 + b"{}", "the format allows 100000000"),
    "length of 2**63": (shard(b"{}", length=2**63), "the format allows 100000000"),
    "length just over the limit": (shard(b"{}", length=100_000_001), "the format allows"),
    "length over the file": (shard(b"{}", length=3), "cut inside its header"),
    "length zero": (shard(b"", b"{}"), "cut inside its header"),
    "length one": (shard(b"{", b"}"), "cut inside its header"),
    "100,000 brackets": (shard(DEEP), "nested too deep"),
    "100,000 brackets in an entry": (shard(b'{"a":' + DEEP + b"}"), "nested too deep"),
    "100,000 objects": (shard(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep"),
    "100 brackets": (shard(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"), "nested too deep"),
    "a name twice": (shard(b'{"a":1,"b":1,"a":2}'), "'a' appears twice"),
    "a key twice": (shard(b'{"a":{"dtype":"F32","dtype":"U8"}}'), "'dtype' appears twice"),
    "5,000 digits": (shard(b'{"a":{"shape":[' + HUGE + b"]}}"), "not valid JSON"),
    "an offset of 4,000 digits": (
        shard(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,' + b"9" * 4000 + b"]}}"),
        "whole numbers",
    ),
    "NaN": (shard(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "whole numbers"),
    "Infinity": (shard(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}'), "whole"),
    "1e400": (shard(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e400]}}'), "whole"),
    "a byte order mark": (shard(b"\xef\xbb\xbf" + entry()), "not valid JSON"),
    "UTF-16": (shard(entry().decode().encode("utf-16")), "not valid JSON"),
    "UTF-32": (shard(entry().decode().encode("utf-32-le")), "not valid JSON"),
    "no UTF-8": (shard(b'{"\xff\xfe":1}'), "not valid JSON"),
    "zeros": (shard(bytes(64)), "not valid JSON"),
    "an entry that is a text": (shard(b'{"a":"F32"}'), "not an object"),
    "an entry that is null": (shard(b'{"a":null}'), "not an object"),
    "a dtype that is a list": (shard(entry(dtype=["F32"])), "unknown dtype ['F32']"),
    "a dtype that is an object": (shard(entry(dtype={"F32": 1})), "unknown dtype"),
    "a dtype that is a number": (shard(entry(dtype=1)), "unknown dtype 1"),
    "a dtype that is absent": (shard(entry(dtype=None)), "unknown dtype None"),
    "a dtype of 4 bits": (shard(entry(dtype="F4")), "unknown dtype 'F4'"),
    "a shape that is a text": (shard(entry(shape="[2]")), "whole numbers"),
    "a shape that is a number": (shard(entry(shape=2)), "whole numbers"),
    "a shape of booleans": (shard(entry(shape=[True, 2])), "whole numbers"),
    "a shape of texts": (shard(entry(shape=["2"])), "whole numbers"),
    "a shape that is negative": (shard(entry(shape=[-1, -2])), "whole numbers"),
    "a shape of floats": (shard(entry(shape=[2.0])), "whole numbers"),
    "a shape that overflows to 0": (shard(entry(shape=[2**62, 4])), "bytes for shape"),
    "a shape that overflows to 8": (shard(entry(shape=[2**61 + 1, 2**3])), "bytes for shape"),
    "a shape beyond 64 bits": (shard(entry(shape=[2**64])), "whole numbers"),
    "an axis of nothing": (shard(entry(shape=[0, 2**62])), "8 bytes for shape"),
    "offsets reversed": (shard(entry(data_offsets=[8, 0])), "-8 bytes for shape"),
    "offsets negative": (shard(entry(data_offsets=[-8, 0])), "whole numbers"),
    "offsets of booleans": (shard(entry(data_offsets=[False, 8])), "whole numbers"),
    "offsets of floats": (shard(entry(data_offsets=[0.0, 8.0])), "whole numbers"),
    "three offsets": (shard(entry(data_offsets=[0, 8, 8])), "whole numbers"),
    "offsets beyond the file": (shard(entry(data_offsets=[2**62, 2**62 + 8])), "leaves a gap"),
    "a hole at the start": (shard(entry(data_offsets=[4, 12]), bytes(12)), "leaves a gap"),
    "a list": (shard(b"[]"), "not a JSON object"),
    "a number": (shard(b"12"), "not a JSON object"),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_invalid_header_is_refused_with_the_reason(source: Path, attack: str) -> None:
    content, words = HEADERS[attack]
    (source / SHARD).write_bytes(content)
    said = hostile.refusal(source)
    assert words in said
    assert SHARD in said
    # Where the reference reader reads what we refuse, the row would be wrong, not the file.
    with pytest.raises(SafetensorError), safe_open(source / SHARD, framework="pt"):
        pass


def test_tensor_with_too_many_dimensions_is_refused(source: Path) -> None:
    (source / SHARD).write_bytes(shard(entry(shape=[2, *[1] * 64]), bytes(8)))
    assert "65 dimensions" in hostile.refusal(source)


def test_overlapping_tensors_and_holes_are_refused(source: Path) -> None:
    for second, words in (([4, 12], "overlaps"), ([0, 8], "overlaps"), ([12, 20], "a gap")):
        both = {**json.loads(entry()), **json.loads(entry("b", data_offsets=second))}
        (source / SHARD).write_bytes(shard(json.dumps(both).encode(), bytes(second[1])))
        assert words in hostile.refusal(source)


@pytest.mark.parametrize(
    "metadata",
    [
        *(3, None, [], "text", {"format": 3}, {"a": {"b": []}}, {"DCP_SHARDING_INFO": []}),
        *({"DCP_SHARDING_INFO": text} for text in ("[" * 99999, "{", "3", '{"a": 3}', "\ud800")),
        {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [-1]}}'},
        {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": "0"}}'},
        {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [true, 0]}}'},
    ],
    ids=str,
)
def test_header_metadata_of_any_type_is_accepted(tmp_path: Path, metadata: object) -> None:
    content = {**json.loads(entry()), "__metadata__": metadata}
    path = tmp_path / "one.safetensors"
    path.write_bytes(shard(json.dumps(content).encode(), bytes(8)))
    opened = open_checkpoint(path)
    assert list(opened.tensors) == ["a"]
    assert not opened.errors
    assert "do not belong to a Llama" in hostile.refusal(path)


@pytest.mark.parametrize("start", [2**62, 2**63 - 1])
def test_piece_with_a_huge_offset_is_refused(tmp_path: Path, start: int) -> None:
    noted = json.dumps({"a": {"saved_offsets": [start] * 8}})
    content = {
        **json.loads(entry(shape=[2, *[1] * 7])),
        "__metadata__": {"DCP_SHARDING_INFO": noted},
    }
    path = tmp_path / "one.safetensors"
    path.write_bytes(shard(json.dumps(content).encode(), bytes(8)))
    assert "is cut over 1 files" in hostile.refusal(path)
    assert main(["inspect", str(path)]) == 2


NAMES = [
    *(
        "a\0b",
        "\x1b[2J\x1b]0;x\x07",
        "../../etc/passwd",
        "a/b\\c",
        "x" * 1_000_000,
        "." * 300_000,
        "\u202egnp.exe",
    ),
    *("\ud800", "\ufeff", "", ".", "..", "%s%n{0}", "model.layers.\u0663.mlp.up_proj.weight"),
    *("model.layers.-1.mlp.up_proj.weight", "model.layers.1e5.mlp.up_proj.weight"),
    f"model.layers.{'9' * 5000}.self_attn.q_proj.weight",
    f"layers.{'9' * 5000}.attention.wqkv.weight",
    "model.layers.999999999999999999.self_attn.q_proj.weight",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hostile_tensor_name_is_data(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hostile.sharded(tmp_path / "hf")
    (folder / INDEX).unlink()
    (folder / "extra.safetensors").write_bytes(shard(entry(name), bytes(8)))
    assert "do not belong to a Llama" in hostile.refusal(folder)
    assert name in open_checkpoint(folder).tensors
    hostile.convert(folder)
    assert main(["inspect", str(folder)]) == 2
    assert main(["inspect", str(folder), "--json"]) == 2
    said = capfd.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    assert len(said.err) < 50_000
    found = json.loads(said.out[said.out.index("\n{\n") :])["tensors"]
    assert name in [tensor["name"] for tensor in found]


def test_table_with_one_very_long_name_does_not_pad_every_row(tmp_path: Path) -> None:
    folder = hostile.sharded(tmp_path / "hf")
    (folder / "extra.safetensors").write_bytes(shard(entry("x" * 10_000_000), bytes(8)))
    (folder / INDEX).unlink()
    opened = open_checkpoint(folder)
    assert len(str(opened.table())) < 1_000_000
    assert len(opened._repr_html_()) < 1_000_000


# Numbers that a loop or an allocation would follow.

SIZES = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"]
SIZES += ["num_key_value_heads", "vocab_size", "head_dim", "max_position_embeddings"]
META_SIZES = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size"]
NOT_SIZES: list[Any] = [
    10**9,
    10**18,
    10**4000,
    0,
    -1,
    4096.0,
    "4096",
    True,
    [64],
    {},
    float("inf"),
]


@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("entry", SIZES)
def test_invalid_size_in_config_json_is_refused(source: Path, entry: str, value: Any) -> None:
    checkpoints.edit_json(source / "config.json", lambda config: config.update({entry: value}))
    opened = open_checkpoint(source)
    if value != 10**9 or entry in ("num_hidden_layers", "num_attention_heads"):
        assert entry in str(opened.errors[0])
    if entry != "max_position_embeddings" or value != 10**9:
        hostile.refusal(source)
    plan = make_plan(opened)
    assert len(plan.moves) + len(plan.missing) < 20_000


OF_META = [(entry, value) for entry in META_SIZES for value in NOT_SIZES]
# Meta's own files have it, and mean the tensor's.
OF_META.remove(("vocab_size", -1))


@pytest.mark.parametrize(("entry", "value"), OF_META, ids=lambda value: str(value)[:20])
def test_invalid_size_in_params_json_is_refused(tmp_path: Path, entry: str, value: Any) -> None:
    folder = hostile.meta(tmp_path / "meta")
    checkpoints.edit_json(folder / "params.json", lambda params: params.update({entry: value}))
    said = hostile.refusal(folder)
    assert "params.json" in said


NUMBERS = ["rope_theta", "rms_norm_eps"]
NOT_NUMBERS: list[Any] = [10**4000, 0, -1.0, "1", True, [], {}, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("entry", NUMBERS)
def test_invalid_number_in_config_json_is_refused(source: Path, entry: str, value: Any) -> None:
    checkpoints.edit_json(source / "config.json", lambda config: config.update({entry: value}))
    assert entry in hostile.refusal(source)


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("entry", [*SCALING, "original_max_position_embeddings"])
def test_invalid_number_in_rope_scaling_is_refused(source: Path, entry: str, value: Any) -> None:
    scaling = {**SCALING, "original_max_position_embeddings": 8192, entry: value}
    checkpoints.edit_json(
        source / "config.json", lambda config: config.update(rope_scaling=scaling)
    )
    assert "config.json" in hostile.refusal(source)


@pytest.mark.parametrize("value", [3, "x", None, [[]], {"a": []}, True, 1e400], ids=str)
def test_config_json_entries_of_any_type_do_not_crash(source: Path, value: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    others = ["rope_scaling", "rope_parameters", "quantization_config", "head_dim", "dtype"]
    for entry in [*config, *others]:
        content = json.dumps({**config, entry: value})
        (source / "config.json").write_text(content)
        make_plan(open_checkpoint(source))  # a plan, with or without problems


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (DEEP, "nested too deep"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested too deep"),
        (b'{"a":' + HUGE + b"}", "not valid JSON"),
        (b'{"a":1,"a":2}', "appears twice"),
        (b"\xff\xfe" + '{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'"text"', "expected a JSON object"),
        (b"\0" * 100, "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(source: Path, file: str, content: bytes, words: str) -> None:
    (source / file).write_bytes(content)
    said = hostile.refusal(source)
    assert words in said
    assert file in said


INDICES: list[Any] = [
    {"weight_map": []},
    {"weight_map": {"a": ["model.safetensors"]}},
    {"weight_map": {"a": {"b": "c"}}},
    {"weight_map": {"a": None}},
    {"weight_map": {}, "metadata": 3},
    {"weight_map": {"a": SHARD}, "metadata": {"total_size": "7"}},
    {"weight_map": {"a": SHARD}, "metadata": {"total_size": 1e400}},
    {"weight_map": {"a": SHARD}, "metadata": {"total_size": 10**4000}},
    {"weight_map": {"a": "x" * 100_000}},
    {"weight_map": {"a": "\ud800.safetensors"}},
    {"weight_map": {"a": "config.json"}},
    *(
        {"weight_map": {"lm_head.weight": name}}
        for name in ("../x", "/etc/passwd", "a/b", "..", ".", "a\0b", "C:\\x", "~/x", "a/../b")
    ),
]


@pytest.mark.parametrize("index", INDICES, ids=range(len(INDICES)))
def test_index_of_any_content_does_not_crash(source: Path, index: Any) -> None:
    (source / INDEX).write_text(json.dumps(index))
    hostile.refusal(source)


RECEIPT_EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda r: r.update(source=[]),
    lambda r: r.update(source={}),
    lambda r: r["source"].update(assets=["x"]),
    lambda r: r["source"].update(path=3),
    lambda r: r.update(target="dcp"),
    lambda r: r["target"].update(rope=["interleaved"]),
    lambda r: r["target"].update(generation=None),
    lambda r: r.update(tensors={}),
    lambda r: r.update(tensors=[3]),
    lambda r: r["tensors"][0].update(shape="64"),
    lambda r: r["tensors"][0].update(shape=[True]),
    lambda r: r["tensors"][0].update(digests=3),
    lambda r: r.update(dropped=3),
    lambda r: r.update(versions=[]),
    lambda r: r.update(created=3),
    lambda r: r.update(verified=[1]),
    lambda r: r.update(verified={"ok": "yes", "checks": []}),
    lambda r: r.update(llamaconv_receipt=[1]),
    lambda r: r.update(params=[]),
    lambda r: r["params"].update(extra=1),
    lambda r: r["params"].pop("dim"),
    lambda r: r["params"].update(n_layers=10**9),
    lambda r: r["params"].update(n_layers=12.0),
    lambda r: r["params"].update(n_heads=10**18),
    lambda r: r["params"].update(n_kv_heads=0),
    lambda r: r["params"].update(n_kv_heads=3),
    lambda r: r["params"].update(head_dim="8"),
    lambda r: r["params"].update(head_dim=7),
    lambda r: r["params"].update(tied=1),
    lambda r: r["params"].update(rope_theta=float("nan")),
    lambda r: r["params"].update(rope_theta=10**400),
    lambda r: r["params"].update(norm_eps="1e-5"),
    lambda r: r["params"].update(rope_scaling=[1]),
    lambda r: r["params"].update(rope_scaling={"factor": 8}),
    lambda r: r["params"].update(
        rope_scaling={
            **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), 1.0),
            "original_max_position": "x",
        }
    ),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llamaconv import convert_checkpoint

    folder = tmp_path_factory.mktemp("converted")
    source = hostile.sharded(folder / "source")
    return convert_checkpoint(make_plan(open_checkpoint(source)), folder / "target").target


@pytest.mark.parametrize("edit", RECEIPT_EDITS, ids=range(len(RECEIPT_EDITS)))
def test_receipt_of_any_content_does_not_crash(
    source: Path, converted: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    content = json.loads((converted / "llamaconv.json").read_text())
    (source / "llamaconv.json").write_text(json.dumps(content))
    assert not open_checkpoint(source).errors
    edit(content)
    (source / "llamaconv.json").write_text(json.dumps(content))
    assert "not a receipt that this version of llamaconv can read" in hostile.refusal(source)


def test_receipt_with_invalid_options_is_refused_by_verify(source: Path, converted: Path) -> None:
    content = json.loads((converted / "llamaconv.json").read_text())
    for options in ({"exec": "x"}, {"shards": "8"}, {"to": "ftp"}, {"dtype": "object"}):
        changed = {**content, "target": {**content["target"], **options}}
        (source / "llamaconv.json").write_text(json.dumps(changed))
        assert main(["verify", str(source), str(source)]) == 2


# What lies where a file should.


KINDS = ["pipe", "folder", "socket", "loop", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", [SHARD, INDEX, "config.json", "llamaconv.json"])
def test_pipes_and_devices_named_like_a_file_do_not_block(
    source: Path, file: str, kind: str
) -> None:
    hostile.put(source / file, kind)
    opened = open_checkpoint(source)
    if file == SHARD:
        assert SHARD in hostile.refusal(source)
    make_plan(opened)


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_next_to_valid_weights_are_ignored(tmp_path: Path, kind: str) -> None:
    folder = hostile.single(tmp_path / "hf")
    hostile.put(folder / "other.safetensors", kind)
    hostile.put(folder / "pytorch_model.bin", kind)
    make_plan(open_checkpoint(folder)).raise_for_errors()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file", ["consolidated.00.pth", "params.json", "pytorch_model.bin", ".metadata"]
)
def test_special_files_in_other_formats_are_refused(tmp_path: Path, file: str, kind: str) -> None:
    folder = hostile.meta(tmp_path / "meta")
    if file == "pytorch_model.bin":
        (folder / "consolidated.00.pth").unlink()
    hostile.put(folder / file, kind)
    assert file in hostile.refusal(folder)


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/null"])
def test_special_file_as_source_is_refused(tmp_path: Path, kind: str) -> None:
    hostile.put(tmp_path / "model.safetensors", kind)
    assert "neither a folder nor a file" in hostile.refusal(tmp_path / "model.safetensors")
    hostile.convert(tmp_path / "model.safetensors")


def test_symbolic_links_of_the_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    make_plan(open_checkpoint(snapshot)).raise_for_errors()


def test_file_with_a_huge_number_is_refused_at_once(tmp_path: Path) -> None:
    folder = hostile.meta(tmp_path / "meta")
    (folder / "consolidated.999999999999.pth").write_bytes(b"")
    assert "cut into more than" in hostile.refusal(folder)
    (source := tmp_path / "hf").mkdir()
    (source / "model-00001-of-99999999999.safetensors").write_bytes(b"")
    (source / "model-00002-of-99999999999.safetensors").write_bytes(b"")
    assert "the file is empty" in hostile.refusal(source)


# What memory and time are bounded by.


def sparse(path: Path, start: bytes, n_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(n_bytes)


def wide(folder: Path, shape: list[int]) -> Path:
    """A tied model whose head and embedding claim ``shape`` of no bytes."""
    hostile.single(folder)
    checkpoints.edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    empty = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
    header = dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), empty)
    (folder / "model.safetensors").write_bytes(shard(json.dumps(header).encode()))
    return folder


@pytest.mark.thorough
def test_bombs_of_json_are_refused_in_bounded_memory_and_time(tmp_path: Path) -> None:
    def index(name: str, content: bytes) -> Path:
        folder = hostile.sharded(tmp_path / name)
        (folder / INDEX).write_bytes(content)
        return folder

    def header(name: str, content: bytes) -> Path:
        folder = hostile.sharded(tmp_path / name)
        (folder / SHARD).write_bytes(shard(content))
        return folder

    twice = ",".join(f'"{n}":0' for n in range(300_000)).encode()
    lists, objects = b"[],", b'{"":0},'
    attacks = {
        index("lists", b'{"a":[' + lists * 20_000_000 + b"0]}"): "more than 5000000 values",
        index("objects", b'{"a":[' + objects * 6_000_000 + b"0]}"): "more than 5000000 values",
        index("twice", b"{" + twice + b',"7":0}'): "appears twice",
        header("lists-in-a-header", b'{"a":[' + lists * 20_000_000 + b"0]}"): "more than 5000000",
        header("brackets", b"[" * 90_000_000): "more than 5000000 values",
        wide(tmp_path / "rows-of-nothing", [2**62, 0]): "are empty",
        wide(tmp_path / "columns-of-nothing", [0, 2**62]): "are empty",
    }
    long = hostile.sharded(tmp_path / "long")
    sparse(long / "config.json", b"{", 50_000_000_000)
    attacks[long] = "no index or configuration is that long"
    zeros = hostile.sharded(tmp_path / "zeros")
    sparse(zeros / SHARD, (99_000_000).to_bytes(8, "little"), 50_000_000_000)
    attacks[zeros] = "not valid JSON"
    for folder, said in zip(attacks, hostile.bounded(*attacks), strict=True):
        assert attacks[folder] in said, folder.name


def test_rows_of_a_tensor_that_claims_too_many_are_not_shown(tmp_path: Path) -> None:
    from llamaconv.notebook.panels.preview import one_tensor

    params = LlamaParams(2**20, 1, 1, 1, 2**20, 2, 2, 1e-5, 10000.0, max_position=128)
    folder = checkpoints.write_holes(tmp_path / "hf", params, 1)
    plan = make_plan(open_checkpoint(folder))
    assert not plan.errors
    assert "must have 1 to" in one_tensor(plan).static()._repr_html_()
    plan = make_plan(open_checkpoint(wide(tmp_path / "none", [2**62, 0])))
    key = plan.written[0].target_name
    assert "must have 1 to" in one_tensor(plan, key).static()._repr_html_()
