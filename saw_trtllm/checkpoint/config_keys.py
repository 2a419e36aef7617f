"""What becomes of each key of a Hugging Face ``config.json``: for the reader, and the table in docs/checkpoints.md.

A key is honored where transformers' class of the family reads it and so does this project, harmless where the class
does not read it or reads it for training and outputs alone, and rejected where it changes the model and this project
does not follow. A key that stands nowhere here changes nothing in transformers' classes either: it gives a warning.
"""

from __future__ import annotations

import logging
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.config import MODELS

log = logging.getLogger(__name__)

Treatment = Literal["honored", "harmless", "rejected"]


@dataclass(frozen=True)
class KeyRule:
    """How the families treat some keys.

    Attributes
    ----------
    treatment : str
    note : str
        What it does or why it does nothing, for the table.
    keys : tuple of str
    families : tuple of str
        The others do not read them: there they are harmless.
    unless : tuple
        Values of rejected keys that change nothing.
    """

    treatment: Treatment
    note: str
    keys: tuple[str, ...]
    families: tuple[str, ...] = MODELS
    unless: tuple[Any, ...] = ()


_OFF = (None, False)
_QWEN = ("qwen2", "qwen3")
RULES = (
    KeyRule("honored", "the family", ("architectures",)),
    KeyRule("honored", "of the weights; `saw-build --dtype` gives the engine another", ("dtype", "torch_dtype")),
    KeyRule("honored", "shape", ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
    KeyRule("honored", "shape", ("num_attention_heads", "num_key_value_heads", "head_dim")),
    KeyRule("honored", "the default of `--max_seq_len`", ("max_position_embeddings",)),
    KeyRule("honored", "above 0", ("rms_norm_eps",)),
    KeyRule("honored", "a head that is stored nevertheless, and differs, is not tied", ("tie_word_embeddings",)),
    KeyRule("honored", "`silu`, also as `swish`; others are rejected", ("hidden_act",)),
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
    KeyRule("honored", "above 0 where a layer uses it", ("sliding_window",), ("mistral", *_QWEN)),
    KeyRule("honored", "whose the window is", ("use_sliding_window", "max_window_layers", "layer_types"), _QWEN),
    KeyRule("rejected", "biases of the attention's projections", ("attention_bias",), ("llama", "qwen3"), _OFF),
    KeyRule("rejected", "biases of the MLP", ("mlp_bias",), ("llama",), _OFF),
    KeyRule("rejected", "quantized weights", ("quantization_config",), unless=(None, {})),
    KeyRule("rejected", "layers of several shapes", ("per_layer_config",), unless=(None, {})),
    KeyRule("rejected", "not a decoder alone", ("is_encoder_decoder", "add_cross_attention"), unless=_OFF),
    KeyRule(
        "rejected",
        "another model's experts",
        ("num_experts", "num_local_experts", "n_routed_experts"),
        unless=(*_OFF, 0, 1),
    ),
    KeyRule(
        "rejected",
        "another model's scores and logits",
        ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "attention_multiplier"),
        unless=(*_OFF, 1),
    ),
    KeyRule(
        "rejected",
        "another model's embedding and residuals",
        ("embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth"),
        unless=(*_OFF, 1),
    ),
    KeyRule(
        "rejected",
        "another model's attention",
        ("use_mrope", "no_rope_layers", "attention_chunk_size", "clip_qkv", "alibi", "use_qk_norm", "kv_lora_rank"),
        unless=(*_OFF, []),
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
    KeyRule("harmless", "of classifiers", ("id2label", "label2id", "num_labels", "problem_type")),
    KeyRule(
        "harmless",
        "where it comes from; custom code is not run",
        (
            *("model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map"),
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
_RULES = {key: rule for rule in RULES for key in rule.keys}
_OTHERS_DO_NOT_READ = KeyRule("harmless", "this family's class does not read it", ())


def rule(key: str, family: str) -> KeyRule | None:
    """What becomes of a key in a family's config; None for a key that transformers' classes do not have."""
    found = _RULES.get(key)
    return found if found is None or family in found.families else _OTHERS_DO_NOT_READ


def honored(raw: dict[str, Any], family: str, path: Path) -> dict[str, Any]:
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
    for r in RULES:
        keys = ", ".join(f"`{key}`" for key in r.keys)
        families = "all" if r.families == MODELS else ", ".join(r.families)
        values = ", ".join(f"`{v!r}`" for v in r.unless)
        lines.append(f"| {keys} | {r.treatment}{f' unless {values}' if values else ''} | {families} | {r.note} |")
    return "\n".join(lines) + "\n"
