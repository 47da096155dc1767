"""Formats of weights and caches in vLLM, for those of a plan, with their costs in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qwen_vram.dtypes import BF16, BY_NAME, FP32
from qwen_vram.errors import NotSupportedError, UnknownNameError, WorkloadError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS, FormatName
from qwen_vram.spec.layers import Attention
from qwen_vram.spec.profile import Profile

# Storage format -> value of `--quantization` for a checkpoint that is stored so, as its config.json names the method.
# Source: vLLM 0.33.0, vllm/model_executor/layers/quantization/__init__.py:15, vllm/config/model.py:1383.
STORED = {
    "gptq": "gptq",
    "gptq-int4": "gptq",
    "gptq-int8": "gptq",
    "awq": "awq",
    "fp8-block": "fp8",
    "compressed-tensors": "compressed-tensors",
}
# vLLM's own quantization of a 16-bit checkpoint at load: e4m3 codes and a float32 scale for each row. They are those of
# this library's `fp8`. `--quantization fp8` itself no longer quantizes.
# Source: vLLM 0.33.0, vllm/config/quantization.py:195, vllm/model_executor/layers/quantization/fp8.py:106.
ONLINE = "fp8_per_channel"
_ONLINE_FORMAT: FormatName = "fp8"
# Values of `--quantization` with which products take their input in fp8.
# Source: vLLM 0.33.0, vllm/config/quantization.py:204, and the checkpoints of Qwen in blocks of fp8.
_CODED_INPUTS = (ONLINE, STORED["fp8-block"])
# The format of a 4-bit export that this library writes.
_EXPORT: FormatName = "gptq-int4"


class ServedWeights(NamedTuple):
    """The weights as vLLM has them.

    Attributes:
        matrices, head: Storage formats.
        dtype: The model's own dtype, of norms, biases and the token embeddings.
        quantization: The value of `--quantization`; `None` without one.
        architecture: The model, with the stored bytes of a quantized checkpoint.
        notes: The changes to the plan.
    """

    matrices: FormatName
    head: FormatName
    dtype: FormatName
    quantization: str | None
    architecture: Architecture
    notes: tuple[str, ...]

    @property
    def codes_inputs(self) -> bool:
        """Tell if products take their input in fp8, which is then in memory in one byte too."""
        return self.quantization in _CODED_INPUTS

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the model's own dtype."""
        return FORMATS[self.dtype].bits // 8


