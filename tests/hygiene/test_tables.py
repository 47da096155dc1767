"""Code asks the row of a storage or KV format for its facts, and compares no name, library, kernel or bits."""

import ast

import pytest

from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.kv_formats import KV_FORMATS
from tests.hygiene import layout

NAMES = {*FORMATS, *KV_FORMATS, *(row.kernel for row in FORMATS.values())}
FACTS = {"library", "bits", "kernel"}
# Triton compiles a kernel for the text of its format, which no table can be looked up in.
ALLOWED = {"runtime/linear/few_rows_kernels"}


def compared(tree):
    """The lines where a format's name or a fact of its row is held against something; arguments of calls may be."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    sides = [side for node in nodes for side in (node.left, *node.comparators) if not isinstance(side, ast.Call)]
    parts = [part for side in sides for part in ast.walk(side)]
    return {part.lineno for part in parts if getattr(part, "value", 0) in NAMES or getattr(part, "attr", "") in FACTS}


def test_nothing_compares_formats_by_name():
    modules = {name: layout.parsed(path) for name, path in layout.modules().items() if name.split("/")[0] != "spec"}
    assert {name for name, tree in modules.items() if compared(tree)} == ALLOWED


@pytest.mark.parametrize("line", ["a.library != b", "x in ('nf4', y)", "4 == a.bits", "x == ('int8' if y else z)"])
def test_the_walk_above_would_notice(line):
    assert compared(ast.parse(line))
