"""The two plugins of a layer, driven through TensorRT's interfaces but without TensorRT."""

from __future__ import annotations

import torch

from tests.support import plugin_library as lib
from tests.support.plugin_library import ATTENTION, WRITE
from tests.support.steps import Step


def fields(step: Step, name: str) -> dict[str, int | float | str]:
    common = {
        "layer_idx": step.layer_idx,
        "num_heads": step.heads[0],
        "num_kv_heads": step.heads[1],
        "head_dim": step.kv_format.head_dim,
        "tokens_per_block": step.tokens_per_block,
        "dtype": step.kv_format.dtype,
        "kv": step.kv_format.kv,
    }
    if name == ATTENTION:
        return common | {"softcap": float(step.softcap or 0.0)}
    return common | {
        "hadamard_order": step.kv_format.hadamard_order,
        "rotate_v": int(step.kv_format.rotate_v),
        "range_factor": float(step.kv_format.range_factor),
        "use_k_center": int(step.k_center is not None),
        "use_k_frame": int(bool(step.frames)),
        "use_q_frame": int(bool(step.frames)),
    }


class Layer:
    """The two plugins of a layer, wired as a network does it.

    Parameters
    ----------
    creators : dict
        By plugin.
    step : Step
        One of the layer's; later ones may be of other sequences.
    words : bool
        Whether addresses travel as two INT32s.
    run : bool
        As in an engine that runs; otherwise, as while one is built.
    """

    def __init__(self, creators, step: Step, words: bool, run: bool = True) -> None:
        self.words = words
        self.plugins = {}
        for name, creator in creators.items():
            plugin = creator.create(lib.to_fields(fields(step, name)))
            # As an engine does: serialized, read again, one clone for each context.
            self.plugins[name] = creator.deserialize(plugin.serialized()).attach_to_context() if run else plugin

    def tensors(self, step: Step) -> dict[str, torch.Tensor]:
        """Outputs and workspace, full of what nobody may rely on."""
        tokens, (heads, kv_heads), head_dim = len(step.gpu["qkv"]), step.heads, step.kv_format.head_dim
        dtype = step.qkv.dtype
        shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "context": heads}
        out = {name: torch.full((tokens, n, head_dim), torch.nan, dtype=dtype).cuda() for name, n in shapes.items()}
        sequences = len(step.gpu["sequence_length"])
        out["decode_counters"] = torch.full((sequences, kv_heads), 0x5A5A5A5A, dtype=torch.int32).cuda()
        bytes_ = self.plugins[ATTENTION].workspace_bytes()
        assert bytes_ > 0
        out["workspace"] = torch.randint(256, (bytes_,), dtype=torch.uint8).cuda()
        return out

    def enqueue(self, step: Step, out: dict[str, torch.Tensor]) -> None:
        stream = torch.cuda.current_stream().cuda_stream

        def gpu(*names: str) -> list[tuple[int, list[int]]]:
            tensors = [step.gpu[n] if n in step.gpu else out[n] for n in names]
            flat = {"q", "k", "v"}
            return [
                (x.data_ptr(), [len(x), x[0].numel()] if n in flat else list(x.shape))
                for n, x in zip(names, tensors, strict=True)
            ]

        def host(name: str) -> tuple[int, list[int]]:
            array = step.host[name]
            shape = list(array.shape)
            if name == "host_kv_cache_pool_pointers" and self.words:
                shape.append(2)
            return array.ctypes.data, shape

        pool = [
            *gpu("kv_cache_block_offsets"),
            host("host_kv_cache_pool_pointers"),
            host("host_kv_cache_pool_mapping"),
        ]
        inputs = [*gpu("qkv", "position_ids", "last_token_ids", "sequence_length"), *pool, *gpu("rotary_cos_sin")]
        inputs += gpu(*(name for name in ("k_center", "k_frame", "q_frame") if name in step.gpu))
        outputs = [out[n].data_ptr() for n in ("q", "k", "v", "decode_counters")]
        self.code = self.plugins[WRITE].enqueue(inputs, outputs, 0, stream)
        inputs = [
            *gpu("q", "k", "v", "decode_counters"),
            host("host_request_types"),
            *gpu("last_token_ids", "sequence_length"),
            *pool,
            host("host_max_attention_window_sizes"),
        ]
        workspace = out["workspace"].data_ptr()
        self.code |= self.plugins[ATTENTION].enqueue(inputs, [out["context"].data_ptr()], workspace, stream)
