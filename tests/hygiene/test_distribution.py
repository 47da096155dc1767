"""The published files: a source distribution, a wheel made of it, and the wheel in an environment of its own."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import distributions
from pathlib import Path

import pytest

import qwen_vram as qv
from tests.helpers.shared import made_once

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qwen_vram"
# Not by find_spec: setuptools' hook takes a search for pip as a build's, and gives distutils back to Python for good.
INSTALLED = {one.metadata["Name"] for one in distributions()}
NEEDED = sorted({"build", "hatchling", "pip"} - INSTALLED)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDED), reason=f"needs {' and '.join(NEEDED)}, of which 'qwen-vram[dev]' installs all but pip"
    ),
]


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made of the source distribution as PyPI would hold it; nothing is downloaded."""

    def build(out):
        out.mkdir()
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)

    out = made_once(tmp_path_factory, "dist", build)
    assert [path.name for path in out.glob("*.tar.gz")] == [f"qwen_vram-{qv.__version__}.tar.gz"]
    (made,) = out.glob("*.whl")
    return made


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"qwen_vram-{qv.__version__}.dist-info/METADATA"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(f"qwen_vram-{qv.__version__}.dist-info/")}
        texts = {
            name: archive.read(name) for name in archive.namelist() if name.endswith((".dist-info/licenses/LICENSE",))
        }
    assert held == files
    expected = {
        "qwen_vram/py.typed",
        "qwen_vram/demo/checkpoint/model.safetensors",
        "qwen_vram/demo/checkpoint/config.json",
    }
    assert expected <= held
    assert list(texts.values()) == [(ROOT / "LICENSE").read_bytes()]


def test_the_version_stands_in_one_place(wheel):
    """`__init__.py` has it: an import must not read metadata, and the build takes it from there."""
    about = metadata(wheel)
    assert about["Version"] == qv.__version__
    assert wheel.name == f"qwen_vram-{qv.__version__}-py3-none-any.whl"
    written = [
        path for path in (ROOT / "pyproject.toml", *PACKAGE.rglob("*.py")) if f'"{qv.__version__}"' in path.read_text()
    ]
    assert written == [PACKAGE / "__init__.py"]
    # The newest section is that of this version, or says which version it will be.
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    named = re.match(r"\[(\d+\.\d+\.\d+)\]", newest) or re.search(r"will be version (\d+\.\d+\.\d+)", newest)
    assert named
    assert named[1] == qv.__version__


def test_every_extra_has_code_behind_it(wheel):
    """An extra is there for code that imports what it installs; `dev` is for this repository."""
    about = metadata(wheel)
    extras = set(about.get_all("Provides-Extra")) - {"dev"}
    assert extras == {"gptq", "lora", "plot", "serve"}
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for extra in extras:
        asked = [line for line in about.get_all("Requires-Dist") if f"extra == '{extra}'" in line.replace('"', "'")]
        first = re.match(r"[\w-]+", asked[0])[0]
        assert re.search(rf"\b(import|from|find_spec\(\") ?{first}\b", code), f"nothing imports {first}"


def test_the_wheel_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """Its dependencies are those of the tests, behind it on the path, where no editable install of ours is seen."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python, script = str(scripts / "python"), str(scripts / "qwen-vram")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    run(*install, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    behind = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(behind))

    where = run(python, "-c", "import qwen_vram; print(qwen_vram.__file__)", cwd=tmp_path).strip()
    assert Path(where) == site / "qwen_vram" / "__init__.py"
    assert run(script, "--version", cwd=tmp_path) == f"qwen-vram {qv.__version__}\n"
    estimate = json.loads(run(script, "estimate", "Qwen2.5-7B-Instruct", "--json", cwd=tmp_path))
    assert estimate["weights"] == qv.estimate_vram("Qwen2.5-7B-Instruct").weights
    bundled = "import qwen_vram as qv, qwen_vram.demo as d; print(qv.estimate_vram(d.CHECKPOINT).weights)"
    assert int(run(python, "-c", bundled, cwd=tmp_path)) == qv.estimate_vram(PACKAGE / "demo" / "checkpoint").weights
