"""Changes that an adapter makes to its base, tensor by tensor.

Every tensor of the adapter's file is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vram.checkpoints.adapters.errors import AdapterError
from qwen_vram.checkpoints.adapters.folder import CONFIG
from qwen_vram.checkpoints.adapters.keys import Adapter, AdapterTensor, ModuleTensors, shortened
from qwen_vram.checkpoints.adapters.scaling import ranks_of, scale_of
from qwen_vram.checkpoints.adapters.tables import EMBEDDING, HEAD, TABLES, TableParts, table_parts

_SAVE_AGAIN = "save it again with PEFT's save_pretrained()"
_COPY_AGAIN = (
    "copy the whole file from the training run again; if these modules were not trained, leave them out of "
    "target_modules, or name them in exclude_modules"
)
_NAME_THEM = (
    "PEFT would leave them out without an error: if these modules were trained, name them in target_modules of "
    "adapter_config.json"
)
_SET_DORA = "if the adapter was trained with DoRA, set use_dora to true in adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base's tensors: `shapes` by name. A tied head is listed under its own name too."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Low-rank factors of a weight: `a` `(rank, in)` and `b` `(out, rank)`; for an embedding with in and out swapped.

    The factors of BD-LoRA have a fraction of the columns. KaSA's `diagonal` `(rank)` is multiplied between the two.
    """

    a: AdapterTensor
    b: AdapterTensor
    scale: float
    magnitude: AdapterTensor | None = None
    diagonal: AdapterTensor | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """All changes of an adapter to one tensor of the base, in this order.

    Attributes:
        replacement: Takes the tensor's place.
        kept_beside: PEFT keeps the base's tensor beside the replacement (modules_to_save).
        second_copy: Must hold the same values as `replacement`.
        factors: Their product is added to a weight.
        shift: Added to a bias, times its scale; also if the base has no bias, and PEFT runs this one beside it.
        tokens: Rows that take the place of those with these numbers.
    """

    replacement: AdapterTensor | None = None
    kept_beside: bool = False
    second_copy: AdapterTensor | None = None
    factors: Factors | None = None
    shift: tuple[AdapterTensor, float] | None = None
    tokens: tuple[AdapterTensor, tuple[int, ...]] | None = None

    @property
    def is_none(self) -> bool:
        """True if the tensor stays as it is."""
        return not (self.replacement or self.second_copy or self.factors or self.shift or self.tokens)


def changes_of(adapter: Adapter, base: Base) -> dict[str, Change]:
    """Return the changes of `adapter` to the tensors of `base`, by the tensor's name.

    Raises:
        AdapterError: it belongs to another base, lacks a tensor, or holds one that the base has no module for.
    """
    reader = _Reader(adapter, base)
    changes = reader.changes()
    if reader.foreign:
        raise adapter.error(f"does not fit the base {base.source!r}: {shortened(reader.foreign)}; {_instead(adapter)}")
    for advice, problems in reader.broken.items():
        raise adapter.error(f"is not what its adapter_config.json says: {shortened(problems)}; {advice}")
    return changes


def check_layers(adapter: Adapter, base: Base) -> None:
    """Refuse an adapter whose model has the base's layers in another order or number.

    Raises:
        AdapterError: the order or number differs.
    """
    replication = adapter.settings.replication
    layers = len({name.split(".")[2] for name in base.shapes if name.startswith("model.layers.")})
    if replication is not None and not replication.is_the_base(layers):
        path = str(adapter.folder / CONFIG)
        raise AdapterError(
            f"{path!r}: layer_replication is set: the adapter's layers are copies of the base's layers "
            f"({replication} of {layers}), so it cannot be merged exactly; run it beside its base: "
            "qv.load(base, adapter=...)",
            path=path,
        )


def _instead(adapter: Adapter) -> str:
    """Return the advice for an adapter that does not fit this base."""
    trained_on, task_type = adapter.settings.trained_on, adapter.settings.task_type
    if task_type not in ("", "CAUSAL_LM"):
        return (
            f"its task_type is {task_type!r}, so that it belongs to another kind of model than a language model "
            "('CAUSAL_LM'): use it with transformers and PEFT"
        )
    if adapter.settings.groups_inputs:
        return "its factors are of groups of inputs (QALoRA), which do not run here: use it with transformers and PEFT"
    return f"pass the base that it was trained on{f' ({trained_on!r})' if trained_on else ''}"


