"""The profile: a frozen object of all knobs, shared by estimator and loader."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

from qwen_vram.errors import UnknownNameError, WorkloadError
from qwen_vram.spec.formats import FORMAT_NAMES, FORMATS, FormatName
from qwen_vram.spec.kv_formats import KV_FORMAT_NAMES, KvFormat, KvFormatName, kv_format
from qwen_vram.spec.rules.table import check_profile

Device = Literal["device", "host"]
CacheKind = Literal["preallocated", "dynamic", "static", "paged"]
Dequantization = Literal["whole", "tiled"]
Attention = Literal["fused", "sdpa", "flash_attention_2", "eager"]
Kernels = Literal["plain", "fused"]

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": FORMAT_NAMES,
    "embeddings": get_args(Device),
    "kv_cache": KV_FORMAT_NAMES,
    "kv_device": get_args(Device),
    "cache": get_args(CacheKind),
    "attention": get_args(Attention),
    "kernels": get_args(Kernels),
}
CHOICES_OR_NONE: dict[str, tuple[str, ...]] = {"lm_head": FORMAT_NAMES, "dequantization": get_args(Dequantization)}

# Knobs that are numbers, with the least value of each.
COUNTS = {"prefill_chunk_size": 1, "streamed_layers": 0, "host_layers": 0, "disk_layers": 0}


class Knob(NamedTuple):
    """One knob of a profile. The docstring of `Profile` describes each of them.

    Attributes:
        default: Its value in a profile that does not name it.
        choices: The names that it accepts; empty for numbers and flags.
        least: The least number that it accepts; `None` for names and flags.
        may_be_none: It accepts `None`.
    """

    name: str
    default: object
    choices: tuple[str, ...]
    least: int | None
    may_be_none: bool

    def check(self, value: object) -> None:
        """Refuse a value that is not valid for the knob.

        Raises:
            UnknownNameError: a name that is not one of the choices, or a value that is not a flag.
            WorkloadError: a number out of range.
        """
        if value is None and self.may_be_none:
            return
        if self.choices:
            if value not in self.choices:
                raise UnknownNameError(f"{self.name} in profile", value, self.choices)
        elif self.least is None:
            if not isinstance(value, bool):
                raise UnknownNameError(f"{self.name} in profile", value, ("True", "False"))
        elif isinstance(value, bool) or not isinstance(value, int) or value < self.least:
            what = (
                "a positive number of tokens or None" if self.may_be_none else f"a number of layers from {self.least}"
            )
            raise WorkloadError(f"{self.name} must be {what}, got {value!r}", name=self.name, got=value)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Storage formats, locations, and kernels of attention and prefill. It names no model, workload or budget.

    Attributes:
        name: Its name in `PROFILES`, or `"custom"`.
        weights: Storage format of the matrices of attention and MLP.
        lm_head: Storage format of the head; `None` is the model's own dtype. With tied embeddings, a head in another
            format is a separate copy.
        embeddings: Location of the token embeddings. On the host, rows are gathered there.
        kv_cache: Element format of keys and values; `"bf16"` is the model's own dtype.
        kv_device: Location of the cache. On the host, each layer's part is copied to the device one layer ahead.
        cache: `"dynamic"` grows by concatenation; `"preallocated"` and `"static"` allocate the whole context at once.
            `"paged"` allocates pages for `batch_size` requests, which run together and come and go independently.
        attention: The attention function. `"fused"` neither repeats keys and values for each head nor builds a mask.
        kernels: The kernels between a layer's matrix products. `"fused"`: norms, rotary embedding and SwiGLU are one
            kernel each, and sums and products are written into the memory of one of their terms.
        prefill_chunk_size: Prompt tokens of a sequence in one forward pass; `None` is the whole prompt.
        dequantization: The method for products of a bitsandbytes matrix with the rows of a prefill. In 4 bits,
            `"whole"` makes the whole matrix in 16 bits beside the result, and `"tiled"` one tile after the other. In
            int8, `"whole"` takes all outlier columns of the data at once, and `"tiled"` uses tiles of a fixed size.
            `None` is whole in 4 bits and tiled in int8.
        streamed_layers: The number of decoder layers that stay on the host and pass through two or three slots on the
            device.
        host_layers: The number of streamed layers that compute on the CPU in steps of few rows, such as decode steps of
            few sequences. They cross the link for a prefill only.
        disk_layers: The number of streamed layers that stay in the checkpoint's files, and are read for every token.
        captured: Decode steps are captured as a CUDA graph, with a cache that is allocated at load and stays.
        compiled: Decode steps are compiled by torch, and also captured.
    """

    name: str = "custom"
    weights: FormatName = "bf16"
    lm_head: FormatName | None = None
    embeddings: Device = "device"
    kv_cache: KvFormatName = "bf16"
    kv_device: Device = "device"
    cache: CacheKind = "dynamic"
    attention: Attention = "sdpa"
    kernels: Kernels = "plain"
    prefill_chunk_size: int | None = None
    dequantization: Dequantization | None = None
    streamed_layers: int = 0
    host_layers: int = 0
    disk_layers: int = 0
    captured: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        """Refuse values that are not valid, and knobs that exclude each other."""
        for knob in KNOBS.values():
            knob.check(getattr(self, knob.name))
        check_profile(self)

    @property
    def captures(self) -> bool:
        """Tell if decode steps are captured as a CUDA graph, as compiled ones also are."""
        return self.captured or self.compiled

    @property
    def kv_format(self) -> KvFormat:
        """The row of the cache's element format."""
        return kv_format(self.kv_cache)

    @property
    def dtype(self) -> FormatName:
        """The model's own dtype: of activations, norms, biases, and all weights that are not quantized."""
        return self.weights if FORMATS[self.weights].is_dense else "bf16"

    @property
    def tiles(self) -> bool:
        """Tell if products with bitsandbytes' matrices are tiled."""
        return self.dequantization == "tiled" or (self.dequantization is None and FORMATS[self.weights].has_outliers)

    @property
    def attends_whole(self) -> bool:
        """Tell if attention gets the whole cache, filled or not: a static one, but not in captured steps."""
        return self.cache == "static" and not self.captures

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the model's own dtype."""
        return FORMATS[self.dtype].bits // 8

    @property
    def head_format(self) -> FormatName:
        """Storage format of the head."""
        return self.lm_head or self.dtype

    def replace(self, **knobs: object) -> Profile:
        """Return this profile with some knobs changed.

        Raises:
            UnknownNameError: a knob or its value is unknown.
            WorkloadError: a number is out of range, or two knobs exclude each other.
        """
        for knob in knobs:
            if knob not in KNOBS:
                raise UnknownNameError("knob", knob, tuple(KNOBS))
        return replace(self, name="custom", **knobs) if knobs else self  # type: ignore[arg-type]


