"""Engines that a fleet can run: their formats, limits and kernels."""

from __future__ import annotations

from typing import Literal, NamedTuple

from qwen_vram.checkpoints.resolve import stored_knobs
from qwen_vram.errors import ConfigError, NotSupportedError, UnknownNameError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.cards.rows import Gpu
from qwen_vram.spec.formats import FORMATS, FormatName
from qwen_vram.spec.profile import Profile

EngineName = Literal["vllm", "transformers"]
_AMPERE = (8, 0)


class Engine(NamedTuple):
    """An engine with continuous batching.

    Attributes:
        name: The name that callers use.
        formats: Formats of a 16-bit checkpoint's weights that it makes while it loads, least lossy first.
        exports: Formats that it runs if the checkpoint is exported to them first.
        stored: Formats of published checkpoints that it runs as they are stored.
        block_tokens: Tokens of a block of its KV cache.
        spare_blocks: Blocks that the engine keeps for itself.
        utilization: The share of a card's memory that it takes.
        sequences: The most sequences at once, if the cache holds them.
        step_tokens: The most tokens of a step.
        divides: It divides a layer over several GPUs.
        fused: Its kernels read quantized weights inside of products of any number of rows.
        knobs: The knobs of the profile with the nearest kernels and cache.
    """

    name: EngineName
    formats: tuple[FormatName, ...]
    exports: tuple[FormatName, ...]
    stored: tuple[FormatName, ...]
    block_tokens: int
    spare_blocks: int
    utilization: float
    sequences: int
    step_tokens: int
    divides: bool
    fused: bool
    knobs: dict[str, object]


# vLLM 0.33.0. Formats: vllm/config/quantization.py (fp8_per_channel), and the list of its quantization methods. Blocks
# of 16 tokens: vllm/config/cache.py. A share of 0.92, 256 sequences and 2,048 tokens: vllm/engine/arg_utils.py, for
# GPUs below 70 GiB, and used here for all. Its steps are compiled and captured. One block stays empty.
_VLLM = Engine(
    name="vllm",
    formats=("bf16", "fp16", "fp8"),
    exports=("gptq-int8", "gptq-int4"),
    stored=("gptq", "awq", "fp8-block", "compressed-tensors"),
    block_tokens=16,
    spare_blocks=1,
    utilization=0.92,
    sequences=256,
    step_tokens=2048,
    divides=True,
    fused=True,
    knobs={"attention": "fused", "kernels": "fused", "cache": "preallocated", "compiled": True},
)
# transformers 5.24. `--quantization`: cli/serve.py. Pages of 256 tokens, a share of 0.9, 1,024 sequences and two spare
# pages: generation/configuration_utils.py and generation/continuous_batching/cache.py. Its 8,192 tokens of a step are
# 2,048 here, because its count of the memory of a step leaves out the MLP. Python launches the kernels of its steps.
_TRANSFORMERS = Engine(
    name="transformers",
    formats=("bf16", "fp16", "int8", "nf4"),
    exports=(),
    stored=("gptq", "awq"),
    block_tokens=256,
    spare_blocks=2,
    utilization=0.9,
    sequences=1024,
    step_tokens=2048,
    divides=False,
    fused=False,
    knobs={"attention": "fused", "kernels": "plain", "cache": "preallocated"},
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (_VLLM, _TRANSFORMERS)}


def engine_called(name: str) -> Engine:
    """Return the engine called `name`.

    Raises:
        UnknownNameError: no engine has this name.
    """
    if name not in ENGINES:
        raise UnknownNameError("engine", name, tuple(ENGINES))
    return ENGINES[name]


def formats_of(engine: Engine, architecture: Architecture, wanted: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the formats to compare: those that the caller names, or the model's own and the lossy ones of the engine.

    A checkpoint that is quantized already has one format only.

    Raises:
        UnknownNameError: a format that the engine does not run.
        ConfigError: another format than that of a quantized checkpoint.
        NotSupportedError: a quantized checkpoint that the engine does not run.
    """
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    if architecture.stored_format is not None:
        if architecture.stored_format not in engine.stored:
            raise NotSupportedError(
                f"engine {engine.name!r} does not run checkpoints in {architecture.stored_format!r}, got one; use the "
                f"16-bit checkpoint, or one in {', '.join(engine.stored)}",
                knob="weights",
                value=architecture.stored_format,
            )
        for name in names:
            if name != architecture.stored_format:
                raise ConfigError(
                    f"the checkpoint is stored with weights={architecture.stored_format!r}, got weights={name!r}; "
                    "leave weights out, or use the 16-bit checkpoint"
                )
        return (architecture.stored_format,)
    allowed = (*engine.formats, *engine.exports)
    for name in names:
        if name not in allowed:
            raise UnknownNameError(f"weights for engine {engine.name!r}", name, allowed)
    return names or engine.formats


def runs_on(engine: Engine, weights: str, gpu: Gpu, architecture: Architecture) -> bool:
    """Tell if a card is to be compared with a format of weights.

    In 16 bits it is the checkpoint's own dtype; a card without bf16 takes fp16 for it. Quantized kernels of vLLM need
    Ampere or newer. Its fp8 at load needs products in fp8.
    """
    storage = FORMATS[weights]
    if storage.is_16_bit:
        own = architecture.dtype if FORMATS[architecture.dtype].is_16_bit else "bf16"
        on_the_card = own if gpu.has_bf16 else "fp16"
        return weights == on_the_card
    if storage.is_dense or not engine.fused:
        return True
    if storage.multiplies_fp8 and architecture.stored_format is None:
        # Source: vLLM 0.32.0, model_executor/layers/quantization/online/fp8.py:431 ("Requires SM89+").
        return gpu.fp8_flops > 0
    return gpu.capability >= _AMPERE


def profile_of(engine: Engine, weights: str, architecture: Architecture, step_tokens: int) -> Profile:
    """Return the profile that counts and times `weights` in an engine."""
    knobs = stored_knobs(architecture, {"weights": weights, **engine.knobs})
    return Profile(prefill_chunk_size=step_tokens, **knobs)  # type: ignore[arg-type]
