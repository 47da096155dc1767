"""Resolution of a caller's model (name, folder or config) to an `Architecture`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from qwen_vram.checkpoints.files.local import exists
from qwen_vram.checkpoints.files.names import ADAPTER_CONFIG, CONFIG
from qwen_vram.checkpoints.files.place import Place, is_hub_id, place_of
from qwen_vram.errors import ConfigError, UnknownNameError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.quantization import GPTQ

if TYPE_CHECKING:
    from qwen_vram.checkpoints.adapters.folder import AdapterChoice
    from qwen_vram.checkpoints.adapters.keys import Adapter
    from qwen_vram.checkpoints.checkpoint import CheckpointFiles
    from qwen_vram.checkpoints.files.safetensors_header import Tensor

ModelLike = str | Path | Mapping[str, object] | Architecture

# Names of GPTQ's libraries that users ask for; the first reads and writes the format of the others.
_GPTQ_LIBRARIES = ("gptqmodel", "auto-gptq", "autogptq")


class Resolved(NamedTuple):
    """A model with its shape.

    Attributes:
        label: Its name in messages.
        repo_id: Its repository on the hub; empty for a local model, or one without files.
        config: The object of its config.json; empty if that was not read.
        source: The origin of `config`.
        files: The contents of its folder; `None` if it is not local.
    """

    label: str
    architecture: Architecture
    repo_id: str = ""
    config: Mapping[str, object] = MappingProxyType({})
    source: str = ""
    files: CheckpointFiles | None = None


def own_adapter(model: ModelLike | Place, adapter: AdapterChoice) -> AdapterChoice:
    """Return the caller's adapter, or the one in the model's own folder, or `False` if that is already merged.

    Raises:
        ConfigError: as `resolve`.
    """
    if adapter is not None or not isinstance(model, (str, Path, Place)):
        return adapter
    folder = place_of(model).folder
    if folder is None or not (folder / ADAPTER_CONFIG).is_file() or not (folder / CONFIG).is_file():
        return None
    import logging  # slow to import, and only needed here

    from qwen_vram.checkpoints.own_adapter import is_merged

    merged = is_merged(folder)
    if merged is None:
        return None
    word = "merged into the model already, and left out" if merged else "not merged, and runs beside the model"
    logging.getLogger(__name__).warning(
        "%r holds an adapter beside a whole model; held against the base it names, it is %s", str(folder), word
    )
    return False if merged else folder


def resolve_model(model: ModelLike, adapter: AdapterChoice = None) -> tuple[str, Architecture]:
    """Return a label for `model`, and its architecture with the tensors of `adapter`, if one is given.

    Raises:
        UnknownNameError, ConfigError, HubError: as `resolve`.
        CheckpointError, NotSupportedError: the weights or the adapter cannot be used.
        AdapterError: `model` is an adapter, or holds one beside a whole model and the caller does not choose.
    """
    place = place_of(model) if isinstance(model, (str, Path)) else model
    adapter = own_adapter(place, adapter)
    found = resolve(place, adapter)
    return found.label, adapted(found, adapter)


def adapted(found: Resolved, adapter: AdapterChoice | Adapter) -> Architecture:
    """Return the architecture of a model with an adapter's tensors, if one is given: by name, or opened already.

    Raises:
        AdapterError, CheckpointError, NotSupportedError, HubError: the adapter cannot be used.
    """
    if adapter is None or adapter is False:
        return found.architecture
    from qwen_vram.checkpoints.adapters.kept_tensors import with_adapter  # an estimate without an adapter starts sooner

    return with_adapter(found.label, found.architecture, adapter)


def stored_knobs(architecture: Architecture, knobs: Mapping[str, object]) -> dict[str, object]:
    """Return `knobs` with the values that a prequantized checkpoint determines.

    Raises:
        ConfigError: the caller asks for another format than the stored one.
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
    """Return `knobs` without `backend`, which may only name GPTQ's libraries, and with `weights` as a format.

    Raises:
        UnknownNameError: `backend` has another name.
    """
    named = dict(knobs)
    backend = named.pop("backend", None)
    if backend not in (None, GPTQ, *_GPTQ_LIBRARIES):
        hint = "others follow from the format: weights='nf4' is bitsandbytes'"
        raise UnknownNameError("backend", backend, (GPTQ, *_GPTQ_LIBRARIES), hint=hint)
    if backend in _GPTQ_LIBRARIES[1:] or named.get("weights") in _GPTQ_LIBRARIES[1:]:
        import logging  # slow to import, and only needed here

        logging.getLogger(__name__).warning(
            "auto-gptq does not import under transformers 5; GPTQModel reads its checkpoints and makes new ones (pip "
            'install "qwen-vram[gptq]"), and is taken in its place'
        )
    if named.get("weights") in _GPTQ_LIBRARIES or (backend is not None and "weights" not in named):
        named["weights"] = stored if stored and FORMATS[stored].is_gptqmodel else "gptq-int4"
    return named


