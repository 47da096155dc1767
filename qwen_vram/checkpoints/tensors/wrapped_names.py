"""Recognition of tensor names from a model that was saved inside a wrapper."""

from __future__ import annotations

from collections.abc import Collection

from qwen_vram.checkpoints.tensors.names import BASE, model_name

# Modules that wrap others while a model is trained or compiled, and whose names stay in the tensor names.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning or DeepSpeed",
    "base_model.model": "PEFT",
    "_dynamo_orig_callable": "torch.compile",
}


class Wrapper:
    """The part of a checkpoint's tensor names that the model's names do not have.

    Attributes:
        text: The part, with its dot at the end.
        leads: True if every name begins with it.
        by: The library that adds it; empty if that is not known.
    """

    def __init__(self, text: str, *, leads: bool) -> None:
        self.text, self.leads = text, leads
        self.by = next((by for name, by in _WRAPPERS.items() if name in text.rstrip(".")), "")

    def without(self, name: str) -> str:
        """Return the name without that part."""
        return name.removeprefix(self.text) if self.leads else name.replace(f".{self.text}", ".")

    def command(self, folder: str) -> str:
        """Return a shell command that removes the part from the names in the files of `folder`."""
        name = f"k.removeprefix({self.text!r})" if self.leads else f"k.replace({'.' + self.text!r}, '.')"
        index = f"chr(34) + {self.text!r}, chr(34)" if self.leads else f"{'.' + self.text!r}, '.'"
        return (
            'python -c "from pathlib import Path; from safetensors.torch import load_file, save_file; '
            f"d = Path({folder!r}); [save_file({{{name}: v.clone() for k, v in load_file(f).items()}}, f, "
            "{'format': 'pt'}) for f in d.glob('*.safetensors')]; "
            f"[f.write_text(f.read_text().replace({index})) for f in d.glob('*.index.json')]\""
        )


def wrapper_of(names: Collection[str], wanted: Collection[str]) -> Wrapper | None:
    """Return the wrapper in `names`, if the names without it include every wanted one; `None` if not."""
    for wrapper in _candidates(names):
        if wrapper.text and {model_name(wrapper.without(name)) for name in names} >= set(wanted):
            return wrapper
    return None


def _candidates(names: Collection[str]) -> list[Wrapper]:
    table = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    before = table.removesuffix("embed_tokens.weight")
    leading = [before.removesuffix(BASE), before]
    inside = [f"{name}." for name in _WRAPPERS if any(f".{name}." in one for one in names)]
    return [Wrapper(text, leads=True) for text in leading] + [Wrapper(text, leads=False) for text in inside]
