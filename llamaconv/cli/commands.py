"""Every command with its options, and those that write. `_EPILOG` has the exit statuses.

Messages go to standard error, one per line; with ``--json`` standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamaconv import __version__
from llamaconv.checkpoint.address import local, path_or_address
from llamaconv.checkpoint.store_address import StoreAddress
from llamaconv.cli.common import (
    FOLDER,
    OR_REMOTE,
    json_option,
    new_folder,
    new_target,
    print_json,
    say,
    say_notes,
)
from llamaconv.cli.look import add_compare, add_inspect, run_side_by_side
from llamaconv.cli.notebooks import add_notebooks
from llamaconv.plan.plan import Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import CHOICES, Target
from llamaconv.ranks import Ranks, from_environment
from llamaconv.report import shell
from llamaconv.report.errors import (
    INTERRUPTED,
    FailedError,
    Problem,
    RefusedError,
    printable,
)
from llamaconv.report.tables import parse_size

if TYPE_CHECKING:
    from llamaconv.convert.convert import Conversion

# torch is imported by the commands that write or compare, not by those that only look.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``llamaconv``; those of the process by default.

    Returns:
        The exit status: 0 done (and verified), 1 failed, 2 refused, 130 interrupted. Rank 0 alone
        runs commands other than ``convert``; the other ranks return 0 at once.

    Raises:
        SystemExit: From argparse, for ``--help``, ``--version`` and invalid options (status 2).
    """
    for stream in (sys.stdout, sys.stderr):
        # The encoding of a log or of a cluster's terminal may lack signs such as × and →.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    if options.run is not _convert and os.environ.get("RANK", "0") != "0":
        return 0  # only a conversion is shared between torchrun's ranks; rank 0 does the others
    # SIGTERM is an interruption too: clean up, report it, return 130.
    _interrupted.clear()
    for number in _INTERRUPTIONS:
        signal.signal(number, _interrupt)
    try:
        status: int = options.run(options)
        return status
    except (RefusedError, FailedError) as error:
        if _interrupted.is_set():  # a library turned the interruption into another error
            return _end_interrupted(options, error)
        if os.environ.get("LLAMACONV_DEBUG") == "1":
            raise
        if not options.silent:
            say(error.problems)
            say_notes(error)
            if options.json:
                print_json({"ok": False, "problems": [p.message for p in error.problems]})
        return error.status
    except KeyboardInterrupt as error:
        return _end_interrupted(options, error)
    except BrokenPipeError:
        # The reader of standard output has ended (| head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("LLAMACONV_DEBUG") == "1":
            raise
        if not options.silent:
            say([Problem(f"{error.filename or 'input or output'}: {error.strerror or error}")])
        return 1


_INTERRUPTIONS = signal.SIGINT, signal.SIGTERM
_interrupted = threading.Event()


def _interrupt(*_: object) -> None:
    # A second Ctrl-C must not cut short the cleaning up after the first. (SIG_IGN would not do:
    # Python complains about a signal that came before it was ignored.)
    for each in _INTERRUPTIONS:
        signal.signal(each, lambda *_: None)
    _interrupted.set()
    raise KeyboardInterrupt


def _end_interrupted(options: argparse.Namespace, error: BaseException) -> int:
    if not options.silent:
        print(f"error: {INTERRUPTED}", file=sys.stderr)
        say_notes(error)
    return 130


