"""Every refusal of a merge: its type, its text, and that nothing was written."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import qwen_vram as qv
from qwen_vram import AdapterError
from qwen_vram.lora.merge import merge_lora_then_quantize
from tests.helpers.lora_models import edit_config, edit_tensors, make_adapter, make_base

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
EMBEDDING = f"{PREFIX}model.embed_tokens"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tied") / "tied", tied=True)


KINDS = {
    "plain": {"target_modules": ["q_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tables": {"target_modules": ["q_proj"], "save": True},
    "resized": {"target_modules": ["q_proj"], "resize": 170},
    "resized whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "resize": 170},
}


@pytest.fixture(scope="module")
def made(base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {kind: make_adapter(base, root / kind.replace(" ", "-"), **settings) for kind, settings in KINDS.items()}


@pytest.fixture
def adapter(made, tmp_path):
    """A copy of an adapter of some kind, to be spoiled."""

    def copied(kind: str, name: str = "adapter") -> Path:
        return Path(shutil.copytree(made[kind], tmp_path / name))

    return copied


def refused(base: object, adapter: object, tmp_path: Path, error: type[Exception], text: str, **options: object):
    """The refusal, after which there is no output and nothing half made beside it."""
    before = sorted(tmp_path.iterdir())
    options = {"quantize": None, "device": "cpu", "progress": False, **options}
    with pytest.raises(error, match=text) as caught:
        merge_lora_then_quantize(base, adapter, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before
    assert not (tmp_path / "out").exists()
    return caught.value


# adapter_config.json


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be merged here, so merge it with PEFT itself"),
        ({"peft_type": None}, "peft_type is None; only LORA"),
        ({"use_qalora": True}, "use_qalora is set: QALoRA groups the inputs .*, so it cannot be merged exactly; merge"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set: BD-LoRA has block-diagonal factors"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is set: Arrow chooses among adapters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set: an activated LoRA acts on part"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config is set: KaSA truncates the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set: the adapter's layers are copies"),
        ({"target_parameters": ["mlp.experts.up"]}, "target_parameters is set: parameters inside modules"),
        ({"megatron_config": {"a": 1}}, "megatron_config is set: the adapter is split over Megatron's ranks"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base before training; save"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changed the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changed the base"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "xyz"}, "init_lora_weights is 'xyz', which is not known; True, False, None, gaussian"),
        ({"use_next_lora": True}, "use_next_lora is set, which this version does not know and will not guess; merge"),
        ({"bias": "some"}, "bias is 'some'; none, all and lora_only are known"),
        ({"r": 0}, "r must be a positive number, got 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a positive number, got inf"),
        ({"lora_alpha": True}, "lora_alpha must be a positive number, got True"),
        ({"rank_pattern": [1]}, r"rank_pattern must be an object of patterns, got \[1\]"),
        ({"rank_pattern": {"q": "8"}}, r"rank_pattern\['q'\] must be a positive number, got '8'"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern has '\(', which is not a regular expression"),
        ({"modules_to_save": "norm"}, "modules_to_save must be a list of names, got 'norm'"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices must be lists of token ids, got 3"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices must be lists of token ids, got \[-1\]"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices names a token twice"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_merged(base, adapter, tmp_path, changes, text):
    folder = adapter("plain")
    edit_config(folder, **changes)
    error = refused(base, folder, tmp_path, AdapterError, text)
    assert error.path == str(folder / "adapter_config.json")


def test_settings_that_are_off_are_no_obstacle(base, adapter, tmp_path):
    folder = adapter("plain")
    edit_config(folder, use_next_lora=False, next_config=None, kasa_config={}, layer_replication=[])
    merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no adapter_config.json in .*; point to the folder that PEFT's save_pretrained"),
        (b"{", "cannot read .*adapter_config.json.* is cut off"),
        (b"[1]", "cannot read .* holds a JSON list, not an object"),
        (b"\xff\xfe", "cannot read .*adapter_config.json"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_read(base, adapter, tmp_path, content, text):
    folder = adapter("plain")
    path = folder / "adapter_config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refused(base, folder, tmp_path, AdapterError, text)


# files and weights


def test_no_such_adapter(base, tmp_path):
    refused(base, tmp_path / "nowhere", tmp_path, AdapterError, "no adapter folder .*nowhere'; point to the folder")


def test_no_tensors(base, adapter, tmp_path):
    folder = adapter("plain")
    (folder / "adapter_model.safetensors").unlink()
    refused(base, folder, tmp_path, AdapterError, r"no adapter_model\.safetensors in .*; point to the folder that PEFT")


def test_a_pickle(base, adapter, tmp_path):
    folder = adapter("plain")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    text = r"holds only adapter_model\.bin, a pickle, which can run code .*; only .* is read\. .*python -c"
    error = refused(base, folder, tmp_path, AdapterError, text)
    assert error.path.endswith("adapter_model.bin")


def test_the_command_that_converts_a_pickle_works(base, adapter, tmp_path):
    from safetensors.torch import load_file

    folder = adapter("plain")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    expected = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError) as caught:
        merge_lora_then_quantize(base, folder, tmp_path / "out")
    command = re.search(r'python -c "(.*)"$', str(caught.value))[1]
    exec(command)
    assert len((folder / "adapter_model.safetensors").read_bytes()) <= len(expected)
    merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)


def test_a_file_that_is_cut_off(base, adapter, tmp_path):
    file = adapter("plain") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(base, file.parent, tmp_path, qv.CheckpointError, "is cut off: .*; download the file again")


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        ([], "no adapter to merge: got an empty list"),
        ([("x", float("nan"))], "adapter 'x' has weight nan; a finite number that is not 0 is needed"),
        ({"x": 0}, "adapter 'x' has weight 0; a finite number"),
        ([("x", "1")], "adapter 'x' has weight '1'"),
        ([("x", True)], "adapter 'x' has weight True"),
        (("x", 0.5), "no adapter folder 'x'"),
        ([3], "an adapter is a folder, a hub id, or a list or dict of them with weights; got 3"),
    ],
    ids=str,
)
def test_adapters_and_weights_that_are_none(base, tmp_path, adapters, text):
    refused(base, adapters, tmp_path, AdapterError, text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["plain", "dora", "whole"])
def test_a_number_that_is_none(base, adapter, tmp_path, value, kind):
    folder = adapter(kind)
    key = {"plain": f"{Q0}.lora_B.weight", "dora": f"{Q0}.lora_magnitude_vector", "whole": f"{PREFIX}model.norm.weight"}
    edit_tensors(folder, lambda tensors: tensors[key[kind]].view(-1)[-1:].fill_(value))
    text = f"holds a NaN or an infinity in {re.escape(key[kind])}; its training diverged"
    refused(base, folder, tmp_path, AdapterError, text)


# keys, pairs and shapes


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def without(key):
    return lambda tensors: tensors.pop(key)


def shaped(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(*shape)})


SPOILED = {
    "another prefix": (
        "plain",
        renamed(f"{Q0}.lora_A.weight", "model.q.lora_A.weight"),
        "holds keys that are not PEFT",
    ),
    "another adapter's name": (
        "plain",
        renamed(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.mine.weight"),
        "not PEFT's: base_mo",
    ),
    "an adapter's name twice": (
        "plain",
        renamed(f"{Q0}.lora_A.weight", f"{Q0}.lora_A.default.default.weight"),
        "not PEFT's: base_mo",
    ),
    "an unknown part": (
        "plain",
        shaped(f"{Q0}.lora_C", 3),
        r"not PEFT's: .*q_proj\.lora_C \(F32 \[3\]\); PEFT would leave them out .* rename them, or save the adapter",
    ),
    "an empty tensor": (
        "plain",
        shaped(f"{Q0}.lora_B.weight", 64, 0),
        r"holds empty tensors: .*lora_B.weight \[64, 0\], so it holds no weights; DeepSpeed ZeRO-3 saves such files",
    ),
    "a scalar": (
        "plain",
        lambda tensors: tensors.update({f"{Q0}.lora_B.weight": torch.tensor(0.0)}),
        r"not PEFT's: .*lora_B.weight \(F32 \[\]\)",
    ),
    "both spellings": ("dora", shaped(f"{Q0}.lora_magnitude_vector.weight", 64), r"not PEFT's: .*\(a second time\)"),
    "half a pair": (
        "plain",
        without(f"{Q0}.lora_A.weight"),
        "q_proj has only one of its two factors; copy the whole file",
    ),
    "a magnitude too few": ("dora", without(f"{Q0}.lora_magnitude_vector"), "q_proj.lora_magnitude_vector is missing"),
    "a magnitude too many": (
        "plain",
        shaped(f"{Q0}.lora_magnitude_vector", 64),
        "vector is there, and use_dora is false; if the adapter was trained with DoRA, set use_dora to true",
    ),
    "a lora_bias too few": ("lora_bias", without(f"{Q0}.lora_B.bias"), "q_proj.lora_B.bias is missing"),
    "a lora_bias too many": ("plain", shaped(f"{Q0}.lora_B.bias", 64), "lora_B.bias is there, and no setting asks for"),
    "a bias too few": ("bias", without(f"{PREFIX}model.layers.0.self_attn.k_proj.bias"), "k_proj.bias is missing"),
    "a bias too many": ("plain", shaped(f"{Q0}.base_layer.bias", 64), "base_layer.bias is there, and no setting asks"),
    "a saved module too few": ("whole", without(f"{PREFIX}model.norm.weight"), "model.norm.weight is missing"),
    "a saved head too few": ("head", without(f"{PREFIX}lm_head.weight"), "lm_head.weight is missing"),
    "a saved module too many": (
        "plain",
        shaped(f"{PREFIX}model.norm.weight", 64),
        "norm.weight is there, and no setting",
    ),
    "tokens too few": (
        "tokens",
        without(f"{EMBEDDING}.token_adapter.trainable_tokens_delta"),
        "tokens_delta is missing",
    ),
    "tokens too many": (
        "plain",
        shaped(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", 2, 64),
        "tokens_delta is there, and no setting asks for it",
    ),
    "two weights": (
        "tables",
        shaped(f"{EMBEDDING}.base_layer.weight", 160, 64),
        "base_layer.weight is there, and no set",
    ),
    "a second copy that differs": (
        "resized whole",
        shaped(f"{EMBEDDING}.modules_to_save.weight", 170, 64),
        "modules_to_save.weight is not the same as model.embed_tokens.weight",
    ),
    "another rank": ("plain", shaped(f"{Q0}.lora_A.weight", 5, 64), r"lora_A.weight has rank 5, the settings say 8"),
    "another layer": (
        "plain",
        shaped(f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight", 8, 64),
        r"does not fit the base .*: model\.layers\.9\.self_attn\.q_proj is not in it; pass the base that it was",
    ),
    "another width": (
        "plain",
        shaped(f"{Q0}.lora_A.weight", 8, 128),
        r"does not fit the base .*: .*lora_A.weight has shape \[8, 128\], \[8, 64\] is needed; pass the base",
    ),
    "another magnitude": ("dora", shaped(f"{Q0}.lora_magnitude_vector", 65), r"has shape \[65\], \[64\] is needed"),
    "another bias": ("bias", shaped(f"{Q0}.base_layer.bias", 63), r"has shape \[63\], \[64\] is needed"),
    "a head of another width": (
        "head",
        shaped(f"{PREFIX}lm_head.weight", 160, 32),
        r"has shape \[160, 32\], \[160, 64\]",
    ),
    "other tokens": (
        "tokens",
        shaped(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", 3, 64),
        r"tokens_delta has shape \[3, 64\], \[2, 64\] is needed",
    ),
    "factors of an embedding": (
        "plain",
        lambda tensors: [
            tensors.update({f"{Q0}.lora_embedding_{part}": tensors.pop(f"{Q0}.lora_{part}.weight")}) for part in "AB"
        ],
        "q_proj is not the kind of module that its factors were made for",
    ),
    "factors for a norm": (
        "plain",
        lambda tensors: tensors.update(
            {
                f"{PREFIX}model.norm.lora_A.weight": torch.zeros(8, 64),
                f"{PREFIX}model.norm.lora_B.weight": torch.zeros(64, 8),
            }
        ),
        "model.norm is not the kind of module that its factors were made for",
    ),
    "a head that kept its size": (
        "resized",
        shaped(f"{PREFIX}lm_head.weight", 160, 64),
        r"makes 170 rows of model.embed_tokens.weight and 160 of lm_head.weight; .*save_embedding_layers=True",
    ),
    "a bias where none is": (
        "bias",
        shaped(f"{PREFIX}model.layers.0.self_attn.o_proj.bias", 64),
        "o_proj.bias is not in it",
    ),
}


@pytest.mark.parametrize(("kind", "spoil", "text"), SPOILED.values(), ids=SPOILED.keys())
def test_tensors_that_do_not_belong(base, adapter, tmp_path, kind, spoil, text):
    folder = adapter(kind)
    edit_tensors(folder, spoil)
    error = refused(base, folder, tmp_path, AdapterError, text)
    assert error.path == str(folder / "adapter_model.safetensors")


def test_only_the_first_mismatches_are_listed(base, adapter, tmp_path):
    other = make_base(tmp_path / "other", hidden_size=128, num_hidden_layers=1)
    folder = make_adapter(other, tmp_path / "far", target_modules="all-linear")
    shutil.rmtree(other)
    text = r"(.*has shape.*){3} and \d+ more; pass the base that it was trained on \('.*other'\)"
    refused(base, folder, tmp_path, AdapterError, text)


def test_a_lora_bias_where_the_layer_has_none(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"], lora_bias=True)
    text = r"o_proj has no bias that its lora_bias could be added to; run it beside its base: qv\.load\(base, adapter="
    refused(base, folder, tmp_path, AdapterError, text)


def test_tokens_beyond_the_vocabulary(base, adapter, tmp_path):
    folder = adapter("tokens")
    edit_config(folder, trainable_token_indices=[1, 160])
    refused(base, folder, tmp_path, AdapterError, r"token 160 was trained, model\.embed_tokens has 160 rows")


def test_a_resized_embedding_without_its_head(base, tmp_path):
    """PEFT saves the adapted table only, and the rows that resizing gave the head are lost."""
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], resize=170)
    refused(
        base, folder, tmp_path, AdapterError, "makes 170 rows of model.embed_tokens.weight and 160 of lm_head.weight"
    )


def test_modules_saved_inside_each_other(base, tmp_path):
    """PEFT saves the wrong one of the two, and cannot load what it saved."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["1.self_attn", "o_proj"]}
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    text = (
        "modules_to_save names model.layers.1.self_attn.o_proj inside model.layers.1.self_attn, which PEFT cannot save"
    )
    refused(base, folder, tmp_path, AdapterError, text)


