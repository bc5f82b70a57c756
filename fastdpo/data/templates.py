"""A chat template as transformers renders it, on a fixed day, and what it reads."""

from __future__ import annotations

import datetime
import inspect
import re
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from jinja2 import meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from fastdpo.data.terms import DataError, type_name

Messages = list[dict[str, Any]]

# Names under which a message's reasoning is given; transformers hands on the first that is there as the first of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TRL_TEMPLATES = "chat_templates"


def _compiled(source: str) -> Any:
    """The template in the environment that transformers renders it in, which it gives to nobody by a public name."""
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None:
        raise ImportError(
            f"transformers {transformers.__version__} compiles chat templates in another way than fastdpo knows; "
            "install the transformers that fastdpo was released with, or a newer fastdpo."
        )
    return compile_template(source)


class ChatTemplate:
    """One template with the tokenizer's special tokens and a day.

    ``apply_chat_template`` has no way to say which day it is; rendering the compiled template has.

    Args:
        source: Jinja.
        special_tokens: the tokenizer's, as pairs of name (``bos_token``, ...) and token.
        day: what ``strftime_now`` tells, at midnight.
    """

    def __init__(self, source: str, special_tokens: tuple[tuple[str, str], ...], day: datetime.date) -> None:
        self.source = source
        self.marks_answers = _GENERATION.search(source) is not None
        self.compiled = _compiled(source)
        midnight = datetime.datetime(day.year, day.month, day.day)
        self._given = {**dict(special_tokens), "strftime_now": midnight.strftime, "documents": None}

    @cached_property
    def reads(self) -> frozenset[str]:
        """Names of variables that the template takes from outside."""
        return frozenset(meta.find_undeclared_variables(self.compiled.environment.parse(self.source)))

    @cached_property
    def writes_date(self) -> bool:
        names = self.compiled.environment.parse(self.source).find_all(nodes.Name)
        return any(name.name == "strftime_now" for name in names)

    def variables(self, kwargs: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
        """A row's ``chat_template_kwargs`` that the template reads, and the names of the others.

        Raises:
            DataError: one would change how the template is applied, or what it is given.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        for name in kwargs:
            if name in _ARGUMENTS or name == "messages" or name in self._given or name in self.compiled.globals:
                raise DataError(
                    f"{where}, chat_template_kwargs: {name!r} is no variable of the chat template; it decides how the "
                    "template is applied, which no row may. Leave it out."
                )
        return {name: kwargs[name] for name in kwargs if name in self.reads}, [n for n in kwargs if n not in self.reads]

    def bind(self, tools: Any, variables: dict[str, Any]) -> BoundTemplate:
        # Jinja looks all of its globals through for every rendering; once will do.
        return BoundTemplate(self, {**self.compiled.globals, **self._given, "tools": tools, **variables})


class BoundTemplate:
    """A template with all that it is given beside the messages."""

    def __init__(self, template: ChatTemplate, given: dict[str, Any]) -> None:
        self.template, self._given = template, given

    def render(self, messages: Messages, answer: bool = False) -> str:
        """The text of messages in the form of :func:`plain`; with ``answer``, and the beginning of an answer."""
        compiled = self.template.compiled
        given = {**self._given, "messages": messages, "add_generation_prompt": answer}
        context = compiled.environment.context_class(compiled.environment, given, compiled.name, compiled.blocks)
        return "".join(compiled.root_render_func(context))

    def render_marked(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text without the beginning of an answer, and where its ``{% generation %}`` blocks lie."""
        compiled = self.template.compiled
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with compiled.environment.activate_tracker(blocks, spans):
            for block in compiled.generate(messages=messages, add_generation_prompt=False, **self._given):
                blocks.append(block)
        return "".join(blocks), spans


@lru_cache(maxsize=32)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...], day: datetime.date) -> ChatTemplate:
    return ChatTemplate(source, special_tokens, day)


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Any, day: datetime.date) -> ChatTemplate:
    """The template that the tokenizer uses with these tools.

    Raises:
        DataError: it has none.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "The rows are message lists, and the tokenizer has no chat_template to render them with. Use the tokenizer "
            "of a model for chats, or name a template (--chat_template_path)."
        )
    special_tokens = tuple(tokenizer.special_tokens_map.items())
    return _template(tokenizer.get_chat_template(tools=tools), special_tokens, day)


def writes_date(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether what is rendered depends on the day."""
    template = tokenizer and tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else [template] if template else []
    return any(_template(source, (), datetime.date.min).writes_date for source in sources)


def read_template(name: str) -> str:
    """A chat template from a file; or, where TRL is installed, one of its own by name (``glm4moe_training``, ...).

    Raises:
        DataError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    trl = find_spec("trl")
    folder = Path(trl.origin).parent / _TRL_TEMPLATES if trl and trl.origin else None
    if folder and re.fullmatch(r"\w+", name) and (folder / f"{name}.jinja").is_file():
        return (folder / f"{name}.jinja").read_text(encoding="utf-8")
    known = sorted(file.stem for file in folder.glob("*_training.jinja")) if folder and folder.is_dir() else []
    names = f"one of TRL's: {', '.join(known)}" if known else "one of TRL's by name, where TRL is installed"
    raise DataError(f"No chat template {name!r}: it should be a file with a Jinja template, or {names}.")


def plain(messages: Messages, where: str) -> Messages:
    """Messages as transformers gives them to a template: no fields that are null, reasoning under each of its names.

    Raises:
        DataError: a value is none that JSON has, of which a template would write its type.
    """
    return [_plain(message, where) for message in messages]


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    if len(message) == 2 and isinstance(message.get("content"), str):
        return message
    # To many templates, a list of calls says that there is one.
    message = {name: value for name, value in message.items() if value is not None and (value or name != "tool_calls")}
    check_json(message, where)
    given = [message[name] for name in REASONING if name in message]
    reasoning = next(filter(None, given), given[0] if given else None)  # some writers leave one of them empty
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def check_json(value: Any, where: str) -> None:
    """Raise DataError for a value that JSON has no form for."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            check_json(item, where)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise DataError(
            f"{where}: there is {type_name(value)} in it, which JSON has no form for; write it as the model should "
            "read it."
        )
