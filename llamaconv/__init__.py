"""llamaconv: an explorer and converter for Llama weights, and the RoPE layout made visible.

The names below are the public ones. They are imported when first used, so that looking into
a Hugging Face folder never waits for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaconv.version import __version__

if TYPE_CHECKING:
    from llamaconv.convert import convert_checkpoint
    from llamaconv.formats.detect import open_checkpoint
    from llamaconv.params import LlamaParams
    from llamaconv.plan import Target
    from llamaconv.planner import make_plan
    from llamaconv.problems import FailedError, RefusedError
    from llamaconv.sample import sample_path
    from llamaconv.verify import verify_checkpoint

_HOMES = {
    "FailedError": "problems",
    "LlamaParams": "params",
    "RefusedError": "problems",
    "Target": "plan",
    "convert_checkpoint": "convert",
    "make_plan": "planner",
    "open_checkpoint": "formats.detect",
    "sample_path": "sample",
    "verify_checkpoint": "verify",
}

__all__ = [
    "FailedError",
    "LlamaParams",
    "RefusedError",
    "Target",
    "__version__",
    "convert_checkpoint",
    "make_plan",
    "open_checkpoint",
    "sample_path",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
