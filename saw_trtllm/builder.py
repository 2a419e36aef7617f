"""From a checkpoint to an engine folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saw_trtllm import __version__
from saw_trtllm.backend import check_model, choose_backend, free_memory
from saw_trtllm.calibration import Calibration
from saw_trtllm.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    SafetensorsWriter,
    cast,
    copy_tokenizer_files,
    tokenizer_files,
)
from saw_trtllm.checksums import record_checksums
from saw_trtllm.config import MODELS, DTypeName, ModelConfig, first_error, read_json
from saw_trtllm.engine import (
    CONFIG_FILE,
    BackendName,
    BuildConfig,
    EngineConfig,
    PluginConfig,
    SawSection,
    StepLimits,
    engine_file,
)
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_folder
from saw_trtllm.fold import fold_smoothing, fold_v_rotation, layer_of
from saw_trtllm.format import RANGE_FACTORS, TOKENS_PER_BLOCK, KVFormat, KvName
from saw_trtllm.network.options import NetworkOptions, Phases
from saw_trtllm.paths import is_file, is_folder
from saw_trtllm.rope import table_bytes
from saw_trtllm.runtime.llm import KvCacheConfig
from saw_trtllm.runtime.tokenizer import Tokenizer

Switch = Literal["enable", "disable"]
#: What a build replaces in its folder; other files there stay.
ENGINE_FILES = (CONFIG_FILE, engine_file("*"), *TOKENIZER_FILES)
GemmPlugin = Literal["auto", "float16", "bfloat16", "disable"]


class BuildOptions(BaseModel):
    """``saw-build``'s flags: each field is one, its description the help."""

    model_config = ConfigDict(protected_namespaces=())  # model_dir would be in one in pydantic before 2.10

    model: Literal[MODELS] | None = Field(  # type: ignore[valid-type]
        None, description="model family; by default the checkpoint's, and an error if it is another one"
    )
    kv: KvName = Field(
        "saw_int4",
        description="KV cache: saw_int4 (4 bits, rotated), int4 (4 bits, not rotated), fp16 (the engine's own dtype)",
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
        None, description="rotate V too, folded into the weights; by default enable for saw_int4"
    )
    range_factor: float | None = Field(
        None,
        description="share of each row's range that the 16 codes span; 1 is min-max; by default what suits head_dim: "
        + ", ".join(f"{factor} for {dim}" for dim, factor in RANGE_FACTORS.items()),
    )
    calibration: Path | None = Field(
        None, description="file that saw-calibrate wrote for this model: centres and smooths the keys, free at run time"
    )
    kv_skip_layers: str | None = Field(
        None, description="layers whose cache stays in the engine's own dtype: numbers from 0 or last, as in 0,1,last"
    )
    dtype: Literal["auto"] | DTypeName = Field(
        "auto", description="dtype of weights and activations; auto keeps the model's"
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
        description="give steps of decodes alone kernels of their own; the build takes about twice as long (tensorrt; "
        "by default disable with the GEMM plugin, else enable)",
    )
    builder_optimization_level: int | None = Field(
        None, ge=0, le=5, description="0 to 5: how long TensorRT looks for fast kernels; by default its own (tensorrt)"
    )
    workers: int = Field(1, ge=1, description="threads that read the weights and fold into them (tensorrt)")
    gemm_plugin: GemmPlugin = Field(
        "auto",
        description="GEMMs by cuBLASLt, in the model's dtype: builds and decodes are then faster; auto takes it where "
        "cuBLASLt loads, disable leaves GEMMs to TensorRT (tensorrt)",
    )


