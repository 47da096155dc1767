"""From the tensors of one adapter to the updates of the base's tensors, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vram.lora.adapter import Adapter, ModuleTensors, shortened
from qwen_vram.lora.delta import LowRank, TokenRows, Update
from qwen_vram.lora.scaling import ranks_of, scale_of
from qwen_vram.lora.stored import StoredTensor, same_bytes, same_values
from qwen_vram.lora.tables import EMBEDDING, TABLES, TableParts, table_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensors:
    """The base's tensors by name. A tied head is listed under its own name too, as the embedding's tensor."""

    source: str
    tensors: Mapping[str, StoredTensor]
    tied: bool


def updates_of(adapter: Adapter, number: int, base: BaseTensors) -> dict[str, Update]:
    """What `adapter`, the one with this `number`, does to each tensor of the base, by the tensor's name.

    Raises:
        AdapterError: it belongs to another base, lacks a tensor, or holds one that has no place.
    """
    reader = _Reader(adapter, number, base)
    updates = reader.updates()
    if reader.foreign:
        trained_on = adapter.settings.trained_on
        raise adapter.error(
            f"does not fit the base {base.source!r}: {shortened(reader.foreign)}; pass the base that it was trained on"
            f"{f' ({trained_on!r})' if trained_on else ''}"
        )
    if reader.broken:
        raise adapter.error(
            f"is not what its adapter_config.json says: {shortened(reader.broken)}; save it again with PEFT's "
            "save_pretrained()"
        )
    return updates


class _Reader:
    """Turns one adapter's tensors into updates, and collects what is wrong with them.

    Attributes:
        foreign: What says that the adapter belongs to another base.
        broken: Where tensors and settings of the adapter contradict each other.
    """

    def __init__(self, adapter: Adapter, number: int, base: BaseTensors) -> None:
        self.adapter = adapter
        self.settings = adapter.settings
        self.number = number
        self.base = base
        self.foreign: list[str] = []
        self.broken: list[str] = []
        self.used: set[str] = set()

    def updates(self) -> dict[str, Update]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.base.tensors)
        self.foreign += [f"{module} is not in it" for module in self.adapter.modules if module not in modules]
        updates = {}
        for module in modules:
            tensors = self.adapter.modules.get(module, ModuleTensors())
            for name, update in self.of_module(module, tensors):
                if update is not None:
                    updates[name] = update
        if not self.foreign:
            unused = [name for name in self.adapter.tensors if name not in self.used]
            self.broken += [f"{name} is there, and no setting asks for it" for name in unused]
        return updates

    def of_module(self, module: str, tensors: ModuleTensors) -> list[tuple[str, Update | None]]:
        """The updates of a module's weight and bias, by name."""
        weight = self.base.tensors.get(f"{module}.weight")
        bias = self.base.tensors.get(f"{module}.bias")
        found = []
        if weight is not None:
            make = self.of_table if module in TABLES else self.of_weight
            found.append((weight_name := f"{module}.weight", make(module, weight_name, tensors, weight)))
        if bias is not None:
            found.append((f"{module}.bias", self.of_bias(module, tensors, bias)))
        elif tensors.b_bias is not None:
            self.foreign.append(f"{module} has no bias that its lora_bias could be added to")
        elif tensors.bias is not None:
            self.foreign.append(f"{module}.bias is not in it")
        return found

    def of_weight(self, module: str, name: str, tensors: ModuleTensors, base: StoredTensor) -> Update | None:
        """The update of any weight but the two tables."""
        around = self.settings.saved_around(module)
        if len(around) > 1:
            self.broken.append(f"modules_to_save names {' inside '.join(reversed(around))}, which PEFT cannot save")
        trained = bool(around)
        replacement = self.take(tensors.weight, base.shape) if trained else None
        if trained and replacement is None:
            self.broken.append(f"{name} is missing")
        return self.update(replacement, self.low_rank(module, tensors, base.shape))

    def of_table(self, module: str, name: str, tensors: ModuleTensors, base: StoredTensor) -> Update | None:
        """The update of the embedding or the head, which may have another number of rows than the base's."""
        parts = table_parts(self.adapter, module, tied=self.base.tied)
        replacement = parts.replacement
        if replacement is not None:
            self.take(replacement, (replacement.shape[0], *base.shape[1:]))
        elif self.settings.saves(module):
            self.broken.append(f"{name} is missing")
        shape = base.shape if replacement is None else replacement.shape
        if replacement is not None and same_values(replacement, base):
            replacement = None  # a copy of the base, which PEFT saves where the table is adapted
        self.take(tensors.untrained, shape)
        twice = self.take(tensors.saved_twice, shape)
        if twice is not None and (tensors.weight is None or not same_bytes(twice, tensors.weight)):
            self.broken.append(f"{twice.name} is not the same as {name}")
        return self.update(replacement, self.low_rank(module, tensors, shape), self.tokens(module, parts, shape))

    def of_bias(self, module: str, tensors: ModuleTensors, base: StoredTensor) -> Update | None:
        """The update of a bias: trained itself, or shifted by `lora_bias`."""
        trained = self.settings.bias == "all" or (self.settings.bias == "lora_only" and tensors.adapted)
        trained = trained or self.settings.saves(module)
        replacement = self.take(tensors.bias, base.shape) if trained else None
        if trained and replacement is None:
            self.broken.append(f"{module}.bias is missing")
        shift = None
        if self.settings.lora_bias and tensors.a is not None:
            stored = self.take(tensors.b_bias, base.shape)
            if stored is None:
                self.broken.append(f"{module}.lora_B.bias is missing")
            else:
                shift = (stored, scale_of(self.settings, module, tensors.a.shape[0]))
        if replacement is None and shift is None:
            return None
        return Update(adapter=self.number, weight=self.adapter.weight, replacement=replacement, shift=shift)

    def update(
        self, replacement: StoredTensor | None, low_rank: LowRank | None, tokens: TokenRows | None = None
    ) -> Update | None:
        if replacement is None and low_rank is None and tokens is None:
            return None
        return Update(
            adapter=self.number,
            weight=self.adapter.weight,
            replacement=replacement,
            low_rank=low_rank,
            tokens=tokens,
        )

    def low_rank(self, module: str, tensors: ModuleTensors, shape: tuple[int, ...]) -> LowRank | None:
        """The low-rank update of a weight of `shape`."""
        if not tensors.adapted:
            return None
        embedding = module == EMBEDDING
        a, b = (tensors.embedding_a, tensors.embedding_b) if embedding else (tensors.a, tensors.b)
        self.used.update(part.name for part in (a, b) if part is not None)
        if (a is None) != (b is None):
            self.broken.append(f"{module} has only one of its two factors")
        elif len(shape) != 2 or a is None:
            self.foreign.append(f"{module} is not the kind of module that its factors were made for")
        if a is None or b is None or len(shape) != 2:
            return None
        outputs, inputs = (shape[1], shape[0]) if embedding else (shape[0], shape[1])
        rank = a.shape[0]
        allowed = ranks_of(self.settings, module)
        if rank not in allowed:
            self.broken.append(f"{a.name} has rank {rank}, the settings say {' or '.join(map(str, allowed))}")
            return None
        self.take(a, (rank, inputs))
        self.take(b, (outputs, rank))
        magnitude = self.take(tensors.magnitude, (outputs,)) if self.settings.use_dora else None
        if self.settings.use_dora and magnitude is None:
            self.broken.append(f"{module}.lora_magnitude_vector is missing")
        scale = scale_of(self.settings, module, rank)
        return LowRank(a=a, b=b, scale=scale, magnitude=magnitude, embedding=embedding)

    def tokens(self, module: str, parts: TableParts, shape: tuple[int, ...]) -> TokenRows | None:
        """The trained rows of a table of `shape`."""
        _, values, indices = parts
        if indices is None:
            return None
        if self.settings.saves(module):
            self.broken.append(f"{module} was trained both whole and row by row")
        if values is None:
            self.broken.append(f"{module}.token_adapter.trainable_tokens_delta is missing")
            return None
        self.take(values, (len(indices), *shape[1:]))
        if max(indices, default=0) >= shape[0]:
            self.foreign.append(f"token {max(indices)} was trained, {module} has {shape[0]} rows")
        return TokenRows(values=values, indices=indices)

    def take(self, tensor: StoredTensor | None, shape: tuple[int, ...]) -> StoredTensor | None:
        """`tensor`, noted as used, and as foreign where it has another shape than `shape`."""
        if tensor is not None:
            self.used.add(tensor.name)
            if tensor.shape != shape:
                self.foreign.append(f"{tensor.name} has shape {list(tensor.shape)}, {list(shape)} is needed")
        return tensor
