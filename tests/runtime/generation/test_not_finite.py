"""Models that compute NaN or infinities: every kind of generation says so, and names the dtype and the module."""

import shutil
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor, LogitsProcessorList

import qwen_vram as qv
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_decoder import Decoder
from qwen_vram.runtime.generation.finite import FiniteLogits, NotFinite

NAN, INF = float("nan"), float("inf")
LATE = "model.layers.1.mlp.down_proj"


def changed(folder, out, name, change):
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def loud(untied, tmp_path_factory):
    """Finite in bf16; in fp16 one product is beyond its largest number."""
    out = tmp_path_factory.mktemp("loud") / "model"
    return changed(untied, out, f"{LATE}.weight", lambda weight: (weight.float() * 1e9).clamp(-6e4, 6e4).bfloat16())


@pytest.fixture(scope="module")
def holed(untied, tmp_path_factory):
    return changed(
        untied, tmp_path_factory.mktemp("holed") / "model", f"{LATE}.weight", lambda weight: weight.fill_(NAN)
    )


def load(folder, **knobs):
    return qv.load(folder, **{"profile": "default", "prompt_len": 64, "max_new_tokens": 24, "progress": False, **knobs})


CALLS = {
    "chat": lambda llm: llm.chat("hi", do_sample=False),
    "sampled": lambda llm: llm.chat("hi", do_sample=True),
    "beams": lambda llm: llm.chat("hi", num_beams=3),
    "sampled beams": lambda llm: llm.chat("hi", num_beams=2, do_sample=True),
    "prompt lookup": lambda llm: llm.chat("hi", prompt_lookup_num_tokens=3),
    "batch": lambda llm: llm.generate(["hi there", "hello"], do_sample=False),
    "stream": lambda llm: list(llm.stream("hi", do_sample=True)),
    "probe": lambda llm: llm.probe(),
    "forbidden tokens": lambda llm: llm.chat("hi", min_new_tokens=4, suppress_tokens=[5, 6]),
}


@pytest.fixture(scope="module")
def by_weights(loud):
    """The loud model in each dtype, loaded once for all calls."""
    with ExitStack() as stack:
        yield {weights: stack.enter_context(load(loud, weights=weights)) for weights in ("fp16", "bf16", "fp32")}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_generation_notices(by_weights, call):
    for _ in range(2):  # the second is not another matter
        with pytest.raises(
            qv.NotFiniteError, match="in fp16; the first output that is not finite is that of"
        ) as caught:
            call(by_weights["fp16"])
        assert (caught.value.dtype, caught.value.module) == ("fp16", LATE)
        assert "do not fit fp16: load with weights='bf16', or weights='fp32'" in str(caught.value)
    for weights in ("bf16", "fp32"):  # what the error says to do
        call(by_weights[weights])


