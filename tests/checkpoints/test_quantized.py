"""Checkpoints that are quantized already: counted as their safetensors headers say, from a folder and from the hub."""

import json
from collections import Counter

import pytest

import qwen_vram as qv
from qwen_vram.spec.prequantized import size
from tests.checkpoints.test_hub import ESTIMATE, LOAD, run, run_all, run_each
from tests.helpers.hub_server import serving
from tests.helpers.quantized_files import (
    INT8,
    KINDS,
    NF4,
    SHAPE,
    as_auto_gptq,
    entries,
    int8,
    nf4,
    total,
    write,
    write_file,
)

FORMATS = {"gptq-8-bit": "gptq", "fp8": "fp8-block"} | dict.fromkeys(("packed", "float", "int"), "compressed-tensors")
SHAPES = {
    "untied": SHAPE,
    "tied": {**SHAPE, "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 96, "tie_word_embeddings": True},
}
# huggingface_hub's first read of a safetensors file: bytes 0 to 100,000.
FIRST_READ = 100_001


def make(folder, kind="gptq", *, change=None, extra=None, shards=1, shape=SHAPE):
    """A checkpoint of `kind`, with keys of its config changed and tensors added (`None`: left out)."""
    quantization, matrix = KINDS[kind]
    config = {**shape, "quantization_config": quantization, **(change or {})}
    tensors = {name: entry for name, entry in {**entries(shape, matrix), **(extra or {})}.items() if entry}
    return write(folder, config, tensors, shards=shards), tensors


# bytes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_bytes_of_the_headers(tmp_path, kind, shape):
    folder, tensors = make(tmp_path, kind, shape=shape)
    estimate = qv.estimate_vram(folder)
    assert estimate.weights == total(tensors)
    assert estimate.profile.weights == FORMATS.get(kind, kind)
    stored = estimate.architecture.stored
    table = shape["vocab_size"] * shape["hidden_size"] * 2
    layer = total({name: entry for name, entry in tensors.items() if name.startswith("model.layers.0.")})
    assert size(stored.embedding) == table
    assert size(stored.head) == (0 if shape["tie_word_embeddings"] else table)
    assert [size(part) for part in stored.layers] == [layer] * 3
    assert size(stored.norm) == shape["hidden_size"] * 2


def test_the_headers_agree_with_the_sum_that_gptq_is_counted_by(tmp_path):
    folder, _ = make(tmp_path)
    assert qv.estimate_vram(folder).weights == qv.estimate_vram(SHAPE, weights="gptq-int4").weights


def test_every_weight_has_its_bytes(tmp_path):
    from qwen_vram.arithmetic.weights import stored_weights

    folder, tensors = make(tmp_path)
    estimate = qv.estimate_vram(folder)
    found = {row.weight.name: row.nbytes for row in stored_weights(estimate.architecture, estimate.profile)}
    assert sum(found.values()) == total(tensors)
    assert found["model.layers.1.self_attn.q_proj.bias"] == 512
    assert found["model.layers.1.self_attn.q_proj.weight"] == 256 * 256 // 2 + 2 * 256 // 2 + 2 * 256 * 2 + 4 * 256


def test_what_a_loaded_model_does_not_keep_is_not_counted(tmp_path):
    tied = SHAPES["tied"]
    _, tensors = make(tmp_path / "plain", shape=tied)
    extra = {
        "lm_head.weight": ("F16", (3072, 256)),
        "model.layers.0.mlp.down_proj.bias": ("F16", (256,)),
        "model.layers.0.self_attn.o_proj.bias": ("F16", (256,)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (32,)),
        "model.layers.2.self_attn.k_scale": ("F32", ()),
    }
    folder, _ = make(tmp_path / "more", extra=extra, shape=tied)
    assert qv.estimate_vram(folder).weights == total(tensors)


def test_a_quantized_head_is_counted_as_it_is_stored(tmp_path):
    head = {f"lm_head.{name}": entry for name, entry in KINDS["gptq"][1](3072, 256).items()}
    folder, tensors = make(tmp_path, extra={"lm_head.weight": None, **head})
    estimate = qv.estimate_vram(folder)
    assert estimate.weights == total(tensors)
    assert (estimate.profile.weights, estimate.profile.lm_head) == ("gptq", "gptq")
    with pytest.raises(
        qv.NotSupportedError, match="lm_head='gptq' with weights='gptq': a head that gptq quantized too"
    ):
        qv.plan(folder, vram="8GiB", ram="8GiB")


@pytest.mark.parametrize(("quantization", "matrix", "name"), [(NF4, nf4, "nf4"), (INT8, int8, "int8")])
def test_bitsandbytes_is_counted_as_it_is_stored(tmp_path, quantization, matrix, name):
    # Its JSON text holds the offset, which is loaded as four bytes; weight_format is a note.
    kept = {key: entry for key, entry in entries(SHAPE, matrix).items() if "quant_state" not in key}
    kept = {key: entry for key, entry in kept.items() if "weight_format" not in key}
    expected = total(kept) + (3 * 7 * 4 if name == "nf4" else 0)
    folder = write(tmp_path / "all", {**SHAPE, "quantization_config": quantization}, entries(SHAPE, matrix))
    assert qv.estimate_vram(folder).weights == expected
    # With a module left in 16 bits only the headers say it.
    tensors = entries(SHAPE, matrix)
    left = "model.layers.1.mlp.down_proj"
    gone = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{left}.")}
    tensors[f"{left}.weight"] = ("F16", (256, 768))
    saved = total({key: entry for key, entry in gone.items() if key in kept}) + (4 if name == "nf4" else 0)
    mixed = {**quantization, "llm_int8_skip_modules": ["lm_head", left]}
    folder = write(tmp_path / "mixed", {**SHAPE, "quantization_config": mixed}, tensors)
    estimate = qv.estimate_vram(folder)
    assert estimate.weights == expected - saved + 256 * 768 * 2
    assert estimate.profile.weights == name


def test_a_mixed_bitsandbytes_checkpoint_loads_with_the_bytes_counted(untied, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qwen_vram.runtime.backends import get_backend
    from qwen_vram.runtime.measure import weight_storages

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"],
    )
    with qv.load(untied, profile="default", progress=False) as llm:
        llm.tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16, quantization_config=options)
    model.save_pretrained(tmp_path)
    with qv.load(tmp_path, profile="default", progress=False) as llm:
        estimate = llm.plan.estimate
        assert sum(weight_storages(llm.model, get_backend("nf4")).values()) == estimate.weights
        assert estimate.weights > qv.estimate_vram(untied, weights="nf4").weights


