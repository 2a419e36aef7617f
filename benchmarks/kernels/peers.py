"""The other side: FlashInfer and TensorRT-LLM's XQA, in bf16 and over fp8, and the SAW-INT4 paper's Triton kernels."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.kernels.cases import FLASHINFER_PEERS, FP8_PEERS, Case, Heads
from benchmarks.kernels.problem import BYTES, DTYPE, Problem
from benchmarks.kernels.run import Contender, Launch
from saw_trtllm.errors import BackendUnavailableError, ConfigError

FP8 = torch.float8_e4m3fn
# "trtllm-gen" is never asked for: it waits for a download; fa3 does not compile for fp8 rows.
FLASHINFER_BACKENDS = {DTYPE: ("fa2", "fa3", "auto"), FP8: ("fa2",)}
FLASHINFER_WORKSPACE_BYTES = 512 << 20
COMPILE_WORKSPACE_BYTES = 128 << 20

OFFICIAL_SOURCE = "branch jisen/fused_kv_rotation of github.com/jindajia/sglang-fork"
#: The kernels' modules and files: a later one imports those before it.
OFFICIAL_FILES = {
    "sglang.srt.mem_cache.kv_quant_kernels": "python/sglang/srt/mem_cache/kv_quant_kernels.py",
    "sglang.QuantKernel.fused_hadamard_int4_kv": "python/sglang/QuantKernel/fused_hadamard_int4_kv.py",
    "sglang.srt.layers.attention.triton_ops.decode_attention": (
        "python/sglang/srt/layers/attention/triton_ops/decode_attention.py"
    ),
}
OFFICIAL_SPLITS = (8, 16, 32, 64, 128)
#: fp32 scale and zero after head_dim/2 bytes of codes.
OFFICIAL_TAIL_BYTES = 8


class FlashInfer:
    """FlashInfer's paged and ragged attention, the fastest of its backends, and the XQA kernel that it carries."""

    def __init__(self) -> None:
        try:
            self._module = importlib.import_module("flashinfer")
        except ImportError as e:
            raise BackendUnavailableError(
                f"FlashInfer cannot be imported ({e}): pip install flashinfer-python, or leave it out with --peers none"
            ) from e
        self._workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def compile(self, cases: Iterable[Case]) -> None:
        """Have all kernels compiled at once, which at first use would be one after the other."""

        def first_launch(name: str, heads: Heads, backend: str) -> None:
            problem = Problem.make(Case("decode", 1, 1, 63, (), heads))
            workspace = torch.zeros(COMPILE_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
            # A backend that fails will say so where it is measured.
            with contextlib.suppress(Exception):
                cache = _paged_cache(problem, _cache_dtype(name))
                self._decode_launch(problem, backend, cache, workspace, torch.empty_like(problem.q))()

        kinds = {(name, case.heads) for case in cases for name in case.contenders if name in FLASHINFER_PEERS}
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(first_launch, name, heads, backend)
                for name, heads in kinds
                for backend in _backends(name)
                if backend != "auto"
            ]
        for job in jobs:
            job.result()

    def decode(self, problem: Problem, name: str) -> Contender:
        """``BatchDecodeWithPagedKVCacheWrapper`` on tensor cores, or XQA."""
        cache, out = _paged_cache(problem, _cache_dtype(name)), torch.empty_like(problem.q)
        variants = {
            backend: partial(self._decode_launch, problem, backend, cache, self._workspace, out)
            for backend in _backends(name)
        }
        bytes_ = problem.rows * problem.case.heads.head_dim * cache.itemsize + problem.io_bytes
        return Contender(name, variants, bytes_, cosine=lambda: problem.cosine(out))

    def _decode_launch(
        self, problem: Problem, backend: str, cache: torch.Tensor, workspace: torch.Tensor, out: torch.Tensor
    ) -> Launch:
        case, heads = problem.case, problem.case.heads
        if backend == "xqa":
            workspace.zero_()
            lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
            return partial(
                self._module.decode.trtllm_batch_decode_with_kv_cache,
                *(problem.q, cache, workspace, problem.blocks.int(), lengths, case.context),
                out=out,
                bmm1_scale=1 / math.sqrt(heads.head_dim),
                bmm2_scale=1.0,
                backend=backend,
                kv_layout="NHD",
            )
        wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend=backend
        )
        wrapper.plan(
            *_page_table(problem),
            *(heads.num_heads, heads.num_kv_heads, heads.head_dim, case.tokens_per_block),
            q_data_type=DTYPE,
            kv_data_type=cache.dtype,
        )
        return partial(wrapper.run, problem.q, cache, out=out)

    def prefill(self, problem: Problem, name: str) -> Contender:
        """The ragged wrapper without history, the paged one with."""
        case, heads = problem.case, problem.case.heads
        out, ends = torch.empty_like(problem.q), _indptr(case.batch, case.chunk)
        shape = heads.num_heads, heads.num_kv_heads, heads.head_dim
        dtypes = {"causal": True, "q_data_type": DTYPE, "kv_data_type": DTYPE}

        def plan_ragged(backend: str) -> Launch:
            wrapper = self._module.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend=backend)
            wrapper.plan(ends, ends, *shape, **dtypes)
            k, v = problem.chunk(problem.k), problem.chunk(problem.v)
            return lambda: wrapper.run(problem.q, k, v, out=out)

        def plan_paged(backend: str) -> Launch:
            wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=backend)
            wrapper.plan(ends, *_page_table(problem), *shape, case.tokens_per_block, **dtypes)
            return lambda: wrapper.run(problem.q, cache, out=out)

        cache = _paged_cache(problem, DTYPE) if case.history else None
        bytes_ = problem.io_bytes + (problem.rows + 2 * case.tokens * heads.num_kv_heads) * heads.head_dim * BYTES
        plan = plan_paged if case.history else plan_ragged
        variants = {backend: partial(plan, backend) for backend in _backends(name)}
        return Contender(name, variants, bytes_, problem.flops, lambda: problem.cosine(out))


