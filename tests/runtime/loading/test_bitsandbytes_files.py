"""Files of bitsandbytes as people have them: its defaults, dtypes of storage, lists, heads, and missing parts."""

import json
import re
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qwen_vram as qv
from tests.conftest import make_checkpoint
from tests.helpers.gptq_files import change_config, change_tensors
from tests.helpers.quantized_files import SHAPE, entries, total, write
from tests.helpers.tiers import thinned
from tests.runtime.linear.test_flat_linear import values

IDS = torch.arange(3, 40)[None]
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}  # fmt: skip
INT8 = {"load_in_8bit": True}
UP = "model.layers.1.mlp.up_proj"


def skipping(*names):
    return {"llm_int8_skip_modules": list(names)}


def stored(dtype):
    return {"bnb_4bit_quant_storage": dtype}


# Name -> what the base is saved with, and what is changed in config.json afterwards.
FILES = {
    "defaults": ({"load_in_4bit": True}, {}),
    "nf4 without quant_method": (NF4, {"quant_method": None}),
    "int8 without quant_method": (INT8, {"quant_method": None}),
    "stored in bfloat16": (NF4 | stored("bfloat16"), {}),
    "stored in float32": (NF4 | stored("float32"), {}),
    "defaults stored in float16": ({"load_in_4bit": True} | stored("float16"), {}),
    "storage denied": (NF4 | stored("bfloat16"), {"bnb_4bit_quant_storage": "uint8"}),
    "fp4 said of nf4": (NF4, {"bnb_4bit_quant_type": "fp4"}),
    "double quantization denied": (NF4, {"bnb_4bit_use_double_quant": False}),
    "a layer skipped": (NF4 | skipping("lm_head", "model.layers.1"), {}),
    "skipped by a regular expression": (NF4 | skipping("lm_head", "model.layers..*mlp"), {}),
    "a projection skipped in int8": (INT8 | skipping("lm_head", "down_proj"), {}),
    "a quantized head": (NF4 | skipping(), {}),
    "a quantized head, a layer skipped": (NF4 | skipping("layers.0.mlp") | stored("float32"), {}),
    "a quantized head in int8": (INT8 | skipping(), {}),
}


def saved(base, out, options, change=()):
    """`base` quantized and saved by plain transformers."""
    settings = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(out)
    return change_block(out, **dict(change))


def change_block(folder, **changes):
    """Change entries of `quantization_config`; `None` takes one away."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    change_config(folder, quantization_config={key: value for key, value in block.items() if value is not None})
    return folder


def plain_logits(folder):
    """Logits of plain transformers, computed in bf16 as here.

    A file that names no compute dtype is multiplied in float32 there. CPUs that sum bf16 products in another order than
    float32 ones then give other last bits.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.bfloat16
    with torch.inference_mode():
        return model(IDS).logits


def logits(folder, **knobs):
    """Logits of a model whose bytes were predicted; those of layers of different sizes that stream, at the most."""
    with qv.load(folder, profile="default", progress=False, **knobs) as llm, torch.inference_mode():
        report = llm.report()
        measured, predicted = report.measured["weights"], report.estimate.weights
        assert measured == predicted or (knobs.get("streamed_layers") and measured < predicted)
        return llm.model(IDS).logits


def refusal(folder, error=qv.CheckpointError):
    """The text that estimate, plan and load refuse a folder with: the same one."""
    texts = set()
    for call in (qv.estimate_vram, qv.plan, qv.load):
        with pytest.raises(error) as caught:
            call(folder)
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"), **SMALL)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tied"), tied=True, **SMALL)


@pytest.fixture(scope="module")
def nf4(base, tmp_path_factory):
    return saved(base, tmp_path_factory.mktemp("nf4") / "nf4", NF4)


@pytest.fixture(scope="module")
def int8(base, tmp_path_factory):
    return saved(base, tmp_path_factory.mktemp("int8") / "int8", INT8)


# what loads


@pytest.fixture(scope="module")
def file_of(base, tmp_path_factory):
    """The file of a name, made once, with plain transformers' logits."""
    made = {}

    def of(name):
        if name not in made:
            options, change = FILES[name]
            folder = saved(base, tmp_path_factory.mktemp("file") / "file", options, change)
            made[name] = folder, plain_logits(folder)
        return made[name]

    return of


KNOBS = [
    {},
    {"streamed_layers": 2},
    {"streamed_layers": 3, "disk_layers": 2},
    {"embeddings": "host", "attention": "fused", "dequantization": "tiled"},
]


