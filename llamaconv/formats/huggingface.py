"""Hugging Face folders: ``*.safetensors`` with an index, one ``model.safetensors``, or one file.

A folder may lie here, or be a repository whose headers were fetched (`place`).

The index decides which file holds a tensor; headers are checked against it, and whatever it
leaves out is listed as ignored. Only headers and JSON are read, without torch; where a folder
has no safetensors, ``pytorch_model*.bin`` is read the same way, with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv import receipt
from llamaconv.config import from_config
from llamaconv.formats.safetensors_header import read_header
from llamaconv.opened import Checkpoint, Ignored
from llamaconv.params import LlamaParams
from llamaconv.pieces import TensorInfo, shapes_by_role
from llamaconv.place import Header, LocalFolder, Place, matching, try_json
from llamaconv.problems import Problem, or_problems, printable, some, warning
from llamaconv.remote import Remote

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
JSON_FILES = (INDEX, CONFIG, receipt.NAME)
"""What `open_place` reads beside headers."""

# Everything that transformers saves beside weights and configuration.
ASSETS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.(?:safetensors|bin)")


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in one ``.safetensors`` file, from headers only.

    Never raises for bad content: what is wrong is in ``problems``, all of it.
    """
    folder = path if path.is_dir() else path.parent
    kind = _kind(path)
    opener = _Opener(LocalFolder(folder, kind.read_header), kind)
    if path.is_file() and path.name != kind.index:
        opener.read_all([path.name])
    else:
        opener.read_folder()
    return opener.checkpoint(path)


def open_place(place: Place) -> Checkpoint:
    """`open_folder` for safetensors whose headers ``place`` holds."""
    opener = _Opener(place, _SAFETENSORS)
    opener.read_folder()
    return replace(opener.checkpoint(place.path), place=place)


def place_of(checkpoint: Checkpoint) -> tuple[Place, str]:
    """Where the files of ``checkpoint`` can be looked at once more, and the name of their index."""
    if checkpoint.place is not None:
        return checkpoint.place, INDEX
    folder = checkpoint.folder
    assert isinstance(folder, Path)
    kind = _SAFETENSORS
    if (folder / _BIN.index).exists() and not (folder / INDEX).exists():
        kind = _BIN
    return LocalFolder(folder, kind.read_header), kind.index


@dataclass(frozen=True)
class _Kind:
    """One of the two kinds of weight files that transformers has."""

    index: str
    single: str
    files: str
    read_header: Callable[[Path], Header]


def _read_bin(path: Path) -> Header:
    # Only this kind needs torch.
    from llamaconv.formats import torch_file

    return torch_file.read_header(path)


_SAFETENSORS = _Kind(INDEX, SINGLE, "*.safetensors", read_header)
_BIN = _Kind("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin", _read_bin)


def _kind(path: Path) -> _Kind:
    """Safetensors where there are any, as transformers prefers them."""
    if path.is_file():
        return _BIN if path.suffix == ".bin" or path.name == _BIN.index else _SAFETENSORS
    found = [kind for kind in (_SAFETENSORS, _BIN) if any(path.glob(kind.files))]
    found += [kind for kind in (_SAFETENSORS, _BIN) if (path / kind.index).exists()]
    return found[0] if found else _SAFETENSORS


