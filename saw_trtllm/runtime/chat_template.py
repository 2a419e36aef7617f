"""Conversations to prompts: a tokenizer's chat template, rendered as transformers' ``apply_chat_template`` does.

A template comes with the checkpoint, and a checkpoint from anybody: it runs in jinja2's sandbox, sees plain values
only, and its loops are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from saw_trtllm.errors import CheckpointError, RequestError
from saw_trtllm.paths import is_file, read_json
from saw_trtllm.runtime.keywords import shown

#: A conversation: dicts with ``role`` and ``content``, and what else the template knows.
Messages = Sequence[Mapping[str, Any]]

#: Turns of a template's loops in one rendering. A message takes a few, and a template that loops forever all of them.
MAX_TURNS = 1_000_000
#: Characters or items that a template may make of a few by multiplication.
_MAX_REPEATED = 1_000_000

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT, _TOOL_USE = "default", "tool_use"
#: What a template sees of the request itself.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_CONTINUED = "CONTINUED_FINAL_MESSAGE "


class ChatTemplate:
    """The templates of a tokenizer: one, or one for conversations with tools beside it.

    Parameters
    ----------
    sources : str or dict
        A template in jinja2, or several by name: ``default`` and ``tool_use``.
    special_tokens : dict, optional
        What the template sees beside the conversation: ``bos_token``, ``eos_token`` and its like.
    """

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, Any] | None = None) -> None:
        self._sources = {_DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a tokenizer's folder, where transformers looks for it; None if there is none.

        Raises
        ------
        CheckpointError
            If a file cannot be read.
        """
        config = _optional_json(folder / "tokenizer_config.json")
        sources = _sources(folder, config)
        if not sources:
            return None
        named = {**_optional_json(folder / "special_tokens_map.json"), **config}
        tokens = {name: _content(named[name]) for name in _NAMED_TOKENS if named.get(name) is not None}
        return cls(sources, tokens)

    @classmethod
    def from_file(cls, path: Path, special_tokens: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The template in a file.

        Raises
        ------
        CheckpointError
            If it cannot be read, or is no template.
        """
        source = _read(path)
        _compile(source)
        return cls(source, special_tokens)

    def replaced(self, source: str) -> ChatTemplate:
        """Another template with the same special tokens."""
        return ChatTemplate(source, self._special_tokens)

    @property
    def text(self) -> str:
        """What stands in the templates."""
        return "".join(self._sources.values())

    def check_tools(self, tools: Any) -> None:
        """Raise RequestError unless they are functions, and a template shows them: it would leave them out silently."""
        if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError(f'tools is {shown(tools)}: give a list of {{"type": "function", "function": {{...}}}}')
        if tools and "tools" not in self.text:
            raise RequestError("the chat template knows no tools: leave them out, or give another chat_template")

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as a prompt. It holds its special tokens: tokenize it without adding more.

        Parameters
        ----------
        messages : sequence of dict
            ``role`` and ``content`` each; the content is text, or a list of ``{"type": "text", "text": ...}``.
        tools : sequence of dict, optional
            Functions that the model may call, as JSON schemas in OpenAI's form.
        add_generation_prompt : bool
            Whether the prompt ends where an answer begins.
        continue_final_message : bool
            Whether the prompt ends within the last message, for the model to go on.
        variables : dict, optional
            What else the template knows, such as ``enable_thinking``.

        Raises
        ------
        RequestError
            If the messages are malformed, or the template rejects them.
        CheckpointError
            If the template itself is wrong.
        """
        if not isinstance(variables, Mapping | None):
            raise RequestError(f"chat_template_kwargs is {shown(variables)}: give a dict")
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: the prompt ends in a new message "
                "or in the last one; give one of them"
            )
        if reserved := [name for name in variables or () if name in _RESERVED]:
            raise RequestError(f"chat_template_kwargs names {reserved[0]}, which has a field of its own: leave it out")
        conversation = read_messages(messages)
        if continue_final_message:
            if not conversation[-1].get("content"):
                raise RequestError("continue_final_message needs text as the last message's content: give some")
            conversation[-1]["content"] += _CONTINUED
        name = _TOOL_USE if tools and _TOOL_USE in self._sources else _DEFAULT
        if name not in self._sources:
            raise CheckpointError(f"the tokenizer's chat templates are {', '.join(self._sources)}: name one {_DEFAULT}")
        values = {
            **self._special_tokens,
            **_copy(variables or {}),
            "messages": conversation,
            "tools": _copy(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _TURNS: [MAX_TURNS],
        }
        text = _render(_compile(self._sources[name]), values)
        return _cut(text) if continue_final_message else text


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of a conversation, in the form that templates expect: contents are text, arguments of calls are dicts.

    Raises
    ------
    RequestError
        If it is not a list of messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {shown(messages)}: give a list of at least one message")
    return [_read_message(i, message) for i, message in enumerate(messages)]


def _read_message(number: int, message: Any) -> dict[str, Any]:
    what = f"message {number}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'{what} is {shown(message)}: give {{"role": "user", "content": "..."}}')
    message = _copy({name: value for name, value in message.items() if value is not None})
    content = message.setdefault("content", message.get("refusal"))  # what an answer has in its content's place
    if isinstance(content, list):
        message["content"] = "\n".join(_text(what, part) for part in content)
    elif not isinstance(content, str | None):
        raise RequestError(f"{what} has the content {shown(content)}: give text")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"{what} has no content: give text")
    if content is None:
        message["content"] = ""
    if (reasoning := message.get("reasoning_content", message.get("reasoning"))) is not None:
        message["reasoning_content"] = reasoning
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{what} has the tool_calls {shown(calls)}: give a list")
    for call in calls:
        _read_arguments(what, call)
    return message


