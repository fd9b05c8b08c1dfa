"""The command line: argparse over the public functions, and the contract of exit statuses.

0 done and verified; 1 begun and failed, the target as it was; 2 refused, nothing written; 130
interrupted. Messages go to standard error, a line each; with ``--json`` standard output is one
JSON object. ``LLAMACONV_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llamaconv import shell
from llamaconv.plan import CHOICES, Plan, Target
from llamaconv.planner import make_plan
from llamaconv.problems import (
    INTERRUPTED,
    FailedError,
    Problem,
    RefusedError,
    notes,
    printable,
)
from llamaconv.ranks import Ranks, from_environment
from llamaconv.remote import is_remote, refuse_remote
from llamaconv.tables import parse_size
from llamaconv.version import __version__

# torch is imported by the commands that write or compare, not by those that only look.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.run is not _convert and os.environ.get("RANK", "0") != "0":
        return 0  # only a conversion is shared between torchrun's ranks; rank 0 does the others
    # A polite kill is an interruption: clean up, say so, 130.
    _interrupted.clear()
    for number in _INTERRUPTIONS:
        signal.signal(number, _interrupt)
    try:
        options.run(options)
        return 0
    except (RefusedError, FailedError) as error:
        if _interrupted.is_set():  # and a library has made another error of it
            return _end_interrupted(options, error)
        if os.environ.get("LLAMACONV_DEBUG") == "1":
            raise
        if not options.silent:
            _say(error.problems)
            _say_notes(error)
            if options.json:
                _print_json({"ok": False, "problems": [p.message for p in error.problems]})
        return error.status
    except KeyboardInterrupt as error:
        return _end_interrupted(options, error)
    except BrokenPipeError:
        # The reader of our output has gone (| head); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("LLAMACONV_DEBUG") == "1":
            raise
        if not options.silent:
            _say([Problem(f"{error.filename or 'input or output'}: {error.strerror or error}")])
        return 1


_INTERRUPTIONS = signal.SIGINT, signal.SIGTERM
_interrupted = threading.Event()


def _interrupt(number: int, frame: object) -> None:
    # Once: a second Ctrl-C must not cut short the cleaning up that begins with the first. (Not by
    # SIG_IGN: Python complains of a signal that came before it was ignored.)
    for one in _INTERRUPTIONS:
        signal.signal(one, lambda number, frame: None)
    _interrupted.set()
    raise KeyboardInterrupt


def _end_interrupted(options: argparse.Namespace, error: BaseException) -> int:
    if not options.silent:
        print(f"error: {INTERRUPTED}", file=sys.stderr)
        _say_notes(error)
    return 130


_FOLDER = "a folder, or one file"
_OR_HUB = ", or a repository of the Hugging Face Hub, hf://ORG/NAME[@REVISION]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamaconv",
        description="Llama weights: look into them, plan a conversion, convert, verify.",
    )
    # True where another rank says it.
    parser.set_defaults(silent=False)
    parser.add_argument("--version", action="version", version=f"llamaconv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="write the bundled sample model to a folder")
    sample.add_argument("target", metavar="DST", type=_new_folder)
    sample.set_defaults(run=_sample, json=False)

    inspect = commands.add_parser("inspect", help="what a folder holds, from headers only")
    inspect.add_argument("source", metavar="PATH", type=_place, help=f"{_FOLDER}{_OR_HUB}")
    _json(inspect, _inspect)

    plan = commands.add_parser("plan", help="every move of a conversion, and every problem")
    plan.add_argument("source", metavar="SRC", type=_place, help=f"{_FOLDER}{_OR_HUB}")
    _target_options(plan)
    _json(plan, _plan)

    convert = commands.add_parser("convert", help="convert SRC to DST, and verify the result")
    convert.add_argument("source", metavar="SRC", type=_place, help=_FOLDER)
    convert.add_argument("target", metavar="DST", type=_new_folder, help="the folder to write")
    _target_options(convert)
    convert.add_argument(
        "--as-step-0",
        action="store_true",
        help="DST is a TorchTitan dump folder: write DST/checkpoint/step-0",
    )
    convert.add_argument(
        "--workers",
        type=int,
        help="threads that write, of each rank (default: one a processor, four at most)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    convert.add_argument("--no-verify", action="store_true", help="leave the checks out")
    convert.add_argument("--quiet", action="store_true", help="no progress, no summary")
    _json(convert, _convert)

    verify = commands.add_parser(
        "verify", help="check DST against the SRC it was made from, or against its receipt alone"
    )
    verify.add_argument("source", metavar="SRC", type=_place, nargs="?", help=_FOLDER)
    verify.add_argument("target", metavar="DST", type=_place, help="the folder to check")
    _json(verify, _verify)
    return parser


def _json(command: argparse.ArgumentParser, run: Any) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    command.set_defaults(run=run)


def _target_options(command: argparse.ArgumentParser) -> None:
    defaults = Target()
    helps = {
        "to": "format of the target; auto is dcp, and from a DCP hf",
        "generation": "key names of the DCP: 0.3.0 and later, 0.1.0 to 0.2.2, or of 2024",
        "rope": "layout of the q and k rows",
        "dtype": "keep each tensor's dtype, or cast",
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
        help="row chunks a tensor of a DCP (default 1)",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default=defaults.max_shard_size,
        metavar="5GB",
        help="longest file of a Hugging Face folder (default 5GB)",
    )
    command.add_argument(
        "--assets",
        default="",
        metavar="DIR",
        help="where config.json and tokenizer come from (default: the source, or its receipt's)",
    )


def _place(text: str) -> str | Path:
    """A path, or the name of a repository as it is: a Path would drop one of its slashes."""
    return text if is_remote(text) else Path(text)


def _new_folder(text: str) -> Path:
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text}: nothing is written to the Hub; name a folder")
    return Path(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _open_plan(options: argparse.Namespace) -> Plan:
    from llamaconv.formats.detect import open_checkpoint

    names = (*CHOICES, "shards", "max_shard_size", "assets")
    target = Target(**{name: getattr(options, name) for name in names})
    return make_plan(open_checkpoint(options.source), target)


def _sample(options: argparse.Namespace) -> None:
    from llamaconv.sample import write_sample

    folder = write_sample(options.target)
    print(printable(f"{folder}: a small trained Llama, as a Hugging Face folder"))
    print(printable(f"next: llamaconv convert {_quote(folder)} {_quote(folder)}-dcp"))


def _inspect(options: argparse.Namespace) -> None:
    from llamaconv.formats.detect import open_checkpoint

    checkpoint = open_checkpoint(options.source)
    if options.json:
        _print_json(checkpoint.to_json())
    else:
        print(checkpoint.table())
        if checkpoint.params:
            print(f"\n{checkpoint.params}")
        for ignored in checkpoint.ignored:
            print(printable(f"ignored: {ignored}"))
    _say(checkpoint.problems)


def _plan(options: argparse.Namespace) -> None:
    plan = _open_plan(options)
    if options.json:
        _print_json(plan.to_json())
    else:
        print(plan.table(most=10_000))
        print(f"\n{plan.cost()}")
        if releases := plan.releases():
            print(f"\n{releases}")
    _say(plan.problems)
    if plan.errors:
        raise SystemExit(2)


def _convert(options: argparse.Namespace) -> None:
    ranks = from_environment()
    try:
        with ranks:
            _convert_on(ranks, options)
    finally:
        options.silent = not ranks.reports_errors


def _convert_on(ranks: Ranks, options: argparse.Namespace) -> None:
    refuse_remote(options.source)
    plan = _open_plan(options)
    if ranks.first:
        _say(problem for problem in plan.problems if problem.level == "warning")
    plan.check()
    from llamaconv.convert import convert_checkpoint
    from llamaconv.progress import Bar

    with Bar(quiet=options.quiet or options.json) as bar:
        done = convert_checkpoint(
            plan,
            options.target,
            overwrite=options.overwrite,
            verified=not options.no_verify,
            workers=options.workers,
            as_step_0=options.as_step_0,
            progress=bar,
            ranks=ranks,
        )
    if not ranks.first:
        return
    if options.json:
        _print_json(done.to_json())
    elif not options.quiet:
        print(done.table())
        if done.verification:
            print(f"\n{done.verification.table()}")
        print(f"\n{printable(str(done.target))}: converted in {done.seconds:.1f} s. Next:")
        print(done.advice)


def _verify(options: argparse.Namespace) -> None:
    refuse_remote(options.source, options.target)
    from llamaconv.progress import Bar
    from llamaconv.receipt_check import verify_receipt
    from llamaconv.verify import verify_checkpoint

    with Bar(quiet=options.json) as bar:
        progress = partial(bar, "verify")
        if options.source is None:
            verification = verify_receipt(options.target, progress)
        else:
            verification = verify_checkpoint(options.source, options.target, progress)
    if options.json:
        _print_json(verification.to_json())
    else:
        print(verification.table())
    if not verification.ok:
        _say(verification.problems())
        raise SystemExit(1)


def _say(problems: Any) -> None:
    for problem in problems:
        assert isinstance(problem, Problem)
        print(problem, file=sys.stderr)


def _say_notes(error: BaseException) -> None:
    for note in notes(error):
        print(note, file=sys.stderr)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1))


def _quote(path: Path) -> str:
    return shell.quote(str(path))
