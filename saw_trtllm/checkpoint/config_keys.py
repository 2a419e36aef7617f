"""What becomes of each key of a Hugging Face ``config.json``: for the reader, and the table in docs/checkpoints.md.

A key is honored where transformers' class of the family reads it and so does this project, harmless where the class
does not read it or reads it only for training and outputs, and rejected where it changes the model and this project
does not follow. Here is what all families have; a family's file has what is its own. A key that stands nowhere changes
nothing in transformers' classes either: it gives a warning.
"""

from __future__ import annotations

import logging
import reprlib
from pathlib import Path
from typing import Any, get_args

from saw_trtllm.checkpoint.families import FAMILIES, Family, KeyRule
from saw_trtllm.checkpoint.families.family import OFF, Treatment
from saw_trtllm.errors import CheckpointError

log = logging.getLogger(__name__)

COMMON = (
    KeyRule("honored", "the family", ("architectures",)),
    KeyRule(
        "honored",
        "of the weights; an engine for a GPU has float16 for float32, and `saw-build --dtype` gives it another",
        ("dtype", "torch_dtype"),
    ),
    KeyRule("honored", "shape", ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    KeyRule("honored", "shape", ("num_attention_heads", "num_key_value_heads", "head_dim")),
    KeyRule("honored", "the default of `--max_seq_len`", ("max_position_embeddings",)),
    KeyRule("honored", "above 0", ("rms_norm_eps",)),
    KeyRule("honored", "a head that is stored nevertheless, and differs, is not tied", ("tie_word_embeddings",)),
    KeyRule(
        "honored",
        "types default, linear, llama3 and yarn, one set for all layers; others are rejected",
        ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"),
    ),
    KeyRule("honored", "1 alone: RoPE on a part of the head is rejected", ("partial_rotary_factor",)),
    KeyRule(
        "honored",
        "kept for the runtime; generation_config.json's `eos_token_id` goes before",
        ("bos_token_id", "eos_token_id", "pad_token_id"),
    ),
    KeyRule("honored", "[quantized weights](weights.md)", ("quantization_config", "compression_config")),
    KeyRule("rejected", "layers of several shapes", ("per_layer_config",), unless=(None, {})),
    KeyRule("rejected", "not a decoder alone", ("is_encoder_decoder", "add_cross_attention"), unless=OFF),
    KeyRule(
        "rejected",
        "another model's experts",
        ("num_experts", "num_local_experts", "n_routed_experts"),
        unless=(*OFF, 0, 1),
    ),
    KeyRule(
        "rejected",
        "another model's scores and logits",
        ("logit_scale", "logits_scaling", "attention_multiplier"),
        unless=(*OFF, 1),
    ),
    KeyRule("rejected", "a Gemma's scores", ("attn_logit_softcapping",), (*OFF, 1)),
    KeyRule("rejected", "a Gemma's logits", ("final_logit_softcapping",), (*OFF, 1)),
    KeyRule(
        "rejected",
        "another model's embedding and residuals",
        ("embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth"),
        unless=(*OFF, 1),
    ),
    KeyRule(
        "rejected",
        "another model's attention",
        ("use_mrope", "no_rope_layers", "attention_chunk_size", "clip_qkv", "alibi", "use_qk_norm", "kv_lora_rank"),
        unless=(*OFF, []),
    ),
    KeyRule("harmless", "training", ("attention_dropout", "initializer_range", "pretraining_tp")),
    KeyRule(
        "harmless",
        "what transformers returns, and how it computes it",
        (
            *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"),
            *("attn_implementation", "experts_implementation", "tie_last_hidden_states"),
        ),
    ),
    KeyRule("harmless", "the tokenizer's own", ("unk_token_id",)),
    KeyRule("harmless", "of classifiers", ("id2label", "label2id", "num_labels", "problem_type")),
    KeyRule(
        "harmless",
        "where it comes from; custom code is not run",
        (
            *("model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map"),
            *("_model_name_or_path",),
            *("_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation_internal"),
        ),
    ),
    KeyRule(
        "harmless",
        "of generation: transformers does not load them from config.json",
        (
            *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
            *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
            *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
            *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
            *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
            *("begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty"),
            *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("assistant_lookbehind", "target_lookbehind"),
        ),
    ),
)
_COMMON = {key: rule for rule in COMMON for key in rule.keys}
_OWN = {family.name: {key: rule for rule in family.keys for key in rule.keys} for family in FAMILIES}
_OTHERS_DO_NOT_READ = KeyRule("harmless", "this family's class does not read it", ())


def rule(key: str, family: Family) -> KeyRule | None:
    """What becomes of a key in a family's config; None for a key that transformers' classes do not have."""
    found = _OWN[family.name].get(key, _COMMON.get(key))
    return _OTHERS_DO_NOT_READ if found is None and any(key in keys for keys in _OWN.values()) else found


def honored(raw: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Take the honored keys of a config, and warn of those that nobody knows; ``path`` is for the messages.

    Raises
    ------
    CheckpointError
        If a rejected key has a value that changes the model.
    """
    taken, unknown = {}, []
    for key, value in raw.items():
        found = rule(key, family)
        if found is None:
            unknown.append(key)
        elif found.treatment == "honored":
            taken[key] = value
        elif found.treatment == "rejected" and value not in found.unless:
            raise CheckpointError(
                f"{path} sets {key} to {reprlib.repr(value)} ({found.note}), which is not supported: use a model "
                "without it"
            )
    if unknown:
        log.warning("%s has keys that transformers' own class does not read either: %s", path, ", ".join(unknown))
    return taken


def markdown_table() -> str:
    """The rules as docs/checkpoints.md shows them."""
    lines = ["| key | | families | |", "|---|---|---|---|"]
    own = dict.fromkeys(r for family in FAMILIES for r in family.keys)
    for r in sorted((*COMMON, *own), key=lambda r: get_args(Treatment).index(r.treatment)):
        keys = ", ".join(f"`{key}`" for key in r.keys)
        named = [f.name for f in FAMILIES if r in f.keys or (r in COMMON and r.keys[0] not in _OWN[f.name])]
        families = "all" if len(named) == len(FAMILIES) else ", ".join(named)
        values = ", ".join(f"`{v!r}`" for v in r.unless)
        lines.append(f"| {keys} | {r.treatment}{f' unless {values}' if values else ''} | {families} | {r.note} |")
    return "\n".join(lines) + "\n"
