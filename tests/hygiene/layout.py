"""The layout of the package: imports between modules, and tables of modules.

`python -m tests.hygiene.layout` writes the tables in the folders' docstrings and the tree in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "qwen_vram"
MAP = ROOT.parent / "docs" / "architecture.md"
# Floors from the ground up: imports go down.
FLOORS = (
    "errors", "units", "dtypes", "spec", "arithmetic", "checkpoints", "estimator", "planning", "fleet", "monitor",
    "runtime", "lora", "demo", "diagnosis", "benchmark", "quality", "__init__", "serving", "tools", "cli", "__main__",
)  # fmt: skip
_BEGIN, _END = "<!-- modules: written by python -m tests.hygiene.layout -->", "<!-- end of modules -->"
WIDTH = 120


def modules() -> dict[str, Path]:
    """Every module by its path in the package, such as `spec/rope`; a package is its folder's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        found[name if name == "__init__" else name.removesuffix("/__init__")] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def edges() -> dict[str, set[str]]:
    """The modules that each module imports, at any depth and for type checkers alone too."""
    known = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(parsed(path)):
            for target in _imported(node):
                inner = target.removeprefix("qwen_vram").lstrip(".").replace(".", "/") or "__init__"
                while inner not in known:
                    inner = inner.rpartition("/")[0] or "__init__"
                if inner != name:
                    found[name].add(inner)
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "qwen_vram"]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qwen_vram":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(parsed(path)) or "").partition("\n")[0]


def inside(folder: Path) -> list[tuple[str, str]]:
    """Name and first line of each module and folder in a folder of the package."""
    rows = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            rows.append((f"{path.name}/", first_line(path / "__init__.py")))
        elif path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
            rows.append((path.stem, first_line(path)))
    return rows


def folders() -> list[Path]:
    """Every folder of the package with modules in it, but its root."""
    return [path.parent for path in sorted(ROOT.rglob("__init__.py")) if path.parent != ROOT and inside(path.parent)]


def docstring(folder: Path) -> str:
    """The docstring of a folder's `__init__`: what its own words say, then a table of its modules."""
    own = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    words = own.partition("\n\nModules:\n")[0].rstrip()
    rows = inside(folder)
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"    {name:{width}}  {line}" for name, line in rows)
    return f"{words}\n\nModules:\n{table}\n"


def tree() -> str:
    """Every module with its first line, floor by floor, as docs/architecture.md shows it."""
    names = {name.rstrip("/"): (name, line) for name, line in inside(ROOT)}
    parts = [["qwen_vram/"]]
    for floor in FLOORS:
        if floor in names:
            name, line = names[floor]
            parts[-1].append(f"  {name:14}{line}")
            for folder in folders():
                inner = folder.relative_to(ROOT)
                if inner.parts[0] == floor:
                    if len(inner.parts) > 1:
                        parts[-1].append(f"    {'/'.join(inner.parts[1:])}/")
                    indent = "      " if len(inner.parts) > 1 else "    "
                    parts[-1] += [f"{indent}{name:22}{line}" for name, line in inside(folder) if name[-1] != "/"]
    return "\n".join(parts[0])


def architecture() -> str:
    """docs/architecture.md with the tree as it is now."""
    text = MAP.read_text()
    return re.sub(
        f"{re.escape(_BEGIN)}.*{re.escape(_END)}",
        lambda _: f"{_BEGIN}\n\n```text\n{tree()}\n```\n\n{_END}",
        text,
        flags=re.DOTALL,
    )


def ways() -> list[tuple[str, list[tuple[str, str]]]]:
    """The ways through the code in docs/architecture.md: name, and module and function of each step."""
    found = []
    for part in MAP.read_text().split("\n### `")[1:]:
        name, _, text = part.partition("`\n")
        spans = re.findall(r"`([a-z_/0-9]+)\.(\w+)`", text.partition("\n## ")[0])
        found.append((name, spans))
    return found


def write() -> None:
    """Write every folder's table and the map."""
    for folder in reversed(folders()):
        path = folder / "__init__.py"
        text = path.read_text()
        end = ast.parse(text).body[0].end_lineno or 1
        rest = text.split("\n")[end:]
        path.write_text("\n".join([f'"""{docstring(folder)}"""', *rest]))
    MAP.write_text(architecture())


if __name__ == "__main__":
    write()
