"""Backends by storage format, imported when a format is first used.

Modules:
    base          The interface of quantization backends, and their common loading.
    bnb           nf4, fp4 and int8 by bitsandbytes, quantized tensor by tensor while they load.
    bnb_cpu       Recovery of 4-bit weights that bitsandbytes has repacked on the CPU.
    bnb_notes     Check of the metadata that bitsandbytes wrote into a checkpoint.
    bnb_rows      Quantization by bitsandbytes of some rows at a time, with a tile's memory.
    bnb_state     The quantization state that bitsandbytes keeps beside the codes of a matrix.
    bnb_stored    Modules of a checkpoint that bitsandbytes quantized, filled on the host.
    dense         bf16, fp16 and fp32: unquantized weights.
    gptq          Checkpoints of GPTQ and AWQ by GPTQModel, loaded as they are stored.
    gptq_library  Import of GPTQModel without its changes to the process.
    torch_ops     int4, int8-wo and fp8 by torch's own operators, quantized while they load.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from qwen_vram.errors import BackendUnavailableError, UnknownNameError
from qwen_vram.runtime.backends.base import Backend
from qwen_vram.spec.formats import FORMAT_NAMES, FORMATS, KernelName
from qwen_vram.spec.quantization import METHODS
from qwen_vram.spec.quantizers import QUANTIZERS

_DENSE = "qwen_vram.runtime.backends.dense:DenseBackend"
_BNB = "qwen_vram.runtime.backends.bnb:BnbBackend"
_TORCH = "qwen_vram.runtime.backends.torch_ops:TorchBackend"
_GPTQ = "qwen_vram.runtime.backends.gptq:GptqBackend"

# What multiplies by a format -> "module:class"; for what is plugged in, another package says it.
_BY_KERNEL: dict[KernelName, str] = {
    "dense": _DENSE,
    "bnb-4bit": _BNB,
    "bnb-int8": _BNB,
    "tinygemm": _TORCH,
    "dequantized": _TORCH,
    "gptqmodel": _GPTQ,
}
# Storage format -> "module:class".
TARGETS: dict[str, str] = {name: _BY_KERNEL[row.kernel] for name, row in FORMATS.items() if not row.is_plugged}

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
    runs = next(QUANTIZERS[method].runs for method, name in METHODS.items() if name == storage_format)
    raise BackendUnavailableError(
        f"no backend loads {storage_format!r}: its bytes are counted by estimate_vram() only; run the checkpoint with "
        f"{runs}, or load the 16-bit checkpoint that it was made of, with weights='fp8', 'int8' or 'nf4'",
        backend=storage_format,
    )
