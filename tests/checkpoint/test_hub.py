"""Repositories of the Hub by their headers, against a real server on the loopback.

huggingface_hub reads its environment once, so everything runs in processes of its own.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from support import checkpoints, headless
from support.hub_server import Handler, Hub, Misbehave, asking, serve

from llamaconv import RefusedError, open_checkpoint
from llamaconv.checkpoint.hub_address import SAFETENSORS, HubAddress
from llamaconv.model.params import LlamaParams
from llamaconv.plan.small_files import TOKENIZERS

MODEL = "hf://org/model"
SHARD = "model-00002-of-00003.safetensors"

LLAMA_405B = LlamaParams(
    dim=16384,
    n_layers=126,
    n_heads=128,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=53248,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    max_position=131072,
)


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has ``source`` as org/model; processes started now ask it and no other."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with serve(model=source) as hub:
        for name, value in asking(hub.endpoint, tmp_path / "hf-home").items():
            monkeypatch.setenv(name, value)
        yield hub


def llamaconv(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamaconv", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def python(code: str) -> str:
    """What ``code`` prints, with ``checkpoint`` that of `MODEL`."""
    opened = f"from llamaconv import open_checkpoint; checkpoint = open_checkpoint({MODEL!r})\n"
    done = subprocess.run([sys.executable, "-c", opened + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inspected(source: str | Path) -> dict[str, Any]:
    done = llamaconv("inspect", str(source), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def refusal(*words: str) -> str:
    """The one line with which a command ends that is refused."""
    done = llamaconv(*words)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


# What is there.


def test_repository_opens_like_its_local_folder(hub: Hub, source: Path) -> None:
    there, here = inspected(MODEL), inspected(source)
    commit = hub.commit("org/model")
    assert there.pop("path") == f"{MODEL}@{commit}"
    assert there.pop("commit") == commit
    assert here.pop("path") == str(source)
    assert here.pop("commit") is None
    assert there == here
    assert len(there["tensors"]) == len(checkpoints.tensors())


@pytest.mark.parametrize("shards", [1, 3])
def test_repository_with_one_file_or_without_an_index_opens(
    hub: Hub, tmp_path: Path, shards: int
) -> None:
    folder = checkpoints.write(tmp_path / "other", shards=shards)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    hub.repos["org/other"] = folder
    assert inspected("hf://org/other")["tensors"] == inspected(folder)["tensors"]


def test_405b_is_listed_and_planned_from_some_megabytes(hub: Hub, tmp_path: Path) -> None:
    folder = checkpoints.write_holes(tmp_path / "big", LLAMA_405B, shards=191)
    hub.repos["org/big"] = folder
    there = inspected("hf://org/big")
    assert there["tensors"] == inspected(folder)["tensors"]
    assert there["total_bytes"] == 811_706_777_600
    assert there["problems"] == []
    assert hub.bytes_sent < 7_000_000
    assert hub.requests == {"api": 1, "file": 193, "cdn": 191}
    plan = json.loads(llamaconv("plan", "hf://org/big", "--json").stdout)
    assert plan["bytes_to_write"] == there["total_bytes"]
    assert plan["problems"] == []


def test_plan_of_stored_tied_head_asks_for_a_choice(hub: Hub, tmp_path: Path) -> None:
    """Comparing it with the embedding would fetch both."""
    folder = checkpoints.write(tmp_path / "other", tie_word_embeddings=True)
    hub.repos["org/other"] = folder
    done = llamaconv("plan", "hf://org/other", "--json")
    assert done.returncode == 2
    (problem,) = json.loads(done.stdout)["problems"]
    assert "lm_head.weight" in problem and "--tie" in problem
    assert llamaconv("plan", "hf://org/other", "--tie", "embedding").returncode == 0


def test_plan_of_biases_reads_them_and_no_other_weights(hub: Hub, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = checkpoints.tensors()
    n_rows = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0]
    hub.repos["org/other"] = checkpoints.write(
        tmp_path / "other", {**tensors, name: torch.ones(n_rows)}
    )
    done = llamaconv("plan", "hf://org/other", "--json", "--generation", "titan-0.2")
    assert done.returncode == 2
    (problem,) = json.loads(done.stdout)["problems"]
    assert name in problem and "not zero" in problem
    assert hub.bytes_sent < 130_000


def test_long_header_takes_a_second_request(hub: Hub, source: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(source / SHARD), source / SHARD, metadata={"notes": "x" * 100_000})
    assert inspected(MODEL)["tensors"] == inspected(source)["tensors"]
    assert hub.requests["cdn"] == 4


def test_all_requests_use_the_listed_commit(hub: Hub) -> None:
    # The server refuses a file that is asked for by the name of a branch.
    commit = hub.commit("org/model")
    for revision in ("main", "v1", "refs/pr/1", "feature/x", commit):
        assert inspected(f"{MODEL}@{revision}")["commit"] == commit


def test_server_without_ranges_is_stopped_before_it_sends_weights(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/big"] = checkpoints.write_holes(tmp_path / "big", LLAMA_405B, shards=16)
    hub.ranges = False
    assert len(inspected("hf://org/big")["tensors"]) == 1137
    # What lies in the buffers of the connections by then.
    assert hub.bytes_sent < 16 * 20_000_000


def test_token_is_sent_to_the_hub_and_not_to_redirects(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    inspected(MODEL)
    assert hub.tokens == {
        "api": {"Bearer hf_secret"},
        "file": {"Bearer hf_secret"},
        "cdn": {None},
    }


def test_plan_of_a_repository_lists_moves_and_problems(hub: Hub, source: Path) -> None:
    there, here = (json.loads(llamaconv("plan", s, "--json").stdout) for s in (MODEL, str(source)))
    assert there["moves"] == here["moves"]
    assert there["peak_memory_bytes"] > here["peak_memory_bytes"], "ranges are on their way"
    checkpoints.edit_json(source / "config.json", lambda config: config.update(hidden_act="gelu"))
    done = llamaconv("plan", MODEL)
    assert done.returncode == 2
    assert (
        f"{MODEL}@{hub.commit('org/model')}/config.json: hidden_act must be 'silu' in a Llama; got 'gelu'"
        in done.stderr
    )
    (source / "config.json").unlink()
    done = llamaconv("plan", MODEL)
    assert done.returncode == 2
    assert "Pass a folder with the model's config.json with --assets" in done.stderr
    config = checkpoints.write(source.parent / "assets")
    assert llamaconv("plan", MODEL, "--assets", str(config)).returncode == 0


def test_pictures_and_tables_of_a_repository_need_no_further_requests(
    hub: Hub, source: Path
) -> None:
    look = (
        "from llamaconv.notebook import browse, figures\n"
        "from llamaconv.notebook.panels import browse as panels\n"
        "print(browse.problem_table(checkpoint), browse.index_diff(checkpoint), browse.totals(checkpoint))\n"
        "print(panels.tensors(checkpoint).static(), figures.shard_strips(checkpoint).alt)\n"
        "print(checkpoint.summary())"
    )
    said = python(look)
    asked = hub.requests.total()
    assert "Index and headers agree: 111 tensors in 3 files" in said
    assert "No problems were found." in said
    assert f"org/model@{hub.commit('org/model')[:7]}: huggingface, half_split" in said
    assert asked == 1 + 5 + 3
    (source / SHARD).write_text("<html>please log in</html>")
    said = python(look)
    assert "this is an HTML page" in said
    assert "index and headers differ in" in said


def test_repository_opens_without_torch(hub: Hub) -> None:
    modules = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    assert "huggingface_hub" in (there := python(modules).split())
    assert not {"torch", "numpy", "safetensors", "matplotlib"} & set(there)


# What is wrong inside a repository is a problem of it, as in a folder.


def damaged(source: Path) -> str:
    done = llamaconv("plan", MODEL)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><p>log in", "this is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git-LFS pointer"),
        (b"", "the file is empty"),
        (b"\xff" * 600, "the format allows 100000000"),
        ((1000).to_bytes(8, "little") + b"{", "cut inside its header: it has 9 bytes"),
        ((9).to_bytes(8, "little") + b"{\x1b[2J: 1}", "not valid JSON"),
    ],
)
def test_damaged_shard_of_a_repository_is_a_problem(
    hub: Hub, source: Path, content: bytes, words: str
) -> None:
    (source / SHARD).write_bytes(content)
    said = damaged(source)
    assert f"{MODEL}@{hub.commit('org/model')}/{SHARD}: " in said
    assert words in said


def test_short_or_missing_shard_of_a_repository_is_a_problem(hub: Hub, source: Path) -> None:
    content = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(content[:-10])
    assert "10 bytes are missing. The file was cut" in damaged(source)
    (source / SHARD).unlink()
    assert f"{SHARD}: not found; it should hold 37 tensors" in damaged(source)


def test_hostile_names_of_a_repository_are_escaped(hub: Hub, source: Path) -> None:
    (source / "a\x1b[2Jb.safetensors").write_bytes(b"")
    (source / "sub").mkdir()
    (source / "sub" / SHARD).write_bytes(b"")
    done = llamaconv("inspect", MODEL)
    assert "ignored: a\\x1b[2Jb.safetensors: model.safetensors.index.json is used" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    checkpoints.edit_json(
        source / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": f"sub/{SHARD}"}),
    )
    assert "is not a bare file name" in damaged(source)


def test_index_above_the_size_limit_is_not_fetched(hub: Hub, source: Path) -> None:
    os.truncate(source / "model.safetensors.index.json", 200_000_000)
    assert "200000000 bytes; no index or configuration is that long" in damaged(source)
    assert hub.bytes_sent < 10_000_000


# What the Hub refuses, or does not say, refuses the command.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://org/nothing", "has no such repository, or it is private; check the name, or log in"),
        (f"{MODEL}@v9", "has org/model, but not this revision"),
    ],
)
def test_missing_repository_revision_or_file_is_refused(hub: Hub, name: str, words: str) -> None:
    said = refusal("inspect", name)
    assert said.startswith(f"error: {name}: {hub.endpoint.removeprefix('http://')} {words}")


def answers(status: int, on: str = "/resolve/", times: int = 1 << 30, **given: Any) -> Misbehave:
    """A server that answers the first so many requests with ``on`` in the path by ``status``."""
    left = [times]

    def misbehave(handler: Handler, path: str) -> bool:
        if on not in path or not left[0]:
            return False
        left[0] -= 1
        handler.answer(status, **given)
        return True

    return misbehave


def listed(file: dict[str, Any]) -> Misbehave:
    """A server that lists one file of any name and size."""
    body = json.dumps({"id": "org/model", "sha": "0" * 40, "siblings": [file]}).encode()
    return answers(200, body=body, on="/api/")


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        (answers(403, code="GatedRepo"), ["is gated; accept its terms at http", "HF_TOKEN"]),
        (answers(401, code="GatedRepo"), ["is gated; accept its terms at http", "hf auth login"]),
        (answers(403), ["denies access (403)", "hf auth login"]),
        (answers(401, on="/api/"), ["no such repository, or it is private", "HF_TOKEN"]),
        (
            answers(401, message="Invalid credentials in Authorization header"),
            ["rejects the token", "hf auth login"],
        ),
        (answers(404, code="EntryNotFound"), ["lists the file, but does not have it"]),
        (answers(429, retry_after="77"), ["limits the rate of requests (429)", "in 77 s"]),
        (answers(429, on="/api/"), ["limits the rate of requests (429)", "some minutes"]),
        (answers(503, on="/api/"), ["returned a server error (503); try again later"]),
        (answers(500), ["returned a server error (500); try again later"]),
        (answers(418, message="tea\x1b[2J"), ["returned status 418: tea"]),
        (
            answers(200, body=b"<html>hotel", on="/api/"),
            ["not answer as the Hub does", "HF_ENDPOINT"],
        ),
        (answers(200, body=b"[]", on="/api/"), ["not answer as the Hub does"]),
        (
            answers(200, body=b'{"id": "x", "siblings": []}', on="/api/"),
            ["not answer as the Hub does"],
        ),
        (listed({"rfilename": 3, "size": 1}), ["not answer as the Hub does"]),
        (listed({"rfilename": ["a"], "size": 1}), ["not answer as the Hub does"]),
        (listed({"rfilename": "model.safetensors", "size": -1}), ["not answer as the Hub does"]),
        (listed({"rfilename": "model.safetensors", "size": True}), ["not answer as the Hub does"]),
        (listed({"rfilename": "../../x\x1b[2J.safetensors", "size": 1}), ["not a checkpoint"]),
        (listed({"rfilename": "/etc/x.safetensors", "size": 1}), ["not a checkpoint"]),
        (answers(302, location="/api/models/org/model", on="/api/"), ["no connection"]),
        (answers(302, location="http://127.0.0.1:9/x"), ["no connection to 127.0.0.1:9 ("]),
        (answers(206, body=b"{}", on="/cdn/"), ["sent only 2 of", "try again"]),
    ],
)
def test_answers_unlike_the_hubs_are_refused(
    hub: Hub, misbehave: Misbehave, words: list[str]
) -> None:
    hub.misbehave = misbehave
    said = refusal("inspect", MODEL)
    assert said.startswith(f"error: {MODEL}")
    for word in words:
        assert word in said
    assert "\x1b" not in said


def test_busy_server_is_asked_again(hub: Hub) -> None:
    hub.misbehave = answers(503, times=2)
    assert inspected(MODEL)["problems"] == []


def test_server_that_stops_sending_is_refused_with_the_cause(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = hub.endpoint.removeprefix("http://")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")

    def silent(handler: Handler, path: str) -> bool:
        if "/cdn/" in path:
            time.sleep(3)
        return False

    hub.misbehave = silent
    cdn = host.replace("127.0.0.1", "localhost")
    assert f"{cdn} did not answer within 1 s" in refusal("inspect", MODEL)

    def hang_up(handler: Handler, path: str) -> bool:
        handler.close_connection = True
        return True

    hub.misbehave = hang_up
    assert f"no connection to {host}" in refusal("inspect", MODEL)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set, so 127.0.0.1"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "no connection to 127.0.0.1:9 ("),
        ("HF_ENDPOINT", "http://nowhere.invalid", "no connection to nowhere.invalid ("),
        ("HF_ENDPOINT", "nonsense", "an address like https://HOST; got 'nonsense'"),
        ("HF_ENDPOINT", "http://[", "an address like https://HOST; got 'http://['"),
        ("HF_TOKEN", "hf_\u00e9", "the token contains invalid characters; log in"),
        ("HF_TOKEN", "hf_\x01", "the token contains invalid characters; log in"),
    ],
)
def test_unreachable_hub_is_refused_with_the_cause(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert words in refusal("inspect", MODEL)


@pytest.mark.parametrize(
    "name",
    [
        *("hf://", "hf://org", "hf://org/", "hf:///x", "hf://org/model/", "hf://org/model/file"),
        *("hf://datasets/org/model", "hf://org/model@", "hf://org/model@a b", "hf://org/model@a@b"),
        *("hf://org/mo\x1bdel", "hf://org/model@\x1b[2J", "hf://org/model\n", "hf://org/a--b"),
        *("hf://org/..", "hf://../x", "hf://org/-x", "hf://org/mod%2fel", "hf://org/é"),
    ],
)
def test_invalid_repository_names_are_refused_without_a_request(name: str) -> None:
    with pytest.raises(RefusedError, match="invalid repository name; use hf://ORG/NAME") as refused:
        open_checkpoint(name)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("installed", ["None", "type('Old', (), {'__version__': '0.36.0'})"])
def test_missing_huggingface_hub_is_refused_with_the_command_that_installs_it(
    installed: str,
) -> None:
    code = (
        f"import sys; sys.modules['huggingface_hub'] = {installed}\n"
        f"from llamaconv.cli import main; sys.exit(main(['inspect', '{MODEL}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {MODEL}: reading from the Hub needs huggingface_hub 1.3 or later: "
        "pip install 'huggingface_hub>=1.3,<3'"
    ]


# Weights have to be here. Conversions fetch them, see test_from_hub.


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", MODEL, "--values"],
        pytest.param(["compare", MODEL, "out"], marks=pytest.mark.thorough),
        pytest.param(["convert", MODEL, "out", "--every-step"], marks=pytest.mark.thorough),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("revision", ["@refs/pr/1", pytest.param("", marks=pytest.mark.thorough)])
def test_what_reads_all_weights_without_writing_prints_the_download_command(
    hub: Hub, words: list[str], revision: str
) -> None:
    said = refusal(*[word.replace(MODEL, MODEL + revision) for word in words])
    command = shlex.split(said.partition(": hf ")[2])
    assert command[:2] == ["download", "org/model"]
    assert command[-2:] == ["--local-dir", "model"]
    assert "--revision" in command or not revision
    for file in ("model.safetensors", "model.safetensors.index.json", "config.json", *TOKENIZERS):
        assert any(fnmatch(file, pattern) for pattern in SAFETENSORS)
    assert all(pattern in command for pattern in SAFETENSORS)


def test_download_command_is_accepted_by_hf(hub: Hub, source: Path, tmp_path: Path) -> None:
    hf, *words = shlex.split(HubAddress("org/model").download())
    done = subprocess.run(
        [Path(sys.executable).with_name(hf), *words, "--dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for file in source.iterdir():
        assert file.name in done.stdout


def test_nothing_is_written_to_the_hub() -> None:
    for words in (["convert", "x", MODEL], ["sample", MODEL]):
        done = llamaconv(*words)
        assert done.returncode == 2
        assert "nothing is written to the Hub. Name a folder" in done.stderr


def test_rows_of_one_head_are_fetched_and_no_more(hub: Hub, source: Path) -> None:
    said = python(
        "from llamaconv import make_plan\n"
        "from llamaconv.notebook.sample_rows import sample_rows\n"
        f"for one in (checkpoint, open_checkpoint({str(source)!r})):\n"
        "    plan = make_plan(one)\n"
        "    move = next(move for move in plan.moves if move.heads)\n"
        "    print(sample_rows(plan, move.target, 3).table(), end='|')\n"
    )
    there, here, _ = said.split("|")
    assert there == here
    assert "-" in there and hub.bytes_sent < 150_000


@pytest.mark.parametrize(
    ("file", "words", "pattern"),
    [
        ("original/consolidated.00.pth", "found Meta's original files", "original/*"),
        ("consolidated.00.pth", "found Meta's original files", "consolidated.*.pth"),
        ("pytorch_model-00001-of-00002.bin", "found weights of torch.save", "pytorch_model*"),
        (".metadata", "found a distributed checkpoint", "*.distcp"),
        ("model.gguf", "found GGUF (model.gguf)", ""),
    ],
)
def test_repository_of_another_format_is_named_with_the_remedy(
    hub: Hub, tmp_path: Path, file: str, words: str, pattern: str
) -> None:
    path = tmp_path / "other" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 1000)
    hub.repos["org/other"] = tmp_path / "other"
    said = refusal("inspect", "hf://org/other")
    assert words in said
    if pattern:
        assert f"--include {shlex.quote(pattern)}" in said
        assert f"hf download org/other --revision {hub.commit('org/other')}" in said
    assert hub.requests == {"api": 1}


# Notebooks.


@pytest.mark.thorough
def test_notebook_1_shows_a_repository(hub: Hub, tmp_path: Path) -> None:
    done = headless.run("1-browse-index.ipynb", tmp_path, f"source={MODEL}@v1")
    assert done.returncode == 0, done.stderr
    run = nbformat.read(tmp_path / "run.ipynb", as_version=4)
    text = nbformat.writes(run)
    assert "data:image/png;base64" in text
    assert f"org/model@{hub.commit('org/model')[:7]}: huggingface" in text
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert "Index and headers agree: 111 tensors in 3 files" in text
    assert f"llamaconv inspect {MODEL}@v1" in text


@pytest.mark.thorough
def test_notebook_1_has_controls_for_a_repository(hub: Hub, tmp_path: Path) -> None:
    done = headless.run("1-browse-index.ipynb", tmp_path, f"source={MODEL}", "interactive=yes")
    assert done.returncode == 0, done.stderr
    assert "application/vnd.jupyter.widget-view+json" in (tmp_path / "run.ipynb").read_text()


@pytest.mark.thorough
def test_notebook_2_plans_a_repository_and_shows_rows(hub: Hub, tmp_path: Path) -> None:
    done = headless.run("2-preview-keys.ipynb", tmp_path, f"source={MODEL}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run.ipynb").read_text()
    assert "tok_embeddings.weight" in text
    assert "error: " not in text


@pytest.mark.thorough
@pytest.mark.parametrize("interactive", ["no", "yes"])
def test_notebook_4_converts_a_repository(hub: Hub, tmp_path: Path, interactive: str) -> None:
    target = f"target={tmp_path / 'target'}"
    given = (f"source={MODEL}", target, f"interactive={interactive}")
    done = headless.run("4-convert.ipynb", tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target" / "llamaconv.json").is_file()
    text = (tmp_path / "run.ipynb").read_text()
    assert "rebuilt from the target, have the digests" in text
    assert f"llamaconv convert {MODEL} " in text
