"""The models ``ensemble`` and ``tensorrt_llm_bls`` where a request may have several responses: text to text."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.runtime.parts import Part
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import names
from saw_trtllm.serve.engine_link import RemoteEngine, engine_address
from saw_trtllm.serve.generating import GeneratingModel
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.preprocessing import PreprocessingModel
from saw_trtllm.serve.request import Generation, parse
from saw_trtllm.serve.response import results, text
from saw_trtllm.serve.triton import read_tensors


class EnsembleModel(GeneratingModel):
    """The ensemble's steps in one model, which is nearer to its clients and to the engine.

    An ensemble of Triton's costs a request for each piece of each text, and does not tell its steps that a client has
    gone. The engine is that of the model ``tensorrt_llm``, whose process has nothing to do with this one's tokenizing
    and responses.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        super().__init__(pb_utils, parameters)
        self._preprocessing = PreprocessingModel(pb_utils, parameters)
        self._tokenizer = Tokenizer.load(parameters.tokenizer_folder)
        self._engine = RemoteEngine(self, engine_address(names.TENSORRT_LLM))
        self._start()

    def _generations(self, request: Any) -> list[Generation]:
        tensors = read_tensors(request, names.ENSEMBLE_MODEL)
        tokenize, generate, _ = names.STEPS
        tokens = self._preprocessing.tokenize({name: tensors[ours] for name, ours in tokenize.inputs.items()})
        tensors |= {ours: tokens[name] for name, ours in tokenize.outputs.items()}
        given = {name: tensors[ours] for name, ours in generate.inputs.items() if ours in tensors}
        return parse(given, self._parameters.exclude_input_in_output)

    def _tensors(self, generation: Generation, part: Part) -> dict[str, np.ndarray]:
        # As in TensorRT-LLM, without a dimension for beams.
        whole = np.array([text(generation, part, self._tokenizer).encode()], object)
        return {"text_output": whole, **results(generation, part)}
