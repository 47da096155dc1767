"""A checkpoint of a published shape for the tests of decode steps on a GPU."""

import pytest

from qwen_vram.tools.accuracy import make_checkpoint


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights of Qwen2.5-0.5B's shape."""
    folder = tmp_path_factory.mktemp("published")
    make_checkpoint("Qwen2.5-0.5B", folder)
    return folder
