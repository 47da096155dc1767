"""The folder of an adapter, or the refusal of a folder that holds none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.files.local import exists, is_folder
from qwen_vram.checkpoints.files.names import ADAPTER_CONFIG
from qwen_vram.checkpoints.files.names import CONFIG as MODEL_CONFIG
from qwen_vram.checkpoints.files.place import is_hub_id
from qwen_vram.checkpoints.hub.files import hub_snapshot

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

AdapterPath = str | Path
# A caller's adapter: a folder or hub id, `None`, or `False` to leave out the one in the model's own folder.
AdapterChoice = AdapterPath | Literal[False] | None


def adapter_folder(adapter: AdapterPath) -> Path:
    """Return the local folder of an adapter, downloaded if `adapter` is a hub id.

    Raises:
        AdapterError: `adapter` is no folder and no hub id, or the folder holds no adapter.
        HubError: the hub does not give the files.
    """
    if not isinstance(adapter, (str, Path)):
        raise AdapterError(f"an adapter is a folder or a hub id, got {adapter!r}", path=repr(adapter))
    folder = Path(adapter).expanduser()
    if exists(folder) and not is_folder(folder):
        raise AdapterError(
            f"{str(adapter)!r} is a file, and an adapter is a folder with {CONFIG} and {WEIGHTS}; pass the folder "
            f"{str(folder.parent)!r}",
            path=str(folder),
        )
    if not is_folder(folder):
        if not is_hub_id(str(adapter)):
            raise AdapterError(
                f"no adapter folder {str(adapter)!r}; point to the folder that PEFT's save_pretrained() wrote, or pass "
                "a hub id 'organisation/name'",
                path=str(adapter),
            )
        folder = hub_snapshot(str(adapter))
    _check_files(folder)
    return folder


def _check_files(folder: Path) -> None:
    """Refuse a folder without adapter_config.json or adapter_model.safetensors, by the files that it holds instead."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"no {CONFIG} in {str(folder)!r}{_instead(folder)}", path=str(folder / CONFIG))
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).exists():
        raise AdapterError(
            f"{str(folder)!r} holds only {PICKLE}, a pickle, which can run code when it is opened; only {WEIGHTS} is "
            'read. If you trust the file, convert it once with: python -c "import torch; from safetensors.torch '
            f"import save_file; save_file(torch.load({str(folder / PICKLE)!r}, weights_only=True), "
            f'{str(folder / WEIGHTS)!r})"',
            path=str(folder / PICKLE),
        )
    raise AdapterError(
        f"no {WEIGHTS} in {str(folder)!r}; point to the folder that PEFT's save_pretrained() wrote", path=str(folder)
    )


def _instead(folder: Path) -> str:
    """Return what the folder holds in place of an adapter, and what to pass."""
    inside = adapters_inside(folder)
    if inside:
        return (
            f", and adapters in its subfolders, as in the output folder of a training run ({_last_names(inside)}); "
            f"pass one of them, such as {str(inside[-1])!r}"
        )
    if (folder / MODEL_CONFIG).is_file():
        return (
            ", which holds a whole model and not an adapter: if the adapter is merged into it already, pass the folder "
            "as the model, without an adapter"
        )
    return "; point to the folder that PEFT's save_pretrained() wrote"


def _last_names(folders: list[Path], shown: int = 5) -> str:
    more = f"{len(folders) - shown} before, " if len(folders) > shown else ""
    return more + ", ".join(path.name for path in folders[-shown:])


def adapters_inside(folder: Path) -> list[Path]:
    """List the direct subfolders of `folder` that hold an adapter, by their number in the name, then by name."""

    def order(path: Path) -> tuple[int, str]:
        number = re.search(r"\d+$", path.name)
        return int(number[0]) if number else -1, path.name

    return sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=order)


def check_is_no_adapter(folder: Path) -> None:
    """Refuse an adapter, or the output folder of an adapter's training run, that is given as the model.

    Raises:
        AdapterError: `folder` holds no model, but an adapter or subfolders with adapters.
    """
    if (folder / MODEL_CONFIG).is_file():
        return
    if (folder / CONFIG).is_file():
        base = named_base(folder)
        raise AdapterError(
            f"{str(folder)!r} holds an adapter of the base {base!r}, and not a whole model; pass the base as the model "
            f"and this folder as its adapter: qv.load({base!r}, adapter={str(folder)!r}), on the command line "
            f"--adapter {folder}; or merge the two: qv.merge_lora_then_quantize({base!r}, {str(folder)!r}, out)",
            path=str(folder / CONFIG),
        )
    inside = adapters_inside(folder)
    if inside:
        base = named_base(inside[-1])
        raise AdapterError(
            f"{str(folder)!r} holds no model, and adapters of the base {base!r} in its subfolders, as in the output "
            f"folder of a training run ({_last_names(inside)}); pass the base as the model, and one of them as its "
            f"adapter: qv.load({base!r}, adapter={str(inside[-1])!r})",
            path=str(folder),
        )


def holds_both(folder: Path) -> bool:
    """Tell if a folder holds a whole model and an adapter's settings."""
    return (folder / CONFIG).is_file() and (folder / MODEL_CONFIG).is_file()


def check_own_adapter(folder: Path, adapter: AdapterChoice) -> None:
    """Refuse a whole model with an adapter's files in the same folder, unless the caller chooses.

    `transformers` loads such an adapter onto the model, also if the weights are already merged.
    Source: transformers 5.23, integrations/peft.py, maybe_load_adapters.

    Args:
        adapter: The caller's choice: `False` leaves the adapter out, and the folder itself loads it onto the model.

    Raises:
        AdapterError: both are there, and the caller does not choose.
    """
    if not holds_both(folder) or adapter is False or (adapter is not None and _is_folder_of(adapter, folder)):
        return
    raise _both(
        folder,
        f"if it is, remove {CONFIG} and {WEIGHTS} from the folder, or pass adapter=False; if it is not, pass the folder"
        f" as its own adapter: qv.load({str(folder)!r}, adapter={str(folder)!r}), or --adapter {folder}",
    )


def check_no_adapter_beside(folder: Path) -> None:
    """Refuse a whole model with an adapter's files in the same folder, for calls that take no adapter.

    Raises:
        AdapterError: both are there.
    """
    if holds_both(folder):
        raise _both(
            folder,
            f"if it is, remove {CONFIG} and {WEIGHTS} from the folder; if it is not, merge it first: "
            f"qv.merge_lora_then_quantize({str(folder)!r}, {str(folder)!r}, out)",
        )


def _is_folder_of(adapter: AdapterPath, folder: Path) -> bool:
    return isinstance(adapter, (str, Path)) and Path(adapter).expanduser().resolve() == folder.resolve()


def _both(folder: Path, advice: str) -> AdapterError:
    return AdapterError(
        f"{str(folder)!r} holds a whole model and an adapter's {CONFIG}, and no file says whether the adapter is "
        f"merged into the model; {advice}",
        path=str(folder / CONFIG),
    )


def named_base(folder: Path) -> str:
    """Return the base that an adapter's adapter_config.json names; `"BASE"` if it names none or cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return str(config.get("base_model_name_or_path") or "BASE")
    except (OSError, ValueError, AttributeError):
        return "BASE"
