"""The catalog: published dense Qwen2.5 and Qwen3 checkpoints, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from qwen_vram.errors import UnknownNameError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.catalog_rows import ROWS, Row

CATALOG: dict[str, Row] = {row.repo_id: row for row in ROWS}
_BY_NAME = {key.lower(): row for row in ROWS for key in (row.repo_id, row.repo_id.partition("/")[2])}


def catalog_row(name: str) -> Row | None:
    """The row called `name`, with or without its organization, in any case; `None` if it is not in the catalog."""
    return _BY_NAME.get(name.lower())


@cache
def row_architecture(row: Row) -> Architecture:
    """The architecture of a row, read from its numbers as from a config.json."""
    return Architecture.from_config(
        {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings}, source=row.repo_id
    )


def find(name: str) -> Architecture:
    """The architecture of the published checkpoint called `name`.

    Raises:
        UnknownNameError: no such row; the closest names are listed.
    """
    row = catalog_row(name)
    if row is None:
        raise unknown_model(name)
    return row_architecture(row)


def unknown_model(name: str) -> UnknownNameError:
    """The error for a name that is neither in the catalog, nor a folder, nor a hub id."""
    from difflib import get_close_matches  # slow to import, and only needed here

    short = {repo_id.partition("/")[2].lower(): repo_id.partition("/")[2] for repo_id in CATALOG}
    plain = name.lower().replace(" ", "-")
    base = plain.removesuffix(".gguf").removesuffix("-gguf")
    if base != plain:
        near = (short[base],) if base in short else tuple(short[one] for one in _near(base, short, get_close_matches))
        return UnknownNameError("model", name, near, hint="the files of a '-GGUF' name are llama.cpp's, and not read")
    near = tuple(short[one] for one in _near(plain, short, get_close_matches))
    return UnknownNameError(
        "model", name, near, hint="or pass a hub id such as 'organisation/name', a checkpoint folder, or a config dict"
    )


def _near(name: str, names: Mapping[str, str], matches: Callable[..., list[str]]) -> list[str]:
    return matches(name, list(names), n=4, cutoff=0.5) or ["qwen2.5-7b-instruct", "qwen3-8b"]
