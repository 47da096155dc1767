"""The strategy interface: what a quantization backend must do. Bytes are not its business; see `spec.formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from qwen_vram.checkpoints.adapters.folder import holds_both
from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.checkpoints.files.names import INDEX, SINGLE
from qwen_vram.runtime.tensors.partial_checkpoint import load_with_own_head, load_without

# A subfolder that is not there, in which transformers looks for an adapter to put on the model by itself.
_NO_ADAPTER = "no adapter"

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qwen_vram.spec.architecture import Architecture
    from qwen_vram.spec.profile import Profile


class Request(NamedTuple):
    """What a backend is asked to load.

    `files`: the checkpoint as it was read. `config`: the model's, which `transformers` made of it.
    `stored`: the checkpoint is in the profile's format already. `own_head`: its head is the token table, and is to be
    quantized into a tensor of its own. `late_head`: the head is built after `load`, with the layers that stream.
    `left_out`: parameters that `load` leaves on the meta device without reading them, by name, with their shapes.
    `made`: tensors that the files lack and the model needs, by name. `narrowed`: names of float32 tensors that are cast
    to `dtype` as they are read, for `transformers` leaves them as they are in a checkpoint of bitsandbytes.
    `disable_mmap`: files are read through, not mapped.
    """

    files: CheckpointFiles
    config: Any
    profile: Profile
    device: torch.device
    dtype: torch.dtype
    device_map: Mapping[str, int | str | torch.device]
    attention: str
    stored: bool = False
    own_head: bool = False
    late_head: bool = False
    left_out: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    made: Mapping[str, torch.Tensor] = MappingProxyType({})
    narrowed: frozenset[str] = frozenset()
    disable_mmap: bool = False


class Backend(Protocol):
    """Loads checkpoints in the storage formats that it is registered for."""

    name: str

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse what cannot run here, before anything is allocated.

        Raises:
            BackendUnavailableError: a library or a GPU that is not here.
            NotSupportedError: a combination of knobs that this backend cannot make.
        """

    def load(self, request: Request) -> nn.Module:
        """A plain `transformers` model with its weights in the profile's formats, on the request's devices."""

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Tensors that `module` holds beside its parameters for the sake of its format (scales, code tables)."""


@runtime_checkable
class SavingBackend(Backend, Protocol):
    """A backend whose models can be saved: `state_dict()` of each module is what its checkpoint holds."""

    def saved_config(self, model: nn.Module, profile: Profile) -> dict[str, Any]:
        """config.json's `quantization_config`.

        Raises:
            NotSupportedError: a module no longer holds what was quantized.
        """


@runtime_checkable
class StreamingBackend(Backend, Protocol):
    """A backend whose decoder layers can stream: it says what their modules hold, and swaps it."""

    def build(self, module: nn.Module, weights: Mapping[str, torch.Tensor], request: Request) -> nn.Module:
        """The module that takes the place of `module`, a leaf on the meta device, in the request's format.

        `weights` are its tensors in the checkpoint as they are there, on the host: its parameters, and all else that is
        called after it where the checkpoint is quantized already. What is quantized now is quantized on the request's
        device, to the same bytes as `load` makes; the rest may stay on the host.
        """

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Everything that `module` computes with, by name: its parameters, and what `storages` lists."""

    def binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """A call that makes `module` use these tensors, named as by `tensors()`, in place of its own.

        It is made before the module has run, and called for every layer of every token: it only assigns.
        """


@runtime_checkable
class HostBackend(StreamingBackend, Protocol):
    """A backend whose layers can compute on the CPU, where they wait to be streamed."""

    def check_host(self, profile: Profile, architecture: Architecture) -> None:
        """Refuse layers that cannot compute on this machine's CPU.

        Raises:
            BackendUnavailableError, NotSupportedError: the CPU, the format or a shape rules them out.
        """

    def host_binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """A call that sets `module.forward` to one that computes with these tensors, all of them on the host.

        They are named as by `tensors()`. Parameters stay as they are, for a model is where its first one is; the
        attribute is taken away again when the layer is bound to a slot. Copies are counted in `arithmetic.weights`.
        """


def stored_config(request: Request) -> Any:
    """The `transformers` config of a checkpoint that is quantized already, its head tied only if it is the table."""
    if request.profile.lm_head is not None:
        request.config.tie_word_embeddings = False
    return request.config


def _is_plain(request: Request) -> bool:
    """Tell if `transformers` loads the folder itself as it was read: each tensor, under its name, from mapped files."""
    files = request.files
    changed = request.left_out or request.made or request.narrowed or request.disable_mmap
    renamed = files.renamed or files.of_layers
    names = {tensor.file for tensor in files.tensors.values()}
    as_saved = names == {SINGLE} or (SINGLE not in names and (files.folder / INDEX).is_file())
    return as_saved and not changed and not renamed


def from_pretrained(request: Request, **options: Any) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained` with what every backend passes: local safetensors, no remote code."""
    from transformers import AutoModelForCausalLM

    options = {
        "config": request.config,
        **options,
        "dtype": request.dtype,
        "device_map": dict(request.device_map),
        "attn_implementation": request.attention,
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    files, mapped = request.files, not request.disable_mmap
    if request.own_head:
        return load_with_own_head(files, mapped=mapped, **options)
    # transformers itself has to read a folder of which it puts modules on "disk". It reads one that is as it writes it.
    if "disk" in request.device_map.values() or _is_plain(request):
        if holds_both(files.folder):  # or transformers would put that adapter on the model
            options["adapter_kwargs"] = {"subfolder": _NO_ADAPTER}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(files.folder, **options)
        return model
    made, narrowed = request.made, request.narrowed
    return load_without(files, request.left_out, mapped=mapped, made=made, narrowed=narrowed, **options)
