"""How to start training from a checkpoint: what to run with each TorchTitan release.

A stock flavour is advised only if it has every parameter of the checkpoint. Otherwise the advice
contains a short module that defines the model, for TorchTitan to import. `script` puts the command
into a file that can be run.

Limit: the advice starts training; learning rate and parallelism are up to the user.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.address import copy_command
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.model.families import FAMILIES
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams
from llamaconv.report import shell
from llamaconv.report.errors import printable
from llamaconv.torchtitan.module import NAME as MODULE
from llamaconv.torchtitan.module import module_text
from llamaconv.torchtitan.releases import (
    IN_HUGGINGFACE,
    RELEASES,
    UNRELEASED,
    Release,
    flavour_of_shapes,
    releases_of,
    stock_flavour,
    why_not,
)
from llamaconv.torchtitan.script import NAME as SCRIPT
from llamaconv.torchtitan.script import script_text


@dataclass(frozen=True)
class Advice:
    """How to use a checkpoint with one release of TorchTitan, or with another program.

    Attributes:
        release: The release, or the program.
        flavour: Name of the model there; empty if it has no such model.
        command: A complete command, empty if the release has no such model.
        module: Text of ``converted_llama.py``, to be saved in the folder where the command is run;
            empty if a stock flavour fits.
        notes: Why there is no command, and what to know about it.
        older: The same for earlier releases that read this checkpoint.
        warnings: What goes wrong, without an error, if the command is changed.
        script: Text of ``train.sh``, which runs the command; empty if there is none.
        needs_tokenizer: Whether ``train.sh`` must be told the tokenizer, because none was found.
        without_conversion: A command that trains from the source as it is, if the release can.
        folder: The folder that `script` and `module` were written to; None if they were not.
    """

    release: str
    flavour: str
    command: str
    module: str
    notes: tuple[str, ...]
    older: tuple[Advice, ...] = ()
    warnings: tuple[str, ...] = ()
    script: str = ""
    needs_tokenizer: bool = False
    without_conversion: str = ""
    folder: Path | None = None

    @property
    def files(self) -> dict[str, str]:
        """The text of each file to write, by its name; empty for one that must not be there."""
        return {SCRIPT: self.script, MODULE: self.module} if self.script else {}

    @property
    def written(self) -> tuple[Path, ...]:
        """The files that were written."""
        folder = self.folder
        return tuple(folder / n for n, text in self.files.items() if text) if folder else ()

    def __str__(self) -> str:
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.without_conversion:
            lines.append(
                f"note: no conversion is needed for this: {self.release} starts from the source "
                f"with {self.without_conversion}"
            )
        if self.folder:
            lines += self._where_it_is()
        else:
            lines += [f"# {self.release}"]
            if self.module:
                lines += [f"# save as {MODULE} and run from its folder:", self.module]
            lines += [printable(self.command), *(f"note: {note}" for note in self.notes)]
            lines += map(str, self.older)
        return "\n".join(line for line in lines if line)

    def _where_it_is(self) -> Iterator[str]:
        """Yield two lines: what was written, and the command that uses it."""
        names = " and ".join(path.name for path in self.written)
        yield printable(f"{self.folder}: wrote {names} for {self.release}")
        tokenizer = "TOKENIZER=DIR " if self.needs_tokenizer else ""
        yield f"{tokenizer}bash {shell.quote(str(self.written[0]))}"

    def to_json(self) -> dict[str, Any]:
        """Return the advice as ``llamaconv convert --json`` prints it.

        Returns:
            An object with ``release``, ``next`` (the command), ``module``, ``notes`` (the warnings
            first), ``older`` (a list), ``warnings``, ``without_conversion`` (a command), ``script`` and
            ``written`` (a list of paths).
        """
        return {
            "release": self.release,
            "next": self.command,
            "module": self.module,
            "notes": [*self.warnings, *self.notes],
            "older": [advice.to_json() for advice in self.older],
            "warnings": list(self.warnings),
            "without_conversion": self.without_conversion,
            "script": self.script,
            "written": [str(path) for path in self.written],
        }


@dataclass(frozen=True)
class Resumed:
    """What a full checkpoint holds, from which a run goes on.

    Attributes:
        step: The name of its folder, as TorchTitan names that of its step.
        not_loaded: The keys of the trainer's state that the release cannot load, with the reason.
        later: Later steps next to it, which TorchTitan would load instead.
    """

    step: str
    not_loaded: Mapping[str, str]
    later: tuple[str, ...] = ()

    @property
    def at_first(self) -> str:
        """The flag that is needed until the run has saved a step of its own; "" if none is."""
        keys = ",".join(self.not_loaded)
        return f"--checkpoint.exclude_from_loading {keys}" if keys else ""

    def notes(self) -> Iterator[str]:
        """Yield what to know before the run goes on."""
        yield (
            "the run goes on from its step, with its optimizer: give it the flags of the run, those of "
            "the optimizer, the scheduler, the number of steps and the data above all"
        )
        if self.not_loaded:
            why = "; ".join(f"{key}: {reason}" for key, reason in self.not_loaded.items())
            yield (
                f"{self.at_first} is for the first start only ({why}); leave it out once the run has "
                "saved a step of its own, as train.sh does"
            )
        if self.later:
            yield (
                f"next to {self.step} are later steps ({', '.join(self.later[:3])}), and TorchTitan "
                "goes on from the newest: move them away, or give --checkpoint.load_step"
            )


def advise(
    params: LlamaParams,
    generation: str,
    layout: Layout,
    checkpoint: Path | StoreAddress,
    dump_folder: Path | None = None,
    *,
    assets: Path | None = None,
    huggingface: Path | None = None,
    resumed: Resumed | None = None,
    biases: Collection[str] = (),
) -> Advice:
    """Return how to start training from a converted checkpoint.

    If the rows are not in the layout that stock models of the family rotate, the advice defines a
    model with the other RoPE. TorchTitan 0.3.0 has both: ComplexRoPE for interleaved rows, and
    CosSinRoPE, which has no Llama 3 scaling, for half_split rows.

    Args:
        params: The model.
        generation: The generation of the checkpoint's tensor names.
        layout: The layout of its q and k rows.
        checkpoint: Its folder, or the address of that. For a release that reads no addresses, the
            folder of its name here, and a warning that says how to copy it.
        dump_folder: TorchTitan's dump folder that contains it as ``checkpoint/step-N``, if any.
        assets: The folder with the model's tokenizer, if one is known.
        huggingface: The source, if it is a Hugging Face folder with the same values.
        resumed: What else is in it, if it is a full checkpoint from which a run goes on.
        biases: The roles of the biases that the checkpoint has.

    Returns:
        The advice for the newest release that reads the checkpoint, with earlier ones in ``older``.
    """
    releases = releases_of(generation)
    if resumed:
        releases = tuple(release for release in releases if release.full)
    if generation in UNRELEASED:
        return Advice(
            "TorchTitan's main branch", "", "", "", tuple(_of_main(params, biases, resumed))
        )
    if not releases:
        note = "no release loads these names. To train, convert to titan-0.3 or titan-0.2"
        return Advice("TorchTitan of 2024", "", "", "", (note,))
    newest, *older = (
        _advise_for(
            *(
                release,
                params,
                layout,
                biases,
                checkpoint,
                dump_folder,
                assets,
                huggingface,
                resumed,
            )
        )
        for release in releases
    )
    return replace(newest, older=tuple(older))


def _of_main(
    params: LlamaParams, biases: Collection[str], resumed: Resumed | None
) -> Iterator[str]:
    """Yield what is known about the main branch."""
    yield (
        f"these names are read by {UNRELEASED['titan-main']}, and by no release yet: 0.3.0 rejects "
        "them. For a release, convert to titan-0.3 or titan-0.2"
    )
    yield (
        "the main branch was read and not run, so there is no train.sh: define the model as its "
        "flavors.py does (build_model_config), with every parameter of this one, and load with "
        "--checkpoint.initial_load_path"
    )
    if resumed:
        yield (
            "to go on with the run, put the folder into DUMP/checkpoint as step-N. The optimizer's keys "
            "are taken to be the names of the parameters, as 0.3.0 has it; this was not run on main"
        )
    newest = RELEASES[0]
    near = flavour_of_shapes(params, biases)
    if near and params.rope_scaling != (stock := newest.scaling.get(near.module)):
        scaling = params.rope_scaling.factor if params.rope_scaling else "none"
        yield (
            f"compare the RoPE scaling of its {near.name}: in {newest.version} the factor is "
            f"{stock.factor if stock else 'none'}, this model's is {scaling}"
        )


def _advise_for(
    release: Release,
    params: LlamaParams,
    layout: Layout,
    biases: Collection[str],
    checkpoint: Path | StoreAddress,
    dump_folder: Path | None,
    assets: Path | None,
    huggingface: Path | None,
    resumed: Resumed | None,
) -> Advice:
    title = f"TorchTitan {release.version}"
    if missing := why_not(params, release, layout, biases):
        return Advice(title, "", "", "", (missing,))
    titan = FAMILIES[params.family].titan
    flavour = stock_flavour(params, release, layout, biases)
    name = flavour.name if flavour else "converted"
    words = release.choose if flavour else release.define
    # 0.3.0 names its configurations as functions: qwen3_0_6b.
    stated = name.lower().replace(".", "_") if release.generation == "titan-0.3" else name
    model = words.format(module=titan.module, flavour=stated)
    where = (
        f"{release.dump_folder} {shell.quote(str(dump_folder.absolute()))}"
        if dump_folder
        else f"--checkpoint.initial_load_path {shell.quote(_place(checkpoint, release))}"
    )
    if resumed and not dump_folder:
        where += f" {release.full}"
    tokenizer = _tokenizer(release, assets)
    flags = [model, f"{release.enable} {where}", *filter(None, [release.text_flags])]
    further = [f"{release.tokenizer} {shell.quote(str(tokenizer))}"] if tokenizer else []
    at_first = resumed.at_first if resumed else ""
    launch = "torchrun --nproc-per-node 8 -m torchtitan.train"
    warnings = tuple(_warnings(params, release, biases, checkpoint, dump_folder, resumed))
    notes = tuple(_notes(params, release, tokenizer))
    if isinstance(checkpoint, StoreAddress):
        if release.reads_stores:
            notes = (*notes, f"to read {checkpoint.scheme}://, fsspec needs its driver there, too")
        else:
            copy = f"{title} reads local folders only: first {copy_command(checkpoint)}"
            warnings = (copy, *warnings)
    if resumed:
        notes = (*resumed.notes(), *notes)
    as_it_is = ""
    if flavour and huggingface and release.reads_huggingface:
        source = shell.quote(str(huggingface.absolute()))
        as_it_is = " ".join(
            [
                f"{launch} {model} {release.enable} {IN_HUGGINGFACE}",
                f"--checkpoint.initial_load_path {source}",
                *further,
            ]
        )
    return Advice(
        title,
        name,
        " ".join([launch, *flags, *further, *filter(None, [at_first])]),
        "" if flavour else module_text(params, release, layout, biases),
        notes,
        warnings=warnings,
        script=script_text(
            release,
            _place(checkpoint, release),
            flags,
            tokenizer,
            (*warnings, *notes),
            None if dump_folder is None else dump_folder.absolute(),
            at_first,
        ),
        needs_tokenizer=tokenizer is None,
        without_conversion=as_it_is,
    )


def _place(checkpoint: Path | StoreAddress, release: Release) -> str:
    """Return what to name as the checkpoint."""
    if isinstance(checkpoint, StoreAddress) and release.reads_stores:
        return str(checkpoint)
    return str(
        Path(checkpoint.name if isinstance(checkpoint, StoreAddress) else checkpoint).absolute()
    )


def _tokenizer(release: Release, assets: Path | None) -> Path | None:
    """Return what to name as the tokenizer: the folder, or a file in it; None if none is known."""
    # A repository of the Hub has Meta's files in original/, and the tokenizers around it.
    folders = (
        [assets, assets.parent if assets.name == "original" else assets / "original"]
        if assets
        else []
    )
    for folder in folders:
        for name in release.tokenizer_files:
            if (folder / name).is_file():
                return (folder if release.tokenizer_is == "folder" else folder / name).absolute()
    return None


def _warnings(
    params: LlamaParams,
    release: Release,
    biases: Collection[str],
    checkpoint: Path | StoreAddress,
    dump_folder: Path | None,
    resumed: Resumed | None,
) -> Iterator[str]:
    near = flavour_of_shapes(params, biases)
    if near and params.rope_scaling != (scaling := release.scaling.get(near.module)):
        factor = params.rope_scaling.factor if params.rope_scaling else "none"
        stock = scaling.factor if scaling else "none"
        yield (
            f"do not use the stock flavour {near.name}: its RoPE scaling is {stock}, this model's "
            f"{factor}; short prompts would hide the difference"
        )
    if release.ignores_path and dump_folder is None:
        safe = "name the target DUMP/checkpoint/step-N" if resumed else "convert with --as-step-0"
        if isinstance(checkpoint, StoreAddress):
            safe = "copy it to DUMP/checkpoint/step-0 and give the dump folder"
        yield (
            "the dump folder must hold no checkpoint/ folder yet: with one, even empty, this release "
            f"ignores the path and trains from random weights ({safe} to be safe)"
        )


def _notes(params: LlamaParams, release: Release, tokenizer: Path | None) -> Iterator[str]:
    if params.rope_scaling and params.rope_scaling.is_linear:
        yield (
            "linear RoPE scaling is Llama 3's with an original length of 1: every pair counts as "
            "one of a long wavelength, and the angles are the same to the bit"
        )
    if params.tied and not release.tied:
        yield (
            f"TorchTitan {release.version} does not tie the head to the embedding: "
            "they start equal and train apart"
        )
    if tokenizer is None:
        yield (
            f"no {release.tokenizer_files[0]} was found; name the tokenizer with {release.tokenizer} "
            f"{'DIR' if release.tokenizer_is == 'folder' else 'FILE'}"
        )
    yield release.text.format(vocab_size=params.vocab_size)
