"""The door from text to a calibration: what an error in a model's keys and values does as it reads, and frames of it.

A key's error δ moves what a head puts out for query i by ``p_ij (q_i · δ) (v_j - o_i)``, with p_ij the attention to key
j and o_i the sum of values, and W_o takes it to the model's stream. So keys and queries weigh as
``s_ij = p_ij² |W_o (v_j - o_i)|²``, and a cache whose rows are ``k T`` of uniform noise moves it by

    Σ_ij s_ij (k_jᵀ A k_j) (q_iᵀ A⁻¹ q_i),   A = T Tᵀ

Where that is least, ``C = Σ s_ij (q_iᵀ A⁻¹ q_i) k_j k_jᵀ`` and ``M = Σ s_ij (k_jᵀ A k_j) q_i q_iᵀ`` are balanced: in
the frame both are the same. Each pass takes the weights from the frames of the one before, the first from the plain
rotation; all but the last are over a part of the text. In them stands, in place of ``k_jᵀ A k_j``, the square of the
row's range ``(max - min)²`` about the center, to which the noise of a quantizer is proportional. With ``N = C^½``,
``G = M^½`` and the singular values ``G N = U S Vᵀ`` the frame is ``T = N⁻¹ V S^½``. A Hadamard matrix spreads S evenly
over the channels, but for the largest: that one moves all channels alike, which the row's lo takes up, so it is scaled
up and costs next to nothing.
Values have a frame by the same formula, C being their moment with the weights ``Σ_i p_ij² tr(W_oᵀ W_o)``, summed over
the group's heads, and M what W_o makes of an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
#: Passes over some of a text's windows that find the weights for the one over all of them, and of how many windows one
#: is enough for that.
_NUM_FIRST_PASSES, _FIRST_PASS_STRIDE = 3, 4
#: Of the mean eigenvalue, added to all: what a text shows nothing of is not taken to be nothing.
_RIDGE = 1e-3
#: Factor on the channel that a row's lo takes up: its noise falls by the square, and lo's own rounding stays small.
_FREE_CHANNEL = 4.0


@dataclass(frozen=True)
class Basis:
    """What a layer's errors are weighed in.

    Attributes
    ----------
    k_center : torch.Tensor
        fp32 ``[num_kv_heads, head_dim]``.
    k_frame : torch.Tensor
        fp32 ``[num_kv_heads, head_dim, head_dim]``.
    output : torch.Tensor
        W_oᵀ W_o of each head, fp32 ``[num_kv_heads, group, head_dim, head_dim]``.
    """

    k_center: torch.Tensor
    k_frame: torch.Tensor
    output: torch.Tensor


class Moments:
    """Sums over tokens of one layer's keys, queries and values by their weights, and of their products, in float64."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, x: Attended, basis: Basis) -> None:
        """Take in some tokens of a sequence, Q and K after RoPE."""
        weights = sensitivities(x, basis)
        k, v = (t.transpose(0, 1).double() for t in (x.k, x.v))
        q = x.q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3).flatten(1, 2).double()
        new = []
        for rows, weight in zip((k, q, v), weights, strict=True):
            weighted = weight.double()[..., None] * rows
            new += [weight.double().sum(-1), weighted.sum(1), weighted.mT @ rows]
        new = [t.cpu() for t in new]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def __add__(self, other: Moments) -> Moments:
        total = Moments()
        total._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        return total

    def _mean(self, kind: int, power: int) -> np.ndarray:
        weight, x = self._sums[3 * kind], self._sums[3 * kind + power]
        return (x / weight.clamp_min(torch.finfo(torch.float64).tiny).view(-1, *[1] * power)).numpy()

    @property
    def k_mean(self) -> np.ndarray:
        """float64 ``[num_kv_heads, head_dim]``."""
        return self._mean(0, 1)

    def k_covariance(self, center: np.ndarray) -> np.ndarray:
        """Of the keys about a center ``[num_kv_heads, head_dim]``: float64 ``[num_kv_heads, head_dim, head_dim]``."""
        c = center.astype(np.float64)
        cross = self.k_mean[:, :, None] * c[:, None]
        return self._mean(0, 2) - cross - cross.swapaxes(1, 2) + c[:, :, None] * c[:, None]

    @property
    def q_moment(self) -> np.ndarray:
        """Second moment of the queries of each KV head's group, float64 ``[num_kv_heads, head_dim, head_dim]``."""
        return self._mean(1, 2)

    @property
    def v_moment(self) -> np.ndarray:
        """Second moment of the values, which no center is subtracted from."""
        return self._mean(2, 2)


