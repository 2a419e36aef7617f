"""A request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np

from saw_trtllm.runtime.detokenizer import Detokenizer, Piece
from saw_trtllm.runtime.guided_decoding import Guide
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.runtime.parts import FinishReason, Part
from saw_trtllm.runtime.sampling import token_logprobs
from saw_trtllm.runtime.sequence import Sequence as ScheduledSequence
from saw_trtllm.runtime.stop_matcher import StopMatcher


class Request:
    """A sequence, its text so far, and who waits for it.

    Parameters
    ----------
    sequence : saw_trtllm.runtime.scheduler.Sequence
    prompt : str or None
        The prompt's text, to be given back.
    end_ids : set of int
        Tokens that end the text.
    detokenizer : Detokenizer
    streaming : bool
        Whether each piece is handed out, or only the whole.
    outputs : OutputQueue
        Where what is handed out goes.
    index : int
        Which of its prompt's texts it is.
    bad_runs : sequence of list of int
        Runs of tokens that the text must not hold.
    guide : Guide, optional
        What the text must follow.
    retries : int
        How often it is computed once more when the ranks that did are lost.
    """

    def __init__(
        self,
        sequence: ScheduledSequence,
        prompt: str | None,
        end_ids: set[int],
        detokenizer: Detokenizer,
        streaming: bool,
        outputs: OutputQueue,
        index: int = 0,
        bad_runs: Sequence[list[int]] = (),
        guide: Guide | None = None,
        retries: int = 0,
    ) -> None:
        self.retries = retries
        self.sequence = sequence
        self.end_ids = end_ids
        self.outputs = outputs
        self.arrival = time.monotonic()
        self.num_reused_tokens = 0
        self._index = index
        self._bad_runs = bad_runs
        self.guide = guide
        self._prompt = prompt
        # A copy, since what is handed out may be changed by who gets it.
        self._prompt_token_ids = list(sequence.prompt)
        self._detokenizer = detokenizer
        self._stop_runs = StopMatcher(sequence.params.stop_token_sequences or ())
        self._streaming = streaming
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._cumulative = 0.0 if sequence.params.logprobs else None  # of those that are shown
        self._top_logprobs: list[list[tuple[int, float]]] = []
        self._context_logits: list[np.ndarray] = []
        self._generation_logits: list[np.ndarray] = []
        self._prompt_logprobs: list[float] = []
        self._shown = 0

    def banned(self, num_drawn: int) -> tuple[int, ...]:
        """Tokens that may not come after so many of the text."""
        params, text = self.sequence.params, self.sequence.generated
        ends = self.end_ids if num_drawn < params.min_tokens else ()
        words = [
            run[-1]
            for run in self._bad_runs
            if len(run) <= len(text) + 1 and text[len(text) + 1 - len(run) :] == run[:-1]
        ]
        return (*ends, *words, *(params.bad_token_ids or ()))

    def keep_logits(self, logits: np.ndarray, start: int, samples: bool) -> None:
        """Collect what the request asked for from a step's logits ``[n, vocab_size]``, the first of token ``start``."""
        params = self.sequence.params
        if params.needs_context_logits and not self.sequence.generated:
            if start == 0:  # anew after a preemption
                self._context_logits.clear()
                self._prompt_logprobs.clear()
            if params.return_context_logits:
                self._context_logits.append(logits)
            if params.prompt_logprobs:
                following = self.sequence.prompt[start + 1 : start + 1 + len(logits)]
                self._prompt_logprobs += token_logprobs(logits[: len(following)], following)
        if params.return_generation_logits and samples:
            self._generation_logits.append(logits[-1:])

    def push(self, token: int, logprob: float, top_logprobs: Sequence[tuple[int, float]] = ()) -> bool:
        """Take the next token, hand out what it completes; True when the text has ended."""
        sequence, params = self.sequence, self.sequence.params
        sequence.generated.append(token)
        self._logprobs.append(logprob)
        if params.top_logprobs:
            self._top_logprobs.append(list(top_logprobs))
        count = len(sequence.generated)
        may_stop = count >= params.min_tokens
        if token in self.end_ids and may_stop:
            end, stop = self._detokenizer.end(token)
            if stop is None and token in (params.stop_token_ids or ()):
                stop = token
            self._hand_out(end, "stop", stop, hidden=1)
            return True
        run_ends = self._stop_runs.push((token,)) is not None and may_stop
        if self.guide:
            self.guide.accept(token)
        whole = self.guide is not None and self.guide.stopped
        last = run_ends or whole or count == params.max_tokens
        piece, stop = self._detokenizer.push(token, may_stop, last)
        if stop is None and run_ends:
            stop = token
        if piece is None:  # held back, which nothing is at the end
            return False
        if last or stop is not None:
            self._hand_out(piece, "length" if stop is None and not whole else "stop", stop)
            return True
        if self._streaming:
            self._hand_out(piece)
        else:
            self._texts.append(piece.text)
        return False

    def cancel(self) -> None:
        """End the text as it is."""
        self._hand_out(self._detokenizer.flush(), "cancelled")

    def _hand_out(
        self, piece: Piece, reason: FinishReason | None = None, stop: str | int | None = None, hidden: int = 0
    ) -> None:
        """Put a piece into the result; ``hidden`` tokens at the end, the end token, are not part of the output."""
        self._texts.append(piece.text)
        shown = len(self.sequence.generated) - hidden if reason else self._shown + len(piece.token_ids)
        new, self._shown = slice(self._shown, shown), shown
        if self._cumulative is not None:
            self._cumulative = reduce(add, self._logprobs[new], self._cumulative)
        self.outputs.put(_Handed(self, piece, new, len(self._texts), reason, stop, self._cumulative))

    def _output(
        self,
        piece: Piece,
        new: slice,
        texts: int,
        reason: FinishReason | None,
        stop: str | int | None,
        cumulative: float | None,
    ) -> RequestOutput:
        """The output as of a piece, made when somebody reads it: it holds all text and tokens so far."""
        sequence, params, tokens = self.sequence, self.sequence.params, self.sequence.generated
        fields: dict[str, Any] = {
            "leading_space": piece.leading,
            "finish_reason": reason,
            "stop_reason": stop,
            "index": self._index,
            "cumulative_logprob": cumulative,
            "generation_logits": self._logits(new),
        }
        of_tokens: dict[str, list[Any]] = {"token_ids": tokens}
        if params.logprobs:
            of_tokens["logprobs"] = self._logprobs
        if params.top_logprobs:
            of_tokens["top_logprobs"] = self._top_logprobs
        fields |= {f"{name}_diff": values[new] for name, values in of_tokens.items()}
        if self._streaming:
            fields["text_diff"] = piece.text
            output = CompletionOutput.streamed(self._texts, texts, of_tokens, new.stop, **fields)
        else:
            text = "".join(self._texts[:texts])
            fields |= {name: values[: new.stop] for name, values in of_tokens.items()}
            output = CompletionOutput(text=text, text_diff=text, **fields)
        prompt_logprobs = [None, *self._prompt_logprobs] if reason and params.prompt_logprobs else None
        return RequestOutput(
            sequence.request_id,
            self._prompt,
            self._prompt_token_ids,
            [output],
            reason is not None,
            self._context(reason),
            self.num_reused_tokens,
            prompt_logprobs,
        )

    def _part(
        self, piece: Piece, new: slice, texts: int, reason: FinishReason | None, cumulative: float | None
    ) -> Part:
        """What is new in a piece, made when somebody reads it."""
        return Part(
            self._index,
            piece.text if self._streaming else "".join(self._texts[:texts]),
            self.sequence.generated[new],
            piece.leading,
            reason,
            reason is not None,
            self.num_reused_tokens,
            self._logprobs[new] if self.sequence.params.logprobs else None,
            cumulative,
            self._context(reason),
            self._logits(new),
        )

    def _logits(self, new: slice) -> np.ndarray | None:
        """The logits of a piece's tokens, if they are collected."""
        logits = self._generation_logits
        return np.concatenate(logits[new] or [logits[0][:0]]) if logits else None

    def _context(self, reason: FinishReason | None) -> np.ndarray | None:
        """The logits of the prompt, with the last piece and if they are collected."""
        return np.concatenate(self._context_logits) if reason and self._context_logits else None


class _Handed(NamedTuple):
    """A piece that was put into a result, and the state of its request then."""

    request: Request
    piece: Piece
    new: slice
    texts: int
    reason: FinishReason | None
    stop: str | int | None
    cumulative: float | None

    def output(self) -> RequestOutput:
        """As :class:`saw_trtllm.runtime.output_queue.QueuedPiece` has it."""
        return self.request._output(*self[1:])

    def part(self) -> Part:
        """As :class:`saw_trtllm.runtime.output_queue.QueuedPiece` has it."""
        return self.request._part(self.piece, self.new, self.texts, self.reason, self.cumulative)
