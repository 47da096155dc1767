"""The decoder: compiles and captures decode steps, and keeps their KV buffers.

torch compiles one decoder layer, which serves all layers, and the model's end. It caches compiled code on the disk for
later runs. Without Triton or a C compiler, a step is captured without compilation.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from qwen_vram.planning.capacity.compiler import missing_compiler
from qwen_vram.runtime.decoding.capture_stream import give_stream, on_stream, take_stream
from qwen_vram.runtime.decoding.generate_loop import decode_by_steps
from qwen_vram.runtime.decoding.graph_cache import BufferLease, GraphBuffers
from qwen_vram.runtime.decoding.graph_step import Functions, Step
from qwen_vram.runtime.decoding.layer import decode_end, decode_layer, fused_decode_end, fused_decode_layer
from qwen_vram.runtime.kernels.fused_layers import FusedLayer
from qwen_vram.runtime.memory.workspaces import take_workspace
from qwen_vram.runtime.offload.streamer import Streamer
from qwen_vram.runtime.scheduling.job import Job
from qwen_vram.runtime.scheduling.turns import Turns
from qwen_vram.spec.kv_formats import KvFormatName
from qwen_vram.spec.workload import Workload

_LOGGER = logging.getLogger(__name__)

# With this option torch generates kernels for products of one row, which read the matrix faster than cuBLAS does.
# Source: torch 2.11, torch/_inductor/decomposition.py, `mm`.
_TUNED: dict[str, str | int | bool | Callable[..., Any]] = {"coordinate_descent_tuning": True}


class Decoder:
    """Maker of a model's decode steps, which keeps buffers of the planned size for one cache at a time.

    Attributes:
        seconds: The time of compiling and capturing so far.
        backend: torch's compiler; `None` if steps are captured without compilation.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        max_length: int,
        backend: Any = "inductor",
        streamer: Streamer | None = None,
        kv_cache: KvFormatName = "bf16",
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_cache = kv_cache
        self._streamer = streamer
        self.seconds = 0.0
        self._planned = (batch_size, max_length)
        self._functions: dict[int, Functions] = {}
        self._home: GraphBuffers | None = None
        # By buffers, then by the number of sequences that a step feeds. A step holds views of the buffers' tensors.
        self._steps: WeakKeyDictionary[GraphBuffers, dict[int, Step]] = WeakKeyDictionary()
        self._holder: Callable[[], BufferLease | None] = lambda: None
        self._stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._stream = take_stream(model.device)
            self._pool = torch.cuda.graph_pool_handle()

    @property
    def layers(self) -> int:
        """The number of decoder layers of the model."""
        return len(self.model.model.layers)

    def prepare(self, batch_size: int, max_length: int) -> None:
        """Create buffers and a step for a workload; buffers of another size are dropped first.

        A workload within the plan gets buffers of the planned size. A larger one gets buffers of its own size.
        """
        if self._holder() is None:
            planned = batch_size <= self._planned[0] and max_length <= self._planned[1]
            size = self._planned if planned else (batch_size, max_length)
            if self._home is None or self._home.size != size:
                self._home = None
                self._home = GraphBuffers(self.model, *size, self.kv_cache)
            self.step(self._home, batch_size)

    def drop_larger_buffers(self) -> None:
        """Drop buffers that are not of the planned size, which no plan counts, if no cache has them."""
        if self._home is not None and self._home.size != self._planned and self._holder() is None:
            self._home = None

    def drop_buffers(self) -> None:
        """Drop the buffers if no cache has them: the caller's own cache takes their share of the budget."""
        if self._holder() is None:
            self._home = None

    def lend(self, holder: BufferLease, batch_size: int) -> GraphBuffers:
        """Return the buffers that are kept, or new ones while another cache has those."""
        free = self._holder() is None
        if free and self._home is not None and self._home.holds(batch_size, holder.max_length):
            self._holder = weakref.ref(holder)
            return self._home
        return GraphBuffers(self.model, batch_size, holder.max_length, self.kv_cache)

    def release(self, holder: BufferLease) -> None:
        """Take back the buffers that are kept, if `holder` has them."""
        if self._holder() is holder:
            self._holder = lambda: None

    def step(self, buffers: GraphBuffers, batch_size: int) -> Step:
        """Return the step of the first `batch_size` sequences of `buffers`; create it if it does not exist yet.

        At most two steps are kept for the same buffers: the step of all their sequences, and the step of the smaller
        batch that ran last.
        """
        steps = self._steps.setdefault(buffers, {})
        if batch_size not in steps:
            began = perf_counter()
            for batch in [batch for batch in steps if batch != buffers.batch_size]:
                del steps[batch]
            steps[batch_size] = self._made(buffers, batch_size)
            took = perf_counter() - began
            self.seconds += took
            _LOGGER.info("made the decode step for a batch of %d: %.1f s", batch_size, took)
        return steps[batch_size]

    def close(self) -> None:
        """Release graphs, buffers, compiled code and the model."""
        self._steps.clear()
        self._home = None
        self._functions.clear()
        self.model = self._streamer = None
        if self._stream is not None:
            give_stream(self._stream)
            self._stream = None

    def _made(self, buffers: GraphBuffers, batch_size: int) -> Step:
        step = self._rehearsed(buffers, batch_size)
        if self._stream is not None:
            step.capture(self._stream, self._pool)
            torch.cuda.empty_cache()  # tensors of a compiler's trials
        return step

    @torch.inference_mode(False)
    def _rehearsed(self, buffers: GraphBuffers, batch_size: int) -> Step:
        functions = self._functions.setdefault(batch_size, self._compiled())
        dynamic = self.backend is not None
        step = Step(self.model, functions, buffers, batch_size, dynamic=dynamic, streamer=self._streamer)
        try:
            with on_stream(self._stream):
                if self._stream is not None:
                    take_workspace(self._stream.device, of_sums=True)
                step.rehearse()
                step.rehearse()
        except _compiler_errors() as error:
            if self.backend is None:
                raise
            _LOGGER.warning("the decode step is captured without being compiled: %s", str(error).strip()[:500])
            self.backend = None
            self._functions.clear()
            return self._rehearsed(buffers, batch_size)
        return step

    def _compiled(self) -> Functions:
        """Return layer and end. Compiled ones are new functions, because torch attaches code to a function for good."""
        if self.backend is None:
            fused = isinstance(self.model.model.layers[0], FusedLayer)
            return (fused_decode_layer, fused_decode_end) if fused else (decode_layer, decode_end)
        options = _TUNED if self.backend == "inductor" else None
        layer, end = (
            torch.compile(_copy(function), fullgraph=True, dynamic=False, backend=self.backend, options=options)
            for function in (decode_layer, decode_end)
        )
        return layer, end


