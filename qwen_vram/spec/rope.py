"""Rotary positions of config.json (`transformers` 4 and 5), and how to extend them."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qwen_vram.errors import ConfigError

# The default of transformers if config.json has no rope_theta. Source: transformers 5.23, RotaryEmbeddingConfigMixin.
DEFAULT_THETA = 10_000.0
# The kinds that transformers runs; all but the first read a factor, and the last three also read an original length.
KINDS = ("default", "linear", "dynamic", "proportional", "yarn", "llama3", "longrope")
_WITH_ORIGINAL = ("yarn", "llama3", "longrope")
_ORIGINAL = "original_max_position_embeddings"


class RopeRules(NamedTuple):
    """Statements of a family's publisher about its positions.

    Attributes:
        publisher: The publisher's name.
        native: The length that a model was trained for, by `max_position_embeddings`, if the two differ.
        yarn: The largest factor of YaRN that is published; 0 if YaRN is not recommended.
        trained: The kinds of positions that models were trained with. They do not extend the positions past
            `max_position_embeddings`.
    """

    publisher: str = ""
    native: Mapping[int, int] = {}
    yarn: int = 0
    trained: tuple[str, ...] = ()


class Rope(NamedTuple):
    """The rotary positions of a model.

    Attributes:
        positions: `max_position_embeddings` of config.json.
        native: The length in tokens that `factor` multiplies.
        kind: `rope_type`.
        factor: The factor of the length; 1 if the positions are not extended.
        spelling: Its key in config.json: `rope_scaling` (transformers 4) or `rope_parameters` (5).
        theta: `rope_theta`.
        theta_inside: `rope_theta` is written in that object, not beside it.
        rest: Other entries of that object.
        window: The tokens that the model attends to without dual chunk attention; `None` if config.json has no such
            attention.
        trained: The model was trained with this entry, which then does not extend the positions.
        publisher, yarn: As for `RopeRules`.
        notes: Warnings for any workload.
    """

    positions: int
    native: int
    kind: str = "default"
    factor: float = 1.0
    spelling: str = "rope_scaling"
    theta: float = DEFAULT_THETA
    theta_inside: bool = False
    rest: tuple[tuple[str, object], ...] = ()
    window: int | None = None
    notes: tuple[str, ...] = ()
    trained: bool = False
    publisher: str = ""
    yarn: int = 0

    @property
    def reach(self) -> int:
        """The positions that the model may be used with, including an extension."""
        return self.positions if self.trained else max(self.positions, int(self.factor * self.native))

    def block(self, context_len: int) -> str:
        """The entry of config.json, as JSON, that extends the positions to `context_len` tokens by YaRN."""
        factor = max(2.0, float(-(-context_len // self.native)))
        entry = {"rope_type": "yarn", **({"rope_theta": self.theta} if self.theta_inside else {}), **dict(self.rest)}
        return f"{json.dumps(self.spelling)}: {json.dumps({**entry, 'factor': factor, _ORIGINAL: self.native})}"

    def advice(self, context_len: int) -> str:
        """Advice for `context_len` tokens, which exceed the model's positions."""
        if not self.yarn:
            return "shorten one of them"
        far = context_len > self.yarn * self.native
        doubt = f" ({self.publisher} publishes factors up to {self.yarn}; answers may suffer)" if far else ""
        instead = "in place of the entry that is there" if self.factor > 1 or self.theta_inside else "as one entry"
        return (
            f"shorten one of them, or set YaRN's {self.spelling} in config.json of a local copy{doubt}, {instead}: "
            f"{self.block(context_len)}"
        )

    def warnings(self, context_len: int) -> list[str]:
        """Warnings for a context of `context_len` tokens."""
        found = list(self.notes)
        if self.factor > 1 and not self.trained:
            more = f"; {context_len:,} tokens need no stretch" if context_len <= self.native else ""
            found.append(
                f"{self.spelling} stretches {self.native:,} positions by {self.kind} with a factor of {self.factor:g} "
                f"to {self.reach:,}, for short texts too, whose answers may suffer{more}"
            )
        if self.window is not None and context_len > self.window:
            found.append(
                f"dual chunk attention (dual_chunk_attention_config) is not run: {context_len:,} tokens are past the "
                f"{self.window:,} that the model attends to without it, and answers may suffer, as with transformers"
            )
        return found