# the other parts


def test_a_dequantized_matrix_is_counted_beside_each_product(tmp_path):
    folder, _ = make(tmp_path)
    plain = {moment.name: moment for moment in qv.estimate_vram(SHAPE).moments if moment.phase == "prefill"}
    stored = {moment.name: moment for moment in qv.estimate_vram(folder).moments if moment.phase == "prefill"}
    assert stored["mlp down_proj"].activations - plain["mlp down_proj"].activations == 256 * 768 * 2
    assert stored["attention q_proj"].activations - plain["attention q_proj"].activations == 256 * 256 * 2
    assert stored["mlp product"] == plain["mlp product"]
    assert stored["head"] == plain["head"]


@pytest.mark.parametrize("kind", KINDS)
def test_loading_holds_the_tensors_and_one_repacked(tmp_path, kind):
    folder, tensors = make(tmp_path, kind)
    estimate = qv.estimate_vram(folder)
    largest = max(total({name: entry}) for name, entry in tensors.items() if "layers" in name)
    # The rest: each of some 100 tensors is rounded up to 512 bytes.
    assert estimate.weights + largest <= estimate.load_peak <= estimate.weights + largest + 512 * len(tensors) + 2**10


@pytest.mark.parametrize("knobs", [{}, {"embeddings": "host"}, {"streamed_layers": 2}, {"attention": "eager"}], ids=str)
def test_knobs_that_do_not_touch_the_format_still_count(tmp_path, knobs):
    folder, tensors = make(tmp_path)
    estimate = qv.estimate_vram(folder, **knobs)
    assert all(part >= 0 for part in estimate.parts().values())
    assert estimate.weights + estimate.host >= total(tensors)
    if "embeddings" in knobs:
        assert (estimate.host, estimate.weights + estimate.host) == (3072 * 256 * 2, total(tensors))
    if "streamed_layers" in knobs:
        layer = size(estimate.architecture.stored.layers[0])
        assert (estimate.host, estimate.weights) == (2 * layer, total(tensors))


