"""A quantized head of its own for models with tied embeddings, and their token table on the host."""

import json
import shutil
from functools import cache

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

import qwen_vram as qv
from qwen_vram.arithmetic.weights import stored_weights
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.measure import host_bytes, weight_storages
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from tests.helpers.lora_models import make_adapter, make_base, untied_twin
from tests.helpers.tiers import thinned

QUANTIZED = ("nf4", "nf4-plain", "fp4", "fp4-plain", "int8")
TABLE = "model.embed_tokens.weight"


def load(model, weights="nf4", **knobs):
    return qv.load(model, profile="default", weights=weights, progress=False, **{"lm_head": weights, **knobs})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40, device=model.device)[None]).logits


@pytest.mark.parametrize(*thinned(1, weights=QUANTIZED, model=["tied", "qwen3"], embeddings=["device", "host"]))
def test_it_takes_the_predicted_bytes(request, model, weights, embeddings):
    with load(request.getfixturevalue(model), weights, embeddings=embeddings) as llm:
        promised = llm.plan.estimate
        every = {row.weight.name: row.nbytes for row in stored_weights(promised.architecture, promised.profile)}
        on_host = every.pop(TABLE) if embeddings == "host" else 0
        real = weight_storages(llm.model, get_backend(weights))
        assert real == every
        assert sum(real.values()) == promised.weights == llm.report().measured["weights"]
        assert host_bytes(llm.model) == promised.host == on_host
        assert isinstance(llm.model.get_input_embeddings(), HostEmbedding) is (embeddings == "host")
        assert isinstance(llm.model.lm_head, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        assert llm.model.config.tie_word_embeddings is False


@pytest.fixture(scope="module")
def twin(tied, tmp_path_factory):
    folder = untied_twin(tied, tmp_path_factory.mktemp("twin") / "twin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.mark.parametrize("weights", QUANTIZED)
def test_it_is_what_an_untied_checkpoint_with_the_same_head_gives(tied, twin, weights):
    with load(twin, weights) as one, load(tied, weights, embeddings="host") as other:
        assert torch.equal(logits(one.model), logits(other.model))
        assert one.model.generation_config.to_dict() == other.model.generation_config.to_dict()
        assert other.model.name_or_path == other.model.config.name_or_path == str(tied)
        for estimate in (one.plan.estimate, other.plan.estimate):
            assert estimate.weights + estimate.host == one.plan.estimate.weights


def test_shards_and_generation_settings(tied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    for file in tied.glob("*token*"):
        shutil.copy(file, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    with load(tmp_path / "shards", embeddings="host") as llm, load(tied, embeddings="host") as whole:
        assert torch.equal(logits(llm.model), logits(whole.model))
        assert (llm.model.generation_config.top_k, whole.model.generation_config.top_k) == (7, None)


def test_a_head_that_the_file_holds_is_taken(tied, tmp_path):
    """`transformers` unties a checkpoint whose head differs from its table, whatever config.json says."""
    from safetensors.torch import load_file, save_file

    twin = untied_twin(tied, tmp_path / "twin")
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(twin / "model.safetensors")
    tensors["lm_head.weight"] = tensors[TABLE].flip(0).contiguous()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with load(twin) as llm, load(tied) as shared:
        torch.testing.assert_close(logits(llm.model).flip(-1), logits(shared.model), rtol=0.1, atol=0.1)
        assert not torch.equal(logits(llm.model), logits(shared.model))


@pytest.mark.parametrize("profile", ["compact", "auto"])
def test_profiles_load_it(tied, profile):
    knobs = {} if profile == "compact" else {"weights": "nf4", "lm_head": "nf4", "embeddings": "host"}
    with qv.load(tied, profile=profile, progress=False, **knobs) as llm:
        assert llm.generate("hello", max_new_tokens=4, do_sample=False)
        assert llm.report().measured["weights"] == llm.plan.estimate.weights
        assert llm.report().measured["kv_cache"] == llm.report().estimate.kv_cache


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_a_head_of_another_format_is_refused_by_name(tied, head):
    weights = "bf16" if head == "nf4" else "nf4"
    with pytest.raises(qv.NotSupportedError, match=f"lm_head='{head}' with weights='{weights}'"):
        load(tied, weights, lm_head=head)


def test_a_quantized_checkpoint_with_a_shared_head_keeps_it_whatever_its_list_says(tied, tmp_path):
    with load(tied, lm_head=None) as llm:
        llm.save_quantized(tmp_path / "copy", progress=False)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    with pytest.raises(qv.ConfigError, match="stored with lm_head=None, got lm_head='nf4'"):
        load(tmp_path / "copy")
    config["quantization_config"]["llm_int8_skip_modules"] = []
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with qv.load(tmp_path / "copy", progress=False) as llm:
        assert llm.plan.profile.lm_head is None
        assert llm.model.lm_head.weight is llm.model.get_input_embeddings().weight
    assert qv.estimate_vram(config).weights == qv.estimate_vram(tmp_path / "copy").weights


def test_a_table_that_stays_is_said_so(tied, caplog):
    with load(tied, lm_head=None, embeddings="host") as llm:
        assert type(llm.model.get_input_embeddings()) is torch.nn.Embedding
        assert llm.plan.estimate.host == 0
    assert "embeddings='host' leaves the token table where it is: it is this model's head too" in caplog.text


# adapters

KINDS = {
    "head factors": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "auto"),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "auto"),
    "table": ({"target_modules": ["q_proj", "embed_tokens"]}, "auto"),
    "whole table": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "auto"),
}
SHARED, OWN = {"lm_head": None}, {"embeddings": "host"}


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """A call that gives an adapter of a kind for a base, made once."""

    @cache
    def make(folder, kind):
        settings, save = KINDS[kind]
        return make_adapter(folder, tmp_path_factory.mktemp("adapter") / "made", r=4, save=save, **settings)

    return make


@cache
def bare_logits(folder, **knobs):
    with load(folder, **knobs) as llm:
        return logits(llm.model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(*thinned(2, kind=tuple(KINDS), base=["tied", "untied"], knobs=[SHARED, OWN]), ids=str)
def test_an_adapter_of_head_or_table_runs_or_is_refused_by_name(request, adapter_of, base, kind, knobs):
    model = request.getfixturevalue(base)
    if knobs is OWN and kind != "head factors":
        knob = "lm_head" if "head" in kind or base == "tied" else "embeddings"
        with pytest.raises(qv.NotSupportedError, match=f"{knob}='.*': the adapter .* merge it") as caught:
            load(model, adapter=adapter_of(model, kind), **knobs)
        assert caught.value.knob == knob
        return
    with load(model, adapter=adapter_of(model, kind), **knobs) as llm:
        assert sum(weight_storages(llm.model, get_backend("nf4")).values()) == llm.plan.estimate.weights
        assert not torch.equal(logits(llm.model), bare_logits(model, **knobs))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("embeddings", ["device", "host"])
@pytest.mark.parametrize("weights", QUANTIZED)
def test_on_a_gpu(tied, tmp_path, weights, embeddings):
    """A vocabulary as large as the published ones: what is quantized is gone before the layers come."""
    shape = {"vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 2_048, "num_hidden_layers": 6}
    base = make_base(tmp_path / "base", tied=True, num_attention_heads=8, max_position_embeddings=2_048, **shape)
    for file in tied.glob("*token*"):
        shutil.copy(file, base)
    with load(base, weights, embeddings=embeddings) as llm:
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["weights"] == promised.weights
        assert measured["load_peak"] == pytest.approx(promised.load_peak, rel=0.01, abs=2**21)
        llm.generate("hello", max_new_tokens=4, do_sample=False)
        llm.save_quantized(tmp_path / "out", progress=False)
        expected = logits(llm.model)
    with qv.load(tmp_path / "out", profile="default", embeddings=embeddings, progress=False) as again:
        assert torch.equal(logits(again.model), expected)
