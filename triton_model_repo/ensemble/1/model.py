"""Triton's entry point to :class:`saw_trtllm.serve.ensemble.EnsembleModel`."""

import triton_python_backend_utils as pb_utils

from saw_trtllm.serve.ensemble import EnsembleModel
from saw_trtllm.serve.triton import load_model


class TritonPythonModel:
    """What Triton's Python backend looks for in this file."""

    def initialize(self, args):
        """Load the model."""
        self._model = load_model(pb_utils, EnsembleModel, args)

    def execute(self, requests):
        """Answer requests."""
        return self._model.execute(requests)

    def finalize(self):
        """Release the model."""
        self._model.finalize()
