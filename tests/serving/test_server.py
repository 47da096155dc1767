"""Real clients against a real server: each answer is the one that the model gives alone."""

import asyncio
import json
import subprocess

import pytest

openai = pytest.importorskip("openai")

ASKED = "What is 12 + 30?"
CHAT = [{"role": "user", "content": ASKED}]
GREEDY = {"model": "checkpoint", "messages": CHAT, "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_health_and_models(server, client):
    assert json.loads(server.get("/health")[1]) == {"status": "ready", "reason": "", "running": 0, "waiting": 0}
    assert [one.id for one in client.models.list()] == ["checkpoint"]
    assert client.models.retrieve("checkpoint").owned_by == "qwen_vram"
    with pytest.raises(openai.NotFoundError, match="the model 'etc/passwd' is not served here"):
        client.models.retrieve("etc/passwd")
    assert "plan for checkpoint" in server.out
    assert server.out.splitlines()[-1] == f"listening on {server.url}"


def test_a_chat_is_what_the_model_answers_alone(client, alone):
    made = client.chat.completions.create(**GREEDY)
    choice = made.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        alone.chat(ASKED),
        "stop",
    )
    stream = alone.tokens(ASKED)
    tokens = len(list(stream))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (stream.prompt_tokens, tokens)
    assert made.usage.total_tokens == stream.prompt_tokens + tokens
    system = [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": ASKED}]},
    ]
    answer = client.chat.completions.create(**{**GREEDY, "messages": system}).choices[0].message.content
    assert answer == alone.chat(ASKED, system="Answer.")


def test_a_stream_is_the_same_in_pieces_with_its_usage(client, alone):
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == alone.chat(ASKED)
    assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] == "stop"
    assert len({one.id for one in chunks}) == 1
    assert not chunks[-1].choices
    assert chunks[-1].usage == client.chat.completions.create(**GREEDY).usage
    assert all(one.usage is None for one in client.chat.completions.create(**GREEDY, stream=True))


def test_the_asynchronous_client_gets_the_same(server, alone):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**GREEDY)
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            pieces = [one.choices[0].delta.content or "" async for one in stream]
            return (await whole).choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == (alone.chat(ASKED),) * 2


def test_curl_gets_the_same(server, alone):
    def curl(*more, **fields):
        body = json.dumps({"messages": CHAT, "temperature": 0, **fields})
        command = ["curl", "-sS", "-N", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        return subprocess.run([*command, "-d", body, *more], capture_output=True, text=True, check=True).stdout

    assert json.loads(curl())["choices"][0]["message"]["content"] == alone.chat(ASKED)
    lines = [line for line in curl(stream=True).splitlines() if line]
    assert lines[0] == ": running"
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[1:-1]]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == alone.chat(ASKED)


