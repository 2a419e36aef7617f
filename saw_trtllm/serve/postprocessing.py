"""The model ``postprocessing``: token ids to text."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import names
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.triton import AnsweringModel, Tensors


class PostprocessingModel(AnsweringModel):
    """Hands on the texts of ``tensorrt_llm``, and detokenizes what comes without one.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        super().__init__(pb_utils, names.POSTPROCESSING_MODEL)
        self._tokenizer = Tokenizer.load(parameters.tokenizer_folder)

    def answer(self, request: Any, tensors: Tensors) -> Tensors:
        """Text of a request's tokens."""
        return {"OUTPUT": self.detokenize(tensors)}

    def detokenize(self, tensors: Tensors) -> np.ndarray:
        """Text of a request's tokens.

        Parameters
        ----------
        tensors : dict
            The model's inputs, ``TOKENS_BATCH`` of shape ``[batch, 1, tokens]``.

        Returns
        -------
        numpy.ndarray
            UTF-8 bytes, object ``[batch]``: as in TensorRT-LLM, without a dimension for beams.

        Raises
        ------
        RequestError
            If the inputs do not fit together.
        """
        _check(tensors)
        if "TEXT" in tensors and tensors["TEXT"].size:
            return tensors["TEXT"].reshape(-1)
        tokens, lengths = tensors["TOKENS_BATCH"][:, 0], tensors["SEQUENCE_LENGTH"][:, 0]
        out = np.empty(len(tokens), object)
        for b in range(len(tokens)):
            out[b] = self._tokenizer.decode(tokens[b, : lengths[b]].tolist()).encode("utf-8")
        return out


def _check(tensors: Tensors) -> None:
    """Reject lengths that are none of their tokens, and tokens that no tokenizer can take."""
    tokens, lengths = tensors["TOKENS_BATCH"], tensors["SEQUENCE_LENGTH"]
    if tokens.shape[1] != 1:
        raise RequestError(f"TOKENS_BATCH has the shape {list(tokens.shape)}: it must have one beam")
    if lengths.min() < 0 or lengths.max() > tokens.shape[2]:
        raise RequestError(
            f"SEQUENCE_LENGTH goes from {lengths.min()} to {lengths.max()}: it must be from 0 to the "
            f"{tokens.shape[2]} tokens of TOKENS_BATCH"
        )
    counted = np.where(np.arange(tokens.shape[2]) < lengths[..., None], tokens, 0)
    if (counted < 0).any():
        raise RequestError(f"TOKENS_BATCH holds the token {counted.min()}: it must be at least 0")
    if "TEXT" in tensors and tensors["TEXT"].size not in (0, len(tokens)):
        raise RequestError(f"TEXT holds {tensors['TEXT'].size} strings for {len(tokens)} texts: give one for each")