_EPILOG = """\
exit status:
  0    done; for convert and verify: and every check passed
  1    begun and failed: the machine or a check; an existing target is unchanged;
       for compare: the two differ
  2    refused: nothing was written; for inspect and compare: a checkpoint has errors
  130  interrupted by Ctrl-C or SIGTERM; an existing target is unchanged

Every command but sample takes --json: standard output is then one JSON object, and messages are on
standard error. After an error it has "ok" (false) and "problems" (a list of messages).
LLAMACONV_DEBUG=1 shows the traceback of an error.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamaconv",
        description="Look into Llama weights; plan, execute and verify conversions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Set if another rank reports the error.
    parser.set_defaults(silent=False)
    parser.add_argument("--version", action="version", version=f"llamaconv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="write the bundled sample model to a folder")
    sample.add_argument("target", metavar="DST")
    sample.set_defaults(run=_sample, json=False)

    add_notebooks(commands)
    add_inspect(commands)
    add_compare(commands)
    plan = commands.add_parser(
        "plan", help="list every move of a conversion and every problem; writes nothing"
    )
    plan.add_argument("source", metavar="SRC", help=f"{FOLDER}{OR_REMOTE}")
    _target_options(plan)
    json_option(plan, _plan)

    convert = commands.add_parser("convert", help="convert SRC to DST and verify the result")
    convert.add_argument(
        "source",
        metavar="SRC",
        help=f"{FOLDER}{OR_REMOTE}, which is fetched by ranges and not stored; a run that was cut off "
        "fetches only what is missing",
    )
    convert.add_argument(
        "target",
        metavar="DST",
        help="the folder to write, or its address in a store (s3://BUCKET/NAME, gs://, az://), where "
        "nothing is replaced and no interrupted run goes on; next to a DCP (for a store: here), "
        "DST-train gets a script that starts TorchTitan",
    )
    _target_options(convert)
    convert.add_argument(
        "--as-step-0",
        action="store_true",
        help="DST is a TorchTitan dump folder: write DST/checkpoint/step-0",
    )
    convert.add_argument(
        "--every-step",
        action="store_true",
        help="SRC is a run, or its folder of steps: convert each to DST/step-N; "
        "steps that the same command converted before are skipped",
    )
    convert.add_argument(
        "--workers",
        type=int,
        help="writer threads per rank (default: one per CPU, at most 4, shared by a host's ranks; "
        "always one from the Hub or a store)",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint at DST, a local one"
    )
    convert.add_argument("--no-verify", action="store_true", help="skip the checks after writing")
    convert.add_argument("--quiet", action="store_true", help="no progress, no summary")
    json_option(convert, _convert)

    verify = commands.add_parser(
        "verify", help="check DST against the SRC it was converted from, or against its own receipt"
    )
    verify.add_argument(
        "source", metavar="SRC", nargs="?", help=f"{FOLDER}{OR_REMOTE}, which is fetched again"
    )
    verify.add_argument("target", metavar="DST", help="the folder to check")
    verify.add_argument(
        "--run",
        action="store_true",
        dest="run_layers",
        help="run both on a short text too, a layer at a time, whatever the size of the model",
    )
    json_option(verify, _verify)
    return parser


def _target_options(command: argparse.ArgumentParser) -> None:
    defaults = Target()
    helps = {
        "to": "format of the target; auto is dcp, or hf from what a trainer saved",
        "generation": "tensor names of a DCP: of TorchTitan 0.3.0; of its main branch since "
        "2026-09-21, in no release yet; of 0.1.0 to 0.2.2; or of its script of 2024",
        "rope": "layout of the q and k rows of a DCP; auto is the one that TorchTitan's own model of "
        "the family rotates",
        "dtype": "keep each tensor's dtype, or cast all; a value that overflows is an error",
        "tie": "what a tied or conflicting head becomes; auto fails on a conflict",
    }
    for option, choices in CHOICES.items():
        default = getattr(defaults, option)
        text = f"{helps[option]} (default {default})"
        command.add_argument(f"--{option}", choices=choices, default=default, help=text)
    command.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="K",
        help="row chunks per tensor (dcp), or number of consolidated files (meta); default 1",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default=defaults.max_shard_size,
        metavar="5GB",
        help="most bytes per file of a Hugging Face folder (default 5GB)",
    )
    command.add_argument(
        "--assets",
        default="",
        metavar="DIR",
        help="folder with the model's config.json and tokenizer, for sources that lack them "
        "(default: the source's own, or the one that its receipt names)",
    )
    command.add_argument(
        "--with-optimizer",
        action="store_true",
        help="SRC is a full checkpoint of a TorchTitan run: carry its optimizer, scheduler, counters "
        "and data loader along to a DCP of any generation, so that the run can be resumed there",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _target(options: argparse.Namespace) -> Target:
    names = (*CHOICES, "shards", "max_shard_size", "assets", "with_optimizer")
    return Target(**{name: getattr(options, name) for name in names})


def _open_plan(options: argparse.Namespace) -> Plan:
    from llamaconv.checkpoint.open import open_checkpoint

    return make_plan(open_checkpoint(options.source), _target(options))


def _sample(options: argparse.Namespace) -> int:
    from llamaconv.sample import write_sample

    folder = write_sample(new_folder(options.target))
    print(printable(f"{folder}: a small trained Llama, as a Hugging Face folder"))
    print(printable(f"next: llamaconv convert {_quote(folder)} {_quote(folder)}-dcp"))
    return 0


def _plan(options: argparse.Namespace) -> int:
    plan = _open_plan(options)
    if options.json:
        print_json(plan.to_json())
    else:
        print(plan.table(most=10_000))
        print(f"\n{plan.cost()}")
        if releases := plan.releases():
            print(f"\n{releases}")
        for ignored in plan.source.ignored:
            print(printable(f"ignored: {ignored}"))
    say(plan.problems)
    return RefusedError.status if plan.errors else 0


def _convert(options: argparse.Namespace) -> int:
    ranks = from_environment()
    try:
        with ranks:
            _convert_on(ranks, options)
            return 0
    finally:
        options.silent = not ranks.reports_errors


def _convert_on(ranks: Ranks, options: argparse.Namespace) -> None:
    target = new_target(options.target)
    if options.every_step:
        if isinstance(target, StoreAddress):
            raise RefusedError(
                f"{target}: --every-step writes to a local folder. Convert to one, then copy it there"
            )
        _convert_steps(ranks, options, local(path_or_address(options.source)), target)
        return
    plan = _open_plan(options)
    if ranks.first:
        say(problem for problem in plan.problems if problem.level == "warning")
    plan.raise_for_errors()
    done = _convert_plan(ranks, options, plan, target)
    if not ranks.first:
        return
    from llamaconv.verify.results import CONTROL

    if options.json:
        print_json(done.to_json())
    elif not options.quiet:
        print(done.table())
        if done.verification:
            print(f"\n{done.verification.table()}\n{CONTROL}")
        print(f"\n{printable(str(done.target))}: converted in {done.seconds:.1f} s. Next:")
        print(done.advice)


def _convert_plan(
    ranks: Ranks,
    options: argparse.Namespace,
    plan: Plan,
    target: Path | StoreAddress,
    training_files: Path | None = None,
) -> Conversion:
    from llamaconv.convert.convert import convert_checkpoint
    from llamaconv.report.progress import Bar

    with Bar(quiet=options.quiet or options.json) as bar:
        return convert_checkpoint(
            plan,
            target,
            overwrite=options.overwrite,
            verified=not options.no_verify,
            workers=options.workers,
            as_step_0=options.as_step_0,
            training_files=training_files,
            progress=bar,
            ranks=ranks,
        )


def _convert_steps(ranks: Ranks, options: argparse.Namespace, source: Path, target: Path) -> None:
    from llamaconv.convert.every_step import plan_every_step, run_to_json, warnings_of
    from llamaconv.convert.training_files import folder_for

    if options.as_step_0:
        raise RefusedError("--as-step-0 is for one checkpoint; leave it or --every-step out")
    verified = not options.no_verify
    training_files = folder_for(target, None)
    steps, skipped = plan_every_step(
        source, target, _target(options), overwrite=options.overwrite, verified=verified
    )
    if ranks.first:
        say([*skipped, *warnings_of(steps)])
    # Another rank may see what this one has written; rank 0 decides.
    left = set(ranks.broadcast([step.target.name for step in steps if not step.is_done]))
    done = {}
    for step in steps:
        name = step.target.name
        outcome = "converted before; skipped"
        if name in left:
            done[name] = _convert_plan(ranks, options, step.plan, step.target, training_files)
            outcome = f"converted in {done[name].seconds:.1f} s, checks " + (
                "passed" if verified else "not run"
            )
        if ranks.first and not (options.quiet or options.json):
            print(printable(f"{step.target}: {outcome}"), flush=True)
    if ranks.first and options.json:
        print_json(run_to_json(target, steps, done))
    elif ranks.first and not options.quiet and done:
        print(f"\nNext, with the newest:\n{[*done.values()][-1].advice}")


def _verify(options: argparse.Namespace) -> int:
    from llamaconv.report.progress import Bar
    from llamaconv.verify.results import CONTROL
    from llamaconv.verify.verify import verify_checkpoint

    if options.run_layers and options.source is None:
        raise RefusedError("--run compares with the source; name SRC too")
    with Bar(quiet=options.json) as bar:
        verification = verify_checkpoint(options.target, source=options.source, progress=bar)
    run = None
    if options.run_layers:
        run = run_side_by_side(options.source, options.target, "", quiet=options.json)
    if options.json:
        print_json(verification.to_json() | ({"run": run.to_json()} if run else {}))
    else:
        print(f"{verification.table()}\n{CONTROL}")
        if run:
            print(f"\n{run.table()}")
    say(verification.problems)
    # A cast rounds, and activations then differ by more than the order of sums.
    diverges = run is not None and run.diverges and not run.is_cast
    if run is not None and diverges:
        say([Problem(f"check layers failed: {run.summary()}")])
    return FailedError.status if diverges or not verification.ok else 0


def _quote(path: Path) -> str:
    return shell.quote(str(path))
