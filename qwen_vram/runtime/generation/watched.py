"""Context of each call of `model.generate`: finite logits, a seed, and clear errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList

from qwen_vram.errors import QwenVramError, WorkloadError
from qwen_vram.runtime.generation.finite import FiniteLogits, NotFinite, explained
from qwen_vram.runtime.requests.seeded import Seeded

# Errors of `transformers`' generate() about its arguments.
REFUSED = (ValueError, TypeError, AttributeError, NotImplementedError, ImportError)


@contextmanager
def watched(model: Any, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give arguments for `model.generate` that detect logits which are not finite, and sample from `settings["seed"]`.

    Raises:
        NotFiniteError: the logits are not finite.
        WorkloadError: `generate` refuses the arguments, before the model ran.
    """
    passed = dict(settings)
    seed = passed.pop("seed", None)
    finite = FiniteLogits()
    processors, criteria = [finite, *(passed.get("logits_processor") or ())], [*(passed.get("stopping_criteria") or ())]
    seeded = None if seed is None else Seeded(seed)
    if seeded is not None:
        processors.append(seeded.lend)
        criteria.insert(0, seeded.give_back)
    passed["logits_processor"] = LogitsProcessorList(processors)
    passed["stopping_criteria"] = StoppingCriteriaList(criteria)
    try:
        yield passed
        finite.check()
    except NotFinite:
        raise explained(model, finite.context) from None
    except QwenVramError:
        raise
    except REFUSED as error:
        if finite.context is not None and not in_generate(error):
            raise
        raise refusal(error, settings) from error
    finally:
        if seeded is not None:
            seeded.end()


def in_generate(error: BaseException) -> bool:
    """Tell if `transformers`' code around the model raised the error, such as a logits processor."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith("transformers.generation.")


def refusal(error: Exception, settings: Iterable[str]) -> WorkloadError:
    """Return the refusal of options by `transformers`' code, from its error.

    Args:
        settings: The names of the options.
    """
    said = " ".join(str(error).split())
    return WorkloadError(
        f"transformers' generate() refuses these options: {said}", name="options", got=sorted(settings)
    )
