"""Moments against the formulas of docs/how-it-counts.md, written out tensor by tensor; and the consumer that sums."""

from types import SimpleNamespace

import pytest

import qwen_vram as qv
from qwen_vram.arithmetic.pipeline import slices
from qwen_vram.arithmetic.replay.live_bytes import LiveBytes, moments
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

MODELS = ["Qwen2.5-7B", "Qwen3-4B"]
TILE = 4_672 * 3_584  # of gate_proj and up_proj of 7B, whole blocks of 64 rows within 2^24 elements


def shape_of(model, tokens):
    """Bytes of a tensor for `tokens` rows in bf16, by its width."""
    part = resolve_model(model)[1]
    layer, attention = part.layers[0], part.layers[0].attention
    widths = {
        "hidden": part.hidden_size, "inner": layer.inner_size, "wide": attention.width,
        "narrow": attention.key_value_width, "tables": 2 * part.rotary_dim,
    }  # fmt: skip
    sizes = {name: tokens * width * 2 for name, width in widths.items()}
    return SimpleNamespace(**sizes, heads=attention.heads, vocab=part.vocab_size)


def live(model, part=None, **knobs):
    """Activations of a run's moments, by phase and name; of the last of several prefill steps."""
    work = {name: knobs.pop(name) for name in ("prompt_len", "batch_size", "max_new_tokens", "logits") if name in knobs}
    workload = Workload(**{"max_new_tokens": 4, **work})
    found = moments(part or resolve_model(model)[1], Profile(**knobs), workload)
    return {(moment.phase, moment.name): moment.activations for moment in found}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_at_once(model, batch):
    rows = batch * 700
    of = shape_of(model, rows)
    ids = 4 * 8 * rows + 3 * 512
    held = ids + of.hidden + of.tables  # the embeddings, cosines and sines
    inside = held + 2 * of.hidden  # the layer's input and its normed copy, or the sum after attention
    behind = inside + of.hidden  # the MLP's normed input
    logits = batch * of.vocab * 2
    expected = {
        "embedding": ids + of.hidden,
        "attention norm": held + of.hidden + 4 * of.hidden,
        "attention q_proj": inside + of.wide,
        "attention q_norm": inside + of.wide + 4 * of.wide,
        "attention k_proj": inside + of.wide + of.narrow,
        "attention v_proj": inside + of.wide + 2 * of.narrow,
        "attention rotary": inside + 4 * of.wide + 2 * of.narrow,
        "attention cache": inside + of.wide + 2 * of.narrow,
        "attention kernel": inside + 2 * of.wide + 4 * rows * of.heads,
        "attention o_proj": inside + 2 * of.wide + of.hidden,
        "mlp norm": inside + 4 * of.hidden,
        "mlp gate_proj": behind + of.inner,
        "mlp up_proj": behind + 2 * of.inner,
        "mlp product": behind + 3 * of.inner,
        "mlp down_proj": behind + of.inner + of.hidden,
        "last norm": held + of.hidden + 4 * of.hidden,
        "head": ids + max(of.hidden + logits, 3 * logits),
    }
    if model == "Qwen2.5-7B":
        del expected["attention q_norm"]
    found = live(model, prompt_len=700, batch_size=batch)
    assert {name: size for (phase, name), size in found.items() if phase == "prefill"} == expected
    assert [name for phase, name in found if phase == "prefill"] == list(expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_plain_forward_holds_its_keys_and_all_logits(model):
    of = shape_of(model, 700)
    found = live(model, prompt_len=700, logits="all", max_new_tokens=1)
    kernel = 700 * 8 + of.tables + 3 * of.hidden + 2 * of.wide + 2 * of.narrow + 4 * 700 * of.heads
    assert found["prefill", "attention kernel"] == kernel
    assert found["prefill", "head"] == 700 * 8 + of.hidden + 700 * of.vocab * 2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_chunk_after_a_cache_has_a_mask_and_old_values(model, batch):
    rows, seen = batch * 512, 1024
    of = shape_of(model, rows)
    inside = 4 * 8 * batch * 1024 + 3 * 512 + 3 * of.hidden + of.tables + rows * seen
    copies = 2 * batch * seen * of.wide // rows  # of keys and values for all heads
    found = live(model, prompt_len=1024, batch_size=batch, prefill_chunk_size=512)
    assert found["prefill", "attention cache"] == inside + of.wide + 2 * of.narrow + of.narrow
    sums = 4 * rows * of.heads
    assert found["prefill", "attention kernel"] == inside + 2 * of.wide + sums + copies + 2 * rows * seen


@pytest.mark.parametrize("model", MODELS)
def test_eager_attention_keeps_its_softmax(model):
    of = shape_of(model, 1000)
    scores = of.heads * 1000 * 1000
    inside = 4 * 8 * 1000 + 3 * 512 + 3 * of.hidden + of.tables + 2 * 1000 * 1000
    copies = 2 * of.wide
    found = live(model, prompt_len=1000, attention="eager")
    assert found["prefill", "attention kernel"] == inside + of.wide + copies + scores * (2 + 4 + 4)
    assert found["prefill", "mlp product"] == inside + of.hidden + 3 * of.inner + 2 * scores


def test_fused_kernels_make_no_copies():
    of = shape_of("Qwen3-4B", 700)
    held = 4 * 8 * 700 + 3 * 512 + of.hidden + of.tables
    found = live("Qwen3-4B", prompt_len=700, kernels="fused", attention="fused")
    assert found["prefill", "attention norm"] == held + 2 * of.hidden
    assert found["prefill", "attention q_norm"] == held + 2 * of.hidden + 2 * of.wide
    assert found["prefill", "attention rotary"] == held + 2 * of.hidden + of.wide + 2 * of.narrow
    assert found["prefill", "mlp up_proj"] == held + 3 * of.hidden + 2 * of.inner
    assert ("prefill", "mlp product") not in found


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_a_quantized_cache_is_whole_beside_the_kernel(kv_cache):
    of = shape_of("Qwen2.5-7B", 512)
    inside = 4 * 8 * 1024 + 3 * 512 + 3 * of.hidden + of.tables
    knobs = {"attention": "fused", "cache": "preallocated", "prefill_chunk_size": 512}
    found = live("Qwen2.5-7B", prompt_len=1024, kv_cache=kv_cache, **knobs)
    whole = 2 * 2 * of.narrow  # keys and values of both chunks
    older = (1024 - 128) - (512 - 128)  # tokens that the chunk makes old, in float32 and as codes
    assert found["prefill", "attention cache"] == inside + of.wide + 2 * of.narrow + whole + older * 512 * 5
    assert found["prefill", "attention kernel"] == inside + 2 * of.wide + 4 * 512 * of.heads + whole


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_device_has_copies_and_no_ids(attention):
    _, second = slices(resolve_model("Qwen2.5-7B")[1], (10, 18))
    of = shape_of("Qwen2.5-7B", 700)
    found = live("Qwen2.5-7B", second, prompt_len=700, attention=attention)
    mask, softmax = (2 * 700 * 700, 2 * of.heads * 700 * 700) if attention == "eager" else (0, 0)
    product = of.tables + 8 * 700 + mask + softmax + 3 * of.hidden + 3 * of.inner
    assert found["prefill", "mlp product"] == product
    assert found["prefill", "last norm"] == of.hidden + 4 * of.hidden
    assert ("prefill", "embedding") not in found


GATE = 18_944 * 3_584
PRODUCTS = [
    ("nf4", {"dequantization": "whole"}, 2 * GATE + 8 * GATE // 64),
    ("nf4-plain", {"dequantization": "whole"}, 2 * GATE),
    ("nf4", {"dequantization": "tiled"}, 2 * TILE + 4 * GATE // 64),
    ("nf4-plain", {"dequantization": "tiled"}, 2 * TILE),
    ("int4", {}, 2 * TILE + TILE // 2),
    ("int8-wo", {}, 2 * TILE),
    ("fp8", {}, 2 * TILE),
    # Scales and codes, and the product in int32 and fp16, of 700 rows: fewer than a piece has.
    ("int8", {}, 700 * (4 + 3_584) + 700 * 18_944 * (4 + 2)),
]


@pytest.mark.parametrize(("weights", "knobs", "more"), PRODUCTS, ids=str)
def test_what_a_product_takes_beside_its_result(weights, knobs, more):
    plain = live("Qwen2.5-7B", prompt_len=700)["prefill", "mlp gate_proj"]
    assert live("Qwen2.5-7B", prompt_len=700, weights=weights, **knobs)["prefill", "mlp gate_proj"] == plain + more


def test_int8_in_pieces_holds_the_whole_result_beside_one_piece():
    rows, piece = 2_000, 2**24 // 18_944
    plain = live("Qwen2.5-7B", prompt_len=rows)["prefill", "mlp gate_proj"]
    quantized = live("Qwen2.5-7B", prompt_len=rows, weights="int8")["prefill", "mlp gate_proj"]
    assert quantized - plain == piece * (4 + 3_584) + piece * 18_944 * (4 + 2 + 2)


def test_a_moment_is_the_most_until_the_next_one():
    consumer = LiveBytes()
    held = consumer.take(5)
    consumer.at("first")
    consumer.give(consumer.take(100))
    consumer.at("")
    consumer.give(consumer.take(1000))
    consumer.at("second")
    consumer.give(held, consumer.take(10))
    consumer.at("first")
    consumer.take(50)
    consumer.at("")
    assert consumer.moments == {"first": 105, "second": 15}


def test_a_growing_cache_counts_in_full_from_the_step_s_start():
    consumer = LiveBytes()
    consumer.begin(2 * 100, 2 * 110)
    consumer.at("before")
    consumer.take(7)
    consumer.at("cache")
    for _ in range(2):
        consumer.keep(110)
        consumer.drop(100)
    consumer.at("after")
    consumer.at("")
    # Beside the cache of 220 bytes there are the old values while the new ones are made.
    assert consumer.moments == {"before": 7, "cache": 107, "after": 7}


def test_an_estimate_has_the_moments_and_their_peak():
    estimate = qv.estimate_vram("Qwen2.5-7B", prompt_len=4096)
    found = moments(estimate.architecture, estimate.profile, estimate.workload)
    assert tuple(found) == estimate.moments
    assert max(moment.total for moment in estimate.moments) == estimate.kv_cache + estimate.tensors
