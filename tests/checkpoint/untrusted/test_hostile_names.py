"""Names and values that strangers chose are text wherever they are shown, and nothing else.

In a terminal no escape sequence, no line of its own, no turned direction of writing; in a notebook
no tag and no script; in a picture no formula; with ``--json`` one JSON object of ASCII.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, hostile
from torch.distributed.checkpoint import save

from llamaconv import (
    RefusedError,
    Target,
    convert_checkpoint,
    make_plan,
    open_checkpoint,
    verify_checkpoint,
)
from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.cli import main
from llamaconv.model.published import closest_published
from llamaconv.notebook import browse, figures, preview
from llamaconv.notebook.panels import browse as browse_panels
from llamaconv.notebook.panels import preview as preview_panels
from llamaconv.notebook.panels import verify as verify_panels
from llamaconv.notebook.panels.convert import ConvertPanel
from llamaconv.notebook.parameters import Parameters
from llamaconv.notebook.round_trip import round_trip
from llamaconv.notebook.sample_rows import sample_rows
from llamaconv.plan.planner import with_header_errors
from llamaconv.report import shell

NAMES = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg/onload=alert(1)>',
    "'onmouseover='alert(1)",
    "&lt;b&gt;",
    "$\\alpha$",
    "$\\frac{",
    "$x_{$_^",
    "_",
    "%s%n%(x)s",
    "{0.__class__}",
    "`id`$(id);id",
    "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "a\nerror: b\r\x0b\x0c\x85\u2028",
    "\u202egnp.exe\u2066\u200f",
    "\ufeff\u200b\u00ad",
    "\udcff\ud800",
    "\0",
    "layer\U0001f600",
]
# What a file's name may be: no separator, no zero, and only such surrogates as bytes stand for.
FOLDERS = [name.replace("/", "|").replace("\ud800", "") for name in NAMES if name != "\0"]


class Tags(HTMLParser):
    """Tags and attributes as a browser sees them."""

    ALLOWED = frozenset(
        [
            "table",
            "caption",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "div",
            "p",
            "b",
            "br",
            "ul",
            "li",
            "pre",
            "details",
            "summary",
            "figure",
            "figcaption",
            "img",
        ]
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.ALLOWED, tag
        for name, value in attrs:
            assert name in ("style", "alt", "src", "role", "colspan", "width", "open"), name
            assert name != "src" or str(value).startswith("data:image/png;base64,")
            if name != "src":
                self.text += str(value)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def plain(text: str) -> None:
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert "\nerror: b" not in text


def shown(value: Any) -> None:
    """In a terminal and in a notebook."""
    plain(str(value))
    plain(repr(value))
    if hasattr(value, "_repr_html_"):
        plain(Tags(value._repr_html_()).text)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """matplotlib warns of a letter that no font has; that is a name shown as a formula or raw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="matplotlib")
        # The oldest matplotlib beside the newest pyparsing, whose deprecations are such warnings too.
        warnings.filterwarnings("ignore", message=".*deprecated.* use ")
        yield


def look(checkpoint: Checkpoint) -> None:
    """Everything that is shown of a checkpoint and of its plan."""
    plan = make_plan(checkpoint)
    other = make_plan(checkpoint, Target(to="meta", dtype="float32"))
    for value in (
        *(checkpoint, plan, checkpoint.table(), plan.table(), plan.cost(), plan.releases()),
        *(
            browse.problem_table(checkpoint),
            browse.ignored(checkpoint),
            browse.index_diff(checkpoint),
        ),
        *(
            browse.totals(checkpoint),
            browse.model_table(checkpoint),
            closest_published(checkpoint.params),
        ),
        browse.tensor_table(checkpoint, most=10**6),
        *(
            preview.problem_table(plan),
            preview.moves(plan, most=10**6),
            preview.changes(plan, other),
        ),
        *(figures.shard_strips(checkpoint), figures.operations(plan)),
        browse_panels.tensors(checkpoint).static(),
        preview_panels.moves(plan).static(),
        preview_panels.other_target(plan).static(),
        preview_panels.one_tensor_table(plan),
    ):
        shown(value)
    for problem in plan.problems:
        plain(str(problem))
    if plan.errors:
        shown(RefusedError(plan.errors))
        plain("\n".join(RefusedError(plan.errors)._render_traceback_()))
    for panel in (browse_panels.tensors(checkpoint), preview_panels.moves(plan)):
        panel.widget()
        Tags(panel.output.value)
        for control in panel.controls.values():
            for option in getattr(control, "options", ()):
                plain(str(option[0] if isinstance(option, tuple) else option))


