"""What a merge writes beside the weights, where, how much memory it takes, and what its report proves."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_vram.lora import tensor_file as stored_module
from qwen_vram.lora.codecs.registry import QUANTIZATIONS
from qwen_vram.lora.merge import merge_lora_then_quantize
from qwen_vram.runtime.quantize_on_load import LINEARS
from tests.conftest import make_checkpoint
from tests.helpers import command
from tests.helpers.forked import python
from tests.helpers.hub_server import serving
from tests.helpers.lora_models import (
    assert_same,
    edit_config,
    edit_tensors,
    load,
    make_adapter,
    make_base,
    peft_merged,
    peft_model,
    rounded_tensors,
    stored,
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", hidden_size=128, intermediate_size=128)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=LINEAR, size=0.02)


def merge(base, adapter, out, **options):
    return merge_lora_then_quantize(
        base, adapter, out, **{"quantize": None, "device": "cpu", "progress": False, **options}
    )


# files


def test_a_checkpoint_with_a_tokenizer_answers_after_the_merge(untied, tmp_path):
    """The demo's tokenizer, chat template and generation settings go along, and the folder is complete."""
    base = Path(shutil.copytree(untied, tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    (base / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    merge(base, adapter, tmp_path / "out")
    carried = {path.name for path in base.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= carried
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == carried | {"model.safetensors", "config.json", "merge_report.json"}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_files_of_other_kinds_stay_behind(base, adapter, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "adapter_config.json", "merge_report.json"):
        (folder / name).write_text("left")
    for name in ("LICENSE", "vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_text("carried")
    merge(folder, adapter, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    carried = {"LICENSE", "vocab.json", "merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja"}
    own = {"config.json", "generation_config.json", "model.safetensors", "merge_report.json"}
    assert names == carried | own


def test_the_tokenizer_comes_from_the_adapter_where_it_changes_the_tables(base, tmp_path):
    made = {
        "plain": make_adapter(base, tmp_path / "plain", target_modules=["q_proj"]),
        "tokens": make_adapter(base, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[1]),
        "resized": make_adapter(base, tmp_path / "resized", target_modules=["q_proj"], resize=170),
    }
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    for where in (folder, *made.values()):
        (where / "tokenizer_config.json").write_text(json.dumps({"of": where.name}))
        (where / "chat_template.jinja").write_text(where.name)
    (folder / "vocab.json").write_text("{}")
    (made["resized"] / "trainer_state.json").write_text("{}")
    for name, adapter in made.items():
        report = merge(folder, adapter, tmp_path / f"out-{name}")
        source = folder if name == "plain" else adapter
        assert report.tokenizer == str(source)
        assert json.loads((tmp_path / f"out-{name}" / "tokenizer_config.json").read_text()) == {"of": source.name}
        assert (tmp_path / f"out-{name}" / "chat_template.jinja").read_text() == source.name
        assert (tmp_path / f"out-{name}" / "vocab.json").exists() is (name == "plain")
        assert not (tmp_path / f"out-{name}" / "trainer_state.json").exists()


def test_config_json_keeps_what_the_merge_does_not_change(base, adapter, tmp_path):
    merge(base, adapter, tmp_path / "out")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    assert ours == theirs


def test_shards_and_their_index(tmp_path):
    base = make_checkpoint(tmp_path / "base", max_shard_size="1MB")
    assert len(list(base.glob("*.safetensors"))) > 3
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    report = merge(base, adapter, tmp_path / "out", max_shard_size="2MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "out")
    assert set(index["weight_map"].values()) == set(report.files)
    assert len(report.files) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.get_slice(name) is not None
    assert sorted(index["weight_map"]) == sorted(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total == report.total_bytes
    for file in report.files:
        assert sum(tensors[name].nbytes for name, where in index["weight_map"].items() if where == file) <= 2_000_000
    assert_same(tensors, rounded_tensors(peft_merged(peft_model(base, adapter))))


@pytest.mark.parametrize("quantize", [None, *QUANTIZATIONS])
def test_every_tensor_lies_on_a_multiple_of_its_item_size(base, adapter, tmp_path, quantize):
    """safetensors and whoever maps its files ask for that."""
    merge(base, adapter, tmp_path / "out", quantize=quantize)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name
    assert len(raw) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


def test_tensors_that_the_model_does_not_know_are_carried_along(base, adapter, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    extra = {"rotary.inv_freq": torch.rand(7), "counts": torch.arange(5), "scalar": torch.tensor(3, dtype=torch.int32)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    merge(folder, adapter, tmp_path / "out")
    for name, tensor in extra.items():
        assert torch.equal(stored(tmp_path / "out")[name], tensor)


def test_an_output_in_folders_that_are_not_there_yet(base, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "empty"):
        merge(base, adapter, out)
        assert (out / "config.json").is_file()


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_updates_that_cancel_leave_nothing_to_keep(base, adapter, tmp_path, quantize):
    report = merge_lora_then_quantize(
        base, [(adapter, 1.0), (adapter, -1.0)], tmp_path / "out", quantize=quantize, progress=False
    )
    assert report.share is None
    assert not report.worst
    assert ": nothing to keep\n" in str(report)
    assert max(module.relative_size for module in report.modules) < 1e-6


def test_overwriting_swaps_the_whole_folder(base, adapter, tmp_path):
    merge(base, adapter, tmp_path / "out", quantize="nf4")
    (tmp_path / "out" / "stale.json").write_text("{}")
    merge(base, adapter, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.json").exists()
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(peft_model(base, adapter))))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_away(base, adapter, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".out.partial.lock").write_text("")
    merge(base, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_room_that_is_asked_for_is_the_room_that_is_taken(base, adapter, tmp_path, monkeypatch):
    from qwen_vram.lora import merge as merge_module

    asked = []
    real = merge_module.OutputFolder
    monkeypatch.setattr(
        merge_module,
        "OutputFolder",
        lambda *args, **options: (asked.append(options["needed_bytes"]), real(*args, **options))[1],
    )
    for quantize in (None, *QUANTIZATIONS):
        merge(base, adapter, tmp_path / str(quantize), quantize=quantize)
        taken = sum(path.stat().st_size for path in (tmp_path / str(quantize)).iterdir())
        assert taken <= asked[-1] <= taken + 2**22 + 14 * 512


def test_by_hub_id(base, adapter, tmp_path):
    code = (
        "from qwen_vram.lora.merge import merge_lora_then_quantize as merge; "
        f"merge('someone/base', ['someone/adapter'], {str(tmp_path / 'out')!r}, quantize=None, device='cpu', "
        "progress=False)"
    )
    with serving({"someone/base": base, "someone/adapter": adapter}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HUB_CACHE"] = str(tmp_path / "cache" / "hub")
        command.python(code, environment={**os.environ, **environment}).check_returncode()
    merge(base, adapter, tmp_path / "local")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "local"))


# the run


def test_the_bar_is_on_standard_error_and_can_be_switched_off(base, adapter, tmp_path, capfd):
    merge(base, adapter, tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    merge(base, adapter, tmp_path / "loud", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "merging" in err


def test_torchs_settings_come_back_and_do_not_count(base, adapter, tmp_path):
    """A caller who allows coarse products elsewhere gets exact ones here."""
    merge(base, adapter, tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        merge(base, adapter, tmp_path / "other")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "other"))


TABLE_ROWS = 24_000
MEMORY = """
import sys
from pathlib import Path
import bitsandbytes, torch, rich.progress, rich.console
from transformers import BitsAndBytesConfig
from qwen_vram.lora.merge import merge_lora_then_quantize
BitsAndBytesConfig(load_in_4bit=True)
base, adapter, out, quantize = sys.argv[1:]
def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
merge_lora_then_quantize(base, adapter, out, quantize=None if quantize == "None" else quantize, device="cpu",
                         progress=False)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A base of two tables of 98 MB in float32 each, with little else, and an adapter for both."""
    root = tmp_path_factory.mktemp("tables")
    shape = {"vocab_size": TABLE_ROWS, "hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 256}
    base = make_base(root / "base", **shape)
    adapter = root / "adapter"
    adapter.mkdir()
    prefix = "base_model.model."
    tensors = {
        f"{prefix}model.embed_tokens.lora_embedding_A": torch.randn(16, TABLE_ROWS) * 0.01,
        f"{prefix}model.embed_tokens.lora_embedding_B": torch.randn(1024, 16) * 0.01,
        f"{prefix}lm_head.lora_A.weight": torch.randn(16, 1024) * 0.01,
        f"{prefix}lm_head.lora_B.weight": torch.randn(TABLE_ROWS, 16) * 0.01,
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32}))
    return base, adapter


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("quantize", [None, "nf4", "int4"])
def test_no_table_is_ever_in_memory_as_a_whole(tables, tmp_path, quantize):
    """Both tables are merged in less memory than one of them takes in float32."""
    finished = python(MEMORY, *tables, tmp_path / "out", quantize)
    finished.check_returncode()
    print(finished.stdout)
    assert int(finished.stdout.splitlines()[-1]) < TABLE_ROWS * 1024 * 4


def test_pieces_tile_the_rows(monkeypatch):
    """No gap, no overlap, no cut block, and no piece so low that BLAS would round otherwise than for the whole."""
    for seed in range(2000):
        rng = random.Random(seed)
        monkeypatch.setattr(stored_module, "PIECE", rng.choice([2048, 2**21]))
        columns, step = rng.randint(1, 20_000), rng.choice([1, 2, 4, 64])
        rows = rng.randint(1, rng.choice([300, 20_000]))
        found = stored_module.pieces(rows, columns, step=step)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == rows
        for start, stop in found:
            assert start % step == 0
            assert stop - start >= min(rows, 32)
            assert stop - start <= max(stored_module.PIECE // columns, 64, 2 * step) + step


# the proof


def decoded(folder: Path, name: str, quantize: str | None, shape) -> torch.Tensor:
    """A stored weight as the model computes with it, from the file alone."""
    tensors = stored(folder)
    if quantize is None:
        return tensors[name].float()
    if quantize == "int8":
        return int8_vectorwise_dequant(tensors[name], tensors[name.replace(".weight", ".SCB")])
    if quantize in LINEARS:
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="meta")
        LINEARS[quantize].adopt(layer, stored=True)
        layer.weight = torch.nn.Parameter(tensors[name], requires_grad=False)
        setattr(layer, layer.scales, tensors[name.replace("weight", layer.scales)])
        layer.restore()
        return layer.dequantize(0, shape[0], torch.float32)
    from bitsandbytes.functional import QuantState

    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(parts, device="cpu")
    state.dtype = torch.float32
    return dequantize_4bit(tensors[name], state).view(shape)


@pytest.mark.parametrize("piece", [2**21, 2048])
@pytest.mark.parametrize("quantize", [None, *QUANTIZATIONS])
def test_the_proof_is_what_its_formula_says(base, adapter, tmp_path, monkeypatch, quantize, piece):
    monkeypatch.setattr(stored_module, "PIECE", piece)
    report = merge(base, adapter, tmp_path / "out", quantize=quantize)
    start, merged = load(base).state_dict(), peft_merged(peft_model(base, adapter)).state_dict()
    assert {module.name for module in report.modules} == {
        f"model.layers.{layer}.{block}.weight"
        for layer in (0, 1)
        for block in [f"self_attn.{name}" for name in LINEAR[:4]] + [f"mlp.{name}" for name in LINEAR[4:]]
    }
    for module in report.modules:
        assert module.format == (quantize or "bf16")
        update = (merged[module.name] - start[module.name]).double()
        kept = decoded(tmp_path / "out", module.name, quantize, update.shape)
        share = float(((kept - start[module.name]).double() * update).sum() / (update * update).sum())
        assert module.share == pytest.approx(share, abs=1e-4)
        error = float((kept - merged[module.name]).abs().max())
        if quantize in ("nf4", "fp4"):
            assert error <= module.largest_error * (1 + 1e-6)
            assert module.largest_error <= 1.1 * error
        else:
            assert module.largest_error == pytest.approx(error, rel=1e-4)
        size = float(update.norm() / start[module.name].double().norm())
        assert module.relative_size == pytest.approx(size, rel=1e-5)
    assert report.share == pytest.approx(sum(module.share for module in report.modules) / 14)


def test_the_report_in_the_folder_is_the_one_that_is_returned(base, adapter, tmp_path):
    report = merge(base, adapter, tmp_path / "out", quantize="nf4")
    saved = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["quantize"] == "nf4"
    assert saved["adapters"] == [[str(adapter), 1.0]]
    assert not saved["untied"]


def test_the_table_names_every_module(base, adapter, tmp_path):
    report = merge(base, adapter, tmp_path / "out", quantize="int8")
    lines = str(report).splitlines()
    assert lines[0].startswith("14 tensors merged into ")
    assert lines[1].split() == ["module", "format", "kept", "size", "largest", "error"]
    assert [line.split()[0] for line in lines[2:]] == [module.name for module in report.modules]
    assert all(line.split()[1] == "int8" and line.split()[2].endswith("%") for line in lines[2:])


def test_many_modules_are_summed_up_by_kind(tmp_path):
    base = make_base(tmp_path / "base", num_hidden_layers=6)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    report = merge(base, adapter, tmp_path / "out")
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(LINEAR)
    assert any(line.startswith("model.layers.self_attn.q_proj.weight x 6 ") for line in lines)
    assert len(report.table().splitlines()) == 1 + 42


def test_an_update_that_is_lost_is_warned_about(base, tmp_path):
    """Smaller than half a step of bf16, an update leaves the weights where they were."""
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], size=1e-6)
    with pytest.warns(UserWarning, match=r"4 of 4 modules keep less than 90% of their update in bf16, model\.layers"):
        report = merge(base, adapter, tmp_path / "out")
    assert len(report.worst) == 4
    assert report.share < 0.2
    assert report.worst[0].share == min(module.share for module in report.modules)


def test_an_adapter_that_changes_nothing_has_no_share(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_tensors(adapter, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "lora_B" in key])
    report = merge(base, adapter, tmp_path / "out")
    assert [module.share for module in report.modules] == [None, None]
    assert report.share is None
    assert "nothing to keep" in str(report)
    assert_same(stored(tmp_path / "out"), stored(base))


def test_merging_before_quantizing_keeps_what_merging_into_4_bits_erases(tmp_path):
    """The reason for all this: of an update of 2.5 % of the weights, PEFT's merge into NF4 keeps next to nothing."""
    base = make_base(tmp_path / "base", hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=16, lora_alpha=16, size=0.0)
    torch.manual_seed(3)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = load(base).state_dict()[name]

    def small(tensors):
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        a, b = torch.randn(16, 512), torch.randn(512, 16)
        tensors[key.format("A")] = a
        tensors[key.format("B")] = b * (0.025 * weight.norm() / (b @ a).norm())

    edit_tensors(adapter, small)
    ours = merge(base, adapter, tmp_path / "out", quantize="nf4").modules[0]
    assert ours.relative_size == pytest.approx(0.025, rel=0.01)
    assert ours.share == pytest.approx(1.0, abs=0.05)
    update = peft_merged(peft_model(base, adapter)).state_dict()[name] - weight
    on_grid = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    theirs = dequantize_4bit(*quantize_4bit(on_grid + update, quant_type="nf4"))
    assert float(((theirs - on_grid) * update).sum() / (update * update).sum()) < 0.1


def test_several_alphas_for_one_module_are_pointed_out(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(adapter, alpha_pattern={"q_proj": 4, "0.self_attn.q_proj": 5})
    text = (
        r"alpha_pattern of .* has several alphas for model\.layers\.0\.self_attn\.q_proj; the first in the file counts"
    )
    with pytest.warns(UserWarning, match=text):
        merge(base, adapter, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), rounded_tensors(peft_merged(peft_model(base, adapter))))
