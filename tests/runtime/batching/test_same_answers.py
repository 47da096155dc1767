"""Answers of a batch are those that the same calls get alone, in every format, model and setting."""

import pytest
import torch
from transformers import LogitsProcessor

from qwen_vram.demo import ADAPTER
from tests.helpers.batches import ASKED, GREEDY, check_whole, load_alone, load_batched
from tests.helpers.llama import make_llama

# Settings of a load; `make test` runs the first ones.
QUICK = {
    "bf16 chunks": {"prefill_chunk_size": 32},
    "nf4 head, table on the host": {"weights": "nf4", "lm_head": "nf4", "embeddings": "host"},
    "sdpa chunks, plain": {"attention": "sdpa", "kernels": "plain", "prefill_chunk_size": 32},
    "adapter": {"adapter": ADAPTER},
}
SLOW = {
    "bf16": {},
    "int8-wo": {"weights": "int8-wo"},
    "fp32": {"weights": "fp32"},
    "fp16": {"weights": "fp16"},
    "nf4": {"weights": "nf4"},
    "nf4 tiles": {"weights": "nf4", "dequantization": "tiled", "prefill_chunk_size": 48},
    "fp4": {"weights": "fp4"},
    "int8": {"weights": "int8"},
    "int8 tiles": {"weights": "int8", "dequantization": "tiled"},
    "int4": {"weights": "int4"},
    "fp8": {"weights": "fp8"},
    "int8-wo head": {"weights": "int8-wo", "lm_head": "int8-wo"},
    "sdpa": {"attention": "sdpa"},
    "eager": {"attention": "eager"},
    "eager chunks, plain": {"attention": "eager", "kernels": "plain", "prefill_chunk_size": 32},
    "nf4 adapter": {"weights": "nf4", "adapter": ADAPTER, "prefill_chunk_size": 64},
}
ROWS = [
    *(pytest.param(knobs, id=name) for name, knobs in QUICK.items()),
    *(pytest.param(knobs, id=name, marks=pytest.mark.full) for name, knobs in SLOW.items()),
]


@pytest.mark.parametrize("knobs", ROWS)
def test_every_setting(demo, knobs):
    with load_alone(demo, **knobs) as alone:
        expected = [alone.chat(text, **GREEDY) for text in ASKED]
    with load_batched(demo, **knobs) as llm:
        futures = [llm.submit(text, **GREEDY) for text in ASKED]
        assert [one.result() for one in futures] == expected
        assert [llm.chat(text, **GREEDY) for text in ASKED[:2]] == expected[:2]
        check_whole(llm)
    assert len(set(expected)) == len(ASKED)


class Recorded(LogitsProcessor):
    """Keeps the tokens and the logits of a request."""

    def __init__(self):
        self.ids, self.rows = None, []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        self.ids = input_ids.clone()
        self.rows.append(scores[0].clone())
        return scores


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"), vocab_size=3072)


@pytest.mark.parametrize("kind", ["qwen3", "llama", pytest.param("untied", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "knobs",
    [
        {"prefill_chunk_size": 48},
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"attention": "sdpa", "kernels": "plain", "prefill_chunk_size": 48}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_family_has_the_logits_of_a_forward_pass(request, kind, knobs):
    """Random weights have close logits, so the logits are compared and not the tokens."""
    with load_batched(request.getfixturevalue(kind), weights="fp32", **knobs) as llm:
        texts = ["The code of", "Alpha beta gamma. " * 9, "x", "Where is the market? " * 6, "One two three"]
        seen = [Recorded() for _ in texts]
        futures = [
            llm.submit(prompt=text, logits_processor=[one], max_new_tokens=6, do_sample=False, eos_token_id=None)
            for text, one in zip(texts, seen)
        ]
        for future, one in zip(futures, seen):
            future.result()
            assert len(one.rows) == 6
            with torch.no_grad():
                expected = llm.model(input_ids=one.ids, use_cache=False).logits[0, -6:].float()
            assert expected.std() > 0.1
            torch.testing.assert_close(torch.stack(one.rows), expected, atol=1e-4, rtol=1e-4)
        assert len({one.ids.shape[1] for one in seen}) > 3
        check_whole(llm)
