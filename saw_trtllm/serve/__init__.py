"""Serving with Triton Inference Server: what the models of ``triton_model_repo`` do, and how a server is started.

Nothing here imports Triton: the models get its ``triton_python_backend_utils`` passed in, as ``pb_utils``.
"""
