"""Print the folder of the CUDA toolkit that pip has installed as wheels (the extra ``kernels``).

Nothing if there is none; if its wheels are not all there, or not of one CUDA version, one sentence and exit code 2.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Of each wheel, a file that compiling needs. nvcc looks for them in its own folder.
NVCC = "bin/nvcc"
PARTS = {
    "nvidia-cuda-nvcc": NVCC,
    "nvidia-cuda-crt": "include/crt/host_runtime.h",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-cccl": "include/cccl/cuda/std/version",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
}


def release(name: str) -> str:
    """Give a wheel's CUDA version, such as ``13.0``; empty if it is not installed."""
    try:
        return ".".join(version(name).split(".")[:2])
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Print the folder, or say what it lacks."""
    nvcc = next((nvcc for path in sys.path for nvcc in Path(path).glob(f"nvidia/cu*/{NVCC}")), None)
    if nvcc is None:
        return
    folder, wanted = nvcc.parents[1], release("nvidia-cuda-nvcc")
    lacking = [name for name, part in PARTS.items() if not (folder / part).is_file() or release(name) != wanted]
    if lacking:
        wheels = " ".join(f"'{name}=={wanted}.*'" for name in lacking)
        print(f"error: pip's nvcc in {folder} lacks wheels of its CUDA {wanted}: pip install {wheels}", file=sys.stderr)
        sys.exit(2)
    print(folder)


if __name__ == "__main__":
    main()