class _Opener:
    """Gathers tensors, problems and what is ignored while a folder is looked through."""

    def __init__(self, place: Place, kind: _Kind) -> None:
        self.place = place
        self.folder = place.path
        self.kind = kind
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []

    def error(self, message: str, names: tuple[str, ...] = ()) -> None:
        self.problems.append(Problem(message, names))

    def checkpoint(self, path: Path | Remote) -> Checkpoint:
        """What was gathered, with what stands beside the weights."""
        self.ignore_other_kind()
        if self.place.is_file("adapter_config.json") or any("lora_" in n for n in self.tensors):
            self.error(f"{self.folder}: these are adapter weights (LoRA); merge the adapter first")
        params = self.read_params()
        written = self.read_receipt()
        return Checkpoint(
            path=path,
            format="huggingface",
            tensors=self.tensors,
            naming="huggingface",
            rope="half_split",
            params=params,
            problems=tuple(self.problems),
            ignored=tuple(self.ignored),
            receipt=written,
        )

    def read_folder(self) -> None:
        """By the index where there is one, else ``model.safetensors``, else every file."""
        if self.place.is_file(self.kind.index):
            self.read_indexed()
        elif self.place.is_file(self.kind.single):
            self.read_single()
        else:
            self.read_all(matching(self.place, self.kind.files))

    def ignore_other_kind(self) -> None:
        """Weights of the other kind beside these are the same model once more."""
        other = _BIN if self.kind is _SAFETENSORS else _SAFETENSORS
        for extra in matching(self.place, other.files):
            self.ignored.append(Ignored(extra, f"{self.kind.files} stand beside it"))

    def read_indexed(self) -> None:
        """Shards by the index, with a diff of index and headers."""
        index_path = self.folder / self.kind.index
        index = try_json(self.place, self.kind.index, self.problems)
        if index is None:
            return
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            return self.error(f"{index_path}: no weight_map from tensor names to file names")
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, []).append(name)
        found: dict[str, dict[str, TensorInfo]] = {}
        for file, names in by_file.items():
            shard = self._shard(index_path, file, names)
            if shard is not None:
                found[file] = shard
        where = {name: file for file, shard in found.items() for name in shard}
        lost: list[str] = []
        for name, file in weight_map.items():
            if file not in found:
                continue
            if name in found[file]:
                self.tensors[name] = found[file][name]
            else:
                lost.append(f"{name} (in {where[name]})" if name in where else name)
        if lost:
            self.error(
                f"{index_path}: {len(lost)} tensors are not in the file that the index names: "
                f"{some(lost)}; index and shards are of different downloads",
                tuple(lost),
            )
        for file, shard in found.items():
            self.ignored += [
                Ignored(name, f"in {file}, but not in the index")
                for name in shard
                if weight_map.get(name) != file
            ]
        for extra in matching(self.place, self.kind.files):
            if extra not in by_file:
                self.ignored.append(Ignored(extra, "the index does not name it"))
        self._check_total(index_path, index, complete=len(found) == len(by_file))

    def _shard(
        self, index_path: Path | Remote, file: str, names: list[str]
    ) -> dict[str, TensorInfo] | None:
        if file in ("", ".", "..") or Path(file).name != file or "\\" in file or "\0" in file:
            self.error(
                f"{index_path}: the shard name {printable(file)!r} is not a bare file name; an index "
                "must not point outside its folder",
                tuple(names),
            )
            return None
        if not self.place.is_file(file):
            self.error(
                f"{self.folder / file}: {self.place.why_no_file(file)}; it holds {len(names)} "
                f"tensors ({some(names, 3)}). {self._incomplete()}",
                tuple(names),
            )
            return None
        tensors, problems = self.place.read_header(file)
        # All of its tensors are lost, so that the plan need not report them missing again.
        self.problems += [replace(problem, names=tuple(names)) for problem in problems]
        return None if problems else tensors

    def _incomplete(self) -> str:
        if isinstance(self.folder, Remote):
            return "The upload is incomplete"
        return "The download is incomplete"

    def _check_total(
        self, index_path: Path | Remote, index: dict[str, Any], complete: bool
    ) -> None:
        metadata = index.get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = sum(tensor.nbytes for tensor in self.tensors.values())
        if complete and isinstance(stated, int) and stated != actual:
            self.problems.append(
                warning(
                    f"{index_path}: total_size says {stated} bytes, the tensors have {actual}; "
                    "the headers are believed"
                )
            )

    def read_single(self) -> None:
        """``model.safetensors`` as it is; others beside it must not repeat its names."""
        self.read_all([self.kind.single])
        for extra in matching(self.place, self.kind.files):
            if extra == self.kind.single:
                continue
            twice = [name for name in self.place.read_header(extra)[0] if name in self.tensors]
            if twice:
                self._twice(twice, self.kind.single, extra)
            else:
                self.ignored.append(Ignored(extra, f"{self.kind.single} stands beside it"))

    def read_all(self, files: list[str]) -> None:
        """Every file given, none of which may repeat another's names."""
        if not files:
            return self.error(
                f"{self.folder}: no {self.kind.files} file; expected {self.kind.index} with its shards, or {self.kind.single}"
            )
        self._check_numbering(files)
        parts: dict[str, list[TensorInfo]] = {}
        for file in files:
            if not self.place.is_file(file):
                # A pipe would be waited for.
                self.error(f"{self.folder / file}: {self.place.why_no_file(file)}")
                continue
            tensors, problems = self.place.read_header(file)
            self.problems += problems
            for name in [name for name, tensor in tensors.items() if tensor.is_part]:
                parts.setdefault(name, []).append(tensors.pop(name))
            twice = [name for name in tensors if name in self.tensors]
            if twice:
                self._twice(twice, self.tensors[twice[0]].files[0], file)
            self.tensors.update(tensors)
        self._join(parts)

    def _join(self, parts: dict[str, list[TensorInfo]]) -> None:
        """Tensors cut over files, as torch's HuggingFaceStorageWriter saves those of many ranks."""
        for name, cut in parts.items():
            if len({(part.dtype, len(part.shape)) for part in cut}) != 1:
                self._not_one(name, cut, "they differ")
                continue
            pieces = {piece.start: piece for part in cut for piece in part.pieces}
            tensor = TensorInfo(
                name,
                cut[0].dtype,
                # The files do not say how long a tensor is; what lies farthest out does.
                tuple(map(max, zip(*(part.shape for part in cut), strict=True))),
                tuple(pieces[start] for start in sorted(pieces)),
            )
            if wrong := tensor.not_covered():
                self._not_one(name, cut, wrong)
            self.tensors[name] = tensor

    def _not_one(self, name: str, cut: list[TensorInfo], wrong: str) -> None:
        self.error(
            f"{self.folder}: {name} is cut over {len(cut)} files, and {wrong}; a rank's file is "
            "missing, or is of another save",
            (name,),
        )

    def _twice(self, names: list[str], first: str, second: str) -> None:
        self.error(
            f"{self.folder}: {len(names)} tensors are in {first} and in {second} ({some(names, 3)}), "
            "and no index decides. Move one of the files away, or give the right file as source",
            tuple(names),
        )

    def _check_numbering(self, names: list[str]) -> None:
        """Shards that count themselves (``-00002-of-00003``) have to be all there."""
        series: dict[tuple[str, int], set[int]] = {}
        for name in names:
            if match := _NUMBERED.fullmatch(name):
                series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
        for (stem, count), numbers in series.items():
            absent = sorted(set(range(1, count + 1)) - numbers) if count <= 10_000 else []
            if absent and len(names) > 1:
                self.error(
                    f"{self.folder}: shards {some(map(str, absent))} of {count} of {stem} are not "
                    f"there. {self._incomplete()}"
                )

    def read_params(self) -> LlamaParams | None:
        path = self.folder / CONFIG
        if not self.place.is_file(CONFIG):
            # Not an error yet: --assets may name another folder that has it, see `assets`.
            self.problems.append(
                warning(f"{path}: is not there; heads, RoPE base and scaling are in no weight")
            )
            return None
        config = try_json(self.place, CONFIG, self.problems)
        if config is None:
            return None
        shapes = shapes_by_role(self.tensors, "huggingface")
        params, problems = from_config(config, shapes, str(path))
        self.problems += problems
        return params

    def read_receipt(self) -> receipt.Receipt | None:
        if not self.place.is_file(receipt.NAME):
            return None
        path, read_json = self.folder / receipt.NAME, self.place.read_json
        return or_problems(lambda: receipt.from_json(path, read_json(receipt.NAME)), self.problems)
