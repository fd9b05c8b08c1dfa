"""The parameters of the notebooks, read and checked in one place.

papermill injects a cell after the one tagged ``parameters``, and only logs a warning if it sets a
name that the notebook does not have. Here such a name is refused, so that a mistyped option does
not silently leave the default. Limit: reads the kernel's own history of cells, so IPython only.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import local
from llamaconv.checkpoint.open import looks_like_checkpoint
from llamaconv.checkpoint.runs import steps_of
from llamaconv.checkpoint.store_address import SCHEME, StoreAddress, store_address
from llamaconv.plan.target import Target
from llamaconv.report import shell
from llamaconv.report.errors import Problem, RefusedError
from llamaconv.report.progress import in_jupyter
from llamaconv.report.tables import Table, parse_size
from llamaconv.sample import sample_path

_OPTIONS = tuple(vars(Target()))

NOTEBOOKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "1-browse-index": ("inspect", ("source", "values")),
    "2-preview-keys": ("plan", ("source", *_OPTIONS)),
    "3-rope-layouts": ("", ("source", "prompt")),
    "4-convert": ("convert", ("source", "target", *_OPTIONS, "overwrite")),
    "5-verify": ("verify", ("source", "target", "other")),
    "6-rope-scaling": ("", ("source",)),
}
"""For each notebook, the command that does the same and the parameters in its order.

