# The CUDA compiler: the one that CUDACXX or PATH names, else the one that pip has installed for this Python.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(SAW_NVCC nvcc HINTS ENV CUDA_PATH PATH_SUFFIXES bin NO_CACHE)
  if(NOT SAW_NVCC)
    execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/../pip_nvcc.py"
      OUTPUT_VARIABLE SAW_PIP_CUDA ERROR_VARIABLE SAW_PIP_CUDA_ERROR OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(SAW_PIP_CUDA_ERROR)
      message(FATAL_ERROR "${SAW_PIP_CUDA_ERROR}")
    elseif(NOT SAW_PIP_CUDA)
      message(FATAL_ERROR "The kernels need nvcc 12 or newer, and none was found: pip install 'saw-trtllm[kernels]', or "
        "put it on PATH or set CUDACXX.")
    endif()
    set(SAW_NVCC "${SAW_PIP_CUDA}/bin/nvcc")
  endif()
  set(ENV{CUDACXX} "${SAW_NVCC}")
  # Wheels have lib where nvcc looks for lib64, and no libcudart.so without a version, which FindCUDAToolkit insists on.
  if(SAW_PIP_CUDA)
    set(CMAKE_CUDA_FLAGS_INIT "-L${SAW_PIP_CUDA}/lib")
    file(GLOB SAW_PIP_CUDART "${SAW_PIP_CUDA}/lib/libcudart.so.*")
    set(CUDA_CUDART "${SAW_PIP_CUDART}" CACHE FILEPATH "CUDA runtime")
  endif()
endif()