KNOBS = [
    {"cache": "static"},
    {"cache": "preallocated", "attention": "fused"},
    {"cache": "preallocated", "attention": "fused", "kv_cache": "int8"},
    {"prefill_chunk_size": 16, "kernels": "fused"},
    {"streamed_layers": 2},
    {"embeddings": "host", "attention": "eager"},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_layout_of_a_model_notices(holed, knobs):
    with (
        load(holed, **knobs) as llm,
        pytest.raises(qv.NotFiniteError, match="another copy of the checkpoint") as caught,
    ):
        llm.chat("word " * 30)
    assert (caught.value.dtype, caught.value.module) == ("bf16", LATE)


@pytest.mark.parametrize("weights", ["nf4", "fp4", "int4", "int8-wo", "fp8", "int8"])
def test_quantized_weights_notice(holed, weights):
    with load(holed, weights=weights) as llm, pytest.raises(qv.NotFiniteError, match="in bf16; the first") as caught:
        llm.chat("hi")
    assert caught.value.module == LATE


@pytest.mark.parametrize(
    ("name", "value", "module"),
    [
        ("model.norm.weight", INF, "model.norm"),
        ("lm_head.weight", NAN, "lm_head"),
        ("model.layers.2.self_attn.k_proj.bias", NAN, "model.layers.2.self_attn.k_proj"),
    ],
)
def test_the_tensor_at_fault_is_named_wherever_it_is(untied, tmp_path, name, value, module):
    folder = changed(untied, tmp_path / "model", name, lambda tensor: tensor.fill_(value))
    with pytest.raises(qv.NotFiniteError, match="its stored values are not finite themselves") as caught:
        load(folder, verify=True)
    assert caught.value.module == module


def test_values_of_a_file_that_do_not_fit_fp16_are_no_damage(untied, tmp_path):
    folder = changed(untied, tmp_path / "model", f"{LATE}.weight", lambda weight: weight.fill_(1e6))
    with pytest.raises(qv.NotFiniteError, match="do not fit fp16"):
        load(folder, weights="fp16", verify=True)


def test_an_adapter_at_fault_is_named(untied, adapter, tmp_path):
    """Its values fit fp16, and its products do not; NaN in its file is refused before it loads."""
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [one for one in tensors if "layers.1.mlp.up_proj.lora_" in one]
    save_file({**tensors, **{name: torch.full_like(tensors[name], 6e4) for name in names}}, file)
    with pytest.raises(qv.NotFiniteError, match="do not fit fp16") as caught:
        load(untied, adapter=tmp_path / "adapter", weights="fp16", verify=True)
    assert "layers.1.mlp.up_proj.lora_" in caught.value.module


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"max_new_tokens": 1}], ids=str)
def test_decode_steps_notice(loud, options):
    """As the loader makes them on a GPU, here neither compiled nor captured."""
    with load(loud, weights="fp16", attention="fused", cache="preallocated") as llm:
        decode_by_steps(llm.model)
        work = llm.plan.workload
        llm._generations.decoder = Decoder(llm.model, batch_size=1, max_length=work.context_len, backend=None)
        with pytest.raises(qv.NotFiniteError, match="in fp16"):
            llm.chat("hi", **options)


def test_a_step_that_goes_wrong_late_is_noticed_too(untied):
    """The prompt is all right here, so that no module is found."""

    class Spoil(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.fill_(NAN) if ids.shape[1] > 30 else scores

    with load(untied) as llm:
        spoiled = LogitsProcessorList([Spoil(), FiniteLogits()])
        with pytest.raises(qv.NotFiniteError, match=r"in bf16; load with weights='fp32'") as caught:
            llm.generate("hi", do_sample=False, eos_token_id=None, max_new_tokens=60, logits_processor=spoiled)
        assert caught.value.module == ""


@pytest.mark.parametrize(
    ("row", "finite"),
    [
        ([0.0, -INF, 3.0], True),
        ([-INF, -INF, -9.0], True),
        ([1e38, 3e38, 0.0], True),
        ([0.0, NAN, 3.0], False),
        ([0.0, INF, 3.0], False),
        ([-INF, -INF, -INF], False),
    ],
)
def test_forbidden_tokens_are_no_fault(row, finite):
    scores = torch.tensor([[1.0, 2.0, 3.0], row])
    watch = FiniteLogits()
    if finite:
        assert torch.equal(watch(torch.zeros(2, 4, dtype=torch.int64), scores.clone()), scores)
        watch.check()
        return
    with pytest.raises(NotFinite):
        watch(torch.zeros(2, 4, dtype=torch.int64), scores)


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{}, {"cache": "preallocated", "attention": "fused", "compiled": True}], ids=str)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"max_new_tokens": 3}], ids=str)
def test_on_a_gpu_the_process_survives(loud, knobs, options):
    with load(loud, weights="fp16", max_new_tokens=200, **knobs) as llm:
        with pytest.raises(qv.NotFiniteError, match="in fp16"):
            llm.chat("hi", eos_token_id=None, **options)
    with load(loud, **knobs) as llm:
        assert isinstance(llm.chat("hi", max_new_tokens=3), str)