def decoder_for(
    model: Any,
    workload: Workload,
    progress: Callable[..., Iterable[int]],
    *,
    compiled: bool,
    streamer: Streamer | None = None,
    kv_cache: KvFormatName = "bf16",
) -> Decoder:
    """Return a decoder for `model.generate`, with the steps of a workload captured, and compiled first if asked.

    Args:
        model: A `transformers` model, or a `PeftModel` of one.
        progress: Wraps a range in a progress bar, as `tqdm` does.
        streamer: The streamer of its streamed layers, if it has some.
        kv_cache: The format of keys and values.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decode_by_steps(base)
    sizes = {"batch_size": workload.batch_size, "max_length": workload.context_len}
    backend = compiler_for(base.device) if compiled else None
    decoder = Decoder(base, **sizes, backend=backend, streamer=streamer, kv_cache=kv_cache)
    try:
        for _ in progress(range(1), desc="Compiling the decode step" if compiled else "Capturing the decode step"):
            # In the thread of generations, with its cuBLAS handle and workspaces.
            job = Job(Turns(), lambda turn: decoder.prepare(**sizes), base.device)
            job.start()
            job.result()
    except BaseException:
        decoder.close()  # the next model uses its stream
        raise
    return decoder


def decoder_where_it_runs(
    model: Any,
    workload: Workload,
    progress: Callable[..., Iterable[int]],
    *,
    compiled: bool,
    streamer: Streamer | None = None,
    kv_cache: KvFormatName = "bf16",
) -> Decoder | None:
    """Return the result of `decoder_for`; `None`, with a warning, if uncompiled steps cannot be captured."""
    try:
        return decoder_for(model, workload, progress, compiled=compiled, streamer=streamer, kv_cache=kv_cache)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a driver or a torch that captures less than the tested ones
        if compiled:
            raise
        _LOGGER.warning(
            "decode steps are launched one by one, which is slower, for they cannot be captured here: %s",
            str(error).strip()[:500],
        )
        return None


def compiler_for(device: torch.device) -> str | None:
    """Return torch's compiler if it can generate code for `device` here; log once what is missing."""
    missing = missing_compiler()
    if not missing:
        return "inductor"
    _LOGGER.warning(
        "compiled=True without %s: decode steps are captured as a CUDA graph, but not compiled; install it to fuse "
        "norms, rotary embeddings and products' ends",
        missing,
    )
    return None


def _copy(function: Any) -> Any:
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _compiler_errors() -> tuple[type[BaseException], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return (TorchDynamoException, FailOnRecompileLimitHit)
