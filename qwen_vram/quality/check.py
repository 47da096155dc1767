"""`check()`: measure what a configuration of a model costs in quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_vram.checkpoints.cpu_info import cpu_name
from qwen_vram.checkpoints.resolve import resolve_model
from qwen_vram.demo import CHECKPOINT
from qwen_vram.errors import CheckpointError, UnknownNameError, WorkloadError
from qwen_vram.planning.capacity.budget import VramLike
from qwen_vram.planning.questions import plan
from qwen_vram.quality.answers.ask import ask
from qwen_vram.quality.distance import compare, distance
from qwen_vram.quality.documents import Documents, documents
from qwen_vram.quality.questions.draw import CATEGORIES, Tasks, chosen, draw, most
from qwen_vram.quality.questions.recall import TOKENS
from qwen_vram.quality.reference import ReferenceLogits, identity
from qwen_vram.quality.report import QualityReport
from qwen_vram.quality.teacher_forcing import PIECE, scored_logits
from qwen_vram.runtime.backends import get_backend
from qwen_vram.runtime.loaded_model import LoadedModel
from qwen_vram.runtime.loading import preflight
from qwen_vram.runtime.loading.devices import devices_for
from qwen_vram.runtime.loading.load import load
from qwen_vram.runtime.tensors.checkpoint import Checkpoint, open_checkpoint, open_tokenizer
from qwen_vram.spec.architecture import Architecture
from qwen_vram.spec.profile import Profile

Measure = Literal["all", "distance", "questions"]
MEASURES = ("all", "distance", "questions")
# Called with the name of the step, the number that is done, and the number of all.
Progress = Callable[[str, int, int], object]

_LIBRARIES = ("torch", "transformers", "bitsandbytes")
# Tokens beside a long text: its facts, the question and the chat template.
_BESIDE = 512
_ANSWER = 256


def check(
    model: str | Path,
    *,
    against: str | Path | None = None,
    profile: str | Profile = "auto",
    vram: VramLike = None,
    measure: Measure = "all",
    questions: int = 40,
    categories: Sequence[str] | None = None,
    seed: int = 0,
    texts: int = 16,
    text_tokens: int = 512,
    adapter: str | Path | None = None,
    against_adapter: str | Path | None = None,
    device: str | None = None,
    logits: str | Path | None = None,
    on_progress: Progress | None = None,
    **knobs: object,
) -> QualityReport:
    """Measure the distance of a model from its 16-bit reference, and ask it questions with known answers.

    The distance compares the distributions of the next token over documents. The reference runs once, and its logits
    are kept on the disk. If it does not fit the GPU, its layers are streamed. The questions are of five categories:
    Chinese facts, algebra, Python functions, Markdown tables, and recall from a text of more than 4,096 tokens.

    Args:
        model: A checkpoint folder, a catalog name, or a hub id.
        against: The 16-bit reference; `None` is the same checkpoint in its own dtype.
        profile, vram, device, **knobs: The configuration to check, as for `load()`.
        measure: `"distance"`, `"questions"`, or `"all"` for both.
        questions: The number of questions in each category.
        categories: Names of categories; `None` is all five.
        seed: Another seed gives other questions, and documents with other questions in them.
        texts: The number of documents.
        text_tokens: Tokens of a document, of which the second half is scored.
        adapter, against_adapter: LoRA adapters that run beside the model and beside the reference.
        logits: The folder of stored logits; `None` is in the user's cache folder.
        on_progress: Called with the name of the step, the number that is done, and the number of all.

    Raises:
        WorkloadError: a number is out of range, or the reference has another vocabulary.
        UnknownNameError: there is no such category or measure.
        CheckpointError: the model is quantized already and has no reference, or the disk is too full.
        QwenVramError: as for `load()`.
    """
    if measure not in MEASURES:
        raise UnknownNameError("measure", measure, MEASURES)
    names = chosen(categories)
    _check_numbers(questions, names, seed, texts, text_tokens)
    compared = measure != "questions"
    if compared:
        _check_reference(model, against)
    own = open_checkpoint(model)
    reference = open_checkpoint(against) if against is not None else own
    tokenizer = open_tokenizer(own.folder)
    tasks = tasks_of(own.architecture)
    report = on_progress or (lambda step, done, of: None)

    def encode(text: str) -> list[int]:
        return [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def as_chat(question: str, answer: str) -> tuple[str, str]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        return (asked, whole[len(asked) :]) if whole.startswith(asked) else ("", whole)

    asked = [] if measure == "distance" else draw(tasks, names, seed, questions, lambda text: len(encode(text)))
    prompt_len = text_tokens if not asked else max(text_tokens, *(len(encode(one.prompt)) + _BESIDE for one in asked))
    configuration: dict[str, Any] = {"profile": profile, "adapter": adapter, **knobs}
    configuration |= {"prompt_len": prompt_len, "max_new_tokens": _ANSWER}
    stored, made, reference_settings = None, None, None
    if compared:
        made = documents(tasks, seed, texts, text_tokens, encode, as_chat)
        _check_vocabulary(own, reference, made)
        stored = _stored(reference, made, against_adapter, device, logits)
        if not stored.is_stored:
            _check_configuration(own.folder, vram, device, configuration)
            stored.check_disk(made.predicted * texts * reference.architecture.vocab_size)
            with _load_reference(reference, vram, against_adapter, device, text_tokens) as llm:
                reference_settings = asdict(llm.plan.profile)
                stored.write(_each(llm, made), _counter(report, "reference", texts))
    found, answers = None, None
    with load(own.folder, vram=vram, device=device, **configuration, progress=False) as llm:
        settings, place = asdict(llm.plan.profile), _device(llm)
        if made is not None and stored is not None:
            count = _counter(report, "distance", texts)
            rows = []
            for number, one in enumerate(_each(llm, made)):
                targets = torch.tensor(made.ids[number][made.context :])
                scored = torch.tensor(made.counts[number]).bool()
                rows.append(compare(stored.read(number)[scored], one[scored], targets[scored]))
                count()
            found = distance(rows)
        if asked:
            answers = ask(llm, asked, _counter(report, "questions", len(asked)))
    return QualityReport(
        model=str(model),
        settings=settings,
        reference=str(against or model) if compared else None,
        reference_settings=reference_settings,
        seed=seed,
        tasks=tasks,
        device=place,
        versions={name: version(name) for name in _LIBRARIES},
        date=date.today().isoformat(),
        distance=found,
        questions=answers,
    )


def tasks_of(architecture: Architecture) -> Tasks:
    """Return `demo` for a model of the bundled checkpoint's shape, which answers its own questions alone."""
    _, bundled = resolve_model(CHECKPOINT)
    shape = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    return "demo" if all(getattr(architecture, name) == getattr(bundled, name) for name in shape) else "general"


