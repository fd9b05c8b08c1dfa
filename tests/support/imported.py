"""What a fresh interpreter has imported after some code."""

import subprocess
import sys

HEAVY = {"torch", "numpy", "safetensors", "matplotlib", "ipywidgets", "IPython"}
HEAVY |= {"huggingface_hub", "httpx", "httpx2"}


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``code``."""
    script = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())
