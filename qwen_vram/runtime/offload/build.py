"""Building of streamed layers, quantized one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from qwen_vram.runtime.backends.base import HostBackend, Request, StreamingBackend
from qwen_vram.runtime.offload.blocks import Block, DiskBlock, HostBlock
from qwen_vram.runtime.tensors.mapped_checkpoint import MappedCheckpoint
from qwen_vram.runtime.tensors.packed_layout import HostMemory
from qwen_vram.spec.residency import Residency


def pack_layers(
    model: Any,
    homes: Residency,
    backend: StreamingBackend,
    request: Request,
    memory: HostMemory,
    progress: Callable[..., Iterable[int]],
) -> list[Block]:
    """Build the streamed decoder layers, which are on the meta device, and put each in its location by `homes`.

    A quantized head on the meta device is built first, and stays on the device. The device holds one additional matrix
    and a tile at a time, and nothing additional if matrices are stored quantized. The host holds one layer in the
    request's format beside the blocks. Almost nothing of disk layers is read.

    Args:
        progress: Wraps the numbers in a progress bar, as `tqdm` does.
    """
    model.requires_grad_(False)
    model.generation_config.disable_compile = True  # a compiled step would keep the first addresses of all weights
    blocks: list[Block] = []
    with ExitStack() as files:
        mapped = MappedCheckpoint(request.files, files, mapped=not request.disable_mmap)
        if request.late_head:
            _build(model, "lm_head", "model.embed_tokens" if _untie(model) else "lm_head", mapped, backend, request)
        for number in progress(sorted(homes.streamed), desc="Packing streamed layers"):
            layer = model.model.layers[number]
            modules = []
            for name, module in list(layer.named_modules()):
                if next(module.parameters(recurse=False), None) is not None:
                    made = _build(layer, name, f"model.layers.{number}.{name}", mapped, backend, request)
                    backend.binding(made, {key: one.to("cpu") for key, one in backend.tensors(made).items()})()
                    modules.append(made)
            if number in homes.disk:
                nth = sum(isinstance(block, DiskBlock) for block in blocks)
                blocks.append(DiskBlock(layer, modules, backend, mapped, nth))
            else:
                block = HostBlock(layer, modules, backend, memory)
                if number in homes.computing:
                    assert isinstance(backend, HostBackend)
                    block.compute_on(backend)
                blocks.append(block)
            mapped.forget()
    return blocks


def _untie(model: Any) -> bool:
    """Tell if the head was tied to the embeddings, and untie it."""
    tied: bool = model.config.tie_word_embeddings
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return tied


def _build(
    parent: nn.Module,
    name: str,
    full_name: str,
    mapped: MappedCheckpoint,
    backend: StreamingBackend,
    request: Request,
) -> nn.Module:
    """Put the module called `name` into `parent` with its weights; tensors that are quantized now are on the device."""
    module = parent.get_submodule(name)
    weights = mapped.tensors(full_name)
    if not request.stored:
        weights = {parameter: weights[parameter] for parameter, _ in module.named_parameters(recurse=False)}
    made = backend.build(module, weights, request)
    parent.set_submodule(name, made)
    return made
