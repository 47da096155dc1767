"""The architecture of a checkpoint, from config.json and the headers if needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qwen_vram.checkpoints.files.safetensors_header import Tensor
from qwen_vram.checkpoints.tensors.quantized_names import quantizer_of
from qwen_vram.errors import CheckpointError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.quantization import quantization_of, stored_format, without_quantization


def checkpoint_architecture(
    config: Mapping[str, object],
    read: Callable[[], Mapping[str, Tensor]] | None,
    *,
    source: str,
    headers_here: bool = False,
) -> Architecture:
    """Return the architecture that `config` describes, with the bytes of its tensors if only the headers show them.

    Args:
        read: Returns the tensors of the checkpoint's headers; `None` if only `config` is counted. It is called for
            quantized checkpoints, and for others only if `headers_here`: an estimate does not fetch them from the hub.
        source: The origin of `config`.
        headers_here: The headers are cheap to read, as in a folder.

    Raises:
        ConfigError: as `Architecture.from_config`, and a quantization that this library does not load.
        CheckpointError: the headers do not match `config`. Errors of `read` are passed on.
    """
    quantization = quantization_of(config)
    if read is None or (quantization is None and not headers_here):
        return Architecture.from_config(config, source=source)
    architecture = Architecture.from_config(without_quantization(config), source=source)
    if quantization is not None:
        from qwen_vram.checkpoints.tensors.prequantized import stored_architecture

        return stored_architecture(architecture, quantization, read, source)
    tensors = read()
    found = quantizer_of(tensors, architecture)
    if found:
        from qwen_vram.checkpoints.tensors.prequantized_advice import no_block

        raise CheckpointError(no_block(found, architecture, tensors, source), path=source)
    return architecture


def needs_headers(config: Mapping[str, object]) -> bool:
    """Tell if only the safetensors headers show the bytes of the quantized checkpoint that `config` describes."""
    quantization = quantization_of(config)
    return quantization is not None and stored_format(quantization)[1]