@dataclass(frozen=True)
class BuildPlan:
    """All that a build will do, worked out from flags and headers alone.

    Attributes
    ----------
    checkpoint : Checkpoint
    output_dir : Path
    config : EngineConfig
    backend_reason : str
        Why this backend.
    calibration : Calibration or None
        What is folded into the weights and centres the keys.
    network : NetworkOptions
        How TensorRT builds the engine, for the backend ``tensorrt``.
    warning : str or None
        What will not work, though the engine is built.
    """

    checkpoint: Checkpoint
    output_dir: Path
    config: EngineConfig
    backend_reason: str
    calibration: Calibration | None = None
    network: NetworkOptions = field(default_factory=NetworkOptions)
    warning: str | None = None

    @property
    def num_steps(self) -> int:
        """Times that a build reports progress."""
        if self.config.saw_int4.backend == "tensorrt_llm":
            return len(self.checkpoint.names()) * self.config.pretrained_config.mapping.world_size
        return len(self.engine_shapes)

    @property
    def engine_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the engine; a tied ``lm_head`` is the embedding."""
        tied = self.config.pretrained_config.share_embedding_table
        names = [n for n in self.checkpoint.names() if not (tied and n == "lm_head.weight")]
        centers = {} if self.calibration is None else self.calibration.centers
        return {n: self.checkpoint.shape(n) for n in names} | {n: center.shape for n, center in centers.items()}

    def load(self, name: str) -> np.ndarray:
        """Read a tensor of the engine, with all that is folded in."""
        if self.calibration is not None and name in self.calibration.centers:
            return self.calibration.centers[name]
        model = self.config.pretrained_config
        tensor = self.checkpoint.load_finite(name)
        # Folded before it is cast, so that a 16-bit weight is rounded once.
        if self.calibration is not None:
            tensor = fold_smoothing(name, tensor, model, self.calibration.smoothing)
        layer = layer_of(name)
        if layer is not None:
            tensor = fold_v_rotation(name, tensor, model, self.config.layer_format(layer))
        return cast(tensor, model.dtype, self.checkpoint.where(name))

    def bytes_per_token(self, kv: str | None = None) -> int:
        """KV bytes of a token over all layers, in the plan's format or in another."""
        if kv is None:
            return self.config.bytes_per_token
        model = self.config.pretrained_config
        fmt = KVFormat(kv, model.head_size, model.dtype)
        return fmt.bytes_per_token(model.num_hidden_layers, model.num_key_value_heads)


def plan_build(options: BuildOptions) -> BuildPlan:
    """Check the flags against the checkpoint, without reading weights or writing.

    Raises
    ------
    SawError
        In one sentence, the first thing that does not fit.
    """
    backend, reason = choose_backend(options.backend)
    checkpoint = _open_checkpoint(options)
    model = checkpoint.config.model_copy(deep=True)
    if options.dtype != "auto":
        model.dtype = options.dtype
    kv_format = KVFormat(
        options.kv,
        model.head_size,
        model.dtype,
        options.hadamard_order,
        None if options.rotate_v is None else options.rotate_v == "enable",
        options.range_factor,
    )
    if options.kv_skip_layers is not None and not kv_format.quantized:
        raise ConfigError("kv_skip_layers was given with --kv fp16, which has no layer to skip: leave it out")
    calibration = None
    if options.calibration is not None:
        calibration = Calibration.load(options.calibration)
        calibration.check(checkpoint)
    check_model(backend, model)
    network = _network_options(options, backend, model.dtype)
    if backend == "tensorrt_llm":
        if options.kv_skip_layers is not None:
            raise ConfigError(
                "kv_skip_layers was given, and TensorRT-LLM's executor has rows of one size in all layers: leave it out"
            )
    else:
        # The engine is whole again, whatever ranks the checkpoint was split over.
        model.mapping = type(model.mapping)()
    config = EngineConfig(
        version=__version__,
        pretrained_config=model,
        build_config=_build_config(options, model, backend),
        saw_int4=SawSection.of(kv_format, backend, __version__).model_copy(
            update={
                "kv_skip_layers": parse_layers(options.kv_skip_layers, model.num_hidden_layers),
                "k_center": calibration is not None,
            }
        ),
    )
    warning = _tokenizer_warning(checkpoint)
    return BuildPlan(checkpoint, options.output_dir, config, reason, calibration, network, warning)


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """The layers that ``kv_skip_layers`` names, ascending.

    Raises
    ------
    ConfigError
        If one is none of the model's, or all of them are named.
    """
    if text is None:
        return []
    layers = set()
    for word in text.split(","):
        layer = num_layers - 1 if word.strip() == "last" else int(word) if word.strip().isdecimal() else -1
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"kv_skip_layers names {word.strip()!r} and the model has the layers 0 to {num_layers - 1}: give such "
                "numbers or last, separated by commas"
            )
        layers.add(layer)
    if len(layers) == num_layers:
        raise ConfigError(f"kv_skip_layers names all {num_layers} layers: give --kv fp16 instead")
    return sorted(layers)


