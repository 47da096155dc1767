"""`estimate_vram()`: predict the memory and the times of a model before loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_vram.arithmetic.device_estimate import estimate
from qwen_vram.arithmetic.estimate import Estimate
from qwen_vram.checkpoints.machine_file import current
from qwen_vram.checkpoints.resolve import ModelLike, resolve_model, stored_knobs
from qwen_vram.errors import WorkloadError
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.profile import Profile, resolve_profile
from qwen_vram.spec.workload import Logits, Workload

if TYPE_CHECKING:
    from qwen_vram.checkpoints.adapters.folder import AdapterChoice


def estimate_vram(
    model: ModelLike | None,
    profile: str | Profile = "default",
    *,
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    params: float | None = None,
    logits: Logits = "last",
    padded: bool = False,
    concurrency: int | None = None,
    adapter: AdapterChoice = None,
    **knobs: object,
) -> Estimate:
    """Predict the memory and times of a model on one GPU, before it is loaded. The defaults are those of the article.

    Weights and cache are exact; docs/accuracy.md compares the other parts with measurements.

    Args:
        model: A catalog name, checkpoint folder, hub id (config.json, and headers if quantized), config `dict` or
            `Architecture`; or `None` with `params`.
        profile: A name from `PROFILES`, or a `Profile`.
        params: With `model=None`: a number of parameters, for the rule of thumb parameters x bytes (weights only).
        logits: `"last"` for generation, `"all"` for one plain forward pass that makes logits for the whole prompt.
        padded: The batch has padding, so that attention needs a mask.
        concurrency: Requests that run at once over pages of a common KV cache, as for `plan()`.
        adapter: Folder or hub id of a LoRA adapter that runs beside the base; `False` if the one in the model's own
            folder is merged already.
        **knobs: Fields of `Profile` to replace, such as `weights="nf4"`.

    Raises:
        UnknownNameError: an unknown model, profile, format or knob.
        WorkloadError: a length that is not positive, or a context that exceeds the model's positions.
        ConfigError: a configuration that cannot be counted.
        CheckpointError, NotSupportedError: an adapter that cannot be used.
        HubError: the hub does not return the config.json.

    Example:
        >>> estimate_vram("Qwen2.5-7B-Instruct").weights
        15231233024
        >>> estimate_vram(None, params=7.62e9).weights
        15240000000
    """
    if concurrency is not None or "cache" in knobs:
        from qwen_vram.spec.batching.concurrency import concurrent, paged_knobs  # a first estimate starts sooner

        batch_size, knobs = concurrent(concurrency, batch_size, knobs)
        knobs = paged_knobs(profile, knobs, on_gpu=True)
    workload = Workload(
        prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, logits=logits, padded=padded
    )
    if model is None:
        return _rule_of_thumb(params, resolve_profile(profile, **knobs), workload)
    if params is not None:
        raise WorkloadError("params is for model=None only, got both; drop one", name="params", got=params)
    label, architecture = resolve_model(model, adapter)
    chosen = resolve_profile(profile, **stored_knobs(architecture, knobs))
    result = estimate(label, architecture, chosen, workload, machine=current())
    warn_of_positions(result)
    return result


def warn_of_positions(result: Estimate) -> None:
    """Log one warning for each problem of the rotary positions, such as an extension or one without effect."""
    rope = result.architecture.rope if result.architecture else None
    lines = rope.warnings(result.workload.context_len) if rope else []
    if not lines:
        return
    import logging  # slow to import, and only needed here

    for line in lines:
        logging.getLogger(__name__).warning("%s: %s", result.model, line)


def _rule_of_thumb(params: float | None, profile: Profile, workload: Workload) -> Estimate:
    """Parameters times bytes: only the weights, as articles count them."""
    if params is None or isinstance(params, bool) or not isinstance(params, (int, float)) or not 0 < params < 1e15:
        raise WorkloadError(
            f"model=None needs params, a positive number of parameters such as 7.62e9, got {params!r}",
            name="params",
            got=params,
        )
    weights = FORMATS[profile.weights].nbytes((int(params),))
    return Estimate(
        model=f"{params:,.0f} parameters (rule of thumb: weights alone)",
        architecture=None,
        profile=profile,
        workload=workload,
        weights=weights,
        kv_cache=0,
        tensors=0,
        workspace=0,
        load_peak=weights,
        host=0,
        disk=0,
        moments=(),
        machine=current(),
    )
