"""Imports only go down, and importing the package loads nothing outside the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_vram

ROOT = Path(qwen_vram.__file__).parent

# From the ground up; what stands on one line stands on one floor.
FLOORS = (
    {"errors"},
    {"units", "dtypes"},
    {"spec"},
    {"arithmetic"},
    {"checkpoints"},
    {"estimator"},
    {"planning"},
    {"runtime"},
    {"lora"},
    {"__init__"},
    {"demo", "tools"},
    {"cli", "notebook", "app"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def floor_of(module: str) -> str:
    """`qwen_vram.spec.formats` -> `arithmetic`; the package itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[str]:
    """Every module of the package that a file imports, at any depth; what is for type checkers alone is left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qwen_vram":
            found.append(node.module)
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names if alias.name.split(".")[0] == "qwen_vram")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        assert LEVEL[floor_of(module)] <= LEVEL[own], f"{path.relative_to(ROOT)} imports {module} from a floor above"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_on_its_floor(path):
    if path.relative_to(ROOT).parts[0] in ("runtime", "lora", "tools"):
        return
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not names & {"torch", "transformers", "accelerate", "bitsandbytes", "safetensors"}


PROBE = """
import sys
before = set(sys.modules)
import qwen_vram
{extra}
qwen_vram.estimate_vram("Qwen2.5-7B-Instruct")
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new - set(sys.stdlib_module_names) - {{"qwen_vram"}}))
"""


def outsiders(extra: str = "") -> str:
    probe = [sys.executable, "-c", PROBE.format(extra=extra)]
    return subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()


def test_import_and_one_estimate_load_the_standard_library_alone():
    assert outsiders() == "[]"


def test_the_probe_above_would_notice():
    assert "rich" in outsiders("import rich")


def test_all_is_sorted_and_complete():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for guard in tree.body
        if isinstance(guard, ast.If)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"qwen_vram.{module}" for name, module in qwen_vram._HOME.items()}
    assert set(qwen_vram.__all__) == set(typed)
    assert qwen_vram.__all__ == sorted(
        qwen_vram.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in qwen_vram.__all__:
        assert getattr(qwen_vram, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qwen_vram' has no attribute 'lode'"):
        _ = qwen_vram.lode