def test_completions_of_texts(client, alone):
    made = client.completions.create(model="checkpoint", prompt=["The code of", "Red is"], temperature=0, n=2)
    texts = [alone.generate(text, max_new_tokens=16) for text in ("The code of", "Red is")]
    assert [one.text for one in made.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [one.index for one in made.choices] == [0, 1, 2, 3]
    tokens = [alone.tokens(prompt=text).prompt_tokens for text in ("The code of", "Red is")]
    assert made.usage.prompt_tokens == sum(tokens)
    pieces = client.completions.create(model="checkpoint", prompt="The code of", temperature=0, stream=True)
    assert "".join(one.choices[0].text for one in pieces) == texts[0]


def test_a_limit_ends_with_its_reason(client, alone):
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        made = client.chat.completions.create(**GREEDY, **limit)
        assert (made.choices[0].finish_reason, made.usage.completion_tokens) == ("length", 3)
        assert made.choices[0].message.content == alone.chat(ASKED, max_new_tokens=3)


@pytest.mark.parametrize("stop", [" =", ["zz", "+ 30 "], "12", "4"])
def test_an_answer_ends_before_a_stop_text(client, alone, stop):
    whole = alone.chat(ASKED)
    cut = min(at for text in ([stop] if isinstance(stop, str) else stop) if (at := whole.find(text)) >= 0)
    made = client.chat.completions.create(**GREEDY, stop=stop)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == (whole[:cut], "stop")
    pieces = client.chat.completions.create(**GREEDY, stop=stop, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == whole[:cut]
    assert made.usage.completion_tokens < len(list(alone.tokens(ASKED)))


def test_seeds_repeat_answers_and_n_gives_others(client, alone):
    hot = {**GREEDY, "temperature": 2.0, "seed": 5, "max_tokens": 9}
    hot["extra_body"] = {"top_k": 0, "repetition_penalty": 2.0}
    first, second = (client.chat.completions.create(**hot, n=3) for _ in range(2))
    texts = [one.message.content for one in first.choices]
    assert texts == [one.message.content for one in second.choices]
    options = {"temperature": 2.0, "top_k": 0, "repetition_penalty": 2.0, "max_new_tokens": 9}
    assert texts == [alone.chat(ASKED, seed=5 + number, **options) for number in range(3)]
    assert len(set(texts)) > 1
    found = ["", "", ""]
    for chunk in client.chat.completions.create(**hot, n=3, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert found == texts
    negative = client.chat.completions.create(**{**hot, "seed": -1}).choices[0].message.content
    assert negative == alone.chat(ASKED, seed=2**64 - 1, **options)


def test_log_probabilities_of_tokens(client, alone):
    made = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2).choices[0]
    expected = [token for token in alone.tokens(ASKED, logprobs=2)][:-1]  # the end token is not a part of the answer
    content = made.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == made.message.content
    assert [one.logprob for one in content] == [pytest.approx(token.logprob, abs=1e-6) for token in expected]
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in content)
    stream = client.chat.completions.create(**GREEDY, logprobs=True, stream=True)
    streamed = [token for one in stream if one.choices[0].logprobs for token in one.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in content]
    assert all(one.top_logprobs == [] for one in streamed)
    text = client.completions.create(model="checkpoint", prompt="The code of", temperature=0, logprobs=1).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert [text.text[at:].startswith(one) for at, one in zip(text.logprobs.text_offset, text.logprobs.tokens)]
    assert client.chat.completions.create(**GREEDY).choices[0].logprobs is None


def test_a_chinese_answer_arrives_in_whole_characters(client, alone):
    asked = "小测验：小华有三本词典，小军有五颗糖，刘洋有一支铅笔。刘洋的东西是什么？请用一句话回答。"
    chat = {**GREEDY, "messages": [{"role": "user", "content": asked}]}
    pieces = [one.choices[0].delta.content or "" for one in client.chat.completions.create(**chat, stream=True)]
    assert "".join(pieces) == alone.chat(asked)
    assert not any("\ufffd" in piece for piece in pieces)
    made = client.chat.completions.create(**chat, logprobs=True).choices[0]
    assert b"".join(bytes(one.bytes) for one in made.logprobs.content).decode() == made.message.content


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "gpt-4o"}, 404, "the model 'gpt-4o' is not served here; this server has 'checkpoint'"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported here: use repetition_penalty; got 0.5"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "this template would leave tools out"),
        ({"tool_choice": "required"}, 400, "tool_choice is not supported here"),
        ({"temperature": 3}, 400, "temperature must be a number from 0 to 2, got 3"),
        ({"n": 0}, 400, "n must be a whole number from 1 to 16, got 0"),
        ({"messages": []}, 400, "messages must be a list of messages, not empty, got []"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 400, "this template would leave enable_thinking out"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_the_reason(server, fields, status, words):
    got, answer = server.post("/v1/chat/completions", {**GREEDY, **fields})
    assert got == status
    assert words in answer["error"]["message"]
    assert answer["error"]["param"] in fields or answer["error"]["param"] == "enable_thinking"


def test_harmless_fields_of_clients_change_nothing(server, alone):
    fields = {
        "user": "someone", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "frequency_penalty": 0.0,
        "presence_penalty": None, "logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "tools": [], "tool_choice": "auto", "n": 1, "stop": None, "unheard_of": [1, 2],
    }  # fmt: skip
    status, answer = server.post("/v1/chat/completions", {**GREEDY, **fields})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, alone.chat(ASKED))


def test_a_request_that_does_not_fit_is_refused_with_the_bytes(server, tight):
    status, answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi " * 1750}]})
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "does_not_fit", "messages")
    assert error["budget_bytes"] == tight < error["needed_bytes"]
    assert f"{error['needed_bytes']:,} bytes are needed, {tight:,} are allowed" in error["message"]
    status, answer = server.post("/v1/completions", {"prompt": "hi " * 5000})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "prompt")


def test_metrics_have_memory_predicted_beside_measured(server, alone):
    server.post("/v1/chat/completions", {**GREEDY, "max_tokens": 2})
    status, text = server.get("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    sizes = {
        (part, kind): int(values[f'qwen_vram_memory_bytes{{part="{part}",kind="{kind}"}}'])
        for part in ("weights", "kv_cache")
        for kind in ("predicted", "measured")
    }
    assert sizes["weights", "predicted"] == sizes["weights", "measured"] > 10**7
    one_token = 2560  # 5 layers, 2 heads of 64 numbers, keys and values, 2 bytes
    assert 0 <= sizes["kv_cache", "predicted"] - sizes["kv_cache", "measured"] <= one_token
    assert sizes["kv_cache", "measured"] >= 10 * one_token
    assert float(values['qwen_vram_tokens_total{kind="generated"}']) >= 2
    assert float(values["qwen_vram_process_resident_bytes"]) > 10**8
    assert values['qwen_vram_state{state="ready"}'] == "1"
    assert int(values['qwen_vram_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    named = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    ends = ("_bucket", "_sum", "_count")
    plain = {name.partition("{")[0] for name in values}
    assert {next((name.removesuffix(end) for end in ends if name.endswith(end)), name) for name in plain} == named


def test_the_log_has_no_prompt_and_no_query(server):
    secret = "sesame-4711"
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 1})
    server.post("/v1/chat/completions", {"messages": secret, "model": secret})
    server.get(f"/{secret}?key={secret}", Authorization=f"Bearer {secret}")
    server.wait_for(lambda: "GET (other path) 404" in server.err)
    assert "POST /v1/chat/completions 200" in server.err
    assert secret not in server.err + server.out
