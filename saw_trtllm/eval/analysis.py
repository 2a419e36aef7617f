"""Where a cache's error arises, and where the outliers sit: per layer and head, on what the exact model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from saw_trtllm.backends.reference.int4 import rotate
from saw_trtllm.backends.reference.quantizers import KVQuantizer
from saw_trtllm.backends.reference.window import Attended, WindowModel, causal_mask
from saw_trtllm.format import default_hadamard_order
from saw_trtllm.model.config import ModelConfig

#: Queries of a window whose scores are compared, evenly spread, its last among them; fewer where all heads' scores
#: would be too many.
_QUERIES = 128
_MAX_SCORES = 1 << 26
#: Of a key's components, in units of the row's rms.
HISTOGRAM_RANGE, HISTOGRAM_BINS = 8.0, 81


@dataclass
class LayerErrors:
    """Error that a cache makes in each layer by itself, the layer's input being exact.

    Attributes
    ----------
    scores : list of list of float
        ``[num_layers][num_heads]``: rms over queries of the standard deviation, over the keys, of a softmax logit's
        error. In nats: what all keys have in common does not count, since a softmax ignores it.
    outputs : list of list of float
        ``[num_layers][num_heads]``: rms of the attention output's error over the rms of the output.
    """

    scores: list[list[float]]
    outputs: list[list[float]]


@dataclass
class Outliers:
    """How uneven the channels are that a cache has to hold.

    Attributes
    ----------
    k_ratio, k_ratio_rotated, v_ratio : list of list of float
        ``[num_layers][num_kv_heads]``: rms of the largest channel over the median channel's; of the keys after RoPE, of
        the same rotated by the default Hadamard order, and of the values.
    k_largest : list of list of int
        The largest channel of the keys.
    k_bias : list of list of float
        Length of the mean key over the rms length of the keys: the share that centring takes out.
    k_channels, k_channels_rotated : list of float
        rms of each channel in the layer and head of the largest ratio.
    k_histogram, k_histogram_rotated : list of float
        Density of all keys' components over the rms of their row, from -8 to 8.
    """

    k_ratio: list[list[float]]
    k_ratio_rotated: list[list[float]]
    v_ratio: list[list[float]]
    k_largest: list[list[int]]
    k_bias: list[list[float]]
    worst: tuple[int, int]
    k_channels: list[float]
    k_channels_rotated: list[float]
    k_histogram: list[float] = field(default_factory=list)
    k_histogram_rotated: list[float] = field(default_factory=list)


def analyse(
    model: WindowModel,
    windows: torch.Tensor,
    quantizers: Mapping[str, KVQuantizer],
    progress: Callable[[], None] | None = None,
) -> tuple[dict[str, LayerErrors], Outliers]:
    """Run the exact model over windows int64 ``[n, T]`` and look at what its attention works on."""
    errors = {name: _ErrorSums(model.config, quantizer) for name, quantizer in quantizers.items()}
    channels = _ChannelSums(model.config)

    def observe(layer: int, x: Attended) -> None:
        channels.add(layer, x)
        exact = _Sampled.of(x)
        for sums in errors.values():
            sums.add(layer, x, exact)

    for window in windows:
        model.hidden(window[None], observe=observe)
        if progress is not None:
            progress()
    return {name: sums.result() for name, sums in errors.items()}, channels.result()


@dataclass
class _Sampled:
    """Exact attention of a few queries of a sequence.

    Attributes
    ----------
    queries : int64 ``[n]``
    q : fp32 ``[num_kv_heads, group, n, head_dim]``
    visible : bool ``[n, num_tokens]``
    scores : fp32 ``[num_kv_heads, group, n, num_tokens]``
    outputs : fp32 ``[num_kv_heads, group, n, head_dim]``
    """

    queries: torch.Tensor
    q: torch.Tensor
    visible: torch.Tensor
    scores: torch.Tensor
    outputs: torch.Tensor

    @classmethod
    def of(cls, x: Attended) -> _Sampled:
        total = len(x.q)
        n = min(_QUERIES, total, max(8, _MAX_SCORES // (total * x.q.shape[1])))
        queries = (torch.arange(1, n + 1, device=x.q.device) * total) // n - 1
        q = x.q[queries].unflatten(1, (x.k.shape[1], -1)).permute(1, 2, 0, 3)
        visible = causal_mask(queries, slice(0, total), x.window)
        scores, outputs = _attend(x, q, x.k, x.v, visible)
        return cls(queries, q, visible, scores, outputs)


def _attend(
    x: Attended, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``[num_kv_heads, group, n, num_tokens]`` and outputs of queries."""
    scores = x.scores(q @ k.permute(1, 2, 0)[:, None])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return scores, weights @ v.transpose(0, 1)[:, None]