def _knob(name: str, default: object) -> Knob:
    choices = {**CHOICES, **CHOICES_OR_NONE}.get(name, ())
    may_be_none = name in CHOICES_OR_NONE or default is None
    return Knob(name, default, choices, COUNTS.get(name), may_be_none)


KNOBS = {field.name: _knob(field.name, field.default) for field in fields(Profile) if field.name != "name"}

PROFILES: dict[str, Profile] = {
    row.name: row
    for row in (
        # The article's row 1: a plain from_pretrained and generate.
        Profile(name="default"),
        # Its row 2: NF4 with double quantization; torch's flash kernel replaces the flash-attn package.
        Profile(
            name="int4-flash",
            weights="nf4",
            attention="fused",
            kernels="fused",
            cache="preallocated",
            dequantization="tiled",
        ),
        # Its row 3: three layers on the host.
        Profile(name="cpu-offload", attention="fused", kernels="fused", cache="preallocated", streamed_layers=3),
        # Its advice for 12 to 16 GB: a split of the layers and a tuned KV cache.
        Profile(
            name="split-kv",
            attention="fused",
            kernels="fused",
            cache="preallocated",
            kv_cache="int8",
            streamed_layers=12,
            prefill_chunk_size=2048,
        ),
        Profile(
            name="compact",
            weights="nf4",
            lm_head="nf4",
            embeddings="host",
            attention="fused",
            kernels="fused",
            cache="preallocated",
            prefill_chunk_size=512,
            dequantization="tiled",
        ),
        Profile(
            name="speed",
            weights="int4",
            lm_head="int4",
            attention="fused",
            kernels="fused",
            cache="static",
            compiled=True,
        ),
        Profile(
            name="tiny",
            weights="nf4",
            lm_head="nf4",
            embeddings="host",
            attention="fused",
            kernels="fused",
            cache="preallocated",
            kv_cache="int8",
            streamed_layers=20,
            prefill_chunk_size=512,
            dequantization="tiled",
        ),
    )
}


_AUTO = "'auto' is for plan() and load(), which know a budget"


def resolve_profile(profile: str | Profile, **knobs: object) -> Profile:
    """Return the profile called `profile`, or `profile` itself, with `knobs` changed.

    Raises:
        UnknownNameError: no such profile, knob or value.
        WorkloadError: a number is out of range, or two knobs exclude each other.
    """
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise UnknownNameError("profile", profile, tuple(PROFILES), hint=_AUTO)
        profile = PROFILES[profile]
    elif not isinstance(profile, Profile):
        raise UnknownNameError("profile", profile, tuple(PROFILES), hint=f"or pass a Profile; {_AUTO}")
    return profile.replace(**knobs)