class _Reader:
    """Reader that turns one adapter's tensors into changes, and collects the faults.

    Attributes:
        foreign: Signs that the adapter belongs to another base.
        broken: Contradictions between tensors and settings of the adapter, by the step that helps.
    """

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter = adapter
        self.settings = adapter.settings
        self.base = base
        self.foreign: list[str] = []
        self.broken: dict[str, list[str]] = {}
        self.used: set[str] = set()

    def is_broken(self, problem: str, advice: str = _SAVE_AGAIN) -> None:
        self.broken.setdefault(advice, []).append(problem)

    def changes(self) -> dict[str, Change]:
        modules = sorted({name.rpartition(".")[0] for name in self.base.shapes})
        self.foreign += [f"{module} is not in it" for module in self.adapter.modules if module not in modules]
        changes: dict[str, Change] = {}
        for module in modules:
            tensors = self.adapter.modules.get(module, ModuleTensors())
            changes |= self.of_module(module, tensors)
        if not self.foreign:
            for tensors in self.adapter.modules.values():
                self.check_magnitude(tensors)
            for name in self.adapter.tensors:
                if name not in self.used:
                    self.is_broken(f"{name} is there, and no setting asks for it")
        return {name: change for name, change in changes.items() if not change.is_none}

    def check_magnitude(self, tensors: ModuleTensors) -> None:
        """Note DoRA's vectors as a contradiction if the settings do not name DoRA."""
        if tensors.magnitude is not None and not self.settings.use_dora:
            self.used.add(tensors.magnitude.name)
            self.is_broken(f"{tensors.magnitude.name} is there, and use_dora is false", _SET_DORA)

    def of_module(self, module: str, tensors: ModuleTensors) -> dict[str, Change]:
        """Return the changes of a module's weight and bias, by name."""
        weight = self.base.shapes.get(f"{module}.weight")
        bias = self.base.shapes.get(f"{module}.bias")
        found = {}
        if weight is not None:
            make = self.of_table if module in TABLES else self.of_weight
            found[f"{module}.weight"] = make(module, f"{module}.weight", tensors, weight)
        if bias is not None:
            found[f"{module}.bias"] = self.of_bias(module, tensors, bias)
        elif weight is not None and tensors.b_bias is not None:
            found[f"{module}.bias"] = Change(shift=self.shift(module, tensors, weight[:1]))
        elif tensors.bias is not None:
            self.foreign.append(f"{module}.bias is not in it")
        return found

    def of_weight(self, module: str, name: str, tensors: ModuleTensors, shape: tuple[int, ...]) -> Change:
        """Return the change of any weight but the two tables."""
        around = self.settings.saved_around(module)
        if len(around) > 1:
            self.is_broken(f"modules_to_save names {' inside '.join(reversed(around))}, which PEFT cannot save")
        trained = bool(around)
        replacement = self.take(tensors.weight, shape) if trained else None
        if trained and replacement is None:
            self.is_broken(f"{name} is missing", _COPY_AGAIN)
        return Change(
            replacement=replacement,
            kept_beside=replacement is not None,
            factors=self.factors(module, tensors, shape, linear=len(shape) == 2),
        )

    def of_table(self, module: str, name: str, tensors: ModuleTensors, base: tuple[int, ...]) -> Change:
        """Return the change of embeddings or head, which may have another number of rows than the base's."""
        parts = table_parts(self.adapter, module, tied=self.base.tied)
        replacement = parts.replacement
        if replacement is not None:
            self.take(replacement, (replacement.shape[0], *base[1:]))
        elif self.settings.saves(module):
            self.is_broken(f"{name} is missing", _COPY_AGAIN)
        shape = base if replacement is None else (replacement.shape[0], *base[1:])
        self.take(tensors.untrained, shape)
        twice = self.take(tensors.saved_twice, shape)
        return Change(
            replacement=replacement,
            kept_beside=replacement is not None and self.is_saved_whole(module),
            second_copy=twice,
            factors=self.factors(module, tensors, shape, linear=False),
            tokens=self.tokens(module, parts, shape),
        )

    def is_saved_whole(self, table: str) -> bool:
        """Tell if `table` is trained whole: under its own name, or under that of the table that it is tied to."""
        tables = TABLES if self.base.tied and self.settings.ensure_weight_tying else (table,)
        return any(self.settings.saves(module) for module in tables)

    def of_bias(self, module: str, tensors: ModuleTensors, shape: tuple[int, ...]) -> Change:
        """Return the change of a bias: trained itself, or shifted by `lora_bias`."""
        saved = self.settings.saves(module)
        trained = self.settings.bias == "all" or (self.settings.bias == "lora_only" and bool(tensors.factors))
        replacement = self.take(tensors.bias, shape) if trained or saved else None
        if (trained or saved) and replacement is None:
            self.is_broken(f"{module}.bias is missing", _COPY_AGAIN)
        return Change(replacement=replacement, kept_beside=saved, shift=self.shift(module, tensors, shape))

    def shift(self, module: str, tensors: ModuleTensors, shape: tuple[int, ...]) -> tuple[AdapterTensor, float] | None:
        """Return the tensor that `lora_bias` adds to a bias, and its scale; `None` without one."""
        blocks = self.settings.blocks
        if not self.settings.lora_bias or tensors.a is None or (blocks is not None and blocks.has_b(module)):
            return None
        stored = self.take(tensors.b_bias, shape)
        if stored is None:
            self.is_broken(f"{module}.lora_B.bias is missing", _COPY_AGAIN)
            return None
        return stored, scale_of(self.settings, module, tensors.a.shape[0])

    def factors(self, module: str, tensors: ModuleTensors, shape: tuple[int, ...], *, linear: bool) -> Factors | None:
        """Return the low-rank factors of a weight of `shape`; `None` without them."""
        targets = self.settings.targets
        embedding = module == EMBEDDING and not targets.name_weight(module)
        a, b = (tensors.embedding_a, tensors.embedding_b) if embedding else (tensors.a, tensors.b)
        named = bool(tensors.factors) if targets.modules is None else targets.name(module, linear=linear)
        if not tensors.factors:
            if named:
                ending = "lora_embedding_A" if embedding else "lora_A.weight"
                self.is_broken(f"{module}.{ending} is missing", _COPY_AGAIN)
            return None
        self.used.update(part.name for part in (a, b) if part is not None)
        if (a is None) != (b is None):
            self.is_broken(f"{module} has only one of its two factors", _COPY_AGAIN)
        elif len(shape) != 2 or a is None:
            self.foreign.append(f"{module} is not the kind of module that its factors were made for")
        if a is None or b is None or len(shape) != 2:
            return None
        if not named and not self.is_twin_of_a_target(module):
            self.is_broken(f"{a.name} is there, and target_modules does not name {module}", _NAME_THEM)
            return None
        outputs, inputs = (shape[1], shape[0]) if embedding else (shape[0], shape[1])
        rank = a.shape[0]
        allowed = ranks_of(self.settings, module)
        if rank not in allowed:
            self.is_broken(f"{a.name} has rank {rank}, the settings say {' or '.join(map(str, allowed))}")
            return None
        in_a, in_b = self.blocks(module)
        self.take(a, (rank, inputs // in_a))
        self.take(b, (outputs, rank // in_b))
        magnitude = self.take(tensors.magnitude, (outputs,)) if self.settings.use_dora else None
        if self.settings.use_dora and magnitude is None:
            self.is_broken(f"{module}.lora_magnitude_vector is missing", _COPY_AGAIN)
        diagonal = self.take(tensors.diagonal, (rank,)) if self.settings.use_kasa else None
        if self.settings.use_kasa and diagonal is None:
            self.is_broken(f"{module}.lora_diag is missing", _COPY_AGAIN)
        scale = scale_of(self.settings, module, rank)
        return Factors(a=a, b=b, scale=scale, magnitude=magnitude, diagonal=diagonal, embedding=embedding)

    def blocks(self, module: str) -> tuple[int, int]:
        """Return the numbers of blocks on the diagonal of the two factors."""
        blocks = self.settings.blocks
        if blocks is None:
            return 1, 1
        wrong = blocks.are_wrong(module)
        if wrong:
            self.is_broken(wrong)
        return blocks.of(module)

    def is_twin_of_a_target(self, module: str) -> bool:
        """Tell if PEFT adapts `module` because it is tied to the table that the settings name."""
        if module not in TABLES or not (self.base.tied and self.settings.ensure_weight_tying):
            return False
        twin = HEAD if module == EMBEDDING else EMBEDDING
        return self.settings.targets.name(twin, linear=False)

    def tokens(
        self, module: str, parts: TableParts, shape: tuple[int, ...]
    ) -> tuple[AdapterTensor, tuple[int, ...]] | None:
        """Return the trained rows of a table of `shape`, and their numbers; `None` without them."""
        _, values, indices = parts
        if indices is None:
            return None
        if self.settings.saves(module):
            self.is_broken(f"{module} was trained both whole and row by row")
        if values is None:
            self.is_broken(f"{module}.token_adapter.trainable_tokens_delta is missing", _COPY_AGAIN)
            return None
        self.take(values, (len(indices), *shape[1:]))
        if max(indices, default=0) >= shape[0]:
            self.foreign.append(f"token {max(indices)} was trained, {module} has {shape[0]} rows")
        return values, indices

    def take(self, tensor: AdapterTensor | None, shape: tuple[int, ...]) -> AdapterTensor | None:
        """Note `tensor` as used, and as foreign if it has another shape than `shape`."""
        if tensor is not None:
            self.used.add(tensor.name)
            if tensor.shape != shape:
                self.foreign.append(f"{tensor.name} has shape {list(tensor.shape)}, {list(shape)} is needed")
        return tensor
