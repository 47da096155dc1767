"""Times of an engine's steps that mix decoding sequences with chunks of prompts.

Products are made once for all rows of a step. Attention is over each sequence's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qwen_vram.arithmetic.timing.attention import (
    chunk_attention_seconds,
    decode_attention_seconds,
    decode_nodes_seconds,
    prefill_elementwise_seconds,
)
from qwen_vram.arithmetic.timing.launches import launch_seconds
from qwen_vram.arithmetic.timing.linear import Matrices, head_matrix, layer_matrices, product_seconds
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.formats import FORMATS
from qwen_vram.spec.machine import Machine
from qwen_vram.spec.profile import Profile
from qwen_vram.spec.workload import Workload

# Sums over GPUs in a decoder layer: after the attention, and after the MLP.
_SUMS = 2


class Connection(NamedTuple):
    """The connection of GPUs that share every layer.

    Attributes:
        size: The number of GPUs.
        rate: Bytes a second that one GPU sends to another, while both add up.
        start: Seconds of a sum that do not depend on its bytes.
    """

    size: int = 1
    rate: float = float("inf")
    start: float = 0.0

    def sum_seconds(self, nbytes: int) -> float:
        """Seconds to add up `nbytes` of every GPU on all of them, by the ring's bytes: 2 (n - 1) / n of the data."""
        if self.size == 1:
            return 0.0
        return self.start + 2 * (self.size - 1) / self.size * nbytes / self.rate


class StepTimes:
    """Seconds of a step by its sequences and tokens, for one GPU of those that share the model.

    Args:
        architecture: The part of the model on the GPU (`tensor_parallel.shard`).
        profile: The formats, and the kernels between products. Captured or compiled steps are not launched by Python.
        machine: The rates of the GPU.
        connection: The GPUs that share the layers.
        fused: The engine's kernels read quantized weights inside of products of any number of rows.
        slowdown: A factor of all times.
    """

    def __init__(
        self,
        architecture: Architecture,
        profile: Profile,
        machine: Machine,
        connection: Connection = Connection(),  # noqa: B008 - it cannot be changed
        *,
        fused: bool = False,
        slowdown: float = 1.0,
    ) -> None:
        self.architecture, self.profile, self.machine, self.connection = architecture, profile, machine, connection
        self.slowdown = slowdown
        self._layer = _read_inside(layer_matrices(architecture, profile), fused)
        self._head = _read_inside(head_matrix(architecture, profile), fused)
        self._row_seconds = prefill_elementwise_seconds(architecture, profile, Workload(prompt_len=1), machine)
        self._nodes = decode_nodes_seconds(architecture, profile, machine)
        self._attention = decode_attention_seconds(architecture, profile, machine, 0, 1)
        far = 2**20
        more = decode_attention_seconds(architecture, profile, machine, far, 1) - self._attention
        # Every token that a decoding sequence attends to adds this time to a step.
        self.token_seconds = slowdown * more / far
        self._known: dict[tuple[int, int], float] = {}

    def seconds(self, decoding: int, tokens: int, chunks: Iterable[tuple[int, int]] = (), ending: int = 0) -> float:
        """Seconds of one step.

        Args:
            decoding: Sequences that get one token each.
            tokens: Tokens that these attend to, in total.
            chunks: Prompt tokens of other sequences in this step, and those of earlier steps, for each sequence.
            ending: Prompts that end in this step, whose first tokens are sampled.
        """
        rows, attention = decoding, 0.0
        for new, past in chunks:
            rows += new
            attention += chunk_attention_seconds(self.architecture, self.profile, self.machine, tokens=new, past=past)
        if decoding:
            attention += self._attention
        read = self.token_seconds * tokens if decoding else 0.0
        return self.without_attention(rows, decoding + ending) + self.slowdown * attention + read

    def without_attention(self, rows: int, sampled: int) -> float:
        """Seconds of a step of `rows` rows, of which `sampled` get logits, without attention."""
        known = self._known.get((rows, sampled))
        if known is None:
            known = self.slowdown * self._without_attention(rows, sampled)
            self._known[rows, sampled] = known
        return known

    def _without_attention(self, rows: int, sampled: int) -> float:
        layers = self.architecture.num_hidden_layers
        busy = layers * product_seconds(self._layer, rows, self.machine)
        if sampled:
            busy += product_seconds(self._head, sampled, self.machine)
        busy += max(self._nodes, rows * self._row_seconds)
        summed = rows * self.architecture.hidden_size * self.profile.element_bytes
        busy += _SUMS * layers * self.connection.sum_seconds(summed)
        if self.profile.captures:
            return busy
        launching = launch_seconds(
            self.architecture, self.profile, rows, self.machine, batch_size=max(1, sampled), moving=0, prefill=False
        )
        return max(busy, launching)


def _read_inside(of: Matrices, fused: bool) -> Matrices:
    """Return matrices whose stored bytes are read like those of 16-bit ones, if the engine's kernels do so."""
    return of._replace(storage=FORMATS["bf16"]) if fused else of
