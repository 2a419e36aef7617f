"""A prompt and its sampling parameters to the requests of its texts: checked, encoded, and with what guides them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ContextLengthError, RequestError
from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.guided_decoding import Guide, Guides
from saw_trtllm.runtime.keywords import shown
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.prompt import Prompt, check_input_len, encode_prompt, read_prompt
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.sequence import Sequence
from saw_trtllm.runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class InputProcessor:
    """Makes requests for an engine.

    Parameters
    ----------
    config : EngineConfig
        Its limits.
    tokenizer : Tokenizer, optional
        Without one only token ids are taken.
    end_ids : tuple of int
        Tokens that end a text unless it asks for others.
    check : callable
        Raises :class:`RequestError` for a sequence that the scheduler can never run.
    retries : int
        How often a request is computed once more when a rank is lost.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        end_ids: tuple[int, ...],
        check: Callable[[Sequence], None],
        retries: int = 0,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._end_ids = end_ids
        self._check_sequence = check
        self._retries = retries
        self._ids = itertools.count()
        self._guides: Guides | None = None  # made when a text is guided, which takes a second
        self._hints = tokenizer is not None and tokenizer.chat_template is not None

    def requests(self, prompt: Prompt, params: SamplingParams | None, streaming: bool) -> list[Request]:
        """One request for each text of a prompt.

        Raises
        ------
        RequestError
            If the prompt or its parameters do not fit the engine.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is {shown(params)}: give SamplingParams(...), or nothing")
        text, ids, salt = read_prompt(prompt)
        ids = self._encode(text or "") if ids is None else ids
        self._check(ids, params)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this engine has none: give stop_token_ids, or a tokenizer"
            )
        end_ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_ids.update(self._end_ids if params.end_id is None else {params.end_id})
        # What the model cannot say ends nothing; the sampler must not look it up.
        vocab = self.config.pretrained_config.vocab_size
        end_ids = {i for i in end_ids if 0 <= i < vocab}
        if params.min_tokens and len(end_ids) == vocab:
            raise RequestError("min_tokens is given and every token ends the text: leave a token out of stop_token_ids")
        bad_runs = self._bad_runs(params)
        outputs = OutputQueue()
        requests: list[Request] = []
        for index in range(params.n):
            leader = requests[0].sequence if requests else None
            its_params = replace(params, seed=((params.seed or 0) + index) % 2**64) if index else params
            sequence = Sequence(next(self._ids), ids, its_params, cache_salt=salt, leader=leader)
            self._check_sequence(sequence)
            detokenizer = Detokenizer(self.tokenizer, params.stop_strings, params.include_stop_str_in_output)
            guide = self._guide(params)
            its_text = (detokenizer, streaming, outputs, index, bad_runs, guide)
            requests.append(Request(sequence, text, end_ids, *its_text, retries=self._retries))
        return requests

    def _guide(self, params: SamplingParams) -> Guide | None:
        """What a text must follow."""
        if params.guided_decoding is None:
            return None
        if self.tokenizer is None:
            raise RequestError("guided_decoding needs a tokenizer, and this engine has none")
        if self._guides is None:
            vocab = self.config.pretrained_config.vocab_size
            self._guides = Guides(self.tokenizer, vocab, tuple(i for i in self._end_ids if 0 <= i < vocab))
        return self._guides.make(params.guided_decoding)

    def _bad_runs(self, params: SamplingParams) -> list[list[int]]:
        """The bad runs of tokens, and those of the bad words at the beginning of a text and within."""
        if params.bad and self.tokenizer is None:
            raise RequestError("bad words need a tokenizer, and this engine has none: give bad_token_ids")
        texts = [form for word in params.bad_words for form in (word, f" {word}")]
        encode = self.tokenizer.encode if self.tokenizer else None
        runs = [encode(text, add_special_tokens=False) for text in texts] if encode else []
        runs += map(list, params.bad_token_sequences or ())
        vocab = self.config.pretrained_config.vocab_size
        return [run for run in runs if run and 0 <= run[-1] < vocab]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give token ids, or LLM(..., tokenizer=FOLDER)")
        if self._hints and not self.tokenizer.names_special(text):
            self._hints = False
            log.warning(
                "this model was taught to answer in conversations and the prompt is none: use LLM.chat, saw-run --chat "
                "or /v1/chat/completions, which apply its chat template"
            )
        return encode_prompt(self.tokenizer, text, self.config.build_config.max_input_len)

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        build, vocab = self.config.build_config, self.config.pretrained_config.vocab_size
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        check_input_len(len(ids), build.max_input_len)
        if len(ids) + params.max_tokens > build.max_seq_len:
            raise ContextLengthError(
                f"the prompt's {len(ids)} tokens and max_tokens {params.max_tokens} exceed the engine's max_seq_len "
                f"{build.max_seq_len}: ask for at most {build.max_seq_len - len(ids)}"
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise RequestError(
                f"the prompt holds token {shown(min(ids) if min(ids) < 0 else max(ids))}: ids go from 0 to {vocab - 1}"
            )
        for name in ("bad_token_ids", "logit_bias"):
            unknown = next((i for i in getattr(params, name) or () if not 0 <= i < vocab), None)
            if unknown is not None:
                raise RequestError(f"{name} names token {shown(unknown)}: ids go from 0 to {vocab - 1}")
        wanted = {"return_context_logits": "context", "return_generation_logits": "generation"}
        for option, name in {**wanted, "prompt_logprobs": "context"}.items():
            if getattr(params, option) and not getattr(build, f"gather_{name}_logits"):
                raise RequestError(f"{option} needs an engine built with --gather_{name}_logits")
