"""config.json as `transformers` reads it: defaults, types, rotary positions, and texts that are no JSON."""

import json
import logging
import shutil
from pathlib import Path

import pytest

import qwen_vram as qv
from qwen_vram.spec.config.keys import wrong_key
from qwen_vram.spec.families import family_of, model_types
from tests.helpers.odd_folders import GONE, Base, config, make_base

ASKED = {"prompt_len": 64, "max_new_tokens": 16, "progress": False}
SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), Base())


@pytest.fixture
def folder(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "model"))


def classes():
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


@pytest.mark.parametrize("kind", model_types())
def test_defaults_are_those_of_transformers(kind):
    import dataclasses

    fields = {one.name: one.default for one in dataclasses.fields(classes()[kind])}
    shared = {one.name for one in dataclasses.fields(classes()[kind].__mro__[1])}
    assert {name: key.default for name, key in family_of(kind).keys.items()} == {
        name: default for name, default in fields.items() if name not in shared
    }


VALUES = [None, True, 0, 7, 1.5, "silu", "7", [7], ["full_attention"] * 4, [None], {}, {"rope_type": "default"}]


@pytest.mark.parametrize("kind", model_types())
def test_values_are_refused_as_transformers_refuses_them(kind):
    differing, family = {}, family_of(kind)
    for name in [*family.keys, "dtype", "torch_dtype", "num_labels"]:
        for value in [*VALUES, "bfloat16", "torch.bfloat16", "auto", "half"]:
            given = {**SHAPE, "model_type": kind, name: value}
            if name == "hidden_act" or (name.endswith("dtype") and value in ("silu", "7", 7, 0, True, 1.5)):
                continue  # transformers takes any text, and other texts are refused here
            if (name, value) == ("head_dim", 7):
                continue  # an odd one, which is refused apart
            try:
                classes()[kind].from_dict(json.loads(json.dumps(given)))
                accepted = True
            except Exception:
                accepted = False
            if name.endswith(("dtype",)) and isinstance(value, (dict, list)):
                continue  # no checkpoint has them
            if ((wrong_key(family.keys, given) or family.wrong(given)) == "") != accepted:
                differing[name, repr(value)] = accepted
    assert not differing