def _text(what: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "output_text", "refusal"):
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if isinstance(text, str):
            return text
        raise RequestError(f'{what} has a part {shown(part)}: give {{"type": "text", "text": "..."}}')
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise RequestError(f"{what} has a part {shown(kind)}: this model takes text alone")


def _read_arguments(what: str, call: Any) -> None:
    """Templates write the arguments of earlier calls as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f'{what} has the tool call {shown(call)}: give {{"function": {{"name": ...}}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RequestError(f"{what} calls {function['name']} with arguments that are not JSON") from None
    function["arguments"] = arguments


def _cut(text: str) -> str:
    """The prompt up to the end of the last message's content."""
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise RequestError("the chat template does not write the last message as it is: it cannot be continued")
    whole = text.startswith(_CONTINUED, place)
    return text[:place] if whole else text[:place].rstrip()  # the template strips the content's end


# -- where templates are found


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files of their own count before those in tokenizer_config.json."""
    file, legacy, more = (
        folder / "chat_template.jinja",
        folder / "chat_template.json",
        folder / "additional_chat_templates",
    )
    extra = {path.stem: _read(path) for path in sorted(more.glob("*.jinja"))}
    if is_file(file, CheckpointError):
        return {_DEFAULT: _read(file), **extra}
    value = config.get("chat_template")
    if value is None and is_file(legacy, CheckpointError):
        value = read_json(legacy, CheckpointError).get("chat_template")
    if value is None:
        return extra
    try:
        found = {_DEFAULT: value} if isinstance(value, str) else {item["name"]: item["template"] for item in value}
        if not all(isinstance(text, str) for text in found.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{folder} has the chat_template {shown(value)}: give a template as text, or a list of them with names"
        ) from None
    return {**found, **extra}


def _read(path: Path) -> str:
    if not is_file(path, CheckpointError):
        raise CheckpointError(f"{path} does not exist: give a file that holds a chat template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read as a chat template: {e}") from e


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError) if is_file(path, CheckpointError) else {}


def _content(token: Any) -> Any:
    """A token's text; as a dict it is a serialized AddedToken."""
    return token.get("content") if isinstance(token, Mapping) else token


# -- the sandbox

#: A template's name for the turns that it has left, which no template can write.
_TURNS = "turns left"


@jinja2.pass_context
def _counted(context: Context, items: Iterable) -> Iterator:
    """The items of a loop, counted over all loops of a rendering."""
    left = context[_TURNS]
    for item in items:
        left[0] -= 1
        if left[0] < 0:
            raise SecurityError(f"its loops take more than {MAX_TURNS} turns")
        yield item


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, str | list | tuple) else v for v in (left, right)]
        if operator == "**" or (sizes != [left, right] and sizes[0] * sizes[1] > _MAX_REPEATED):
            raise SecurityError("it makes a value that is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks what an assistant has written, which only matters to training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters.update(tojson=_tojson, counted=_counted)
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=lambda layout: datetime.now().strftime(layout)
    )
    return environment


@cache
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as e:
        raise CheckpointError(f"the chat template cannot be read ({e}): mend it, or give another") from e


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    try:
        return template.render(values)
    except SecurityError as e:
        raise CheckpointError(f"the chat template is stopped, because {e}: mend it, or give another") from e
    except jinja2.UndefinedError as e:
        raise RequestError(f"the chat template finds {e} in the messages: give what it needs") from e
    except jinja2.TemplateError as e:
        raise RequestError(f"the chat template rejects the messages: {e}") from e
    except Exception as e:  # whatever an expression of the template raises
        raise RequestError(f"the chat template cannot render the messages ({type(e).__name__}: {e})") from e


def _copy(value: Any) -> Any:
    """A plain copy of what a client sent.

    Raises
    ------
    RequestError
        If it is nested deeper than Python's stack.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise RequestError(
            "the messages, tools or chat_template_kwargs are nested too deeply: give flatter ones"
        ) from None


def _plain(value: Any) -> Any:
    """A copy with only JSON's types, so that a template cannot reach methods of other objects."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    raise RequestError(f"the messages hold {shown(value)}: give text, numbers, lists and dicts")
