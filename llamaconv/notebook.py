"""What the notebooks share: their parameters, read and checked in one place.

papermill injects a cell after the one tagged ``parameters`` and only logs a warning about a
name that no parameter has; here such a name is refused, so that a mistyped option cannot pass
for the default. Limit: looks at the kernel's own history of cells, so IPython only.
"""

from __future__ import annotations

import ast
import difflib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llamaconv.plan import Target
from llamaconv.problems import Problem, RefusedError
from llamaconv.sample import sample_path
from llamaconv.tables import Table, parse_size


@dataclass(frozen=True)
class Choices:
    """The parameters of notebook 4 by their names on the command line.

    An empty ``source`` is the bundled sample, an empty ``target`` a folder under
    ``converted/`` where the notebook runs, which later runs may replace.
    """

    source: str
    target: str
    to: str
    generation: str
    rope: str
    dtype: str
    shards: int
    max_shard_size: str
    assets: str
    tie: str
    overwrite: bool
    interactive: str

    @classmethod
    def of(cls, namespace: Mapping[str, Any]) -> Choices:
        """The values in a notebook's globals. Raises `RefusedError` for every wrong one."""
        names = [field.name for field in fields(cls)]
        problems = [_unknown(name, names) for name in _injected(namespace) if name not in names]
        choices = cls(**{name: namespace[name] for name in names})
        problems += choices._wrong_types()
        if problems:
            raise RefusedError(problems)
        choices.options()
        return choices

    def _wrong_types(self) -> list[Problem]:
        kinds = {"shards": int, "overwrite": bool}
        problems = [
            Problem(f"parameter {name} is {value!r}; {kind.__name__} was expected")
            for name, value in vars(self).items()
            if type(value) is not (kind := kinds.get(name, str))
        ]
        try:
            parse_size(str(self.max_shard_size))
        except ValueError as error:
            problems.append(Problem(f"parameter max_shard_size: {error}"))
        if self.interactive not in ("auto", "yes", "no"):
            problems.append(
                Problem(
                    f"parameter interactive is {self.interactive!r}; one of auto, yes, no was expected"
                )
            )
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

    @property
    def source_path(self) -> Path:
        return Path(self.source).expanduser() if self.source else sample_path()

    @property
    def target_path(self) -> Path:
        if self.target:
            return Path(self.target).expanduser()
        made = self.to if self.to in ("hf", "meta") else self.generation
        return Path("converted") / f"{self.source_path.name}-{made}"

    @property
    def may_replace(self) -> bool:
        """Whether a checkpoint at the target may be replaced: asked for, or the default place."""
        return self.overwrite or not self.target

    @property
    def wants_controls(self) -> bool:
        """Whether to show controls: asked for, or a Jupyter server stands behind the kernel."""
        if self.interactive == "auto":
            return "JPY_SESSION_NAME" in os.environ
        return self.interactive == "yes"

    def commands(self) -> str:
        """The same work without a notebook's window: papermill, and the command line."""
        defaults = Target()
        source = str(self.source_path) if self.source else "SAMPLE"
        options = {
            name: value
            for name, value in vars(self).items()
            if name not in ("source", "target", "overwrite", "interactive")
            and (parse_size(value) if name == "max_shard_size" else value)
            != getattr(defaults, name)
        }
        places = {"source": self.source, "target": str(self.target_path)}
        papermill = ["papermill", "notebooks/4-convert.ipynb", "run.ipynb"]
        for name, value in {**{k: v for k, v in places.items() if v}, **options}.items():
            papermill += ["-p", name, str(value)]
        command = ["llamaconv", "convert", source, str(self.target_path)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        if self.may_replace:
            papermill += ["-p", "overwrite", "True"]
            command.append("--overwrite")
        papermill += ["--execution-timeout", "600"]
        lines = [shlex.join(papermill), shlex.join(command)]
        if not self.source:
            lines.insert(1, "llamaconv sample SAMPLE")
        return "\n".join(lines)

    def table(self) -> Table:
        shown = {"source": "the bundled sample", "target": str(self.target_path)}
        rows = [
            (
                field.name,
                getattr(self, field.name) or shown.get(field.name, getattr(self, field.name)),
            )
            for field in fields(self)
        ]
        return Table(("parameter", "value"), rows)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


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
