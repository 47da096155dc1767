"""The chat template of a tokenizer: its choice, its variables, and its end token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen_vram.errors import CheckpointError, UnknownNameError

# An answer that no template contains, to find the text after an answer.
_ANSWER = "zqxjkvb"
_CURE = "put the model's own chat_template.jinja there, or pass chat_template="


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template.

    Attributes:
        text: The Jinja template.
        variables: The names that it reads from its caller.
        keys: The names of parts of messages and tools that it reads.
    """

    text: str
    variables: frozenset[str]
    keys: frozenset[str]


def chosen_template(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], folder: Path) -> Template:
    """Return the template of a conversation: `options["chat_template"]` names one or is one.

    Raises:
        CheckpointError: no template exists, several exist without a default, or it is not a Jinja template.
        UnknownNameError: `options["chat_template"]` names no existing template.
    """
    known, asked = tokenizer.chat_template, options.get("chat_template")
    named: dict[str, str] = known if isinstance(known, dict) else {}
    if asked is not None:
        if isinstance(asked, str) and (asked in named or "{" in asked):
            return _parsed(named.get(asked, asked), "the chat template that was passed")
        raise UnknownNameError("chat_template", asked, tuple(named) or ("a Jinja template as a text",))
    source = f"the chat template in {str(folder)!r}"
    if not known:
        raise CheckpointError(
            f"{str(folder)!r} has no chat template; use generate() with a prompt of your own, or add the model's "
            "chat_template.jinja",
            path=str(folder),
        )
    if not named:
        return _parsed(str(known), source)
    name = "tool_use" if options.get("tools") and "tool_use" in named else "default"
    if name not in named:
        raise CheckpointError(
            f"{str(folder)!r} has chat templates named {', '.join(map(repr, named))}, and none is the default; pass "
            f"chat_template={next(iter(named))!r} or another one of them",
            path=str(folder),
        )
    return _parsed(named[name], source)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """Return the token that the template writes after an answer, such as `<|im_end|>`; `None` for plain text."""
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turn, chat_template=template.text, tokenize=False))
    except Exception:  # the template is for other conversations; rendering checks the caller's own
        return None
    _, answered, rest = text.rpartition(_ANSWER)
    tokens = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if answered else []
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


@lru_cache(maxsize=16)
def _parsed(text: str, source: str) -> Template:
    """Return the template in `text`, with the names that it reads.

    Raises:
        CheckpointError: the text is not a Jinja template.
    """
    from jinja2 import TemplateSyntaxError, meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, with which templates of `transformers` mark an answer."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        tree = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).parse(text)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{source} is not a Jinja template (line {error.lineno}: {error.message}); {_CURE}", path=source
        ) from error
    read = [node.attr for node in tree.find_all(nodes.Getattr)]
    written = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return Template(text, frozenset(meta.find_undeclared_variables(tree)), frozenset([*read, *written]))
