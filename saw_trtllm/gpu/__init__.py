"""The runtime's executor over a TensorRT engine: NumPy, ``tensorrt`` and ``cuda-python``, no tensor library.

One file for each question: :mod:`~saw_trtllm.gpu.cuda`, what CUDA is asked for; :mod:`~saw_trtllm.gpu.acceptance`,
which engines this machine can run; :mod:`~saw_trtllm.gpu.session`, an engine and its execution contexts;
:mod:`~saw_trtllm.gpu.memory`, what the GPU's memory is given to; :mod:`~saw_trtllm.gpu.staging`, a step's tensors on
their way to the GPU; :mod:`~saw_trtllm.gpu.graphs`, decodes as CUDA graphs; :mod:`~saw_trtllm.gpu.executor`, all of it
behind the runtime's interface.
"""
