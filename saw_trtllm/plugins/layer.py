"""A layer's attention as the two plugins: their fields and the order of their inputs, for whatever defines the network.

``plugins/tensorrt/Saw*.md`` has them as tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from saw_trtllm.engine import tensors
from saw_trtllm.format import KVFormat
from saw_trtllm.plugins.library import ATTENTION, WRITE

T = TypeVar("T")

Fields = Mapping[str, int | float | str]
#: Adds a plugin to a network: its name, fields and inputs, and the dtypes of the outputs that it gives.
AddPlugin = Callable[[str, Fields, Sequence[T], Sequence[str]], Sequence[T]]

#: Of a step, what both plugins are told, in their order; and the cache that they share.
_STEP = (tensors.LAST_TOKEN_IDS, tensors.SEQUENCE_LENGTH, tensors.BLOCK_OFFSETS)
_POOL = (tensors.POOL_POINTERS, tensors.POOL_MAPPING)

ROTARY_COS_SIN, K_CENTER, K_FRAME, Q_FRAME = "rotary_cos_sin", "k_center", "k_frame", "q_frame"
#: Constants of the write that a layer may have, in the order of their inputs; the field ``use_NAME`` connects each.
OPTIONAL_CONSTANTS = (K_CENTER, K_FRAME, Q_FRAME)


@dataclass(frozen=True)
class AttentionLayer:
    """What the plugins of a layer are made with.

    Attributes
    ----------
    layer_idx : int
        Among the attention layers of this rank.
    num_heads, num_kv_heads : int
        Of this rank.
    head_dim, tokens_per_block : int
    dtype : str
        Of the activations: float16 or bfloat16.
    kv_format : KVFormat
        How the layer is cached.
    rotate_v : bool
        Whether V is rotated at run time: not if its rotation is in the weights.
    softmax_scale : float
        Factor on q·k; 0 is ``1 / sqrt(head_dim)``.
    softcap : float
        Scores become ``softcap · tanh(score / softcap)``; 0 is none.
    window : int
        Keys that a query sees, its own among them; 0 is all.
    """

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    dtype: str
    kv_format: KVFormat
    rotate_v: bool = False
    softmax_scale: float = 0.0
    softcap: float = 0.0
    window: int = 0


def add_attention(
    layer: AttentionLayer,
    qkv: T,
    constants: Mapping[str, T],
    network_input: Callable[[str], T],
    add_plugin: AddPlugin[T],
) -> T:
    """RoPE, rotation, the write of the step's rows, and attention of prefills and decodes.

    Parameters
    ----------
    layer : AttentionLayer
    qkv : T
        The network's tensor ``[num_tokens, (num_heads + 2 num_kv_heads) head_dim]``: Q, K, V, normalized where the
        model does so, before RoPE.
    constants : dict
        The table ``rotary_cos_sin``, float32 ``[num_positions, head_dim / 2, 2]``, and which of
        :data:`OPTIONAL_CONSTANTS` the layer has, by name.
    network_input : callable
        Gives the engine's input of a name.
    add_plugin : callable
        Adds a plugin to the network and gives its outputs.

    Returns
    -------
    T
        ``[num_tokens, num_heads head_dim]``, in V's rotated basis where V is rotated.
    """
    common: dict[str, int | float | str] = {
        "layer_idx": layer.layer_idx,
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "tokens_per_block": layer.tokens_per_block,
        "dtype": layer.dtype,
        "kv": layer.kv_format.kv,
    }
    write: dict[str, int | float | str] = {
        "hadamard_order": layer.kv_format.hadamard_order,
        "rotate_v": int(layer.rotate_v),
        "range_factor": float(layer.kv_format.range_factor),
    }
    write |= {f"use_{name}": int(name in constants) for name in OPTIONAL_CONSTANTS}
    attention: dict[str, int | float | str] = {
        "softmax_scale": float(layer.softmax_scale),
        "softcap": float(layer.softcap),
        "window": layer.window,
        "use_sinks": 0,
    }
    step, pool = ([network_input(tensor.name) for tensor in group] for group in (_STEP, _POOL))
    positions, types, windows = (
        network_input(tensor.name) for tensor in (tensors.POSITION_IDS, tensors.REQUEST_TYPES, tensors.WINDOW_SIZES)
    )
    given = [constants[name] for name in (ROTARY_COS_SIN, *OPTIONAL_CONSTANTS) if name in constants]
    outputs = [layer.dtype] * 3 + ["int32"]  # rotated Q, K and V, and the attention's counters
    written = add_plugin(WRITE, common | write, [qkv, positions, *step, *pool, *given], outputs)
    (context,) = add_plugin(ATTENTION, common | attention, [*written, types, *step, *pool, windows], [layer.dtype])
    return context