class _ErrorSums:
    def __init__(self, config: ModelConfig, quantizer: KVQuantizer) -> None:
        self._quantizer = quantizer
        shape = (config.num_hidden_layers, config.num_attention_heads)
        self._score, self._error, self._output = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self._count = [0] * config.num_hidden_layers

    def add(self, layer: int, x: Attended, exact: _Sampled) -> None:
        k, v = self._quantizer.quantize(layer, x.k, x.v)
        first_exact = self._quantizer.first_exact(exact.queries + 1)
        if first_exact is None:
            scores, outputs = _attend(x, exact.q, k, v, exact.visible)
        else:
            scores, outputs = self._mixed(x, exact, k, v, first_exact)
        error = (scores - exact.scores).masked_fill(~exact.visible, 0.0)
        seen = exact.visible.sum(-1)
        variance = error.square().sum(-1) / seen - (error.sum(-1) / seen).square()
        self._score[layer] += variance.sum(-1).flatten().double().cpu()
        self._error[layer] += (outputs - exact.outputs).square().sum((-1, -2)).flatten().double().cpu()
        self._output[layer] += exact.outputs.square().sum((-1, -2)).flatten().double().cpu()
        self._count[layer] += len(seen)

    @staticmethod
    def _mixed(
        x: Attended, exact: _Sampled, k: torch.Tensor, v: torch.Tensor, first_exact: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to exact rows from ``first_exact`` of each query on."""
        is_exact = torch.arange(len(x.k), device=x.k.device) >= first_exact[:, None]
        scores = torch.where(is_exact, exact.scores, x.scores(exact.q @ k.permute(1, 2, 0)[:, None]))
        weights = scores.masked_fill(~exact.visible, -torch.inf).softmax(-1)
        read = (weights * ~is_exact) @ v.transpose(0, 1)[:, None]
        return scores, read + (weights * is_exact) @ x.v.transpose(0, 1)[:, None]

    def result(self) -> LayerErrors:
        count = torch.tensor(self._count, dtype=torch.float64)[:, None]
        scores = (self._score.clamp_min(0) / count).sqrt()
        outputs = (self._error / self._output).sqrt()
        return LayerErrors(scores.tolist(), outputs.tolist())


class _ChannelSums:
    def __init__(self, config: ModelConfig) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_size)
        self._order = default_hadamard_order(config.head_size)
        self._k, self._rotated, self._v, self._mean = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
        self._histograms = torch.zeros(2, HISTOGRAM_BINS, dtype=torch.float64)
        self._tokens = 0

    def add(self, layer: int, x: Attended) -> None:
        rotated = rotate(x.k, self._order)
        for sums, t in ((self._k, x.k), (self._rotated, rotated), (self._v, x.v)):
            sums[layer] += t.double().square().sum(0).cpu()
        self._mean[layer] += x.k.double().sum(0).cpu()
        for i, t in enumerate((x.k, rotated)):
            relative = t / t.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)
            bounded = relative.clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE).cpu()
            self._histograms[i] += torch.histc(bounded, HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
        self._tokens += len(x.k) if layer == 0 else 0

    def result(self) -> Outliers:
        k, rotated, v = ((s / self._tokens).sqrt() for s in (self._k, self._rotated, self._v))
        ratio = _ratio(k)
        worst = divmod(int(ratio.argmax()), ratio.shape[1])
        width = 2 * HISTOGRAM_RANGE / HISTOGRAM_BINS
        density = self._histograms / self._histograms.sum(-1, keepdim=True) / width
        return Outliers(
            k_ratio=ratio.tolist(),
            k_ratio_rotated=_ratio(rotated).tolist(),
            v_ratio=_ratio(v).tolist(),
            k_largest=k.argmax(-1).tolist(),
            k_bias=((self._mean / self._tokens).norm(dim=-1) / k.norm(dim=-1).clamp_min(1e-20)).tolist(),
            worst=worst,
            k_channels=k[worst].tolist(),
            k_channels_rotated=rotated[worst].tolist(),
            k_histogram=density[0].tolist(),
            k_histogram_rotated=density[1].tolist(),
        )


def _ratio(rms: torch.Tensor) -> torch.Tensor:
    return rms.amax(-1) / rms.median(-1).values.clamp_min(1e-20)
