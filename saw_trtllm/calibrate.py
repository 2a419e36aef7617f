"""The door from text to a calibration: moments of a model's keys, queries and values as it reads, and frames of them.

For a KV head let C be the covariance of its keys after RoPE and M the second moment of its group's queries, with
``N = C^½``, ``G = M^½`` and the singular values ``G N = U S Vᵀ``. In the frame ``T = N⁻¹ V S^½`` keys ``k T`` and
queries ``q T⁻ᵀ`` have the same covariance S, while every score is what it was. A Hadamard matrix H spreads S evenly
over the channels, and a uniform quantizer of ``k T H`` makes the least noise in scores that any linear map gives:
``tr(S)²`` in place of ``tr(C) tr(M)``. Values have a frame by the same formula, M being what W_o makes of an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from saw_trtllm.backends.reference.window import QUERY_TILE, Attended, WindowModel, causal_mask, first_visible
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration, model_shape, probe_weights
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import hadamard

#: Tokens of calibration text that are needed, for each channel of a head.
MIN_TOKENS_PER_CHANNEL = 4
#: Of the mean eigenvalue, added to all: what a text shows nothing of is not taken to be nothing.
_RIDGE = 1e-3


class Moments:
    """Sums over tokens of one layer's keys, queries and values and of their products, in float64.

    A key counts by the root of the attention that it receives, so that the first token, which all queries look at and
    which lies far from the others, is not lost among them.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, x: Attended) -> None:
        """Take in some tokens of a sequence, Q and K after RoPE."""
        weight = attention_received(x).sqrt().double()[..., None]
        k, v = (t.transpose(0, 1).double() for t in (x.k, x.v))
        q = x.q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3).flatten(1, 2).double()
        weighted = weight * k
        new = [torch.full((), len(x.k)), k.sum(1), weight.sum(1), weighted.sum(1), weighted.mT @ k, q.mT @ q, v.mT @ v]
        new = [t.double().cpu() for t in new]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def __add__(self, other: Moments) -> Moments:
        total = Moments()
        total._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        return total

    @property
    def k_mean(self) -> np.ndarray:
        """float64 ``[num_kv_heads, head_dim]``."""
        return (self._sums[1] / self._sums[0]).numpy()

    def k_covariance(self, center: np.ndarray) -> np.ndarray:
        """Of the keys about a center ``[num_kv_heads, head_dim]``: float64 ``[num_kv_heads, head_dim, head_dim]``."""
        _, _, weight, k, kk, _, _ = (t.numpy() for t in self._sums)
        c = center.astype(np.float64)
        cross = k[:, :, None] * c[:, None]
        return (kk - cross - cross.swapaxes(1, 2)) / weight[..., None] + c[:, :, None] * c[:, None]

    @property
    def q_moment(self) -> np.ndarray:
        """Second moment of the queries of each KV head's group, float64 ``[num_kv_heads, head_dim, head_dim]``."""
        return (self._sums[5] / self._sums[0]).numpy()

    @property
    def v_moment(self) -> np.ndarray:
        """Second moment of the values, which no center is subtracted from."""
        return (self._sums[6] / self._sums[0]).numpy()


def _add(moments: list[Moments], layer: int, x: Attended) -> None:
    moments[layer].add(x)


