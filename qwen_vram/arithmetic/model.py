"""What a caller may call a model, brought to one `Architecture`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from qwen_vram.arithmetic.adapter import with_adapter
from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.catalog import catalog_row, row_architecture, unknown_model
from qwen_vram.arithmetic.stored_checkpoint import checkpoint_architecture, needs_headers
from qwen_vram.errors import ConfigError, UnknownNameError
from qwen_vram.files.hub import hub_config, hub_tensors
from qwen_vram.files.local import exists, has_weights, is_folder, read_config, read_tensors

ModelLike = str | Path | Mapping[str, object] | Architecture

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOGGER = logging.getLogger(__name__)

# Libraries of GPTQ by the names that people ask for; the first reads and writes what the others did.
_GPTQ_LIBRARIES = ("gptqmodel", "auto-gptq", "autogptq")


def resolve_model(model: ModelLike, adapter: str | Path | None = None) -> tuple[str, Architecture]:
    """A label for `model` and its architecture, with an adapter's tensors where one is given.

    Raises:
        UnknownNameError, ConfigError, HubError: as `_resolve`.
        CheckpointError, NotSupportedError: headers or an adapter that cannot be used.
    """
    label, architecture = _resolve(model)
    return label, architecture if adapter is None else with_adapter(architecture, adapter)


def stored_knobs(architecture: Architecture, knobs: Mapping[str, object]) -> dict[str, object]:
    """`knobs`, with those set that a checkpoint which is quantized already leaves no choice about.

    Raises:
        ConfigError: the caller asks for another format than it is stored in.
    """
    stored = architecture.stored_format
    knobs = _named(knobs, stored)
    if stored is None:
        return knobs
    fixed = {"weights": stored, "lm_head": stored if architecture.stored_head else None}
    for knob, value in fixed.items():
        if knob in knobs and knobs[knob] != value:
            raise ConfigError(
                f"the checkpoint is stored with {knob}={value!r}, got {knob}={knobs[knob]!r}; leave {knob} out, or use "
                "the 16-bit checkpoint"
            )
    return {**knobs, **fixed}


def _named(knobs: Mapping[str, object], stored: str | None) -> dict[str, object]:
    """`knobs` without `backend`, which only GPTQ's libraries are asked for by, and `weights` as a format.

    Raises:
        UnknownNameError: another backend.
    """
    named = dict(knobs)
    backend = named.pop("backend", None)
    if backend not in (None, "gptq", *_GPTQ_LIBRARIES):
        hint = "others follow from the format: weights='nf4' is bitsandbytes'"
        raise UnknownNameError("backend", backend, ("gptq", *_GPTQ_LIBRARIES), hint=hint)
    if backend in _GPTQ_LIBRARIES[1:] or named.get("weights") in _GPTQ_LIBRARIES[1:]:
        _LOGGER.warning(
            "auto-gptq does not import under transformers 5; GPTQModel reads its checkpoints and makes new ones (pip "
            'install "qwen-vram[gptq]"), and is taken in its place'
        )
    if named.get("weights") in _GPTQ_LIBRARIES or (backend is not None and "weights" not in named):
        named["weights"] = stored if stored in ("gptq", "awq") else "gptq-int4"
    return named


def _resolve(model: ModelLike) -> tuple[str, Architecture]:
    """A label for `model` and its architecture.

    Args:
        model: An `Architecture`, a config `dict`, a checkpoint folder, a catalog name with or without its
            organisation, or a hub id, of which config.json is fetched, and where it is quantized the headers of its
            safetensors. A folder wins over a name.

    Raises:
        UnknownNameError: a name that is none of these.
        ConfigError: a config that is missing, broken or of another architecture.
        CheckpointError: the headers of a quantized checkpoint are missing, broken or of another model.
        HubError: the hub does not give the config.json or the headers.
    """
    if isinstance(model, Architecture):
        return f"{model.model_type}, {model.num_parameters:,} parameters", model
    if isinstance(model, Mapping):
        architecture = Architecture.from_config(model)
        return str(model.get("_name_or_path") or _resolve(architecture)[0]), architecture
    if not isinstance(model, (str, Path)):
        raise ConfigError(f"a model is a name, a folder, a config dict or an Architecture, got {type(model).__name__}")
    folder = Path(model)
    if is_folder(folder):
        source = str(folder / "config.json")
        config = read_config(folder)
        read = (lambda: read_tensors(folder)) if has_weights(folder) or needs_headers(config) else None
        return folder.name, checkpoint_architecture(config, read, source=source, headers_here=True)
    name = str(model)
    row = catalog_row(name)
    if row is not None:
        return row.repo_id, row_architecture(row)
    if len(folder.parts) > 2 or name.startswith((".", "/", "~")) or exists(folder):
        raise ConfigError(f"no checkpoint folder {name!r}; point to the folder that holds config.json", source=name)
    if not _HUB_ID.fullmatch(name):
        raise unknown_model(name)
    return name, checkpoint_architecture(hub_config(name), lambda: hub_tensors(name), source=f"{name}/config.json")
