"""Settings of one generation: options over generation_config.json, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from qwen_vram.errors import ConfigError, QwenVramError, WorkloadError
from qwen_vram.runtime.requests.vocabulary import padding_token

_FILE = "generation_config.json"


class _Range(NamedTuple):
    """The allowed values of a setting, and their description for errors."""

    words: str
    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def has(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        return inside and (not self.whole or isinstance(value, int))


# Source: transformers 5.23, generation/logits_process.py, and generation/configuration_utils.py, `validate`.
_SAMPLING = {
    "temperature": _Range("a number, 0 (greedy) or more", 0),
    "top_k": _Range("a whole number, 0 (off) or more", 0, whole=True),
    "top_p": _Range("a number from 0 to 1", 0, 1),
    "min_p": _Range("a number from 0 to 1", 0, 1),
    "top_h": _Range("a number above 0, up to 1", 0, 1, above=True),
    "typical_p": _Range("a number above 0, up to 1", 0, 1, above=True),
    "epsilon_cutoff": _Range("a number from 0 to 1", 0, 1),
    "eta_cutoff": _Range("a number from 0 to 1", 0, 1),
}
_ALWAYS = {
    "num_beams": _Range("a whole number, 1 or more", 1, whole=True),
    "num_return_sequences": _Range("a whole number, 1 or more", 1, whole=True),
    "repetition_penalty": _Range("a number above 0 (1 is off)", 0, above=True),
    "no_repeat_ngram_size": _Range("a whole number, 0 (off) or more", 0, whole=True),
    "min_new_tokens": _Range("a whole number, 0 or more", 0, whole=True),
    "max_time": _Range("a number of seconds above 0", 0, above=True),
    "length_penalty": _Range("a number", -math.inf),
}
_LARGEST_SEED = 2**64 - 1
# Decoding methods that `transformers` 5 no longer has, and loads as code from the hub.
_FOREIGN_CODE = ("penalty_alpha", "num_beam_groups", "dola_layers", "constraints", "force_words_ids")


class Settings:
    """The settings of one generation.

    Args:
        options: The caller's options of `generate`.
        file: The model's `generation_config`, with the values that no option sets.
    """

    def __init__(self, options: Mapping[str, Any], file: GenerationConfig) -> None:
        self._options = options
        self._file = file

    def max_new_tokens(self, asked: int | None) -> int | None:
        """Return the caller's number of new tokens, from the argument or the caller's own `generation_config`."""
        return self._passed("max_new_tokens") if asked is None else asked

    @property
    def answers(self) -> int:
        """The number of answers for each prompt."""
        return self.value("num_return_sequences") or 1

    def value(self, name: str) -> Any:
        """Return a setting that applies: an option, a field of the caller's `generation_config`, or the file's."""
        own = self._passed(name)
        return getattr(self._file, name, None) if own is None and name not in self._options else own

    def settled(
        self, tokenizer: PreTrainedTokenizerBase, table: int, *, end_of_turn: int | None = None
    ) -> dict[str, Any]:
        """Return complete and checked options for `generate`.

        A temperature of 0 is greedy, and an option of sampling without `do_sample` samples.

        Args:
            table: Rows of the model's token embeddings.
            end_of_turn: A token that ends the answer, in addition to the model's own.

        Raises:
            WorkloadError: an option is out of its range.
            ConfigError: a setting of generation_config.json that applies is out of its range.
        """
        settings = {"tokenizer": tokenizer, **self._options}
        if self.value("use_cache") is False and "use_cache" not in self._options:
            settings["use_cache"] = True  # false is a leftover of training; the plan has a cache
        do_sample = self._samples()
        for name in _FOREIGN_CODE:
            sampled = name == "penalty_alpha" and do_sample  # without effect
            if self.value(name) not in (None, 1) and not sampled:
                why = f"transformers loads code from the hub for it, which is not run here: leave {name} out"
                raise self._error(name, self.value(name), why)
        settings["do_sample"] = do_sample
        for name, allowed in (_ALWAYS | _SAMPLING).items():
            value = self.value(name)
            if value is None or (name in _SAMPLING and not do_sample and self._passed(name) is None):
                continue
            if not allowed.has(value):
                raise self._refused(name, value, allowed.words)
            if not allowed.whole and isinstance(value, int):
                settings[name] = float(value)  # `transformers` refuses whole numbers for some of them
        if self.value("temperature") == 0:
            for name in _SAMPLING:
                settings.pop(name, None)
        for name in ("num_beams", "num_return_sequences"):
            if name in settings and settings[name] is None:
                settings[name] = 1  # `transformers` compares them as numbers
        self._check_answers(do_sample)
        self._check_seed()
        self._add_ends(settings, tokenizer, table, end_of_turn)
        for name in ("logits_processor", "stopping_criteria"):
            if name in settings:
                settings[name] = _listed(settings[name])
        return settings

    def check_stream(self) -> None:
        """Refuse settings with more than one answer, or without an answer before the last token.

        Raises:
            WorkloadError, ConfigError: an option, or a setting of generation_config.json, is such a setting.
        """
        for name, allowed in ("num_beams", _ALWAYS["num_beams"]), ("num_return_sequences", _ALWAYS["num_beams"]):
            value = self.value(name)
            if value is not None and allowed.has(value) and value > 1:
                raise self._error(
                    name,
                    value,
                    f"stream() gives one answer as it is made: pass {name}=1 (--set {name}=1), or use chat()",
                )

    def _samples(self) -> bool:
        asked = self.value("do_sample")
        if not isinstance(asked, bool | None):
            raise self._refused("do_sample", asked, "true or false")
        if self.value("temperature") == 0 and not isinstance(self.value("temperature"), bool):
            return False
        if self._passed("do_sample") is None and any(self._passed(name) is not None for name in _SAMPLING):
            return True
        return bool(asked)

    def _check_answers(self, do_sample: bool) -> None:
        answers, beams = self.answers, self.value("num_beams") or 1
        if beams == 1 and answers > 1 and not do_sample:
            why = "greedy decoding gives one answer: pass do_sample=True with a temperature above 0, or num_beams"
            raise self._error("num_return_sequences", answers, f"{why}={answers}")
        if 1 < beams < answers:
            why = f"{beams} beams give {beams} answers at most: pass num_beams={answers}"
            raise self._error("num_return_sequences", answers, why)

    def _check_seed(self) -> None:
        seed = self._options.get("seed")
        if seed is not None and not _Range("", 0, _LARGEST_SEED, whole=True).has(seed):
            raise self._refused("seed", seed, f"a whole number from 0 to {_LARGEST_SEED:,}")

    def _add_ends(
        self, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, table: int, end_of_turn: int | None
    ) -> None:
        """Complete the tokens and texts that end an answer, and the padding token after an end in a batch."""
        ends = self.value("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(one) is int for one in ends):
            raise self._refused("eos_token_id", self.value("eos_token_id"), "a token id or a list of token ids")
        chosen = "eos_token_id" in self._options or self._passed("eos_token_id") is not None
        if end_of_turn is not None and end_of_turn not in ends and not chosen:
            settings["eos_token_id"] = ends = [*ends, end_of_turn]
        filler = self.value("pad_token_id")
        if type(filler) is not int or not 0 <= filler < table:
            settings["pad_token_id"] = next((one for one in ends if 0 <= one < table), padding_token(tokenizer, table))
        stops = self.value("stop_strings")
        if stops is None:
            return
        texts = [stops] if isinstance(stops, str) else stops
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise self._refused("stop_strings", stops, "a text or a list of texts, none empty")

    def _passed(self, name: str) -> Any:
        """Return the value of a setting in this call only."""
        if name in self._options:
            return self._options[name]
        return getattr(self._options.get("generation_config"), name, None)

    def _refused(self, name: str, value: object, words: str) -> QwenVramError:
        return self._error(name, value, f"it must be {words}")

    def _error(self, name: str, value: object, why: str) -> QwenVramError:
        if name in self._options or self._passed(name) is not None:
            return WorkloadError(f"{name}={value!r} cannot be run; {why}", name=name, got=value)
        return ConfigError(f"{name}={value!r} in {_FILE} cannot be run; {why}", source=_FILE)


def generation_config(folder: Path) -> GenerationConfig:
    """Return the generation_config.json of a checkpoint as `transformers` reads it.

    Raises:
        ConfigError: `transformers` refuses its contents, and could not load the model.
    """
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # no such file, or not JSON: `transformers` then uses config.json
        return GenerationConfig()
    except Exception as error:  # values of a wrong type can raise any error
        said = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{str(folder / _FILE)!r} cannot be used: {said}. Correct that setting, or remove it from the file",
            source=str(folder / _FILE),
        ) from error


def _listed(given: Any) -> list[Any]:
    """Return processors or criteria as a list, also if the caller passes a single one."""
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
