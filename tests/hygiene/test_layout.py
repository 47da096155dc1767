"""The layout: no import circle, no arrow up, at most 16 modules in a folder, and tables that name every module."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest

from tests.hygiene import layout


def test_there_is_no_circle_and_no_arrow_up():
    assert len(layout.edges()) > 200
    TopologicalSorter(layout.edges()).prepare()  # raises CycleError, which names the circle
    level = {floor: number for number, floor in enumerate(layout.FLOORS)}
    for name, targets in layout.edges().items():
        for target in targets:
            assert level[name.split("/")[0]] >= level[target.split("/")[0]], f"{name} imports {target}, a floor above"


def test_there_is_no_circle_between_the_folders_of_the_runtime():
    folders = defaultdict(set)
    for name, targets in layout.edges().items():
        own = "/".join(name.split("/")[:2])
        inner = {"/".join(target.split("/")[:2]) for target in targets if target.startswith("runtime/")}
        folders[own] |= inner - {own} if own.startswith("runtime/") else set()
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("folder", layout.folders(), ids=lambda path: path.relative_to(layout.ROOT).as_posix())
def test_a_folder_has_at_most_16_modules_and_a_table_of_them(folder):
    assert sum(name[-1] != "/" for name, _ in layout.inside(folder)) <= 16
    docstring = ast.get_docstring(layout.parsed(folder / "__init__.py"), clean=False)
    assert docstring == layout.docstring(folder), "run python -m tests.hygiene.layout"
    assert all(len(line) <= layout.WIDTH for line in docstring.splitlines())


def test_the_map_shows_every_module():
    assert layout.MAP.read_text() == layout.architecture(), "run python -m tests.hygiene.layout"


FORBIDDEN = {"open", "environ", "getenv", "read_text", "read_bytes", "urlopen"}
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "safetensors"}


def test_descriptions_and_arithmetic_open_no_file():
    for name, path in layout.modules().items():
        if name.split("/")[0] in ("spec", "arithmetic"):
            for node in ast.walk(layout.parsed(path)):
                assert getattr(node, "id", getattr(node, "attr", "")) not in FORBIDDEN, f"{name}:{node.lineno}"
            assert not any(target.split("/")[0] == "checkpoints" for target in layout.edges()[name]), name


def test_torch_stays_on_its_floors():
    for name, path in layout.modules().items():
        if name.split("/")[0] not in ("runtime", "lora", "diagnosis", "benchmark", "quality", "tools"):
            for node in ast.walk(layout.parsed(path)):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {target.split(".")[0] for target in found} & HEAVY, f"{name}:{node.lineno}"


def test_the_ways_through_the_code_exist():
    """Each step of a way in docs/architecture.md is defined, and imported by a step before it."""
    ways = layout.ways()
    assert [name for name, _ in ways] == [
        "estimate_vram",
        "plan",
        "load",
        "generate",
        "to_vllm",
        "merge_lora_then_quantize",
    ]
    for name, steps in ways:
        assert len(steps) >= 4
        for number, (module, function) in enumerate(steps):
            defined = {node.name for node in ast.walk(layout.parsed(layout.modules()[module])) if hasattr(node, "name")}
            assert function in defined, f"{name}: {module}.{function}"
            reached = {module for module, _ in steps[:number]}
            reached |= {target for before in reached for target in layout.edges()[before]}
            assert not number or module in reached, f"{name}: nothing before it imports {module}"
