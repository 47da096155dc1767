"""Every saver with every format and in pairs: it works, with its mechanism in place, or is refused by name.

`make test` loads an all-pairs array of formats that differ in code, one row of each of the others, and asks for every
refusal. The marker `full` loads an all-pairs array of all formats, and the whole product.
"""

import re
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import combinations

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, StaticCache

import qwen_vram as qv
from qwen_vram.arithmetic.weights import head_bytes
from qwen_vram.checkpoints.resolve import resolve
from qwen_vram.demo import CHECKPOINT
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.attention import fused as attention
from qwen_vram.runtime.backends import TARGETS, get_backend
from qwen_vram.runtime.backends.base import StreamingBackend
from qwen_vram.runtime.kernels.fused_layers import FusedLayer
from qwen_vram.runtime.kv_cache.host import HostCache
from qwen_vram.runtime.kv_cache.preallocated import PreallocatedCache, PreallocatedLayer
from qwen_vram.runtime.kv_cache.quantized import QuantizedLayer
from qwen_vram.runtime.linear.cpu_4bit import kernel_library
from qwen_vram.runtime.loading.preflight import MACHINE_RULES, Here
from qwen_vram.runtime.measure import host_bytes, weight_storages
from qwen_vram.runtime.offload.host_embedding import HostEmbedding
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.residency import residency
from qwen_vram.spec.rules.rule import broken
from qwen_vram.spec.rules.table import ANYWHERE_RULES, Model
from tests.helpers.gptq_files import tied
from tests.helpers.pairs import all_pairs, pairs
from tests.helpers.shared import made_once

# The long one is past the 128 tokens that a quantized cache keeps whole; the short one is padded.
PROMPTS = [one.prompt for name in ("recall", "math") for one in examples(name, "held_out", seed=5, count=1)]
NEW = 4
CHUNK = 80
OWN, OTHER = "the weights' format", "another format"
SAVERS = {
    "host table": {"embeddings": "host"},
    "head": {"lm_head": OWN},
    "other head": {"lm_head": OTHER},
    "fused": {"attention": "fused"},
    "sdpa": {"attention": "sdpa"},
    "eager": {"attention": "eager"},
    "flash": {"attention": "flash_attention_2"},
    "kernels": {"kernels": "fused"},
    "chunks": {"prefill_chunk_size": CHUNK},
    "kv int8": {"kv_cache": "int8"},
    "kv int4": {"kv_cache": "int4"},
    "kv host": {"kv_device": "host"},
    "dynamic": {"cache": "dynamic"},
    "static": {"cache": "static"},
    "preallocated": {"cache": "preallocated"},
    "tiles": {"dequantization": "tiled"},
    "streamed": {"streamed_layers": 2},
    "disk": {"streamed_layers": 2, "disk_layers": 2},
    "computing": {"streamed_layers": 2, "host_layers": 1},
    "captured": {"captured": True},
    "compiled": {"compiled": True},
}
PAIRS = [(one, two) for one, two in combinations(SAVERS, 2) if not SAVERS[one].keys() & SAVERS[two].keys()]
TOGETHER = [
    ("host table", "fused", "kernels", "chunks", "kv host", "tiles"),
    ("host table", "head", "fused", "kernels", "chunks", "kv int8", "tiles"),
    ("host table", "head", "fused", "kernels", "chunks", "kv int4", "tiles"),
    ("host table", "head", "fused", "kernels", "chunks", "kv host", "tiles", "streamed"),
]

REFUSALS = (qv.NotSupportedError, qv.WorkloadError, qv.BackendUnavailableError, qv.ConfigError)
# Formats that are loaded as they are stored, from checkpoints that have them.
STORED = ("gptq", "awq")
STAYS = "embeddings='host' leaves the token table where it is"


# A 16-bit checkpoint is not quantized by GPTQ while it loads, whatever else is asked for: see test_gptq.py.
WEIGHTS = [weights for weights in TARGETS if not weights.startswith("gptq-int")]
MODELS = ("untied", "tied")


def cases():
    """Every saver, and many at once, with every format; every pair with every backend, whose formats take turns."""
    backends = {}
    for weights in WEIGHTS:
        backends.setdefault(TARGETS[weights], []).append(weights)
        yield from ((weights, savers) for savers in (*((name,) for name in SAVERS), *TOGETHER))
    for formats in backends.values():
        yield from ((formats[number % len(formats)], pair) for number, pair in enumerate(PAIRS))


