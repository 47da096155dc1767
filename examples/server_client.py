"""Ask a running server with OpenAI's client: `python examples/server_client.py [URL]`.

Start the server before, for example with `qwen-vram serve qwen_vram/demo/checkpoint`. The key is read from the variable
QWEN_VRAM_API_KEY, as by the server.
"""

import os
import sys

from openai import BadRequestError, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("QWEN_VRAM_API_KEY", "none"))
model = client.models.list().data[0].id
question = [{"role": "user", "content": "What is 96 * 9?"}]

answer = client.chat.completions.create(model=model, messages=question, temperature=0)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens, "+", answer.usage.completion_tokens, "tokens")

for chunk in client.chat.completions.create(model=model, messages=question, stop=" = ", stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

sampled = client.chat.completions.create(model=model, messages=question, temperature=1, seed=7, n=2, logprobs=True)
for choice in sampled.choices:
    print(choice.message.content, sum(token.logprob for token in choice.logprobs.content))

try:
    client.completions.create(model=model, prompt="much " * 100_000)
except BadRequestError as error:
    print(error.code)
