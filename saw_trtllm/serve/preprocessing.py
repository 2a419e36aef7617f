"""The model ``preprocessing``: text to token ids."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.runtime.prompt import encode_prompt
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import names
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.triton import AnsweringModel, Tensors, text, texts

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
        super().__init__(pb_utils, names.PREPROCESSING_MODEL)
        self._add_special_tokens = parameters.add_special_tokens
        self._tokenizer = Tokenizer.load(parameters.tokenizer_folder)
        engine = parameters.gpt_model_path
        self._max_input_len = EngineConfig.load(engine).build_config.max_input_len if engine else None

    def answer(self, request: Any, tensors: Tensors) -> Tensors:
        """Token ids for a request's prompts."""
        return self.tokenize(tensors)

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
        # A prompt that is too long is rejected before the next: so a batch's array is never larger than so many of the
        # longest that the engine takes.
        prompts = [self._encode(text(raw, "the prompt")) for raw in tensors["QUERY"].reshape(-1)]
        count = len(prompts)
        end_id = self._tokenizer.eos_ids[0] if self._tokenizer.eos_ids else NO_END_ID
        end_ids = _given(tensors, "END_ID", np.full((count, 1), end_id, np.int32))
        pad_ids = _given(tensors, "PAD_ID", np.maximum(end_ids, 0))
        ids = np.empty((count, max(map(len, prompts))), np.int32)
        for row, prompt, pad_id in zip(ids, prompts, pad_ids, strict=True):
            row[: len(prompt)], row[len(prompt) :] = prompt, pad_id
        return {
            "INPUT_ID": ids,
            "REQUEST_INPUT_LEN": np.array([[len(p)] for p in prompts], np.int32),
            "REQUEST_OUTPUT_LEN": tensors["REQUEST_OUTPUT_LEN"].astype(np.int32),
            "STOP_WORDS_IDS": self._word_lists(tensors.get("STOP_WORDS_DICT"), "stop_words", count),
            "BAD_WORDS_IDS": self._word_lists(tensors.get("BAD_WORDS_DICT"), "bad_words", count),
            "EMBEDDING_BIAS": np.empty((count, 0), np.float32),
            "DECODER_INPUT_ID": pad_ids,
            "REQUEST_DECODER_INPUT_LEN": np.ones((count, 1), np.int32),
            "OUT_END_ID": end_ids,
            "OUT_PAD_ID": pad_ids,
        }

    def _encode(self, prompt: str) -> list[int]:
        return encode_prompt(self._tokenizer, prompt, self._max_input_len, self._add_special_tokens)

    def _word_lists(self, words: np.ndarray | None, name: str, count: int) -> np.ndarray:
        """Word lists, int32 ``[prompts, 2, n]``: the ids one after the other, and below where each word ends."""
        if words is None:
            return np.empty((count, 2, 0), np.int32)
        lists = [[self._tokenizer.encode(word, add_special_tokens=False) for word in texts(row, name)] for row in words]
        out = np.full((len(lists), 2, max(sum(map(len, words)) for words in lists)), NO_END_ID, np.int32)
        for row, ids in zip(out, lists, strict=True):
            flat = [i for word in ids for i in word]
            row[0] = 0
            row[0, : len(flat)] = flat
            row[1, : len(ids)] = list(accumulate(map(len, ids)))
        return out


def _given(tensors: Tensors, name: str, default: np.ndarray) -> np.ndarray:
    """An optional input, or its default, of shape ``[prompts, 1]``."""
    return tensors[name].astype(np.int32) if name in tensors else default
