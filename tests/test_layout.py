"""Where a module's tests are: in the file of its name, or in the one that is named here."""

from pathlib import Path

import llamaconv

PACKAGE = Path(llamaconv.__file__).parent
TESTS = Path(__file__).parent
ROOMS = [
    "report",
    "model",
    "checkpoint",
    "torchtitan",
    "plan",
    "ranks",
    "verify",
    "convert",
    "notebook",
    "cli",
]

# Modules without a file of their name: the file in tests/ that would fail if they did.
COVERED_BY = {
    "cli/commands": "test_cli.py",
    "cli/common": "test_cli.py",
    "cli/look": "test_cli.py",
    "report/errors": "test_cli.py",
    "report/progress": "test_cli.py",
    "report/boxes": "notebook/test_panels.py",
    "report/shell": "notebook/test_notebooks.py",
    "model/config_json": "model/test_params.py",
    "model/params_json": "checkpoint/test_meta.py",
    "checkpoint/open": "checkpoint/test_huggingface.py",
    "checkpoint/huggingface_index": "notebook/test_browse.py",
    "checkpoint/address": "checkpoint/test_near_path.py",
    "checkpoint/remote_file": "checkpoint/test_fetch_ahead.py",
    "checkpoint/store_address": "checkpoint/test_stores.py",
    "checkpoint/store_errors": "checkpoint/test_stores.py",
    "checkpoint/store_folder": "convert/test_from_store.py",
    "checkpoint/hub_errors": "checkpoint/test_hub.py",
    "checkpoint/hub_address": "checkpoint/test_hub.py",
    "checkpoint/hub_ranges": "convert/test_from_hub.py",
    "checkpoint/digests": "checkpoint/test_against_hub.py",
    "checkpoint/folder": "checkpoint/untrusted/test_hostile_names.py",
    "checkpoint/tensors": "checkpoint/untrusted/test_dcp_metadata.py",
    "checkpoint/checkpoint": "checkpoint/test_huggingface.py",
    "checkpoint/value_statistics": "checkpoint/test_weight_values.py",
    "checkpoint/torch_rows": "convert/test_convert.py",
    "checkpoint/buffers": "convert/test_memory.py",
    "checkpoint/trainer_state": "convert/test_whole_runs.py",
    "checkpoint/other_families": "checkpoint/test_dcp.py",
    "checkpoint/untrusted/files": "checkpoint/untrusted/test_hostile_json.py",
    "checkpoint/untrusted/safetensors_header": "checkpoint/test_huggingface.py",
    "checkpoint/runs": "convert/test_every_step.py",
    "checkpoint/untrusted/torch_checkpointing_metadata": "checkpoint/test_torch_checkpointing.py",
    "checkpoint/untrusted/pickle_data": "checkpoint/untrusted/test_hostile_pickle.py",
    "torchtitan/advice": "torchtitan/test_releases.py",
    "torchtitan/module": "torchtitan/test_releases.py",
    "torchtitan/script": "convert/test_training_files.py",
    "plan/target": "plan/test_plan.py",
    "plan/planner": "plan/test_plan.py",
    "plan/sorting": "plan/test_plan.py",
    "plan/moving": "plan/test_plan.py",
    "plan/checking": "plan/test_plan.py",
    "plan/tied_head": "plan/test_plan.py",
    "plan/small_files": "plan/test_assets.py",
    "ranks/meeting": "ranks/test_ranks.py",
    "verify/inert_pickle": "checkpoint/untrusted/test_torch_file.py",
    "verify/sides": "verify/test_compare.py",
    "verify/layers_run": "verify/test_layers.py",
    "verify/compared": "verify/test_compare.py",
    "verify/results": "verify/test_verify.py",
    "verify/structure": "verify/test_verify.py",
    "verify/configuration": "verify/test_receipt_check.py",
    "verify/bits_and_scores": "verify/test_verify.py",
    "verify/logits": "verify/test_verify.py",
    "verify/independent_readers": "verify/test_verify.py",
    "verify/trainer_values": "convert/test_whole_runs.py",
    "verify/torch_metadata": "checkpoint/test_other_torch.py",
    "convert/make_receipt": "checkpoint/test_receipt.py",
    "convert/next_steps": "test_cli.py",
    "convert/target_files": "convert/test_convert.py",
    "convert/engine": "convert/test_convert.py",
    "convert/agreement": "convert/test_resume.py",
    "convert/to_huggingface": "convert/test_back.py",
    "convert/to_meta": "checkpoint/test_meta.py",
    "convert/to_dcp": "convert/test_convert.py",
    "convert/copied_values": "convert/test_whole_runs.py",
    "convert/metadata_bytes": "checkpoint/test_other_torch.py",
    "convert/torch_stream": "checkpoint/test_meta.py",
    "convert/write_files": "convert/test_resume.py",
    "convert/destination": "convert/test_resume.py",
    "convert/disk": "convert/test_resume.py",
    "convert/disk_file": "convert/test_resume.py",
    "convert/output": "convert/test_resume.py",
    "verify/store_dcp": "convert/test_store.py",
    "convert/guard": "convert/test_store.py",
    "convert/partial": "convert/test_store.py",
    "convert/uploading": "convert/test_store.py",
    "convert/sync": "convert/test_resume.py",
    "convert/journal": "convert/test_resume.py",
    "convert/staging": "convert/test_resume.py",
    "convert/target_check": "convert/test_convert.py",
    "convert/small_files": "convert/test_back.py",
    "notebook/parameters": "notebook/test_notebooks.py",
    "notebook/sample_rows": "notebook/test_preview.py",
    "notebook/conversion": "notebook/test_round_trip.py",
    "notebook/background": "notebook/test_panels.py",
    "notebook/cell_bar": "notebook/test_panels.py",
    "notebook/words": "notebook/test_panels.py",
    "notebook/damage": "notebook/test_round_trip.py",
    "notebook/figures": "notebook/test_panels.py",
}


def test_every_module_has_a_test_file_of_its_name_or_is_listed() -> None:
    named = {path.stem.removeprefix("test_") for path in TESTS.rglob("test_*.py")}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        # A figure, a panel and a part of the lesson have the test file of their folder.
        module = path.parent if path.parent.parent.name == "notebook" else path.with_suffix("")
        if room in ROOMS and path.name != "__init__.py" and module.name not in named:
            assert str(module.relative_to(PACKAGE)) in COVERED_BY, module


def test_every_file_that_is_listed_exists() -> None:
    for file in COVERED_BY.values():
        assert (TESTS / file).is_file(), file


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports each by its bare name; suites that run by name are alone."""
    files = [
        *TESTS.glob("test_*.py"),
        *(f for room in ROOMS for f in (TESTS / room).rglob("test_*.py")),
    ]
    names = [path.name for path in files]
    assert len(names) == len(set(names))