@pytest.mark.parametrize("kind", model_types())
@pytest.mark.parametrize("gone", ["num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "hidden_size"])
def test_a_key_that_is_missing_counts_as_transformers_has_it(kind, gone):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in {**SHAPE, "head_dim": 16}.items() if key != gone}
    if kind == "qwen2":
        given.pop("head_dim", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    ours = qv.Architecture.from_config({**given, "model_type": kind})
    assert ours.num_parameters == sum(one.numel() for one in model.parameters())
    assert ours.max_position_embeddings == model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps must be a number with a decimal point or an exponent.*, got '1e-6'"),
        ({"use_cache": None}, "use_cache is missing: it is null, and must be true or false, or be left out"),
        ({"eos_token_id": "2"}, "eos_token_id must be an integer, a list of integers or null, got '2'"),
        ({"dtype": "torch.bfloat16"}, r"dtype must be the name of a dtype such as \"bfloat16\" \(without 'torch.'\)"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries and num_hidden_layers is 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types has chunked_attention; full_attention alone is"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            "factor in rope_scaling must be a positive number, got '4'",
        ),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_type 'mrope', which a qwen2 is not run with"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling of the rope_type 'yarn' needs a factor"),
        ({"rope_theta": "1000000", "rope_parameters": GONE}, "rope_theta must be a positive number, got '1000000'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX quantized this checkpoint"),
        ({"per_layer_config": 3}, r"transformers refuses it \(.*items.*\); correct that key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_transformers_refuses_is_refused_by_its_key_and_never_blamed_on_the_tokenizer(folder, changes, text):
    config(**changes)(folder)
    calls = [lambda: qv.load(folder, **ASKED)]
    if "transformers refuses" not in text:
        calls += [lambda: qv.estimate_vram(folder), lambda: qv.plan(folder, vram="8GiB", ram="8GiB")]
    for call in calls:
        with pytest.raises(qv.ConfigError, match=text) as caught:
            call()
        assert "tokenizer" not in str(caught.value)
        assert caught.value.source == str(folder / "config.json")


@pytest.mark.parametrize(
    "kind", ["Qwen2ForSequenceClassification", "Qwen2ForRewardModel", "Qwen2ForTokenClassification", "Qwen3Model"]
)
def test_a_dict_of_a_model_that_writes_no_tokens_is_refused(kind):
    given = {**SHAPE, "model_type": kind[:5].lower(), "architectures": [kind]}
    with pytest.raises(qv.ConfigError, match=f"architectures {kind} is no language model"):
        qv.estimate_vram(given)
    assert qv.estimate_vram({**given, "architectures": [f"FSDP{kind[:5]}ForCausalLM"]}).weights


# rotary positions

YARN = {"factor": 4.0, "original_max_position_embeddings": 512}


def block_of(error: Exception) -> dict[str, object]:
    """The entry that a refusal gives to write into config.json."""
    text = str(error)
    start = min(place for place in (text.find('"rope_scaling": {'), text.find('"rope_parameters": {')) if place >= 0)
    return dict(json.loads("{" + text[start : text.index("}", start) + 1] + "}"))


SPELLINGS = {
    "transformers 4": {"rope_parameters": GONE, "rope_theta": 1e6},
    "transformers 5": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "transformers 4, stretched": {
        "rope_parameters": GONE, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN, "factor": 1.5},
    },
    "transformers 5, stretched": {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN, "factor": 1.5, "beta_fast": 16.0},
    },
    "no theta": {"rope_parameters": GONE},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_entry_that_a_refusal_gives_makes_the_context_load_and_keeps_rope_theta(folder, spelling):
    import torch
    from transformers import AutoModelForCausalLM

    config(**SPELLINGS[spelling])(folder)
    asked = {**ASKED, "prompt_len": 1000}
    with pytest.raises(qv.WorkloadError, match="original_max_position_embeddings") as caught:
        qv.load(folder, **asked)
    config(**block_of(caught.value))(folder)
    theta = 1e4 if spelling == "no theta" else 1e6
    ids = torch.arange(5, 905)[None]
    with qv.load(folder, **asked) as llm, torch.inference_mode():
        rope = llm.model.config.rope_parameters
        assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", theta, 2.0)
        assert rope.get("beta_fast") == (16.0 if spelling == "transformers 5, stretched" else None)
        ours = llm.model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(ours, plain)


def test_a_qwen3_is_stretched_from_the_length_that_it_was_trained_on():
    with pytest.raises(qv.WorkloadError) as caught:
        qv.estimate_vram("Qwen3-8B", prompt_len=100_000)
    assert block_of(caught.value)["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768,
    }  # fmt: skip
    with pytest.raises(qv.WorkloadError, match="Qwen publishes factors up to 4; answers may suffer"):
        qv.estimate_vram("Qwen2.5-7B-Instruct", prompt_len=500_000)


@pytest.mark.parametrize(
    ("scaling", "theta"),
    [({"type": "yarn", **YARN}, 1e6), ({"rope_type": "linear", "factor": 2.0}, 5e5), ({"factor": 2.0}, 1e6)],
    ids=str,
)
def test_a_rope_scaling_that_would_drop_rope_theta_is_refused_with_the_one_entry(folder, scaling, theta):
    config(rope_parameters={"rope_theta": theta, "rope_type": "default"}, rope_scaling=scaling)(folder)
    with pytest.raises(
        qv.ConfigError, match="transformers drops rope_parameters for it, with its rope_theta"
    ) as caught:
        qv.estimate_vram(folder)
    config(rope_scaling=GONE, **block_of(caught.value))(folder)
    with qv.load(folder, **ASKED) as llm:
        assert llm.model.config.rope_parameters["rope_theta"] == theta
    config(rope_parameters={"rope_theta": theta}, rope_scaling={**scaling, "rope_theta": theta})(folder)
    assert qv.estimate_vram(folder, prompt_len=64, max_new_tokens=16).weights  # nothing is lost


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "factor": 4.0}}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512.0}}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1024),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 256}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 256}}, 512),
        ({"rope_scaling": {}}, 512),
    ],
    ids=str,
)
def test_positions_are_those_that_transformers_gives(folder, changes, reach):
    from transformers import AutoConfig

    config(**{"rope_parameters": GONE, **changes})(folder)
    assert qv.estimate_vram(folder, prompt_len=64, max_new_tokens=16).architecture.max_position_embeddings == reach
    AutoConfig.from_pretrained(folder)
    with qv.load(folder, **ASKED) as llm:
        llm.generate("hi", max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "yarn", **YARN}}, "stretches 512 positions by yarn with a factor of 4 to 2,048"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "names no original_max_position_embeddings"),
        ({"rope_parameters": {"factor": 4.0}}, "the factor 4.0 in rope_parameters has no effect"),
        ({"rope_scaling": {"factor": 4.0, "type": "default"}}, "the factor 4.0 in rope_scaling has no effect"),
        (
            {"dual_chunk_attention_config": {"original_max_position_embeddings": 40}},
            "dual chunk attention .* is not run",
        ),
        ({"dual_chunk_attention_config": {"chunk_size": 40}}, "80 tokens are past the 40"),
    ],
    ids=str,
)
def test_positions_that_are_not_what_they_seem_are_said_in_one_line(folder, caplog, changes, words):
    config(**{"rope_parameters": GONE, **changes})(folder)
    calls = (qv.estimate_vram, lambda model, **asked: qv.plan(model, vram="8GiB", ram="8GiB", **asked))
    for call in (*calls, lambda model, **asked: qv.load(model, progress=False, **asked).close()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="qwen_vram"):
            call(folder, prompt_len=64, max_new_tokens=16)
        import re

        assert len([one for one in caplog.messages if re.search(words, one)]) == 1


