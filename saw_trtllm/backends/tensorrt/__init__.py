"""The backend of TensorRT: the project's own definitions, and the executor over the engines that come of them.

Building, one file for each question: ``versions``, what TensorRT's versions differ in; ``graph``, the operations;
``decoder``, the model; ``attention``, the plugins in it; ``profiles``, the ranges of what an engine is fed; ``build``,
from a plan to an engine folder.

Running, with NumPy, ``tensorrt`` and ``cuda-python`` and no tensor library: ``cuda``, what CUDA is asked for;
``engine_checks``, which engines this machine can run; ``session``, an engine and its execution contexts; ``memory``,
what the GPU's memory is given to; ``staging``, a step's tensors on their way to the GPU; ``graphs``, decodes as CUDA
graphs; ``executor``, which implements the runtime's interface with them.
"""
