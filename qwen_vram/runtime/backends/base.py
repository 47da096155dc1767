"""The interface of quantization backends, and their common loading.

Bytes are counted in `spec.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from qwen_vram.checkpoints.adapters.folder import holds_both
from qwen_vram.checkpoints.checkpoint import CheckpointFiles
from qwen_vram.checkpoints.files.names import INDEX, SINGLE
from qwen_vram.runtime.tensors.partial_checkpoint import load_with_own_head, load_without

# A subfolder that does not exist. transformers looks there for an adapter, which it would load onto the model.
_NO_ADAPTER = "no adapter"

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qwen_vram.spec.architecture import Architecture
    from qwen_vram.spec.profile import Profile


class Request(NamedTuple):
    """The arguments of a backend's `load`.

    Attributes:
        files: The checkpoint's folder as it was read.
        config: The model's config, which `transformers` made from it.
        stored: The checkpoint is already in the profile's format.
        own_head: The head is tied to the embeddings, and is quantized into a separate tensor.
        late_head: The head is built after `load`, with the layers that stream.
        left_out: Parameters that `load` leaves on the meta device without reading them, by name, with their shapes.
        made: Tensors that the files lack and the model needs, by name.
        narrowed: Names of float32 tensors that are cast to `dtype` as they are read. `transformers` does not cast them
            in a checkpoint of bitsandbytes.
        disable_mmap: Files are read completely, not mapped.
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
    """Loader of checkpoints in the storage formats that it is registered for."""

    name: str

    def check(self, profile: Profile, device: torch.device) -> None:
        """Refuse profiles that cannot run here, before anything is allocated.

        Raises:
            BackendUnavailableError: a library or a GPU is missing.
            NotSupportedError: this backend cannot load the combination of knobs.
        """

    def load(self, request: Request) -> nn.Module:
        """Return a plain `transformers` model with its weights in the profile's formats, on the request's devices."""

    def storages(self, module: nn.Module) -> list[torch.Tensor]:
        """Return the tensors of `module`'s format beside its parameters, such as scales and code tables."""


@runtime_checkable
class SavingBackend(Backend, Protocol):
    """A backend whose models can be saved: `state_dict()` of each module is the content of its checkpoint."""

    def saved_config(self, model: nn.Module, profile: Profile) -> dict[str, Any]:
        """Return the `quantization_config` for config.json.

        Raises:
            NotSupportedError: a module no longer holds its quantized weights.
        """


@runtime_checkable
class StreamingBackend(Backend, Protocol):
    """A backend whose decoder layers can stream: it lists the tensors of a module, and replaces them."""

    def build(self, module: nn.Module, weights: Mapping[str, torch.Tensor], request: Request) -> nn.Module:
        """Return the module that replaces `module`, a leaf on the meta device, in the request's format.

        `weights` are its tensors as stored in the checkpoint, on the host: its parameters, and the other tensors under
        its name if the checkpoint is quantized. Tensors that are quantized now are quantized on the request's device,
        to the same bytes as by `load`. The others may stay on the host.
        """

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return all tensors that `module` computes with, by name: its parameters and those of `storages`."""

    def binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that makes `module` use these tensors, named as by `tensors()`, instead of its own.

        It is created before the module runs. It is called for every layer of every token, so it only assigns.
        """


@runtime_checkable
class HostBackend(StreamingBackend, Protocol):
    """A backend whose streamed layers can also compute on the CPU."""

    def check_host(self, profile: Profile, architecture: Architecture) -> None:
        """Refuse layers that cannot compute on this machine's CPU.

        Raises:
            BackendUnavailableError, NotSupportedError: the CPU, the format or a shape does not allow it.
        """

    def host_binding(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Return a call that replaces `module.forward` by one that computes with these tensors, all on the host.

        They are named as by `tensors()`. The parameters do not change, because a model's device is that of its first
        parameter. The attribute is removed when the layer is bound to a slot. Copies are counted in
        `arithmetic.weights`.
        """


def stored_config(request: Request) -> Any:
    """Return the `transformers` config of a quantized checkpoint; the head is not tied if the profile quantizes it."""
    if request.profile.lm_head is not None:
        request.config.tie_word_embeddings = False
    return request.config


def _is_plain(request: Request) -> bool:
    """Tell if `transformers` can load the folder itself: every tensor, under its own name, from mapped files."""
    files = request.files
    changed = request.left_out or request.made or request.narrowed or request.disable_mmap
    renamed = files.renamed or files.of_layers
    names = {tensor.file for tensor in files.tensors.values()}
    as_saved = names == {SINGLE} or (SINGLE not in names and (files.folder / INDEX).is_file())
    return as_saved and not changed and not renamed


def from_pretrained(request: Request, **options: Any) -> nn.Module:
    """Call `AutoModelForCausalLM.from_pretrained` with the options of all backends: local files, no remote code."""
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
    # transformers itself must read a folder if it puts modules on "disk". It can read a folder in its own format.
    if "disk" in request.device_map.values() or _is_plain(request):
        if holds_both(files.folder):  # or transformers would load that adapter
            options["adapter_kwargs"] = {"subfolder": _NO_ADAPTER}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(files.folder, **options)
        return model
    made, narrowed = request.made, request.narrowed
    return load_without(files, request.left_out, mapped=mapped, made=made, narrowed=narrowed, **options)
