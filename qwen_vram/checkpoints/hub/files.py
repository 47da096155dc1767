"""A checkpoint on the hub: config.json, safetensors headers, or all files.

The module needs huggingface_hub.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from qwen_vram.checkpoints.files.contents import GGUF
from qwen_vram.checkpoints.files.local import (
    indexed_tensors,
    parse_config,
    read_config,
    read_index,
    read_json,
    weights_file,
)
from qwen_vram.checkpoints.files.names import (
    AUTO_AWQ_CONFIG,
    AUTO_GPTQ_CONFIG,
    AUTO_GPTQ_SINGLE,
    CONFIG,
    GENERATION,
    INDEX,
    NAMED_WEIGHTS,
    SINGLE,
)
from qwen_vram.checkpoints.files.safetensors_header import Tensor, parse_entries, read_header
from qwen_vram.checkpoints.hub.errors import explained, library, missing_text, unreachable_text
from qwen_vram.errors import CheckpointError, HubError

# Settings, tokenizer and templates. Pickles and code are not downloaded.
_BESIDE = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_TEMPLATES = "additional_chat_templates/"


def hub_config(repo_id: str) -> dict[str, object]:
    """Return the config.json of `repo_id`, completed with AutoGPTQ's or AutoAWQ's settings.

    Their files are asked for if the repository's name contains the method and config.json does not.

    Raises:
        HubError: the hub does not answer, the repository is gated or absent, or it has no config.json.
        ConfigError: the file is not a JSON object.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    file = _config_file(repo_id)
    config = parse_config(file.read_bytes(), source=f"{repo_id}/{CONFIG}")
    if "quantization_config" in config:
        return config
    for name, beside in (("gptq", AUTO_GPTQ_CONFIG), ("awq", AUTO_AWQ_CONFIG)):
        if name in repo_id.lower() and _bring(repo_id, beside, file.parent.name):
            return read_config(file.parent)
    return config


def hub_tensors(repo_id: str) -> dict[str, Tensor]:
    """Return every tensor of `repo_id`, from the headers of its safetensors: ranged reads of about 100 kB a file.

    Files in the local cache are read there. All files are of the same commit as config.json.

    Raises:
        HubError: the hub does not answer, or the repository has no safetensors, or lacks one that its index names.
        CheckpointError: a header or the index is corrupt.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    folder = _config_file(repo_id).parent
    single, index = SINGLE, INDEX
    if (folder / AUTO_GPTQ_CONFIG).is_file():
        single, index = _auto_gptq_names(repo_id, folder.name)
    cached = (folder / index).is_file() and not (single and (folder / single).is_file())
    if cached or (not (single and _has(repo_id, single, folder)) and _bring(repo_id, index, folder.name)):
        return indexed_tensors(folder / index, lambda file: _header(repo_id, folder, file))
    return _header(repo_id, folder, single)


def hub_generation_config(repo_id: str) -> Path | None:
    """Return the generation_config.json of `repo_id` in the local cache; `None` if the repository has none.

    Raises:
        HubError: the hub does not answer, and the file is not in the cache.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    folder = _config_file(repo_id).parent
    path = folder / GENERATION
    return path if path.is_file() or _bring(repo_id, path.name, folder.name) else None


def hub_companions(repo_id: str) -> Path:
    """Return a local folder with the checkpoint's small files: tokenizer, chat template and settings, but no weights.

    Raises:
        HubError: the hub does not answer, or the repository is gated or absent.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    hub = library()
    with explained(repo_id):
        return Path(hub.snapshot_download(repo_id, allow_patterns=list(_BESIDE)))


def hub_snapshot(repo_id: str) -> Path:
    """Return a local folder with the checkpoint's files, downloaded with a progress bar if they are missing.

    It downloads only the set of weights that is read, and of the other files those at the top. The next call resumes an
    interrupted download. Without a connection the folder in the local cache is used, if it is complete.

    Raises:
        HubError: the hub does not answer, or the repository is gated or absent.
        CheckpointError: its index is broken.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    hub = library()
    from huggingface_hub import errors

    try:
        with explained(repo_id):
            info = hub.HfApi().model_info(repo_id)
    except HubError as error:
        if isinstance(error.__cause__, (errors.GatedRepoError, errors.RepositoryNotFoundError)):
            raise
        return _cached_snapshot(repo_id, error)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    wanted = [*_beside_weights(files), *_weights(repo_id, files, info.sha)]
    import glob  # not needed for an estimate

    with explained(repo_id):
        patterns = [glob.escape(name) for name in wanted]
        return Path(hub.snapshot_download(repo_id, allow_patterns=patterns))  # by branch, as later look-ups


def _beside_weights(files: list[str]) -> list[str]:
    """Return those of `files` with settings, tokenizer and templates."""
    return [
        name
        for name in files
        if any(PurePosixPath(name).match(pattern) for pattern in _BESIDE)
        and (name.count("/") == 0 or name.startswith(_TEMPLATES))
        and not name.endswith(".index.json")
    ]