def resolve(model: ModelLike | Place, adapter: AdapterChoice = None) -> Resolved:
    """Resolve `model` to its label, its architecture, and its files if they are local.

    Args:
        model: An `Architecture`, a config `dict`, a checkpoint folder, a catalog name with or without its
            organisation, a hub id, or the address of a hub page. The place of one of these is accepted too. From the
            hub, config.json is fetched, and the safetensors headers of a quantized checkpoint. A folder is preferred to
            a name.
        adapter: The adapter of the call; with it, a folder that holds an adapter beside the model is not refused.

    Raises:
        AdapterError: a folder is an adapter, or holds one beside a whole model and the caller does not choose.
        UnknownNameError: the name is not known.
        ConfigError: the config is missing, broken or of another architecture.
        CheckpointError: the weights in a folder, or the headers of a quantized checkpoint on the hub, are missing,
            broken or of another model.
        HubError: the hub does not give the config.json or the headers.
    """
    if isinstance(model, Architecture):
        return Resolved(label=f"{model.model_type}, {model.num_parameters:,} parameters", architecture=model)
    if isinstance(model, Mapping):
        architecture = Architecture.from_config(model)
        label = str(model.get("_name_or_path") or resolve(architecture).label)
        return Resolved(label=label, architecture=architecture)
    if not isinstance(model, (str, Path, Place)):
        raise ConfigError(f"a model is a name, a folder, a config dict or an Architecture, got {type(model).__name__}")
    place = place_of(model)
    if place.folder is not None:
        _check_adapter(place.folder, adapter)
        return open_folder(place, weights=False)
    from qwen_vram.spec.catalog import catalog_row, row_architecture, unknown_model  # not needed for a folder

    row = catalog_row(place.name)
    if row is not None:
        return Resolved(label=row.repo_id, architecture=row_architecture(row), repo_id=row.repo_id)
    name = place.name
    if not is_hub_id(name):
        raise unknown_model(name)
    from qwen_vram.checkpoints.hub.files import hub_config
    from qwen_vram.checkpoints.prequantized import checkpoint_architecture

    config, source = hub_config(name), f"{name}/{CONFIG}"
    architecture = checkpoint_architecture(config, lambda: hub_named(name), source=source)
    return Resolved(label=name, architecture=architecture, repo_id=name, config=config, source=source)


def _check_adapter(folder: Path, adapter: AdapterChoice) -> None:
    """Refuse an adapter that is given as the model, and one beside the model that the call does not name."""
    if (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return
    from qwen_vram.checkpoints.adapters.folder import check_is_no_adapter, check_own_adapter

    check_is_no_adapter(folder)
    check_own_adapter(folder, adapter)


def open_folder(place: Place, *, weights: bool) -> Resolved:
    """Return the checkpoint in a local folder.

    Args:
        weights: As for `read_checkpoint`.

    Raises:
        ConfigError: config.json is missing, broken or of another architecture, or the folder hides a name on the hub.
        CheckpointError: the weights are missing, broken or of another model.
    """
    from qwen_vram.checkpoints.checkpoint import read_checkpoint  # not needed for a name in the catalog

    folder = place.folder
    assert folder is not None
    if place.hides and not exists(folder / CONFIG):
        _check_hides(folder, place.hides)
    files = read_checkpoint(folder, weights=weights)
    source = str(folder / CONFIG)
    return Resolved(label=folder.name, architecture=files.architecture, config=files.config, source=source, files=files)


def _check_hides(folder: Path, name: str) -> None:
    """Refuse a folder without config.json whose name hides a name on the hub."""
    from qwen_vram.checkpoints.files.absent import no_config
    from qwen_vram.spec.catalog import catalog_row

    if catalog_row(name) or is_hub_id(name):
        error = no_config(folder)
        raise ConfigError(
            f"{error}. A folder of that name hides {name!r} of the hub: remove or rename it if that was meant",
            source=error.source,
        )


def hub_named(repo_id: str) -> dict[str, Tensor]:
    """Return the tensors of a repository from its headers, by the model's names."""
    from qwen_vram.checkpoints.hub.files import hub_tensors
    from qwen_vram.checkpoints.tensors.names import by_model_name

    return by_model_name(hub_tensors(repo_id))[0]