def _check_numbers(questions: int, names: Sequence[str], seed: int, texts: int, text_tokens: int) -> None:
    least = min(most(name) for name in names) if names else 0
    for name, got, low, high in (
        ("questions", questions, 1, least),
        ("seed", seed, 0, 2**31 - 1),
        ("texts", texts, 2, 1_000),
        ("text_tokens", text_tokens, 32, TOKENS),
    ):
        if isinstance(got, bool) or not isinstance(got, int) or not low <= got <= high:
            raise WorkloadError(
                f"{name} must be a whole number from {low:,} to {high:,}, got {got!r}", name=name, got=got
            )


def _check_reference(model: str | Path, against: str | Path | None) -> None:
    """Refuse a reference that is quantized, before a file is downloaded."""
    label, architecture = resolve_model(against if against is not None else model, False)
    if architecture.stored_format is not None:
        advice = "name its 16-bit model with against= (--against), or" if against is None else "name a 16-bit model, or"
        raise CheckpointError(
            f"{label!r} stores {architecture.stored_format} weights, so it is no reference; {advice} measure the "
            "questions alone with measure='questions' (--measure questions)",
            path=str(against or model),
        )


def _check_configuration(folder: Path, vram: VramLike, device: str | None, configuration: dict[str, Any]) -> None:
    """Refuse a configuration that cannot be loaded here, before the reference runs, which can take long."""
    devices = devices_for(device, vram)
    chosen_plan = plan(folder, vram={} if devices[0].type == "cpu" else vram, **configuration)
    for one in devices:
        preflight.check(chosen_plan, get_backend(chosen_plan.profile.weights), one)


def _check_vocabulary(own: Checkpoint, reference: Checkpoint, made: Documents) -> None:
    sizes = [one.architecture.vocab_size for one in (own, reference)]
    if sizes[0] != sizes[1]:
        raise WorkloadError(
            f"the model has {sizes[0]:,} logits and the reference {sizes[1]:,}; a distance needs two models of one "
            "vocabulary: name the model's own 16-bit checkpoint with against= (--against)",
            name="against",
            got=str(reference.folder),
        )


def _stored(
    reference: Checkpoint, made: Documents, adapter: str | Path | None, device: str | None, root: str | Path | None
) -> ReferenceLogits:
    facts = {
        "files": identity(reference.folder),
        "adapter": None if adapter is None else identity(Path(adapter)) or str(adapter),
        "documents": made.digest,
        "piece": PIECE,
        "on_cpu": device == "cpu" or not torch.cuda.is_available(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return ReferenceLogits(None if root is None else Path(root), facts)


def _load_reference(
    reference: Checkpoint, vram: VramLike, adapter: str | Path | None, device: str | None, tokens: int
) -> LoadedModel:
    """Load the reference in 16 bits; the plan streams layers if they do not fit."""
    dense: dict[str, Any] = {"weights": _dense(reference.architecture), "kv_cache": "bf16", "lm_head": None}
    work: dict[str, Any] = {"prompt_len": tokens, "max_new_tokens": PIECE, "progress": False}
    return load(reference.folder, vram=vram, adapter=adapter, device=device, **dense, **work)


def _dense(architecture: Architecture) -> str:
    """Return the storage format of the reference's own dtype."""
    dtypes = set(architecture.layer_dtypes)
    return {"F16": "fp16", "F32": "fp32"}.get(dtypes.pop(), "bf16") if len(dtypes) == 1 else "bf16"


def _each(llm: LoadedModel, made: Documents) -> Iterator[torch.Tensor]:
    return (scored_logits(llm, ids, made.context) for ids in made.ids)


def _counter(report: Progress, step: str, of: int) -> Callable[[], object]:
    done = iter(range(1, of + 1))
    report(step, 0, of)
    return lambda: report(step, next(done), of)


def _device(llm: LoadedModel) -> str:
    if llm.device.type == "cuda":
        return str(torch.cuda.get_device_name(llm.device))
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


__all__ = ["CATEGORIES", "MEASURES", "check", "tasks_of"]
