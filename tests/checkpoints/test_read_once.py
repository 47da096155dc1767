"""What a call opens of a checkpoint folder, what is held of it between calls, and what a first estimate imports."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.checkpoints.files.state import settled_state

pytestmark = pytest.mark.torch  # of most calls that are asked
ROOT = str(Path(qv.__file__).parent)
ASKED = {"profile": "default", "prompt_len": 64, "max_new_tokens": 16}


class Opens:
    """The files of a folder that the package opens, by name; what libraries open by themselves is theirs."""

    def __init__(self):
        self.folder = None
        self.found = Counter()
        sys.addaudithook(self._opened)

    def of(self, folder, call):
        self.folder, self.found = str(folder), Counter()
        try:
            result = call()
        finally:
            self.folder = None
        if hasattr(result, "close"):
            result.close()
        return dict(self.found)

    def _opened(self, event, given):
        if event != "open" or self.folder is None or not isinstance(given[0], (str, Path)):
            return
        path = Path(given[0])
        if str(path.parent) == self.folder and self._is_ours():
            self.found[path.name] += 1

    @staticmethod
    def _is_ours():
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(ROOT):
                return True
            if "site-packages" in file:
                return False
            frame = frame.f_back
        return False


@pytest.fixture(scope="module")
def opens():
    return Opens()


@pytest.fixture
def folder(sharded, tmp_path):
    """A folder of shards that was made just now, so that nothing of it is held."""
    made = Path(shutil.copytree(sharded, tmp_path / "model"))
    (made / "generation_config.json").write_text('{"do_sample": false, "num_beams": 1}')
    return made


def readable(folder):
    """Every file whose contents the reader goes by."""
    jsons = ("config.json", "generation_config.json", "model.safetensors.index.json")
    return {name: 1 for name in (*jsons, *(path.name for path in folder.glob("*.safetensors")))}


CALLS = {
    "estimate": lambda folder: qv.estimate_vram(folder, **ASKED),
    "plan": lambda folder: qv.plan(folder, vram="40GiB", **ASKED),
    "plan of the best": lambda folder: qv.plan(folder, vram="850MiB", prompt_len=64, max_new_tokens=16),
    "max_batch": lambda folder: qv.max_batch(folder, "8GiB"),
    "load": lambda folder: qv.load(folder, device="cpu", progress=False, **ASKED),
    "load in nf4": lambda folder: qv.load(folder, device="cpu", weights="nf4", progress=False, **ASKED),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_opens_every_file_once(opens, folder, name):
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert opens.of(folder, lambda: CALLS[name](folder)) == readable(folder)


def test_the_count_above_would_notice_a_second_reading(opens, folder):
    seen = opens.of(folder, lambda: (qv.estimate_vram(folder), (folder / "config.json").touch(), qv.plan(folder)))
    assert set(seen.values()) == {2}


def test_an_estimate_of_a_folder_that_stays_opens_nothing(opens, demo):
    first = qv.estimate_vram(demo)
    assert opens.of(demo, lambda: qv.estimate_vram(demo)) == {}
    assert opens.of(demo, lambda: qv.plan(demo, vram="8GiB")) == {}
    assert qv.estimate_vram(demo) == first


# what is held, and what changes


def rewrite(path, old, new):
    """Other contents of the same length, with the time of the contents as it was."""
    times = path.stat()
    text = path.read_text()
    assert old in text
    assert len(old) == len(new)
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def in_place(folder):
    rewrite(folder / "config.json", '"max_position_embeddings": 4096', '"max_position_embeddings": 2048')


def by_rename(folder):
    other = folder.parent / f"{folder.name} other"
    shutil.copy2(folder / "config.json", other)
    rewrite(other, '"max_position_embeddings": 4096', '"max_position_embeddings": 2048')
    other.replace(folder / "config.json")


def by_link(folder):
    by_rename(folder)
    blob = folder.parent / f"{folder.name} blob"
    (folder / "config.json").replace(blob)
    (folder / "config.json").symlink_to(blob)


def behind_a_link(folder):
    in_place(folder.resolve())


def behind_links_to_files(folder):
    """As in the hub's cache, whose snapshots are links."""
    assert (folder / "config.json").is_symlink()
    in_place(folder)


def as_a_new_one(folder):
    """The folder itself, moved away for another of its name."""
    old = folder.rename(folder.with_name(f"{folder.name} old"))
    shutil.copytree(old, folder, copy_function=shutil.copy2)
    in_place(folder)


def shard_cut_off(folder):
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 2)


def shard_gone(folder):
    next(folder.glob("*.safetensors")).unlink()


def settings_of_a_quantizer(folder):
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')


def broken_generation(folder):
    (folder / "generation_config.json").write_text("{")


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


def nothing(folder):
    """No change."""


CHANGES = {
    in_place: None,
    by_rename: None,
    by_link: None,
    behind_a_link: None,
    behind_links_to_files: None,
    as_a_new_one: None,
    shard_cut_off: (qv.CheckpointError, "is cut off"),
    shard_gone: (qv.CheckpointError, "is missing from"),
    settings_of_a_quantizer: (qv.CheckpointError, "not quantized"),
    broken_generation: (qv.ConfigError, "is cut off"),
    adapter_beside: (qv.AdapterError, "an adapter's adapter_config.json"),
}


