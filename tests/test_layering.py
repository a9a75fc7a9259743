"""Who may import whom (DESIGN section 3), read from the source: an import that breaks the house fails here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"launch", "modeling", "data_pipeline", "stages", "quant", "kernels", "search"}
MAY_IMPORT = {
    "kernels": set(),
    "data_pipeline": set(),
    "modeling": {"kernels"},
    "quant": {"kernels", "modeling"},
    "stages": {"modeling", "data_pipeline", "quant", "kernels"},
    "search": {"modeling", "kernels", "quant"},
    "launch": OURS,
}
NOT_AT_LOAD = {
    # What a GPU machine may lack, or what costs seconds to import, is imported where it is used.
    folder: {"ray", "datasets", "transformers", "lm_eval", "wandb", "torchtitan", "torchao"}
    for folder in ("modeling", "data_pipeline", "stages", "quant", "kernels", "search")
}
REMOTE = ROOT / "modeling" / "hf_mobilemoe_remote"
"""Code for `transformers` that an export copies beside its weights; nothing of ours imports it."""
HEAVY_FOR_THE_DRIVER = {"torch", "ray", "transformers", "wandb", "datasets", "matplotlib"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, at_load_only: bool = False) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _load_time(tree) if at_load_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module


def _load_time(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not inside functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _load_time(child)


@pytest.mark.parametrize("folder", sorted(OURS))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(folder)
        for line, name in imports(path)
        if (top := name.partition(".")[0]) in OURS and top != folder and top not in MAY_IMPORT[folder]
    ]
    assert not wrong


def test_code_that_goes_with_an_export_needs_nothing_of_ours_and_nobody_imports_it() -> None:
    assert {name.partition(".")[0] for path in REMOTE.glob("*.py") for _, name in imports(path)} == {
        "__future__", "math", "typing", "torch", "transformers",
    }  # fmt: skip
    assert not [path for folder in OURS for path in modules(folder) for _, name in imports(path) if REMOTE.name in name]


def test_quant_takes_only_layer_types_from_modeling() -> None:
    wrong = [
        f"{path.name}:{line} {name}"
        for path in modules("quant")
        for line, name in imports(path)
        if name.startswith("modeling") and name not in ("modeling.layers", "modeling.experts")
    ]
    assert not wrong


def test_search_takes_only_the_spec_from_quant() -> None:
    wrong = [name for path in modules("search") for _, name in imports(path)
             if name.startswith("quant") and name != "quant.spec"]
    assert not wrong


@pytest.mark.parametrize("folder", sorted(NOT_AT_LOAD))
def test_a_folder_loads_without_what_a_machine_may_lack(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name} at load"
        for path in modules(folder)
        for line, name in imports(path, at_load_only=True)
        if name.partition(".")[0] in NOT_AT_LOAD[folder] and path.name != "lm_eval_adapter.py" and path.parent != REMOTE
    ]
    assert not wrong


def test_modeling_holds_no_line_about_distribution() -> None:
    for path in modules("modeling"):
        text = path.read_text(encoding="utf-8")
        for word in ("torch.distributed", "DTensor", "fully_shard", "world_size"):
            assert word not in text, f"{path.name} speaks of {word}"


def test_ray_is_spoken_in_launch_and_search_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in OURS - {"launch", "search"}
        for path in modules(folder)
        for line, name in imports(path)
        if name.partition(".")[0] == "ray"
    ]
    assert not wrong


def test_configs_and_recipes_load_without_torch() -> None:
    """The driver of a Ray run reads a recipe in a second, not in four."""
    import subprocess

    code = ("import sys, launch.config, launch.recipes, launch.runner, launch.commands; "
            f"print(sorted(set(sys.modules) & {HEAVY_FOR_THE_DRIVER!r}))")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_command_carries_the_name_of_a_standard_module_or_of_a_folder_of_ours() -> None:
    names = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert not names & (set(sys.stdlib_module_names) | OURS)


def test_the_packages_of_pyproject_are_the_folders_that_hold_code() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for folder in OURS for path in modules(folder)
        if path.name == "__init__.py"
    }  # fmt: skip
    assert listed == found