def build(plan: BuildPlan, progress: Callable[[str], None] | None = None, phases: Phases | None = None) -> int:
    """Write the engine folder of a plan.

    An engine that is there stays until the new one is whole.

    Parameters
    ----------
    plan : BuildPlan
    progress : callable, optional
        Called with the name of each tensor that has been written, or read for a compiler.
    phases : Phases, optional
        Told of the phases of TensorRT's build.

    Returns
    -------
    int
        Bytes of the engine file.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    CheckpointError
        If a weight cannot be read, is not finite, or is too large for the engine's dtype.
    EngineError
        If TensorRT does not build the engine.
    """
    folder = plan.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_replaceable(plan)
        if plan.config.saw_int4.backend == "tensorrt_llm":
            from saw_trtllm.trtllm.build import build_engines

            return build_engines(plan, progress)
        if plan.config.saw_int4.backend == "tensorrt":
            from saw_trtllm.network.build import build_engine

            return build_engine(plan, progress, phases)
        with replacing_engine(plan) as part:
            path = part / engine_file()
            centers = () if plan.calibration is None else plan.calibration.centers
            with SafetensorsWriter(path, plan.engine_shapes, plan.config.pretrained_config.dtype, centers) as writer:
                for name in plan.engine_shapes:
                    writer.write(name, plan.load(name))
                    if progress is not None:
                        progress(name)
            plan.config.save(part)
            return path.stat().st_size
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be written ({e.strerror or e}): choose another --output_dir or make room"
        ) from e


@contextmanager
def replacing_engine(plan: BuildPlan) -> Iterator[Path]:
    """Give a folder to write the engine and its config to: with the tokenizer and checksums it becomes the plan's."""
    with replacing_folder(plan.output_dir, ENGINE_FILES) as part:
        yield part
        copy_tokenizer_files(plan.checkpoint.folder, part)
        record_checksums(part)


def tokens_that_fit(plan: BuildPlan, kv: str | None = None) -> int:
    """Tokens of KV cache that the free memory holds beside the weights, as the runtime will have it, about."""
    backend = plan.config.saw_int4.backend
    # The reference keeps its weights in fp32.
    weights = plan.checkpoint.nbytes("float32" if backend == "reference" else plan.config.pretrained_config.dtype)
    free = max(0, free_memory(backend) - weights)
    return int(KvCacheConfig.free_gpu_memory_fraction * free) // plan.bytes_per_token(kv)


def _check_replaceable(plan: BuildPlan) -> None:
    folder = plan.output_dir
    if folder.resolve() == plan.checkpoint.folder.resolve():
        raise ConfigError(f"{folder} is the folder that the model is read from: choose another --output_dir")
    config = folder / CONFIG_FILE
    if is_file(config) and "build_config" not in read_json(config):
        raise ConfigError(f"{folder} holds a model, not an engine to replace: choose another --output_dir")


def _open_checkpoint(options: BuildOptions) -> Checkpoint:
    if (options.checkpoint_dir is None) == (options.model_dir is None):
        given = "neither" if options.model_dir is None else "both"
        raise ConfigError(f"{given} of --checkpoint_dir and --model_dir was given: give one of them")
    checkpoint = Checkpoint.open(options.checkpoint_dir or options.model_dir)
    found = checkpoint.config.model
    if options.model not in (None, found):
        raise ConfigError(
            f"--model {options.model} was given and {checkpoint.folder} holds a {found} model: give --model {found}"
        )
    return checkpoint