class Statistics:
    """The moments of every layer of a model, apart for two halves of a text.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : WindowModel
        Its weights, loaded.
    """

    def __init__(self, checkpoint: Checkpoint, model: WindowModel) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._halves = [[Moments() for _ in range(model.config.num_hidden_layers)] for _ in range(2)]
        self.num_tokens = 0

    def gather(self, windows: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Run sequences int64 ``[n, T]`` through the exact model, in turn for the one half and the other."""
        for i, window in enumerate(windows):
            half = self._halves[i % 2]
            self._model.hidden(window[None], observe=partial(_add, half))
            self.num_tokens += len(window)
            if progress is not None:
                progress(len(window))

    def calibration(self, *, centered: bool = True) -> Calibration:
        """Frames of the whole text, of keys about their mean or, without centers, about zero.

        Raises
        ------
        ConfigError
            If keys, queries or values are not finite.
        """
        # A center shifts all scores of a query alike, which a softmax ignores and a cap does not.
        centered = centered and self._model.config.attn_logit_softcapping is None
        layers = [a + b for a, b in zip(*self._halves, strict=True)]
        centers = [m.k_mean if centered else np.zeros_like(m.k_mean) for m in layers]
        k_frames = [balanced_frames(m.k_covariance(c), m.q_moment) for m, c in zip(layers, centers, strict=True)]
        v_frames = [balanced_frames(m.v_moment, self._output_moment(i)) for i, m in enumerate(layers)]
        k_center, k_frame, v_frame = (np.stack(x).astype(np.float32) for x in (centers, k_frames, v_frames))
        if not all(np.isfinite(x).all() for x in (k_center, k_frame, v_frame)):
            raise ConfigError(
                f"{self.checkpoint.folder} computes keys, queries or values on this text that are not finite: use the "
                "dtype that the model was trained in"
            )
        shape, probe = model_shape(self.checkpoint), probe_weights(self.checkpoint)
        return Calibration(k_center, k_frame, v_frame, shape, probe, self.num_tokens)

    def split_half_excess(self) -> float:
        """Score noise that frames of one half make on the other, over that of the other's own, less 1; the mean.

        What twice the text would still gain is about half of it.
        """
        ratios = []
        for one, other in zip(*self._halves, strict=True):
            for ours, theirs in ((one, other), (other, one)):
                c, m = ours.k_covariance(ours.k_mean), ours.q_moment
                known = balanced_frames(theirs.k_covariance(theirs.k_mean), theirs.q_moment)
                ratios.append(score_noise(known, c, m) / score_noise(balanced_frames(c, m), c, m))
        return float(np.mean(ratios)) - 1

    def _output_moment(self, layer: int) -> np.ndarray:
        """Sum over a group's heads of W_oᵀ W_o, ``[num_kv_heads, head_dim, head_dim]``."""
        c = self._model.config
        dense = self.checkpoint.load(f"transformer.layers.{layer}.attention.dense.weight").astype(np.float64)
        heads = dense.reshape(len(dense), c.num_key_value_heads, -1, c.head_size)
        return np.einsum("okgd,okge->kde", heads, heads, optimize=True)


def calibrate(
    checkpoint: Checkpoint,
    windows: torch.Tensor,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> Calibration:
    """Run a text through the exact model and make :class:`Calibration` of it.

    Parameters
    ----------
    checkpoint : Checkpoint
    windows : torch.Tensor
        int64 ``[num_windows, T]``: sequences of tokens, each from position 0. Moments hold for the positions that they
        were taken at: slow RoPE pairs turn beyond them, so T should be what the engine will see.
    progress : callable, optional
        Called with the tokens of each window that is done.
    device : str
        Where PyTorch computes.

    Raises
    ------
    CheckpointError
        If a weight cannot be read or is not finite.
    ConfigError
        If there are too few tokens for the model's head_dim.
    """
    check_length(windows, checkpoint.config.head_size)
    model = WindowModel(checkpoint.config, checkpoint.load_finite, windows.shape[1], device)
    model.check_ids(windows)
    statistics = Statistics(checkpoint, model)
    statistics.gather(windows, progress)
    return statistics.calibration()


def check_length(windows: torch.Tensor, head_dim: int) -> None:
    """Raise ConfigError where windows ``[n, T]`` are too little text for frames of heads of ``head_dim``."""
    due = MIN_TOKENS_PER_CHANNEL * head_dim
    if len(windows) < 2 or windows.numel() < due:
        raise ConfigError(
            f"the text gives {len(windows)} sequences and {windows.numel()} tokens to calibrate on, and heads of "
            f"{head_dim} need 2 and {due}: give a longer text, or a smaller --max_seq_len"
        )


def attention_received(x: Attended) -> torch.Tensor:
    """What all queries of its group give to each key: fp32 ``[num_kv_heads, num_tokens]``."""
    total, k = len(x.q), x.k.transpose(0, 1)
    q = x.q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)
    received = k.new_zeros(k.shape[:2])
    for start in range(0, total, QUERY_TILE):
        tile = torch.arange(start, min(start + QUERY_TILE, total), device=k.device)
        seen = slice(first_visible(start, x.window), int(tile[-1]) + 1)
        scores = x.scores(q[:, :, tile] @ k[:, None, seen].mT)
        scores.masked_fill_(~causal_mask(tile, seen, x.window), -torch.inf)
        received[:, seen] += scores.softmax(-1).sum((1, 2))
    return received


def balanced_frames(c: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Frames in which rows of covariance ``c`` and what meets them, of second moment ``m``, have the same covariance.

    Parameters
    ----------
    c, m : numpy.ndarray
        float64 ``[heads, n, n]``, symmetric and positive semidefinite.

    Returns
    -------
    numpy.ndarray
        float64 ``[heads, n, n]``: the module's ``T H``. A head with nothing in it has the plain rotation.
    """
    mixing = orthogonal_mixing(c.shape[-1])
    frames = []
    for c_head, m_head in zip(c, m, strict=True):
        traces = np.trace(c_head), np.trace(m_head)
        if not min(traces) > 0:
            frames.append(mixing if np.isfinite(traces).all() else np.full_like(mixing, np.nan))
            continue
        root, inverse_root = _roots(c_head)
        _, s, vt = np.linalg.svd(_roots(m_head)[0] @ root)
        frames.append(inverse_root @ vt.T * np.sqrt(s) @ mixing)
    return np.stack(frames)


def _roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root of a moment with its ridge, and the root's inverse."""
    values, vectors = np.linalg.eigh(x)
    roots = np.sqrt(values.clip(0) + _RIDGE * values.mean())
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def score_noise(frames: np.ndarray, c: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Variance of scores' errors by uniform quantization in frames, up to a factor: float64 ``[heads]``."""
    rows = np.einsum("hij,hik,hkj->h", frames, c, frames, optimize=True)
    inverse = np.linalg.inv(frames)
    return rows * np.einsum("hji,hik,hjk->h", inverse, m, inverse, optimize=True)


def orthogonal_mixing(n: int) -> np.ndarray:
    """An orthogonal matrix that spreads every axis over all: Hadamard, times a cosine transform for n's odd factor."""
    power = n & -n
    odd = n // power
    i = np.arange(odd)
    cosine = np.cos(np.pi * np.outer(i, i + 0.5) / odd) * np.sqrt(np.where(i, 2, 1) / odd)[:, None]
    return np.kron(cosine, hadamard(power).astype(np.float64))
