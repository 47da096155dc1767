"""Detection of logits that are not finite, and search for the module that made them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from qwen_vram.errors import NotFiniteError
from qwen_vram.runtime.torch_dtypes import ROWS

# Number of tokens between two reads of the flag on a GPU, which do not wait for the GPU.
_EVERY = 16
# The most tokens of the context that are processed again to find the module.
_TRACED = 1024
_LARGEST_FP16 = torch.finfo(torch.float16).max


class NotFinite(Exception):
    """Internal signal that ends a generation with logits that are not finite; see `explained`."""


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Detector of NaN, +infinity, and rows without a finite logit, before `generate` samples.

    -infinity in single logits is ignored, because `transformers` forbids tokens with it. On the CPU the generation ends
    immediately. On a GPU a flag stays on the device. The host reads copies of it that have already arrived, so no step
    waits. `check()` reads the flag at the end.
    """

    def __init__(self) -> None:
        self.context: Tensor | None = None
        self._found: Tensor | None = None
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, vocab_size), with zeros in rows that are not finite, so that sampling is safe.

        Raises:
            NotFinite: a row is not finite, in these scores or, on a GPU, in earlier ones.
        """
        highest = scores.amax(dim=-1, keepdim=True)
        wrong = (highest - highest) != 0  # the difference is NaN for NaN and infinities
        found = wrong.any()
        self._found = found if self._found is None else self._found.logical_or_(found)
        self.context = input_ids
        if scores.device.type != "cuda":
            self.check()
            return scores
        self._look()
        return scores.masked_fill_(wrong, 0.0)

    def check(self) -> None:
        """Read the flag, and wait for the GPU.

        Raises:
            NotFinite: logits of this generation were not finite.
        """
        if self._found is not None and bool(self._found):
            raise NotFinite

    def _look(self) -> None:
        """Read the newest copy of the flag if it has arrived, and start another copy."""
        self._steps += 1
        if self._steps % _EVERY != 1:
            return
        if self._copy is None:
            self._copy = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            flag, arrived = self._copy
            if not arrived.query():  # type: ignore[no-untyped-call]
                return
            if bool(flag):
                raise NotFinite
        flag, arrived = self._copy
        assert self._found is not None
        flag.copy_(self._found, non_blocking=True)
        arrived.record()


def explained(model: Any, context: Tensor | None) -> NotFiniteError:
    """Return the error for a model whose logits after `context`, (batch, tokens), are not finite.

    It runs the first tokens of the context again, to find the first module whose output is not finite.
    """
    dtype = ROWS[model.dtype].name or ROWS[model.dtype].torch
    module, stored = ("", False) if context is None else _traced(model, context[:, :_TRACED])
    where = f"; the first output that is not finite is that of {module!r}" if module else ""
    if stored:
        cure = "its stored values are not finite themselves: use another copy of the checkpoint, or of the adapter"
    elif model.dtype is torch.float16:
        cure = f"values beyond {_LARGEST_FP16:,.0f} do not fit fp16: load with weights='bf16', or weights='fp32'"
    else:
        cure = "load with weights='fp32' to see if the dtype or the format of the weights is the cause"
    return NotFiniteError(
        f"the model computes logits that are not finite (NaN or infinity) in {dtype}{where}; {cure}",
        dtype=dtype,
        module=module,
    )


def _traced(model: Any, context: Tensor) -> tuple[str, bool]:
    """Return the first module whose output is not finite, or `""`, and if its weights are not finite themselves.

    Infinities in fp16 are values of the file beyond its range, and do not count as weights that are not finite.
    """
    found: list[tuple[str, nn.Module]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(one, Tensor) and not _is_finite(one) for one in tensors):
                found.append((name, module))

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=context, use_cache=False, logits_to_keep=1)
    except torch.OutOfMemoryError:  # the module stays unknown, but the error is certain
        return "", False
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return "", False
    name, module = found[0]
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta]
    if model.dtype is torch.float16:
        return name, any(bool(tensor.isnan().any()) for tensor in held)
    return name, any(not _is_finite(tensor) for tensor in held)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
