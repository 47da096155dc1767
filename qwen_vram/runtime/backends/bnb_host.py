"""What of bitsandbytes' formats this machine's CPU multiplies where it lies."""

from __future__ import annotations

from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.storage import FORMATS
from qwen_vram.arithmetic.weights import MAXIMUM_OF, PACKED_ROWS, is_packed
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.runtime.cpu_product import kernel_library


def check_kernel(profile: Profile, architecture: Architecture) -> None:
    """Refuse int8, a CPU without the kernel, and matrices that it cannot take.

    Raises:
        NotSupportedError: the format or a shape.
        BackendUnavailableError: the CPU, or a package without its library.
    """
    asked = f"host_layers={profile.host_layers} with weights={profile.weights!r}"
    if FORMATS[profile.weights].bits != 4:
        raise NotSupportedError(
            f"{asked}: bitsandbytes has no fused product in 8 bits for the CPU; use weights in 4 or 16 bits, or "
            "host_layers=0",
            knob="host_layers",
            value=profile.host_layers,
        )
    for weight in architecture.block:
        if weight.is_linear and not is_packed(weight):
            rows, columns = weight.shape
            raise NotSupportedError(
                f"{asked}: the CPU's kernel takes matrices whose rows are a multiple of {PACKED_ROWS} and whose "
                f"columns are one of {MAXIMUM_OF}, got {rows:,} x {columns:,} ({weight.name}); use host_layers=0",
                knob="host_layers",
                value=profile.host_layers,
            )
    if kernel_library() is None:
        raise BackendUnavailableError(
            f"{asked}: bitsandbytes' fused 4-bit kernel needs a CPU with AVX512-BF16 and its CPU library, and one of "
            "them is not here; use host_layers=0, and the layers stream",
            backend="bnb",
        )
