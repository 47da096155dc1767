"""Table of rules: knobs that exclude each other or run only on some machines.

`Profile` reads the rules of scope "profile", the planner those of "anywhere" and "several GPUs". `runtime.loading` adds
rows of scope "this machine", about devices and libraries. Of rules that are broken, the first one is the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_vram.dtypes import BY_NAME
from qwen_vram.errors import NotSupportedError, WorkloadError
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import BLOCK, FORMATS, PACKED_ROWS, is_packed
from qwen_vram.spec.layers import Weight
from qwen_vram.spec.rules.rule import Rule, broken

if TYPE_CHECKING:
    from qwen_vram.spec.rules.rule import Knobs

# Knob values that a captured decode step can run with. All others wait for the host, or for another kernel.
CAPTURED: dict[str, object] = {"attention": "fused", "kv_device": "device", "host_layers": 0}
# Knob values that a compiled decode step can run with.
COMPILED: dict[str, object] = {**CAPTURED, "kv_cache": "bf16", "streamed_layers": 0, "embeddings": "device"}
# Knobs that work on one GPU only, and the values that turn them off.
ONE_GPU: dict[str, object] = {"streamed_layers": 0, "captured": False, "compiled": False}
# Knob values that batched requests over pages run with.
PAGED: dict[str, object] = {"kv_cache": "bf16", "kv_device": "device", "streamed_layers": 0, "compiled": False}


def for_one_gpu(knobs: Mapping[str, object]) -> bool:
    """Tell if knobs turn something on that works on one GPU only."""
    return knobs.get("cache") == "paged" or any(knobs.get(knob, off) != off for knob, off in ONE_GPU.items())


class Model(NamedTuple):
    """A model that is to run in a profile."""

    architecture: Architecture
    profile: Knobs


class Split(NamedTuple):
    """A profile that is to run over several GPUs."""

    profile: Knobs
    gpus: int


def check_profile(profile: Knobs) -> None:
    """Refuse knobs that exclude each other.

    Raises:
        WorkloadError: two knobs exclude each other.
    """
    rule = broken(PROFILE_RULES, profile)
    if rule is not None:
        raise WorkloadError(rule.message(profile), name=rule.knob, got=getattr(profile, rule.knob))


def check_split(profile: Knobs, gpus: int) -> None:
    """Refuse a knob that works on one GPU only.

    Raises:
        NotSupportedError: the profile has such a knob.
    """
    split = Split(profile, gpus)
    rule = broken(SEVERAL_GPU_RULES, split)
    if rule is not None:
        raise NotSupportedError(rule.message(split), knob=rule.knob, value=getattr(profile, rule.knob))


def _paged(knob: str, runs: object) -> Rule[Knobs]:
    """A rule of a knob that pages exclude."""
    return Rule(
        lambda profile: profile.cache == "paged" and getattr(profile, knob) != runs,
        knob,
        lambda profile: (
            f"concurrent requests (cache='paged') need {knob}={runs!r}, got {knob}={getattr(profile, knob)!r}; change "
            "one of the two"
        ),
        "profile",
    )


def _captures(knob: str, runs_with: dict[str, object]) -> tuple[Rule[Knobs], ...]:
    """Rules of captured or compiled decode steps; `knob` is `"captured"` or `"compiled"`."""

    def asked(profile: Knobs) -> bool:
        return bool(getattr(profile, knob)) and (knob == "compiled" or not profile.compiled)

    def others(profile: Knobs) -> dict[str, object]:
        return {name: runs for name, runs in runs_with.items() if getattr(profile, name) != runs}

    def named(profile: Knobs) -> str:
        needs = ", ".join(f"{name}={runs!r}" for name, runs in others(profile).items())
        got = ", ".join(f"{name}={getattr(profile, name)!r}" for name in others(profile))
        return f"{knob}=True needs {needs}, got {got}; change one side, or begin with profile='speed'"

    return (
        Rule(
            lambda profile: asked(profile) and profile.cache == "dynamic",
            knob,
            lambda profile: (
                f"{knob}=True needs a cache of fixed size, got cache='dynamic'; set cache='static', or begin with "
                "profile='speed'"
            ),
            "profile",
        ),
        Rule(lambda profile: asked(profile) and bool(others(profile)), knob, named, "profile"),
        Rule(
            lambda profile: (
                asked(profile) and any(FORMATS[name].has_outliers for name in (profile.weights, profile.head_format))
            ),
            knob,
            lambda profile: (
                f"{knob}=True cannot go with 'int8', whose products wait for the GPU to count outliers; use 'int8-wo'"
            ),
            "profile",
        ),
    )


PROFILE_RULES: tuple[Rule[Knobs], ...] = (
    *(_paged(knob, runs) for knob, runs in PAGED.items()),
    Rule(
        lambda profile: profile.disk_layers > profile.streamed_layers,
        "disk_layers",
        lambda profile: (
            f"disk_layers {profile.disk_layers} is more than streamed_layers {profile.streamed_layers}, of which it is "
            "a part; stream at least that many"
        ),
        "profile",
    ),
    Rule(
        lambda profile: profile.host_layers > profile.streamed_layers - profile.disk_layers,
        "host_layers",
        lambda profile: (
            f"host_layers {profile.host_layers} is more than the {profile.streamed_layers - profile.disk_layers} of "
            f"streamed_layers {profile.streamed_layers} that are not on the disk, of which it is a part; stream more"
        ),
        "profile",
    ),
    Rule(
        lambda profile: profile.kv_format.is_quantized and profile.cache != "preallocated",
        "kv_cache",
        lambda profile: (
            f"kv_cache={profile.kv_format.name!r} needs cache='preallocated', got cache={profile.cache!r}; set both"
        ),
        "profile",
    ),
    Rule(
        lambda profile: profile.kv_device == "host" and profile.cache != "preallocated",
        "kv_device",
        lambda profile: f"kv_device='host' needs cache='preallocated', got cache={profile.cache!r}; set both",
        "profile",
    ),
    Rule(
        lambda profile: profile.kv_device == "host" and profile.kv_format.is_quantized,
        "kv_device",
        lambda profile: (
            f"kv_device='host' needs kv_cache='bf16', got kv_cache={profile.kv_format.name!r}; change one of the two"
        ),
        "profile",
    ),
    *_captures("captured", CAPTURED),
    Rule(
        lambda profile: (
            profile.captured and not profile.compiled and profile.kv_format.is_quantized and profile.kernels != "fused"
        ),
        "captured",
        lambda profile: (
            f"captured=True with kv_cache={profile.kv_format.name!r} needs kernels='fused', got kernels="
            f"{profile.kernels!r}; change one side"
        ),
        "profile",
    ),
    *_captures("compiled", COMPILED),
)


def _has_own_head(model: Model) -> bool:
    return model.profile.head_format != model.profile.dtype


def may_be_on_disk(architecture: Architecture, profile: Knobs) -> bool:
    """Tell if a checkpoint's files hold the layers in the format of `profile`, and not in another one."""
    if architecture.stored_format is None:
        as_stored = set(architecture.layer_dtypes) <= {BY_NAME[profile.dtype].stored}
        return FORMATS[profile.weights].is_dense and as_stored
    return FORMATS[architecture.stored_format].is_bnb