class ServedCache(NamedTuple):
    """The KV cache as vLLM has it.

    Attributes:
        dtype: The value of `--kv-cache-dtype`.
        element: Eighths of a byte for each element.
        scale: Bytes of a scale for each token and head, of keys and of values; 0 without one.
        is_quantized: Keys and values are codes.
        notes: The changes to the plan.
    """

    dtype: str
    element: int
    scale: int
    is_quantized: bool = True
    notes: tuple[str, ...] = ()

    def token_bytes(self, attention: Attention, heads: int) -> int:
        """Bytes of a token's keys and values in one layer, for `heads` heads of a worker."""
        return 2 * heads * (attention.head_dim * self.element // 8 + self.scale)


# Source: vLLM 0.33.0, vllm/config/cache.py:44; scales: vllm/v1/attention/backends/triton_attn.py:306.
_QUANTIZED_CACHES = {
    "fp8": ServedCache("fp8", 8, 0),
    "int8_per_token_head": ServedCache("int8_per_token_head", 8, FP32.nbytes),
    "fp8_per_token_head": ServedCache("fp8_per_token_head", 8, FP32.nbytes),
    "int4_per_token_head": ServedCache("int4_per_token_head", 4, FP32.nbytes),
}
CACHE_DTYPES = ("auto", *_QUANTIZED_CACHES)
# Source: vLLM 0.33.0, vllm/v1/attention/backends/cpu_attn.py:50.
_CPU_CACHES = ("auto", "fp8")
# KV format of a plan -> vLLM's.
_CACHES = {"bf16": "auto", "int8": "fp8", "int4": "int4_per_token_head"}


def served_weights(
    architecture: Architecture, profile: Profile, export: Architecture | None, nbytes: Callable[[ServedWeights], int]
) -> ServedWeights:
    """Return the formats of a plan's weights in vLLM.

    Args:
        export: A checkpoint of the same model in a format of vLLM; `None` is the plan's own.
        nbytes: Returns the bytes of weights on one worker.

    Raises:
        NotSupportedError: vLLM does not read the checkpoint's format.
        WorkloadError: the export is of another model.
    """
    if export is not None:
        _check_same(architecture, export)
        return _of_export(architecture, profile, export, nbytes)
    stored = architecture.stored_format
    if stored is not None:
        if stored not in STORED:
            raise NotSupportedError(
                f"vLLM does not read a checkpoint that is stored as {stored!r}; plan with the 16-bit checkpoint it was "
                "made from, or pass a GPTQ, AWQ or compressed-tensors checkpoint of the model as checkpoint=",
                knob="weights",
                value=stored,
            )
        return _as_stored(architecture, ())
    if FORMATS[profile.weights].is_dense:
        plain = ServedWeights(profile.weights, profile.dtype, profile.dtype, None, architecture, ())
        return plain._replace(notes=_head_note(profile, plain, nbytes))
    if profile.weights == _ONLINE_FORMAT:
        same = "weights='fp8' is quantized by vLLM at load, with inputs of products in fp8 too: answers may differ"
        online = _online(architecture, profile, (same,))
        return online._replace(notes=(*online.notes, *_head_note(profile, online, nbytes)))
    online = _online(architecture, profile, ())
    planned = online._replace(matrices=profile.weights, quantization=None)
    lines = [
        f"weights={profile.weights!r} is not in vLLM; {ONLINE} takes its place: {nbytes(online):,} bytes of weights on "
        f"a worker, {nbytes(planned):,} in {profile.weights}"
    ]
    storage = FORMATS[profile.weights]
    if (storage.is_bnb_4bit or storage.is_tinygemm) and _can_export(architecture):
        four = online._replace(matrices=_EXPORT, quantization=STORED[_EXPORT])
        lines.append(
            f"a GPTQ export has 4 bits in vLLM too: {nbytes(four):,} bytes of weights on a worker; make one with "
            "qwen-vram quantize MODEL OUT --weights gptq-int4 --calibration TEXTS, and pass it as checkpoint="
        )
    return online._replace(notes=(*lines, *_head_note(profile, online, nbytes)))


def served_cache(architecture: Architecture, profile: Profile, dtype: str | None, *, on_cpu: bool) -> ServedCache:
    """Return the format of a plan's KV cache in vLLM, or the one called `dtype`.

    Raises:
        UnknownNameError: vLLM has no such format.
        NotSupportedError: vLLM does not have it on a CPU.
    """
    name = _CACHES[profile.kv_cache] if dtype is None else dtype
    if name not in CACHE_DTYPES:
        raise UnknownNameError("kv_cache_dtype", name, CACHE_DTYPES)
    if on_cpu and name not in _CPU_CACHES:
        raise NotSupportedError(
            f"kv_cache={profile.kv_cache!r} is {name!r} in vLLM, which has no kernel for it on a CPU; plan with "
            f"kv_cache='bf16', or pass kv_cache_dtype= one of {', '.join(_CPU_CACHES)}",
            knob="kv_cache",
            value=profile.kv_cache,
        )
    plain = ServedCache("auto", 8 * profile.element_bytes, 0, is_quantized=False)
    cache = _QUANTIZED_CACHES.get(name, plain)
    if not profile.kv_format.is_quantized and not cache.is_quantized:
        return cache
    layer = max((layer for layer, _ in architecture.kinds), key=lambda layer: layer.attention.key_value_width)
    heads = layer.attention.key_value_heads
    each, whole = cache.token_bytes(layer.attention, heads), plain.token_bytes(layer.attention, heads)
    notes = [
        f"kv_cache={profile.kv_cache!r} is {name!r} in vLLM: {each:,} bytes for a token and layer, "
        f"{whole:,} unquantized"
    ]
    if profile.kv_format.is_quantized and cache.is_quantized:
        notes.append(
            f"the plan keeps the newest {profile.kv_format.residual} tokens whole, and vLLM quantizes every token"
        )
    if cache.is_quantized and not cache.scale:
        own = "vLLM scales fp8 keys and values by 1.0 unless the checkpoint has scales"
        other = "" if on_cpu else "; kv_cache_dtype='int8_per_token_head' has a scale for each token and head"
        notes.append(own + other)
    if cache.is_quantized and on_cpu:
        notes.append("vLLM has fp8 caches on CPUs with AVX-512 or AMX only, and ends at its start on others")
    return cache._replace(notes=tuple(notes))


def vllm_dtype(profile: Profile, *, old_gpu: bool) -> str:
    """Return the value of `--dtype`; an old GPU has no bf16, and the plan's fp16 takes its place."""
    return "float16" if old_gpu and profile.dtype == BF16.name else BY_NAME[profile.dtype].torch


def _online(architecture: Architecture, profile: Profile, notes: tuple[str, ...]) -> ServedWeights:
    return ServedWeights(_ONLINE_FORMAT, profile.dtype, profile.dtype, ONLINE, architecture, notes)


def _as_stored(architecture: Architecture, notes: tuple[str, ...]) -> ServedWeights:
    stored = architecture.stored_format
    assert stored is not None
    name: FormatName = stored  # type: ignore[assignment]
    head: FormatName = name if architecture.stored_head else "bf16"
    return ServedWeights(name, head, "bf16", STORED[stored], architecture, notes)


def _of_export(
    architecture: Architecture, profile: Profile, export: Architecture, nbytes: Callable[[ServedWeights], int]
) -> ServedWeights:
    if export.stored_format is None:
        plain = ServedWeights(profile.dtype, profile.dtype, profile.dtype, None, export, ())
        return plain._replace(notes=(f"checkpoint= is in 16 bits: {nbytes(plain):,} bytes of weights on a worker",))
    if export.stored_format not in STORED:
        raise NotSupportedError(
            f"vLLM does not read checkpoint=, which is stored as {export.stored_format!r}; pass one that is stored as "
            f"{', '.join(sorted(set(STORED.values())))}",
            knob="weights",
            value=export.stored_format,
        )
    served = _as_stored(export, ())
    planned = served._replace(matrices=profile.weights, head=profile.head_format, architecture=architecture)
    return served._replace(
        notes=(
            f"checkpoint= is stored as {export.stored_format!r}: {nbytes(served):,} bytes of weights on a worker, "
            f"{nbytes(planned):,} as planned in {profile.weights}",
        )
    )


def _head_note(profile: Profile, served: ServedWeights, nbytes: Callable[[ServedWeights], int]) -> tuple[str, ...]:
    if profile.lm_head in (None, served.head):
        return ()
    planned = served._replace(head=profile.head_format)
    return (
        f"lm_head={profile.lm_head!r} is not in vLLM; the head stays in {served.head}: {nbytes(served):,} bytes of "
        f"weights on a worker, {nbytes(planned):,} with it",
    )


def _can_export(architecture: Architecture) -> bool:
    """Tell if groups of the 4-bit export divide every matrix."""
    group = FORMATS[_EXPORT].group_size
    return all(one.shape[1] % group == 0 for layer, _ in architecture.kinds for one in layer.linears.values())


def _check_same(architecture: Architecture, export: Architecture) -> None:
    """Refuse an export of another model."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(architecture, name), getattr(export, name)
        if ours != theirs:
            raise WorkloadError(
                f"checkpoint= is of another model: its {name} is {theirs!r}, and the plan's is {ours!r}; pass a "
                "checkpoint of the same model",
                name="checkpoint",
                got=theirs,
            )
