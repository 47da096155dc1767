"""Options of `chat`, `generate` and `stream`, sorted by their receiver.

An option goes to the chat template or to `transformers`' `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers import GenerationConfig

from qwen_vram.errors import UnknownNameError, WorkloadError
from qwen_vram.runtime.requests.template import Template

# Arguments of `apply_chat_template` that change its text. Source: transformers 5.23.
_TEMPLATE = ("tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")
# Those of these that are refused if the template does not read them by name.
_READ = ("tools", "documents")
# Arguments of `generate` beside the fields of `generation_config`. Source: transformers 5.23, generation/utils.py.
_GENERATE = (
    "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model", "assistant_tokenizer", "tokenizer", "streamer", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate", "past_key_values",
)  # fmt: skip
# Arguments that the conversation or the prompt sets.
_OURS = ("input_ids", "attention_mask", "inputs_embeds", "labels", "kwargs", "args", "transformers_version")
_COMMON = (
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed", "stop_strings", "num_beams",
    "num_return_sequences", "repetition_penalty",
)  # fmt: skip
# Names of the same options in other libraries.
_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "n": "num_return_sequences",
    "best_of": "num_beams",
    "random_seed": "seed",
    "generator": "seed",
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
    "thinking": "enable_thinking",
    "functions": "tools",
    "system_prompt": "system",
    "logprobs": "output_scores",
}


class Options(NamedTuple):
    """Options by their receiver; those in `template` are for the chat template."""

    template: dict[str, Any]
    generate: dict[str, Any]


def sorted_options(options: Mapping[str, Any], model: Any, template: Template | None) -> Options:
    """Return options by their receiver.

    Args:
        options: The caller's options.
        model: A `transformers` model, or a `PeftModel` of one; its `forward` accepts further options. `None` if it is
            not loaded yet.
        template: The chat template; `None` if the prompt uses none.

    Raises:
        UnknownNameError: neither the template nor `generate` accepts an option.
        WorkloadError: `chat_template_kwargs` is not a dict, or repeats an option with another value.
    """
    given = dict(options)
    known = _generate_names(model)
    nested = given.pop("chat_template_kwargs", None) or {}
    if not isinstance(nested, Mapping):
        raise WorkloadError(
            f"chat_template_kwargs must be a dict of arguments of the chat template, got {nested!r}",
            name="chat_template_kwargs",
            got=nested,
        )
    for name in nested.keys() & given.keys():
        raise WorkloadError(
            f"{name} is passed twice, by itself and in chat_template_kwargs; pass it once", name=name, got=nested[name]
        )
    variables = frozenset() if template is None else template.variables
    for_template = {name: value for name, value in given.items() if _is_for_template(name, known, variables)}
    for_template |= nested
    for name, value in for_template.items():
        if name in variables or (template is not None and name in _TEMPLATE and (name not in _READ or not value)):
            continue
        raise _not_read(name, template)
    for_generate = {name: value for name, value in given.items() if name not in for_template}
    for name in for_generate.keys() - known:
        raise _unknown(name, known | variables)
    if not isinstance(for_generate.get("generation_config"), GenerationConfig | None):
        raise WorkloadError(
            "generation_config must be a transformers.GenerationConfig, got "
            f"{for_generate['generation_config']!r}; or pass its fields as options",
            name="generation_config",
            got=for_generate["generation_config"],
        )
    return Options(for_template, for_generate)


def _is_for_template(name: str, known: frozenset[str], variables: Iterable[str]) -> bool:
    return name not in known and (name in variables or name in _TEMPLATE or name == "enable_thinking")


def _generate_names(model: Any) -> frozenset[str]:
    """Return the names of all options of `generate` for this model, with those of this library."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    forward = () if base is None else inspect.signature(base.forward).parameters
    return frozenset({*fields, *_GENERATE, *forward, "seed"} - {*_OURS, "max_length"})


def _unknown(name: str, known: Iterable[str]) -> UnknownNameError:
    elsewhere = _ELSEWHERE.get(name)
    near = (elsewhere,) if elsewhere else tuple(get_close_matches(name, sorted(known), n=3, cutoff=0.6))
    hint = "options are those of transformers' generate(), and in chat() and stream() those of the chat template"
    return UnknownNameError("option", name, near or _COMMON, hint=hint)


def _not_read(name: str, template: Template | None) -> UnknownNameError:
    if template is None:
        hint = f"{name} is for a chat template, through which chat() and stream() go, and generate() does not"
        return UnknownNameError("option", name, _COMMON, hint=hint)
    reads = tuple(sorted(template.variables - {"messages", "raise_exception", "strftime_now"}))
    hint = f"this template would leave {name} out: do without it, or use a model whose template reads it"
    return UnknownNameError("option of the chat template", name, reads or ("none",), hint=hint)