def _weights(repo_id: str, files: list[str], commit: str) -> list[str]:
    """Return the files of the set of weights that is read, with its index, and those of an adapter if it is one."""
    single, index = SINGLE, INDEX
    own = [name for name in files if Path(name).match(AUTO_GPTQ_SINGLE) and "/" not in name]
    if not {SINGLE, INDEX} & set(files) and own:
        single, index = own[0], next((name for name in files if Path(name).match(f"{AUTO_GPTQ_SINGLE}.index.json")), "")
    if CONFIG in files:
        named = read_json(_bring_file(repo_id, CONFIG, commit)).get(NAMED_WEIGHTS)
        if isinstance(named, str) and named in files:
            single, index = (named, "") if named.endswith(".safetensors") else ("", named)
    found = [single] if single in files else []
    if not found and index in files:
        found = [index, *sorted(set(read_index(_bring_file(repo_id, index, commit)).values()))]
    if not found and CONFIG in files:
        ggufs = [name for name in files if name.lower().endswith(".gguf")]
        raise HubError(
            f"{repo_id!r} holds {ggufs[0]!r}, which {GGUF}" if ggufs else missing_text(repo_id, SINGLE),
            repo_id=repo_id,
        )
    return [*found, *(name for name in files if name.startswith("adapter_model.") and name.endswith(".safetensors"))]


def hub_cached(repo_id: str) -> Path | None:
    """Return the folder of `repo_id` in the local cache, which may lack files; `None` without one. It asks no hub.

    Raises:
        BackendUnavailableError: huggingface_hub is not installed.
    """
    found = library().try_to_load_from_cache(repo_id, CONFIG)
    return Path(found).parent if isinstance(found, str) else None


def _cached_snapshot(repo_id: str, error: HubError) -> Path:
    """Return the snapshot in the local cache, if no file of it is missing.

    Raises:
        HubError: it is missing or incomplete.
    """
    hub = library()
    found = (hub.try_to_load_from_cache(repo_id, name) for name in (CONFIG, "adapter_config.json"))
    cached = next((Path(path) for path in found if isinstance(path, str)), None)
    if cached is None:
        raise error from error.__cause__
    folder = cached.parent
    missing = _missing_here(folder)
    if missing:
        raise HubError(unreachable_text(repo_id, missing), repo_id=repo_id) from error.__cause__
    return folder


def _missing_here(folder: Path) -> str:
    """Return the first file that a cached snapshot lacks; empty if no file is missing."""
    if not (folder / CONFIG).exists():
        return "" if any(folder.glob("adapter_*")) else CONFIG
    try:
        weights = weights_file(folder, read_json(folder / CONFIG))
    except CheckpointError:
        return SINGLE
    if not weights.exists():
        return weights.name
    if weights.name.endswith(".json"):
        shards = sorted(set(read_index(weights).values()))
        return next((name for name in shards if not (folder / name).exists()), "")
    return ""


def _config_file(repo_id: str) -> Path:
    """Return the config.json in the local cache, in a folder that is named after its commit."""
    hub = library()
    with explained(repo_id):
        return Path(hub.hf_hub_download(repo_id, CONFIG))


def _auto_gptq_names(repo_id: str, commit: str) -> tuple[str, str]:
    """Return the names of the single file of weights and of the index, which AutoGPTQ's settings may change."""
    hub = library()
    with explained(repo_id, SINGLE):
        files = set(hub.list_repo_files(repo_id, revision=commit))
    own = [file for file in sorted(files) if Path(file).match(AUTO_GPTQ_SINGLE)]
    if files & {SINGLE, INDEX} or not own:
        return SINGLE, INDEX
    indexes = [file for file in sorted(files) if Path(file).match(f"{AUTO_GPTQ_SINGLE}.index.json")]
    return ("", indexes[0]) if indexes else (own[0], INDEX)


def _bring_file(repo_id: str, file: str, commit: str) -> Path:
    """Return a file in the local cache, downloaded if it is missing."""
    hub = library()
    with explained(repo_id, file):
        return Path(hub.hf_hub_download(repo_id, file, revision=commit))


def _has(repo_id: str, file: str, folder: Path) -> bool:
    """Tell if the repository has a file, at the commit that `folder` is named after."""
    if (folder / file).is_file():
        return True
    hub = library()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    with explained(repo_id, file):
        return bool(hub.file_exists(repo_id, file, revision=folder.name))


def _bring(repo_id: str, file: str, commit: str) -> bool:
    """Download an optional file to the cache, and tell if the repository has it."""
    hub = library()
    from huggingface_hub import errors

    with explained(repo_id, file):
        try:
            hub.hf_hub_download(repo_id, file, revision=commit)
        except errors.LocalEntryNotFoundError:  # an EntryNotFoundError too, but for lack of a connection
            raise
        except errors.EntryNotFoundError:
            return False
    return True


def _header(repo_id: str, folder: Path, file: str) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file: from the cached file if it is complete, else by ranged reads."""
    if (folder / file).is_file():
        return read_header(folder / file)
    hub = library()
    from huggingface_hub import errors

    source = Path(repo_id) / file
    with explained(repo_id, file):
        try:
            header = hub.parse_safetensors_file_metadata(repo_id, file, revision=folder.name)
        except errors.SafetensorsParsingError as error:
            raise CheckpointError(
                f"{file!r} of {repo_id!r} is not a safetensors file: its header cannot be read; ask its publisher, or "
                "use another checkpoint",
                path=str(source),
            ) from error
    entries = {name: {**vars(tensor), "data_offsets": tensor.data_offsets} for name, tensor in header.tensors.items()}
    return parse_entries(entries, file, source=source)[0]
