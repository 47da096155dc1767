"""Location of a model: a local folder, or a name in the catalog or on the hub."""

import re
from pathlib import Path
from typing import NamedTuple

from qwen_vram.checkpoints.files.local import exists, is_folder
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.errors import ConfigError

# Patterns are texts here, compiled when a name is first compared with them: a folder needs no pattern.
_HUB_ID = r"[\w.-]+/[\w.-]+"
# Pages of a model on Hugging Face, its mirrors and ModelScope, written without "https://" too.
_HOSTS = r"^(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.(cn|ai|com))/"
_NO_MODELS = ("datasets", "spaces", "collections", "organization")
_BRANCHES = ("main", "master")
_DRIVE = r"^([A-Za-z]):[\\/]"
# ModelScope's replacement of a dot in the name of a folder. Source: modelscope 1.x, snapshot_download.
_DOT = "___"
_SHARED_WITH_A_NAME = 2


class Place(NamedTuple):
    """A local folder, or a name that is looked up: exactly one of the two is set.

    Attributes:
        hides: The name on the hub that the folder's own name hides; empty for a path that cannot be such a name.
    """

    folder: Path | None
    name: str
    hides: str = ""


def is_hub_id(name: str) -> bool:
    """Tell if a name can be that of a repository, `organisation/name`."""
    return re.fullmatch(_HUB_ID, name) is not None


def place_of(model: str | Path | Place) -> Place:
    """Return the folder or the name that `model` refers to; a place is returned unchanged.

    It accepts blanks around the name, a slash at its end, `~`, addresses of hub pages and ModelScope's folder names.

    Raises:
        ConfigError: the path is a file or does not exist, or the address is not the page of a model.
    """
    if isinstance(model, Place):
        return model
    written = str(model)
    if is_folder(Path(written)) and written.strip():
        return _folder(Path(written), written)
    text = written.strip()
    address = _address(text)
    if address is not None:
        return address
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if text and is_folder(path):
        return _folder(path, text)
    if "\\" in text and is_folder(Path(text.replace("\\", "/"))):
        return _folder(Path(text.replace("\\", "/")), text)
    if text and exists(path):
        raise _a_file(path, text)
    name = text.rstrip("/")
    if _is_path(name):
        raise _no_folder(path, text)
    return Place(None, name.replace(_DOT, "."))


def _folder(path: Path, text: str) -> Place:
    name = text.strip().rstrip("/")
    hides = name if not _is_path(name) else ""
    return Place(path, "", hides.replace(_DOT, "."))


def _is_path(text: str) -> bool:
    """Tell if a text can only be a path of this machine."""
    return (
        len(Path(text).parts) > _SHARED_WITH_A_NAME
        or text.startswith((".", "/", "~"))
        or "\\" in text
        or re.match(_DRIVE, text) is not None
    )


def _address(text: str) -> Place | None:
    """Return the place that a URL names; `None` if `text` is not a URL."""
    if re.match(_HOSTS, text, re.IGNORECASE):
        text = f"https://{text}"
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() not in ("http", "https", "hf", "file"):
        return None
    from urllib.parse import unquote, urlsplit  # slow to import, and only needed here

    if scheme.lower() == "file":
        return place_of(unquote(urlsplit(text).path))
    path = f"/{rest}" if scheme.lower() == "hf" else urlsplit(text).path
    parts = [part for part in unquote(path).split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    name = "/".join(parts[:2])
    if (parts and parts[0] in _NO_MODELS) or not is_hub_id(name):
        raise ConfigError(
            f"{text!r} is not the page of a model; pass its name, such as 'organisation/name'", source=text
        )
    if parts[2:3] and parts[2] in ("tree", "blob", "resolve", "raw") and parts[3:4] and parts[3] not in _BRANCHES:
        raise ConfigError(
            f"{text!r} names the revision {parts[3]!r}, and the main one alone is read from a hub; download it first "
            f"(hf download {name} --revision {parts[3]} --local-dir FOLDER), and pass FOLDER",
            source=text,
        )
    return Place(None, name.replace(_DOT, "."))


def _a_file(path: Path, text: str) -> ConfigError:
    from qwen_vram.checkpoints.files.contents import GGUF, beginning_of

    if path.suffix.lower() == ".gguf" or beginning_of(path).startswith(b"GGUF"):
        return ConfigError(f"{text!r} {GGUF}", source=text)
    if path.name == CONFIG or ".safetensors" in path.suffixes:
        return ConfigError(
            f"{text!r} is a file of a checkpoint; pass the folder that holds it: {str(path.parent)!r}", source=text
        )
    hint = "" if _is_path(text) else "; if the model of that name on the hub is meant, rename the file"
    return ConfigError(f"a file of that name is here, not a checkpoint folder: {text!r}{hint}", source=text)


def _no_folder(path: Path, text: str) -> ConfigError:
    drive = re.match(_DRIVE, text)
    if drive:
        inside = f"/mnt/{drive[1].lower()}/{text[3:]}".replace("\\", "/")
        return ConfigError(
            f"no checkpoint folder {text!r}; it is a path of Windows, and in WSL the same folder is {inside!r}; point "
            f"to the folder that holds {CONFIG}",
            source=text,
        )
    spelled = path.with_name(path.name.replace(".", _DOT))
    if path.name != spelled.name and is_folder(spelled):
        return ConfigError(
            f"no checkpoint folder {text!r}; ModelScope spells it {str(spelled)!r}: pass that", source=text
        )
    near = next((one for one in _beside(path) if one.name.lower() == path.name.lower()), None)
    if near is not None:
        return ConfigError(f"no checkpoint folder {text!r}; {str(near)!r} is there: pass that", source=text)
    return ConfigError(f"no checkpoint folder {text!r}; point to the folder that holds {CONFIG}", source=text)


def _beside(path: Path) -> list[Path]:
    try:
        return [one for one in sorted(path.parent.iterdir()) if one.is_dir()]
    except (OSError, ValueError):
        return []