@pytest.mark.parametrize(*thinned(1, name=list(FILES), knobs=KNOBS), ids=str)
def test_a_file_gives_what_plain_transformers_gives_and_takes_what_was_counted(file_of, name, knobs):
    file, expected = file_of(name)
    assert expected.isfinite().all()
    assert torch.equal(logits(file, **knobs), expected)


SAVED_IN_FULL = (
    "nf4 without quant_method", "int8 without quant_method", "stored in bfloat16", "defaults stored in float16",
    "fp4 said of nf4", "double quantization denied", "skipped by a regular expression", "a quantized head",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SAVED_IN_FULL else []) for name in FILES]
)
def test_a_file_is_saved_again_as_it_is(file_of, tmp_path, name):
    file, _ = file_of(name)
    with qv.load(file, profile="default", progress=False) as llm, torch.inference_mode():
        expected = llm.model(IDS).logits
        weights = llm.plan.estimate.weights
        llm.save_quantized(tmp_path / "out", progress=False)
    assert qv.estimate_vram(tmp_path / "out").weights == weights
    for read in (logits, plain_logits):
        assert torch.equal(read(tmp_path / "out"), expected)
    before, after = load_file(file / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: one.dtype for name, one in before.items()} == {name: one.dtype for name, one in after.items()}


@pytest.mark.parametrize(
    *thinned(1, skipped=[["q_proj"], ["model.layers.1.mlp"], ["model.layers.0", "k_proj"]], options=[NF4, INT8]),
    ids=str,
)
def test_a_tied_model_whose_list_lacks_the_head_runs_with_the_table_as_its_head(tied_base, tmp_path, options, skipped):
    folder = saved(tied_base, tmp_path / "file", options | skipping(*skipped))
    got = logits(folder)
    for knobs in KNOBS[1:3]:
        assert torch.equal(logits(folder, **knobs), got)
    # Plain transformers needs to be told.
    change_block(folder, llm_int8_skip_modules=[*skipped, "lm_head"])
    assert torch.equal(plain_logits(folder), got)
    with qv.load(folder, progress=False) as llm:
        assert type(llm.model.lm_head) is torch.nn.Linear
        llm.save_quantized(tmp_path / "out", progress=False)
    assert torch.equal(logits(tmp_path / "out"), got)


@pytest.mark.parametrize(
    "options",
    [NF4, pytest.param({"load_in_4bit": True}, marks=pytest.mark.full), INT8],
    ids=["nf4", "defaults", "int8"],
)
def test_a_quantized_head_counts_though_config_json_ties_it(base, tmp_path, options):
    folder = saved(base, tmp_path / "file", options | skipping())
    change_config(folder, tie_word_embeddings=True)
    got = logits(folder)
    assert torch.equal(logits(folder, streamed_layers=2), got)
    with qv.load(folder, profile="default", progress=False) as llm:
        assert llm.plan.profile.lm_head == llm.plan.profile.weights
        assert type(llm.model.lm_head) is not torch.nn.Linear
        llm.save_quantized(tmp_path / "out", progress=False)
    assert torch.equal(logits(tmp_path / "out"), got)
    change_config(folder, tie_word_embeddings=False)
    assert torch.equal(plain_logits(folder), got)


@pytest.mark.parametrize("width", [128, 192])
def test_blocks_of_another_size_are_counted_and_run(tmp_path, width):
    from bitsandbytes.functional import quantize_4bit

    folder = make_checkpoint(tmp_path / "base", **{**SMALL, "hidden_size": width})
    file = saved(folder, tmp_path / "file", NF4)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def change(tensors):
        for name, matrix in load_file(folder / "model.safetensors").items():
            if name.endswith("proj.weight"):
                codes, state = quantize_4bit(matrix, blocksize=128, quant_type="nf4", compress_statistics=True)
                own = {f"{name}.{part}": one for part, one in state.as_dict(packed=True).items()}
                tensors = {**without(tensors, f"{name}.quant_state"), **own, name: codes}
                model.get_parameter(name).data = values(codes, state).bfloat16()
        return tensors

    change_tensors(file, change)
    got = logits(file)
    assert torch.equal(logits(file, streamed_layers=2), got)
    with torch.inference_mode():
        expected = model(IDS).logits
    assert (got - expected).norm() < 0.02 * expected.norm()


def recast(folder, out, dtype, *ends):
    """`folder` with floats in 16 bits that end so in another dtype."""

    def change(tensors):
        fits = {name for name, one in tensors.items() if one.dtype == torch.bfloat16 and name.endswith(ends)}
        return {name: one.to(dtype) if name in fits else one for name, one in tensors.items()}

    return change_tensors(shutil.copytree(folder, out), change)


