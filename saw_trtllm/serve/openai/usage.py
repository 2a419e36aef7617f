"""How many tokens a request took."""

from __future__ import annotations

from typing import Any

from saw_trtllm.runtime.outputs import RequestOutput


class Usage:
    """Counts over the prompts and texts of a request.

    Parameters
    ----------
    counts_texts : bool
        False where only a prompt is asked about.
    """

    def __init__(self, counts_texts: bool = True) -> None:
        self._counts_texts = counts_texts
        self._prompts: dict[int, tuple[int, int]] = {}
        self._texts: dict[tuple[int, int], int] = {}

    @property
    def begun(self) -> bool:
        """Whether anything has come."""
        return bool(self._prompts)

    def take(self, output: RequestOutput, prompt: int = 0) -> None:
        """Note a piece of a prompt's texts, each once."""
        self._prompts[prompt] = (len(output.prompt_token_ids), output.num_reused_tokens)
        for completion in output.outputs:
            text = prompt, completion.index
            new = len(completion.token_ids_diff) if self._counts_texts else 0
            self._texts[text] = self._texts.get(text, 0) + new

    def body(self) -> dict[str, Any]:
        """In OpenAI's words. The token that ends a text is not counted, as it is not shown."""
        prompts, texts = sum(n for n, _ in self._prompts.values()), sum(self._texts.values())
        return {
            "prompt_tokens": prompts,
            "completion_tokens": texts,
            "total_tokens": prompts + texts,
            "prompt_tokens_details": {"cached_tokens": sum(n for _, n in self._prompts.values())},
        }
