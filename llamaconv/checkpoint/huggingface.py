"""Hugging Face folders: ``*.safetensors`` with an index, one ``model.safetensors``, or one file.

A folder may be local, or a repository whose headers were read (`folder`).

The index decides which file holds a tensor; headers are checked against it, and whatever it
leaves out is listed as ignored. Only headers and JSON are read, without torch. A folder without
safetensors may have ``pytorch_model*.bin``, which is read the same way, with torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llamaconv.checkpoint import receipt
from llamaconv.checkpoint.checkpoint import Checkpoint, Ignored, ModelConfig
from llamaconv.checkpoint.folder import Folder, LocalFolder, RemoteFolder, matching, try_json_in
from llamaconv.checkpoint.huggingface_index import (
    BIN,
    INDEX,
    SAFETENSORS,
    IndexedFiles,
    incomplete,
    read_indexed,
    without_path,
)
from llamaconv.checkpoint.meta import (
    CONSOLIDATED,
    MetaOpener,
    find_folder,
    meta_checkpoint,
    read_params_json,
)
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import WEIGHT_DTYPES, TensorInfo, shapes_by_role
from llamaconv.checkpoint.untrusted.values import is_bare_name
from llamaconv.checkpoint.weight_sets import (
    WeightSet,
    by_place,
    difference,
    is_complete,
    naming_of,
    one_file,
    weight_sets,
)
from llamaconv.model.config_json import from_config
from llamaconv.model.families import family_named
from llamaconv.model.names import NAMINGS, best_naming, identify, why_needless
from llamaconv.model.params_json import PARAMS
from llamaconv.report.errors import Problem, first_few, warning

CONFIG = "config.json"
NOT_IN_WEIGHTS = "The weights do not contain the number of heads or the RoPE base and scaling."
JSON_FILES = (INDEX, CONFIG, PARAMS, receipt.NAME)
# Files of an adapter (PEFT): weights and configuration.
ADAPTERS = "adapter_*"
"""What `open_repository` reads in addition to headers."""

_TORCHS = (".pt", ".pth", ".bin")
# Parts of a checkpoint that make no sense without the others: of ranks, of Meta's files, adapters.
_NOT_ALONE = re.compile(r"^adapter_|^consolidated\.\d+\.pth$|rank|optim|_states|^rng_|^scheduler")
_MOST_OTHERS = 64

_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.(?:safetensors|bin)")


def open_huggingface(path: Path) -> Checkpoint:
    """Open a folder, or one file of weights or index, from headers only.

    Never raises for bad content: everything wrong is in ``problems``.
    """
    if path.is_dir():
        return open_folder(LocalFolder(path))
    return open_folder(LocalFolder(path.parent), path.name)


def open_repository(repository: RemoteFolder) -> Checkpoint:
    """Open the safetensors whose headers ``repository`` holds, as `open_huggingface` does."""
    return replace(open_folder(repository), remote=repository)


def open_folder(folder: Folder, name: str = "") -> Checkpoint:
    """Open a folder, or its file ``name``, wherever it is, as `open_huggingface` does."""
    opener = HuggingFaceOpener(folder)
    if name:
        opener.read_set(one_file(folder, name))
        return opener.checkpoint(folder.path / name)
    opener.read_folder()
    return opener.checkpoint(folder.path)


def by_other_names(folder: Path, names: Iterable[str]) -> list[str]:
    """Return which of ``names`` in ``folder`` hold weights of a Llama by what is in them.

    torchtune writes ``hf_model_0001_0.pt`` and ``meta_model_0.pt``, scripts ``model.pt``.
    """
    here = LocalFolder(folder)
    files = [
        path
        for path in (folder / name for name in sorted(names))
        if path.suffix in _TORCHS
        and path.is_file()
        and not _NOT_ALONE.search(path.name)
        and path.parent == folder
    ]
    return [
        path.name
        for path in files[:_MOST_OTHERS]
        if (tensors := here.read_header(path.name)[0])
        and (by_place(tensors, naming_of(tensors)) or best_naming(tensors, NAMINGS) == "torchtune")
    ]


def open_files(path: Path, files: list[str]) -> Checkpoint:
    """Open the ``files`` that `by_other_names` found in a folder, or as the file ``path``."""
    folder = path if path.is_dir() else path.parent
    opener = HuggingFaceOpener(LocalFolder(folder))
    opener.read_set(WeightSet(files[0], BIN, tuple(files)))
    if path == folder:
        message = f"{path}: weights recognised by what is in {first_few(files, 3)}, not by the name"
        # Named, so that a target of ours whose file was renamed does not pass its check.
        opener.problems.append(warning(message, opener.tensors))
    return opener.checkpoint(path)


def read_config(
    path: Path | RemoteFile,
    entries: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    naming: str | None = "huggingface",
) -> ModelConfig:
    """Return what the ``entries`` of config.json say about a model.

    ``tensors``, named as in the column ``naming``, supply the sizes that they leave out.
    """
    is_plain = bool(tensors) and all(one.dtype in WEIGHT_DTYPES for one in tensors.values())
    params, problems = from_config(entries, shapes_by_role(tensors, naming), str(path), is_plain)
    if "model_type" in entries and family_named(entries["model_type"]) is None:
        # Another family has other tensors.
        problems = [replace(problem, explains_missing=True) for problem in problems]
    return ModelConfig(path, entries, params, tuple(problems))


class HuggingFaceOpener:
    """Collects tensors, problems and what is ignored while a folder is read."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []
        # Files that an index names and the folder lacks, and which problem says so.
        self._lost: tuple[int, tuple[str, ...]] | None = None
        self.adapters = matching(folder, ADAPTERS)

    def checkpoint(self, path: Path | RemoteFile) -> Checkpoint:
        """Return what was collected, together with config.json and the receipt."""
        if any("lora_" in name for name in self.tensors) or (self.adapters and not self.tensors):
            naming = naming_of(self.tensors)
            message = (
                f"{self.folder.path}: these are adapter weights (LoRA). Merge the adapter first "
                "(PEFT: merge_and_unload), and give the merged model"
            )
            its = tuple(name for name in self.tensors if identify(name, naming) is None)
            self.problems.append(Problem(message, its, explains_missing=True))
        elif self.adapters:
            self.problems.append(
                warning(
                    f"{self.folder.path}: an adapter next to the weights is left out "
                    f"({first_few(self.adapters, 3)}); it is taken to be merged into them already"
                )
            )
        if naming_of(self.tensors) == "meta":
            return self._in_metas_names(path)
        config = self._read_config()
        return Checkpoint(
            path=path,
            format="huggingface",
            tensors=self.tensors,
            naming="huggingface",
            rope="half_split",
            params=config.params if config else None,
            receipt=self._read_receipt(),
            config=config,
            problems=tuple(self.problems),
            ignored=tuple(self.ignored),
        )

    def _in_metas_names(self, path: Path | RemoteFile) -> Checkpoint:
        """Return the checkpoint of files with Meta's names, as Mistral publishes them."""
        where = self.folder.path
        config = None
        name = PARAMS if self.folder.is_file(PARAMS) else CONFIG
        if not self.folder.is_file(name):
            self._error(
                f"{where / PARAMS}: not found. {NOT_IN_WEIGHTS} Copy the model's params.json or "
                "config.json next to them"
            )
        elif (entries := try_json_in(self.folder, name, self.problems)) is not None:
            if name == PARAMS:
                config = read_params_json(where / name, entries, self.tensors)
            else:
                config = read_config(where / name, entries, self.tensors, "meta")
        self.problems.append(
            warning(
                f"{where}: the tensors have Meta's names (such as {next(iter(self.tensors))}), so "
                "the rows of q and k are taken to be interleaved, as in Meta's files"
            )
        )
        written = self._read_receipt()
        return meta_checkpoint(path, self.tensors, config, written, self.problems, self.ignored)

    @cached_property
    def _entries(self) -> dict[str, Any]:
        """The entries of config.json; none if it cannot be read."""
        if not self.folder.is_file(CONFIG):
            return {}
        return try_json_in(self.folder, CONFIG, []) or {}

    def read_folder(self) -> None:
        """Read the set of weights that transformers would load, and compare the others with it."""
        sets = weight_sets(self.folder, self._entries.get("transformers_weights"), self.adapters)
        if sets:
            self._check_numbering(sets[0].files)
            self.read_set(sets[0])
        elif not self.adapters:
            self._error(
                f"{self.folder.path}: no {SAFETENSORS.files} file; expected {SAFETENSORS.index} "
                f"with its shards, or {SAFETENSORS.single}"
            )
        for other in sets[1:]:
            self._compare(sets[0], other)
        if sets and isinstance(self.folder, LocalFolder) and (metas := find_folder(self.folder)):
            opener = MetaOpener(metas)
            opener.read_files()
            name = f"{metas.path}/{CONSOLIDATED}".removeprefix(f"{self.folder.path}/")
            remedy = f"give {metas.path}"
            if metas.path == self.folder.path:
                remedy = "copy those files and params.json to a folder of their own"
            reason = self._compared(sets[0], name, remedy, opener)
            self.ignored.append(Ignored(name, reason))

    def read_set(self, one: WeightSet) -> None:
        """Read an index and its shards, or a set of files."""
        if one.files:
            return self._read_files(one.files)
        self.problems += [replace(problem, explains_missing=True) for problem in one.problems]
        if one.index is not None:
            self._take_indexed(read_indexed(self.folder, one.index))
        return None

    def _compare(self, chosen: WeightSet, other: WeightSet) -> None:
        """Report a complete set that differs from the ``chosen`` one; list every other one."""
        # Pickles elsewhere are opened only if there is nothing else, and those of the Hub never.
        if other.kind is BIN and isinstance(self.folder.path, RemoteFile):
            reason = f"{chosen.name} is used, as in transformers; they were not compared"
        else:
            their = HuggingFaceOpener(self.folder)
            their.read_set(other)
            remedy = f"give {self.folder.path / other.name}"
            if len(other.files) > 1:
                remedy = f"move {chosen.name} away"
            is_beside = bool(other.files) and other.kind is chosen.kind
            reason = self._compared(chosen, other.name, remedy, their, is_beside)
        self.ignored.append(Ignored(other.name, reason))

    def _compared(
        self,
        chosen: WeightSet,
        other: str,
        remedy: str,
        their: HuggingFaceOpener | MetaOpener,
        is_beside: bool = False,
    ) -> str:
        """Return why the set ``other`` is left out; warn if it differs and could be meant.

        ``is_beside`` tells whether ``other`` are files that the index ``chosen`` could name.
        """
        reason = f"{chosen.name} is used, as in transformers"
        namings = naming_of(self.tensors), naming_of(their.tensors)
        ours, theirs = by_place(self.tensors, namings[0]), by_place(their.tensors, namings[1])
        if any(problem.level == "error" for problem in their.problems) or not is_complete(theirs):
            return f"{reason}; this is not a complete model"
        path = self.folder.path
        if is_beside and self._lost and not is_complete(ours):
            at, lost = self._lost
            message = (
                f"{path / chosen.name}: stale: {len(lost)} files that it names are not found "
                f"({first_few(lost, 3)}), and {other} next to it has a complete model. To convert "
                f"that, {remedy}"
            )
            self.problems[at] = replace(self.problems[at], message=message)
        elif index := [problem for problem in chosen.problems if problem.level == "error"]:
            # Nothing can be said about how complete it is; the error gets a way out.
            message = (
                f"{index[0].message}. {other} next to it is complete. To convert that, {remedy}"
            )
            self.problems = [
                replace(problem, message=message)
                if problem.message == index[0].message
                else problem
                for problem in self.problems
            ]
        elif not is_complete(ours):
            self.problems.append(
                warning(
                    f"{path / chosen.name}: used, as in transformers, but not complete, and "
                    f"{other} is. To convert that, {remedy}"
                )
            )
        elif how := difference(ours, theirs, namings[0] == namings[1]):
            self.problems.append(
                warning(
                    f"{path}: two complete sets of weights differ, {chosen.name} and {other}: "
                    f"{how}. Using {chosen.name}, as transformers does. To convert the other, {remedy}"
                )
            )
            return f"{reason}; this differs"
        else:
            return (
                f"{reason}; this is the same model, by headers and the first bytes of each tensor"
            )
        return reason

    def _error(self, message: str, names: tuple[str, ...] = ()) -> None:
        self.problems.append(Problem(message, names))

    def _take_indexed(self, index: IndexedFiles) -> None:
        """Take the tensors that an index names; report how it differs from the headers."""
        self.tensors = dict(index.tensors)
        self._report_unreadable(index.unreadable, index)
        lost = {
            name: file
            for name, file in index.misplaced.items()
            if file or not self._is_needless(name)
        }
        if needless := [name for name in index.misplaced if name not in lost]:
            self.ignored.append(
                Ignored(
                    index.path.name,
                    f"it lists {len(needless)} tensors that no file has and no Llama needs "
                    f"({first_few(needless, 2)})",
                )
            )
        if lost:
            shown = (f"{name} (in {file})" if file else name for name, file in lost.items())
            self._error(
                f"{index.path}: {len(lost)} tensors are not in the file that the index names: "
                f"{first_few(shown)}. Index and shards are of different downloads",
                tuple(lost),
            )
        self.ignored += [
            Ignored(name, f"in {file}, but not in the index")
            for file, tensors in index.headers.items()
            for name in tensors
            if index.weight_map.get(name) != file
        ]
        stated, actual = index.stated_bytes, index.actual_bytes
        if not index.unreadable and isinstance(stated, int) and stated != actual:
            self.problems.append(
                warning(
                    f"{index.path}: total_size is {stated} bytes, but the tensors have {actual}; "
                    "using the headers"
                )
            )

    def _is_needless(self, name: str) -> bool:
        """Return whether the model is complete without ``name``: RoPE's angles, a tied head."""
        if why_needless(name):
            return True
        if name != "lm_head.weight":
            return False
        return self._entries.get("tie_word_embeddings") is True

    def _are_needless(self, names: Collection[str]) -> bool:
        """Return whether the model is complete without a file of these tensors.

        Beside those of `_is_needless`, this is what no Llama has, if all else was found.
        """
        naming = naming_of(self.tensors)
        needed = [name for name in names if not self._is_needless(name)]
        return not any(identify(name, naming) for name in needed) and is_complete(
            by_place(self.tensors, naming)
        )

    def _read_files(self, files: Collection[str]) -> None:
        """Read every file given; no two may hold tensors of the same name."""
        parts: dict[str, list[TensorInfo]] = {}
        unreadable: dict[str, list[Problem]] = {}
        for file in files:
            if not self.folder.is_file(file):
                # Reading a pipe would wait for ever.
                reason = f"{self.folder.path / file}: {self.folder.why_no_file(file)}"
                unreadable[file] = [Problem(reason)]
                continue
            tensors, problems = self.folder.read_header(file)
            if not tensors:
                unreadable[file] = problems
            else:
                self.problems += problems
            for name in [name for name, tensor in tensors.items() if tensor.is_part]:
                parts.setdefault(name, []).append(tensors.pop(name))
            twice = [name for name in tensors if name in self.tensors]
            if twice:
                self._twice(twice, self.tensors[twice[0]].files[0], file)
            self.tensors.update(tensors)
        self._report_unreadable(unreadable)
        self._join(parts)

    def _report_unreadable(
        self, unreadable: Mapping[str, list[Problem]], index: IndexedFiles | None = None
    ) -> None:
        """Report the files that cannot be read: those with the same reason once, with their count.

        Their tensors are lost, so the plan need not report them missing again.
        """
        path = self.folder.path
        by_reason: dict[str, list[str]] = {}
        for file, problems in unreadable.items():
            for problem in problems:
                reason = without_path(path / file, problem.message)
                by_reason.setdefault(reason, []).append(file)
        for reason, files in by_reason.items():
            names = index.names_in(files) if index else ()
            message = f"{path / files[0]}: {reason}"
            if len(files) > 1:
                message = f"{path}: {len(files)} files ({first_few(files, 3)}): {reason}"
            elif not is_bare_name(files[0]):
                message = reason
            if index and not any(map(self.folder.is_file, files)) and is_bare_name(files[0]):
                message += (
                    f"; {'it' if len(files) == 1 else 'they'} should hold {len(names)} tensors "
                    f"({first_few(names, 3)}). "
                )
                if self._are_needless(names):
                    message += f"The model needs none of them; {index.path.name} is stale"
                    self.problems.append(warning(message))
                    continue
                self._lost = len(self.problems), tuple(files)
                message += incomplete(self.folder)
            # With an index, the names that are lost are known; others are missing for another reason.
            self.problems.append(
                Problem(message, names or tuple(files), explains_missing=not names)
            )

    def _join(self, parts: dict[str, list[TensorInfo]]) -> None:
        """Join tensors cut over files, as HuggingFaceStorageWriter writes them with many ranks."""
        for name, cut in parts.items():
            if len({(part.dtype, len(part.shape)) for part in cut}) != 1:
                self._cannot_join(name, cut, "they differ in dtype or dimensions")
                continue
            pieces = {piece.start: piece for part in cut for piece in part.pieces}
            tensor = TensorInfo(
                name,
                cut[0].dtype,
                # The files do not state the length of a tensor; the last part ends where it ends.
                tuple(map(max, zip(*(part.shape for part in cut), strict=True))),
                tuple(pieces[start] for start in sorted(pieces)),
            )
            if wrong := tensor.coverage_error():
                self._cannot_join(name, cut, wrong)
            self.tensors[name] = tensor

    def _cannot_join(self, name: str, cut: list[TensorInfo], wrong: str) -> None:
        self._error(
            f"{self.folder.path}: {name} is cut over {len(cut)} files, and {wrong}. A rank's file "
            "is missing, or is of another save",
            (name,),
        )

    def _twice(self, names: list[str], first: str, second: str) -> None:
        self._error(
            f"{self.folder.path}: {len(names)} tensors are both in {first} and in {second} "
            f"({first_few(names, 3)}), and there is no index. Move one of the files away, or give "
            "the right file as source",
            tuple(names),
        )

    def _check_numbering(self, names: Collection[str]) -> None:
        """Report shards that are missing by their own count (``-00002-of-00003``)."""
        series: dict[tuple[str, int], set[int]] = {}
        for name in names:
            if match := _NUMBERED.fullmatch(name):
                series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
        for (stem, count), numbers in series.items():
            missing = sorted(set(range(1, count + 1)) - numbers) if count <= 10_000 else []
            if missing:
                message = (
                    f"{self.folder.path}: shards {first_few(map(str, missing))} of {count} of "
                    f"{stem} are missing. {incomplete(self.folder)}"
                )
                self.problems.append(Problem(message, explains_missing=True))

    def _read_config(self) -> ModelConfig | None:
        path = self.folder.path / CONFIG
        if not self.folder.is_file(CONFIG):
            # Not an error yet: --assets may name another folder that has it, see `assets`.
            self.problems.append(
                warning(
                    f"{path}: not found. The weights do not contain the number of heads or the "
                    "RoPE base and scaling"
                )
            )
            return None
        entries = try_json_in(self.folder, CONFIG, self.problems)
        if entries is None:
            return None
        config = read_config(path, entries, self.tensors)
        self.problems += config.problems
        return config

    def _read_receipt(self) -> receipt.Receipt | None:
        return receipt.try_read_in(self.folder, self.problems)
