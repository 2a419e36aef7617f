"""``saw-build``'s flags."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from saw_trtllm.checkpoint.families import FAMILY_NAMES
from saw_trtllm.format import RANGE_FACTORS, TOKENS_PER_BLOCK, KvName
from saw_trtllm.model.config import DTypeName

Switch = Literal["enable", "disable"]


GemmPlugin = Literal["auto", "float16", "bfloat16", "disable"]


class BuildOptions(BaseModel):
    """``saw-build``'s flags: each field is one, its description the help."""

    model_config = ConfigDict(protected_namespaces=())  # model_dir would be in one in pydantic before 2.10

    model: Literal[FAMILY_NAMES] | None = Field(  # type: ignore[valid-type]
        None, description="model family; by default the checkpoint's, and an error if it is another one"
    )
    kv: KvName = Field(
        "saw_int4",
        description="KV cache: saw_int4 (4 bits, rotated), saw_k8v4 (keys in 8 bits, values in 4), int4 (4 bits, not "
        "rotated), fp16 (the engine's own dtype)",
    )
    checkpoint_dir: Path | None = Field(None, description="TensorRT-LLM checkpoint folder")
    model_dir: Path | None = Field(None, description="Hugging Face model folder, instead of --checkpoint_dir")
    output_dir: Path = Field(Path("engine_outputs"), description="folder to write the engine to")
    backend: Literal["auto", "tensorrt_llm", "tensorrt", "reference"] = Field(
        "auto", description="what runs the engine; auto takes the best that this machine has, and says why"
    )
    hadamard_order: int | None = Field(
        None,
        description="order of the rotation's blocks: a power of two from 16 that divides head_dim; "
        "by default the largest",
    )
    rotate_v: Switch | None = Field(
        None, description="rotate V too, folded into the weights; by default enable for a rotated cache"
    )
    range_factor: float | None = Field(
        None,
        description="share of each row's range that the 16 codes span; 1 is min-max; by default what suits head_dim: "
        + ", ".join(f"{factor} for {dim}" for dim, factor in RANGE_FACTORS.items()),
    )
    calibration: Path | None = Field(
        None,
        description="file that saw-calibrate wrote for this model: centers of the keys, and frames in the rotation's "
        "place",
    )
    kv_skip_layers: str | None = Field(
        None, description="layers whose cache stays in the engine's own dtype: numbers from 0 or last, as in 0,1,last"
    )
    tp_size: int | None = Field(
        None,
        ge=1,
        description="tensor parallel ranks to split the engine over, a GPU each; by default 1, or for the backend "
        "tensorrt_llm those of the checkpoint",
    )
    kv_bits: str | None = Field(
        None, description="layers of a saw_int4 cache with other bits of K and V, which are 8/4: as in 8/4:0,1,last"
    )
    dtype: Literal["auto"] | DTypeName = Field(
        "auto",
        description="dtype of weights and activations; auto keeps the model's, but has float16 for float32 on a GPU",
    )
    qformat: Literal["auto", "full_prec", "fp8", "int4_wo"] = Field(
        "auto",
        description="weights of the linear layers: auto has them as the checkpoint does, full_prec in the engine's "
        "dtype; fp8 (a scale for each output channel) and int4_wo (groups of 128) round those of a 16-bit model",
    )
    max_batch_size: int | None = Field(
        None, description="sequences in a step; by default 2048, or what a given max_num_tokens leaves"
    )
    max_input_len: int | None = Field(None, description="tokens of a prompt; by default max_seq_len - 1")
    max_seq_len: int | None = Field(
        None, description="tokens of a sequence, prompt and text; by default the model's max_position_embeddings"
    )
    max_num_tokens: int | None = Field(
        None, description="tokens in a step, padding removed; by default 8192, or what a given max_batch_size needs"
    )
    max_beam_width: int = Field(1, description="beams; a 4-bit cache has 1")
    tokens_per_block: int | None = Field(
        None,
        description=f"tokens of a KV block: {', '.join(map(str, TOKENS_PER_BLOCK))}; by default 32, or what a given "
        "max_num_tokens leaves",
    )
    gather_context_logits: bool = Field(False, description="keep the logits of all prompt tokens")
    gather_generation_logits: bool = Field(False, description="keep the logits of all generated tokens")
    gather_all_token_logits: bool = Field(False, description="both of the above")
    input_timing_cache: Path | None = Field(
        None, description="file of kernels' times from an earlier build, which makes this one shorter (tensorrt)"
    )
    output_timing_cache: Path | None = Field(None, description="file to write this build's to (tensorrt)")
    multiple_profiles: Switch | None = Field(
        None,
        description="give decode steps kernels of their own; the build takes about twice as long (tensorrt; "
        "by default disable with the GEMM plugin, else enable)",
    )
    builder_optimization_level: int | None = Field(
        None, ge=0, le=5, description="0 to 5: how long TensorRT looks for fast kernels; by default its own (tensorrt)"
    )
    workers: int | None = Field(
        None, ge=1, description="threads that read the weights and fold into them; by default one a core (tensorrt)"
    )
    gemm_plugin: GemmPlugin = Field(
        "auto",
        description="GEMMs by cuBLASLt, in the model's dtype: builds and decodes are then faster; auto takes it where "
        "cuBLASLt loads, disable leaves GEMMs to TensorRT (tensorrt)",
    )
    strip_plan: bool = Field(
        False,
        description="leave the weights out of the engine, which then has megabytes and reads them from the checkpoint "
        "when it is opened (tensorrt, from TensorRT 10 on)",
    )