def _cache_dtype(name: str) -> torch.dtype:
    return FP8 if name in FP8_PEERS else DTYPE


def _backends(name: str) -> tuple[str, ...]:
    return ("xqa",) if name.startswith("xqa") else FLASHINFER_BACKENDS[_cache_dtype(name)]


def _indptr(count: int, step: int) -> torch.Tensor:
    return torch.arange(count + 1, dtype=torch.int32, device="cuda") * step


def _page_table(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's indptr, indices and length of the last page."""
    case = problem.case
    last = (case.context - 1) % case.tokens_per_block + 1
    lengths = torch.full((case.batch,), last, dtype=torch.int32, device="cuda")
    return _indptr(case.batch, problem.blocks.shape[1]), problem.blocks.flatten().int(), lengths


def _paged_cache(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """``[pages, 2, tokens_per_block, num_kv_heads, head_dim]``: FlashInfer's layout NHD. fp8 rows have no scales."""
    case, heads = problem.case, problem.case.heads
    shape = problem.blocks.numel(), 2, case.tokens_per_block, heads.num_kv_heads, heads.head_dim
    cache = torch.empty(shape, dtype=DTYPE, device="cuda")
    for which, x in enumerate((problem.k, problem.v)):
        cache[problem.blocks.flatten(), which] = x.reshape(-1, *shape[2:])
    return cache.to(dtype)


class Official:
    """The SAW-INT4 paper's kernels, from the three files that hold them.

    Parameters
    ----------
    folder : Path
        The repository, or as much of it as :data:`OFFICIAL_FILES` names.

    Raises
    ------
    ConfigError
        If a file is missing, or cannot be imported.
    """

    def __init__(self, folder: Path) -> None:
        files = {name: folder / file for name, file in OFFICIAL_FILES.items()}
        for name, path in files.items():
            if not path.is_file():
                raise ConfigError(
                    f"--official {folder} lacks {OFFICIAL_FILES[name]}: give a checkout of {OFFICIAL_SOURCE}"
                )
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in files.values())).hexdigest()
        _pretend_sglang()
        try:
            self._quant, self._fused, self._decode = (_load(name, path) for name, path in files.items())
        except Exception as e:  # whatever foreign files raise when they are imported
            raise ConfigError(
                f"the kernels in --official {folder} cannot be imported ({e}): give {OFFICIAL_SOURCE}, with "
                f"PyTorch and Triton installed"
            ) from e

    def decode(self, problem: Problem, name: str) -> Contender:
        """Decode with the rotation of Q fused in, the best number of splits."""
        case, heads = problem.case, problem.case.heads
        pool = _OfficialPool(problem.blocks.numel() * case.tokens_per_block, case)
        slots = problem.slots
        self._fill(pool, problem.k.flatten(0, 1), problem.v.flatten(0, 1), slots.flatten())
        out, indptr = torch.empty_like(problem.q), _indptr(case.batch, case.context)

        def with_splits(splits: int) -> Launch:
            partial = torch.empty(case.batch, heads.num_heads, splits, heads.head_dim, device="cuda")
            lse = torch.empty(case.batch, heads.num_heads, splits, device="cuda")
            counts = torch.full((case.batch,), splits, dtype=torch.int32, device="cuda")
            return lambda: self._decode.decode_attention_fwd_quantized(
                *(problem.q, *pool.codes, *pool.scales, out, indptr, slots_flat, partial, lse, counts, splits),
                *(1 / math.sqrt(heads.head_dim), "int4"),
                fuse_q_hadamard=True,
                hadamard_order=heads.head_dim,
            )

        slots_flat = slots.flatten()
        return Contender(
            name,
            {f"{splits} splits": partial(with_splits, splits) for splits in OFFICIAL_SPLITS},
            bytes=problem.rows * (heads.head_dim // 2 + OFFICIAL_TAIL_BYTES) + problem.io_bytes,
            cosine=lambda: problem.cosine(out),
        )

    def write(self, case: Case, name: str) -> Contender:
        """The fused rotation and write of K and V, which leaves RoPE and Q to others."""
        heads = case.heads
        shape = case.tokens, heads.num_kv_heads, heads.head_dim
        k, v = (torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        pool = _OfficialPool(case.batch * case.context, case)
        order = torch.randperm(case.batch * case.context // case.tokens_per_block, device="cuda")
        order = order.view(case.batch, -1)
        token = torch.arange(case.history, case.context, device="cuda")
        slots = order[:, token // case.tokens_per_block] * case.tokens_per_block + token % case.tokens_per_block
        slots = slots.flatten()
        row = heads.head_dim * BYTES + heads.head_dim // 2 + OFFICIAL_TAIL_BYTES
        return Contender(
            name,
            {"": lambda: partial(self._fill, pool, k, v, slots, rotate_v=True)},
            bytes=2 * case.tokens * heads.num_kv_heads * row,
        )

    def _fill(
        self, pool: _OfficialPool, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, rotate_v: bool = False
    ) -> None:
        self._fused.quantized_set_kv_int4_hadamard_fused_triton(
            k, v, slots, *pool.codes, *pool.scales, hadamard_order=k.shape[-1], rotate_v=rotate_v
        )


class _OfficialPool:
    """Codes and scales of K and of V, by slot."""

    def __init__(self, slots: int, case: Case) -> None:
        heads = case.heads.num_kv_heads
        shape = slots, heads, case.heads.head_dim // 2
        self.codes = [torch.zeros(shape, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.scales = [torch.zeros(slots, heads, 2, device="cuda") for _ in range(2)]


def _pretend_sglang() -> None:
    """Empty packages where the three files look for SGLang's."""
    for module in OFFICIAL_FILES:
        parts = module.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            _empty_package(".".join(parts[:end]))
    _empty_package("sglang.srt.utils").is_hip = lambda: False


def _empty_package(name: str) -> Any:
    package = types.ModuleType(name)
    package.__path__ = []
    return sys.modules.setdefault(name, package)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
