"""Backends by storage format, imported when a format is first used."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from qwen_vram.errors import BackendUnavailableError, UnknownNameError
from qwen_vram.runtime.backends.base import Backend
from qwen_vram.spec.formats import FORMAT_NAMES
from qwen_vram.spec.quantizers import QUANTIZERS

_DENSE = "qwen_vram.runtime.backends.dense:DenseBackend"
_BNB = "qwen_vram.runtime.backends.bnb:BnbBackend"
_TORCH = "qwen_vram.runtime.backends.torch_ops:TorchBackend"
_GPTQ = "qwen_vram.runtime.backends.gptq:GptqBackend"

# Storage format -> "module:class".
TARGETS: dict[str, str] = {
    **dict.fromkeys(("fp32", "bf16", "fp16"), _DENSE),
    **dict.fromkeys(("int8", "nf4", "nf4-plain", "fp4", "fp4-plain"), _BNB),
    **dict.fromkeys(("int4", "int8-wo", "fp8"), _TORCH),
    **dict.fromkeys(("gptq-int4", "gptq-int8", "gptq", "awq"), _GPTQ),
}

ENTRY_POINTS = "qwen_vram.backends"


def get_backend(storage_format: str) -> Backend:
    """Return the backend that loads `storage_format`: the library's own, or one that another package registers.

    Raises:
        UnknownNameError: the storage format is not known.
        BackendUnavailableError: the format is known, but no backend here loads it.
    """
    if storage_format not in FORMAT_NAMES:
        raise UnknownNameError("storage format", storage_format, FORMAT_NAMES)
    if storage_format in TARGETS:
        module, _, name = TARGETS[storage_format].partition(":")
        backend: Backend = getattr(import_module(module), name)()
        return backend
    for entry in entry_points(group=ENTRY_POINTS, name=storage_format):
        plugged: Backend = entry.load()()
        return plugged
    runs = QUANTIZERS["fp8" if storage_format == "fp8-block" else storage_format].runs
    raise BackendUnavailableError(
        f"no backend loads {storage_format!r}: its bytes are counted by estimate_vram() only; run the checkpoint with "
        f"{runs}, or load the 16-bit checkpoint that it was made of, with weights='fp8', 'int8' or 'nf4'",
        backend=storage_format,
    )
