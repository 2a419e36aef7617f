"""Arrays on a GPU, whatever framework made them: address, shape, dtype and device.

Anything with ``__dlpack__`` (PyTorch, CuPy, JAX) or ``__cuda_array_interface__`` (CuPy, Numba) is read where it lies:
no framework is imported, nothing is copied or synchronized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saw_trtllm.errors import BackendUnavailableError, KernelError, OpError

ACTIVATION_DTYPES = ("float16", "bfloat16")

_CUDA = 2  # kDLCUDA
_DLPACK_DEVICES = {1: "the CPU", 3: "the CPU (pinned memory)", 10: "a ROCm GPU", 13: "CUDA managed memory"}
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
#: ``__cuda_array_interface__`` has no bfloat16; NumPy's extension types call theirs a void of two bytes.
_TYPESTR_KINDS = {"i": "int", "u": "uint", "f": "float", "V": "bfloat", "c": "complex", "b": "bool"}


def kernels() -> Any:
    """The module ``saw_trtllm._C``.

    Raises
    ------
    BackendUnavailableError
        If it was not built.
    """
    try:
        from saw_trtllm import _C
    except ImportError as e:
        raise BackendUnavailableError(
            f"the CUDA kernels, saw_trtllm._C, cannot be loaded ({e}): build them with build_scripts/kernels, "
            f"which needs nvcc"
        ) from e
    return _C


@dataclass(frozen=True)
class DeviceArray:
    """An array as a kernel sees it.

    Attributes
    ----------
    name : str
        What the caller calls it, for messages.
    address : int
    shape : tuple of int
    dtype : str
        ``float16``, ``bfloat16``, ``int32`` ...
    contiguous : bool
        In C order.
    device : int, optional
        The GPU's ordinal; None where the array does not say.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str
    contiguous: bool
    device: int | None

    @classmethod
    def of(cls, name: str, array: Any) -> DeviceArray:
        """Read what ``array`` says of itself.

        Raises
        ------
        OpError
            If it is not an array on a CUDA GPU.
        """
        if hasattr(array, "__dlpack_device__"):
            kind, device = (int(x) for x in array.__dlpack_device__())
            if kind != _CUDA:
                where = _DLPACK_DEVICES.get(kind, f"a device of DLPack type {kind}")
                raise OpError(f"{name} lies on {where}: the kernels take arrays on a CUDA GPU")
            try:
                capsule = array.__dlpack__(stream=-1)
            except (BufferError, RuntimeError) as e:
                raise OpError(f"{name} cannot be read through DLPack: {e}") from e
            address, shape, strides, (code, bits) = kernels().dlpack_view(capsule)
            dtype = _dtype_name(_DLPACK_KINDS.get(code, f"dlpack{code}_"), bits)
            return cls(name, address, shape, dtype, _contiguous(shape, strides), device)
        if hasattr(array, "__cuda_array_interface__"):
            interface = array.__cuda_array_interface__
            shape, strides, typestr = tuple(interface["shape"]), interface.get("strides"), interface["typestr"]
            size = int(typestr[2:])
            in_elements = None if strides is None else tuple(s // size for s in strides)
            dtype = _dtype_name(_TYPESTR_KINDS.get(typestr[1], typestr[1]), 8 * size)
            return cls(name, interface["data"][0], shape, dtype, _contiguous(shape, in_elements), None)
        raise OpError(
            f"{name} is a {type(array).__name__}: the kernels take arrays on a CUDA GPU that have __dlpack__ or "
            f"__cuda_array_interface__"
        )

    def check(self, dtype: str | Sequence[str], shape: Sequence[int | str], alignment: int = 16) -> DeviceArray:
        """Require what a kernel relies on.

        Parameters
        ----------
        dtype : str or sequence of str
            One of these.
        shape : sequence of int or str
            A number that the dimension must have, or the name of one that is free.
        alignment : int
            Bytes that the address must be a multiple of.

        Returns
        -------
        DeviceArray
            Itself.

        Raises
        ------
        OpError
            If something does not fit.
        """
        dtypes = (dtype,) if isinstance(dtype, str) else tuple(dtype)
        if self.dtype not in dtypes:
            raise OpError(f"{self.name} has dtype {self.dtype}: it must be {' or '.join(dtypes)}")
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        fits = len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(shape, self.shape, strict=True)
        )
        if not fits:
            raise OpError(f"{self.name} has shape {list(self.shape)}: it must be {wanted}")
        if not self.contiguous:
            raise OpError(f"{self.name} is not contiguous: it must be {wanted} in C order, without gaps")
        if self.address % alignment and 0 not in self.shape:
            raise OpError(f"{self.name} begins at address {self.address:#x}: it must be a multiple of {alignment}")
        return self


def common_device(arrays: Sequence[DeviceArray | None]) -> int:
    """The GPU that all arrays lie on, -1 where none says.

    Raises
    ------
    OpError
        If they lie on several.
    """
    known = [a for a in arrays if a is not None and a.device is not None]
    for a in known:
        if a.device != known[0].device:
            raise OpError(
                f"{a.name} lies on GPU {a.device} and {known[0].name} on GPU {known[0].device}: all arrays of a launch "
                f"must lie on one"
            )
    device = known[0].device if known else None
    return -1 if device is None else device


def stream_handle(stream: Any) -> int:
    """The ``cudaStream_t`` of an int, None (the default stream), or a framework's stream object."""
    if stream is None:
        return 0
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):  # PyTorch, CuPy
        if isinstance(handle := getattr(stream, attribute, None), int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise OpError(
        f"stream is a {type(stream).__name__}: it must be None, a cudaStream_t as int or a framework's stream"
    )


def address(array: DeviceArray | None) -> int:
    """An array's, and 0 of none."""
    return 0 if array is None else array.address


def raise_for(code: int, kernel: str, work: str) -> None:
    """Raise KernelError for a launch that the kernels rejected or CUDA failed.

    Parameters
    ----------
    code : int
        What the launch returned, a ``cudaError_t``.
    kernel, work : str
        What was launched, and on what.
    """
    if code:
        raise KernelError(
            f"{kernel} could not be launched ({kernels().error_string(code)}) for {work}: check that the kernels were "
            f"built for this GPU"
        )


def _dtype_name(kind: str, bits: int) -> str:
    return kind if kind == "bool" else f"{kind}{bits}"


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    if strides is None or 0 in shape:
        return True
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != expected:
            return False
        expected *= n
    return True
