"""TensorRT-LLM's side: its ``config.json``, read and written, and its files per rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saw_trtllm.checkpoint.families import Family, family_of, find_family
from saw_trtllm.checkpoint.layout import EMBEDDING, LM_HEAD, check_tp_size, expected_shapes, shard_shape
from saw_trtllm.checkpoint.quantization import CACHE_SCALES, TENSORRT_LLM, Linear, StoredWeight
from saw_trtllm.checkpoint.reader import StoredTensor, check_dtypes, open_file, reject_quantized, reject_unknown
from saw_trtllm.checkpoint.rope_scaling import normalize_scaling
from saw_trtllm.errors import CheckpointError, ConfigError, first_error
from saw_trtllm.model.config import Mapping, ModelConfig

#: Keys of its Llama and Qwen configs that change the computation, with the one value that is supported.
_SUPPORTED_VALUES = {
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "fc_after_embed": False,
    "has_partial_lora_mask": False,
    "is_pruned": False,
    "layer_idx_offset": 0,
    "mlp_bias": False,
    "output_multiplier_scale": 1.0,
    "remove_duplicated_kv_heads": False,
    "residual_mlp": False,
    "residual_multiplier": 1.0,
    "rotary_pct": 1.0,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_logn_attn": False,
}
#: A config that has them, be it as null, is a Gemma's to TensorRT-LLM.
_ONLY_IF_SET = (
    *("inter_layernorms", "scale_embedding", "query_pre_attn_scalar", "rope_local_base_freq"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
#: Constants that TensorRT-LLM computes anew, and what is read from another place.
_HARMLESS = re.compile(r"(rotary_inv_freq|embed_positions|embed_positions_for_gpt_attention)$|^lm_head\.weight$")
#: What TensorRT-LLM takes where scaling leaves something out, as a checkpoint from Meta's format does.
_SCALING_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"original_max_position_embeddings": 4096},
}


def rank_file(rank: int | str) -> str:
    """Name the weights of one rank."""
    return f"rank{rank}.safetensors"


def read(
    folder: Path, raw: dict[str, Any]
) -> tuple[ModelConfig, dict[str, list[StoredTensor]], dict[str, list[StoredWeight]]]:
    """Read a folder's config and headers.

    Returns
    -------
    config : ModelConfig
        Of the whole model; ``mapping`` says how it is stored.
    parts : dict[str, list[StoredTensor]]
        By name, each rank's part. An ``lm_head`` that shares the embedding may be absent.
    quantized : dict[str, list[StoredWeight]]
        The same of the weights that are quantized.
    """
    config = read_config(raw, folder / "config.json")
    tp_size = config.mapping.tp_size
    try:
        check_tp_size(config, tp_size)
    except ConfigError as e:
        raise CheckpointError(f"{folder / 'config.json'}: {e}") from None
    ranks = [open_file(folder / rank_file(rank)) for rank in range(tp_size)]
    read_linear = TENSORRT_LLM.open(_section(raw, "quantization", folder / "config.json"), folder / "config.json")
    shapes = expected_shapes(config)
    if LM_HEAD not in ranks[0] and EMBEDDING in ranks[0]:
        # TensorRT-LLM reads a checkpoint without it as one whose embedding is shared.
        config = config.model_copy(update={"share_embedding_table": True})
    if config.share_embedding_table:
        del shapes[LM_HEAD]
    parts: dict[str, list[StoredTensor]] = {}
    quantized: dict[str, list[StoredWeight]] = {}
    used: set[str] = set()
    for name in shapes:
        shape = shard_shape(name, config, tp_size)
        if len(shape) == 2 and name != EMBEDDING:
            linears = [Linear(name.removesuffix(".weight"), shape, stored, folder) for stored in ranks]
            found = [weight for weight in map(read_linear, linears) if weight is not None]
            if len(found) == tp_size:
                quantized[name] = found
                used |= {tensor.name for weight in found for tensor in weight.tensors}
                continue
        parts[name] = _parts(name, shape, ranks, folder, config)
    algorithm = _section(raw, "quantization", folder / "config.json").get("quant_algo")
    if algorithm and not quantized:
        raise CheckpointError(
            f"{folder / 'config.json'} sets quant_algo to {algorithm}, and no weight is stored so: use the config.json "
            "that belongs to these weights"
        )
    used |= parts.keys()
    for stored in ranks:
        used |= {name for name in stored if CACHE_SCALES.search(name)}
        reject_quantized(stored.values(), used)
        reject_unknown(stored.values(), used, _HARMLESS, f"{config.architecture} of {config.num_hidden_layers} layers")
    return config, parts, quantized


def _parts(
    name: str, shape: tuple[int, ...], ranks: list[dict[str, StoredTensor]], folder: Path, config: ModelConfig
) -> list[StoredTensor]:
    """Each rank's part of a weight that is not quantized, of one shape and dtype."""
    for rank, stored in enumerate(ranks):
        if name not in stored:
            raise CheckpointError(
                f"{folder / rank_file(rank)} lacks the tensor {name!r} that a {config.architecture} of "
                f"{config.num_hidden_layers} layers needs: convert the checkpoint again"
            )
        stored[name].check(shape)
    parts = [stored[name] for stored in ranks]
    check_dtypes(parts)
    return parts


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """Check a TensorRT-LLM ``config.json`` and bring it to this project's spelling; ``path`` is for the messages."""
    fields = dict(raw)
    family = find_family(_architecture(raw), path)
    _reject_unsupported(raw, family, path)
    for key in family.trtllm_rejects:
        if raw.get(key):
            raise CheckpointError(
                f"{path} sets {key}, which {family.architecture} cannot have here: use a model without it"
            )
    scaling = _section(raw, "rotary_scaling", path)
    scaling = {**_SCALING_DEFAULTS.get(str(scaling.get("type", scaling.get("rope_type"))), {}), **scaling}
    fields["architecture"] = family.architecture
    fields["rotary_scaling"] = normalize_scaling(scaling, path)
    fields |= {**family.fixed, **family.trtllm_fields(raw, path)}
    fields["attn_bias"] = raw.get("attn_bias", family.fixed.get("attn_bias", False))
    # TensorRT-LLM goes by qwen_type here and leaves the key false.
    fields["qk_layernorm"] = family.fixed.get("qk_layernorm", False)
    fields["share_embedding_table"] = raw.get("share_embedding_table", raw.get("tie_word_embeddings", False))
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = raw.get("num_attention_heads")
    for key in ("mapping", "quantization"):
        if fields.get(key) is None:
            fields.pop(key, None)
    try:
        config = ModelConfig(**fields)
    except ValidationError as e:
        raise CheckpointError(f"{path}: {first_error(e)}") from None
    if raw.get("rotary_embedding_dim") not in (None, config.head_size):
        raise CheckpointError(
            f"{path} sets rotary_embedding_dim to {raw['rotary_embedding_dim']}, but only the whole head_size "
            f"{config.head_size} is supported"
        )
    if config.mapping.pp_size != 1:
        raise CheckpointError(
            f"{path} is split over {config.mapping.pp_size} pipeline stages, but pp_size 1 is needed: convert it again"
        )
    return config


