"""The files by which others work on this repository: what they name is there, and they agree."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PINS = {
    found.name: found
    for found in map(Requirement, re.findall(r"^[^#\s].*$", (ROOT / "constraints.txt").read_text(), re.M))
}


def steps(workflow):
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job.get("steps", ())]


def test_every_make_target_that_is_named_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [
        (ROOT / "CONTRIBUTING.md").read_text(),
        *(step.get("run", "") for name in WORKFLOWS for step in steps(name)),
    ]
    named = {target for text in texts for target in re.findall(r"\bmake ([a-z-]+)", text)}
    assert {"test", "test-all", "test-no-torch", "gpu-test"} <= named
    assert named <= targets


def test_the_workflows_run_every_python_that_the_package_says_it_supports():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    lowest = [step["with"]["python-version"] for step in WORKFLOWS["test"]["jobs"]["lowest"]["steps"] if "with" in step]
    assert lowest == [named[0]]


def test_a_release_publishes_what_the_tests_built():
    release, test = WORKFLOWS["release"]["jobs"], WORKFLOWS["test"]["jobs"]
    assert release["test"]["uses"] == "./.github/workflows/test.yml"
    assert release["publish"]["needs"] == "test"
    assert release["publish"]["permissions"] == {"id-token": "write"}
    artifact = [
        step["with"]["name"]
        for step in (*test["build"]["steps"], *release["publish"]["steps"])
        if "name" in step.get("with", {})
    ]
    assert artifact == ["dist", "dist"]


@pytest.mark.parametrize("hook", ["ruff-format", "ruff-check", "mypy"])
def test_a_commit_is_checked_by_the_tools_that_constraints_pin(hook):
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    (found,) = [one for one in repository["hooks"] if one["id"] == hook]
    tool = found["entry"].split()[0].removeprefix(".venv/bin/")
    assert tool == hook.partition("-")[0]
    assert [str(spec)[:2] for spec in PINS[tool].specifier] == ["=="]
    assert tool in {Requirement(one).name for one in PROJECT["optional-dependencies"]["dev"]}


def test_what_constraints_pin_is_allowed_by_the_package():
    """A bound above the pinned version would make `make test` and an install differ."""
    extras = PROJECT["optional-dependencies"].values()
    asked = [Requirement(one) for many in (PROJECT["dependencies"], *extras) for one in many]
    for one in asked:
        pinned = [
            line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{one.name}==")
        ]
        assert pinned, f"constraints.txt does not pin {one.name}"
        for line in pinned:
            version = Version(next(iter(Requirement(line).specifier)).version)
            assert version in one.specifier, f"{line} is not {one}"