def expected_refusal(weights, savers):
    """Return the pattern of a refusal of these savers; empty if they must work."""
    if weights in STORED and {"head", "other head"} & set(savers):
        return "lm_head="  # these checkpoints have no quantized head, which is said first
    try:
        profile = qv.Profile(weights=weights, **{"cache": "preallocated", **knobs_of(savers, weights)})
    except qv.WorkloadError as refused:
        return f"{refused.name}="
    backend = get_backend(weights)
    architecture = replace(resolve(CHECKPOINT).architecture, stored_format=weights if weights in STORED else None)
    here = Here(profile, architecture, backend, torch.device("cpu"))
    rule = broken(ANYWHERE_RULES, Model(architecture, profile)) or broken(MACHINE_RULES, here)
    if rule is not None:
        return f"{rule.knob}="
    refused = []
    if "disk" in savers and weights != "bf16":  # as the checkpoint is stored
        refused.append("disk_layers")
    if "computing" in savers and FORMATS[weights].is_bnb_4bit and kernel_library() is None:
        refused.append("host_layers")
    if is_missing(weights):
        refused.append("weights")
    return f"({'|'.join(refused)})=" if refused else ""


@cache
def is_missing(weights):
    """Tell if a library or a kernel that the format needs is not here."""
    try:
        get_backend(weights).check(qv.Profile(weights=weights), torch.device("cpu"))
    except REFUSALS:
        return True
    return False


def is_of_this_machine(refusal, weights):
    """Tell if no plan can know of a refusal: a missing package, or tensors in another dtype than config.json says."""
    knob = getattr(refusal, "knob", None)
    return (
        isinstance(refusal, qv.BackendUnavailableError)
        or knob in ("captured", "compiled")
        or (knob == "disk_layers" and FORMATS[weights].is_dense)
    )


@pytest.mark.parametrize("weights", TARGETS)
def test_plans_stream_what_backends_can_move(weights):
    assert FORMATS[weights].streams is isinstance(get_backend(weights), StreamingBackend)


def knobs_of(savers, weights):
    heads = {OWN: weights, OTHER: "fp32" if weights == "bf16" else "nf4" if weights == "int8" else "int8"}
    return {knob: heads.get(value, value) for saver in savers for knob, value in SAVERS[saver].items()}


@pytest.fixture(scope="session")
def folders(demo, tmp_path_factory):
    return {"untied": demo, "tied": made_once(tmp_path_factory, "tied_demo", lambda out: tied(demo, out))}


@pytest.fixture(scope="session")
def stored_folders(gptq_demo, awq_demo, tmp_path_factory):
    def models(name, folder):
        return {"untied": folder, "tied": made_once(tmp_path_factory, f"tied_{name}", lambda out: tied(folder, out))}

    return {"gptq": models("gptq", gptq_demo), "awq": models("awq", awq_demo)}


@pytest.fixture(scope="session")
def folder_of(request, folders):
    """The checkpoint of a model and a format; GPTQ's are made when they are first asked for."""
    return lambda model, weights: (
        request.getfixturevalue("stored_folders")[weights] if weights in STORED else folders
    )[model]


