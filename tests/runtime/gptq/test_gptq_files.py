"""GPTQ and AWQ files as people have them: missing parts, rules and lists, and blocks that are lost or another's."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qwen_vram as qv
from tests.conftest import make_checkpoint
from tests.helpers.gptq_files import as_awq, by_hand, change_config, change_tensors, tied
from tests.helpers.quantized_files import SHAPE

IDS = torch.arange(3, 40)[None]
UP = "model.layers.1.mlp.up_proj"
BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    folder = make_checkpoint(tmp_path_factory.mktemp("plain"), **shape)
    # Matrices that matter beside the residual stream.
    return change_tensors(
        folder, lambda tensors: {n: 3 * one if "proj.weight" in n else one for n, one in tensors.items()}
    )


@pytest.fixture(scope="module")
def whole(gptqmodel, plain, tmp_path_factory):
    return by_hand(plain, tmp_path_factory.mktemp("whole") / "gptq")


@pytest.fixture(scope="module")
def expected(whole):
    return logits(whole)


def copied(folder, tmp_path, change=None, **config):
    out = shutil.copytree(folder, tmp_path / "changed")
    if change is not None:
        change_tensors(out, change)
    if config:
        change_config(out, **config)
    return out


def logits(folder, **knobs):
    """Logits of a model whose bytes were predicted."""
    with qv.load(folder, profile="default", device="cpu", progress=False, **knobs) as llm, torch.inference_mode():
        report = llm.report()
        assert report.measured["weights"] == report.estimate.weights == qv.estimate_vram(folder, **knobs).weights
        return llm.model(IDS).logits.float()


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def plain_logits(folder):
    """Logits of plain transformers."""
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(IDS).logits.float()


def refusal(folder, error=qv.CheckpointError):
    """The text that estimate, plan and load refuse a folder with: the same one."""
    texts = set()
    for call in (qv.estimate_vram, qv.plan, qv.load):
        with pytest.raises(error) as caught:
            call(folder)
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


def block_of(text):
    """The `quantization_config` that a text says to add."""
    return json.loads(re.search(r'"quantization_config": (\{.*\})', text)[1])


# GPTQModel leaves a temporary folder to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_whole_file_gives_what_plain_transformers_gives(whole, expected):
    assert distance(expected, plain_logits(whole)) < 0.03  # which sums by another kernel


# parts


def without(*names):
    return lambda tensors: {name: one for name, one in tensors.items() if not name.endswith(names)}


@pytest.mark.parametrize("part", [f"{UP}.g_idx", "g_idx", "layers.0.self_attn.q_proj.g_idx"])
def test_the_order_of_columns_is_made_where_it_follows_from_the_groups(whole, expected, tmp_path, part):
    assert torch.equal(logits(copied(whole, tmp_path, without(part))), expected)


def test_the_order_is_made_for_one_group_too(gptqmodel, plain, tmp_path):
    folder = by_hand(plain, tmp_path / "one", group_size=-1)
    before = logits(folder)
    assert torch.equal(logits(change_tensors(folder, without("g_idx"))), before)


@pytest.mark.parametrize("part", ["scales", "qzeros", "qweight"])
@pytest.mark.parametrize("where", [UP, "model.layers.0.self_attn.k_proj", ""])
def test_a_part_that_codes_need_is_refused_by_name(whole, tmp_path, part, where):
    text = refusal(copied(whole, tmp_path, without(f"{where}.{part}")))
    module = where or "model.layers.0.self_attn.q_proj"
    assert f"'{module}.weight' is stored in gptq in 'model.safetensors', which lacks '{module}.{part}'" in text
    assert "Use a whole copy of the checkpoint, or quantize the 16-bit model again" in text


def test_an_order_of_its_own_has_to_be_there(whole, tmp_path):
    folder = copied(whole, tmp_path, without(f"{UP}.g_idx"), quantization_config=BLOCK | {"desc_act": True})
    text = refusal(folder)
    assert f"lacks '{UP}.g_idx': desc_act is true in {folder}/config.json" in text


WRONG = {
    "empty": (f"{UP}.scales", lambda one: one[:0], "is empty in 'model.safetensors': training in parts"),
    "float64": (f"{UP}.scales", torch.Tensor.double, "was cast when the model was saved. Save it again without"),
    "cut": (f"{UP}.scales", lambda one: one[:, :-8], r"F32 of shape \[1, 256\], got F16 of shape \[1, 248\]"),
    "groups": (f"{UP}.qzeros", lambda one: one.repeat(2, 1), r"I32 of shape \[1, 32\], got I32 of shape \[2, 32\]"),
    "bits": (f"{UP}.qweight", lambda one: one[: len(one) // 2], "check bits and group_size in quantization_config"),
    "order": (f"{UP}.g_idx", lambda one: one[:-1], r"I32 of shape \[128\], got I32 of shape \[127\]"),
    "wide codes": (f"{UP}.qweight", torch.Tensor.long, r"should be I32 of shape \[16, 256\], got I64"),
    "norm": ("model.norm.weight", torch.Tensor.char, r"should be BF16 or F16 or F32 .* got I8 of .*; save it in one"),
    "table": ("model.embed_tokens.weight", lambda one: one[:, ::2].char(), "it is quantized, which is not loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_part_of_another_dtype_or_shape_is_refused_by_name(whole, tmp_path, case):
    name, change, text = WRONG[case]
    folder = copied(whole, tmp_path, lambda tensors: {**tensors, name: change(tensors[name])})
    found = refusal(folder)
    assert name in found
    assert re.search(text, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_norms_of_another_float_are_counted_as_they_are_loaded(whole, expected, tmp_path, dtype):
    def change(tensors):
        return {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}

    assert distance(logits(copied(whole, tmp_path, change)), expected) < 0.02


# rules and lists


@pytest.fixture(scope="module")
def mixed(gptqmodel, plain, tmp_path_factory):
    """One with the MLP of a layer in 16 bits, and no word of it in config.json."""
    skipped = ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj")
    return by_hand(plain, tmp_path_factory.mktemp("mixed") / "gptq", skipped=skipped)


@pytest.mark.parametrize(
    "rules",
    [
        {"-:lm_head": {}},
        {"-:.*embed.*": {}, "+:.*": {}},
        {"+:.*down_proj": {"bits": 4, "group_size": 128}},
        {"+:.*experts.*": {"bits": 8}},
    ],
    ids=str,
)
def test_rules_that_change_nothing_load(whole, expected, tmp_path, rules):
    folder = copied(whole, tmp_path, quantization_config=BLOCK | {"dynamic": rules})
    assert torch.equal(logits(folder), expected)


LEFT_OUT = [
    {"dynamic": {r"-:model\.layers\.1\.mlp\..*": {}}},
    {"dynamic": {f"-:model.layers.1.mlp.{one}_proj": {} for one in ("gate", "up", "down")}},
    {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp"]},
    {"modules_not_to_convert": ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]},
    {
        "modules_in_block_to_quantize": [
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            [f"layers.{layer}.mlp.{one}_proj" for layer in (0, 2) for one in ("gate", "up", "down")],
        ]
    },
]


@pytest.mark.parametrize("rule", LEFT_OUT, ids=lambda rule: next(iter(rule)))
def test_a_layer_that_a_rule_leaves_in_16_bits_loads(mixed, expected, tmp_path, rule):
    got = logits(copied(mixed, tmp_path, quantization_config=BLOCK | rule))
    assert got.isfinite().all()
    assert 0 < distance(got, expected) < 0.2  # fewer matrices are rounded


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_a_list_of_what_is_quantized_may_be_flat(gptqmodel, plain, tmp_path, nested):
    named = ["self_attn.q_proj", "mlp.down_proj"]
    others = tuple(f"{name}_proj" for name in ("k", "v", "o", "gate", "up"))
    folder = by_hand(plain, tmp_path / "flat", skipped=others)
    change_config(folder, quantization_config=BLOCK | {"modules_in_block_to_quantize": [named] if nested else named})
    assert 0 < distance(logits(folder), plain_logits(plain)) < 0.2


def test_a_layer_in_16_bits_that_no_rule_leaves_out_is_refused_with_the_rule(mixed, tmp_path):
    text = refusal(mixed)
    assert "'model.layers.1.mlp.gate_proj' is stored in 16 bits, and " in text
    rules = json.loads("{" + text.partition("in quantization_config: ")[2] + "}")
    assert len(rules) == 3
    folder = copied(mixed, tmp_path, quantization_config=BLOCK | {"dynamic": rules})
    assert logits(folder).isfinite().all()


@pytest.mark.parametrize(
    ("rule", "cure"),
    [
        ({"dynamic": {"-:.*up_proj": {}}}, "take that rule out of dynamic"),
        ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, "take that list out of it, for all are quantized"),
        ({"modules_to_not_convert": ["up_proj"]}, "take it out of modules_to_not_convert"),
    ],
    ids=str,
)
def test_a_rule_that_leaves_out_what_is_quantized_is_refused(whole, tmp_path, rule, cure):
    text = refusal(copied(whole, tmp_path, quantization_config=BLOCK | rule))
    assert "_proj' is stored in gptq, and " in text
    assert text.endswith(cure) or cure in text


@pytest.mark.parametrize(
    "rules",
    [{"+:.*down_proj": {"bits": 8}}, {".*": {"group_size": 32}}, {r"model\.layers\.2\..*": {"desc_act": True}}],
    ids=str,
)
def test_settings_of_their_own_are_refused_before_a_download(whole, tmp_path, rules):
    text = refusal(copied(whole, tmp_path, quantization_config=BLOCK | {"dynamic": rules}))
    assert "bits or groups of their own for some modules ('dynamic') by its quantization_config, which is not" in text


def test_settings_of_other_programs_do_not_stop_it(whole, expected, tmp_path):
    more = {
        "damp_percent": 0,
        "dataset": "my own",
        "model_file_base_name": None,
        "tokenizer": None,
        "use_exllama": True,
    }
    assert torch.equal(logits(copied(whole, tmp_path, quantization_config=BLOCK | more)), expected)


# AWQ


@pytest.fixture(scope="module")
def awq(whole, tmp_path_factory):
    return as_awq(whole, tmp_path_factory.mktemp("awq") / "awq")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def test_awq_gives_what_its_codes_say(awq, expected):
    assert distance(logits(awq), expected) < 0.01


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_part_that_awqs_codes_need_is_refused_by_name(awq, tmp_path, part):
    assert f"which lacks '{UP}.{part}'" in refusal(copied(awq, tmp_path, without(f"{UP}.{part}")))


def test_awqs_settings_in_a_file_of_their_own_are_read(awq, tmp_path):
    folder = copied(awq, tmp_path, quantization_config=None)
    settings = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(folder), logits(awq))


@pytest.mark.parametrize("key", ["modules_to_not_convert", "modules_not_to_convert"])
def test_awq_with_modules_in_16_bits(mixed, expected, tmp_path, key):
    folder = as_awq(mixed, tmp_path / "awq")
    assert f'"{UP}"' in refusal(folder)
    change_config(folder, quantization_config=AWQ | {key: ["model.layers.1.mlp"]})
    assert 0 < distance(logits(folder), expected) < 0.2


# blocks that are lost, or another's


@pytest.mark.parametrize("kind", ["gptq", "gptq without an order", "gptq in one group", "awq", "gptq, tied"])
def test_a_lost_block_is_named_and_loads_once_it_is_added(request, plain, whole, tmp_path, kind):
    if kind == "gptq in one group":
        folder = by_hand(plain, tmp_path / "changed", group_size=-1)
    elif kind == "gptq, tied":
        folder = tied(whole, tmp_path / "changed")
    else:
        folder = copied(request.getfixturevalue("awq") if kind == "awq" else whole, tmp_path)
    if "without" in kind:
        change_tensors(folder, without("g_idx"))
    before = logits(folder)
    change_config(folder, quantization_config=None)
    text = refusal(folder)
    name = kind[:4].strip(", ").upper()
    assert re.search(rf"quantized by {name} \('.*qweight'\), and .* has no quantization_config; add to it", text)
    change_config(folder, quantization_config=block_of(text))
    assert torch.equal(logits(folder), before)


def test_a_block_of_the_other_of_the_two_is_refused_with_the_right_one(whole, awq, tmp_path):
    for folder, block, name in ((whole, AWQ, "GPTQ"), (awq, BLOCK, "AWQ")):
        changed = copied(folder, tmp_path / name, quantization_config=block)
        text = refusal(changed)
        assert f"quantized the weights, and they are by {name} ('" in text
        change_config(changed, quantization_config=block_of(text))
        assert torch.equal(logits(changed), logits(folder))


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "autoround_version": "0.9"}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_auto_rounds_export_loads_by_the_change_that_is_named(request, tmp_path, layout):
    folder = request.getfixturevalue("whole" if layout == "gptq" else "awq")
    block = AUTO_ROUND | {"packing_format": f"auto_round:auto_{layout}"}
    changed = copied(folder, tmp_path, quantization_config=block)
    text = refusal(changed, qv.ConfigError)
    size = sum(one.nbytes for one in load_file(changed / "model.safetensors").values())
    assert f"quantized by AutoRound ('auto-round'), in {size:,} bytes" in text
    assert f'set quant_method to "{layout}"' in text
    version = {"version": "gemm"} if layout == "awq" else {}
    change_config(changed, quantization_config=block | {"quant_method": layout} | version)
    assert torch.equal(logits(changed), logits(folder))


@pytest.mark.parametrize("packing", ["auto_round:gptq", "auto_round", None])
def test_other_exports_of_auto_round_are_told_what_to_export(packing):
    block = AUTO_ROUND | ({} if packing is None else {"packing_format": packing})
    with pytest.raises(qv.ConfigError, match=r"AutoRound's export with format='auto_gptq' and one setting for all"):
        qv.estimate_vram({**SHAPE, "quantization_config": block})


def test_a_block_without_a_method_is_told_which(whole, tmp_path):
    folder = copied(whole, tmp_path, quantization_config={key: BLOCK[key] for key in ("bits", "group_size")})
    assert refusal(folder, qv.ConfigError).endswith('add "quant_method": "gptq" to it')