def commands(folder: Path, capfd: pytest.CaptureFixture[str], status: int) -> None:
    """What the command line says, with and without ``--json``."""
    target = folder.parent / "out"
    try:
        looked = 2 if with_header_errors(open_checkpoint(folder)).errors else 0
    except RefusedError:
        looked = 2
    for words in (["inspect", folder], ["plan", folder], ["convert", folder, target]):
        for option in ([], ["--json"]):
            try:
                found = main([*map(str, words), *option])
            except SystemExit as ended:
                found = int(str(ended.code))
            said = capfd.readouterr()
            plain(said.err)
            if option:
                assert said.out.isascii()
                json.loads(said.out, parse_constant=pytest.fail)
            else:
                plain(said.out)
            assert found == (looked if words[0] == "inspect" else status)
            if status:
                assert not target.exists()
            elif target.exists():
                import shutil

                shutil.rmtree(target)


def hugging_face(folder: Path) -> Path:
    """An extra tensor of each name, in an extra file of each name."""
    hostile.sharded(folder)
    for name, file in zip(NAMES, [*FOLDERS, "x"], strict=True):
        checkpoints.save_file(
            {name.encode("utf-8", "replace").decode(): torch.ones(2)},
            folder / f"{file}.safetensors",
        )
    return folder


def without_index(folder: Path) -> Path:
    hugging_face(folder)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def indexed(folder: Path) -> Path:
    """An index that names tensors and files of each name, that are not there."""
    hostile.sharded(folder)

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"].update({name: f"{name}.safetensors" for name in NAMES})
        index["metadata"] = {"total_size": NAMES[0]}

    checkpoints.edit_json(folder / "model.safetensors.index.json", edit)
    return folder


