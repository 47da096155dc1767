"""Decode steps with streamed layers: graphs of the resident layers, and streamed layers between them."""

import pytest
import torch

import qwen_vram as qv
from qwen_vram.demo.tasks import examples
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.decoding.graph_step import Part, parts_of

KNOBS = {"profile": "default", "attention": "fused", "cache": "preallocated", "kernels": "fused", "progress": False}
WORK = {"batch_size": 2, "prompt_len": 600, "max_new_tokens": 64}
TEXTS = ["one two three", "red green"]


class Streams:
    """The part of a streamer that tells which layers stream."""

    def __init__(self, *layers):
        self.layers = layers

    def streams(self, layer):
        return layer in self.layers


@pytest.mark.parametrize(
    ("streamed", "expected"),
    [
        ([], [(0, 4, False)]),
        ([1, 3], [(0, 1, False), (1, 2, True), (2, 3, False), (3, 4, True), (4, 4, False)]),
        ([0, 1], [(0, 0, False), (0, 1, True), (1, 2, True), (2, 4, False)]),
    ],
)
def test_parts_cover_every_layer_and_both_ends_are_resident(streamed, expected):
    layers = [torch.nn.Identity() for _ in range(4)]
    streamer = Streams(*(layers[number] for number in streamed)) if streamed else None
    assert list(parts_of(layers, streamer)) == [Part(*part) for part in expected]


def by_steps(llm):
    """Give a model on the CPU a decoder, as the loader does on a GPU."""
    decode_by_steps(llm.model)
    work = llm.plan.workload
    sizes = {"batch_size": work.batch_size, "max_length": work.context_len}
    llm._generations.decoder = Decoder(llm.model, **sizes, backend=None, streamer=llm._streamer)
    return llm


@pytest.mark.parametrize(("weights", "streamed"), [("fp32", 1), ("fp32", 2), ("fp32", 3), ("nf4", 2)])
def test_tokens_are_those_of_the_ordinary_path(request, weights, streamed):
    """Of random weights in float32, and of the bundled model in 4 bits, which has no near ties."""
    folder = request.getfixturevalue("untied" if weights == "fp32" else "demo")
    asked = {"max_new_tokens": 8, "do_sample": False}
    with qv.load(folder, weights=weights, **KNOBS, **WORK) as llm:
        expected = [llm.generate(TEXTS[:count], **asked) for count in (1, 2)]
    with qv.load(folder, weights=weights, **KNOBS, **WORK, streamed_layers=streamed) as llm:
        assert [llm.generate(TEXTS[:count], **asked) for count in (1, 2)] == expected
        by_steps(llm)
        for _ in range(2):
            assert [llm.generate(TEXTS[:count], **asked) for count in (1, 2)] == expected
        steps = llm._generations.decoder._steps[llm._generations.decoder._home]
        assert {sum(part.streams for part in step.parts) for step in steps.values()} == {streamed}


def test_layers_on_the_disk_are_read_for_every_step(untied):
    asked = {"max_new_tokens": 8, "do_sample": False}
    knobs = {**KNOBS, **WORK, "weights": "bf16", "streamed_layers": 2}
    with qv.load(untied, **knobs) as ordinary, by_steps(qv.load(untied, **knobs, disk_layers=2)) as llm:
        assert llm.generate(TEXTS, **asked) == ordinary.generate(TEXTS, **asked)


def test_an_adapter_runs_by_them(untied, adapter):
    asked = {"max_new_tokens": 8, "do_sample": False}
    knobs = {**KNOBS, **WORK, "weights": "fp32", "streamed_layers": 2, "adapter": adapter}
    with qv.load(untied, **knobs) as ordinary:
        expected = ordinary.generate(TEXTS, **asked)
    with qv.load(untied, **knobs) as llm:
        llm.model.get_base_model()
        decode_by_steps(llm.model.get_base_model())
        sizes = {"batch_size": 2, "max_length": llm.plan.workload.context_len}
        llm._generations.decoder = Decoder(llm.model.get_base_model(), **sizes, backend=None, streamer=llm._streamer)
        assert llm.generate(TEXTS, **asked) == expected


def test_a_small_card_gets_captured_steps():
    """The plan for 4 GiB streams layers, and captures the others; its step takes the time of the link."""
    plan = qv.plan("Qwen2.5-7B", vram="4GiB", prompt_len=2048, max_new_tokens=256)
    assert plan.profile.streamed_layers
    assert plan.profile.captured
    assert plan.not_captured is None
    ordinary = qv.plan("Qwen2.5-7B", vram="4GiB", prompt_len=2048, max_new_tokens=256, captured=False)
    assert plan.times.ms_per_token < 0.6 * ordinary.times.ms_per_token
    assert plan.estimate.needed_bytes <= plan.budget.vram