def _not_on_disk(model: Model) -> bool:
    return model.profile.disk_layers > 0 and not may_be_on_disk(*model)


def _unpacked(model: Model) -> Weight | None:
    """The first matrix of a layer that the CPU's 4-bit kernel does not accept."""
    matrices = (weight for layer, _ in model.architecture.kinds for weight in layer.linears.values())
    return next((weight for weight in matrices if not is_packed(weight.shape)), None)


def _kernel_takes(model: Model) -> str:
    weight = _unpacked(model)
    assert weight is not None
    rows, columns = weight.shape
    return (
        f"the CPU's kernel takes matrices whose rows are a multiple of {PACKED_ROWS} and whose columns are one of "
        f"{BLOCK}, got {rows:,} x {columns:,} ({weight.name}); use host_layers=0"
    )


def _computes(model: Model) -> bool:
    return model.profile.host_layers > 0


# Rules that hold on every machine, with any packages.
ANYWHERE_RULES: tuple[Rule[Model], ...] = (
    Rule(
        lambda model: FORMATS[model.profile.weights].is_gptqmodel and model.architecture.stored_format is None,
        "weights",
        lambda model: (
            "GPTQ's codes cannot be made of a 16-bit checkpoint while it loads, for they depend on what the model "
            "computes from sample texts. Quantize it once: qwen-vram quantize MODEL OUT --weights "
            f"{model.profile.weights} --calibration texts.txt, or qv.quantize_gptq(MODEL, OUT, calibration=texts, "
            f"bits={FORMATS[model.profile.weights].bits}); then load OUT, or use weights='int4'"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _has_own_head(model) and FORMATS[model.profile.weights].is_dense,
        "lm_head",
        lambda model: (
            f"a {'' if FORMATS[model.profile.head_format].is_dense else 'quantized '}head of its own needs quantized "
            "weights of the same format; leave lm_head out, or set weights too"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _has_own_head(model) and model.profile.head_format != model.profile.weights,
        "lm_head",
        lambda model: (
            f"a model is quantized to one format; use lm_head={model.profile.weights!r}, or leave one of the two out"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _has_own_head(model) and FORMATS[model.profile.weights].is_gptqmodel,
        "lm_head",
        lambda model: (
            f"a head that {model.profile.weights} quantized too is not loaded by transformers; use a checkpoint whose "
            "head is in 16 bits, as most are"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: model.profile.streamed_layers > 0 and not FORMATS[model.profile.weights].streams,
        "streamed_layers",
        lambda model: (
            "layers in that format do not stream; use streamed_layers=0, or weights that do: "
            f"{', '.join(name for name, storage in FORMATS.items() if storage.streams)}"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _not_on_disk(model) and FORMATS[model.profile.weights].is_dense,
        "disk_layers",
        lambda model: (
            f"a layer is stored as {', '.join(model.architecture.layer_dtypes)} and runs in {model.profile.dtype}; "
            "what stays on the disk is used as it is stored: choose weights in that dtype, or use disk_layers=0"
        ),
        "anywhere",
    ),
    Rule(
        _not_on_disk,
        "disk_layers",
        lambda model: (
            "such layers are made of this checkpoint's 16-bit ones while it loads, and are in no file; quantize it "
            f"once (qwen-vram quantize MODEL OUT --weights {model.profile.weights}) and load OUT, or use disk_layers=0"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _computes(model) and bool(model.architecture.adapted),
        "host_layers",
        lambda model: (
            "an adapter's matrices are on the device; merge it first (qwen-vram merge), or use host_layers=0, and the "
            "layers stream"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _computes(model) and FORMATS[model.profile.weights].has_outliers,
        "host_layers",
        lambda model: (
            "bitsandbytes has no fused product in 8 bits for the CPU; use weights in 4 or 16 bits, or host_layers=0"
        ),
        "anywhere",
    ),
    Rule(
        lambda model: _computes(model) and FORMATS[model.profile.weights].is_bnb_4bit and _unpacked(model) is not None,
        "host_layers",
        _kernel_takes,
        "anywhere",
    ),
)


def _one_gpu(knob: str, off: object) -> Rule[Split]:
    return Rule(
        lambda split: bool(getattr(split.profile, knob) != off),
        knob,
        lambda split: (
            f"{knob}={getattr(split.profile, knob)!r} over {split.gpus} GPUs cannot be loaded yet; use {knob}={off!r}, "
            "or one GPU"
        ),
        "several GPUs",
    )


SEVERAL_GPU_RULES = (
    Rule[Split](
        lambda split: split.profile.cache == "paged",
        "cache",
        lambda split: f"concurrent requests (cache='paged') over {split.gpus} GPUs cannot be loaded yet; use one GPU",
        "several GPUs",
    ),
    *(_one_gpu(knob, off) for knob, off in ONE_GPU.items()),
)

RULES: tuple[Rule[Any], ...] = (*PROFILE_RULES, *ANYWHERE_RULES, *SEVERAL_GPU_RULES)
