"""A model that is served: an engine under a name."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError, ShutdownError
from saw_trtllm.llm import LLM
from saw_trtllm.paths import is_file, read_json
from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.keywords import shown
from saw_trtllm.runtime.outputs import CompletionOutput
from saw_trtllm.runtime.prompt import Prompt, encode_prompt
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.openai.conversation import read_conversation
from saw_trtllm.serve.openai.errors import ApiError
from saw_trtllm.serve.openai.protocol import ChatRequest, TokenizeRequest

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Characters of a prompt from which on it is tokenized beside the loop that answers the others: about a millisecond.
_LONG = 4096

#: What generation_config.json may advise, and the parameter that takes it.
_ADVISED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class ServedModel:
    """An engine under the name that clients ask for.

    Parameters
    ----------
    name : str
    llm : LLM
    folder : Path
        Where its ``generation_config.json`` is.
    """

    def __init__(self, name: str, llm: LLM, folder: Path) -> None:
        self.name, self.llm = name, llm
        self.created = int(time.time())
        self.defaults = read_defaults(folder)

    @property
    def template_text(self) -> str:
        """What stands in its chat template."""
        return self.llm.chat_template.text if self.llm.chat_template else ""

    def sampling(self, request: Any, **more: Any) -> SamplingParams:
        """The sampling parameters of a request. Without a seed each request draws its own."""
        if request.seed is None:
            more["seed"] = secrets.randbits(63)
        return request.sampling(self.defaults, **more)

    def chat_prompt(self, request: ChatRequest, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """A conversation as a prompt."""
        return cast("dict[str, Any]", self.salted(self._rendered(request, tools), request.cache_salt))

    def _rendered(self, request: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        return self.llm.chat_prompt(
            read_conversation(request.messages or (), self.template_text),
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=tools,
            chat_template_kwargs=request.chat_template_kwargs,
        )

    def salted(self, prompt: Prompt, salt: str | None) -> Prompt:
        """A prompt whose blocks only prompts of the same salt find."""
        if salt is None:
            return prompt
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif not isinstance(prompt, Mapping):
            prompt = {"prompt_token_ids": prompt}
        return {**prompt, "cache_salt": salt}

    def room(self, prompt_len: int) -> int:
        """Tokens that a text may have after a prompt."""
        return max(1, self.llm.max_seq_len - prompt_len)

    def begin(self, prompt: Prompt, params: SamplingParams, streaming: bool) -> GenerationResult:
        """Begin to generate."""
        return self.llm.generate_async(prompt, params, streaming=streaming)

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Tokens of a prompt or a conversation.

        Raises
        ------
        ApiError
            If it is neither, or there is no tokenizer.
        """
        if (request.prompt is None) == (request.messages is None):
            raise ApiError("invalid_value", "give a prompt or messages, one of them", "prompt")
        if request.messages is not None:
            return self._rendered(request, request.tools)["prompt_token_ids"]
        special = request.add_special_tokens is not False
        return encode_prompt(self._tokenizer(), request.prompt or "", self.llm.max_input_len, special)

    def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, the special ones among them.

        Raises
        ------
        ApiError
            If the vocabulary lacks one, or there is no tokenizer.
        """
        tokenizer = self._tokenizer()
        unknown = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
        if unknown is not None:
            raise ApiError(
                "invalid_value", f"there is no token {unknown}: ids go from 0 to {tokenizer.vocab_size - 1}", "tokens"
            )
        return tokenizer.decode(tokens, skip_special_tokens=False)

    def _tokenizer(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise ApiError("unsupported_parameter", f"{self.name} has no tokenizer: it takes and gives token ids")
        return self.llm.tokenizer

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """A token as text, and its bytes."""
        data = self.llm.tokenizer.decoder.piece(token).data if self.llm.tokenizer else b""
        return data.decode("utf-8", "replace"), list(data)

    def kv_numbers(self) -> dict[str, Any]:
        """The cache for a person to look at: bytes in use, and what fp16 would take."""
        stats, config = self.llm.stats(), self.llm.config
        model = config.pretrained_config
        heads, layers = model.num_key_value_heads, model.num_hidden_layers
        fp16 = 2 * 2 * heads * layers * model.head_size
        tokens, size = config.tokens_of_blocks(stats.used_blocks), config.bytes_per_token
        return {
            "id": self.name,
            "kv": config.saw_int4.kv,
            "kv_bytes_per_token": size,
            "fp16_bytes_per_token": fp16,
            "kv_bytes_used": stats.used_blocks * config.block_bytes,
            "fp16_bytes_used": tokens * fp16,
            "tokens_used": tokens,
            "tokens_free": config.tokens_of_blocks(stats.free_blocks),
            "requests_running": stats.num_running,
            "requests_waiting": stats.num_waiting,
            "max_seq_len": self.llm.max_seq_len,
            "has_chat_template": self.llm.chat_template is not None,
        }


@dataclass(frozen=True)
class ModelSpec:
    """A model to be served, in this process or in others.

    Attributes
    ----------
    name : str
    folder : Path
        The engine's.
    tokenizer_dir, chat_template : Path or None
        In the place of the engine's own.
    options : dict
        What else :class:`saw_trtllm.llm.LLM` takes.
    """

    name: str
    folder: Path
    tokenizer_dir: Path | None
    chat_template: Path | None
    options: Mapping[str, Any]

    def config(self) -> EngineConfig:
        """The engine's."""
        return EngineConfig.load(self.folder)

    def open(self) -> ServedModel:
        """Open the engine.

        Raises
        ------
        SawError
            If it cannot be run here, or the template is of no use.
        """
        llm = LLM(self.folder, self.tokenizer_dir, **self.options)
        if self.chat_template is not None:
            if llm.tokenizer is None:
                raise ConfigError("--chat_template needs a tokenizer: give --tokenizer_dir")
            own, new = llm.tokenizer.chat_template, ChatTemplate.from_file(self.chat_template)
            llm.tokenizer.chat_template = own.replaced(new.text) if own else new
        return ServedModel(self.name, llm, self.folder)


class Models:
    """The models of a server, by name."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of a name; without one the first.

        Raises
        ------
        ApiError
            If there is none.
        """
        if name is None:
            return next(iter(self))
        if name not in self._models:
            raise ApiError(
                "model_not_found", f"there is no model {shown(name)}: the models are {', '.join(self._models)}", "model"
            )
        return self._models[name]


def read_defaults(folder: Path) -> dict[str, Any]:
    """How the model's authors advise to sample; else OpenAI's temperature of 1."""
    path = folder / "generation_config.json"
    advice = read_json(path) if is_file(path) else {}
    if advice.get("do_sample") is False:
        advice = {}
    found = {name: advice[name] for name in _ADVISED if advice.get(name) is not None}
    return {"temperature": 1.0, **found}


def name_user(user: str | None) -> None:
    """Say in the log who asks, as the client names them."""
    if user is not None:
        log.info("a request of %s", shown(user))


async def beside_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Do work of which the loop would be held up by a thread, if it is long."""
    if size < _LONG:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))


def finish_reason(completion: CompletionOutput) -> str | None:
    """Why a text ended, in OpenAI's words.

    Raises
    ------
    ShutdownError
        If the server ended it.
    """
    if completion.finish_reason == "cancelled":
        raise ShutdownError("the server is shut down: send the request to another one")
    return completion.finish_reason
