"""Savers that lose nothing give the tokens of plain `transformers`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qwen_vram.tools.accuracy import make_checkpoint
from tests.matrix.test_saver_matrix import CHUNK, chats, load

LOSSLESS = [
    {},
    {"embeddings": "host"},
    {"prefill_chunk_size": CHUNK},
    {"cache": "preallocated"},
    {"cache": "preallocated", "kv_device": "host"},
    {"attention": "fused"},
    {"dequantization": "tiled"},
]
NEW = 8  # tokens on the CPU
ALL = {knob: value for knobs in LOSSLESS for knob, value in knobs.items()}


@pytest.mark.parametrize("weights", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_lossless_savers_give_the_tokens_of_plain_transformers(demo, weights):
    texts = chats(demo)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    plain = AutoModelForCausalLM.from_pretrained(demo, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[weights])
    batches, expected = [texts[:1], texts], []  # in chunks without a mask, and padded
    for batch in batches:
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
        output = plain.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.batch_decode(answers, skip_special_tokens=True))
    assert not inputs["attention_mask"].all()
    for knobs in (*LOSSLESS, ALL):
        with load(demo, weights, **knobs) as llm:
            found = [llm.generate(batch, max_new_tokens=NEW, do_sample=False) for batch in batches]
        assert found == expected, knobs


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights of Qwen2.5-0.5B's shape."""
    folder = tmp_path_factory.mktemp("published")
    make_checkpoint("Qwen2.5-0.5B", folder)
    return folder


def tokens_and_logits(model, inputs, **options):
    output = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1).float()


@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [*LOSSLESS, ALL], ids=str)
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_on_a_gpu_they_give_them_up_to_ties(published, weights, knobs):
    """Random weights have near ties: tokens may part where plain transformers' two logits are within rounding."""
    options = {}
    if weights == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    plain = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16, device_map={"": 0}, **options)
    ids = torch.randint(1_000, 100_000, (2, 700), generator=torch.Generator().manual_seed(3))
    for padding in (0, 300):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        inputs = {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}
        expected, logits = tokens_and_logits(plain, inputs)
        with load(published, weights, batch_size=2, max_new_tokens=24, **knobs) as llm:
            cache = {} if llm.plan.profile.cache == "dynamic" else {"past_key_values": llm.new_cache(max_length=724)}
            found, ours = tokens_and_logits(llm.model, inputs, **cache)
        steps = 2**-7 * logits.abs().amax(-1)  # of bf16, at the largest logit
        assert ((ours[:, 0] - logits[:, 0]).abs().amax(-1) <= 4 * steps[:, 0]).all()
        for row in range(2):
            parted = (found[row] != expected[row]).nonzero()
            if len(parted):
                at = int(parted[0])
                gap = logits[row, at].max() - logits[row, at, found[row, at]]
                assert gap <= 4 * steps[row, at], (padding, row, at)
