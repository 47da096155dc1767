"""The example and the commands of docs/serving.md work as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def test_the_example_runs_as_the_page_shows_it(server, alone):
    example = [sys.executable, str(ROOT / "examples" / "server_client.py"), server.url]
    result = subprocess.run(example, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == alone.chat("What is 96 * 9?", temperature=0)
    assert lines[2] == lines[0].partition(" = ")[0]
    assert lines[-1] == "context_length_exceeded"
    shown = PAGE.split("$ python examples/server_client.py\n", 1)[1].split("```", 1)[0].splitlines()
    assert len(shown) == len(lines) == 6
    for there, here in zip(shown, lines):
        # Log probabilities differ in their last digits between processors.
        assert re.sub(r"-\d[\d.e-]*$", "", there) == re.sub(r"-\d[\d.e-]*$", "", here)


def test_the_commands_of_curl_on_the_page_give_what_they_show(server):
    found = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n([\s\S]*?)(?=^\$ |^```)", PAGE, re.M)
    assert len(found) >= 3
    for command, shown in found:
        here = command.replace("http://127.0.0.1:8000", server.url)
        result = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=120, env={**os.environ})
        assert _stable(result.stdout) == _stable(shown), command


def _stable(text):
    """An answer without its id, its time, and empty lines."""
    text = re.sub(r'"id": ?"(chat)?cmpl-\w+"', '"id": "..."', text)
    text = re.sub(r'"created": ?\d+', '"created": 0', text)
    return [line for line in text.splitlines() if line.strip()]
