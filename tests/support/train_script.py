"""What a `train.sh` starts: bash runs it, with a torchrun that notes its words and its folder.

The limit: TorchTitan is not started. tests/interop hands the words to it.
"""

import os
import subprocess
from pathlib import Path

_TORCHRUN = """\
#!/usr/bin/env bash
pwd > "$NOTED"
printf '%s\\0' "$@" >> "$NOTED"
"""


def started(script: Path, home: Path, *flags: str, **variables: str) -> tuple[str, list[str]]:
    """The folder in which a script starts torchrun, and torchrun's words.

    `home` is a new folder for notes. Raises `CalledProcessError` if the script fails before that.
    """
    home.mkdir()
    torchrun, noted = home / "torchrun", home / "noted"
    torchrun.write_text(_TORCHRUN)
    torchrun.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("TOKENIZER", "NGPU")}
    environment |= {"PATH": f"{home}:{os.environ['PATH']}", "NOTED": str(noted), **variables}
    command = ["bash", str(script), *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    folder, _, words = noted.read_text().partition("\n")
    return folder, words.split("\0")[:-1]