@pytest.mark.parametrize(
    ("skipped", "all_knobs"),
    [
        ((), KNOBS[::3]),
        (("model.layers.1",), KNOBS[1:3]),
        pytest.param((), KNOBS[1:3], marks=pytest.mark.full),
        pytest.param(("model.layers.1",), KNOBS[::3], marks=pytest.mark.full),
    ],
    ids=["uniform", "mixed", "uniform, others", "mixed, others"],
)
def test_tensors_in_float32_run_in_16_bits_as_counted(base, tmp_path, skipped, all_knobs):
    folder = saved(base, tmp_path / "file", NF4 | skipping("lm_head", *skipped))
    expected = logits(folder)
    wide = recast(folder, tmp_path / "wide", torch.float32, "weight", "bias")
    for knobs in all_knobs:
        assert torch.equal(logits(wide, **knobs), expected), knobs


def test_tensors_in_float16_stay_so_as_in_plain_transformers(nf4, tmp_path):
    folder = recast(nf4, tmp_path / "half", torch.float16, "weight")
    expected = plain_logits(folder)
    for knobs in KNOBS:
        assert torch.equal(logits(folder, **knobs), expected), knobs


@pytest.mark.parametrize("gone", ["weight_format"])
def test_a_note_may_be_missing(int8, tmp_path, gone):
    folder = change_tensors(shutil.copytree(int8, tmp_path / "file"), lambda all: without(all, f".{gone}"))
    assert torch.equal(logits(folder), plain_logits(int8))


# what is refused


def without(tensors, *ends):
    return {name: one for name, one in tensors.items() if not name.endswith(ends)}


STATE = ".quant_state.bitsandbytes__nf4"
PARTS = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("where", [f"{UP}.weight", "model.layers.0.self_attn.q_proj.weight", ".weight"])
def test_a_part_of_the_state_that_is_missing_is_refused_by_name(nf4, tmp_path, part, where):
    folder = shutil.copytree(nf4, tmp_path / "file")
    change_tensors(folder, lambda tensors: without(tensors, f"{where}{part}"))
    text = refusal(folder)
    if where != ".weight" or part in (STATE, ".quant_map", ".absmax"):
        name = "model.layers.0.self_attn.q_proj.weight" if where == ".weight" else where
        assert f"'{name}' is stored in nf4" in text
        assert f"'{name}{part}'" in text
    assert "it was saved without its quantization state. Save the model again with save_pretrained()" in text


@pytest.mark.parametrize("where", [f"{UP}.SCB", "self_attn.q_proj.SCB", ".SCB"])
def test_scales_of_int8_that_are_missing_are_refused_by_name(int8, tmp_path, where):
    folder = change_tensors(shutil.copytree(int8, tmp_path / "file"), lambda tensors: without(tensors, where))
    assert re.search(r"is stored in int8 in 'model.safetensors', which lacks '.*\.SCB'", refusal(folder))


