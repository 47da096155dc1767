"""Models whose requests run together, the same models without, and the state of the pages after a session."""

from __future__ import annotations

import threading
from typing import Any

import qwen_vram as qv
from qwen_vram.spec.batching.pages import pool_pages

FUSED = {"attention": "fused", "kernels": "fused"}
WORK = {"prompt_len": 160, "max_new_tokens": 24}
ASKED = [
    "What is 96 * 9?",
    "小测验：小华有三本词典，小军有五颗糖，刘洋有一支铅笔。刘洋的东西是什么？请用一句话回答。",
    "What is 61 - 14?",
    "Write a Python function transform_score(total, b) that returns the smaller of total and b, minus 4.",
    "What is 12 + 30?",
]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7}
ENDLESS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}


def load_batched(folder: object, most: int = 3, **more: Any) -> qv.LoadedModel:
    """Load a model for `most` requests at once."""
    settings = {"profile": "default", "device": "cpu", "progress": False, **FUSED, **WORK, **more}
    return qv.load(folder, concurrency=most, **settings)


def load_alone(folder: object, **more: Any) -> qv.LoadedModel:
    """Load the same model without pages, so that calls run one after the other."""
    settings = {"profile": "default", "device": "cpu", "progress": False, **FUSED, **WORK, "cache": "preallocated"}
    return qv.load(folder, **{**settings, **more})


def check_whole(llm: qv.LoadedModel) -> None:
    """Wait until no request runs or waits, and check that the pool has each of its pages once."""
    batcher = llm._generations.batcher
    for _ in range(6000):
        if not batcher.running and not batcher.waiting and not llm._submissions._open:
            break
        threading.Event().wait(0.005)
    assert (batcher.running, batcher.waiting, llm._submissions._open) == (0, 0, 0)
    pages = pool_pages(batcher.most, batcher.pool.context_len)
    assert sorted(batcher.pool._free) == list(range(1, pages))
    assert not batcher._waiters