All notebooks have ``interactive`` too. Notebooks 3 and 6 have no command.
"""

# max_shard_size as text, since a parameter may be mistyped.
_DEFAULTS = {
    **vars(Target()),
    "source": "",
    "max_shard_size": "5GB",
    "prompt": "",
    "other": "",
    "values": False,
}

_TYPES = {"shards": int, "with_optimizer": bool, "overwrite": bool, "values": bool}
_AS_TEXT = ". papermill's -p turns 1000, True or None into other types; pass text with -r {} VALUE"


@dataclass(frozen=True, repr=False)
class Parameters:
    """The parameters of one notebook.

    Attributes:
        notebook: A key of `NOTEBOOKS`.
        values: The value of each parameter, by name. An empty ``source`` is the bundled sample;
            an empty ``target`` is a folder under ``converted/``; an empty ``prompt`` is that of
            the lesson; an empty ``other`` is a demonstration.
    """

    notebook: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, notebook: str, namespace: Mapping[str, Any]) -> Parameters:
        """Read the parameters of a notebook from its globals.

        Args:
            notebook: A key of `NOTEBOOKS`.
            namespace: The notebook's ``globals()``.

        Returns:
            The parameters, all valid.

        Raises:
            RefusedError: A parameter is unknown or a value is invalid; lists all of them.
        """
        names = [*NOTEBOOKS[notebook][1], "interactive"]
        parameters = cls(
            notebook, {name: namespace.get(name, _DEFAULTS.get(name)) for name in names}
        )
        problems = [_unknown(name, names) for name in _injected(namespace) if name not in names]
        problems += parameters.problems()
        if problems:
            raise RefusedError(problems)
        return parameters

    def changed(self, **values: object) -> Parameters:
        """Return a copy with some values replaced, which are not checked."""
        return replace(self, values={**self.values, **values})

    def problems(self) -> list[Problem]:
        """Return a problem for each invalid value."""
        problems = [
            Problem(f"parameter {name} must be {expected.__name__}; got {value!r}{remedy}")
            for name, value in self.values.items()
            if name != "interactive" and type(value) is not (expected := _TYPES.get(name, str))
            for remedy in [_AS_TEXT.format(name) if expected is str else ""]
        ]
        interactive = self.values["interactive"]
        if interactive not in ("auto", "yes", "no"):
            message = f"parameter interactive must be one of auto, yes, no; got {interactive!r}"
            problems.append(Problem(message))
        if "max_shard_size" in self.values:
            try:
                parse_size(str(self.values["max_shard_size"]))
                if not problems:
                    self.options()
            except ValueError as error:
                problems.append(Problem(f"parameter max_shard_size: {error}"))
            except RefusedError as error:
                problems += error.problems
        return problems

    def options(self) -> Target:
        """Return the target options.

        Raises:
            RefusedError: An option has a value that is not offered.
            ValueError: ``max_shard_size`` is not a size.
        """
        size = parse_size(self.values["max_shard_size"])
        return Target(**{n: self.values[n] for n in _OPTIONS} | {"max_shard_size": size})

    @property
    def source(self) -> Path | str:
        """The source: a folder or file, or an address (``hf://``, ``s3://`` …) unchanged."""
        source: str = self.values["source"]
        if SCHEME.match(source):
            return source
        return Path(source).expanduser() if source else sample_path()

    @property
    def prompt(self) -> str:
        """The text to continue, empty for that of the lesson."""
        return str(self.values["prompt"])

    @property
    def other(self) -> str:
        """The checkpoint to compare the source with, empty for a demonstration."""
        return str(self.values["other"])

    @property
    def destination(self) -> Path | StoreAddress:
        """The folder to write, or its address in a store."""
        given: str = self.values["target"]
        if address := store_address(given):
            return address
        return Path(given).expanduser() if given else self.default_target

    @property
    def target(self) -> Path:
        """The local folder to write or to check.

        Raises:
            RefusedError: The target is in a store.
        """
        return local(self.destination)

    @property
    def default_target(self) -> Path:
        """The folder if none is given.

        Its name says the source, the format, and the dtype and rows that were asked for, so that
        two variants of one model do not meet.
        """
        to, rope, dtype = (
            self.values.get(name, _DEFAULTS[name]) for name in ("to", "rope", "dtype")
        )
        # What is in a store is not asked for the name of a folder: it stays "auto".
        if to == "auto" and not self._is_in_store:
            # As `llamaconv.checkpoint.open` recognises what a trainer saved, which becomes a Hugging
            # Face folder.
            opened = Path(self.source)
            if opened.is_dir() and not looks_like_checkpoint(opened):
                opened = steps_of(opened, looks_like_checkpoint).newest or opened
            names = (".metadata", "metadata.pkl")
            is_saved = any((opened / name).is_file() for name in names)
            to = "hf" if is_saved and not self.values.get("with_optimizer") else "dcp"
        parts = [Path(self.source).name or Path(self.source).resolve().name]
        parts.append(self.values.get("generation", _DEFAULTS["generation"]) if to == "dcp" else to)
        parts += [rope] if to == "dcp" and rope != _DEFAULTS["rope"] else []
        parts += [dtype] if dtype != _DEFAULTS["dtype"] else []
        return Path("converted") / "-".join(map(str, parts))

    @property
    def _is_in_store(self) -> bool:
        return store_address(str(self.source)) is not None

    @property
    def may_replace(self) -> bool:
        """Whether a checkpoint at the target may be replaced: if asked for, or the sample's own."""
        is_samples_own = not self.values["target"] and not self.values["source"]
        return bool(self.values["overwrite"] or is_samples_own)

    @property
    def wants_controls(self) -> bool:
        """Whether to show controls: if asked for, or if the kernel belongs to a Jupyter server."""
        if self.values["interactive"] == "auto":
            return in_jupyter()
        return bool(self.values["interactive"] == "yes")

    def headless(self) -> str:
        """Return the commands, one per line, that do the same with papermill and with llamaconv."""
        given = self._given()
        words = []
        for name, value in given.items():
            words += ["-r" if _reads_as_other(value) else "-p", name, str(value)]
        run = ["papermill", f"notebooks/{self.notebook}.ipynb", "run.ipynb", *words]
        lines = [shell.join([*run, "--execution-timeout", "600"])]
        if command := NOTEBOOKS[self.notebook][0]:
            if "source" not in given:
                lines.append("llamaconv sample SAMPLE")
            other = given.pop("other", None)
            lines.append(shell.join(["llamaconv", command, *_arguments(given)]))
            if other is not None:
                words = [str(given.get("source", "SAMPLE")), str(other)]
                lines.append(shell.join(["llamaconv", "compare", *words]))
        return "\n".join(lines)

    def _given(self) -> dict[str, object]:
        """Return what differs from the defaults, and the target always, in the command's order."""
        given: dict[str, object] = {}
        for name in NOTEBOOKS[self.notebook][1]:
            if name == "target":
                given[name] = str(self.destination)
            elif name == "overwrite":
                given |= {name: True} if self.may_replace else {}
            elif self.values[name] != _DEFAULTS[name]:
                given[name] = self.values[name]
        return given

    def table(self) -> Table:
        """Return one row per parameter."""
        resolved = {"source": self.values["source"] or "the bundled sample"}
        if "target" in self.values:
            resolved["target"] = str(self.destination)
        return Table(("parameter", "value"), list({**self.values, **resolved}.items()))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _arguments(given: Mapping[str, object]) -> list[str]:
    """Return the arguments of the command; without a source, that of the sample's copy."""
    words = [str(given.get("source", "SAMPLE"))]
    for name, value in given.items():
        if name == "target":
            words.append(str(value))
        elif name != "source":
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def _reads_as_other(value: object) -> bool:
    """Return whether papermill's -p would turn this text into a number, True, False or None."""
    if not isinstance(value, str):
        return False
    if value in ("True", "False", "None"):
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def _unknown(name: str, names: list[str]) -> Problem:
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return Problem(f"unknown parameter {name!r}{hint} The notebook has {', '.join(names)}")


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """Return the names that papermill's own cell assigns, if there is such a cell."""
    cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    return [
        target.id
        for cell in cells
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
