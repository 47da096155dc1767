"""The article's numbers, and identities that every estimate keeps."""

import json

import pytest

import qwen_vram as qv

SEVEN = "Qwen/Qwen2.5-7B-Instruct"


def test_the_rule_of_thumb_gives_the_articles_figure():
    assert qv.estimate_vram(None, params=7.62e9).weights == 15_240_000_000


def test_the_real_architecture_gives_the_exact_figure():
    estimate = qv.estimate_vram(SEVEN)
    assert estimate.weights == 15_231_233_024
    assert estimate.kv_cache == 1_024 * 57_344


def test_the_articles_split_holds_for_the_workload_that_fills_a_card():
    estimate = qv.estimate_vram(SEVEN, "default", **qv.FULL_CARD_WORKLOAD)
    shares = estimate.shares()
    assert shares["weights"] == pytest.approx(0.65, abs=0.01)
    assert shares["kv_cache"] == pytest.approx(0.25, abs=0.01)
    assert shares["activations"] == pytest.approx(0.10, abs=0.01)
    assert estimate.kv_cache == 102_400 * 57_344
    assert 0.97 * 24e9 < estimate.peak_allocated < 24e9


# Bytes of all weights in each format, from bitsandbytes' and GPTQ's layouts by hand (see docs/how-it-counts.md).
WEIGHTS = [
    ("fp32", 30_462_466_048),
    ("bf16", 15_231_233_024),
    ("int8", 8_711_506_944),
    ("nf4-plain", 5_851_143_424),
    ("nf4", 5_547_065_104),
    ("fp4", 5_547_065_104),
    ("fp4-plain", 5_851_143_424),
]


@pytest.mark.parametrize(("weights", "size"), WEIGHTS)
def test_weights_in_each_format(weights, size):
    assert qv.estimate_vram(SEVEN, weights=weights).weights == size


@pytest.mark.parametrize("profile", qv.PROFILES)
@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", SEVEN, "Qwen3-4B"])
def test_parts_sum_to_the_peak_and_shares_to_one(profile, model):
    estimate = qv.estimate_vram(model, profile)
    assert sum(estimate.parts().values()) == estimate.peak_allocated
    assert sum(estimate.shares().values()) == pytest.approx(1)
    assert all(size >= 0 for size in estimate.parts().values())
    assert estimate.peak_allocated <= estimate.peak_reserved < estimate.process_total
    assert estimate.peak_moment in estimate.moments


@pytest.mark.parametrize("name", ["prompt_len", "max_new_tokens", "batch_size"])
def test_more_tokens_never_take_less(name):
    sizes = [qv.estimate_vram(SEVEN, **{name: count}).peak_allocated for count in (1, 2, 16, 512, 4096)]
    assert sizes == sorted(sizes)


def test_smaller_chunks_never_take_more():
    sizes = [
        qv.estimate_vram(SEVEN, "int4-flash", prompt_len=32_000, prefill_chunk_size=chunk).peak_allocated
        for chunk in (None, 8192, 4096, 1024, 256)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_every_knob_changes_the_estimate():
    base = qv.estimate_vram(SEVEN, "int4-flash", prompt_len=8000)
    for knob, value in {
        "weights": "int8",
        "lm_head": "nf4",
        "embeddings": "host",
        "kv_cache": "int8",
        "kv_device": "host",
        "cache": "dynamic",
        "attention": "eager",
        "prefill_chunk_size": 512,
        "streamed_layers": 3,
    }.items():
        changed = qv.estimate_vram(SEVEN, "int4-flash", prompt_len=8000, **{knob: value})
        assert changed.moments != base.moments or changed.weights != base.weights, knob


def test_a_tied_table_stays_on_the_device_unless_the_head_is_a_copy():
    assert qv.estimate_vram("Qwen2.5-3B", embeddings="host").weights == qv.estimate_vram("Qwen2.5-3B").weights
    table = 151_936 * 1_536
    # Codes, a byte for 64 weights, four for 16,384 of them (rounded up), and 1,092 for tables and offset.
    head = table // 2 + table // 64 + 4 * 14_244 + 1_092
    shared, compact = (qv.estimate_vram("Qwen2.5-1.5B", profile) for profile in ("int4-flash", "compact"))
    assert (compact.weights, compact.host) == (796_784_740, 2 * table)
    assert shared.weights - compact.weights == 2 * table - head
    # The head comes first, so that its 16-bit source is gone before the layers come.
    assert compact.weights < compact.load_peak < compact.weights + 2**26


def test_an_estimate_is_plain_data_a_table_and_html():
    estimate = qv.estimate_vram(SEVEN)
    data = json.loads(json.dumps(estimate.to_dict()))
    assert data["weights"] == 15_231_233_024
    assert data["profile"]["weights"] == "bf16"
    assert "15,231,233,024" in str(estimate)
    assert "<table>" in estimate._repr_html_()


def test_an_estimate_can_be_drawn():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = qv.estimate_vram(SEVEN).plot()
    widths = [float(patch.get_width()) for patch in axes.patches]
    assert widths == pytest.approx([15.231233024, 0.058720256, 0.043795968, 0.035652608])
    pyplot.close("all")


def test_a_config_dict_a_folder_and_an_architecture_are_models_too(untied):
    from qwen_vram.checkpoints.files.local import read_config

    config = read_config(untied)
    expected = qv.estimate_vram(untied).parts()
    assert qv.estimate_vram(config).parts() == expected
    assert qv.estimate_vram(qv.Architecture.from_config(config)).parts() == expected
    assert qv.estimate_vram(str(untied)).parts() == expected


@pytest.mark.parametrize("chunk", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen3-4B"])
def test_a_preallocated_cache_does_not_fragment_at_32000_tokens(model, weights, chunk):
    knobs = {"weights": weights, "attention": "fused", "cache": "preallocated", "prefill_chunk_size": chunk}
    found = qv.estimate_vram(model, prompt_len=32_000, max_new_tokens=64, **knobs)
    assert found.peak_reserved <= 1.05 * found.peak_allocated
