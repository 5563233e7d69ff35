"""The shape of the package as data: floors, public names, flags where they belong, the commands of the README."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import ckpt_trainer
from ckpt_trainer.plan import Settings
from ckpt_trainer.training_args import CheckpointingArguments

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckpt_trainer"

FLOOR = {
    "plan": 0, "log": 0, "memory": 0, "block_state": 0, "side_channels": 0, "rebuild_rules": 0, "sites": 0, "arguments": 0,
    "streams": 0, "extents": 0, "drawing": 0, "modes": 0, "hooks": 0, "open_graphs": 0,
    "blocks": 1, "step_costs": 1, "flops": 1, "flag_values": 1, "flag_rules": 1, "ops": 1, "segments": 1, "host_memory": 1,
    "deepspeed_rules": 1,
    "without_weights": 0, "block_classes": 2, "roofline": 2, "spans": 3, "measured": 4, "fake_costs": 12,
    "sizes": 0, "budgets": 2, "probes": 3, "costs": 5, "extrapolation": 6, "auto": 7,
    "batch_plans": 10, "compiled_budget": 10,
    "choices": 2, "prices": 3, "exchange": 3, "search": 4, "solver": 5,
    "disk": 2, "compiled": 2, "chosen_ops": 2, "policies": 3, "prepare": 3, "kbit": 3, "gradient_check": 3, "host_store": 3,
    "chunks": 4, "distributed": 4, "handles": 5, "groups": 6, "packed": 6, "runs": 6, "stored_results": 6, "offload": 7,
    "rebuild": 7, "stored_modules": 7,
    "recompute": 8, "install": 9, "first_pass": 9, "hf_flags": 9, "training_args": 10, "report": 10,
    "out_of_memory": 1, "retrying": 2, "collectives": 0, "window": 1, "rescue": 3,
    "optimizer_watch": 1, "quantized": 11, "engine": 11, "call_costs": 13, "loop": 14, "trainer": 14, "auto_lines": 8,
    "comparison": 1, "optimizers": 0, "model_configs": 0, "model_arguments": 1, "predicted_rows": 6, "largest": 2,
    "study": 13, "estimates": 14, "estimate_command": 15,
    "__init__": 15, "script": 15, "measured_rows": 12, "bench": 13, "bench_command": 14, "cli": 16, "__main__": 17,
}  # fmt: skip
DECIDING = {"policies", "sizes", "costs", "extrapolation", "auto", "choices", "prices", "exchange", "search", "solver"}
DOING = {
    "block_state", "side_channels", "rebuild_rules", "rebuild", "sites", "ops", "chosen_ops", "packed", "runs", "segments",
    "stored_results", "stored_modules", "compiled", "drawing", "recompute", "install", "prepare", "kbit", "gradient_check",
    "distributed", "deepspeed_rules", "arguments", "streams", "extents", "host_memory", "host_store", "disk", "chunks",
    "handles", "groups", "offload", "out_of_memory", "retrying", "collectives", "window", "rescue",
}  # fmt: skip
FLAGS = {field.name for field in dataclasses.fields(CheckpointingArguments)}


def imports_of(name):
    """Our own modules that a file imports, and the top-level packages of all others."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = "ckpt_trainer" if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "ckpt_trainer" else [module]
        for imported in names:
            root, _, rest = imported.partition(".")
            ours.add(rest.split(".")[0]) if root == "ckpt_trainer" else others.add(root)
    return ours, others


def test_every_file_has_its_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(FLOOR)


@pytest.mark.parametrize("name", FLOOR)
def test_imports_only_go_down(name):
    ours, _ = imports_of(name)
    assert [other for other in ours if FLOOR[other] >= FLOOR[name]] == []
    assert not (name in DECIDING and ours & DOING)
    assert not (name in DOING and ours & DECIDING)


def test_plan_needs_the_standard_library_only():
    assert not imports_of("plan")[1] & {"torch", "transformers", "accelerate", "peft"}


@pytest.mark.parametrize("name", FLOOR)
def test_files_and_functions_stay_small(name):
    text = (PACKAGE / f"{name}.py").read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            length = node.end_lineno - node.lineno - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)
            assert length <= 40, node.name


def test_public_names_are_sorted_and_exist():
    assert ckpt_trainer.__all__ == sorted(ckpt_trainer.__all__)
    assert all(hasattr(ckpt_trainer, name) for name in ckpt_trainer.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(ckpt_trainer.__all__)


@pytest.mark.parametrize("name", sorted(set(FLOOR) - {"training_args", "__init__"}))
def test_flags_are_read_in_one_place(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not read & FLAGS


@pytest.mark.parametrize("name", [name for name, floor in FLOOR.items() if floor < 10])
def test_training_arguments_end_above_the_floors_that_do_the_work(name):
    assert "TrainingArguments" not in (PACKAGE / f"{name}.py").read_text()


def test_each_flag_is_a_setting_and_stands_in_the_readme():
    settings = {field.name for field in dataclasses.fields(Settings)}
    readme = (ROOT / "README.md").read_text()
    for flag in FLAGS:
        assert flag.removeprefix("checkpointing_") in settings
        assert f"| `{flag}` |" in readme


def test_no_device_is_named():
    for path in PACKAGE.glob("*.py"):
        assert not re.search(r"torch\.cuda|[\"']cuda", path.read_text()), path


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^(python -m venv .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_typed_marker_is_there():
    assert (PACKAGE / "py.typed").exists()
    assert importlib.import_module("ckpt_trainer").__doc__
