"""A checkpoint on the hub: its config.json, and its files brought to this machine. Needs huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from qwen_vram.errors import BackendUnavailableError, HubError
from qwen_vram.files.local import CONFIG, parse_config

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
    """The config.json of `repo_id`, and nothing else of it.

    Raises:
        HubError: the hub cannot be reached, the repository is gated or absent, or it has no config.json.
        ConfigError: the file is not a JSON object.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    hub = _library()
    with _explained(repo_id):
        path = Path(hub.hf_hub_download(repo_id, CONFIG))
    return parse_config(path.read_text(encoding="utf-8"), source=f"{repo_id}/{CONFIG}")


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


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
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
        raise _unreachable(repo_id) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{repo_id!r} has no {CONFIG}; it is not a transformers checkpoint", repo_id=repo_id) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a hub id; write 'organisation/name'", repo_id=repo_id) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _unreachable(repo_id) from error


def _unreachable(repo_id: str) -> HubError:
    return HubError(
        f"cannot reach the hub for {repo_id!r}, and it is not in the local cache; check the network (HF_ENDPOINT, "
        "HF_HUB_OFFLINE), or pass a local checkpoint folder",
        repo_id=repo_id,
    )
