"""What the documentation shows is what the library does."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import qwen_vram
from qwen_vram.spec.profile import CHOICES, CHOICES_OR_NONE, KNOBS
from tests.helpers.command import python

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Written in Triton, which torch for the CPU does not bring.
TRITON = (
    "qwen_vram.runtime.attention.decode_kernels",
    "qwen_vram.runtime.kernels.triton_kernels",
    "qwen_vram.runtime.linear.few_rows_kernels",
    "qwen_vram.runtime.linear.int4_kernels",
    "qwen_vram.runtime.linear.many_rows_kernels",
)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(qwen_vram.__path__, "qwen_vram.")
    if not module.name.endswith("__main__") and (module.name not in TRITON or find_spec("triton"))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sessions_on_a_page_give_what_they_show(page):
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@cache
def python_files():
    """Paths of the repository's Python files; an environment in it has many thousands of others."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = set(re.findall(r"`([\w/]+\.py)(?:::\w+)?`", page.read_text())) - {"zero_to_fp32.py"}  # of DeepSpeed
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in python_files())] == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_show(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_reference_names_every_knob_profile_and_error():
    rows = dict(
        re.findall(r"^\| `\"?(\w[\w-]*)\"?`[^|]*\| (.*)\|$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    )
    plain = qwen_vram.Profile()
    named = CHOICES | {"dequantization": CHOICES_OR_NONE["dequantization"]}
    for knob in KNOBS:
        assert rows[knob].startswith(f"`{getattr(plain, knob)!r}`".replace("'", '"')), knob
        assert all(f'`"{value}"`' in rows[knob] for value in named.get(knob, ())), knob
    assert rows.keys() >= {"auto", *qwen_vram.PROFILES}
    assert rows.keys() >= {name for name in qwen_vram.__all__ if name.endswith("Error")} - {"QwenVramError"}


# tests/serving/test_example.py runs this one, with a server.
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {ROOT / "examples" / "server_client.py"})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example):
    code = example.read_text(encoding="utf-8")
    if "qv.load(" in code:  # it would spend seconds on torch's import
        result = python(code)
    else:
        result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_readme_shows_the_demos_real_output(demo_output):
    shown = (ROOT / "README.md").read_text().split("```text\n", 1)[1].split("```", 1)[0]
    for line in shown.splitlines():
        assert line in demo_output, line
