"""Knobs and rules: each knob is documented, each rule is broken by an example, and the error names the rule's knob."""

import re
from dataclasses import fields, replace

import pytest

import qwen_vram as qv
from qwen_vram.planning.support import not_loadable
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.profile import CHOICES, CHOICES_OR_NONE, COUNTS, KNOBS
from qwen_vram.spec.rules import table
from tests.hygiene import layout

CONFIG = {
    "model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 512,
    "num_key_value_heads": 1, "intermediate_size": 256, "tie_word_embeddings": False,
}  # fmt: skip
MODEL = Architecture.from_config(CONFIG)
LORA = Weight("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 128), "adapter")
FIXED = {"attention": "fused", "cache": "preallocated"}
# Knobs that exclude each other, and the knob that is named.
EXCLUDED = [
    ({"cache": "paged", "kv_cache": "int8"}, "kv_cache"),
    ({"cache": "paged", "kv_device": "host"}, "kv_device"),
    ({"cache": "paged", "streamed_layers": 1}, "streamed_layers"),
    ({"cache": "paged", "attention": "fused", "compiled": True}, "compiled"),
    ({"disk_layers": 1}, "disk_layers"),
    ({"streamed_layers": 2, "disk_layers": 1, "host_layers": 2}, "host_layers"),
    ({"kv_cache": "int4", "cache": "static"}, "kv_cache"),
    ({"kv_device": "host"}, "kv_device"),
    ({"kv_device": "host", "kv_cache": "int8", "cache": "preallocated"}, "kv_device"),
    *(
        ({**knobs, knob: True}, knob)
        for knob in ("captured", "compiled")
        for knobs in ({"attention": "fused"}, {"cache": "static"}, {**FIXED, "weights": "int8"})
    ),
    ({**FIXED, "captured": True, "kv_cache": "int8"}, "captured"),
    ({**FIXED, "compiled": True, "captured": True, "embeddings": "host"}, "compiled"),
]
# What runs nowhere: the model, the knobs, and the knob that is named.
NOWHERE = [
    (MODEL, {"weights": "gptq-int8"}, "weights"),
    (MODEL, {"lm_head": "nf4"}, "lm_head"),
    (MODEL, {"weights": "nf4", "lm_head": "int8"}, "lm_head"),
    (replace(MODEL, stored_format="gptq"), {"weights": "gptq", "lm_head": "gptq"}, "lm_head"),
    (MODEL, {"weights": "int4", "streamed_layers": 1}, "streamed_layers"),
    (replace(MODEL, layer_dtypes=("F16",)), {"streamed_layers": 1, "disk_layers": 1}, "disk_layers"),
    (MODEL, {"weights": "nf4", "streamed_layers": 1, "disk_layers": 1}, "disk_layers"),
    (replace(MODEL, adapter_weights=(LORA,)), {"streamed_layers": 1, "host_layers": 1}, "host_layers"),
    (MODEL, {"weights": "int8", "streamed_layers": 1, "host_layers": 1}, "host_layers"),
    (
        Architecture.from_config({**CONFIG, "intermediate_size": 240}),
        {"weights": "nf4", "streamed_layers": 1, "host_layers": 1},
        "host_layers",
    ),
]


def unchecked(**knobs):
    """A profile whose knobs nothing holds against each other."""
    profile = object.__new__(qv.Profile)
    for field in fields(qv.Profile):
        object.__setattr__(profile, field.name, knobs.get(field.name, field.default))
    return profile


def first(rules, facts):
    return next(number for number, rule in enumerate(rules) if rule.when(facts))


def test_each_rule_of_a_profile_is_broken_by_an_example():
    assert {first(table.PROFILE_RULES, unchecked(**knobs)) for knobs, _ in EXCLUDED} == set(
        range(len(table.PROFILE_RULES))
    )
    for knobs, named in EXCLUDED:
        with pytest.raises(qv.WorkloadError, match=named) as caught:
            qv.Profile(**knobs)
        assert (caught.value.name, caught.value.got) == (named, knobs[named])


def test_each_rule_of_what_runs_nowhere_is_broken_by_an_example():
    facts = [table.Model(model, qv.Profile(**knobs)) for model, knobs, _ in NOWHERE]
    assert [first(table.ANYWHERE_RULES, one) for one in facts] == list(range(len(table.ANYWHERE_RULES)))
    for (model, profile), (_, knobs, named) in zip(facts, NOWHERE, strict=True):
        refused = not_loadable(model, profile)
        assert (refused.knob, refused.value) == (named, knobs[named])
        assert str(refused).startswith(f"{named}={knobs[named]!r}")
        assert not_loadable(MODEL, qv.Profile()) is None


@pytest.mark.parametrize(
    "knobs",
    [{"streamed_layers": 2}, {**FIXED, "captured": True}, {**FIXED, "compiled": True}, {"cache": "paged"}],
    ids=lambda knobs: list(knobs)[-1],
)
def test_each_rule_of_several_gpus_is_broken_by_an_example(knobs):
    named = list(knobs)[-1]
    assert len(table.SEVERAL_GPU_RULES) == 4
    begins = r"concurrent requests \(cache='paged'\)" if named == "cache" else f"{named}={knobs[named]}"
    with pytest.raises(qv.NotSupportedError, match=f"^{begins} over 2 GPUs cannot be loaded yet"):
        table.check_split(qv.Profile(**knobs), 2)
    table.check_split(qv.Profile(), 2)


def test_each_rule_of_this_machine_is_broken_by_an_example(monkeypatch):
    torch = pytest.importorskip("torch")
    preflight = pytest.importorskip("qwen_vram.runtime.loading.preflight")
    backends = pytest.importorskip("qwen_vram.runtime.backends")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(preflight, "missing_compiler", lambda: "a C compiler")
    flash, layers = {"attention": "flash_attention_2"}, {"streamed_layers": 2, "host_layers": 1}
    examples = [
        ({**FIXED, "compiled": True}, "cpu", "compiled"),
        ({**FIXED, "captured": True}, "cpu", "captured"),
        ({"attention": "fused", "cache": "paged"}, "cuda", "captured"),
        ({"attention": "fused", "cache": "paged", "captured": True}, "cuda", "cache"),
        ({**layers, "weights": "int8-wo"}, "cpu", "streamed_layers"),
        ({**layers, "weights": "int8-wo"}, "cpu", "host_layers"),
        ({"attention": "fused"}, "cuda", "attention"),
        (flash, "cuda", "attention"),
        (flash, "cpu", "attention"),
    ]
    assert len(preflight.MACHINE_RULES) == len(examples)
    for rule, (knobs, device, named) in zip(preflight.MACHINE_RULES, examples, strict=True):
        profile = qv.Profile(**knobs)
        here = preflight.Here(profile, MODEL, backends.get_backend(profile.weights), torch.device(device))
        assert rule.when(here)
        assert rule.knob == named
        begins = {"captured": "concurrent requests (cache='paged') on a GPU need ", "cache": "concurrent requests ("}
        begins = begins[named] if profile.cache == "paged" else ""
        assert rule.message(here).startswith(f"{begins}{named}=")
        assert not rule.when(here._replace(profile=qv.Profile()))


def test_each_knob_is_a_row_with_its_docs_default_and_values():
    docs = dict(re.findall(r"^        (\w+): (.*)$", qv.Profile.__doc__, re.M))
    reference = (layout.MAP.parent / "reference.md").read_text()
    assert list(docs) == ["name", *KNOBS]
    assert {rule.knob for rule in table.RULES} <= KNOBS.keys()
    flags = {name for name, knob in KNOBS.items() if isinstance(knob.default, bool)}
    assert {*CHOICES, *CHOICES_OR_NONE, *COUNTS, *flags} == KNOBS.keys()
    for name, knob in KNOBS.items():
        shown = re.escape(repr(knob.default).replace("'", '"'))
        assert re.search(rf"^\| `{name}` \| `{shown}`", reference, re.M), name
        for wrong in ("no such value", -1, 1.5, None if not knob.may_be_none else "none"):
            with pytest.raises((qv.UnknownNameError, qv.WorkloadError), match=name):
                qv.Profile(**{name: wrong})
