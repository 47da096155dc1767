"""Attention of one new token by this library's kernels, held against float64 attention.

Where there is no GPU Triton's interpreter runs the kernels, if the process was started with TRITON_INTERPRET=1.
"""

import os
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_vram.arithmetic.attention import decode_scratch, decode_splits
from qwen_vram.arithmetic.decode_graph import step_sizes
from qwen_vram.runtime.attention import decode_step
from qwen_vram.runtime.attention.decode import paged_attention, quantized_attention
from qwen_vram.runtime.kernels.fused_layers import fuse_layers
from qwen_vram.runtime.kv_cache.arena import KvArena
from qwen_vram.runtime.kv_cache.quantized import quantized_states
from qwen_vram.spec.batching.pages import PAGE
from qwen_vram.spec.catalog import catalog_row, row_architecture
from qwen_vram.spec.kv_formats import kv_format
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# NumPy warns of how Triton's interpreter (3.6) reads scalars.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton with TRITON_INTERPRET=1 is not here")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
# Heads, heads of the cache, their size, the memory's length, and by sequence its tokens with the new one, and padding.
SHAPES = [
    (14, 2, 64, 300, [130], [0]),
    (4, 4, 16, 100, [33, 97], [3, 1]),
    (6, 2, 80, 64, [1], [0]),
    (28, 4, 128, 200, [200, 64], [0, 2]),
    (32, 8, 128, 2100, [2099], [1]),
]


def rotated(heads, cos, sin):
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