WRONG = {
    "empty": ("nf4", f"{UP}.weight", lambda one: one[:0], "is empty in 'model.safetensors': training in parts"),
    "cut codes": ("nf4", f"{UP}.weight", lambda one: one[:-1], r"of shape \[16384, 1\], got U8 of shape \[16383, 1\]"),
    "cut maxima": ("nf4", f"{UP}.weight.absmax", lambda one: one[:-1], "got U8 of shape"),
    "cast maxima": ("nf4", f"{UP}.weight.nested_absmax", torch.Tensor.half, "was cast when the model was saved"),
    "cast table": ("nf4", f"{UP}.weight.quant_map", torch.Tensor.bfloat16, "Save it again without .half()"),
    "cast scales": ("int8", f"{UP}.SCB", torch.Tensor.half, "should be F32 of shape .256., got F16"),
    "cut scales": ("int8", f"{UP}.SCB", lambda one: one[:-1], r"F32 of shape \[256\], got F32 of shape \[255\]"),
    "empty state": ("nf4", f"{UP}.weight{STATE}", lambda one: one[:0], "is empty"),
    "wide codes": ("int8", f"{UP}.weight", torch.Tensor.int, "should be I8 of shape .* got I32"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_part_of_another_dtype_or_shape_is_refused_by_name(request, tmp_path, case):
    kind, name, change, text = WRONG[case]
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "file")
    change_tensors(folder, lambda tensors: {**tensors, name: change(tensors[name])})
    found = refusal(folder)
    assert name in found
    assert re.search(text, found)


def test_matrices_in_16_bits_that_the_list_lacks_are_refused_with_the_list(base, tmp_path):
    folder = saved(base, tmp_path / "file", NF4 | skipping("lm_head", "model.layers.1.mlp"))
    expected = plain_logits(folder)
    for block in ({"llm_int8_skip_modules": None}, {"llm_int8_skip_modules": ["lm_head"]}):
        change_block(folder, **block)
        text = refusal(folder)
        assert "'model.layers.1.mlp.gate_proj' is stored in 16 bits, and " in text
        named = json.loads(f"[{text.partition('llm_int8_skip_modules in quantization_config: ')[2]}]")
        change_block(folder, llm_int8_skip_modules=[*(block["llm_int8_skip_modules"] or []), *named])
        assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("entry", ["up_proj", "model.layers.1", UP])
def test_a_list_that_names_what_is_quantized_is_refused(nf4, tmp_path, entry):
    folder = change_block(shutil.copytree(nf4, tmp_path / "file"), **skipping("lm_head", entry))
    text = refusal(folder)
    assert "is stored in nf4, and llm_int8_skip_modules in the quantization_config of" in text
    assert text.endswith("take it out of llm_int8_skip_modules")


@pytest.mark.parametrize(("kind", "flags"), [("nf4", (False, True)), ("int8", (True, False))])
def test_the_other_number_of_bits_is_refused_with_the_right_one(request, tmp_path, kind, flags):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "file")
    expected = plain_logits(folder)
    change_block(folder, load_in_4bit=flags[0], load_in_8bit=flags[1], _load_in_4bit=flags[0], _load_in_8bit=flags[1])
    text = refusal(folder)
    right, wrong = ("load_in_8bit", "load_in_4bit") if kind == "int8" else ("load_in_4bit", "load_in_8bit")
    assert f"set {right} to true and {wrong} to false" in text
    change_block(folder, **{right: True, wrong: False, f"_{right}": True, f"_{wrong}": False})
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_both_numbers_of_bits_or_none_are_refused(nf4, tmp_path, flags):
    folder = change_block(shutil.copytree(nf4, tmp_path / "file"), load_in_4bit=flags[0], load_in_8bit=flags[1])
    said = "both" if flags[0] else "neither"
    assert f"load_in_4bit and load_in_8bit are {said} true in quantization_config; set the one" in refusal(folder)


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both true in quantization"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit and load_in_8bit are neither true"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4', and bitsandbytes"),
        ({"quant_method": "qwen_vram", "weights": "nf4"}, "weights is 'nf4' in quantization_config; .*: int4, int8"),
        ({"quant_method": "qwen_vram"}, "weights is None in quantization_config; set the one that the tensors are in"),
    ],
    ids=str,
)  # fmt: skip
def test_a_block_that_cannot_be_is_refused_in_config_json_alone(block, text):
    with pytest.raises(qv.ConfigError, match=text):
        qv.estimate_vram({**SHAPE, "quantization_config": block})


@pytest.mark.parametrize("weights", ["nf4", None, "int4"])
def test_a_block_of_this_library_that_is_wrong_is_refused(demo, tmp_path, weights):
    with qv.load(demo, profile="default", weights="fp8", progress=False) as llm:
        llm.save_quantized(tmp_path / "out", progress=False)
    change_block(tmp_path / "out", weights=weights)
    text = refusal(tmp_path / "out")
    assert "set the one that the tensors are in: int4, int8-wo, fp8" in text or "which lacks" in text


def state_of(**changes):
    def change(one):
        text = json.loads(bytes(one.tolist())) | changes
        return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)

    return change


NOTES = {
    "another shape": ("nf4", f"{UP}.weight{STATE}", state_of(shape=[128, 256]), r"a nf4 matrix of shape \[128, 256\]"),
    "another block": ("nf4", f"{UP}.weight{STATE}", state_of(blocksize=128), "in 256 blocks, got nf4 codes .* in 512"),
    "another type": ("nf4", f"{UP}.weight{STATE}", state_of(quant_type="fp4"), "is of a fp4 matrix"),
    "no JSON": ("nf4", f"{UP}.weight{STATE}", torch.zeros_like, "is not what bitsandbytes writes"),
    "columns": ("int8", f"{UP}.weight_format", torch.ones_like, "lie in a layout for one kind of GPU, which no"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTES)
def test_a_note_that_is_of_another_matrix_is_refused_before_anything_is_loaded(request, tmp_path, case):
    kind, name, change, text = NOTES[case]
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "file")
    change_tensors(folder, lambda tensors: {**tensors, name: change(tensors[name])})
    with pytest.raises(qv.CheckpointError, match=text) as caught:
        qv.load(folder, progress=False)
    assert UP in str(caught.value)
    assert caught.value.path.endswith("model.safetensors")


