"""The paper's baselines: other ways to hold keys and values in about 4 bits, to be compared and not to be served.

None of them is in an engine. What each asks of a server stands in :class:`Demands`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from saw_trtllm.backends.reference.int4 import dequantize, quantize, rotate
from saw_trtllm.backends.reference.quantizers import TokenwiseQuantizer, round_rows
from saw_trtllm.backends.reference.window import Attended, WindowModel
from saw_trtllm.format import CODE_MAX, ROW_TAIL_BYTES


@dataclass(frozen=True)
class Demands:
    """What of a serving engine survives a cache.

    Attributes
    ----------
    pages : str
        Whether a token's row is written once, where it stays, so that pages can be shared and moved as bytes.
    fused : str
        Whether attention can read it at about the cost of a row with one scale and one lo.
    calibration_free : str
    """

    pages: str
    fused: str
    calibration_free: str


class PerChannelKeys:
    """Keys quantized per channel over groups of tokens, values per token (KIVI, arXiv 2402.02750).

    A channel's scale is known only when its group is whole, so the latest tokens wait unquantized: as in KIVI, the
    cache is flushed ``residual`` tokens at a time, and a query over n tokens sees the last n mod ``residual`` of them
    exact, values too. In a teacher-forced window each query so sees what it would have seen when it was decoded.

    Parameters
    ----------
    order : int
        Hadamard order for both K and V; 1 is KIVI as published.
    group : int
        Tokens that share a channel's scale and lo.
    residual : int
        Tokens that are flushed at a time: a multiple of ``group``. 0 is not available in a decode: each group is read
        quantized before it is whole. It shows what the unquantized tokens are worth.
    """

    tokenwise = False
    demands = Demands("no: the latest tokens wait in 16 bits", "no: two caches, a scale per channel", "yes")

    def __init__(self, order: int = 1, group: int = 32, residual: int = 128) -> None:
        if residual % group:
            raise ValueError(f"residual {residual} is not a multiple of group {group}")
        self.order = order
        self.group = group
        self.residual = residual

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, as read once they are flushed; a last group that is not whole is as it was."""
        whole = len(k) // self.group * self.group
        if not whole:
            return k, round_rows(v, self.order)
        channels = rotate(k[:whole], self.order).unflatten(0, (-1, self.group)).transpose(1, -1)
        keys = dequantize(*quantize(channels)).transpose(1, -1).flatten(0, 1)
        return torch.cat([rotate(keys, self.order), k[whole:]]), round_rows(v, self.order)

    def first_exact(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """The last flush before each query."""
        return lengths // self.residual * self.residual if self.residual else None

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Of a flushed token; those that wait take 16 bits a number and are not counted."""
        key = head_dim / 2 + ROW_TAIL_BYTES * head_dim / self.group
        return num_kv_heads * (key + head_dim / 2 + ROW_TAIL_BYTES)


class Codebook(TokenwiseQuantizer):
    """The nearest of a head's k-means centroids, and the rest of the row in 4 bits; K and V alike.

    With one centroid this is centring, of values too.

    Parameters
    ----------
    sample : list of Attended
        Calibration data, one a layer.
    centroids : int
        Per layer and head, for K and for V.
    order : int
        Hadamard order of what is left.
    """

    def __init__(self, sample: list[Attended], centroids: int, order: int = 1) -> None:
        self.order = order
        self._num = centroids
        self._k = [_kmeans(x.k, centroids) for x in sample]
        self._v = [_kmeans(x.v, centroids) for x in sample]

    @property
    def demands(self) -> Demands:
        """One centroid asks nothing of a reader; more are gathered for each key."""
        fused = "yes" if self._num == 1 else "with a gather per key and value"
        return Demands("yes", fused, "no")

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Subtract the nearest centroid, quantize the rest."""
        return self._rounded(k, self._k[layer]), self._rounded(v, self._v[layer])

    def _rounded(self, x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        nearest = _nearest(x.transpose(0, 1), centroids)
        center = centroids.gather(1, nearest[..., None].expand(-1, -1, x.shape[-1])).transpose(0, 1)
        return round_rows(x - center, self.order) + center

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Rows with an index of whole bytes; the codebooks themselves are a model's, not a token's."""
        index = 0 if self._num == 1 else 1
        return num_kv_heads * 2 * (head_dim / 2 + ROW_TAIL_BYTES + index)


class HessianRounding(TokenwiseQuantizer):
    """Codes of a key chosen to disturb scores least, given the queries' second moments; values rounded as ever.

    A score's squared error is ``eᵀ H e`` on average, with e the key's error and H = E[q qᵀ] over the queries of its
    group. Channels are rounded one after the other, each one's error being made up for in those that follow (optimal
    brain compression, as GPTQ does for weights, arXiv 2210.17323). Scale and lo are from the row's own min and max.

    Parameters
    ----------
    sample : list of Attended
        Calibration data, one a layer.
    order : int
        Hadamard order for both K and V.
    """

    demands = Demands("yes", "yes", "no: and head_dim steps, one after the other, for each key written")
    _DAMPING = 0.01

    def __init__(self, sample: list[Attended], order: int = 1) -> None:
        self.order = order
        self._factors = [self._factor(x) for x in sample]

    def _factor(self, x: Attended) -> torch.Tensor:
        """Upper Cholesky factors of H⁻¹, its diagonal scaled out: ``[num_kv_heads, head_dim, head_dim]``."""
        q = rotate(x.q, self.order).unflatten(1, (x.k.shape[1], -1)).permute(1, 0, 2, 3).flatten(1, 2).double()
        H = q.transpose(1, 2) @ q
        diagonal = H.diagonal(dim1=1, dim2=2)
        diagonal += self._DAMPING * diagonal.mean(-1, keepdim=True)
        upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
        return (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).float()

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K channel by channel; V row by row."""
        y = rotate(k, self.order).transpose(0, 1)
        _, scale, lo = (t.float() for t in quantize(y))
        factors, left, read = self._factors[layer].to(k.device), y.clone(), torch.empty_like(y)
        for i in range(y.shape[-1]):
            code = ((left[..., i] - lo) / scale).round().clamp(0, CODE_MAX)
            read[..., i] = code * scale + lo
            error = left[..., i] - read[..., i]
            left[..., i + 1 :] -= error[..., None] * factors[:, None, i, i + 1 :]
        return rotate(read.transpose(0, 1), self.order), round_rows(v, self.order)

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Those of our rows."""
        return num_kv_heads * 2 * (head_dim / 2 + ROW_TAIL_BYTES)


def gather(model: WindowModel, windows: torch.Tensor) -> list[Attended]:
    """Q, K and V of calibration windows int64 ``[n, T]``, one a layer, the windows' tokens one after the other."""
    parts: list[list[Attended]] = [[] for _ in range(model.config.num_hidden_layers)]
    for window in windows:
        model.hidden(window[None], observe=lambda layer, x: parts[layer].append(x))
    return [
        replace(
            layer[0],
            q=torch.cat([p.q for p in layer]),
            k=torch.cat([p.k for p in layer]),
            v=torch.cat([p.v for p in layer]),
        )
        for layer in parts
    ]


def _kmeans(x: torch.Tensor, num: int, iterations: int = 20) -> torch.Tensor:
    """Lloyd's algorithm on ``x [num_tokens, heads, head_dim]``, head by head: ``[heads, num, head_dim]``.

    It starts as k-means++ does; a centroid that loses all its tokens stays where it is.
    """
    x = x.transpose(0, 1)
    if num == 1:
        return x.mean(1, keepdim=True)
    centroids = _spread(x, num)
    for _ in range(iterations):
        nearest = _nearest(x, centroids)
        index = nearest[..., None].expand_as(x)
        sums = torch.zeros_like(centroids).scatter_add_(1, index, x)
        counts = torch.zeros_like(centroids).scatter_add_(1, index, torch.ones_like(x))
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids


def _spread(x: torch.Tensor, num: int) -> torch.Tensor:
    """Tokens of each head, drawn in proportion to the squared distance from those before."""
    generator = torch.Generator().manual_seed(0)
    chosen = x[:, :1]
    distance = (x - chosen).square().sum(-1)
    for _ in range(num - 1):
        # Where all tokens are taken, any will do.
        index = torch.multinomial(distance.cpu() + 1e-20, 1, generator=generator).to(x.device)
        token = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        chosen = torch.cat([chosen, token], dim=1)
        distance = torch.minimum(distance, (x - token).square().sum(-1))
    return chosen


def _nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid: int64 ``[heads, num_tokens]`` of ``x [heads, num_tokens, head_dim]``."""
    return (centroids.square().sum(-1)[:, None] - 2 * x @ centroids.transpose(1, 2)).argmin(-1)
