"""The reference model over whole windows: every token attends to what a cache gives back of all tokens up to itself.

A prefill attends to its own chunk unquantized and would hide most of what a 4-bit cache costs. Here each query reads
all keys and values, its own too, from the cache, as a decode does; since the cache is written token by token, a whole
window can be computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

from saw_trtllm.backends.reference.model import Attend, ReferenceModel
from saw_trtllm.backends.reference.quantizers import Exact, KVQuantizer, SkipLayers
from saw_trtllm.backends.reference.rotate_quantize_kv import apply_rope, rope_angles
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import Weight

#: Queries that are attended at a time, so that scores do not grow with the square of the window.
QUERY_TILE = 512


@dataclass(frozen=True)
class Attended:
    """What one layer's attention of one sequence works on: exact, before any cache.

    Attributes
    ----------
    q : torch.Tensor
        fp32 ``[num_tokens, num_heads, head_dim]``, after RoPE.
    k, v : torch.Tensor
        fp32 ``[num_tokens, num_kv_heads, head_dim]``, K after RoPE.
    window : int or None
        Keys that a query sees.
    scale : float, optional
        Factor on q·k; 1/sqrt(head_dim) by default.
    softcap : float, optional
        Scores become ``softcap · tanh(score / softcap)``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    window: int | None
    scale: float | None = None
    softcap: float | None = None

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        """What the softmax is taken of, for products of queries and keys."""
        scores = products * (self.scale or 1 / math.sqrt(self.q.shape[-1]))
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


Observer = Callable[[int, Attended], None]