# blocks that are lost, or left behind


LOST = {name: FILES[name][0] for name in (
    "defaults", "stored in float32", "a layer skipped", "a quantized head", "a quantized head, a layer skipped",
    "a projection skipped in int8",
)} | {"nf4": NF4, "int8": INT8}  # fmt: skip


LOST_AT_ONCE = ("stored in float32", "a layer skipped", "a quantized head")  # all in another one


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in LOST_AT_ONCE else []) for name in LOST]
)
def test_a_lost_block_is_named_and_loads_once_it_is_added(base, tmp_path, name):
    folder = saved(base, tmp_path / "file", LOST[name])
    expected = logits(folder)
    change_config(folder, quantization_config=None)
    text = refusal(folder)
    assert re.search(
        r"the weights are quantized by bitsandbytes \('.*'\), and .* has no quantization_config; add", text
    )
    change_config(folder, quantization_config=json.loads(re.search(r'"quantization_config": (\{.*\})', text)[1]))
    assert torch.equal(logits(folder), expected)
    assert torch.equal(plain_logits(folder), expected)


@pytest.mark.parametrize(*thinned(1, weights=["int4", "int8-wo", "fp8"], head=[False, True]))
def test_this_librarys_own_formats_too(demo, tmp_path, weights, head):
    out = tmp_path / "out"
    with qv.load(demo, profile="default", weights=weights, lm_head=weights if head else None, progress=False) as llm:
        llm.save_quantized(out, progress=False)
    expected = logits(out)
    change_config(out, quantization_config=None)
    text = refusal(out)
    assert "the weights are quantized by qwen_vram ('" in text
    change_config(out, quantization_config=json.loads(re.search(r'"quantization_config": (\{.*\})', text)[1]))
    assert torch.equal(logits(out), expected)


BEHIND = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8 with a list": {"load_in_8bit": True, **skipping("lm_head", "merger")},
    "a layer left out": {"quant_method": "bitsandbytes", "load_in_4bit": True, **skipping("model.layers.1.mlp")},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "hqq": {"quant_method": "hqq"},
    "this library": {"quant_method": "qwen_vram", "weights": "int4", "modules_to_not_convert": ["lm_head"]},
}


@pytest.fixture(scope="module")
def plain(base):
    return plain_logits(base)


@pytest.mark.parametrize("name", BEHIND)
def test_a_block_over_plain_weights_is_refused_and_loads_without_it(base, plain, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "file")
    change_config(folder, quantization_config=BEHIND[name])
    text = refusal(folder)
    assert "quantized the weights, and they are stored as BF16, not quantized; take quantization_config out of" in text
    change_config(folder, quantization_config=None)
    assert torch.equal(logits(folder), plain)


# quantizers that are not loaded


def named(**parts):
    return lambda rows, columns: {name.replace("__", "."): (kind, (rows, columns // 8)) for name, kind in parts.items()}


OTHERS = {
    "exl3": (named(trellis="I32", suh="F16", svh="F16"), "ExLlamaV3"),
    "exl2": (named(q_weight="I32", q_scale="I32"), "ExLlamaV2"),
    "hqq": (named(W_q="U8", scale="F16", zero="F16"), "HQQ"),
    "aqlm": (named(codes="I8", codebooks="F16", scales="F16"), "AQLM"),
    "mlx": (named(weight="I32", scales="F16", biases="F16"), "MLX"),
    "modelopt": (named(weight="U8", weight_scale="F8_E4M3", weight_scale_2="F32"), "ModelOpt"),
    "compressed-tensors": (named(weight_packed="I32", weight_scale="F16"), "compressed-tensors"),
}


# With its block, compressed-tensors is counted (tests/checkpoints/test_quantized.py).
@pytest.mark.parametrize(
    ("method", "block"),
    [(method, block) for method in OTHERS for block in (True, False) if not (block and method == "compressed-tensors")],
)
def test_tensors_of_another_quantizer_are_named_with_their_bytes(tmp_path, method, block):
    matrix, name = OTHERS[method]
    config = {**SHAPE, **({"quantization_config": {"quant_method": method}} if block else {})}
    tensors = entries(SHAPE, matrix)
    if method == "mlx":
        tensors = {key: ("U32" if kind == "I32" else kind, shape) for key, (kind, shape) in tensors.items()}
    folder = write(tmp_path / "file", config, tensors)
    text = refusal(folder, qv.QwenVramError)
    assert name in text
    assert f"in {total(tensors):,} bytes" in text
    assert "which is not loaded here; run it with " in text
    assert "use the 16-bit checkpoint, or one by GPTQ, AWQ or bitsandbytes" in text
