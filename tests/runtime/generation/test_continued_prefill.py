"""Prefill in chunks after a filled cache, with the lowest and the newest supported transformers."""

from __future__ import annotations

import pytest
import torch

import qwen_vram as qv
from tests.runtime.test_conversations import feeding

PROMPTS = ["What is 12 + 30? What is 7 * 8? What is 61 - 14?", "3 + 4 = ?"]
CHUNK = 8


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "padded"])
@pytest.mark.parametrize("by", ["plan", "option", "generation_config"])
def test_a_longer_prompt_after_a_callers_cache_feeds_new_tokens_alone(demo, prompts, by):
    chunks = {"prefill_chunk_size": CHUNK} if by == "plan" else {}
    with qv.load(demo, profile="default", device="cpu", progress=False, batch_size=2, prompt_len=200, **chunks) as llm:
        llm.tokenizer.padding_side = "left"
        inputs = dict(llm.tokenizer(prompts, return_tensors="pt", padding=True))
        more = torch.tensor([llm.tokenizer("So what is 25 + 25? And 9 + 1?")["input_ids"]] * len(prompts))
        longer = {
            "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1),
        }
        expected = llm.model.generate(**longer, do_sample=False, max_new_tokens=8)
        cache = llm.new_cache(max_length=200)
        options = {"do_sample": False, "past_key_values": cache}
        llm._generate(inputs, 1, options)
        config = llm.model.generation_config
        before = config.prefill_chunk_size
        if by == "option":
            options["prefill_chunk_size"] = CHUNK
        elif by == "generation_config":
            options["generation_config"] = type(config)(**{**config.to_dict(), "prefill_chunk_size": CHUNK})
        with feeding(llm) as fed:
            tokens = llm._generate(longer, 8, options)
        assert tokens.tolist() == expected.tolist()
        new = longer["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        assert max(fed) <= CHUNK
        assert new - 1 <= sum(fed) <= new  # a chunk of one token is not counted
        assert config.prefill_chunk_size == before