class History:
    """Keys and values of B sequences of equal length, for decoding token by token.

    Parameters
    ----------
    quantizer : KVQuantizer
    num_layers : int
    """

    def __init__(self, quantizer: KVQuantizer, num_layers: int) -> None:
        self.quantizer = quantizer
        self._exact: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._read: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens held of each sequence."""
        return 0 if self._read[-1] is None else self._read[-1][0].shape[1]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take new tokens' ``[B, n, num_kv_heads, head_dim]``; return all tokens', exact and as read."""
        if self.quantizer.tokenwise:
            # What is exact of earlier tokens is never asked for.
            read = self._read[layer] = _extend(self._read[layer], _quantized(self.quantizer, layer, k, v))
            return *read, *read
        exact = self._exact[layer] = _extend(self._exact[layer], (k, v))
        read = self._read[layer] = _quantized(self.quantizer, layer, *exact)
        return *exact, *read

    def repeat(self, count: int) -> None:
        """Make the one sequence that is held the beginning of ``count``."""
        for held in (self._exact, self._read):
            held[:] = [pair and (pair[0].expand(count, -1, -1, -1), pair[1].expand(count, -1, -1, -1)) for pair in held]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) · weight`` over the last axis, with PyTorch's own sum: what is beside a row may show in its bits."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class WindowModel(ReferenceModel):
    """The reference model's weights and layers, run over whole windows, on any device of PyTorch.

    Parameters
    ----------
    config : ModelConfig
    load : callable
        Gives the tensor of a TensorRT-LLM name, as NumPy array.
    max_seq_len : int
        Positions that the RoPE table covers.
    device : str or torch.device
    """

    _linear = staticmethod(F.linear)
    _rms_norm = staticmethod(rms_norm)
    _activations = MappingProxyType({"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")})

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[str], Weight],
        max_seq_len: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        super().__init__(config, load, max_seq_len)
        self._rope = {local: table.to(self.device) for local, table in self._rope.items()}
        self.exact = Exact(config.dtype)
        # glibc gives freed blocks of a layer's size back to the system and faults them in anew, which takes as long as
        # the products; it keeps those up to the largest that was freed, and takes one of 31 MiB into account at most.
        torch.empty(31 << 20, dtype=torch.uint8)

    def _tensor(self, name: str) -> torch.Tensor:
        return super()._tensor(name).to(self.device)

    def check_ids(self, ids: torch.Tensor) -> None:
        """Reject a text with tokens that the model does not have, as a tokenizer of another model gives."""
        largest, vocab = int(ids.max()), self.config.vocab_size
        if largest >= vocab:
            raise ConfigError(
                f"the text holds token {largest} and the model has 0 to {vocab - 1}: give the model's own tokenizer "
                "with --tokenizer_dir"
            )

    @torch.inference_mode()
    def hidden(
        self,
        ids: torch.Tensor,
        quantizer: KVQuantizer | None = None,
        observe: Observer | None = None,
        history: History | None = None,
    ) -> torch.Tensor:
        """What ``lm_head`` is given, for every token.

        Parameters
        ----------
        ids : torch.Tensor
            int64 ``[B, T]``.
        quantizer : KVQuantizer, optional
            By default :class:`~saw_trtllm.backends.reference.quantizers.Exact`, the model's own dtype.
        observe : callable, optional
            Called for each layer and sequence, in order, with what attention works on.
        history : History, optional
            What the tokens follow, and are added to. Its quantizer is used.

        Returns
        -------
        torch.Tensor
            fp32 ``[B, T, hidden_size]``, after the final norm.
        """
        history = history or History(quantizer or self.exact, self.config.num_hidden_layers)
        return self._norm(self._decode(ids.to(self.device), self._attention_on(history, observe)), self._ln_f)

    @torch.inference_mode()
    def hidden_by_layer(
        self, ids: torch.Tensor, quantizer: KVQuantizer, others: Sequence[KVQuantizer]
    ) -> Iterator[torch.Tensor]:
        """What :meth:`hidden` gives where one layer is left to another quantizer, from the first layer to the last.

        What comes before that layer is computed once for all, so it takes half the time of as many calls.

        Yields
        ------
        torch.Tensor
            fp32 ``[B, T, hidden_size]``: of layer 0 for each of ``others`` in turn, of layer 1, and so on.
        """
        num_layers = self.config.num_hidden_layers
        x = self._embed(ids.to(self.device)) * self.config.embedding_scale
        for layer in range(num_layers):
            for other in others:
                history = History(SkipLayers(quantizer, (layer,), other), num_layers)
                yield self._norm(self._decode_layers(x, self._attention_on(history), layer), self._ln_f)
            x = self._decode_layers(x, self._attention_on(History(quantizer, num_layers)), layer, layer + 1)

    def _attention_on(self, history: History, observe: Observer | None = None) -> Attend:
        start = history.length
        return lambda i, w, x: self._attend(i, w, x, start, observe, history)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 ``[..., vocab_size]`` of what :meth:`hidden` gave."""
        return self._logits(hidden.to(self.device))

    def _attend(
        self,
        layer: int,
        w: dict[str, torch.Tensor],
        x: torch.Tensor,
        start: int,
        observe: Observer | None,
        history: History,
    ) -> torch.Tensor:
        c = self.config
        # Rounded where an engine's tensors are: as projected, and Q once more when it has been turned.
        q, k, v = (t.float() for t in self._qkv(w, x))
        angles = rope_angles(self._rope[c.has_local_rope(layer)][start : start + x.shape[1]].repeat(len(x), 1, 1))
        q, k = (apply_rope(t.flatten(0, 1), *angles).view_as(t) for t in (q, k))
        q = q.to(self.dtype).float()
        if observe is not None:
            for b in range(len(x)):
                observe(layer, Attended(q[b], k[b], v[b], c.window(layer), c.softmax_scale, c.attn_logit_softcapping))
        k, v, k_read, v_read = history.append(layer, k, v)
        lengths = torch.arange(start, start + x.shape[1], device=x.device) + 1
        first_exact = history.quantizer.first_exact(lengths)
        exact = None if first_exact is None else (k, v)
        out = attention(
            q, k_read, v_read, c.window(layer), exact, first_exact, c.softmax_scale, c.attn_logit_softcapping
        )
        return self._linear(out.flatten(2).to(self.dtype).float(), w["attention.dense.weight"])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    exact: tuple[torch.Tensor, torch.Tensor] | None = None,
    first_exact: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of each sequence to all of its tokens.

    Parameters
    ----------
    q : torch.Tensor
        fp32 ``[B, n, num_heads, head_dim]``.
    k, v : torch.Tensor
        fp32 ``[B, num_tokens, num_kv_heads, head_dim]``.
    window : int, optional
        Keys that a query sees, its own among them.
    exact : tuple of torch.Tensor, optional
        K and V that queries see in place of k and v from ``first_exact`` on.
    first_exact : torch.Tensor, optional
        int64 ``[n]``: a token index for each query.
    scale : float, optional
        Factor on q·k; 1/sqrt(head_dim) by default.
    softcap : float, optional
        Scores become ``softcap · tanh(score / softcap)``.

    Returns
    -------
    torch.Tensor
        fp32 ``[B, n, num_heads, head_dim]``.
    """
    n, total = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if exact is not None:
        exact = (exact[0].transpose(1, 2), exact[1].transpose(1, 2))
    out = torch.empty_like(q)
    for start in range(0, n, QUERY_TILE):
        tile = slice(start, min(start + QUERY_TILE, n))
        seen = slice(first_visible(total - n + start, window), total - n + tile.stop)
        visible = causal_mask(torch.arange(tile.start, tile.stop, device=q.device) + total - n, seen, window)
        keys, values = k[:, :, seen], v[:, :, seen]
        if exact is not None and first_exact is not None:
            # Each key is there twice, and a query sees one of the two.
            is_exact = torch.arange(seen.start, seen.stop, device=q.device) >= first_exact[tile][:, None]
            visible = torch.cat([visible & ~is_exact, visible & is_exact], dim=1)
            keys, values = (torch.cat([a, e[:, :, seen]], dim=2) for a, e in zip((keys, values), exact, strict=True))
        out[:, :, tile] = _attend(q[:, :, tile], keys, values, visible, scale or 1 / math.sqrt(q.shape[-1]), softcap)
    return out.transpose(1, 2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True, scale=scale)
    rows = q.unflatten(1, (k.shape[1], -1))
    scores = softcap * torch.tanh(rows @ k.mT[:, :, None] * (scale / softcap))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


def first_visible(query: int, window: int | None) -> int:
    """First token that the query at an index sees."""
    return 0 if window is None else max(0, query + 1 - window)


def causal_mask(queries: torch.Tensor, seen: slice, window: int | None) -> torch.Tensor:
    """Which tokens of ``seen`` each query (int64 ``[n]``, by index) sees: bool ``[n, seen]``."""
    keys = torch.arange(seen.start, seen.stop, device=queries.device)
    mask = keys <= queries[:, None]
    return mask if window is None else mask & (keys > queries[:, None] - window)


def _quantized(
    quantizer: KVQuantizer, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize B sequences ``[B, n, num_kv_heads, head_dim]``."""
    if quantizer.tokenwise:
        read = quantizer.quantize(layer, k.flatten(0, 1), v.flatten(0, 1))
        return read[0].view_as(k), read[1].view_as(v)
    pairs = [quantizer.quantize(layer, *pair) for pair in zip(k, v, strict=True)]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def _extend(
    old: tuple[torch.Tensor, torch.Tensor] | None, new: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return new if old is None else (torch.cat([old[0], new[0]], dim=1), torch.cat([old[1], new[1]], dim=1))
