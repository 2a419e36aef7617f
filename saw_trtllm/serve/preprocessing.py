"""The model ``preprocessing``: text to token ids."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.triton import AnsweringModel, Tensors, read_tensors, text, texts

NO_END_ID = -1


class PreprocessingModel(AnsweringModel):
    """Tokenizes prompts.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        super().__init__(pb_utils)
        self._add_special_tokens = parameters.add_special_tokens
        self._tokenizer = Tokenizer.load(parameters.tokenizer_folder)

    def answer(self, request: Any) -> Tensors:
        """Token ids for a request's prompts."""
        return self.tokenize(read_tensors(request))

    def tokenize(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """Token ids for the prompts of a request.

        Parameters
        ----------
        tensors : dict
            The model's inputs, ``QUERY`` of shape ``[prompts, 1]``.

        Returns
        -------
        dict
            The model's outputs. Shorter prompts are filled up with the padding token.
        """
        if texts(tensors.get("BAD_WORDS_DICT"), "bad_words"):
            raise RequestError("bad_words is not supported: leave it out")
        prompts = [self._encode(text(raw, "the prompt")) for raw in tensors["QUERY"].reshape(-1)]
        end_id = self._tokenizer.eos_ids[0] if self._tokenizer.eos_ids else NO_END_ID
        end_ids = _given(tensors, "END_ID", np.full((len(prompts), 1), end_id, np.int32))
        pad_ids = _given(tensors, "PAD_ID", np.maximum(end_ids, 0))
        ids = np.empty((len(prompts), max(map(len, prompts))), np.int32)
        for row, prompt, pad_id in zip(ids, prompts, pad_ids, strict=True):
            row[: len(prompt)], row[len(prompt) :] = prompt, pad_id
        outputs = {
            "INPUT_ID": ids,
            "REQUEST_INPUT_LEN": np.array([[len(p)] for p in prompts], np.int32),
            "REQUEST_OUTPUT_LEN": tensors["REQUEST_OUTPUT_LEN"].astype(np.int32),
            "OUT_END_ID": end_ids,
            "OUT_PAD_ID": pad_ids,
        }
        if "STOP_WORDS_DICT" in tensors:
            outputs["STOP_WORDS_IDS"] = self._word_lists(tensors["STOP_WORDS_DICT"])
        return outputs

    def _encode(self, prompt: str) -> list[int]:
        ids = self._tokenizer.encode(prompt, self._add_special_tokens) if prompt else []
        if not ids:
            raise RequestError("the prompt is empty: give at least one character")
        return ids

    def _word_lists(self, words: np.ndarray) -> np.ndarray:
        """Word lists, int32 ``[prompts, 2, n]``: the ids one after the other, and below where each word ends."""
        lists = [
            [self._tokenizer.encode(word, add_special_tokens=False) for word in texts(row, "stop_words")]
            for row in words
        ]
        out = np.full((len(lists), 2, max(sum(map(len, words)) for words in lists)), NO_END_ID, np.int32)
        for row, words in zip(out, lists, strict=True):
            flat = [i for word in words for i in word]
            row[0] = 0
            row[0, : len(flat)] = flat
            row[1, : len(words)] = list(accumulate(map(len, words)))
        return out


def _given(tensors: Tensors, name: str, default: np.ndarray) -> np.ndarray:
    """An optional input, or its default, of shape ``[prompts, 1]``."""
    return tensors[name].astype(np.int32) if name in tensors else default
