"""`load()`: plan first, refuse early, then build exactly what was planned."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qwen_vram.arithmetic.adapter import adapter_folder
from qwen_vram.arithmetic.architecture import Architecture
from qwen_vram.arithmetic.model import ModelLike
from qwen_vram.arithmetic.profile import Profile
from qwen_vram.arithmetic.weights import head_is_a_copy, table_on_host
from qwen_vram.errors import BackendUnavailableError, NotSupportedError
from qwen_vram.planning.budget import VramLike
from qwen_vram.planning.planner import Plan, plan
from qwen_vram.planning.search import Prefer
from qwen_vram.runtime import attention
from qwen_vram.runtime.adapter import add_adapter, check_adapter, check_peft
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.base import Backend, Request
from qwen_vram.runtime.checkpoint import Checkpoint, open_checkpoint
from qwen_vram.runtime.host_embedding import move_embedding_to_host
from qwen_vram.runtime.loaded import LoadedModel
from qwen_vram.runtime.measure import PeakMeter, weight_storages
from qwen_vram.runtime.verify import verify as check_plan

_LOGGER = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Knobs that the estimator counts and nothing here runs yet: their values that do run.
_RUNS: dict[str, tuple[object, ...]] = {
    "streamed_layers": (0,),
    "compiled": (False,),
}


def load(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    vram: VramLike = None,
    ram: str | int | None = None,
    prefer: Prefer = "quality",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    adapter: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    verify: bool = False,
    **knobs: object,
) -> LoadedModel:
    """Load a checkpoint as `plan()` would, with the same arguments, and return it with its plan.

    The plan is made and checked before a file is downloaded or a byte allocated. Without a GPU the model is loaded on
    the CPU. `model, tokenizer = load(...)` unpacks.

    Args:
        model: A checkpoint folder, a catalog name, or a hub id.
        vram: As for `plan()`; needs a GPU.
        adapter: Folder or hub id of a LoRA adapter, run beside the base by PEFT; the model is then a `PeftModel`.
        device: `"cuda"` or `"cpu"`; `None` takes the GPU where there is one.
        progress: Show transformers' bar while weights load.
        verify: Run one prefill of `prompt_len` random tokens and one decode step before returning.

    Raises:
        DoesNotFitError: no plan fits, or the one asked for does not.
        NotSupportedError: a knob that is counted but cannot be run yet, or a combination that cannot.
        BackendUnavailableError: a library, or the GPU that was asked for, is not here.
        CheckpointError, ConfigError, HubError: the checkpoint cannot be used.
        PlanNotHeldError: `verify=True`, and what was loaded takes more than was planned.
        UnknownNameError, UnitError, WorkloadError: as for `plan()`.
    """
    place = _device(device, vram)
    if place.type == "cuda" and profile == "auto" and torch.cuda.get_device_capability(place) < (8, 0):
        knobs.setdefault("attention", "sdpa")  # the flash kernel begins with Ampere
    chosen = plan(
        model,
        profile=profile,
        vram={} if place.type == "cpu" else vram,
        ram=ram,
        prefer=prefer,
        prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        adapter=adapter,
        **knobs,
    )
    backend = get_backend(chosen.profile.weights)
    check(chosen, backend, place)
    if adapter is not None:
        check_peft()
        assert chosen.estimate.architecture is not None
        check_adapter(adapter_folder(adapter), chosen.estimate.architecture, chosen.profile)
    llm = _build(open_checkpoint(model), chosen, backend, place, adapter, progress)
    if verify:
        try:
            check_plan(llm)
        except BaseException:
            llm.close()
            raise
    return llm


def _device(device: str | None, vram: VramLike) -> torch.device:
    """Where to load: the GPU where there is one, unless the caller says otherwise."""
    if device not in (None, "cpu", "cuda"):
        raise BackendUnavailableError(f"unknown device {device!r}; choose from cuda, cpu", backend=str(device))
    wanted = device == "cuda" or (device is None and vram not in (None, {}))
    if torch.cuda.is_available() and device != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    if wanted:
        asked = f"vram={vram!r}" if device is None else f"device={device!r}"
        raise BackendUnavailableError(
            f"{asked} asks for a GPU, and torch sees none here; leave it out to load on the CPU, or install a torch "
            "built for CUDA",
            backend="cuda",
        )
    return torch.device("cpu")


def check(chosen: Plan, backend: Backend, device: torch.device) -> None:
    """Refuse by name what cannot be run here, before anything is allocated.

    Raises:
        NotSupportedError: a knob without its mechanism, or a combination.
        BackendUnavailableError: a missing library or GPU feature.
    """
    profile = chosen.profile
    for knob, runs in _RUNS.items():
        value = getattr(profile, knob)
        if value not in runs:
            raise NotSupportedError(
                f"{knob}={value!r} is counted by estimate_vram() but cannot be loaded yet; use {knob}={runs[0]!r}",
                knob=knob,
                value=value,
            )
    architecture = chosen.estimate.architecture
    assert architecture is not None
    _check_tied(profile, architecture)
    backend.check(profile, device)
    if profile.attention == "fused":
        reason = attention.kernel_runs(_dtype(profile, device), architecture.head_dim, device)
        if reason:
            raise NotSupportedError(
                f"attention='fused' cannot run: {reason}; use attention='sdpa'", knob="attention", value="fused"
            )
    if profile.attention == "flash_attention_2":
        _check_flash_attention_2(device)


def _check_tied(profile: Profile, architecture: Architecture) -> None:
    """Refuse a quantized head that a quantized checkpoint has not; say it where a shared head keeps the table."""
    if head_is_a_copy(architecture, profile) and architecture.stored_format is not None:
        raise NotSupportedError(
            f"lm_head={profile.lm_head!r}: this checkpoint's head is its token table (tie_word_embeddings), which is "
            "stored in 16 bits; load the 16-bit checkpoint, whose table is quantized into a head of its own",
            knob="lm_head",
            value=profile.lm_head,
        )
    if profile.embeddings == "host" and not table_on_host(architecture, profile):
        _LOGGER.warning(
            "embeddings='host' leaves the token table where it is: it is this model's head too (tie_word_embeddings); "
            "with quantized weights, lm_head in their format is a head of its own, and the table goes to the host"
        )


def _check_flash_attention_2(device: torch.device) -> None:
    install = "pip install flash-attn --no-build-isolation"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise BackendUnavailableError(
            "attention='flash_attention_2' needs a GPU of the Ampere generation or newer; use attention='fused' or "
            "'sdpa'",
            backend="flash-attn",
        )
    if find_spec("flash_attn") is None:
        raise BackendUnavailableError(
            f"attention='flash_attention_2' needs flash-attn, which is not installed; run: {install}, or use "
            "attention='fused', which runs torch's own flash kernel",
            backend="flash-attn",
            install=install,
        )


def _dtype(profile: Profile, device: torch.device) -> torch.dtype:
    """The model's dtype: fp16 in bf16's place where the GPU has no bf16."""
    if profile.dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        _LOGGER.warning("this GPU has no bf16 (compute capability below 8.0): the model runs in fp16, of the same size")
        return torch.float16
    return _DTYPES[profile.dtype]


def _build(
    checkpoint: Checkpoint,
    chosen: Plan,
    backend: Backend,
    device: torch.device,
    adapter: str | Path | None,
    progress: bool,
) -> LoadedModel:
    from transformers import AutoTokenizer

    profile = chosen.profile
    attention.register()
    on_host = chosen.placement.embeddings == "cpu" and device.type != "cpu"
    where: dict[str, int | str] = {"": "cpu" if device.type == "cpu" else device.index}
    request = Request(
        folder=str(checkpoint.folder),
        profile=profile,
        device=device,
        dtype=_dtype(profile, device),
        device_map=_embedding_first(chosen, device) if on_host else where,
        attention=attention.NAME if profile.attention == "fused" else profile.attention,
        stored=checkpoint.architecture.stored_format is not None,
        own_head=head_is_a_copy(checkpoint.architecture, profile),
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    meter = PeakMeter(device)
    meter.start()
    with _progress_bar(progress):
        model = backend.load(request)
    if on_host:
        _forget_second_device(model, where)
    if table_on_host(checkpoint.architecture, profile):
        move_embedding_to_host(model, device)
    if profile.dequantization == "tiled" and backend.name == "bnb":
        from qwen_vram.runtime.tiled_linear import dequantize_in_tiles

        dequantize_in_tiles(model)
    if adapter is not None:
        model = add_adapter(model, adapter_folder(adapter), request.dtype)
    model.eval()
    measured = meter.stop()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # a segment that held what was quantized would never be whole again
    load_peak = {"load_peak": measured["peak_allocated"] - meter.before} if measured else {}
    weights = sum(weight_storages(model, backend).values())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        plan=chosen,
        device=device,
        measured={"weights": weights, **load_peak},
        folder=checkpoint.folder,
    )


def _forget_second_device(model: Any, where: dict[str, int | str]) -> None:
    """Take off the hooks that `transformers` puts on a model with two devices: ours moves rows, not tables."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    model.hf_device_map = where


def _embedding_first(chosen: Plan, device: torch.device) -> dict[str, int | str]:
    """The plan's device map with everything but the token table on `device`."""
    return {name: "cpu" if where == "cpu" else device.index for name, where in chosen.device_map.items()}


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if was_shown else logging.disable_progress_bar)()
