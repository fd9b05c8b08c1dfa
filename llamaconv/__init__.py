"""llamaconv: an explorer and converter for Llama weights, and the RoPE layout made visible.

The names below are the public ones. They are imported when they are first used, so that opening a
Hugging Face folder never waits for torch. Documented submodules: `llamaconv.model.rope` and
`llamaconv.notebook`; everything else is private.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llamaconv.checkpoint.open import open_checkpoint as open_checkpoint
    from llamaconv.convert.convert import convert_checkpoint as convert_checkpoint
    from llamaconv.model.params import LlamaParams as LlamaParams
    from llamaconv.plan.planner import make_plan as make_plan
    from llamaconv.plan.target import Target as Target
    from llamaconv.report.errors import FailedError as FailedError
    from llamaconv.report.errors import RefusedError as RefusedError
    from llamaconv.sample import sample_path as sample_path
    from llamaconv.verify.verify import verify_checkpoint as verify_checkpoint

_HOMES = {
    "FailedError": "report.errors",
    "LlamaParams": "model.params",
    "RefusedError": "report.errors",
    "Target": "plan.target",
    "convert_checkpoint": "convert.convert",
    "make_plan": "plan.planner",
    "open_checkpoint": "checkpoint.open",
    "sample_path": "sample",
    "verify_checkpoint": "verify.verify",
}

__all__ = [*_HOMES, "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
