"""The environment of vLLM that `make test-vllm` sets up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vllm_environment() -> Path:
    """The folder of vLLM's environment: `VLLM_ENVIRONMENT`, or the one of `make test-vllm`."""
    folder = Path(os.environ.get("VLLM_ENVIRONMENT") or Path(__file__).parents[2] / ".venv" / "vllm")
    if not (folder / "bin" / "vllm").exists():
        pytest.skip(f"there is no vLLM in {folder}: make test-vllm sets one up")
    return folder


@pytest.fixture(scope="session")
def vllm_on_cpu(vllm_environment: Path) -> bool:
    """Tell if the environment has vLLM's build for CPUs."""
    code = "from vllm.platforms import current_platform; print(current_platform.is_cpu())"
    python = vllm_environment / "bin" / "python"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return result.stdout.split()[-1] == "True"
