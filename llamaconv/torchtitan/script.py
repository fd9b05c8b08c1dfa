"""``train.sh``: the command that starts training, as a file to run.

It can be run from any folder, takes further flags, and stops where a release would silently train
from random weights. Limit: bash.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from llamaconv.report import shell
from llamaconv.report.errors import printable
from llamaconv.torchtitan.releases import Release

NAME = "train.sh"
"""The name of its file."""


def script_text(
    release: Release,
    checkpoint: str,
    flags: Sequence[str],
    tokenizer: Path | None,
    remarks: Sequence[str],
    dump_folder: Path | None,
    at_first: str = "",
) -> str:
    """Return the text of `NAME`.

    Args:
        release: The release of TorchTitan.
        checkpoint: The absolute path of the converted checkpoint, or its address.
        flags: The flags that choose model, checkpoint and text, each group quoted for a shell.
        tokenizer: The tokenizer, None if none is known: the script then asks for it.
        remarks: What to know, as comments.
        dump_folder: The dump folder that holds the checkpoint; None if it is given by its path.
        at_first: Flags that are needed until the run has saved a step of its own.
    """
    known = shell.quote(str(tokenizer)) if tokenizer else ""
    missing = f"set TOKENIZER to the {release.tokenizer_is} of the tokenizer"
    missing += f" ({' or '.join(release.tokenizer_files)})"
    lines = [
        "#!/usr/bin/env bash",
        *_comment(
            f"Train with TorchTitan {release.version} from {checkpoint}. NGPU sets the "
            "number of processes; further flags of TorchTitan may follow: train.sh "
            "--training.steps 100"
        ),
        *(line for remark in remarks for line in _comment(remark)),
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f"tokenizer={known}" if known else f'tokenizer=${{TOKENIZER:?"{missing}"}}',
    ]
    if release.ignores_path and dump_folder is None:
        lines += _GUARD.splitlines()
    if at_first:
        steps = f"{shell.quote(str(dump_folder))}/" if dump_folder else "outputs/"
        start = int(checkpoint.rpartition("step-")[2]) if dump_folder else -1
        lines += _AT_FIRST.format(flags=at_first, steps=steps, start=start).splitlines()
    words = ['exec torchrun --nproc-per-node "${NGPU:-8}" -m torchtitan.train', *flags]
    words += [f'{release.tokenizer} "$tokenizer"', *(["$at_first"] if at_first else []), '"$@"']
    return "\n".join([*lines, " \\\n    ".join(words)]) + "\n"


# Its default dump folder is outputs/, in the folder of the script.
_GUARD = """\
if [ -d outputs/checkpoint ] && ! compgen -G 'outputs/checkpoint/step-*/.metadata' > /dev/null; then
    echo "outputs/checkpoint holds no checkpoint: training would start from random weights. Remove it" >&2
    exit 2
fi"""


# Until a later step is there, which is the run's own.
_AT_FIRST = """\
at_first='{flags}'
for step in {steps}checkpoint/step-*; do
    if [ -e "$step/.metadata" ] && [ "${{step##*-}}" -gt {start} ] 2> /dev/null; then at_first=; fi
done"""


def _comment(text: str) -> list[str]:
    """Return ``text`` as lines of a comment; nothing in it can end the comment."""
    return textwrap.wrap(printable(text), 100, initial_indent="# ", subsequent_indent="# ")
