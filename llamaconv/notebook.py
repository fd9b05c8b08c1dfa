"""What the notebooks share: their parameters, read and checked in one place.

papermill injects a cell after the one tagged ``parameters`` and only logs a warning about a
name that no parameter has; here such a name is refused, so that a mistyped option cannot pass
for the default. Limit: looks at the kernel's own history of cells, so IPython only.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from llamaconv import shell
from llamaconv.formats.detect import open_checkpoint
from llamaconv.plan import Target
from llamaconv.planner import make_plan
from llamaconv.problems import Problem, RefusedError, printable
from llamaconv.sample import sample_path
from llamaconv.tables import Table, parse_size

# As it is written, since it may be written wrongly.
_DEFAULT_SIZE = "5GB"


@dataclass(frozen=True)
class Choices:
    """The parameters of a notebook that only looks (1 and 3); the base of the others.

    An empty ``source`` is the bundled sample.
    """

    source: str
    interactive: str

    @classmethod
    def of(cls, namespace: Mapping[str, Any]) -> Self:
        """The values in a notebook's globals. Raises `RefusedError` for every wrong one."""
        names = [field.name for field in fields(cls)]
        problems = [_unknown(name, names) for name in _injected(namespace) if name not in names]
        choices = cls(**{name: namespace[name] for name in names})
        problems += choices.problems()
        if problems:
            raise RefusedError(problems)
        return choices

    def problems(self) -> list[Problem]:
        """Every value that is not offered."""
        kinds = {"shards": int, "overwrite": bool}
        problems = [
            Problem(f"parameter {name} is {value!r}; {kind.__name__} was expected")
            for name, value in vars(self).items()
            if type(value) is not (kind := kinds.get(name, str))
        ]
        if self.interactive not in ("auto", "yes", "no"):
            problems.append(
                Problem(
                    f"parameter interactive is {self.interactive!r}; one of auto, yes, no was expected"
                )
            )
        return problems

    @property
    def source_path(self) -> Path | str:
        """The folder, or ``hf://ORG/NAME`` as it is."""
        if self.source.startswith("hf://"):
            return self.source
        return Path(self.source).expanduser() if self.source else sample_path()

    @property
    def wants_controls(self) -> bool:
        """Whether to show controls: asked for, or a Jupyter server stands behind the kernel."""
        if self.interactive == "auto":
            return "JPY_SESSION_NAME" in os.environ
        return self.interactive == "yes"

    def headless(self, notebook: str, command: str = "") -> str:
        """The same work without a notebook's window: papermill, and the command line.

        ``notebook`` is a file under notebooks/, ``command`` one of llamaconv's, if there is one.
        """
        lines = [
            shell.join(["papermill", f"notebooks/{notebook}", "run.ipynb", *self._papermill()])
        ]
        if command:
            lines.append(shell.join(["llamaconv", command, *self._arguments()]))
            if not self.source:
                lines.insert(1, "llamaconv sample SAMPLE")
        return "\n".join(lines)

    def _papermill(self) -> list[str]:
        words = []
        for name, value in self._given().items():
            words += ["-p", name, str(value)]
        return [*words, "--execution-timeout", "600"]

    def _arguments(self) -> list[str]:
        words = [self.source or "SAMPLE"]
        for name, value in self._given().items():
            if name == "target":
                words.append(str(value))
            elif value is True:
                words.append(f"--{name}")
            elif name != "source":
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def _given(self) -> dict[str, object]:
        """Parameters that are not their defaults, in the order of the command line."""
        return {"source": self.source} if self.source else {}

    def table(self) -> Table:
        rows = [(field.name, self._shown(field.name)) for field in fields(self)]
        return Table(("parameter", "value"), rows)

    def _shown(self, name: str) -> object:
        value = getattr(self, name)
        return "the bundled sample" if name == "source" and not value else value

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True)
class PlanChoices(Choices):
    """The parameters of notebook 2: a source and the target options."""

    to: str
    generation: str
    rope: str
    dtype: str
    shards: int
    max_shard_size: str
    assets: str
    tie: str

    def problems(self) -> list[Problem]:
        problems = super().problems()
        try:
            parse_size(str(self.max_shard_size))
        except ValueError as error:
            problems.append(Problem(f"parameter max_shard_size: {error}"))
        if not problems:
            try:
                self.options()
            except RefusedError as error:
                problems += error.problems
        return problems

    def options(self) -> Target:
        """The target options as one value. Raises `RefusedError` for one not offered."""
        return Target(
            to=self.to,
            generation=self.generation,
            rope=self.rope,  # type: ignore[arg-type]  # Target checks it
            dtype=self.dtype,
            shards=self.shards,
            max_shard_size=parse_size(self.max_shard_size),
            assets=self.assets,
            tie=self.tie,
        )

    def _given(self) -> dict[str, object]:
        defaults = vars(Target())
        options = {name: getattr(self, name) for name in defaults}
        return super()._given() | {
            name: value
            for name, value in options.items()
            if value not in (defaults[name], _DEFAULT_SIZE)
        }


@dataclass(frozen=True)
class VerifyChoices(Choices):
    """The parameters of notebook 5. An empty ``target`` is a folder under ``converted/``."""

    target: str

    @property
    def target_path(self) -> Path:
        if self.target:
            return Path(self.target).expanduser()
        return Path("converted") / f"{Path(self.source_path).name}-titan-0.3"

    def write_if_absent(self) -> str:
        """Converts the source to the target where there is none yet; a sentence says which."""
        if self.target_path.exists():
            return printable(f"{self.target_path} is there and is checked as it is")
        # Not before: the parameters alone do not wait for torch.
        from llamaconv.convert import convert_checkpoint

        plan = make_plan(open_checkpoint(self.source_path))
        convert_checkpoint(plan, self.target_path)
        return printable(
            f"{self.target_path} was not there: written from the source, {plan.target}"
        )

    def _given(self) -> dict[str, object]:
        return super()._given() | {"target": str(self.target_path)}

    def _shown(self, name: str) -> object:
        return str(self.target_path) if name == "target" else super()._shown(name)


@dataclass(frozen=True)
class ConvertChoices(PlanChoices):
    """The parameters of notebook 4 by their names on the command line.

    An empty ``target`` is a folder under ``converted/`` where the notebook runs, which later
    runs may replace.
    """

    target: str
    overwrite: bool

    @property
    def target_path(self) -> Path:
        if self.target:
            return Path(self.target).expanduser()
        made = self.to if self.to in ("hf", "meta") else self.generation
        return Path("converted") / f"{Path(self.source_path).name}-{made}"

    @property
    def may_replace(self) -> bool:
        """Whether a checkpoint at the target may be replaced: asked for, or the default place."""
        return self.overwrite or not self.target

    def _given(self) -> dict[str, object]:
        given = super()._given()
        source = {"source": given.pop("source")} if "source" in given else {}
        replace = {"overwrite": True} if self.may_replace else {}
        return source | {"target": str(self.target_path)} | given | replace

    def _shown(self, name: str) -> object:
        return str(self.target_path) if name == "target" else super()._shown(name)


def _unknown(name: str, names: list[str]) -> Problem:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return Problem(f"unknown parameter {name!r}{hint} The notebook has {', '.join(names)}")


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """Names that papermill's own cell assigns; none where no such cell ran."""
    cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    return [
        target.id
        for cell in cells
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