def read_rope(config: Mapping[str, object], model_type: str, positions: int, source: str, rules: RopeRules) -> Rope:
    """Read the rotary positions of config.json.

    Args:
        positions: `max_position_embeddings`.
        rules: The rules of the family.

    Raises:
        ConfigError: an entry that `transformers` does not run, or two entries, one of which would lose `rope_theta`.
    """

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{source}: {what}", source=source)

    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    spelling = "rope_scaling" if old or not isinstance(new, Mapping) else "rope_parameters"
    entry = old or new or {}
    if not isinstance(entry, Mapping):
        raise refuse(f"{spelling} must be an object or null, got {entry!r}")
    if any(isinstance(value, Mapping) for value in entry.values()):
        raise refuse(f"{spelling} has entries by kind of layer, which a dense {model_type} does not; write one for all")
    theta = _number(entry.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)), "rope_theta", refuse)
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in KINDS:
        raise refuse(
            f"{spelling} has the rope_type {kind!r}, which a {model_type} is not run with; {', '.join(KINDS)} are"
        )
    known = ("rope_theta", "rope_type", "type", "factor", _ORIGINAL)
    rope = Rope(
        positions=positions,
        native=rules.native.get(positions, positions),
        kind=str(kind),
        spelling=spelling,
        theta=theta,
        theta_inside="rope_theta" in entry,
        rest=tuple((key, value) for key, value in entry.items() if key not in known and _plain(value)),
        window=_window(config),
        trained=kind in rules.trained,
        publisher=rules.publisher,
        yarn=rules.yarn,
    )
    if kind != "default":
        rope = _stretched(rope, config, entry, refuse)
    elif "factor" in entry:
        unused = f"the factor {entry['factor']!r} in {spelling} has no effect under the rope_type 'default'"
        rope = rope._replace(notes=(f'{unused}; write "rope_type": "yarn" to stretch the positions',))
    if old and isinstance(new, Mapping):
        _check_theta(rope, new, refuse)
    return rope


def _stretched(
    rope: Rope, config: Mapping[str, object], entry: Mapping[str, object], refuse: Callable[[str], ConfigError]
) -> Rope:
    named = entry.get(_ORIGINAL)
    if rope.kind in _WITH_ORIGINAL and config.get(_ORIGINAL) is not None:
        named = config[_ORIGINAL]
    original = rope.positions if named is None else _number(named, f"{_ORIGINAL} in {rope.spelling}", refuse)
    factor = entry.get("factor")
    if factor is None and rope.kind == "yarn" and "factor" in entry:
        factor = rope.positions / original
    if factor is None and rope.kind != "longrope":
        raise refuse(f"{rope.spelling} of the rope_type {rope.kind!r} needs a factor, such as 4.0")
    multiplied = 1.0 if factor is None else _number(factor, f"factor in {rope.spelling}", refuse)
    notes = rope.notes
    if named is None and rope.kind in _WITH_ORIGINAL:
        notes = (
            f"{rope.spelling} names no {_ORIGINAL}, so that transformers takes max_position_embeddings "
            f"{rope.positions:,} for it and stretches that by {multiplied:g}; name the length that the model was "
            "trained on if max_position_embeddings is the stretched one already",
        )
    return rope._replace(native=int(original), factor=multiplied, notes=notes)


def _check_theta(rope: Rope, new: Mapping[str, object], refuse: Callable[[str], ConfigError]) -> None:
    """Refuse a `rope_scaling` beside a `rope_parameters` whose `rope_theta` would be dropped."""
    lost = new.get("rope_theta")
    if not isinstance(lost, (int, float)) or lost == rope.theta:
        return
    one = rope._replace(spelling="rope_parameters", theta=float(lost), theta_inside=True)
    reach = max(one.reach, 2 * one.native) if one.kind == "yarn" else one.positions
    raise refuse(
        f"rope_scaling stands beside rope_parameters, and transformers drops rope_parameters for it, with its "
        f"rope_theta {lost:g}; take rope_scaling out and write one entry in place of both, {one.block(reach)}"
    )


def _window(config: Mapping[str, object]) -> int | None:
    """The tokens of one chunk of dual chunk attention, which `transformers` does not run."""
    settings = config.get("dual_chunk_attention_config")
    if not isinstance(settings, Mapping):
        return None
    window = settings.get(_ORIGINAL, settings.get("chunk_size"))
    return window if isinstance(window, int) else None


def _number(value: object, name: str, refuse: Callable[[str], ConfigError]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise refuse(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _plain(value: object) -> bool:
    return isinstance(value, (int, float, str, bool))