def headers(folder: Path) -> Path:
    """Names that only a header can have, entries that are none."""
    hostile.single(folder)
    header = json.dumps({name: {"dtype": name, "shape": [name]} for name in NAMES}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def configured(folder: Path) -> Path:
    """A text in every entry of config.json."""
    hostile.single(folder)
    config = json.loads((folder / "config.json").read_text())
    entries = [*config, "rope_scaling", "quantization_config", "model_type", "hidden_act"]
    for at, entry in enumerate(dict.fromkeys(entries)):
        config[entry] = NAMES[at % len(NAMES)]
    config["rope_scaling"] = {"rope_type": NAMES[0], NAMES[12]: 1, "rope_theta": NAMES[13]}
    config["rope_parameters"] = {"rope_type": NAMES[2], "rope_theta": NAMES[14]}
    config["quantization_config"] = {"quant_method": "".join(NAMES)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def distributed(folder: Path) -> Path:
    names = [name.encode("utf-8", "replace").decode() for name in NAMES]
    save({name: torch.ones(2) for name in names}, checkpoint_id=folder, no_dist=True)
    return folder


def distributed_and_lost(folder: Path) -> Path:
    distributed(folder)
    (folder / "__0_0.distcp").unlink()
    return folder


def metas(folder: Path) -> Path:
    hostile.meta(folder)
    path = folder / "consolidated.00.pth"
    state = torch.load(path)
    torch.save({**state, **{name: torch.ones(2) for name in NAMES}}, path)
    return folder


def metas_of_nothing(folder: Path) -> Path:
    hostile.meta(folder)
    torch.save({name: name for name in NAMES}, folder / "consolidated.00.pth")
    return folder


FOLDERS_OF: list[Callable[[Path], Path]] = [
    *(hugging_face, without_index, indexed, headers, configured),
    *(distributed, distributed_and_lost, metas, metas_of_nothing),
]


@pytest.mark.parametrize("make", FOLDERS_OF, ids=lambda make: make.__name__)
def test_tensor_names_with_control_characters_are_escaped(
    tmp_path: Path, make: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "hostile")
    look(open_checkpoint(folder))
    commands(folder, capfd, 0 if make is hugging_face else 2)


ALL = "".join(FOLDERS[:16])


@pytest.mark.parametrize("name", [*FOLDERS[5:9], FOLDERS[16], ALL], ids=range(6))
def test_folder_names_with_control_characters_are_escaped(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hostile.single(tmp_path / name)
    look(open_checkpoint(folder))
    (folder / "model.safetensors").write_bytes(b"")
    commands(folder, capfd, 2)
    for words in (["inspect"], ["plan"], ["verify", str(folder)]):
        assert main([*words, str(folder / name)]) == 2
        plain(capfd.readouterr().err)


def test_conversion_between_such_folders_is_shown_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = hostile.single(tmp_path / ALL)
    target = tmp_path / f"{ALL}2"
    assert main(["convert", str(source), str(target)]) == 0
    said = capfd.readouterr()
    plain(said.out)
    plain(said.err)
    opened = open_checkpoint(target)
    look(opened)
    plan = make_plan(open_checkpoint(source))
    done = convert_checkpoint(plan, tmp_path / f"{ALL}3")
    verification = verify_checkpoint(target, source=source)
    assert verification.ok
    for value in (
        *(done, done.receipt, verification, verification.tensor_table(), verify_checkpoint(target)),
        *(round_trip(source, target), figures.score_errors(verification)),
        verify_panels.tensors(verification).static(),
        sample_rows(plan, plan.written[1].target_name),
        figures.sample_rows(sample_rows(plan, plan.written[1].target_name)),
    ):
        shown(value)
    for words in ([source, target], [target], [target, source]):
        for option in ([], ["--json"]):
            try:
                main(["verify", *map(str, words), *option])
            except SystemExit as ended:
                print(ended.code)
            said = capfd.readouterr()
            plain(said.err)
            plain(said.out)


def test_path_that_is_not_utf8_converts_and_the_failing_reader_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = hostile.single(tmp_path / "\udcff"), tmp_path / "\udcfe"
    assert main(["convert", str(source), str(target), "--no-verify"]) == 0
    plain(capfd.readouterr().out)
    assert main(["convert", str(source), str(tmp_path / "dcp")]) == 1
    said = capfd.readouterr().err
    plain(said)
    assert "utf-8" in said.lower()


def test_commands_to_copy_are_quoted_for_the_shell() -> None:
    words = [*FOLDERS, "plain", "", "a b", "'\\"]
    print_each = f"printf '%s\\0' {shell.join(words)}"
    plain(print_each)
    done = subprocess.run(["bash", "-c", print_each], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_conversion_panel_shows_names_escaped(tmp_path: Path) -> None:
    folder = hostile.single(tmp_path / ALL)
    values = {
        **vars(Target()),
        "source": str(folder),
        "target": str(tmp_path / f"{ALL}2"),
        "max_shard_size": "5GB",
        "overwrite": False,
        "interactive": "yes",
    }
    parameters = Parameters.of("4-convert", values)
    panel = ConvertPanel(open_checkpoint(folder), parameters)
    panel.widget()
    shown(parameters.table())
    shown(panel.chosen)
    plain(Tags(panel.output.value).text)
    panel.widgets["target"].value = str(folder)
    plain(Tags(panel.output.value).text)
    for shards in ("<b>", "\x1b[2J", "9" * 5000, "\u0663"):
        panel.widgets["shards"].value = shards
        plain(Tags(panel.output.value).text)


def test_receipt_texts_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = hostile.single(tmp_path / "source")
    target = convert_checkpoint(
        make_plan(open_checkpoint(source)), tmp_path / "dcp", verified=False
    ).target
    evil = "".join(NAMES)
    content = json.loads((target / "llamaconv.json").read_text())
    content["source"] |= {"path": evil, "format": evil, "assets": evil}
    content["created"] = evil
    content["tensors"][0] |= {"source": evil, "target": evil, "operation": evil, "digests": [evil]}
    content["versions"] = {evil: evil}
    (target / "llamaconv.json").write_text(json.dumps(content))
    look(open_checkpoint(target))
    shown(verify_checkpoint(target))
    commands(target, capfd, 0)
    assert main(["verify", str(target)]) == 1
    plain(capfd.readouterr().err)
    content["target"] |= {"generation": evil, "to": evil}
    (target / "llamaconv.json").write_text(json.dumps(content))
    assert main(["verify", str(source), str(target)]) == 2
    plain(capfd.readouterr().err)
    content["params"] = {evil: evil}
    (target / "llamaconv.json").write_text(json.dumps(content))
    with pytest.raises(RefusedError) as caught:
        make_plan(open_checkpoint(target)).raise_for_errors()
    shown(caught.value)


def test_the_tests_above_can_fail() -> None:
    for html in ("<svg>", "<img src=x>", "<p onclick='x'>", "<b><!-- x --></b>"):
        with pytest.raises(AssertionError):
            Tags(html)
    for text in ("\x1b", "a\u202eb", "\nerror: b", "\ud800"):
        with pytest.raises(AssertionError):
            plain(text)
    assert Tags("<p>&lt;img&gt;</p>").text == "<img>"