def exact(query, keys, values, starts, filled):
    """Return softmax attention in float64."""
    batch, heads, head_dim = query.shape
    result = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    for number in range(batch):
        own = slice(int(starts[number]), int(starts[number] + filled[number]))
        group = heads // keys.shape[1]
        key, value = (one[own].double().repeat_interleave(group, 1) for one in (keys, values))
        scores = torch.einsum("hd,khd->hk", query[number].double(), key) * head_dim**-0.5
        result[number] = torch.einsum("hk,khd->hd", scores.softmax(-1), value)
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_attention_and_what_is_put_into_the_cache(shape, device, monkeypatch):
    heads, kv_heads, head_dim, length, filled, padding = shape
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    torch.manual_seed(0)
    batch, dtype = len(filled), torch.float16 if device == "cpu" else torch.bfloat16

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype)

    query, key, value = (
        random(batch, heads, head_dim),
        random(batch, kv_heads, head_dim),
        random(batch, kv_heads, head_dim),
    )
    angles = torch.rand(batch, 1, head_dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (random(batch * length, kv_heads, head_dim) for _ in range(2))
    starts = torch.tensor([number * length + padding[number] for number in range(batch)] + [batch * length]).to(device)
    counts = torch.tensor([min(one, length - pad) for one, pad in zip(filled, padding)]).to(device)
    expected_keys, expected_values = keys.clone(), values.clone()
    places = starts[:-1] + counts - 1
    expected_keys[places], expected_values[places] = rotated(key, cos, sin), value
    elements = decode_scratch(batch, heads, kv_heads, head_dim, length)
    scratch = torch.full((elements + 1,), torch.nan, device=device)
    found = decode_step.attend(
        query, key, value, (cos, sin), keys, values, starts.int(), counts.int(), scratch, head_dim**-0.5, counts.int()
    )
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    expected = exact(rotated(query, cos, sin), keys, values, starts, counts)
    assert (found.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert scratch[-1].isnan()


# Heads, heads of the cache, their size, pages of a sequence, and by sequence its tokens with the new one.
PAGED = [(8, 2, 32, 4, [1, 70, 200]), (28, 4, 128, 3, [64, 65, 192]), (4, 4, 16, 9, [560])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", PAGED)
@torch.inference_mode()
def test_attention_over_pages_and_what_is_put_into_them(shape, device, monkeypatch):
    heads, kv_heads, head_dim, count, filled = shape
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    torch.manual_seed(0)
    batch, dtype = len(filled), torch.float16 if device == "cpu" else torch.bfloat16
    order = 1 + torch.randperm(batch * count).view(batch, count)
    table = torch.zeros(batch, 2 + count, dtype=torch.int32)
    table[:, 2:] = order
    table = table.to(device)
    pages, counts = table[:, 2:], torch.tensor(filled, dtype=torch.int32, device=device)
    made = [torch.randn(batch, one, head_dim).to(dtype).to(device) for one in (heads, kv_heads, kv_heads)]
    query, key, value = made
    keys, values = (torch.randn((1 + batch * count) * PAGE, kv_heads, head_dim).to(dtype).to(device) for _ in range(2))
    angles = torch.rand(batch, 1, head_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
    expected_keys, expected_values = keys.clone(), values.clone()
    last = counts.long() - 1
    places = pages.gather(1, (last // PAGE)[:, None])[:, 0].long() * PAGE + last % PAGE
    expected_keys[places], expected_values[places] = rotated(key, cos, sin), value
    scratch = torch.full((decode_scratch(batch, heads, kv_heads, head_dim, count * PAGE) + 1,), torch.nan).to(device)
    unused = torch.zeros(batch, dtype=torch.int32, device=device)
    found = decode_step.attend(
        query, key, value, (cos, sin), keys, values, unused, counts, scratch, head_dim**-0.5, unused, pages
    )
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    rows = (pages[:, :, None].long() * PAGE + torch.arange(PAGE, device=device)).flatten()
    starts = torch.arange(batch) * count * PAGE
    expected = exact(rotated(query, cos, sin), keys[rows], values[rows], starts, counts)
    assert (found.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert scratch[-1].isnan()
    plain = paged_attention(
        rotated(query, cos, sin).float(), keys.float(), values.float(), pages, counts, head_dim**-0.5
    )
    assert (plain.double() - expected).abs().max() <= 1e-2 * expected.abs().max()


# Heads, heads of the cache, their size, the memory's length, the place of the new token, and by sequence its padding.
QUANTIZED = [(4, 2, 64, 300, 289, [0]), (6, 2, 48, 300, 259, [5, 37]), (4, 4, 16, 100, 35, [3, 1])]
QUANTIZED += [(28, 4, 128, 500, 419, [0])]


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", QUANTIZED)
@torch.inference_mode()
def test_attention_over_a_quantized_cache(shape, device, kv_cache, monkeypatch):
    heads, kv_heads, head_dim, length, slot, padding = shape
    stored, batch = kv_format(kv_cache), len(padding)
    quantized = stored.quantized_tokens(slot + 1)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    counts = torch.tensor([slot + 1 - one for one in padding], device=device)

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype)

    query, key, value = (random(batch, count, head_dim) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(batch, 1, head_dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    memory = quantized_states(key[:, :, None], length, stored, KvArena(1), key.device)
    expected = []
    for states, new in zip(memory, (rotated(key, cos, sin), value), strict=True):
        for tensor in states.tensors():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 255)  # where nothing is stored
        rows = random(batch, kv_heads, slot, head_dim) * 3 + 1
        states.codes.write(rows[:, :, :quantized], 0)
        states.newest[:, :, : slot - quantized] = rows[:, :, quantized:]
        whole = torch.zeros(batch, kv_heads, length, head_dim, dtype=dtype, device=device)
        states.codes.read(quantized, whole[:, :, :quantized])
        whole[:, :, quantized:slot], whole[:, :, slot] = rows[:, :, quantized:], new
        expected.append(whole.transpose(1, 2).flatten(0, 1))
    starts = torch.tensor([number * length + padding[number] for number in range(batch)] + [batch * length]).to(device)
    scratch = torch.full((decode_scratch(batch, heads, kv_heads, head_dim, length) + 1,), torch.nan, device=device)
    before = [tensor.clone() for states in memory for tensor in states.codes.tensors()]
    codes = torch.tensor([quantized], dtype=torch.int32, device=device)
    where = starts.int(), counts.int()
    found = decode_step.attend(query, key, value, (cos, sin), *memory, *where, scratch, head_dim**-0.5, codes)
    by_torch = quantized_attention(
        rotated(query, cos, sin), rotated(key, cos, sin), value, *memory, *where, head_dim**-0.5, codes
    )
    right = exact(rotated(query, cos, sin), *expected, starts, counts)
    for result in (found, by_torch):
        assert (result.double() - right).abs().max() <= torch.finfo(dtype).eps * right.abs().max()
    for states, new in zip(memory, (rotated(key, cos, sin), value), strict=True):
        assert torch.equal(states.newest[:, :, slot - quantized], new)
    after = [tensor for states in memory for tensor in states.codes.tensors()]
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(before, after))
    assert scratch[-1].isnan()


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-4B"])
def test_the_estimate_counts_the_memory_of_the_kernels(name, monkeypatch):
    row = catalog_row(name)
    shape = {**row.shape._asdict(), "max_position_embeddings": row.max_position_embeddings}
    with torch.device("meta"):
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert decode_step.scratch_elements(model, 1, 100) == 0
    fuse_layers(model)
    assert decode_step.scratch_elements(model, 1, 100) == 0  # on the meta device
    monkeypatch.setattr(decode_step, "kernels_on", lambda device: True)
    monkeypatch.setattr(decode_step, "runs", lambda *what: True)
    fused = {"cache": "preallocated", "attention": "fused", "kernels": "fused", "captured": True}
    for batch_size, prompt_len in ((1, 600), (3, 30_000)):
        work = Workload(prompt_len=prompt_len, max_new_tokens=16, batch_size=batch_size)
        elements = decode_step.scratch_elements(model, batch_size, work.context_len)
        with_kernels = step_sizes(row_architecture(row), Profile(**fused), work)
        without = step_sizes(row_architecture(row), Profile(**{**fused, "kernels": "plain"}), work)
        assert sum(with_kernels) - sum(without) == 4 * elements > 0


def test_a_kernel_that_does_not_compile_is_left_out_with_a_warning(monkeypatch, caplog):
    def fails(*tensors):
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(decode_step, "_attend", fails)
    decode_step.runs.cache_clear()
    what = (torch.device("cpu"), torch.float16, decode_step.Heads(4, 2, 64), 4)
    assert [decode_step.runs(*what) for _ in range(2)] == [False, False]
    assert caplog.text.count("Triton cannot compile this library's (out of resource: shared memory)") == 1
    assert not decode_step.runs(*what, "int4")
    assert "Triton cannot compile attention over a KV cache in int4 (out of resource: shared memory)" in caplog.text
    decode_step.runs.cache_clear()

    def full(*tensors):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode_step, "_attend", full)
    with pytest.raises(torch.OutOfMemoryError):
        decode_step.runs(*what)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trial_runs_the_kernels(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    decode_step.runs.cache_clear()
    for kv_cache in ("bf16", "int8", "int4"):
        assert decode_step.runs(torch.device(device), torch.float16, decode_step.Heads(4, 2, 64), 4, kv_cache)


def test_parts_are_a_power_of_two_that_programs_can_share():
    for batch_size, kv_heads, length in ((1, 1, 1), (1, 2, 300), (7, 8, 9_000), (600, 8, 100)):
        splits = decode_splits(batch_size, kv_heads, length)
        assert splits & (splits - 1) == 0
        assert 1 <= splits <= 64
