"""A LoRA adapter beside its base, run by PEFT in the model's own dtype."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import WEIGHTS
from qwen_vram.checkpoints.adapters.keys import KEY_MAPPING, Adapter
from qwen_vram.checkpoints.adapters.scaling import alpha_of
from qwen_vram.checkpoints.adapters.tables import EMBEDDING
from qwen_vram.checkpoints.adapters.tokenizer import TokenizerFiles, tokenizer_files, with_end_tokens
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.checkpoints.files.sidecars import copy_files
from qwen_vram.errors import BackendUnavailableError, CheckpointError
from qwen_vram.runtime.backends.gptq_library import import_quietly
from qwen_vram.runtime.tensors.checkpoint import open_tokenizer

_LOGGER = logging.getLogger(__name__)

# Elements of the adapter's file that are checked at a time: 64 MiB in float32.
_PIECE = 2**24

_INSTALL = 'pip install "qwen-vram[lora]"'


def check_peft() -> None:
    """Refuse an adapter if PEFT is missing.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    if find_spec("peft") is None:
        raise BackendUnavailableError(
            f"adapter=... needs peft, which is not installed; run: {_INSTALL}", backend="peft", install=_INSTALL
        )


def check_values(adapter: Adapter, dtype: torch.dtype) -> None:
    """Refuse values that are not finite, or that the model's dtype cannot hold.

    Raises:
        AdapterError: there is such a value; the error names its tensor.
    """
    from safetensors import safe_open

    with safe_open(adapter.folder / WEIGHTS, "pt") as file:
        for key, stored in adapter.tensors.items():
            rows = max(_PIECE * stored.shape[0] // math.prod(stored.shape), 1)
            for start in range(0, stored.shape[0], rows):
                piece = file.get_slice(key)[start : start + rows]
                if not torch.isfinite(piece.to(dtype).float()).all():
                    raise _not_held(adapter, key, piece.double(), dtype)


def _not_held(adapter: Adapter, key: str, values: torch.Tensor, dtype: torch.dtype) -> AdapterError:
    if not torch.isfinite(values).all():
        return adapter.error(f"holds a NaN or an infinity in {key}; its training diverged, so train it again")
    name = str(dtype).removeprefix("torch.")
    return adapter.error(
        f"holds {float(values.abs().max()):g} in {key}, beyond the largest number of {name} "
        f"({torch.finfo(dtype).max:g}), in which the model runs; use weights='bf16', or weights='fp32' on a GPU "
        "without bf16"
    )


def open_adapters_tokenizer(base: Path, adapters: Sequence[Path], *, rows: int) -> tuple[TokenizerFiles, Any | None]:
    """Choose the tokenizer for `base` with `adapters`, and open it if it is that of an adapter.

    An adapter's tokenizer that cannot be read is left out, with a warning in the log.

    Args:
        rows: Rows of the token embeddings.
    """
    chosen = tokenizer_files(base, adapters, rows=rows)
    if chosen.source == base:
        return chosen, None
    with TemporaryDirectory(prefix="qwen_vram_") as folder:
        copy_files({**chosen.files, CONFIG: base / CONFIG}, Path(folder))
        try:
            tokenizer = open_tokenizer(Path(folder))
        except CheckpointError as error:
            _LOGGER.warning("the tokenizer in %r is left out, and the base's taken: %s", str(chosen.source), error)
            return tokenizer_files(base, (), rows=rows), None
    tokenizer.name_or_path = str(chosen.source)
    return chosen, tokenizer


def end_at(model: nn.Module, end_token_ids: tuple[int, ...]) -> None:
    """Add tokens to those that end the model's generations."""
    settings: Any = model.generation_config
    if end_token_ids:
        settings.eos_token_id = with_end_tokens(settings.eos_token_id, end_token_ids)


def add_adapter(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> nn.Module:
    """Return a `PeftModel` of `model` and `adapter`.

    PEFT keeps adapters in float32 by default, and casts every input. Here adapters have the model's dtype, as the
    estimator counts them. Every factor is in the file, so no factor is initialized, unless that changes the base.
    """
    from peft import PeftModel

    if find_spec("gptqmodel") is not None:
        import_quietly()  # otherwise PEFT would import it, for any adapter

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # of the embeddings; the others were checked
        adapted: nn.Module = PeftModel.from_pretrained(
            model, adapter.folder, config=_config(adapter), autocast_adapter_dtype=False, key_mapping=KEY_MAPPING
        )
    _fill_table(adapted, adapter)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _fill_table(adapted: nn.Module, adapter: Adapter) -> None:
    """Give the token embeddings their factors if their weight is named as a parameter.

    PEFT saves factors of a matrix, but an embedding looks up the columns of its first factor.
    """
    from safetensors import safe_open

    tensors = adapter.modules.get(EMBEDDING)
    if tensors is None or tensors.a is None or tensors.b is None:
        return
    table: Any = adapted.get_submodule(f"base_model.model.{EMBEDDING}")
    with safe_open(adapter.file, "pt") as file:
        for factors, stored in ((table.lora_embedding_A, tensors.b), (table.lora_embedding_B, tensors.a)):
            factors["default"].data.copy_(file.get_tensor(stored.name).T)


def _config(adapter: Adapter) -> Any:
    """Return the adapter's `LoraConfig`, with PEFT's own layers for variants that are plain LoRA outside training."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = True
    config.velora_config = config.monteclora_config = None  # PEFT would keep their buffers, which nothing reads
    config.use_qalora = False  # the check before ensures factors of whole inputs
    config.layer_replication = None  # checked; the layers exist, and PEFT would copy them
    settings = adapter.settings
    if not settings.mutates_base:
        config.init_lora_weights = True
    if settings.targets.modules is None or settings.targets.weights:
        # PEFT would replace missing targets by a default, and compute a whole matrix in every step for a weight that is
        # named as a parameter. It does not change the head that is tied to such a weight, unlike that of a module.
        factors = {module: tensors.factors for module, tensors in adapter.modules.items() if tensors.factors}
        config.target_modules, config.target_parameters = set(factors), None
        if settings.targets.name_weight(EMBEDDING):
            config.ensure_weight_tying = False
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {module: parts[0].shape[0] for module, parts in factors.items()}
        config.alpha_pattern = {module: alpha_of(settings, module) for module in factors}
    return config
