"""The tensors of a case: one set of queries, keys and values that all contenders compute on, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.kernels.cases import Case

DTYPE = torch.bfloat16
BYTES = 2
SEED = 20
#: Queries of a prefill that are compared with fp32 attention: the last ones, which see the most keys.
SAMPLED_QUERIES = 8


@dataclass(frozen=True)
class Problem:
    """A step of attention over shuffled blocks.

    Attributes
    ----------
    case : Case
    q : torch.Tensor
        bfloat16 ``[tokens, num_heads, head_dim]``.
    k, v : torch.Tensor
        bfloat16 ``[batch, context, num_kv_heads, head_dim]``: of all tokens, the step's own last.
    blocks : torch.Tensor
        int64 ``[batch, blocks of a sequence]``: a permutation of the pool's blocks.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def make(cls, case: Case) -> Problem:
        """Standard normal tensors on the current GPU."""
        rng = torch.Generator("cuda").manual_seed(SEED)
        heads = case.heads

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=DTYPE, device="cuda").normal_(generator=rng)

        shape = case.batch, case.context, heads.num_kv_heads, heads.head_dim
        per_sequence = -(-case.context // case.tokens_per_block)
        order = torch.randperm(case.batch * per_sequence, generator=rng, device="cuda")
        q = normal(case.tokens, heads.num_heads, heads.head_dim)
        return cls(case, q, normal(*shape), normal(*shape), order.view(case.batch, per_sequence))

    def chunk(self, x: torch.Tensor) -> torch.Tensor:
        """The step's own tokens of k or v: ``[tokens, num_kv_heads, head_dim]``."""
        return x[:, self.case.history :].flatten(0, 1)

    @property
    def slots(self) -> torch.Tensor:
        """int64 ``[batch, context]``: where each token's row lies, counted in rows."""
        token = torch.arange(self.case.context, device="cuda")
        size = self.case.tokens_per_block
        return self.blocks[:, token // size] * size + token % size

    @property
    def io_bytes(self) -> int:
        """Bytes of q and of the output."""
        return 2 * self.q.numel() * BYTES

    @property
    def rows(self) -> int:
        """Rows of K and V in the pool, without the step's own in a prefill."""
        case = self.case
        tokens = case.batch * (case.history if case.suite == "prefill" else case.context)
        return 2 * tokens * case.heads.num_kv_heads

    @property
    def flops(self) -> int:
        """Multiply-adds of a causal prefill times two; 0 for decode."""
        case = self.case
        if case.suite != "prefill":
            return 0
        pairs = case.batch * (case.chunk * case.history + case.chunk * (case.chunk + 1) // 2)
        return 4 * pairs * case.heads.num_heads * case.heads.head_dim

    @cached_property
    def _sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of q, and fp32 attention of them: of the first and last sequence of a decode, the last of a prefill."""
        case, heads = self.case, self.case.heads
        picked = range(case.tokens - SAMPLED_QUERIES, case.tokens) if case.suite == "prefill" else {0, case.batch - 1}
        rows, outputs = sorted(picked), []
        for row in rows:
            sequence, at = divmod(row, case.chunk)
            seen = case.history + at + 1
            k, v = (
                x[sequence, :seen].float().transpose(0, 1) for x in (self.k, self.v)
            )  # [num_kv_heads, seen, head_dim]
            q = self.q[row].float().view(heads.num_kv_heads, heads.group, heads.head_dim)
            scores = q @ k.transpose(1, 2) * heads.head_dim**-0.5
            outputs.append((scores.softmax(-1) @ v).flatten(0, 1))
        return torch.tensor(rows, device="cuda"), torch.stack(outputs)

    def cosine(self, out: torch.Tensor) -> float:
        """The sampled queries' least cosine of an output ``[tokens, num_heads, head_dim]`` to what it should be."""
        rows, exact = self._sample
        given = out[rows].float().flatten(1)
        return torch.nn.functional.cosine_similarity(given, exact.flatten(1), dim=1).min().item()
