"""A checkpoint on the hub: its config.json, its safetensors headers, or its files. Needs huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from qwen_vram.errors import BackendUnavailableError, CheckpointError, HubError
from qwen_vram.files.header import Tensor, parse_entries, read_header
from qwen_vram.files.local import (
    AUTO_AWQ_CONFIG,
    AUTO_GPTQ_CONFIG,
    AUTO_GPTQ_SINGLE,
    CONFIG,
    INDEX,
    SINGLE,
    indexed_tensors,
    parse_config,
    read_config,
)

# Weights, tokenizer and settings. Pickles and code are left where they are.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise BackendUnavailableError(
            "reading from the hub needs huggingface_hub, which is not installed; run: pip install qwen-vram",
            backend="huggingface_hub",
            install="pip install qwen-vram",
        ) from error
    module: ModuleType = huggingface_hub
    return module


def hub_config(repo_id: str) -> dict[str, object]:
    """The config.json of `repo_id`, with AutoGPTQ's or AutoAWQ's settings if its name says so and that file does not.

    Raises:
        HubError: the hub cannot be reached, the repository is gated or absent, or it has no config.json.
        ConfigError: the file is not a JSON object.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    file = _config_file(repo_id)
    config = parse_config(file.read_text(encoding="utf-8"), source=f"{repo_id}/{CONFIG}")
    if "quantization_config" in config:
        return config
    for name, beside in (("gptq", AUTO_GPTQ_CONFIG), ("awq", AUTO_AWQ_CONFIG)):
        if name in repo_id.lower() and _bring(repo_id, beside, file.parent.name):
            return read_config(file.parent)
    return config


def hub_tensors(repo_id: str) -> dict[str, Tensor]:
    """Every tensor of `repo_id`, from the headers of its safetensors: ranged reads, some 100 kB a file.

    What the local cache has is read there. All is of the commit that config.json is of.

    Raises:
        HubError: the hub cannot be reached, or the repository has no safetensors, or lacks one that its index names.
        CheckpointError: a header or the index is corrupt.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    folder = _config_file(repo_id).parent
    single, index = SINGLE, INDEX
    if (folder / AUTO_GPTQ_CONFIG).is_file():
        single, index = _auto_gptq_names(repo_id, folder.name)
    if not (folder / single).is_file() and _bring(repo_id, index, folder.name):
        return indexed_tensors(folder / index, lambda file: _header(repo_id, folder, file))
    return _header(repo_id, folder, single)


def hub_snapshot(repo_id: str) -> Path:
    """A local folder with the checkpoint's files, downloaded where they are not there yet, with a progress bar.

    An interrupted download is resumed by the next call.

    Raises:
        HubError: the hub cannot be reached, or the repository is gated or absent.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    hub = _library()
    with _explained(repo_id):
        return Path(hub.snapshot_download(repo_id, allow_patterns=_WANTED))


def _config_file(repo_id: str) -> Path:
    """The config.json in the local cache, in a folder that is named after its commit."""
    hub = _library()
    with _explained(repo_id):
        return Path(hub.hf_hub_download(repo_id, CONFIG))


def _auto_gptq_names(repo_id: str, commit: str) -> tuple[str, str]:
    """The one file of weights and the index, as a checkpoint with AutoGPTQ's settings calls them."""
    hub = _library()
    with _explained(repo_id, SINGLE):
        files = set(hub.list_repo_files(repo_id, revision=commit))
    own = [file for file in sorted(files) if Path(file).match(AUTO_GPTQ_SINGLE)]
    if files & {SINGLE, INDEX} or not own:
        return SINGLE, INDEX
    indexes = [file for file in sorted(files) if Path(file).match(f"{AUTO_GPTQ_SINGLE}.index.json")]
    return own[0], indexes[0] if indexes else INDEX


def _bring(repo_id: str, file: str, commit: str) -> bool:
    """Bring a file that need not be there to the cache, and say whether there is one."""
    hub = _library()
    from huggingface_hub import errors

    with _explained(repo_id, file):
        try:
            hub.hf_hub_download(repo_id, file, revision=commit)
        except errors.LocalEntryNotFoundError:  # an EntryNotFoundError too, but for want of a connection
            raise
        except errors.EntryNotFoundError:
            return False
    return True


def _header(repo_id: str, folder: Path, file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file: of the cached file where it is whole there, else by ranged reads."""
    if (folder / file).is_file():
        return read_header(folder / file)
    hub = _library()
    from huggingface_hub import errors

    source = Path(repo_id) / file
    with _explained(repo_id, file):
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


@contextmanager
def _explained(repo_id: str, file: str = CONFIG) -> Iterator[None]:
    """Turn what huggingface_hub raises while it asks for `file` into our errors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id!r} is gated: accept its terms on its page, then log in with: hf auth login", repo_id=repo_id
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"no repository {repo_id!r} on the hub (or it is private); check the name, or log in with: hf auth login",
            repo_id=repo_id,
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo_id, file) from error
    except errors.EntryNotFoundError as error:
        raise _missing(repo_id, file) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a hub id; write 'organisation/name'", repo_id=repo_id) from error
    except (errors.HTTPError, OSError) as error:
        raise _unreachable(repo_id, file) from error


def _missing(repo_id: str, file: str) -> HubError:
    if file == CONFIG:
        what = f"has no {CONFIG}; it is not a transformers checkpoint"
    elif file == SINGLE:
        what = f"has no safetensors, neither {SINGLE} nor {INDEX}; only safetensors are read, so use one that has them"
    else:
        what = f"lacks {file!r}, which its index names; ask its publisher, or use another checkpoint"
    return HubError(f"{repo_id!r} {what}", repo_id=repo_id)


def _unreachable(repo_id: str, file: str) -> HubError:
    cached = "it is" if file == CONFIG else f"{file!r} is"
    return HubError(
        f"cannot reach the hub for {repo_id!r}, and {cached} not in the local cache; check the network (HF_ENDPOINT, "
        "HF_HUB_OFFLINE), or pass a local checkpoint folder",
        repo_id=repo_id,
    )
