"""The kernels' library as it lies in the package: its version, and the GPUs that it has images for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.plugins.library import KERNELS_LIBRARY, library_path


@dataclass(frozen=True)
class KernelsLibrary:
    """What ``libsaw_kernels.so`` says of itself.

    Attributes
    ----------
    path : str
    version : int
        Of its symbols.
    cuda : tuple of int
        Major and minor version of the CUDA runtime inside.
    images : list of str
        ``sm_90a``: machine code; ``compute_80``: PTX, which newer GPUs compile when it is loaded.
    """

    path: str
    version: int
    cuda: tuple[int, int]
    images: list[str]

    @classmethod
    def load(cls) -> KernelsLibrary:
        """Load it; that needs neither a GPU nor a driver.

        Raises
        ------
        BackendUnavailableError
            If it was not built, or does not load.
        """
        path = str(library_path(KERNELS_LIBRARY))
        try:
            library = ctypes.CDLL(path)
            architectures = library.saw_kernels_architectures
            version, cuda = library.saw_kernels_version(), library.saw_cuda_version()
        except (OSError, AttributeError) as e:
            raise BackendUnavailableError(f"{path} cannot be loaded ({e}): build it anew (docs/plugins.md)") from e
        architectures.restype = ctypes.c_char_p
        return cls(path, version, (cuda // 1000, cuda % 1000 // 10), images_of(architectures().decode()))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether an image fits a GPU's compute capability."""
        return any(_fits(image, capability) for image in self.images)

    def check(self, gpu: str, capability: tuple[int, int]) -> None:
        """Raise :class:`BackendUnavailableError` for a GPU that no image fits."""
        if not self.runs_on(capability):
            raise BackendUnavailableError(
                f"{gpu} has compute capability {version_text(capability)} and the kernels have images for "
                f"{', '.join(self.images)}: build them with build_scripts/kernels "
                f"-DCMAKE_CUDA_ARCHITECTURES={'90a' if capability == (9, 0) else ''.join(map(str, capability))}"
            )


def images_of(architectures: str) -> list[str]:
    """The images that CMake compiles for a list of architectures.

    Parameters
    ----------
    architectures : str
        As of ``CMAKE_CUDA_ARCHITECTURES``, with commas: ``80,90a-real``.
    """
    images: list[str] = []
    for entry in architectures.split(","):
        name, _, kind = entry.partition("-")
        images += [f"sm_{name}"] * (kind != "virtual") + [f"compute_{name}"] * (kind != "real")
    return sorted(images)


def version_text(version: Sequence[int]) -> str:
    """A compute capability or a version of CUDA as NVIDIA writes it: 9.0."""
    return ".".join(map(str, version))


def _fits(image: str, capability: tuple[int, int]) -> bool:
    """As of CUDA's binary compatibility: machine code within a major version, PTX onwards, ``a`` on its own GPU."""
    kind, _, name = image.partition("_")
    digits, special = name.rstrip("a"), name.endswith("a")
    compiled = (int(digits[:-1]), int(digits[-1]))
    if special:
        return capability == compiled
    return capability >= compiled if kind == "compute" else capability[0] == compiled[0] and capability >= compiled
