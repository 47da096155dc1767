"""A server of the bundled checkpoint for the tests of a session, whose budget is tight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_vram as qv
from tests.helpers.server import Server

# Prompts of at most 3,000 tokens, with a cache of 3,200. The limit leaves less than a cache of 4,096 needs.
LENGTHS = {"prompt_len": 3000, "max_new_tokens": 200}
MIB = 2**20


@pytest.fixture(scope="session")
def tight(demo: Path) -> int:
    """The host memory that the plan needs, and no more."""
    with pytest.raises(qv.DoesNotFitError) as caught:
        qv.plan(demo, profile="default", ram=MIB, **LENGTHS)
    return int(caught.value.needed_bytes)


@pytest.fixture(scope="session")
def server(demo: Path, tight: int) -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="needs: pip install 'qwen-vram[serve]'")
    pytest.importorskip("uvicorn", reason="needs: pip install 'qwen-vram[serve]'")
    pytest.importorskip("openai")
    options = ("--profile", "default", "--prompt-len", 3000, "--max-new-tokens", 200, "--ram", f"{tight}B")
    with Server(demo, *options) as started:
        yield started.ready()


@pytest.fixture(scope="session")
def alone(demo: Path) -> Iterator[qv.LoadedModel]:
    """The same model in this process, which gives the answers to expect."""
    with qv.load(demo, profile="default", device="cpu", progress=False, **LENGTHS) as llm:
        yield llm