def chats(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


@pytest.fixture(scope="session")
def texts(demo):
    return chats(demo)


@pytest.fixture(scope="session")
def references():
    """Tokens of plain profiles, made once for each model, format and head."""
    return {}


class Watched:
    """A loaded model's generations: tokens and logits, the lengths that each forward was fed, and the cache."""

    def __init__(self, llm):
        self.llm, self.fed, self.cache, self.heads = llm, [], None, []
        llm.model.register_forward_pre_hook(self._note, with_kwargs=True)
        llm.model.lm_head.register_forward_hook(lambda *seen: self.heads.append(seen[2][:, -1].float()))

    def _note(self, module, args, kwargs):
        self.fed.append(kwargs["input_ids"].shape[1])
        self.cache = kwargs["past_key_values"]

    def tokens(self, texts):
        inputs = self.llm.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        output = self.llm._generate(dict(inputs), NEW, {"do_sample": False, "eos_token_id": None})
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def logits(self):
        """Logits of the new tokens, (sequences, NEW, vocab_size)."""
        return torch.stack(self.heads[-NEW:], dim=1)


def are_equal_up_to_a_tie(tokens, expected, logits):
    """Tell if each sequence parts at most where the expected logits of both tokens are within four steps of bf16.

    The tied model's head was never trained as one: its two largest logits are sometimes equal in bf16, and then the
    order of sums, which differs between CPUs, decides.
    """
    for row, (found, wanted) in enumerate(zip(tokens, expected, strict=True)):
        parted = next((at for at, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            now = logits[row, parted]
            if now.max() - now[found[parted]] > 4 * 2**-8 * now.abs().max():
                return False
    return True


def load(folder, weights, **knobs):
    return qv.load(folder, profile="default", weights=weights, prompt_len=600, progress=False, **knobs)


def reference(references, folder, weights, knobs, texts):
    """Return tokens and logits of the plain profile for the texts, with the same formats.

    Eager attention rounds in a way of its own, and so does attention over the whole of a static cache: on the tied
    model, whose head was never trained as one, fp8's tokens part over that.
    """
    attention = "eager" if knobs.get("attention") == "eager" else "sdpa"
    static = knobs.get("cache") == "static" and weights == "fp8"
    key = (folder, weights, knobs.get("lm_head"), attention, "static" if static else "dynamic")
    if key not in references:
        with load(folder, weights, lm_head=key[2], attention=attention, cache=key[4]) as llm:
            watched = Watched(llm)
            references[key] = watched.tokens(texts), watched.logits()
    return references[key]


def check_weights(llm):
    """Formats, table and products are where the profile says, to the byte."""
    profile, estimate, config = llm.plan.profile, llm.plan.estimate, llm.model.config
    real = weight_storages(llm.model, get_backend(profile.weights))
    assert sum(real.values()) == estimate.weights == llm.report().measured["weights"]
    on_host = residency(estimate.architecture, profile).table_on_host
    assert on_host is (profile.embeddings == "host" and not config.tie_word_embeddings)
    assert isinstance(llm.model.get_input_embeddings(), HostEmbedding) is on_host
    assert host_bytes(llm.model) == estimate.architecture.head.numel * profile.element_bytes * on_host
    if not config.tie_word_embeddings:
        assert real["lm_head.weight"] == head_bytes(estimate.architecture, profile)
    streamer = llm._streamer
    assert (len(streamer.hosts) if streamer else 0) == profile.host_layers
    kinds = Counter(type(module).__name__ for module in llm.model.modules())
    four_bit = FORMATS[profile.weights].is_bnb_4bit
    tiled = four_bit and profile.dequantization == "tiled"
    assert bool(kinds["TiledLinear4bit"]) is tiled
    assert bool(kinds["Linear4bit"]) is (four_bit and not tiled)
    assert bool(sum(isinstance(module, FusedLayer) for module in llm.model.modules())) is (profile.kernels == "fused")
    assert config._attn_implementation == {"fused": attention.NAME}.get(profile.attention, profile.attention)


def check_run(watched):
    """The cache is of the profile's kind and format, and the prompt went in by its chunks."""
    profile, cache, report = watched.llm.plan.profile, watched.cache, watched.llm.report()
    prompt_len = report.estimate.workload.prompt_len
    chunk = profile.prefill_chunk_size or prompt_len
    left = [prompt_len % chunk] if prompt_len % chunk else []
    assert watched.fed == [chunk] * (prompt_len // chunk) + left + [1] * (NEW - 1)
    if profile.cache != "preallocated":
        assert type(cache) is {"dynamic": DynamicCache, "static": StaticCache}[profile.cache]
        return
    assert report.measured["kv_cache"] == report.estimate.kv_cache
    assert type(cache) is (HostCache if profile.kv_device == "host" else PreallocatedCache)
    kinds = {"bf16": PreallocatedLayer, "int8": QuantizedLayer, "int4": QuantizedLayer}
    assert all(isinstance(layer, kinds[profile.kv_cache]) for layer in cache.layers)
    assert all(layer.max_length == prompt_len + NEW for layer in cache.layers)
    if profile.kv_cache != "bf16":
        assert {layer.bits for layer in cache.layers} == {FORMATS[profile.kv_cache].bits}
        assert all(layer.quantized > 0 for layer in cache.layers)


def check_refused(folder, weights, savers):
    """`load()` refuses these savers by the name of one of them, and `plan()` in the same words if it can know."""
    knobs = {"cache": "preallocated", **knobs_of(savers, weights)}
    with pytest.raises(REFUSALS, match=expected_refusal(weights, savers)) as caught:
        load(folder, weights, **knobs)
    if not is_of_this_machine(caught.value, weights):
        with pytest.raises(type(caught.value), match=re.escape(str(caught.value))):
            qv.plan(folder, profile="default", vram={}, weights=weights, **knobs)


def check_works(folder, weights, savers, texts, references, caplog):
    """Each saver's mechanism is in place, and the tokens are those of the plain profile unless a saver is lossy."""
    knobs = {"cache": "preallocated", **knobs_of(savers, weights)}
    expected, logits = reference(references, folder, weights, knobs, texts)
    caplog.clear()
    with load(folder, weights, **knobs) as llm:
        check_weights(llm)
        watched = Watched(llm)
        tokens = watched.tokens(texts)
        check_run(watched)
        # For every chunk int8 takes the columns that it keeps in 16 bits anew, and int4 has one kernel for few rows and
        # another for many.
        lossy = "kv_cache" in knobs or (weights in ("int8", "int4") and "prefill_chunk_size" in knobs)
        tied = llm.plan.estimate.architecture.tie_word_embeddings
        assert lossy or tokens == expected or (tied and are_equal_up_to_a_tie(tokens, expected, logits))
        asked = knobs.get("embeddings") == "host"
        assert (STAYS in caplog.text) is (asked and not host_bytes(llm.model))


# refusals


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.full) for first in (1, 2, 3))])
@pytest.mark.parametrize("model", MODELS)
def test_savers_that_do_not_work_are_refused_by_name(folder_of, model, first):
    """Of every four refusals each model is asked for one, and not for the same one."""
    refused = [one for one in cases() if expected_refusal(*one)]
    assert len(refused) > 350
    wrong = []
    for weights, savers in refused[(first + MODELS.index(model)) % 4 :: 4]:
        try:
            check_refused(folder_of(model, weights), weights, savers)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append(f"{weights}+{'+'.join(savers)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_plan_accepts_what_load_runs(folder_of):
    for weights, savers in cases():
        if not expected_refusal(weights, savers):
            knobs = {"cache": "preallocated", **knobs_of(savers, weights)}
            qv.plan(folder_of("tied", weights), profile="default", vram={}, weights=weights, **knobs)


# what works: an array of pairs

# A saver, or "" for none of the factor's.
FACTORS = {
    "format": tuple(WEIGHTS),
    "model": MODELS,
    "layers": ("", "streamed", "disk", "computing"),
    "attention": ("sdpa", "fused", "eager"),
    "cache": ("preallocated", "dynamic", "static"),
    "kv format": ("", "kv int8", "kv int4"),
    "kv device": ("", "kv host"),
    "chunk": ("", "chunks"),
    "head": ("", "head"),
    "table": ("", "host table"),
    "kernels": ("", "kernels"),
    "tiles": ("", "tiles"),
}


# Each runs the code of another format: those of bf16, nf4, int8-wo and gptq.
ALIKE = ("fp32", "fp16", "nf4-plain", "fp4", "fp4-plain", "fp8", "awq")
APART = tuple(weights for weights in WEIGHTS if weights not in ALIKE)


def works(one, two, formats):
    """Tell if a format and a saver, or two savers with one of `formats`, are loaded here."""
    formats = (one[1],) if one[0] == "format" else formats
    savers = tuple(saver for _, saver in (one, two) if saver in SAVERS)
    return any(not expected_refusal(weights, savers) for weights in formats)


@cache
def array(formats):
    return all_pairs({**FACTORS, "format": formats}, partial(works, formats=formats))


def savers_of(row):
    return tuple(saver for saver in row.values() if saver in SAVERS)


@pytest.mark.parametrize("formats", [APART, tuple(WEIGHTS)], ids=["apart", "all"])
def test_the_array_holds_every_pair_that_works(formats):
    held = {pair for row in array(formats) for pair in pairs({factor: (value,) for factor, value in row.items()})}
    for one, two in pairs({**FACTORS, "format": formats}):
        assert ((one, two) in held) is works(one, two, formats), (one, two)
    assert not any(expected_refusal(row["format"], savers_of(row)) for row in array(formats))
    named = {saver for saver in SAVERS if any(not expected_refusal(weights, (saver,)) for weights in WEIGHTS)}
    assert named == {saver for row in array(formats) for saver in savers_of(row)}


def rows_of(weights, formats):
    return [(row["model"], savers_of(row)) for row in array(formats) if row["format"] == weights]


@pytest.mark.parametrize("thin", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_pair_of_savers_works(folder_of, texts, caplog, weights, thin):
    rows = rows_of(weights, APART if thin and weights in APART else tuple(WEIGHTS))
    if thin and weights in ALIKE:
        rows = rows[:1]
    if is_missing(weights):
        assert not rows
        pytest.skip(f"what {weights} needs is not here; the refusals are tested")
    references, wrong = {}, []
    for model, savers in rows:
        try:
            check_works(folder_of(model, weights), weights, savers, texts, references, caplog)
        except Exception:
            wrong.append(f"{model}-{'+'.join(savers)}:\n{traceback.format_exc()}")
    assert rows
    assert not wrong, "\n".join(wrong)


# what works: the product


@pytest.mark.full
@pytest.mark.parametrize(("weights", "savers"), [pytest.param(*one, id="+".join((one[0], *one[1]))) for one in cases()])
@pytest.mark.parametrize("model", MODELS)
def test_savers_work_with_a_backend_or_are_refused_by_name(
    folder_of, texts, references, caplog, model, weights, savers
):
    folder = folder_of(model, weights)
    if expected_refusal(weights, savers):
        check_refused(folder, weights, savers)
    else:
        check_works(folder, weights, savers, texts, references, caplog)
