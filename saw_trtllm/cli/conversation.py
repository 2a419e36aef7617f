"""``saw-run --chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from saw_trtllm.errors import RequestError
from saw_trtllm.llm import LLM
from saw_trtllm.paths import reading
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.sampling_params import SamplingParams


class Conversation:
    """A history of messages, and the model that answers.

    Parameters
    ----------
    llm : LLM
    params : SamplingParams
        Its ``max_tokens`` is a limit: an answer gets what its prompt leaves of it.
    system_prompt : str, optional
    """

    def __init__(self, llm: LLM, params: SamplingParams, system_prompt: str | None = None) -> None:
        self._llm, self._params = llm, params
        self._messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def begin(self, text: str, streaming: bool) -> GenerationResult:
        """Begin to answer a message, which the history does not hold yet.

        Raises
        ------
        RequestError
            If the conversation does not fit the engine.
        """
        prompt = self._llm.chat_prompt(self._with(text))
        room = self._llm.max_seq_len - len(prompt["prompt_token_ids"])
        params = replace(self._params, max_tokens=max(1, min(self._params.max_tokens, room)))
        return self._llm.generate_async(prompt, params, streaming)

    def _with(self, text: str) -> list[dict[str, str]]:
        return [*self._messages, {"role": "user", "content": text}]

    def ask(self, text: str) -> None:
        """Print the answer to a message as it grows. Ctrl-C stops it; what was said stays in the history.

        Raises
        ------
        RequestError
            If the conversation does not fit the engine; then the message is not part of it.
        """
        result = self.begin(text, streaming=True)
        answer = ""
        try:
            for output in result:
                answer = output.outputs[0].text
                print(output.outputs[0].text_diff, end="", flush=True)
        except KeyboardInterrupt:
            result.abort()
        print(flush=True)
        self._messages = [*self._with(text), {"role": "assistant", "content": answer}]

    def run(self, lines: Iterable[str]) -> None:
        """Answer message after message. What is wrong with one is said, and the next is waited for."""
        for line in lines:
            if not line.strip():
                continue
            try:
                self.ask(line)
            except RequestError as e:
                print(f"error: {e}", file=sys.stderr)


def typed_lines() -> Iterator[str]:
    """What a person types, or a pipe holds, line by line up to its end; Ctrl-C at the prompt ends it too."""
    if not sys.stdin.isatty():
        with reading("stdin", RequestError):
            yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and found again
    print("Type a message; Ctrl-D ends the conversation, and Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