def _build_config(options: BuildOptions, model: ModelConfig, backend: BackendName) -> BuildConfig:
    # TensorRT-LLM's own table of positions ends at max_position_embeddings.
    longest = model.max_position_embeddings if backend == "tensorrt_llm" else model.max_positions
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(longest, max(model.max_position_embeddings, (options.max_input_len or 0) + 1))
    max_input_len = max_seq_len - 1 if options.max_input_len is None else options.max_input_len
    if max_seq_len > longest:
        scaled = "" if longest == model.max_position_embeddings else f", which RoPE scaling stretches to {longest}"
        raise ConfigError(
            f"max_seq_len {max_seq_len} is beyond the model's max_position_embeddings {model.max_position_embeddings}"
            f"{scaled}: lower it, or give the checkpoint a RoPE scaling that reaches so far"
        )
    table = table_bytes(model, max_seq_len)
    if backend != "tensorrt_llm" and table > free_memory(backend):
        raise ConfigError(
            f"max_seq_len {max_seq_len} needs a RoPE table of {table:,} bytes, more than is free here: give a smaller "
            "--max_seq_len"
        )
    if options.max_beam_width != 1:
        raise ConfigError(f"max_beam_width {options.max_beam_width} is not supported: give --max_beam_width 1")
    both = options.gather_all_token_logits
    step = StepLimits.of(options.max_batch_size, options.max_num_tokens, options.tokens_per_block)
    try:
        return BuildConfig(
            max_batch_size=step.max_batch_size,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            max_num_tokens=step.max_num_tokens,
            gather_context_logits=options.gather_context_logits or both,
            gather_generation_logits=options.gather_generation_logits or both,
            plugin_config=PluginConfig(tokens_per_block=step.tokens_per_block),
        )
    except ValidationError as e:
        raise ConfigError(first_error(e)) from e


def _network_options(options: BuildOptions, backend: BackendName, dtype: str) -> NetworkOptions:
    """The flags for TensorRT's builder, which no other backend has."""
    if backend != "tensorrt":
        flags = ("input_timing_cache", "output_timing_cache", "multiple_profiles", "builder_optimization_level")
        given = [name for name in flags if getattr(options, name) is not None]
        given += ["workers"] if options.workers != 1 else []
        given += ["gemm_plugin"] if options.gemm_plugin != "auto" else []
        if given:
            raise ConfigError(
                f"{given[0]} was given, and it is for the backend tensorrt, not {backend}: leave it out, or give "
                "--backend tensorrt"
            )
    if options.gemm_plugin not in ("auto", "disable", dtype):
        raise ConfigError(f"--gemm_plugin {options.gemm_plugin} was given and the model is in {dtype}: give auto")
    source = options.input_timing_cache
    if source is not None and not is_file(source):
        raise ConfigError(f"--input_timing_cache {source} is not a file: give what --output_timing_cache wrote")
    target = options.output_timing_cache
    if target is not None and (is_folder(target) or not is_folder(target.absolute().parent)):
        raise ConfigError(f"--output_timing_cache {target} cannot be written: give a file in a folder that is there")
    return NetworkOptions(
        decode_profile=None if options.multiple_profiles is None else options.multiple_profiles == "enable",
        input_timing_cache=source,
        output_timing_cache=target,
        optimization_level=options.builder_optimization_level,
        workers=options.workers,
        gemm_plugin=options.gemm_plugin,
    )


def _tokenizer_warning(checkpoint: Checkpoint) -> str | None:
    """Say what will not work for want of a tokenizer that fits; reject one that cannot be read or copied."""
    folder, vocab = checkpoint.folder, checkpoint.config.vocab_size
    if "tokenizer.json" not in tokenizer_files(folder):
        return (
            f"{folder} holds no tokenizer.json: the engine takes token ids, and text (saw-run, saw-triton) needs a "
            "folder that holds one, as transformers' save_pretrained writes it, with --tokenizer_dir"
        )
    size = Tokenizer.load(folder).vocab_size
    if size > vocab:
        return (
            f"{folder / 'tokenizer.json'} has {size} tokens and the model {vocab}: a prompt with a token beyond the "
            "model's will be rejected"
        )
    return None
