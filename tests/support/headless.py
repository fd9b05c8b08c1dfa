"""A notebook run by papermill, as a script would."""

import os
import subprocess
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(
    notebook: str, tmp_path: Path, *parameters: str, seconds: int = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a file of notebooks/ to ``run.ipynb`` in ``tmp_path``, which is not the notebooks' folder.

    ``parameters`` are ``name=value``; ``seconds`` is the longest that one cell may take.
    """
    made = str(tmp_path / "run.ipynb")
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS / notebook), made]
    given = [word for one in parameters for word in ("-p", *one.split("=", 1))]
    # A papermill started inside a notebook would inherit it, and with it the controls.
    environment = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
    return subprocess.run(
        [*command, *given, "--execution-timeout", str(seconds), "--no-progress-bar"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
