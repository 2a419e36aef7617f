"""The project's own definitions of Llama, Mistral, Qwen2 and Qwen3 on TensorRT's Python API.

One file for each question: :mod:`~saw_trtllm.network.versions`, what TensorRT's versions differ in;
:mod:`~saw_trtllm.network.graph`, the operations; :mod:`~saw_trtllm.network.decoder`, the model;
:mod:`~saw_trtllm.network.attention`, the plugins in it; :mod:`~saw_trtllm.network.tensors`, names, shapes and profiles
of what the engine is fed; :mod:`~saw_trtllm.network.build`, from a plan to an engine folder.
"""
