"""The ``config.json`` of a TensorRT-LLM engine, as its executor is to read it and as it was built.

The executor takes the size of a pool's rows from ``pretrained_config.head_size`` times the element size of
``quantization.kv_cache_quant_algo``, and nothing else of it goes by that ``head_size``. So an engine with 4-bit rows
names their bytes there, and INT8. The true values stand in the section ``saw_int4``. A checkpoint must not say so:
there ``head_size`` sizes the projections, and INT8 asks for scaling factors and switches paged context FMHA off.
"""

from __future__ import annotations

import copy
from typing import Any

SECTION = "saw_int4"
_KV_ALGO = "kv_cache_quant_algo"


def for_executor(pretrained_config: dict[str, Any]) -> dict[str, Any]:
    """An engine's ``pretrained_config`` with the row size where TensorRT-LLM's executor looks for it.

    Parameters
    ----------
    pretrained_config : dict
        With the true values, and the section ``saw_int4`` among them.

    Returns
    -------
    dict
        A copy. Of a cache in the engine's own dtype nothing changes.
    """
    config = copy.deepcopy(pretrained_config)
    section = config[SECTION]
    if section["kv"] != "fp16":
        config["head_size"] = section["row_bytes"]
        config["quantization"][_KV_ALGO] = "INT8"
    return config


def as_built(engine_config: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`for_executor` in a whole ``config.json``, and put the section where other engines have it.

    Returns
    -------
    dict
        A copy; what holds no engine of this kind is given back as it is.
    """
    pretrained = engine_config.get("pretrained_config")
    if SECTION in engine_config or not isinstance(pretrained, dict) or not isinstance(pretrained.get(SECTION), dict):
        return engine_config
    config = copy.deepcopy(engine_config)
    pretrained = config["pretrained_config"]
    section = config[SECTION] = pretrained.pop(SECTION)
    if section.get("kv") != "fp16":
        pretrained["head_size"] = section.get("head_dim")
        if isinstance(pretrained.get("quantization"), dict):
            pretrained["quantization"][_KV_ALGO] = None
    limits = config.get("build_config")
    if isinstance(limits, dict) and {"max_input_len", "max_seq_len"} <= limits.keys():
        # With packed tokens TensorRT-LLM does not go by max_input_len, and writes down its default.
        limits["max_input_len"] = min(limits["max_input_len"], limits["max_seq_len"] - 1)
    return config
