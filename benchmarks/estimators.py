"""Three estimators beside what was measured: accelerate estimate-memory, hf-mem, and this library, on Qwen2.5-7B.

Usage: python benchmarks/estimators.py [--page docs/accuracy.md]     (hf-mem: pip install hf-mem)

A hub on this machine serves the checkpoint's config and safetensors headers (the tensors themselves are holes in a file
of the real size), in bf16 and as bitsandbytes stores nf4. The other two run their own code against it. hf-mem asks for
huggingface.co by name, so its requests are sent to this machine's hub instead. What was measured is in
tests/data/accuracy.jsonl: 8,192 + 16 tokens, batch 1, sdpa, NVIDIA H100.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import qwen_vram as qv  # noqa: E402
from qwen_vram.arithmetic.weights import stored_weights  # noqa: E402
from qwen_vram.spec.catalog import catalog_row, find  # noqa: E402
from qwen_vram.spec.formats import FORMATS  # noqa: E402
from qwen_vram.spec.profile import resolve_profile  # noqa: E402
from qwen_vram.tools.accuracy import read_rows  # noqa: E402
from qwen_vram.tools.accuracy_report import KEPT_FROM  # noqa: E402
from tests import hub_server  # noqa: E402

MODEL, CONTEXT, NEW = "Qwen2.5-7B", 8192, 16
ACCELERATE = """
import json, sys
from accelerate.commands.estimate import estimate_command_parser, gather_data
args = estimate_command_parser().parse_args([sys.argv[1], "--library_name", "transformers", "--dtypes", sys.argv[2]])
print(json.dumps(gather_data(args)[0][2]))
"""
HF_MEM = """
import asyncio, json, sys, httpx2
class Here(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request):
        request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=int(sys.argv[2]))
        return await super().handle_async_request(request)
client = httpx2.AsyncClient
httpx2.AsyncClient = lambda **options: client(transport=Here(), follow_redirects=True)
from hf_mem.run import arun
options = {"experimental": True, "max_model_len": int(sys.argv[3]), "kv_cache_dtype": "bfloat16"}
result = asyncio.run(arun(model_id=sys.argv[1], **options))
print(json.dumps([result.memory, result.kv_cache]))
"""


class Handler(hub_server.Handler):
    """Serves ranges of large files without reading the rest."""

    def listing(self, repo_id: str, folder: Path, parts: list[str]) -> object:
        """As the hub answers, without a digest of the large file."""
        files = sorted(folder.iterdir())
        if "tree" in parts:
            return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
        siblings = [{"rfilename": file.name} for file in files]
        config = json.loads((folder / "config.json").read_text())
        return {"id": repo_id, "sha": hub_server.COMMIT, "siblings": siblings, "private": False, "config": config}

    def send_file(self, file: Path, body: bool) -> None:
        """The range that was asked for; small files as ever."""
        size = file.stat().st_size
        if size < 2**20:
            return small_file(self, file, body)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        with file.open("rb") as opened:
            opened.seek(int(first))
            content = opened.read(int(last) - int(first) + 1)
        headers = {"X-Repo-Commit": hub_server.COMMIT, "Content-Range": f"bytes {first}-{last}/{size}"}
        return self.send(206, content, body, headers)


small_file = hub_server.Handler.send_file


def make_repository(folder: Path, weights: str) -> None:
    """config.json and one safetensors file of the real size whose tensors are a hole."""
    row = catalog_row(MODEL)
    assert row is not None
    config = {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings, "dtype": "bfloat16"}
    config["architectures"] = ["Qwen2ForCausalLM"]
    header: dict[str, object] = {}
    end = 0

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes

    for stored in stored_weights(find(MODEL), resolve_profile("default", weights=weights)):
        weight = stored.weight
        if stored.nbytes == weight.numel * 2:
            add(weight.name, "BF16", list(weight.shape), stored.nbytes)
            continue
        for part, size in zip(FORMATS[weights].parts, FORMATS[weights].part_sizes(weight.shape), strict=True):
            suffix = "" if part is FORMATS[weights].parts[0] else f".{part.name.replace(' ', '_')}"
            add(weight.name + suffix, "U8", [size], size)
    if weights != "bf16":
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def ask(code: str, *arguments: str, endpoint: str) -> object:
    command = [sys.executable, "-c", code, *arguments]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": cache}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def compare(weights: str, hub: hub_server.Hub) -> list[dict[str, object]]:
    """Every estimator's bytes for the load and for the peak, beside the measured ones."""
    repo_id, port = f"local/{weights}", hub.endpoint.rpartition(":")[2]
    loaded = ask(ACCELERATE, repo_id, "float16" if weights == "bf16" else "int4", endpoint=hub.endpoint)
    memory, cache = ask(HF_MEM, repo_id, port, str(CONTEXT + NEW), endpoint=hub.endpoint)
    ours = qv.estimate_vram(MODEL, weights=weights, prompt_len=CONTEXT, max_new_tokens=NEW)
    row = next(
        row
        for row in read_rows(ROOT / "tests" / "data")
        if (row["model"], row["weights"], row["knobs"], row["prompt_len"])
        == (MODEL, weights, {"attention": "sdpa"}, CONTEXT)
    )
    real = row["measured"]
    found = {
        "measured": (real["weights"], real["peak_allocated"], real["process_total"]),
        "`accelerate estimate-memory`": (round(loaded), None, None),
        "`hf-mem --experimental`": (memory, memory + cache, None),
        "`qwen_vram`": (ours.weights, ours.peak_allocated, ours.process_total),
    }
    return [{"weights": weights, "by": by, "load": a, "peak": b, "process": c} for by, (a, b, c) in found.items()]


def table(rows: list[dict]) -> str:
    lines = ["| weights | by | loaded | peak, 8,192 + 16 tokens | process |", "|---|---|---|---|---|"]
    for row in rows:
        real = next(one for one in rows if one["by"] == "measured" and one["weights"] == row["weights"])
        cells = []
        for part in ("load", "peak", "process"):
            if row[part] is None:
                cells.append("-")
            else:
                error = "" if row is real else f" ({row[part] / real[part] - 1:+.2%})"
                cells.append(f"{row[part]:,}{error}")
        lines.append(f"| {row['weights']} | {row['by']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="put the table at the end of this page")
    page = parser.parse_args().page
    hub_server.Handler.listing, hub_server.Handler.send_file = Handler.listing, Handler.send_file
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"local/{weights}": Path(scratch) / weights for weights in ("bf16", "nf4")}
        for weights in ("bf16", "nf4"):
            make_repository(folders[f"local/{weights}"], weights)
        with hub_server.serving(folders) as hub:
            rows = [row for weights in ("bf16", "nf4") for row in compare(weights, hub)]
    print(table(rows))
    if page:
        kept = page.read_text().split(KEPT_FROM)[0].rstrip("\n")
        intro = (
            f"{KEPT_FROM}\n\nQwen2.5-7B, batch 1, sdpa. Each cell has bytes and the error against the measured bytes. "
            "A dash means that the tool gives no value. Written by `python benchmarks/estimators.py`."
        )
        page.write_text(f"{kept}\n\n{intro}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
