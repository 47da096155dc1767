"""Conversion of huggingface_hub's exceptions into errors with the next step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from qwen_vram.checkpoints.files.contents import GGUF
from qwen_vram.checkpoints.files.names import CONFIG, INDEX, SINGLE
from qwen_vram.errors import BackendUnavailableError, HubError


def library() -> ModuleType:
    """Import and return the module huggingface_hub.

    Raises:
        BackendUnavailableError: it is not installed.
    """
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


@contextmanager
def explained(repo_id: str, file: str = CONFIG) -> Iterator[None]:
    """Turn exceptions of huggingface_hub while it asks for `file` into this library's errors."""
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
        ggufs = [name for name in _files_of(repo_id) if name.lower().endswith(".gguf")]
        if ggufs:
            return HubError(f"{repo_id!r} holds {ggufs[0]!r}, which {GGUF}", repo_id=repo_id)
    return HubError(missing_text(repo_id, file), repo_id=repo_id)


def _files_of(repo_id: str) -> list[str]:
    """Return the names of a repository's files; empty if the hub does not tell."""
    hub = library()
    from huggingface_hub import errors

    try:
        return list(hub.list_repo_files(repo_id))
    except (errors.HTTPError, OSError):
        return []


def missing_text(repo_id: str, file: str) -> str:
    """Return the text of an error about a file that a repository lacks, with the next step."""
    if file == CONFIG:
        what = f"has no {CONFIG}; it is not a transformers checkpoint"
    elif file == SINGLE:
        what = f"has no safetensors, neither {SINGLE} nor {INDEX}; only safetensors are read, so use one that has them"
    else:
        what = f"lacks {file!r}, which its index names; ask its publisher, or use another checkpoint"
    return f"{repo_id!r} {what}"


def _unreachable(repo_id: str, file: str) -> HubError:
    return HubError(unreachable_text(repo_id, file), repo_id=repo_id)


def unreachable_text(repo_id: str, file: str) -> str:
    """Return the text of an error about a file that is not cached while the hub does not answer."""
    from huggingface_hub import constants

    cached = "it is" if file == CONFIG else f"{file!r} is"
    late = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    why = f"at {constants.ENDPOINT} cannot be reached"
    cure = "check the network and HF_ENDPOINT"
    if constants.HF_HUB_OFFLINE:
        why, cure = "was not asked (HF_HUB_OFFLINE is set)", "connect once without HF_HUB_OFFLINE"
    if late and late != constants.ENDPOINT.rstrip("/"):
        why += f"; HF_ENDPOINT is {late!r} by now, which was set after huggingface_hub had been imported"
        cure = f"set HF_ENDPOINT before Python starts; or {cure}"
    if repo_id.lower().endswith("-gguf"):
        cure = "a '-GGUF' repository is llama.cpp's, and not read: use the 16-bit checkpoint; or " + cure
    return (
        f"cannot reach the hub for {repo_id!r}, and {cached} not in the local cache: the hub {why}; "
        f"{cure}, then run: hf download {repo_id}; or pass a local checkpoint folder"
    )
