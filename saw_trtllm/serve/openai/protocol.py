"""The requests: each field is honored or rejected by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.sampling_params import SamplingParams

#: JSON's own types: text that looks like a number, or true in its place, is none.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
TokenIds = list[Whole]


class Strict(BaseModel):
    """A request's object: names that it does not have are rejected, and null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class StreamOptions(Strict):
    """What comes in a stream beside the text."""

    include_usage: Flag = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    """A named schema."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(True, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Strict):
    """What an answer must be: OpenAI's three kinds, and a regular expression or a grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None


class Generation(Strict):
    """The fields that both kinds of completions have. ``user`` names who asks, in the log."""

    model: str | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Whole | None = Field(None, ge=1, le=128)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    seed: Whole | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Number] | None = None
    # beyond OpenAI's, in vLLM's words
    top_k: Whole | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = None
    min_tokens: Whole | None = Field(None, ge=0)
    stop_token_ids: TokenIds | None = None
    ignore_eos: Flag = False
    include_stop_str_in_output: Flag = False
    bad_words: list[str] | None = None
    cache_salt: str | None = None

    def sampling(self, defaults: dict[str, Any], **more: Any) -> SamplingParams:
        """The request's sampling parameters.

        Parameters
        ----------
        defaults : dict
            What the model's authors advise where the request says nothing.
        **more
            Fields of :class:`SamplingParams` that depend on the kind of request.

        Raises
        ------
        RequestError
            If a field's value is out of range, or needs another field.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is given and stream is not true: leave it out, or stream")
        same: tuple[str, ...] = (
            "n",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "stop",
            "presence_penalty",
            "frequency_penalty",
        )
        same += ("logit_bias", "repetition_penalty", "min_tokens", "stop_token_ids")
        given = {name: getattr(self, name) for name in same}
        given["top_k"] = max(0, self.top_k) if self.top_k is not None else None
        given["seed"] = None if self.seed is None else self.seed % 2**64
        given["bad"] = self.bad_words
        given = {name: value for name, value in given.items() if value is not None}
        switches = {
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
        }
        return SamplingParams(**{**defaults, **given, **switches, **more})


class CompletionRequest(Generation):
    """``/v1/completions``."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Whole | None = Field(16, ge=0)
    best_of: Whole | None = Field(None, ge=1, le=128)
    echo: Flag = False
    logprobs: Whole | None = Field(None, ge=0, le=20)


class ChatRequest(Generation):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: Flag | None = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Flag = True
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Strict):
    """``/tokenize``: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Flag = False


class DetokenizeRequest(Strict):
    """``/detokenize``."""

    model: str | None = None
    tokens: TokenIds