def write_config(config: ModelConfig, dtype: str, tp_size: int) -> dict[str, Any]:
    """Describe a checkpoint of ``tp_size`` ranks in what TensorRT-LLM 1.2 reads for this family."""
    extra = config.model_extra or {}
    unset = {key for key in _ONLY_IF_SET if not getattr(config, key)}
    written = config.model_dump(exclude=unset) | {
        "dtype": dtype,
        "logits_dtype": extra.get("logits_dtype", "float32"),
        "mapping": Mapping(world_size=tp_size, tp_size=tp_size).model_dump(),
        "mlp_bias": False,
        "tie_word_embeddings": config.share_embedding_table,
        "use_parallel_embedding": False,
    }
    return written | {key: extra.get(key, value) for key, value in family_of(config).trtllm_writes(config).items()}


def _architecture(raw: dict[str, Any]) -> str:
    """The name of its class in transformers; TensorRT-LLM's one Qwen definition tells the generations apart itself."""
    name, qwen_type = raw["architecture"], raw.get("qwen_type")
    if name in ("QWenForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM") and qwen_type is not None:
        return {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(str(qwen_type), f"{name} ({qwen_type})")
    return name


def _reject_unsupported(raw: dict[str, Any], family: Family, path: Path) -> None:
    if _section(raw, "moe", path).get("num_experts"):
        raise CheckpointError(f"{path} is of a mixture of experts, which is not supported: use a dense model")
    for key, value in (_SUPPORTED_VALUES | {"hidden_act": family.fixed.get("hidden_act", "silu")}).items():
        if raw.get(key, value) != value:
            raise CheckpointError(f"{path} sets {key} to {raw[key]!r}, but only {value!r} is supported")
    if raw.get("use_parallel_embedding") and raw.get("embedding_sharding_dim", 0) not in (0, 1):
        dim = raw["embedding_sharding_dim"]
        raise CheckpointError(f"{path} sets embedding_sharding_dim to {dim!r}, but 0 or 1 is needed")


def _section(raw: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """Take a nested object, which may be null or left out."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path} sets {key} to {value!r}, but a JSON object is needed")
    return value or {}
