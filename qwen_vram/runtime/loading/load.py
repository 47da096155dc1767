"""`load()`: plan, check, and build exactly what was planned."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qwen_vram.arithmetic.weights import disk_buffers, streaming_slots
from qwen_vram.checkpoints.adapters.base_name import warn_of_another_base
from qwen_vram.checkpoints.adapters.folder import AdapterChoice, check_own_adapter
from qwen_vram.checkpoints.adapters.keys import Adapter, open_adapter
from qwen_vram.checkpoints.files.names import CONFIG
from qwen_vram.checkpoints.resolve import ModelLike, adapted, own_adapter, resolve
from qwen_vram.errors import NotSupportedError
from qwen_vram.estimator import warn_of_positions
from qwen_vram.planning.capacity.budget import VramLike
from qwen_vram.planning.planner import Plan, plan_for
from qwen_vram.planning.search.search import Prefer
from qwen_vram.runtime.attention import fused as attention
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.backends.base import Backend, Request, StreamingBackend
from qwen_vram.runtime.backends.bnb_notes import check_notes
from qwen_vram.runtime.batching.batched import batcher_for
from qwen_vram.runtime.decoding.graph_decoder import decoder_where_it_runs
from qwen_vram.runtime.kernels.fused_layers import fuse_layers
from qwen_vram.runtime.loaded_model import LoadedModel
from qwen_vram.runtime.loading.device_map import connect, device_map, left_out, undispatched
from qwen_vram.runtime.loading.devices import budget_on, check_free, devices_for, weakest
from qwen_vram.runtime.loading.preflight import can_compute, check, check_files, dtype_for
from qwen_vram.runtime.loading.verify import verify as check_plan
from qwen_vram.runtime.measure import PeakMeter, weight_storages
from qwen_vram.runtime.memory.release import give_back_heap, nothing_left_after_a_failure
from qwen_vram.runtime.memory.workspaces import reused_bytes
from qwen_vram.runtime.offload.build import pack_layers
from qwen_vram.runtime.offload.host_embedding import move_embedding_to_host
from qwen_vram.runtime.offload.streamer import Streamer
from qwen_vram.runtime.peft_adapter import add_adapter, check_peft, check_values, end_at, open_adapters_tokenizer
from qwen_vram.runtime.progress import transformers_bars
from qwen_vram.runtime.requests.sampling import generation_config
from qwen_vram.runtime.requests.vocabulary import check_vocabulary
from qwen_vram.runtime.tensors.checkpoint import (
    Checkpoint,
    model_config,
    open_checkpoint,
    open_tokenizer,
    warn_of_files,
)
from qwen_vram.runtime.tensors.gc_scope import collect_dropped, garbage_of_this_load
from qwen_vram.runtime.tensors.packed_layout import HostMemory
from qwen_vram.runtime.torch_dtypes import float32_by_default
from qwen_vram.spec.batching.concurrency import concurrent
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload


def load(
    model: ModelLike,
    *,
    profile: str | Profile = "auto",
    vram: VramLike = None,
    ram: str | int | None = None,
    reserve: str | int | None = None,
    prefer: Prefer = "quality",
    prompt_len: int = 512,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    padded: bool = False,
    concurrency: int | None = None,
    adapter: AdapterChoice = None,
    device: str | None = None,
    progress: bool = True,
    verify: bool = False,
    disable_mmap: bool = False,
    **knobs: object,
) -> LoadedModel:
    """Load a checkpoint as `plan()` would, with the same arguments, and return it with its plan.

    The plan is made and checked before a file is downloaded or a byte is allocated. Without a GPU the model is loaded
    on the CPU. `model, tokenizer = load(...)` unpacks the result.

    Args:
        model: A checkpoint folder, a catalog name, or a hub id.
        padded: As for `plan()`. A padded batch that was not planned is also checked before it runs.
        concurrency: As for `plan()`: calls from several threads, and those of `submit()`, then run together.
        vram: As for `plan()`; needs a GPU, and every GPU that a dict names.
        adapter: Folder or hub id of a LoRA adapter, run beside the base by PEFT; the model is then a `PeftModel`.
            `False` if the one in the model's own folder is already merged.
        device: `"cuda"` or `"cpu"`; `None` uses the GPU if there is one.
        progress: Show transformers' bars while weights load and streamed layers are packed.
        disable_mmap: Read the weights completely instead of mapping them, for network drives, which fetch a mapped file
            page by page.
        verify: Run one prefill of `prompt_len` random tokens and one decode step before returning.

    Raises:
        DoesNotFitError: no plan fits, or the requested one does not, or other processes leave too little memory.
        NotSupportedError: a knob or combination that is counted but cannot be run.
        BackendUnavailableError: a library or the requested GPU is missing.
        CheckpointError, ConfigError, HubError: the checkpoint cannot be used.
        PlanNotHeldError: `verify=True`, and the loaded model takes more than planned.
        UnknownNameError, UnitError, WorkloadError: as for `plan()`.
    """
    adapter = own_adapter(model, adapter)
    opened = None if adapter is None or adapter is False else open_adapter(adapter)
    devices = devices_for(device, vram)
    collect_dropped(devices)
    chosen_adapter = adapter if opened is None else opened.folder
    batch_size, knobs = concurrent(concurrency, batch_size, knobs)
    workload = Workload(prompt_len=prompt_len, max_new_tokens=max_new_tokens, batch_size=batch_size, padded=padded)
    budget = budget_on(devices, vram, ram, reserve)
    found = resolve(model, chosen_adapter)
    architecture = adapted(found, opened or chosen_adapter)
    chosen = plan_for(
        model,
        workload,
        budget,
        found=found,
        architecture=architecture,
        profile=profile,
        prefer=prefer,
        adapter=adapter,
        computes=partial(can_compute, architecture),
        **knobs,
    )
    warn_of_positions(chosen.estimate)
    backend = get_backend(chosen.profile.weights)
    for one in devices:
        check(chosen, backend, one)
    if opened is not None:
        check_peft()
        check_values(opened, dtype_for(chosen.profile, weakest(devices)))
        warn_of_another_base(opened, model)
    if disable_mmap and "disk" in device_map(chosen, devices[0]).values():
        raise NotSupportedError(
            f"disable_mmap=True does not go with streamed_layers={chosen.profile.streamed_layers} of a 16-bit "
            "checkpoint, which would be in host memory whole while it loads; copy the checkpoint to a disk of this "
            "machine, use streamed_layers=0, or quantize it once and load that",
            knob="disable_mmap",
            value=True,
        )
    if found.config:
        model_config(found.config, found.source)  # refusals of transformers come before a download
    check_free(chosen, devices)
    with nothing_left_after_a_failure():
        with garbage_of_this_load(), ExitStack() as after_a_failure:
            checkpoint = open_checkpoint(model, found)
            check_own_adapter(checkpoint.folder, chosen_adapter)
            order = architecture.adapter_layers
            if order:
                checkpoint = replace(checkpoint, files=checkpoint.files.with_layers(order))
            llm = _build(checkpoint, chosen, backend, devices, opened, progress, disable_mmap, after_a_failure)
            after_a_failure.pop_all()
        give_back_heap()
        if verify:
            try:
                check_plan(llm)
            except BaseException:
                llm.close()
                raise
    return llm


@float32_by_default()
def _build(
    checkpoint: Checkpoint,
    chosen: Plan,
    backend: Backend,
    devices: list[torch.device],
    adapter: Adapter | None,
    progress: bool,
    disable_mmap: bool,
    after_a_failure: ExitStack,
) -> LoadedModel:
    profile, device, dtype = chosen.profile, devices[0], dtype_for(chosen.profile, weakest(devices))
    if profile.disk_layers:
        check_files(checkpoint, profile, dtype)
    if checkpoint.architecture.stored_format is not None:
        check_notes(checkpoint.folder, checkpoint.files.tensors, checkpoint.architecture)
    warn_of_files(checkpoint.files, profile)
    attention.register()
    homes = chosen.residency
    request = Request(
        files=checkpoint.files,
        config=model_config(checkpoint.files.config, str(checkpoint.folder / CONFIG), checkpoint.folder),
        disable_mmap=disable_mmap,
        profile=profile,
        device=device,
        dtype=dtype,
        device_map=device_map(chosen, device),
        attention=attention.NAME if profile.attention == "fused" else profile.attention,
        stored=checkpoint.architecture.stored_format is not None,
        own_head=homes.own_head and not homes.late_head,
        late_head=homes.late_head,
        left_out=left_out(chosen),
    )
    folders = [] if adapter is None else [adapter.folder]
    chosen_tokenizer, tokenizer = open_adapters_tokenizer(
        checkpoint.folder, folders, rows=checkpoint.architecture.vocab_size
    )
    if tokenizer is None:
        tokenizer = open_tokenizer(checkpoint.folder, request.config)
        check_vocabulary(tokenizer, checkpoint.architecture.vocab_size, checkpoint.folder)
    generation_config(checkpoint.folder)
    meters = [PeakMeter(one) for one in devices]
    for meter in meters:
        meter.start()
    before = {
        meter.device: meter.before - reused_bytes(meter.device, captured=profile.captures)
        for meter in meters
        if meter.cuda
    }
    streamer = None
    with transformers_bars(progress) as bar:
        model = undispatched(backend, request)
        if profile.kernels == "fused":
            fuse_layers(model)
        if homes.streamed:
            assert isinstance(backend, StreamingBackend)
            memory = HostMemory(device)
            blocks = pack_layers(model, homes, backend, request, memory, bar)
            slots = streaming_slots(checkpoint.architecture, profile)
            streamer = Streamer(blocks, memory, slots, disk_buffers(profile))
            after_a_failure.callback(streamer.close)
    if homes.table_on_host:
        move_embedding_to_host(model, device)
    if device.type == "cpu" and backend.name == "bnb":
        from qwen_vram.runtime.linear.flat_4bit import multiply_flat

        multiply_flat(model)
    if profile.tiles and backend.name == "bnb":
        from qwen_vram.runtime.linear.tiled_4bit import dequantize_in_tiles
        from qwen_vram.runtime.linear.tiled_int8 import multiply_int8_in_pieces

        dequantize_in_tiles(model)
        multiply_int8_in_pieces(model)
    if len(devices) > 1:
        connect(model, chosen, device)
    if adapter is not None:
        end_at(model, chosen_tokenizer.end_token_ids)
        model = add_adapter(model, adapter, model.dtype)
    model.eval()
    measured = _loaded(model, backend, meters)
    decoder = batcher = None
    seconds = 0.0
    if profile.cache == "paged":
        with transformers_bars(progress) as bar:
            batcher, seconds = batcher_for(model, chosen, bar)
        after_a_failure.callback(batcher.close)
    elif profile.captures:
        with transformers_bars(progress) as bar:
            decoder = decoder_where_it_runs(
                model,
                chosen.workload,
                bar,
                compiled=profile.compiled,
                streamer=streamer,
                kv_cache=profile.kv_cache,
            )
    if decoder is not None:
        after_a_failure.callback(decoder.close)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        plan=chosen,
        measured=measured,
        before=before,
        folder=checkpoint.folder,
        streamer=streamer,
        decoder=decoder,
        batcher=batcher,
        capture_seconds=seconds,
    )


def _loaded(model: Any, backend: Backend, meters: list[PeakMeter]) -> dict[torch.device, dict[str, int]]:
    """Return the bytes that loading took on each device; first return unused reserved memory of all devices."""
    found = [(meter, meter.stop()) for meter in meters]
    if meters[0].cuda:
        gc.collect()
        torch.cuda.empty_cache()  # segments of unquantized tensors would never be free as a whole again
    loaded = {}
    for meter, peaks in found:
        load_peak = {"load_peak": peaks["peak_allocated"] - meter.before} if peaks else {}
        loaded[meter.device] = {"weights": sum(weight_storages(model, backend, meter.device).values()), **load_peak}
    return loaded