def test_a_tied_head_saved_whole_beside_trained_tokens(tied, tmp_path):
    """PEFT makes such an adapter, and cannot run it."""
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}
    folder = make_adapter(tied, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    refused(tied, folder, tmp_path, AdapterError, "lm_head was trained both whole and row by row")


# several adapters


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        (
            ("head", "head"),
            r"replaces lm_head\.weight, which .* changes too, so their sum is not defined; merge one of",
        ),
        (("bias", "bias"), r"replaces model\.layers\.0\.self_attn\..*_proj\.bias, which .* changes too"),
        (("tokens", "tokens"), r"replaces rows of model\.embed_tokens\.weight, which .* changes too"),
        (("tokens", "embedding"), r"replaces rows of model\.embed_tokens\.weight"),
        (("bias", "lora_bias"), r"replaces model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
    ids=str,
)
def test_adapters_that_want_the_same_tensor(base, adapter, tmp_path, kinds, text):
    folders = [adapter(kind, f"adapter-{number}") for number, kind in enumerate(kinds)]
    refused(base, folders, tmp_path, AdapterError, text)


def test_a_resized_vocabulary_cannot_be_weighted(base, adapter, tmp_path):
    text = (
        r"resizes (lm_head|model\.embed_tokens)\.weight and has weight 0\.5, but new rows can only be taken as they are"
    )
    refused(base, {adapter("resized"): 0.5}, tmp_path, AdapterError, text)


# base, device and output


def test_a_quantized_base(base, adapter, tmp_path):
    merge_lora_then_quantize(base, adapter("plain"), tmp_path / "nf4", quantize="nf4", progress=False)
    with pytest.raises((qv.ConfigError, qv.CheckpointError), match="is already quantized"):
        merge_lora_then_quantize(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", device="cpu", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_no_checkpoint(adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", adapter("plain"), tmp_path, qv.ConfigError, r"no config\.json in")


def test_a_base_with_a_nan_where_it_is_changed(base, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    text = (
        r"merging 'model\.layers\.1\.self_attn\.q_proj\.weight' gives numbers that its dtype cannot hold, or the base"
    )
    refused(broken, adapter("plain"), tmp_path, AdapterError, text)


def test_an_update_that_overflows_fp16(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], size=400.0, lora_alpha=64)
    refused(base, folder, tmp_path, AdapterError, "gives numbers that its dtype cannot hold")


def test_an_unknown_device_and_a_missing_gpu(base, adapter, tmp_path, monkeypatch):
    folder = adapter("plain")
    refused(base, folder, tmp_path, qv.UnknownNameError, "unknown device 'tpu'; choose from cuda, cpu", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "device='cuda' asks for a GPU, and torch sees none here; leave it out"
    refused(base, folder, tmp_path, qv.BackendUnavailableError, text, device="cuda")


def test_a_shard_size_without_a_unit(base, adapter, tmp_path):
    refused(base, adapter("plain"), tmp_path, qv.UnitError, "max_shard_size is a bare number: got 4", max_shard_size=4)


def test_an_output_that_exists(base, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(
        qv.CheckpointError, match=r"output .*out' exists; choose another folder, or pass overwrite=True"
    ):
        merge_lora_then_quantize(base, adapter("plain"), out, progress=False)
    with pytest.raises(
        qv.CheckpointError, match=r"has no config\.json, so it is not a checkpoint and is not overwritten"
    ):
        merge_lora_then_quantize(base, tmp_path / "adapter", out, overwrite=True, device="cpu", progress=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    for other in ("file", "link"):
        path = tmp_path / other
        path.write_text("x") if other == "file" else path.symlink_to(out)
        with pytest.raises(qv.CheckpointError, match="is a file or a link; choose another folder"):
            merge_lora_then_quantize(base, tmp_path / "adapter", path, overwrite=True, device="cpu", progress=False)


def test_an_output_that_would_swallow_its_sources(base, adapter, tmp_path):
    folder = adapter("plain")
    copy = Path(shutil.copytree(base, tmp_path / "models" / "base"))
    for out, held in ((copy, copy), (tmp_path / "models", copy), (folder, folder)):
        text = f"is, or holds, '{held}', which is read; choose another folder"
        with pytest.raises(qv.CheckpointError, match=re.escape(text)):
            merge_lora_then_quantize(copy, folder, out, overwrite=True, device="cpu", progress=False)
    assert (copy / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_disk_that_is_too_full(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 10**6}))
    text = r"takes \d\.\d MiB, and 976\.6 KiB are free on its disk; free some space, choose another disk, or quantize"
    refused(base, adapter("plain"), tmp_path, qv.CheckpointError, text)


def test_a_parent_that_is_a_file(base, adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(qv.CheckpointError, match=r"output .*/file/out' cannot be made: .*; choose another folder"):
        merge_lora_then_quantize(base, adapter("plain"), tmp_path / "file" / "out", device="cpu", progress=False)


def test_a_disk_that_fails_in_the_middle(base, adapter, tmp_path):
    """A limit on the size of files stands in for it."""
    import resource

    folder = adapter("plain")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        text = r"could not be written \(.*File too large.*\), and nothing of it is left; check the disk"
        refused(base, folder, tmp_path, qv.CheckpointError, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_runs_for_one_output(base, adapter, tmp_path):
    import fcntl

    folder = adapter("plain")
    with (tmp_path / ".out.partial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = "is being written by another run; wait for it, or choose another folder"
        refused(base, folder, tmp_path, qv.CheckpointError, text)
    merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    assert not (tmp_path / ".out.partial.lock").exists()


def test_an_output_that_appears_meanwhile(base, adapter, tmp_path):
    """The rename finds it, and leaves it alone."""
    from qwen_vram.checkpoints.output.folder import OutputFolder

    with OutputFolder(tmp_path / "out", needed_bytes=1, sources=[], overwrite=False) as output:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        with pytest.raises(qv.CheckpointError, match="appeared while it was being made .*; choose another folder"):
            output.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_cannot_swap_folders(base, adapter, tmp_path, monkeypatch):
    import qwen_vram.checkpoints.output.folder as output

    folder = adapter("plain")
    merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def cannot(one, other):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(output, "_exchange", cannot)
    text = r"cannot be replaced at once on this disk \(Invalid argument\); remove it, or choose another folder"
    with pytest.raises(qv.CheckpointError, match=text):
        merge_lora_then_quantize(
            base, folder, tmp_path / "out", quantize=None, overwrite=True, device="cpu", progress=False
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_refusal_in_the_middle_leaves_an_earlier_output(base, adapter, tmp_path):
    folder = adapter("plain")
    merge_lora_then_quantize(base, folder, tmp_path / "out", quantize=None, device="cpu", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    settings = json.loads((folder / "adapter_config.json").read_text())
    edit_config(folder, lora_alpha=1e45)
    with pytest.raises(AdapterError, match="gives numbers that its dtype cannot hold"):
        merge_lora_then_quantize(
            base, folder, tmp_path / "out", quantize=None, overwrite=True, device="cpu", progress=False
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert settings["lora_alpha"] != 1e45
