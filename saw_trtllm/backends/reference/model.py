"""The decoder of all families in plain PyTorch: what an engine computes, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from saw_trtllm.backends.reference.cache import PagedCache, StepPlan
from saw_trtllm.backends.reference.gemm import least_rows, linear
from saw_trtllm.backends.reference.int4 import TORCH_DTYPES
from saw_trtllm.backends.reference.invariant import aligned, pad_rows, tanh
from saw_trtllm.backends.reference.lookup import lookup
from saw_trtllm.backends.reference.paged_attention import paged_attention
from saw_trtllm.backends.reference.rms_norm import rms_norm
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.backends.reference.silu_mul import gelu, silu
from saw_trtllm.checkpoint import expected_shapes, shard_shape
from saw_trtllm.engine.config import EngineConfig, k_center_name, k_frame_name, q_frame_name
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import QuantizedWeight, Weight
from saw_trtllm.model.rope import rotary_cos_sin
from saw_trtllm.runtime.collectives import ALONE, Collectives


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A tensor over ``x``'s memory; bfloat16 goes by its bits, which NumPy and PyTorch name differently."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


#: What attends: a layer's number, its weights, and its normalized input ``[..., hidden_size]``, to the same.
Attend = Callable[[int, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


def calibrated_inputs(config: EngineConfig, load: Callable[[str], Weight]) -> dict[str, Any]:
    """``k_center`` and ``frames`` of :class:`ReferenceModel` from the constants of an engine.

    Parameters
    ----------
    config : EngineConfig
    load : callable
        Gives the tensor of an engine by its name.

    Raises
    ------
    ValueError
        If a constant has another shape than ``config`` gives it.
    """
    model = config.pretrained_config
    heads, dim = model.num_key_value_heads, model.head_size

    def constant(name: str, *due: int) -> torch.Tensor:
        found = cast(np.ndarray, load(name))
        if found.shape != due:
            raise ValueError(f"{name} has the shape {list(found.shape)} where {list(due)} is due")
        return torch.from_numpy(found)

    center = None
    if config.saw_int4.k_center:
        center = torch.stack([constant(k_center_name(i), heads, dim) for i in range(model.num_hidden_layers)])
    frames = {
        i: tuple(constant(name(i), heads, dim, dim) for name in (k_frame_name, q_frame_name))
        for i in config.framed_layers
    }
    return {"k_center": center, "frames": frames}


class ReferenceModel:
    """Computes in fp32 from the engine's weights; Q, K and V are rounded to the engine's dtype as its tensors are.

    Its rows do not depend on what is beside them. A subclass may take other functions for the same.

    Parameters
    ----------
    config : ModelConfig
        The model's shape. Its dtype is the activations'.
    load : callable
        Gives the tensor of a TensorRT-LLM name, V's rotation already folded in; one that is quantized is dequantized.
    max_seq_len : int
        Positions that the RoPE table covers.
    collectives : Collectives
        The ranks that the model is split over; ``load`` gives this one's part of each tensor.
    k_center : torch.Tensor, optional
        fp32 ``[num_layers, num_kv_heads, head_dim]``, subtracted from all keys after RoPE; the rank's heads.
    frames : mapping of int to pair of torch.Tensor, optional
        By layer, the frame of keys and that of queries, fp32 ``[num_kv_heads, head_dim, head_dim]``, in place of the
        rotation.

    Raises
    ------
    ValueError
        If a tensor has another shape than ``config`` gives it.
    """

    _linear: Callable[..., torch.Tensor] = staticmethod(linear)
    _rms_norm: Callable[..., torch.Tensor] = staticmethod(rms_norm)
    _activations: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
        {"silu": silu, "gelu_pytorch_tanh": gelu}
    )

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[str], Weight],
        max_seq_len: int,
        k_center: torch.Tensor | None = None,
        frames: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
        collectives: Collectives = ALONE,
    ) -> None:
        self.config = config.of_rank(collectives.size)
        self._collectives = collectives
        self.dtype = TORCH_DTYPES[config.dtype]
        self._load = load
        self._k_center = k_center
        self._frames = frames or {}
        self._shapes = {name: shard_shape(name, config, collectives.size) for name in expected_shapes(config)}
        tables = {config.has_local_rope(i) for i in range(config.num_hidden_layers)}
        self._rope = {local: torch.from_numpy(rotary_cos_sin(config, max_seq_len, local)) for local in tables}
        self._embedding = self._tensor("transformer.vocab_embedding.weight")
        self._layers = [self._layer(i) for i in range(config.num_hidden_layers)]
        self._ln_f = self._tensor("transformer.ln_f.weight")
        self._lm_head = self._embedding if config.share_embedding_table else self._tensor("lm_head.weight")

    def _tensor(self, name: str) -> torch.Tensor:
        weight = self._load(name)
        dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        tensor = to_torch(dense).float()
        if tensor.shape != self._shapes[name]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)} where {list(self._shapes[name])} is due")
        # Column by column, products with few rows take a tenth less time; an embedding's rows are looked up.
        by_column = tensor.dim() == 2 and "embedding" not in name
        return aligned(tensor.mT).mT if by_column else aligned(tensor)

    def _layer(self, i: int) -> dict[str, torch.Tensor]:
        prefix = f"transformer.layers.{i}."
        names = [n for n in self._shapes if n.startswith(prefix)]
        return {name.removeprefix(prefix): self._tensor(name) for name in names}

    @torch.inference_mode()
    def forward(self, step: StepInputs, cache: PagedCache, *, all_logits: bool = False) -> torch.Tensor:
        """Run a step and write its rows into the cache.

        Parameters
        ----------
        step : StepInputs
        cache : PagedCache
        all_logits : bool
            Logits of every token of the step, not of each sequence's last only.

        Returns
        -------
        torch.Tensor
            fp32 ``[B, vocab_size]``, or ``[num_tokens, vocab_size]``.
        """
        plans = cache.plans(step)
        num_tokens = len(step.input_ids)
        ids = F.pad(torch.from_numpy(step.input_ids).long(), (0, -num_tokens % self._least_rows))
        x = self._decode(ids, lambda i, w, x: self._attention(i, w, x, plans, cache))
        x = x[:num_tokens] if all_logits else x[torch.from_numpy(step.last_token_ids).long() - 1]
        return self._logits(self._norm(x, self._ln_f))

    @property
    def _least_rows(self) -> int:
        """What a step's rows are made a multiple of once, where each product would add rows and drop them again."""
        if self._collectives.size > 1:  # other ranks, whose rows are added to these, may run on another CPU
            return 1
        return max(least_rows(w) for w in self._layers[0].values() if w.dim() == 2)

    def _decode(self, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Token ids ``[...]`` to the residual stream after the last layer, fp32 ``[..., hidden_size]``."""
        return self._decode_layers(self._embed(ids) * self.config.embedding_scale, attend)

    def _decode_layers(self, x: torch.Tensor, attend: Attend, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The residual stream from before layer ``first`` to before layer ``last``, by default after all."""
        for i, w in list(enumerate(self._layers))[first:last]:
            added = self._sum(attend(i, w, self._norm(x, w["input_layernorm.weight"])))
            if self.config.inter_layernorms:
                x = x + self._norm(added, w["post_layernorm.weight"])
                added = self._sum(self._mlp(w, self._norm(x, w["pre_feedforward_layernorm.weight"])))
                x = x + self._norm(added, w["post_feedforward_layernorm.weight"])
            else:
                x = x + added
                x = x + self._sum(self._mlp(w, self._norm(x, w["post_layernorm.weight"])))
        return x

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, of which a rank has some: of the others it adds zeros."""
        return self._sum(lookup(self._embedding, ids - self._collectives.rank * len(self._embedding)))

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        return x if self._collectives.size == 1 else torch.from_numpy(self._collectives.all_reduce(x.numpy()))

    def _mlp(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        activation = self._activations[self.config.hidden_act]
        h = activation(self._linear(x, w["mlp.fc.weight"])) * self._linear(x, w["mlp.gate.weight"])
        return self._linear(h, w["mlp.proj.weight"])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._rms_norm(x, weight, self.config.norm_epsilon)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits, cap = self._linear(x, self._lm_head), self.config.final_logit_softcapping
        if self._collectives.size > 1:
            parts = self._collectives.all_gather(logits.numpy())
            # A vocabulary that does not divide was padded.
            logits = torch.from_numpy(np.concatenate(parts, axis=-1)[..., : self.config.vocab_size])
        return logits if cap is None else cap * tanh(logits / cap)

    def _qkv(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q, K and V before RoPE, ``[..., heads, head_dim]`` in the engine's dtype."""
        c = self.config
        heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        qkv = self._linear(x, w["attention.qkv.weight"], w.get("attention.qkv.bias"))
        q, k, v = qkv.unflatten(-1, (-1, c.head_size)).split(heads, dim=-2)
        if c.qk_layernorm:
            q = self._norm(q, w["attention.q_layernorm.weight"])
            k = self._norm(k, w["attention.k_layernorm.weight"])
        return tuple(t.to(self.dtype) for t in (q, k, v))

    def _attention(
        self, layer: int, w: dict[str, torch.Tensor], x: torch.Tensor, plans: list[StepPlan], cache: PagedCache
    ) -> torch.Tensor:
        c = self.config
        pool, index, table = cache.place(layer)
        plan = plans[table]
        q, k, v = (t[: len(plan.slots)] for t in self._qkv(w, x))
        center = None if self._k_center is None else self._k_center[layer]
        k_frame, q_frame = self._frames.get(layer, (None, None))
        q, k, v = rotate_quantize_kv(
            q,
            k,
            v,
            self._rope[c.has_local_rope(layer)],
            pool,
            index,
            plan,
            k_center=center,
            k_frame=k_frame,
            q_frame=q_frame,
        )
        window, softcap = c.window(layer), c.attn_logit_softcapping
        out = paged_attention(q, k, v, pool, index, plan, softmax_scale=c.softmax_scale, window=window, softcap=softcap)
        return self._linear(pad_rows(out.flatten(1).float(), x.shape[0]), w["attention.dense.weight"])