def test_more_layers_stream_where_the_graph_has_no_memory_left():
    """With the bytes that the plan without a graph needs, the graph takes the place of a layer."""
    work = {"prompt_len": 2048, "max_new_tokens": 256}
    ordinary = qv.plan("Qwen2.5-7B", vram="4GiB", captured=False, **work)
    tight = qv.plan("Qwen2.5-7B", vram=ordinary.estimate.needed_bytes, **work)
    assert tight.profile.captured
    assert tight.profile.streamed_layers == ordinary.profile.streamed_layers + 1
    assert tight.estimate.needed_bytes <= ordinary.estimate.needed_bytes
    fixed = qv.plan("Qwen2.5-7B", vram=ordinary.estimate.needed_bytes, streamed_layers=7, **work)
    assert fixed.profile.streamed_layers == 7
    assert not fixed.profile.captured


def test_what_cannot_be_captured_is_still_refused_by_name():
    with pytest.raises(qv.WorkloadError, match="captured=True needs host_layers=0, got host_layers=1"):
        qv.estimate_vram(
            "Qwen2.5-7B", profile="default", captured=True, cache="static", attention="fused", streamed_layers=2,
            host_layers=1,
        )  # fmt: skip
    with pytest.raises(qv.WorkloadError, match="compiled=True needs streamed_layers=0, got streamed_layers=2"):
        qv.estimate_vram(
            "Qwen2.5-7B", profile="default", compiled=True, cache="static", attention="fused", streamed_layers=2
        )


# on a GPU


CAPTURED = {**KNOBS, "captured": True}
PLACES = {
    "some": {"streamed_layers": 6},
    "all": {"streamed_layers": 24},
    "table": {"streamed_layers": 5, "lm_head": "nf4", "embeddings": "host"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_answers_are_right_and_memory_is_what_was_promised(demo, weights):
    asked = [example for name in ("math", "table") for example in examples(name, "held_out", seed=5, count=2)]
    with qv.load(demo, weights=weights, **CAPTURED, prompt_len=600, max_new_tokens=64, streamed_layers=2) as llm:
        step = next(iter(llm._generations.decoder._steps[llm._generations.decoder._home].values()))
        assert len(step.graphs) == sum(not part.streams for part in step.parts) > 1
        for example in asked:
            assert llm.chat(example.prompt, max_new_tokens=64, do_sample=False) == example.answer
        measured, promised = llm.report().measured, llm.plan.estimate
        assert measured["peak_allocated"] <= 1.01 * promised.peak_allocated
        assert measured["process_total"] <= 1.01 * promised.process_total


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_tokens_and_peak_are_the_predicted_ones(published, weights, place):
    """The tokens are the ordinary path's up to ties, in one process and twice; the peak is the estimate's."""
    if place == "table" and weights != "nf4":
        pytest.skip("a head in nf4 goes with weights in nf4")
    ids = torch.randint(1_000, 100_000, (2, 700), generator=torch.Generator().manual_seed(3)).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    work = {"batch_size": 2, "prompt_len": 700, "max_new_tokens": 24}
    with qv.load(published, weights=weights, **CAPTURED, **work, **PLACES[place]) as llm:
        report = llm.probe()
        assert report.measured["peak_allocated"] == pytest.approx(report.estimate.peak_allocated, rel=0.01)
        for rows in ([0], [0, 1], [0]):
            inputs = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])}
            plain = llm.model.generate(**inputs, **options)
            ours = llm.model.generate(**inputs, **options, past_key_values=llm.new_cache(max_length=724))
            logits, expected, found = (
                torch.stack(plain.logits, dim=1),
                plain.sequences[:, 700:],
                ours.sequences[:, 700:],
            )
            del ours
            rounding = 2**-7 * logits.abs().amax(-1)
            for row in range(len(rows)):
                parted = (found[row] != expected[row]).nonzero()
                if len(parted):
                    at = int(parted[0])
                    gap = logits[row, at].max() - logits[row, at, found[row, at]]
                    assert gap <= 4 * rounding[row, at], (rows, row, at)


@pytest.mark.gpu
def test_on_a_gpu_closing_gives_everything_back(demo):
    torch.cuda.synchronize()
    held = []
    for _ in range(4):
        with qv.load(demo, weights="nf4", **CAPTURED, prompt_len=64, max_new_tokens=16, streamed_layers=2) as llm:
            llm.chat("hello", max_new_tokens=8)
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1:] == held[1:2] * 3