def _add(moments: list[Moments], bases: list[Basis], layer: int, x: Attended) -> None:
    moments[layer].add(x, bases[layer])


class Statistics:
    """The moments of every layer of a model, apart for two halves of a text.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : WindowModel
        Its weights, loaded.
    """

    def __init__(self, checkpoint: Checkpoint, model: WindowModel) -> None:
        c = model.config
        self.checkpoint = checkpoint
        self._model = model
        self._outputs = [self._output_moments(i) for i in range(c.num_hidden_layers)]
        self._halves: list[list[Moments]] = []
        self.num_tokens = 0

    def gather(self, windows: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Run sequences int64 ``[n, T]`` through the exact model, n at least 2, as :func:`passes` says.

        In turn they are for the one half and the other. What an earlier call gathered is forgotten.
        """
        self.num_tokens = windows.numel()
        c = self._model.config
        k_center = np.zeros((c.num_hidden_layers, c.num_key_value_heads, c.head_size))
        k_frame = np.broadcast_to(orthogonal_mixing(c.head_size), (*k_center.shape, c.head_size))
        for number, chosen in enumerate(passes(windows)):
            if number:
                k_center, k_frame = self._key_levers(centered=True)
            on_device = [torch.tensor(x, dtype=torch.float32, device=self._model.device) for x in (k_center, k_frame)]
            bases = [Basis(*x) for x in zip(*on_device, self._outputs, strict=True)]
            self._halves = [[Moments() for _ in range(c.num_hidden_layers)] for _ in range(2)]
            for i, window in enumerate(chosen):
                self._model.hidden(window[None], observe=partial(_add, self._halves[i % 2], bases))
                if progress is not None:
                    progress(len(window))

    def calibration(self, *, centered: bool = True) -> Calibration:
        """Frames of the whole text, of keys about their mean or, without centers, about zero.

        Raises
        ------
        ConfigError
            If keys, queries or values are not finite.
        """
        outputs = [x.sum(1).double().cpu().numpy() for x in self._outputs]
        v_frames = [balanced_frames(m.v_moment, x) for m, x in zip(self._layers(), outputs, strict=True)]
        levers = (*self._key_levers(centered), np.stack(v_frames))
        k_center, k_frame, v_frame = (x.astype(np.float32) for x in levers)
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

    def _layers(self) -> list[Moments]:
        return [a + b for a, b in zip(*self._halves, strict=True)]

    def _key_levers(self, centered: bool) -> tuple[np.ndarray, np.ndarray]:
        """Centers and frames of the keys of all layers."""
        # A center shifts all scores of a query alike, which a softmax ignores and a cap does not.
        centered = centered and self._model.config.attn_logit_softcapping is None
        layers = self._layers()
        centers = [m.k_mean if centered else np.zeros_like(m.k_mean) for m in layers]
        frames = [balanced_frames(m.k_covariance(c), m.q_moment) for m, c in zip(layers, centers, strict=True)]
        if not all(np.isfinite(x).all() for x in (*centers, *frames, *(m.v_moment for m in layers))):
            raise ConfigError(
                f"{self.checkpoint.folder} computes keys, queries or values on this text that are not finite: use the "
                "dtype that the model was trained in"
            )
        return np.stack(centers), np.stack(frames)

    def _output_moments(self, layer: int) -> torch.Tensor:
        """W_oᵀ W_o of each head, as :class:`Basis` has it."""
        c = self._model.config
        name = f"transformer.layers.{layer}.attention.dense.weight"
        dense = torch.from_numpy(self.checkpoint.load(name).astype(np.float32)).to(self._model.device)
        heads = dense.unflatten(1, (c.num_key_value_heads, -1, c.head_size)).movedim(0, -2)
        return heads.mT @ heads


def passes(windows: torch.Tensor) -> list[torch.Tensor]:
    """What of windows ``[n, T]`` is run through the model in each pass: a few, again and again, and at last all."""
    few = windows[:: max(1, min(_FIRST_PASS_STRIDE, len(windows) // 2))]
    return [few] * _NUM_FIRST_PASSES + [windows]


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


def sensitivities(x: Attended, basis: Basis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much errors of a layer's keys and values move what attention puts out, by the module's s_ij.

    Returns
    -------
    tuple of torch.Tensor
        Weights of the keys, of the queries of a KV head's whole group, and of the values: fp32
        ``[num_kv_heads, num_tokens]``, ``[num_kv_heads, group · num_tokens]`` and ``[num_kv_heads, num_tokens]``.
    """
    total, k, v = len(x.q), x.k.transpose(0, 1), x.v.transpose(0, 1)
    q = x.q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)
    rows = (k - basis.k_center[:, None]) @ basis.k_frame
    k_noise = (rows.amax(-1) - rows.amin(-1)).square()
    q_noise = (q @ torch.linalg.inv(basis.k_frame).mT[:, None]).square().sum(-1)
    values = v[:, None]
    v_moved = ((values @ basis.output) * values).sum(-1)[:, :, None]
    of_k, of_q, of_v = torch.zeros_like(k_noise), torch.empty_like(q_noise), torch.zeros_like(k_noise)
    for start in range(0, total, QUERY_TILE):
        tile = torch.arange(start, min(start + QUERY_TILE, total), device=k.device)
        seen = slice(first_visible(start, x.window), int(tile[-1]) + 1)
        scores = x.scores(q[:, :, tile] @ k[:, None, seen].mT)
        slope = 1.0 if x.softcap is None else (1 - (scores / x.softcap).square()).square()
        squares = scores.masked_fill_(~causal_mask(tile, seen, x.window), -torch.inf).softmax(-1)
        out = squares @ values[:, :, seen]
        there = out @ basis.output
        squares = squares.square_()
        of_v[:, seen] += (squares.sum(2) * basis.output.diagonal(dim1=-1, dim2=-2).sum(-1)[..., None]).sum(1)
        moved = v_moved[..., seen] - 2 * there @ values[:, :, seen].mT + (there * out).sum(-1, keepdim=True)
        moved = moved.clamp_min_(0).mul_(squares) * slope
        of_q[:, :, tile] = (moved * k_noise[:, None, None, seen]).sum(-1)
        of_k[:, seen] += (moved * q_noise[:, :, tile, None]).sum((1, 2))
    return of_k, of_q.flatten(1), of_v


