"""The profile: a frozen object of all knobs, shared by estimator and loader."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from qwen_vram.errors import UnknownNameError, WorkloadError
from qwen_vram.spec.formats import FORMAT_NAMES, FORMATS, FormatName

Device = Literal["device", "host"]
KvFormat = Literal["bf16", "int8", "int4"]
CacheKind = Literal["preallocated", "dynamic", "static"]
Dequantization = Literal["whole", "tiled"]
Attention = Literal["fused", "sdpa", "flash_attention_2", "eager"]
Kernels = Literal["plain", "fused"]

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": FORMAT_NAMES,
    "embeddings": get_args(Device),
    "kv_cache": get_args(KvFormat),
    "kv_device": get_args(Device),
    "cache": get_args(CacheKind),
    "attention": get_args(Attention),
    "kernels": get_args(Kernels),
}
CHOICES_OR_NONE: dict[str, tuple[str, ...]] = {"lm_head": FORMAT_NAMES, "dequantization": get_args(Dequantization)}

# What a captured decode step can run with: all else waits for the host, or for another kernel.
CAPTURED: dict[str, object] = {
    "attention": "fused",
    "kv_cache": "bf16",
    "kv_device": "device",
    "streamed_layers": 0,
}
# What a compiled one can run with.
COMPILED: dict[str, object] = {**CAPTURED, "embeddings": "device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is stored how and where, and how attention and prefill run. Knows no model, workload or budget.

    Attributes:
        name: Its name in `PROFILES`, or `"custom"`.
        weights: Storage format of the matrices of attention and MLP.
        lm_head: Storage format of the head; `None` is the model's own dtype. With tied embeddings a head of another
            format is a copy of its own.
        embeddings: Where the token table lives. On the host, rows are gathered there.
        kv_cache: Element format of keys and values; `"bf16"` is the model's own dtype.
        kv_device: Where the cache lives. On the host, one layer ahead is brought to the device.
        cache: `"dynamic"` grows by concatenation, `"preallocated"` and `"static"` take the whole context at once.
        attention: The attention function; `"fused"` expands no heads and builds no mask.
        kernels: What runs between a layer's matrix products. `"fused"`: norms, rotary embedding and SwiGLU are one
            kernel each, and sums and products go into the memory of one of their terms.
        prefill_chunk_size: Prompt tokens a sequence feeds at once; `None` is the whole prompt.
        dequantization: How a matrix of bitsandbytes meets the rows of a prefill. In 4 bits: the `"whole"` matrix in 16
            bits beside the result, or `"tiled"`, one tile of it after the other. In int8: all outlier columns at once,
            as many as the data has, or by tiles of a fixed size. `None` is whole in 4 bits and tiled in int8.
        streamed_layers: Decoder layers that stay on the host and pass through two slots on the device.
        host_layers: How many of them compute on the CPU in steps of few rows, as decode steps of few sequences are, and
            cross the link for a prefill alone.
        disk_layers: How many of them stay in the checkpoint's files, and are read for every token.
        captured: Decode steps are captured as a CUDA graph, over a cache that is taken at load and stays.
        compiled: Decode steps are compiled by torch, and captured too.
    """

    name: str = "custom"
    weights: FormatName = "bf16"
    lm_head: FormatName | None = None
    embeddings: Device = "device"
    kv_cache: KvFormat = "bf16"
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
        """Refuse every value that no part of the library knows."""
        for knob, allowed in CHOICES.items():
            value = getattr(self, knob)
            if value not in allowed:
                raise UnknownNameError(f"{knob} in profile", value, allowed)
        for knob, allowed in CHOICES_OR_NONE.items():
            value = getattr(self, knob)
            if value is not None and value not in allowed:
                raise UnknownNameError(f"{knob} in profile", value, allowed)
        chunk = self.prefill_chunk_size
        if chunk is not None and not _is_count(chunk, 1):
            raise WorkloadError(
                f"prefill_chunk_size must be a positive number of tokens or None, got {chunk!r}",
                name="prefill_chunk_size",
                got=chunk,
            )
        for knob in ("streamed_layers", "host_layers", "disk_layers"):
            layers = getattr(self, knob)
            if not _is_count(layers, 0):
                raise WorkloadError(f"{knob} must be a number of layers from 0, got {layers!r}", name=knob, got=layers)
        if self.disk_layers > self.streamed_layers:
            raise WorkloadError(
                f"disk_layers {self.disk_layers} is more than streamed_layers {self.streamed_layers}, of which it is a "
                "part; stream at least that many",
                name="disk_layers",
                got=self.disk_layers,
            )
        if self.host_layers > self.streamed_layers - self.disk_layers:
            raise WorkloadError(
                f"host_layers {self.host_layers} is more than the {self.streamed_layers - self.disk_layers} of "
                f"streamed_layers {self.streamed_layers} that are not on the disk, of which it is a part; stream more",
                name="host_layers",
                got=self.host_layers,
            )
        for knob in ("captured", "compiled"):
            if not isinstance(getattr(self, knob), bool):
                raise UnknownNameError(f"{knob} in profile", getattr(self, knob), ("True", "False"))
        if self.kv_cache != "bf16" and self.cache != "preallocated":
            raise WorkloadError(
                f"kv_cache={self.kv_cache!r} needs cache='preallocated', got cache={self.cache!r}; set both",
                name="kv_cache",
                got=self.kv_cache,
            )
        if self.kv_device == "host" and self.cache != "preallocated":
            raise WorkloadError(
                f"kv_device='host' needs cache='preallocated', got cache={self.cache!r}; set both",
                name="kv_device",
                got=self.kv_device,
            )
        if self.kv_device == "host" and self.kv_cache != "bf16":
            raise WorkloadError(
                f"kv_device='host' needs kv_cache='bf16', got kv_cache={self.kv_cache!r}; change one of the two",
                name="kv_device",
                got=self.kv_device,
            )
        if self.captures:
            self._check_captured("compiled" if self.compiled else "captured")

    def _check_captured(self, knob: str) -> None:
        """Refuse what steps that are captured (or compiled, by the name of the knob) cannot run with."""
        if self.cache == "dynamic":
            raise WorkloadError(
                f"{knob}=True needs a cache of fixed size, got cache='dynamic'; set cache='static', or begin with "
                "profile='speed'",
                name=knob,
                got=True,
            )
        runs_with = COMPILED if self.compiled else CAPTURED
        others = {name: runs for name, runs in runs_with.items() if getattr(self, name) != runs}
        if others:
            needs = ", ".join(f"{name}={runs!r}" for name, runs in others.items())
            got = ", ".join(f"{name}={getattr(self, name)!r}" for name in others)
            raise WorkloadError(
                f"{knob}=True needs {needs}, got {got}; change one side, or begin with profile='speed'",
                name=knob,
                got=True,
            )
        if "int8" in (self.weights, self.lm_head):
            raise WorkloadError(
                f"{knob}=True cannot go with 'int8', whose products wait for the GPU to count outliers; use 'int8-wo'",
                name=knob,
                got=True,
            )

    @property
    def captures(self) -> bool:
        """Tell if decode steps are captured as a CUDA graph: compiled ones are too."""
        return self.captured or self.compiled

    @property
    def dtype(self) -> FormatName:
        """The model's own dtype: activations, norms, biases, and whatever is not quantized."""
        return self.weights if FORMATS[self.weights].is_dense else "bf16"

    @property
    def tiles(self) -> bool:
        """Tell if matrices of bitsandbytes are multiplied by tiles."""
        return self.dequantization == "tiled" or (self.dequantization is None and self.weights == "int8")

    @property
    def attends_whole(self) -> bool:
        """Tell if attention gets the whole of a cache, filled or not: a static one, which captured steps do not use."""
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
        """This profile with some knobs changed.

        Raises:
            UnknownNameError: a knob or its value is not known.
            WorkloadError: a number is out of range, or two knobs exclude each other.
        """
        for knob in knobs:
            if knob not in KNOBS:
                raise UnknownNameError("knob", knob, KNOBS)
        return replace(self, name="custom", **knobs) if knobs else self  # type: ignore[arg-type]


def _is_count(value: object, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


KNOBS = tuple(field.name for field in fields(Profile) if field.name != "name")

PROFILES: dict[str, Profile] = {
    row.name: row
    for row in (
        # The article's row 1: what a plain from_pretrained and generate do.
        Profile(name="default"),
        # Its row 2: NF4 with double quantization; torch's flash kernel stands in for the flash-attn package.
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
        # Its advice for 12 to 16 GB: layer split and a tuned KV cache.
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
    """The profile called `profile`, or `profile` itself, with `knobs` changed.

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
