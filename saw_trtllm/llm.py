"""The Python interface, in the words of TensorRT-LLM's LLM API."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepPacker
from saw_trtllm.errors import ConfigError, EngineError, RequestError
from saw_trtllm.model.end_ids import read_end_ids
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.parallel.executor import GroupExecutor
from saw_trtllm.parallel.open import open_executor
from saw_trtllm.paths import is_file
from saw_trtllm.plan.checksums import check_not_replaced, verify_engine
from saw_trtllm.progress import progress
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.chat_template import ChatTemplate, Messages
from saw_trtllm.runtime.disk_cache import DiskCache
from saw_trtllm.runtime.engine_core import EngineCore
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.host_cache import HostCache
from saw_trtllm.runtime.input_processor import InputProcessor
from saw_trtllm.runtime.keywords import check_keywords, is_number, shown
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.outputs import RequestOutput
from saw_trtllm.runtime.prompt import Prompt, encode_prompt, split_prompts
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.scheduler import Scheduler
from saw_trtllm.runtime.stats import Stats
from saw_trtllm.runtime.tokenizer import Tokenizer

_ADVICE = {
    "tensor_parallel_size": "build the engine with saw-build --tp_size",
    "gpu_memory_utilization": "give kv_cache_config={'free_gpu_memory_fraction': ...}",
    "dtype": "build the engine with saw-build --dtype",
    "quantization": "choose the cache with saw-build --kv",
    "max_model_len": "build the engine with saw-build --max_seq_len",
    "max_num_seqs": "build the engine with saw-build --max_batch_size",
}


_Params = SamplingParams | SequenceABC[SamplingParams] | None

#: Requests that may wait. A prompt that waits holds about 40 bytes for each of its tokens.
MAX_QUEUE_SIZE = 4096


class LLM:
    """A built engine, ready for prompts.

    Parameters
    ----------
    model : path
        The engine folder that ``saw-build`` wrote.
    tokenizer : path or Tokenizer, optional
        A folder with ``tokenizer.json``, or the file. By default the engine folder's own; an engine without one takes
        and gives token ids only.
    kv_cache_config : KvCacheConfig or dict, optional
        A dict holds its fields.
    prefill_chunk : int, optional
        Tokens of a prefill chunk: a multiple of ``tokens_per_block``. By default 512, or what ``max_num_tokens``
        leaves.
    max_queue_size : int
        Requests of :meth:`generate_async` that may wait for their first step; 0 is any number. :meth:`generate` waits
        for room instead.
    verify : bool
        Whether the folder's files are compared with the checksums that ``saw-build`` recorded.
    parallel_config : ParallelConfig or dict, optional
        How the ranks of a tensor parallel engine run. A dict holds its fields.
    retry : int
        How often a request is computed once more when a rank is lost that computed it; its text goes on where it was.
        By default it ends with :class:`saw_trtllm.errors.RankError`.

    Attributes
    ----------
    executor : Executor
        What runs the engine's steps. While no request runs it may be given steps of another's making, to be timed.

    Raises
    ------
    EngineError
        If the folder holds no engine that this machine can run.
    ConfigError
        If another argument is wrong.
    """

    def __new__(cls, *_: Any, **named: Any) -> LLM:
        """Reject the names of arguments that it does not have."""
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        check_keywords("LLM", named, known, ConfigError, _ADVICE)
        return super().__new__(cls)

    def __init__(
        self,
        model: Path | str,
        tokenizer: Path | str | Tokenizer | None = None,
        kv_cache_config: KvCacheConfig | Mapping[str, Any] | None = None,
        prefill_chunk: int | None = None,
        max_queue_size: int = MAX_QUEUE_SIZE,
        verify: bool = True,
        parallel_config: ParallelConfig | Mapping[str, Any] | None = None,
        retry: int = 0,
    ) -> None:
        if not (is_number(retry, whole=True) and retry >= 0):
            raise ConfigError(f"retry is {shown(retry)}: it must be a whole number, 0 for no retry")
        if not (is_number(max_queue_size, whole=True) and max_queue_size >= 0):
            raise ConfigError(f"max_queue_size is {shown(max_queue_size)}: it must be a whole number, 0 for any number")
        if not isinstance(model, str | os.PathLike):
            raise EngineError(f"model is {shown(model)}: give the --output_dir of saw-build")
        kv_cache_config = KvCacheConfig.of(kv_cache_config)
        parallel_config = ParallelConfig.of(parallel_config)
        folder = Path(model)
        self.config = EngineConfig.load(folder)
        if verify:
            verify_engine(folder, tokenizer=tokenizer is None)
        self.tokenizer = _load_tokenizer(folder, tokenizer)
        end_ids = read_end_ids(folder)
        if end_ids is None:
            end_ids = self.tokenizer.eos_ids if self.tokenizer else ()
        build = self.config.build_config
        chunk = _prefill_chunk(self.config, prefill_chunk)
        interchangeable = not kv_cache_config.deterministic
        disk = DiskCache.open(self.config, kv_cache_config, "any" if interchangeable else chunk)
        self.executor = open_executor(folder, self.config, kv_cache_config, parallel_config)
        check_not_replaced(folder, self.config.saw_int4.checksums)  # its files are read by name
        blocks = BlockManager(
            self.executor.num_blocks,
            build.tokens_per_block,
            kv_cache_config.enable_block_reuse,
            kv_cache_config.enable_partial_reuse,
            reuse_multiple=1 if interchangeable else chunk,
            windows=self.config.windows,
            step=chunk,
        )
        host = None
        if self.executor.num_host_blocks and kv_cache_config.enable_block_reuse:
            host = HostCache(blocks, self.executor, disk)
        self._scheduler = Scheduler(blocks, build.max_batch_size, build.max_num_tokens, chunk, interchangeable, host)
        interrupt = self.executor.interrupt if isinstance(self.executor, GroupExecutor) else None
        packer = StepPacker(self.config.pool_layout)
        self._core = EngineCore(self.executor, self._scheduler, packer, max_queue_size, interrupt)
        self._inputs = InputProcessor(self.config, self.tokenizer, end_ids, self._scheduler.check, retry)
        # An interpreter that exits under a thread that computes would abort.
        self._shutdown = weakref.finalize(self, self._core.shutdown)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How the model was taught to see conversations; None if its tokenizer does not say."""
        return self.tokenizer.chat_template if self.tokenizer else None

    @property
    def max_input_len(self) -> int:
        """Tokens of the longest prompt."""
        return self.config.build_config.max_input_len

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence, prompt and text."""
        return self.config.build_config.max_seq_len

    @overload
    def generate(  # type: ignore[overload-overlap]  # text is a list of texts too
        self, inputs: str | Mapping[str, Any] | SequenceABC[int], sampling_params: _Params = ..., use_tqdm: bool = ...
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, inputs: SequenceABC[Prompt], sampling_params: _Params = ..., use_tqdm: bool = ...
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: Prompt | SequenceABC[Prompt],
        sampling_params: _Params = None,
        use_tqdm: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate text for a prompt or a list of prompts, and wait for it.

        Parameters
        ----------
        inputs : str, list of int, dict, or a list of these
            Text, token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; of both the ids count. A dict may
            hold a ``cache_salt`` too: text; only prompts of the same salt find each other's blocks in the cache.
        sampling_params : SamplingParams or list of SamplingParams, optional
            One for all, or one each. Greedy with 32 tokens by default.
        use_tqdm : bool
            Show the progress on stderr: a bar on a terminal, elsewhere a line every few seconds.

        Returns
        -------
        RequestOutput or list of RequestOutput
            In the order of the prompts.

        Raises
        ------
        RequestError
            If a prompt or its parameters do not fit the engine; then nothing is generated.
        """
        prompts, single = split_prompts(inputs)
        params = sampling_params if isinstance(sampling_params, SequenceABC) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(params)} sampling parameters came with {len(prompts)} prompts: give one, or one each"
            )
        requests = [self._inputs.requests(p, s, streaming=False) for p, s in zip(prompts, params, strict=True)]
        results: list[GenerationResult] = []
        outputs = []
        try:
            for texts in requests:
                results.append(self._submit(texts, wait=True))
            with progress(len(results), "generate", "prompts", show=use_tqdm) as bar:
                for result in results:
                    outputs.append(result.result())
                    bar.update()
        except BaseException:  # Ctrl-C; a notebook keeps its traceback, and in it the results
            for result in results:
                result.abort()
            raise
        return outputs[0] if single else outputs

    @overload
    def chat(
        self, messages: Messages, sampling_params: _Params = ..., use_tqdm: bool = ..., **template: Any
    ) -> RequestOutput: ...

    @overload
    def chat(
        self, messages: SequenceABC[Messages], sampling_params: _Params = ..., use_tqdm: bool = ..., **template: Any
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Messages | SequenceABC[Messages],
        sampling_params: _Params = None,
        use_tqdm: bool = False,
        **template: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation or a list of conversations, and wait for it.

        Parameters
        ----------
        messages : list of dict, or list of lists of dict
            ``{"role": ..., "content": ...}`` each.
        sampling_params, use_tqdm
            As for :meth:`generate`.
        **template
            What :meth:`chat_prompt` takes besides the messages.

        Returns
        -------
        RequestOutput or list of RequestOutput
            In the order of the conversations.

        Raises
        ------
        RequestError
            If the model has no chat template or the template rejects the messages; and as for :meth:`generate`.
        """
        lists = isinstance(messages, SequenceABC) and not isinstance(messages, str | bytes)
        several = lists and bool(messages) and isinstance(messages[0], SequenceABC)
        conversations: Any = messages if several else [messages]
        prompts = [self.chat_prompt(m, **template) for m in conversations]
        return self.generate(prompts if several else prompts[0], sampling_params, use_tqdm)

    def chat_prompt(
        self,
        messages: Messages,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: SequenceABC[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A conversation as a prompt for :meth:`generate` or :meth:`generate_async`: its text, and its tokens.

        Parameters
        ----------
        messages : list of dict
        chat_template : str, optional
            A template in jinja2 in the place of the tokenizer's.
        add_generation_prompt, continue_final_message : bool
            Whether the prompt ends where an answer begins, or within the last message. Of the two
            ``continue_final_message`` needs ``add_generation_prompt=False``.
        tools : list of dict, optional
            Functions that the model may call.
        chat_template_kwargs : dict, optional
            What else the template knows, such as ``enable_thinking``.

        Raises
        ------
        RequestError
            If there is no template, or it rejects the messages.
        """
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer, which has the template: give LLM(..., tokenizer=FOLDER)")
        if not isinstance(chat_template, str | None):
            raise RequestError(f"chat_template is {shown(chat_template)}: give the text of a template in jinja2")
        template = self.chat_template
        if chat_template is not None:
            template = template.replaced(chat_template) if template else ChatTemplate(chat_template)
        if template is None:
            raise RequestError(
                "this model's tokenizer has no chat template: give a prompt instead of messages, or a chat_template"
            )
        if tools is not None:
            template.check_tools(tools)
        text = template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=chat_template_kwargs,
        )
        # The template has written the special tokens; a second BOS would change the answer.
        ids = encode_prompt(self.tokenizer, text, self.max_input_len, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def generate_async(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> GenerationResult:
        """Begin to generate text for one prompt.

        Parameters
        ----------
        inputs : str, list of int or dict
            As for :meth:`generate`.
        sampling_params : SamplingParams, optional
        streaming : bool
            Whether the result gives each piece, or only the whole.

        Raises
        ------
        RequestError
            If the prompt or its parameters do not fit the engine.
        QueueFullError
            If ``max_queue_size`` requests wait already.
        """
        return self._submit(self._inputs.requests(inputs, sampling_params, streaming))

    def check(self, inputs: Prompt, sampling_params: SamplingParams | None = None) -> None:
        """Raise what :meth:`generate_async` would raise, and begin nothing."""
        self._inputs.requests(inputs, sampling_params, streaming=False)

    @property
    def alive(self) -> bool:
        """Whether it takes requests: not once it has been shut down, or has failed."""
        return self._core.alive

    def stats(self) -> Stats:
        """Gauges and counters for metrics."""
        return replace(self._core.stats(), block_bytes=self.config.block_bytes)

    def shutdown(self) -> None:
        """Cancel what runs and release the engine. It happens at exit too, and when nobody holds the LLM any more."""
        self._shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _submit(self, requests: list[Request], wait: bool = False) -> GenerationResult:
        ids = [request.sequence.request_id for request in requests]

        def abort() -> None:
            for request_id in ids:
                self._core.abort(request_id)

        result = GenerationResult(ids[0], requests[0].outputs, abort, len(ids))
        try:
            for request in requests:
                self._scheduler.prepare(request.sequence)
                self._core.submit(request, wait)
        except BaseException:
            result.abort()  # those that were taken before the queue was full, or before Ctrl-C
            raise
        return result


def _load_tokenizer(folder: Path, tokenizer: Path | str | Tokenizer | None) -> Tokenizer | None:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, str | os.PathLike | None):
        raise ConfigError(
            f"tokenizer is {shown(tokenizer)}: give the folder of a tokenizer.json (one of transformers' writes it by "
            "save_pretrained), or the file"
        )
    if tokenizer is not None:
        return Tokenizer.load(tokenizer)
    return Tokenizer.load(folder) if is_file(folder / "tokenizer.json", EngineError) else None


def _prefill_chunk(config: EngineConfig, asked: int | None) -> int:
    build = config.build_config
    most, chunk = build.most_prefill_chunk, build.prefill_chunk if asked is None else asked
    if not is_number(chunk, whole=True) or chunk < 1 or chunk > most or chunk % build.tokens_per_block:
        raise EngineError(
            f"prefill_chunk is {shown(chunk)}: it must be a multiple of tokens_per_block {build.tokens_per_block} "
            f"up to {most} (max_num_tokens less max_batch_size)"
        )
    return chunk
