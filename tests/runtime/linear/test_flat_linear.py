"""4-bit matrices of widths that bitsandbytes' kernels for CPUs do not take: the right weights all the same."""

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn
from transformers import AutoModelForCausalLM

import qwen_vram as qv
from qwen_vram.lora.codecs.bnb_4bit import FourBit
from qwen_vram.runtime.backends.bnb_rows import four_bit
from qwen_vram.runtime.linear.flat_4bit import FlatLinear4bit
from tests.conftest import make_checkpoint
from tests.helpers.tiers import thinned

IDS = torch.arange(3, 40)[None]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# Rows by 32 and columns by 64 are taken; each of these breaks one of the two, or both.
WIDTHS = {
    "rows": {"intermediate_size": 160, "vocab_size": 3073},
    "columns": {"hidden_size": 96, "intermediate_size": 192},
    "odd": {"intermediate_size": 771},
    "both": {"hidden_size": 132, "num_attention_heads": 3, "num_key_value_heads": 3},
}


@pytest.fixture(scope="module", params=WIDTHS)
def narrow(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), **{**SMALL, **WIDTHS[request.param]})


def values(codes, state):
    """A matrix by its codes and maxima alone, without a kernel."""
    maxima = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    count = state.shape[0] * state.shape[1]
    indices = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(-1)[:count]
    return (state.code[indices.long()] * maxima.repeat_interleave(state.blocksize)[:count]).view(*state.shape)


def expected_logits(folder, weights, *, head):
    """Logits of plain transformers over matrices that were quantized and put back into bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    kind, nested = weights.removesuffix("-plain"), not weights.endswith("-plain")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (head or name != "lm_head"):
            codes, state = four_bit(module.weight.data, torch.device("cpu"), quant_type=kind, nested=nested)
            module.weight.data = values(codes, state).bfloat16()
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.mark.parametrize(
    *thinned(
        1,
        weights=["nf4", "nf4-plain", "fp4", "fp4-plain"],
        knobs=[{}, {"streamed_layers": 1}, {"streamed_layers": 2, "dequantization": "tiled"}],
    ),
    ids=str,
)
def test_a_model_of_such_widths_runs_with_the_weights_that_were_stored(narrow, weights, knobs):
    with qv.load(narrow, profile="default", weights=weights, lm_head=weights, progress=False, **knobs) as llm:
        assert any(isinstance(module, FlatLinear4bit) for module in llm.model.modules())
        report = llm.report()
        assert report.measured["weights"] == report.estimate.weights
        with torch.inference_mode():
            logits = llm.model(IDS).logits.float()
    expected = expected_logits(narrow, weights, head=True)
    # Matrices of the other widths go through the fused kernel, which rounds block maxima to bf16.
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_a_model_of_such_widths_is_saved_and_loads_again(narrow, tmp_path):
    with qv.load(narrow, profile="default", weights="fp4-plain", progress=False) as llm, torch.inference_mode():
        logits = llm.model(IDS).logits
        llm.save_quantized(tmp_path / "out", progress=False)
    with qv.load(tmp_path / "out", progress=False) as llm, torch.inference_mode():
        assert llm.plan.profile.weights == "fp4-plain"
        assert torch.equal(llm.model(IDS).logits, logits)


def test_widths_that_the_kernel_takes_are_left_to_it(untied):
    with qv.load(untied, profile="default", weights="nf4", progress=False) as llm:
        assert not any(isinstance(module, FlatLinear4bit) for module in llm.model.modules())


@pytest.mark.parametrize("shape", [(64, 96), (96, 144), (128, 48), (33, 70)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_merge_reads_its_codes_as_they_are(shape, kind):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = four_bit(matrix, torch.device("cpu"), quant_type=kind, nested=False)
    decoded = FourBit(kind, nested=False).decode(codes, state.absmax, shape)
    assert torch.allclose(decoded, values(codes, state), atol=1e-6)
