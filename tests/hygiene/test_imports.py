"""Importing the package loads nothing outside the standard library, and its names are the public ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_vram

ROOT = Path(qwen_vram.__file__).parent

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
