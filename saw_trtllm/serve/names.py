"""Every model, tensor and parameter name of the Triton model repository, as data.

The names, types and shapes are those of TensorRT-LLM's own repository, so that its clients work here. ``config.pbtxt``
files, the models and the tables of ``docs/triton.md`` all come from this file. Shapes leave out the batch dimension,
which every tensor has in front.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ENSEMBLE = "ensemble"
PREPROCESSING = "preprocessing"
TENSORRT_LLM = "tensorrt_llm"
TENSORRT_LLM_BLS = "tensorrt_llm_bls"
POSTPROCESSING = "postprocessing"

#: Of every model: its folder's name.
VERSION = "1"


class Tensor(NamedTuple):
    """An input or output of a model.

    Attributes
    ----------
    name : str
    dtype : str
        Triton's ``TYPE_`` name without the prefix.
    dims : tuple of int
        Without the batch dimension; -1 is any size.
    doc : str
    optional : bool
        Of an input: whether a request may leave it out. Of an output: whether a response may.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    doc: str
    optional: bool = False


class Step(NamedTuple):
    """A step of the ensemble: tensors of ``model`` to tensors of the ensemble."""

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


class Model(NamedTuple):
    """A model of the repository.

    Attributes
    ----------
    name : str
    inputs, outputs : tuple of Tensor
        The first input says how many rows a request has.
    parameters : tuple of str
        Fields of :class:`saw_trtllm.serve.parameters.Parameters`.
    steps : tuple of Step
        What Triton does in the model's place where each request has one response.
    may_stream : bool
        Whether ``--decoupled_mode true`` lets a request have several responses.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    may_stream: bool = False


def _optional(name: str, dtype: str, doc: str, dims: tuple[int, ...] = (1,)) -> Tensor:
    return Tensor(name, dtype, dims, doc, optional=True)


#: Optional inputs that the ensemble hands on to ``tensorrt_llm``. Where that model has another name for one, it stands
#: in :data:`RENAMED`.
REQUEST_OPTIONS = (
    _optional("stream", "BOOL", "a response for each piece of text; by default one with the whole text"),
    _optional("temperature", "FP32", "divides the logits; 0 is greedy, as is any without `top_k` and `top_p`"),
    _optional("top_k", "INT32", "choose among so many tokens; 1 is greedy, 0 is off"),
    _optional("top_p", "FP32", "choose among the likeliest tokens that hold this share of the probability; 0 is off"),
    _optional("seed", "UINT64", "the same seed gives the same text; 0 by default"),
    _optional("random_seed", "UINT64", "older name of `seed`"),
    _optional(
        "stop_words", "STRING", "strings that end the text, and are not part of it; empty ones count as none", (-1,)
    ),
    _optional("bad_words", "STRING", "strings that the text must not hold; empty ones count as none", (-1,)),
    _optional("min_tokens", "INT32", "tokens before which nothing ends the text"),
    _optional("min_length", "INT32", "older name of `min_tokens`"),
    _optional("repetition_penalty", "FP32", "0.001 to 1000; above 1: tokens of prompt and text become less likely"),
    _optional("presence_penalty", "FP32", "-1000 to 1000; subtracted from the logits of tokens in the text"),
    _optional("frequency_penalty", "FP32", "-1000 to 1000; the same, times their count"),
    _optional("end_id", "INT32", "the end token; the model's by default, -1 is none"),
    _optional("pad_id", "INT32", "accepted and not needed: no output is padded"),
    _optional("exclude_input_in_output", "BOOL", "without `stream`: leave the prompt as it was sent out of the output"),
    _optional("return_log_probs", "BOOL", "give `output_log_probs` and `cum_log_probs`"),
    _optional("return_context_logits", "BOOL", "give `context_logits`; the engine needs `--gather_context_logits`"),
    _optional("return_generation_logits", "BOOL", "give `generation_logits`; needs `--gather_generation_logits`"),
    _optional("return_num_input_tokens", "BOOL", "give `num_input_tokens`"),
    _optional("return_num_output_tokens", "BOOL", "give `num_output_tokens`"),
    _optional("return_num_reused_tokens", "BOOL", "give `num_reused_tokens`"),
    _optional("cache_salt", "STRING", "only prompts of the same salt find each other's blocks in the KV cache"),
    _optional("return_perf_metrics", "BOOL", "only false: the metrics have times and reused tokens"),
    _optional("guided_decoding_guide_type", "STRING", "what the text must be: `json`, `json_schema` or `regex`"),
    _optional("guided_decoding_guide", "STRING", "the JSON schema or the regular expression; not for `json`"),
    _optional("beam_width", "INT32", "only 1: there is no beam search"),
    _optional("num_return_sequences", "INT32", "texts for a prompt, 1 to 128; above 1: `--decoupled_mode true`"),
    _optional("length_penalty", "FP32", "only 0 or 1: it is for beam search"),
)

#: The ensemble's name of an option to ``tensorrt_llm``'s, where they differ.
RENAMED = {"stream": "streaming", "top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty"}

#: Further options of TensorRT-LLM's ensemble. A request that names one gets a sentence, for its text would be another.
UNSUPPORTED = (
    "decoder_text_input",
    "embedding_bias_weights",
    "embedding_bias_words",
    "lora_config",
    "lora_task_id",
    "lora_weights",
    "num_draft_tokens",
    "prompt_embedding_table",
    "prompt_table_extra_id",
    "prompt_vocab_size",
    "use_draft_logits",
)

#: Outputs of ``tensorrt_llm`` that the ensemble hands on to the client.
RESULTS = (
    _optional("cum_log_probs", "FP32", "sum of the log-probabilities so far", (-1,)),
    _optional("output_log_probs", "FP32", "log-probability of each new token `[1, tokens]`", (-1, -1)),
    _optional("context_logits", "FP32", "`[prompt tokens, vocabulary]`, with the last response", (-1, -1)),
    _optional("generation_logits", "FP32", "`[1, tokens, vocabulary]` of each new token", (-1, -1, -1)),
    _optional("num_input_tokens", "INT32", "tokens of the prompt"),
    _optional("num_output_tokens", "INT32", "generated tokens of this response"),
    _optional("num_reused_tokens", "INT32", "tokens of the prompt that were found in the KV cache"),
    _optional("batch_index", "INT32", "of a request with several texts: which prompt this one is for"),
    _optional("sequence_index", "INT32", "with `batch_index`: which of the prompt's texts this is"),
)

STEPS = (
    Step(
        PREPROCESSING,
        inputs={"QUERY": "text_input", "REQUEST_OUTPUT_LEN": "max_tokens"},
        outputs={
            "INPUT_ID": "_INPUT_ID",
            "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN",
            "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
        },
    ),
    Step(
        TENSORRT_LLM,
        inputs={
            "input_ids": "_INPUT_ID",
            "input_lengths": "_REQUEST_INPUT_LEN",
            "request_output_len": "_REQUEST_OUTPUT_LEN",
            "prompt": "text_input",
            **{RENAMED.get(t.name, t.name): t.name for t in REQUEST_OPTIONS},
        },
        outputs={
            "output_ids": "_TOKENS_BATCH",
            "sequence_length": "_SEQUENCE_LENGTH",
            "text": "_TEXT",
            **{t.name: t.name for t in RESULTS},
        },
    ),
    Step(
        POSTPROCESSING,
        inputs={
            "TOKENS_BATCH": "_TOKENS_BATCH",
            "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH",
            "TEXT": "_TEXT",
        },
        outputs={"OUTPUT": "text_output"},
    ),
)

ENSEMBLE_MODEL = Model(
    ENSEMBLE,
    inputs=(
        Tensor("text_input", "STRING", (1,), "the prompt, UTF-8"),
        Tensor("max_tokens", "INT32", (1,), "tokens to generate at most"),
        *REQUEST_OPTIONS,
    ),
    outputs=(Tensor("text_output", "STRING", (-1,), "the text, or this piece of it"), *RESULTS),
    parameters=(
        "gpt_model_path",
        "tokenizer_dir",
        "add_special_tokens",
        "exclude_input_in_output",
        "cancellation_check_period_ms",
    ),
    steps=STEPS,
    may_stream=True,
)

#: TensorRT-LLM has a Python model here, which calls the same three models in turn. To its clients it is the ensemble
#: under another name, and so it is here.
BLS_MODEL = ENSEMBLE_MODEL._replace(name=TENSORRT_LLM_BLS)

PREPROCESSING_MODEL = Model(
    PREPROCESSING,
    inputs=(
        Tensor("QUERY", "STRING", (1,), "the prompt, UTF-8"),
        Tensor("REQUEST_OUTPUT_LEN", "INT32", (1,), "handed on"),
        _optional("STOP_WORDS_DICT", "STRING", "strings that end the text", (-1,)),
        _optional("BAD_WORDS_DICT", "STRING", "strings that the text must not hold", (-1,)),
        _optional("END_ID", "INT32", "the end token; the tokenizer's by default"),
        _optional("PAD_ID", "INT32", "fills up the shorter of several prompts; the end token by default"),
    ),
    outputs=(
        Tensor("INPUT_ID", "INT32", (-1,), "token ids"),
        Tensor("REQUEST_INPUT_LEN", "INT32", (1,), "how many of them are the prompt's"),
        Tensor("REQUEST_OUTPUT_LEN", "INT32", (1,), "handed on"),
        Tensor("STOP_WORDS_IDS", "INT32", (2, -1), "token ids of `STOP_WORDS_DICT`, and where each ends"),
        Tensor("BAD_WORDS_IDS", "INT32", (2, -1), "token ids of `BAD_WORDS_DICT`, and where each ends"),
        Tensor("EMBEDDING_BIAS", "FP32", (-1,), "empty"),
        Tensor("DECODER_INPUT_ID", "INT32", (-1,), "the padding: there is no encoder"),
        Tensor("REQUEST_DECODER_INPUT_LEN", "INT32", (1,), "1"),
        Tensor("OUT_END_ID", "INT32", (1,), "the end token, -1 for none"),
        Tensor("OUT_PAD_ID", "INT32", (1,), "the padding"),
    ),
    parameters=("gpt_model_path", "tokenizer_dir", "add_special_tokens"),
)

TENSORRT_LLM_MODEL = Model(
    TENSORRT_LLM,
    inputs=(
        Tensor("input_ids", "INT32", (-1,), "the prompt's token ids"),
        Tensor("input_lengths", "INT32", (1,), "how many of them count"),
        Tensor("request_output_len", "INT32", (1,), "tokens to generate at most"),
        *(t._replace(name=RENAMED.get(t.name, t.name)) for t in REQUEST_OPTIONS),
        _optional("prompt", "STRING", "the prompt, UTF-8, for outputs that begin with it; by default its tokens' text"),
        _optional(
            "stop_words_list", "INT32", "runs of tokens that end the text: ids, and where each run ends", (2, -1)
        ),
        _optional("bad_words_list", "INT32", "runs of tokens that the text must not hold, in the same form", (2, -1)),
        _optional("embedding_bias", "FP32", "not supported: anything but an empty one is rejected", (-1,)),
        _optional("decoder_input_ids", "INT32", "accepted and not needed: there is no encoder", (-1,)),
        _optional("decoder_input_lengths", "INT32", "accepted and not needed"),
        _optional("stop", "BOOL", "cancel the requests that have this one's id"),
    ),
    outputs=(
        Tensor("output_ids", "INT32", (-1, -1), "token ids `[1, tokens]`, new ones only when streaming"),
        Tensor("sequence_length", "INT32", (1,), "how many they are"),
        Tensor("text", "STRING", (-1,), "the tokens' text; none where the model has no tokenizer"),
        *RESULTS,
    ),
    parameters=(
        "gpt_model_path",
        "tokenizer_dir",
        "max_tokens_in_paged_kv_cache",
        "kv_cache_free_gpu_mem_fraction",
        "kv_cache_host_memory_bytes",
        "disk_cache_dir",
        "disk_cache_size",
        "enable_kv_cache_reuse",
        "enable_partial_reuse",
        "deterministic",
        "exclude_input_in_output",
        "max_queue_size",
        "verify_engine",
        "ranks",
        "step_timeout",
        "retry",
        "cancellation_check_period_ms",
        "stats_check_period_ms",
    ),
    may_stream=True,
)

POSTPROCESSING_MODEL = Model(
    POSTPROCESSING,
    inputs=(
        Tensor("TOKENS_BATCH", "INT32", (-1, -1), "token ids"),
        # TensorRT-LLM's is [-1], for beams. With a fixed size Triton itself rejects a batch of 0, which its Python
        # backend drops without an answer.
        Tensor("SEQUENCE_LENGTH", "INT32", (1,), "how many of them count"),
        _optional("TEXT", "STRING", "their text, to be handed on instead of detokenizing them", (-1,)),
    ),
    outputs=(Tensor("OUTPUT", "STRING", (-1,), "the text"),),
    parameters=("tokenizer_dir",),
)

MODELS = (ENSEMBLE_MODEL, BLS_MODEL, PREPROCESSING_MODEL, TENSORRT_LLM_MODEL, POSTPROCESSING_MODEL)


def table(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> str:
    """Tensors as a table in Markdown, but for those that another table had."""
    rows = ["| name | type | shape | |", "|---|---|---|---|"]
    known = set(known)
    for t in (t for t in tensors if t not in known):
        doc = f"optional; {t.doc}" if t.optional else t.doc
        rows.append(f"| `{t.name}` | {t.dtype} | {list(t.dims)} | {doc} |")
    return "\n".join(rows)