@pytest.fixture(scope="module")
def settled(sharded, tmp_path_factory):
    """A folder for each change, none of which changed just now."""
    place = tmp_path_factory.mktemp("settled")
    made = {change: Path(shutil.copytree(sharded, place / change.__name__)) for change in (*CHANGES, nothing)}
    linked = made[behind_a_link].rename(place / "linked")
    made[behind_a_link].symlink_to(linked)
    for path in sorted(made[behind_links_to_files].iterdir()):
        path.symlink_to(path.rename(place / f"blob of {path.name}"))
    while any(settled_state(one) is None for one in made.values()):
        time.sleep(0.1)
    return made


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_by_the_next_call(settled, opens, change):
    folder, refused = settled[change], CHANGES[change]
    assert qv.estimate_vram(folder).architecture.max_position_embeddings == 4096
    assert opens.of(folder, lambda: qv.estimate_vram(folder)) == {}
    change(folder)
    if refused is None:
        assert qv.estimate_vram(folder).architecture.max_position_embeddings == 2048
        return
    with pytest.raises(refused[0], match=refused[1]):
        qv.estimate_vram(folder)


def test_a_file_that_changes_twice_within_the_clock_of_its_disk_is_seen(folder):
    path = folder / "config.json"
    texts = {size: path.read_text().replace(": 4096", f": {size}") for size in (4096, 2048, 1024)}
    assert len({len(text) for text in texts.values()}) == 1
    for turn in range(60):
        size = (4096, 2048, 1024)[turn % 3]
        path.write_text(texts[size])
        assert settled_state(folder) is None
        assert qv.estimate_vram(folder).architecture.max_position_embeddings == size


def test_a_folder_with_an_entry_that_cannot_be_asked_is_read_each_time(settled, opens, tmp_path):
    folder = settled[nothing]
    qv.estimate_vram(folder)
    assert opens.of(folder, lambda: qv.estimate_vram(folder)) == {}
    (folder / "left.link").symlink_to(tmp_path / "gone")
    for _ in range(2):
        assert opens.of(folder, lambda: qv.estimate_vram(folder)).keys() >= {"config.json"}


def test_two_paths_of_one_folder_say_their_own_name(demo, tmp_path):
    (tmp_path / "other name").symlink_to(demo)
    assert (qv.estimate_vram(demo).model, qv.estimate_vram(tmp_path / "other name").model) == (
        "checkpoint",
        "other name",
    )


# what a first estimate imports

FIRST = """
import json, sys
before = set(sys.modules)
import qwen_vram
qwen_vram.estimate_vram({folder!r})
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# Some are folders, which hold a docstring alone. benchmarks/two_trees.py measures what they cost in a fresh process.
# Words for errors, the hub, the catalog, plans and tables of results come in when they are needed.
MOST_MODULES = 57  # of a Qwen3, whose family takes keys of that of Qwen2; 56 of a Qwen2
NOT_NEEDED = {
    "checkpoints.adapters", "checkpoints.files.absent", "checkpoints.files.contents", "checkpoints.files.same_bytes",
    "checkpoints.hub", "checkpoints.hub.files", "checkpoints.hub.errors", "checkpoints.tensors.advice",
    "checkpoints.tensors.prequantized", "checkpoints.tensors.prequantized_advice",
    "checkpoints.tensors.prequantized_matrix", "spec.catalog", "spec.quantizers", "arithmetic.render",
    "arithmetic.session", "lora", "planning", "runtime", "spec.prequantized", "arithmetic.decode_graph",
    "arithmetic.int8_outliers", "arithmetic.replay.load_prequantized", "units",
}  # fmt: skip


def first_imports(folder):
    probe = [sys.executable, "-c", FIRST.format(folder=str(folder))]
    return json.loads(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen3", "sharded", "demo"])
def test_a_first_estimate_of_a_good_folder_imports_no_more_than_it_needs(kind, request):
    found = first_imports(request.getfixturevalue(kind))
    own = {name.partition(".")[2] for name in found if name.split(".")[0] == "qwen_vram"}
    others = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"qwen_vram"}
    assert others == set()  # neither torch, transformers, peft, nor huggingface_hub
    assert "logging" not in found
    assert not own & NOT_NEEDED
    assert len(own) <= MOST_MODULES


def test_a_first_estimate_of_a_name_imports_no_reader_of_folders():
    own = {name.partition(".")[2] for name in first_imports("Qwen2.5-7B-Instruct")}
    assert {"spec.catalog", "checkpoints.resolve"} <= own
    assert not own & {"checkpoints.checkpoint", "checkpoints.tensors", "checkpoints.files.state"}


def test_the_probe_above_would_notice_what_words_an_error(tmp_path, untied):
    folder = Path(shutil.copytree(untied, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    code = FIRST.format(folder=str(folder)).replace("qwen_vram.estimate_vram(", "try_it(").replace(
        "import qwen_vram\n", "import qwen_vram\ndef try_it(folder):\n    try: qwen_vram.estimate_vram(folder)\n"
        "    except qwen_vram.AdapterError: pass\n"
    )  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "qwen_vram.checkpoints.adapters.folder" in json.loads(found)