# the hub


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by hub id: one of each kind, sharded ones, and what is broken."""
    root = tmp_path_factory.mktemp("hub")
    made = {f"someone/{kind}": make(root / kind, kind)[0] for kind in KINDS}
    made["someone/sharded"] = make(root / "sharded", "awq", shards=3)[0]
    # A header past the first read.
    made["someone/deep"] = make(root / "deep", shape={**SHAPE, "num_hidden_layers": 40})[0]
    for name, shards in (("old-GPTQ", 1), ("old-sharded-gptq", 3)):
        made[f"someone/{name}"] = as_auto_gptq(make(root / name, shards=shards)[0])
    made["someone/lost"] = make(root / "lost", shards=3)[0]
    (root / "lost" / "model-00002-of-00003.safetensors").unlink()
    made["someone/pickled"] = make(root / "pickled")[0]
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    made["someone/garbled"] = make(root / "garbled")[0]
    (root / "garbled" / "model.safetensors").write_bytes((30).to_bytes(8, "little") + b"no header" * 10)
    made["someone/holed"] = make(root / "holed")[0]
    header = json.dumps({"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 9]}}).encode()
    (root / "holed" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    made["someone/mistral"] = make(root / "mistral", change=mistral)[0]
    return made


@pytest.fixture
def hub(folders):
    with serving(folders, gated=("someone/gated",)) as hub:
        yield hub


@pytest.mark.parametrize(
    "kinds",
    [[*KINDS, "sharded", "deep"], *(pytest.param([kind], marks=pytest.mark.full) for kind in (*KINDS, "deep"))],
    ids=lambda kinds: kinds[0] if len(kinds) == 1 else "all",
)
def test_a_hub_checkpoint_is_counted_from_its_headers_alone(hub, folders, tmp_path, kinds):
    found = run_each([(ESTIMATE, f"someone/{kind}") for kind in kinds], hub.endpoint, tmp_path)
    assert found == [qv.estimate_vram(folders[f"someone/{kind}"]).weights for kind in kinds]
    sent = Counter()
    for kind in kinds:
        served = hub.served_of[f"someone/{kind}"]
        reads = [(name, asked) for command, name, asked in served if command == "GET" and name.endswith(".safetensors")]
        shards = sorted(folders[f"someone/{kind}"].glob("*.safetensors"))
        assert len(reads) == len(shards) + (kind == "deep")
        assert all(asked and asked.startswith("bytes=") for _, asked in reads)
        for shard in shards:
            assert shard.stat().st_size > 4 * FIRST_READ
            header = int.from_bytes(shard.read_bytes()[:8], "little")
            sent[shard.name] += FIRST_READ + (header if kind == "deep" else 0)
        assert {name for _, name, _ in served} <= {
            "config.json",
            "model.safetensors.index.json",
            "model.safetensors",
            *(shard.name for shard in shards),
        }
    assert {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")} == sent


def test_auto_gptqs_own_names_are_found(hub, folders, tmp_path):
    expected = qv.estimate_vram(folders["someone/gptq"]).weights
    names = ("someone/old-GPTQ", "someone/old-sharded-gptq")
    found = run_each([(ESTIMATE, name) for name in names], hub.endpoint, tmp_path)
    for name, weights in zip(names, found, strict=True):
        assert weights == qv.estimate_vram(folders[name]).weights == expected
        read = {file for command, file, asked in hub.served_of[name] if command == "GET" and asked}
        assert read == {path.name for path in folders[name].glob("*.safetensors")}


def test_a_whole_estimate_is_the_folders(hub, folders, tmp_path):
    code = "list(qv.estimate_vram({repo!r}).parts().values())"
    expected = list(qv.estimate_vram(folders["someone/sharded"]).parts().values())
    assert run(code, "someone/sharded", hub.endpoint, tmp_path) == expected


def test_what_the_cache_holds_is_counted_without_the_hub(hub, folders, tmp_path):
    code = "__import__('huggingface_hub').snapshot_download({repo!r}) and 0"
    repos = ("someone/sharded", "someone/gptq")
    assert run_each([(code, repo) for repo in repos], hub.endpoint, tmp_path) == [0, 0]
    expected = [qv.estimate_vram(folders[repo]).weights for repo in repos]
    assert run_each([(ESTIMATE, repo) for repo in repos], "http://127.0.0.1:9", tmp_path) == expected


REFUSED = (
    ("gated", "HubError", "'someone/gated' is gated: accept its terms on its page, then log in with: hf auth"),
    ("absent", "HubError", "no repository 'someone/absent' on the hub (or it is private); check the name"),
    ("pickled", "HubError", "'someone/pickled' has no safetensors, neither model.safetensors nor model.safeten"),
    ("lost", "HubError", "'someone/lost' lacks 'model-00002-of-00003.safetensors', which its index names; ask"),
    (
        "garbled",
        "CheckpointError",
        "'model.safetensors' of 'someone/garbled' is not a safetensors file: its header",
    ),
    ("holed", "CheckpointError", "shard 'model.safetensors' is corrupt: 'a' of shape [4] takes 9 bytes in it"),
    ("mistral", "ConfigError", "someone/mistral/config.json: model_type 'mistral' is not supported; dense "),
)


@pytest.mark.parametrize(
    "rows", [REFUSED, *(pytest.param((row,), marks=pytest.mark.full) for row in REFUSED)], ids=lambda rows: rows[0][0]
)
def test_each_refusal_has_its_own_text(hub, tmp_path, rows):
    found = run_each([(ESTIMATE, f"someone/{repo}") for repo, _, _ in rows], hub.endpoint, tmp_path)
    for got, (repo, error, text) in zip(found, rows, strict=True):
        assert got["error"] == error
        assert got["text"].startswith(text), repo
        if repo == "mistral":
            assert {name for _, name, _ in hub.served_of["someone/mistral"]} == {"config.json"}


def test_a_hub_that_is_gone_after_config_json(hub, tmp_path):
    run(ESTIMATE, "someone/gptq", hub.endpoint, tmp_path)
    got = run(ESTIMATE, "someone/gptq", "http://127.0.0.1:9", tmp_path)
    assert got["error"] == "HubError"
    start = "cannot reach the hub for 'someone/gptq', and 'model.safetensors"
    assert got["text"].startswith(start)
    assert "is not in the local cache: " in got["text"]
    assert "check the network and HF_ENDPOINT, then run: hf download someone/gptq" in got["text"]


@pytest.mark.torch
def test_loading_is_refused_by_name_before_anything_is_fetched(hub, tmp_path):
    kinds = ("gptq", "awq", "fp8", "packed")
    load = "__import__('sys').modules.update(gptqmodel=None) or qv.load({repo!r}, profile='default')"
    loads = [(LOAD, "someone/gptq"), *((load, f"someone/{kind}") for kind in kinds)]
    other_format, *refused = run_all(loads, hub.endpoint, tmp_path)
    assert other_format["error"] == "ConfigError"
    start = "the checkpoint is stored with weights='gptq', got weights='nf4'; leave weights out"
    assert other_format["text"].startswith(start)
    for kind, got in zip(kinds, refused, strict=True):
        name = {"fp8": "fp8-block", "packed": "compressed-tensors"}.get(kind)
        assert got["error"] == "BackendUnavailableError"
        text = f"no backend loads '{name}': its bytes are counted by estimate_vram() only; run the checkpoint with vLLM"
        assert got["text"].startswith(f"{text}, " if name else f"weights={kind!r} needs gptqmodel")
    reads = [repo for repo in hub.served_of for command, _, part in hub.served_of[repo] if command == "GET" and part]
    assert sorted(reads) == sorted(repo for _, repo in loads)
    assert hub.sent["model.safetensors"] == FIRST_READ * len(loads)


def test_catalog_names_and_plain_configs_ask_no_one(monkeypatch):
    import qwen_vram.checkpoints.hub.files as module

    monkeypatch.setattr(module, "library", lambda: pytest.fail("asked the hub"))
    assert qv.estimate_vram("Qwen/Qwen2.5-7B-Instruct").weights == 15_231_233_024


# refusals of folders and configs


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (
            {"model.layers.1.mlp.up_proj.qweight": None},
            r"up_proj\.weight' is stored in gptq in .*, which lacks 'model\.layers\.1\.mlp\.up_proj\.qweight': its",
        ),
        ({"model.norm.weight": None, "lm_head.weight": None}, r"lacks model\.norm\.weight, lm_head\.weight; config"),
        (
            {"model.norm.weight": ("F16", (128,))},
            r"'model\.norm\.weight' .* should be BF16 or F16 or F32 of shape \[256\], got F16 of",
        ),
        (
            {"model.layers.0.mlp.up_proj.qweight": ("I32", (4, 8))},
            r"up_proj\.qweight' .* of shape \[768, 256\] by .* should be I32 .*\[32, 768\], got I32 of shape \[4, 8\]",
        ),
        (
            {"model.layers.3.mlp.up_proj.qweight": ("I32", (32, 768))},
            r"a dense qwen2 of 3 layers, .* no place for 'model\.layers\.3\.mlp\.up_proj\.qweight'",
        ),
        (
            {"model.layers.0.mlp.experts.0.up_proj.qweight": ("I32", (32, 768))},
            r"no place for 'model\.layers\.0\.mlp\.experts\.0\.up_proj\.qweight'; config\.json and weights",
        ),
    ],
    ids=["matrix", "outer", "shape", "codes", "layer", "expert"],
)
def test_headers_of_another_model(tmp_path, extra, text):
    folder, _ = make(tmp_path, extra=extra)
    with pytest.raises(qv.CheckpointError, match=text) as caught:
        qv.estimate_vram(folder)
    assert caught.value.path.endswith("config.json")


def test_a_folder_without_safetensors(tmp_path):
    folder, _ = make(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        qv.CheckpointError, match=r"no safetensors in .*; model\.safetensors or model\.safetensors\.ind"
    ):
        qv.estimate_vram(folder)


def test_a_shard_that_is_cut_off(tmp_path):
    folder, tensors = make(tmp_path)
    write_file(folder / "model.safetensors", tensors)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(qv.CheckpointError, match=r"shard 'model\.safetensors' is cut off"):
        qv.estimate_vram(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_config_alone_does_not_say_the_bytes(key, method):
    text = f"already quantized by '{method}', which is not counted from a config alone: .* pass the checkpoint's folder"
    with pytest.raises(qv.ConfigError, match=text):
        qv.estimate_vram({**SHAPE, key: {"quant_method": method}})


def test_modules_that_bitsandbytes_skipped_need_the_headers():
    skipped = {**NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}
    with pytest.raises(qv.ConfigError, match="'bitsandbytes', which is not counted from a config alone"):
        qv.estimate_vram({**SHAPE, "quantization_config": skipped})


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        ({"quant_method": "hqq"}, r"by HQQ \('hqq'\), which is not loaded here; run it with transformers with .* hqq"),
        ({"quant_method": "exl3", "bits": 4.0}, r"ExLlamaV3 \(EXL3\) \('exl3'\), .* run it with ExLlamaV3 or TabbyAPI"),
        ({"quant_method": "aqlm"}, "run it with transformers with the package aqlm"),
        ({"quant_method": "torchao"}, "run it with transformers with torchao, or vLLM"),
        ({"quant_method": "modelopt"}, r"by NVIDIA ModelOpt \('modelopt'\), .* run it with vLLM or TensorRT-LLM"),
        ({"quant_method": "nobody knows"}, "by 'nobody knows', .* run it with the library that made it, or use the 16"),
        ({"bits": 4}, "by .*bits.*, which is not loaded here; run it with the library that made it"),
        ({}, "by '{}', which is not loaded here"),
        ("4 bit", "by '4 bit', which is not loaded here"),
    ],
    ids=str,
)
def test_another_method_is_refused_by_name_with_what_runs_it(quantization, text):
    with pytest.raises(qv.ConfigError, match=text) as caught:
        qv.estimate_vram({**SHAPE, "quantization_config": quantization})
    assert "the 16-bit checkpoint, or one by GPTQ, AWQ or bitsandbytes" in str(caught.value)
    assert "compressed-tensors" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mistral", "gemma", "gemma2", "gemma3_text", "phi3", "qwen3_next", "mixtral"])
def test_another_architecture_is_refused_by_name(kind):
    with pytest.raises(qv.ConfigError, match=f"model_type '{kind}' is not supported; dense .*qwen2.* are "):
        qv.estimate_vram({**SHAPE, "model_type": kind})


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8-block", "compressed-tensors"])
@pytest.mark.parametrize("knob", ["weights", "lm_head"])
def test_a_published_format_for_a_model_that_is_not_stored_so(name, knob):
    text = (
        f"'{name}' is a format that checkpoints are published in, .* pass such a checkpoint, or choose from fp32, bf16"
    )
    with pytest.raises(qv.ConfigError, match=text):
        qv.estimate_vram(SHAPE, **{knob: name})
    if knob == "weights":
        with pytest.raises(qv.ConfigError, match=text):
            qv.estimate_vram(None, params=7e9, weights=name)
