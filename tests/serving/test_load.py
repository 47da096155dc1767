"""Many clients at once: each good greedy answer is the one that the model gives alone, and memory does not grow.

One server runs one request after the other, and the other one runs them together.
"""

import asyncio
import json
import random
import re
import subprocess
import threading

import pytest

import qwen_vram as qv
from tests.helpers.server import Server
from tests.serving.conftest import LENGTHS

openai = pytest.importorskip("openai")

AT_ONCE = 32
MIB = 2**20
# What Python keeps beside tensors: bodies, answers, and the heap of their threads.
BESIDE = 64 * MIB
QUESTIONS = ("What is 12 + 30?", "What is 96 * 9?", "What is 7 * 8?", "What is 61 - 14?", "Write a poem about 12.")
FILLER = (
    "The red lamp stood by the door. ",
    "一只猫在房间里。",
    "def add(a, b): return a + b\n",
    "The code of Rita is 3683. ",
)


def request_of(draw, number, longest):
    """The kind and the fields of a request; one in ten prompts has up to `longest` tokens, and the others a tenth."""
    kind = draw.choices(("greedy", "sampled", "cancelled", "malformed", "too long"), (60, 15, 10, 8, 7))[0]
    tokens = draw.randint(16, longest if number % 10 == 0 else max(32, longest // 10))
    text = draw.choice(FILLER)
    # Each text has 8 to 13 tokens.
    prompt = text * (700 if kind == "too long" else tokens // 13) + draw.choice(QUESTIONS)
    body = {"model": "checkpoint", "max_tokens": draw.choice((1, 4, 12 if longest > 150 else 6)), "temperature": 0}
    chat = draw.random() < 0.6
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if kind == "sampled":
        body |= {"temperature": draw.choice((0.5, 1.0, 2.0)), "top_p": draw.choice((0.5, 1.0)), "seed": number}
    if kind == "cancelled":
        body["max_tokens"] = 100
    if kind == "malformed":
        body |= draw.choice(({"n": -1}, {"stop": 5}, {"temperature": "hot"}, {"presence_penalty": 1}, {"model": "x"}))
    return kind, chat, body


async def ask(client, kind, chat, body, *, stream):
    """The text of an answer; the error of a refused request; `None` for one that this client gave up."""
    create = client.chat.completions.create if chat else client.completions.create
    if kind == "cancelled":
        try:
            await asyncio.wait_for(create(**body), 0.3)
        except asyncio.TimeoutError:
            return None
        return None
    try:
        if not stream:
            choice = (await create(**body)).choices[0]
            return choice.message.content if chat else choice.text
        pieces = []
        async for chunk in await create(**body, stream=True):
            choice = chunk.choices[0]
            pieces.append((choice.delta.content if chat else choice.text) or "")
        return "".join(pieces)
    except openai.APIStatusError as error:
        return error


async def ask_by_curl(url, chat, body):
    """The text of an answer that curl gets."""
    path = "chat/completions" if chat else "completions"
    words = ("curl", "-sS", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", "@-")
    process = await asyncio.create_subprocess_exec(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = await process.communicate(json.dumps(body).encode())
    choice = json.loads(out)["choices"][0]
    return choice["message"]["content"] if chat else choice["text"]


def ask_in_a_thread(url, chat, body):
    """The text of an answer that the client without asyncio gets."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        choice = (client.chat.completions if chat else client.completions).create(**body).choices[0]
        return choice.message.content if chat else choice.text


async def run(url, requests):
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number, kind, chat, body):
        async with gate:
            if number % 8 == 3 and kind in ("greedy", "sampled"):
                return await ask_by_curl(url, chat, body)
            if number % 8 == 6 and kind in ("greedy", "sampled"):
                return await asyncio.to_thread(ask_in_a_thread, url, chat, body)
            return await ask(client, kind, chat, body, stream=number % 2 == 0)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        return await asyncio.gather(*(one(number, *request) for number, request in enumerate(requests)))


def expected(alone, chat, body):
    options = {name: body[name] for name in ("temperature", "top_p", "seed") if name in body}
    if chat:
        return alone.chat(body["messages"], max_new_tokens=body["max_tokens"], **options)
    return alone.generate(body["prompt"], max_new_tokens=body["max_tokens"], **options)


@pytest.fixture(scope="module")
def together(demo):
    options = ("--profile", "default", "--set", "weights=fp32", "--prompt-len", 3000, "--max-new-tokens", 200)
    with Server(demo, *options, "--concurrency", AT_ONCE) as started:
        yield started.ready()


@pytest.fixture(params=["one by one", "together"])
def served(request):
    """Each kind of server, and the same model in this process.

    In a batch, bf16 rounds otherwise than alone, which can change the likeliest token: the requests that run together
    have fp32.
    """
    if request.param == "one by one":
        return request.getfixturevalue("server"), request.getfixturevalue("alone")
    return request.getfixturevalue("together"), request.getfixturevalue("alone_in_fp32")


@pytest.fixture(scope="module")
def alone_in_fp32(demo):
    with qv.load(demo, profile="default", weights="fp32", device="cpu", progress=False, **LENGTHS) as llm:
        yield llm


@pytest.mark.parametrize(("count", "longest"), [(40, 150), pytest.param(200, 2950, marks=[pytest.mark.full])])
def test_each_good_request_gets_the_text_that_it_gets_alone(served, count, longest):
    server, alone = served
    draw = random.Random(count + 5)
    requests = [request_of(draw, number, longest) for number in range(count)]
    with Peaks(server) as peaks:
        answers = asyncio.run(run(server.url, requests))
    kinds = [kind for kind, _, _ in requests]
    assert {"greedy", "sampled", "cancelled", "malformed", "too long"} == set(kinds)
    for (kind, chat, body), answer in zip(requests, answers):
        if kind in ("greedy", "sampled"):
            assert answer == expected(alone, chat, body), body
        elif kind == "cancelled":
            assert answer is None
        else:
            assert isinstance(answer, openai.APIStatusError), (kind, answer)
            assert answer.status_code == (404 if body["model"] == "x" else 400)
            if kind == "too long":
                assert answer.code in ("context_length_exceeded", "does_not_fit")
    server.wait_for(lambda: '"running":0,"waiting":0' in server.get("/health")[1])
    assert "Traceback" not in server.err
    assert " error " not in server.err
    peaks.check()


def resident(server):
    return int(re.search(r"^qwen_vram_process_resident_bytes (\d+)", server.get("/metrics")[1], re.M)[1])


class Peaks:
    """Samples of a server's resident memory, and of its requests, while clients ask."""

    def __init__(self, server):
        self._server, self._over = server, threading.Event()
        self._before, self.most, self.running = resident(server), 0, 0
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()

    def _sample(self):
        while not self._over.wait(0.1):
            self.most = max(self.most, resident(self._server))
            self.running = max(self.running, json.loads(self._server.get("/health")[1])["running"])

    def check(self):
        """Compare the memory with the plan. On a CPU torch counts no peak, so the process tells it."""
        text = self._server.get("/metrics")[1]
        parts = {
            (part, kind): int(size)
            for part, kind, size in re.findall(r'memory_bytes{part="(\w+)",kind="(\w+)"} (\d+)', text)
        }
        for (part, kind), size in parts.items():
            assert kind == "predicted" or size <= parts[part, "predicted"], part
        assert ("kv_cache", "measured") in parts
        planned = parts["peak_allocated", "predicted"] - parts["weights", "predicted"]
        assert self.most - self._before <= planned + BESIDE, f"{self._before:,} {self.most:,} {planned:,}"
        most = int(re.search(r"^qwen_vram_requests_running_limit (\d+)", text, re.M)[1])
        assert min(2, most) <= self.running <= most


@pytest.mark.full
def test_memory_after_2000_requests_is_that_after_100(served):
    server, _ = served
    draw = random.Random(7)
    sizes = []
    for number in range(20):
        requests = [request_of(draw, 100 * number + at, 300) for at in range(100)]
        asyncio.run(run(server.url, requests))
        server.wait_for(lambda: '"running":0,"waiting":0' in server.get("/health")[1])
        sizes.append(resident(server))
    print([size // MIB for size in sizes])
    assert max(sizes[1:]) - sizes[0] < 16 * MIB, [f"{size:,}" for size in sizes]
