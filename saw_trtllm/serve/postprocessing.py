"""The model ``postprocessing``: token ids to text."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.runtime.detokenizer import decode_piece
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import names
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.triton import AnsweringModel, Tensors, read_tensors, to_triton


class PostprocessingModel(AnsweringModel):
    """Detokenizes pieces. It keeps no state: a piece brings along the tokens that it must be decoded behind.

    Triton does not tell the running step of an ensemble that its client has gone; only steps that begin later learn
    it. This model's do, so it asks about a request now and then, and tells ``tensorrt_llm`` to stop.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        super().__init__(pb_utils)
        self._tokenizer = Tokenizer.load(parameters.tokenizer_folder)

    def answer(self, request: Any) -> Tensors:
        """Text of a request's tokens.

        A cancelled request is answered like any other: Triton 2.51 never finishes an ensemble of which a step fails
        while an earlier one still has responses to give.
        """
        tensors = read_tensors(request)
        key = int(tensors["REQUEST_KEY"].reshape(-1)[0]) if "REQUEST_KEY" in tensors else 0
        if key and request.is_cancelled():
            self._stop(key)
        return {"OUTPUT": self.detokenize(tensors)}

    def _stop(self, key: int) -> None:
        """Ask ``tensorrt_llm`` to cancel a request."""
        zero = np.zeros((1, 1), np.int32)
        inputs = {"input_ids": zero, "input_lengths": zero, "request_output_len": zero}
        inputs |= {"stop": np.array([[True]]), "request_key": np.array([[key]], np.uint64)}
        request = self._pb_utils.InferenceRequest(
            model_name=names.TENSORRT_LLM,
            requested_output_names=[],
            inputs=to_triton(self._pb_utils, inputs),
        )
        for _ in request.exec(decoupled=True):
            pass

    def detokenize(self, tensors: Tensors) -> np.ndarray:
        """Text of a request's tokens.

        Parameters
        ----------
        tensors : dict
            The model's inputs, ``TOKENS_BATCH`` of shape ``[batch, beams, tokens]``.

        Returns
        -------
        numpy.ndarray
            UTF-8 bytes, object ``[batch, beams]``.
        """
        tokens, lengths = tensors["TOKENS_BATCH"], tensors["SEQUENCE_LENGTH"]
        batch, beams = tokens.shape[:2]
        context = tensors.get("CONTEXT_IDS", np.empty((batch, 0), np.int32))
        trim = tensors.get("TEXT_TRIM", np.zeros((batch, 1), np.int32))
        out = np.empty((batch, beams), object)
        for b, beam in np.ndindex(batch, beams):
            piece = decode_piece(self._tokenizer, context[b].tolist(), tokens[b, beam, : lengths[b, beam]].tolist())
            out[b, beam] = piece[: len(piece) - int(trim[b, 0])].encode("utf-8")
        return out