def balanced_frames(c: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Frames in which rows of covariance ``c`` and what meets them, of second moment ``m``, have the same covariance.

    Parameters
    ----------
    c, m : numpy.ndarray
        float64 ``[heads, n, n]``, symmetric and positive semidefinite.

    Returns
    -------
    numpy.ndarray
        float64 ``[heads, n, n]``: the module's ``T H``, with the channel that lo takes up scaled up. A head with
        nothing in it has the plain rotation.
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
        scales = np.sqrt(s)
        scales[0] *= _FREE_CHANNEL
        frames.append(inverse_root @ vt.T * scales @ mixing)
    return np.stack(frames)


def _roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root of a moment with its ridge, and the root's inverse."""
    values, vectors = np.linalg.eigh(x)
    roots = np.sqrt(values.clip(0) + _RIDGE * values.mean())
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def score_noise(frames: np.ndarray, c: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Variance of scores' errors by uniform quantization in frames, up to a factor: float64 ``[heads]``.

    What all channels of a row have in common is left to its lo.
    """
    apart = frames - frames.mean(-1, keepdims=True)
    rows = np.einsum("hij,hik,hkj->h", apart, c, apart, optimize=True)
    inverse = np.linalg.inv(frames)
    return rows * np.einsum("hji,hik,hjk->h", inverse, m, inverse, optimize=True)


def orthogonal_mixing(n: int) -> np.ndarray:
    """An orthogonal matrix that spreads every axis over all: Hadamard, times a cosine transform for n's odd factor."""
    power = n & -n
    odd = n // power
    i = np.arange(odd)
    cosine = np.cos(np.pi * np.outer(i, i + 0.5) / odd) * np.sqrt(np.where(i, 2, 1) / odd)[:, None]
    return np.kron(cosine, hadamard(power).astype(np.float64))