def test_plain_positions_are_not_spoken_of(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="qwen_vram"):
        qv.load(folder, **ASKED).close()
    assert caplog.messages == []


# texts

EDITS = {
    "comma in an object": (lambda text: text.rstrip()[:-1].rstrip() + ",\n}", "a comma before the closing", "line"),
    "comma in a list": (
        lambda text: text.replace('"hidden_act"', '"eos": [1, 2,], "hidden_act"'), "a comma before the closing", "line",
    ),
    "comment": (lambda text: text.replace("{\n", "{\n  // yarn\n", 1), "a comment", "line 2, column 3"),
    "hash": (lambda text: text.replace("{\n", "{\n # yarn\n", 1), "a comment", "line 2, column 2"),
    "single quotes": (lambda text: text.replace('"qwen2"', "'qwen2'"), "a single quotation mark", "line"),
    "Python's words": (lambda text: text.replace("false", "False", 1), "Python's False", "line"),
    "curly quotes": (lambda text: text.replace('"qwen2"', "\u201cqwen2\u201d"), "a curly quotation mark", "line"),
    "no comma": (lambda text: text.replace(",\n", "\n", 1), "a missing comma", "line 3|line 4|line 5"),
    "two objects": (lambda text: text + "{}", "more text after the end", "line"),
    "cut": (lambda text: text[: len(text) // 2], "is cut off", "line"),
    "nothing": (lambda text: "", "is cut off: the file is empty", ""),
}  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("edit", EDITS)
def test_json_that_a_hand_broke_is_refused_with_cause_line_and_column(folder, edit, file):
    change, cause, place = EDITS[edit]
    path = folder / file
    text = (folder / "config.json").read_text()
    if file.startswith("model"):
        (folder / "model.safetensors").unlink()
    path.write_text(change(text))
    import re

    for call in (qv.estimate_vram, lambda model: qv.load(model, **ASKED)):
        with pytest.raises(qv.QwenVramError, match=re.escape(str(path))) as caught:
            call(folder)
        assert cause in str(caught.value)
        assert re.search(place, str(caught.value))
        if "cut off" not in cause:
            assert "download" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gbk", "latin-1"])
def test_texts_in_other_encodings_say_how_to_save_them(folder, encoding):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"_name_or_path": "\u00e9" if encoding == "latin-1" else "\u5343\u95ee"}
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    with pytest.raises(qv.ConfigError, match="save it as UTF-8|is not JSON"):
        qv.estimate_vram(folder)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    qv.load(folder, **ASKED).close()


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_byte_order_mark_that_transformers_does_not_read_is_refused_by_name(folder, file):
    if file.startswith("model"):
        weights = {"metadata": {}, "weight_map": {}}
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / file).write_text(json.dumps(weights))
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    with pytest.raises(qv.QwenVramError, match=f"{file}' begins with a byte-order mark, .* save it as UTF-8 without"):
        qv.load(folder, **ASKED)
