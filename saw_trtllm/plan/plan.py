"""All that a build will do, worked out from nothing but flags and headers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.checkpoint.layout import check_tp_size, shard_format
from saw_trtllm.engine.config import BackendName, EngineConfig, SawSection
from saw_trtllm.engine.limits import BuildConfig, PluginConfig, StepLimits
from saw_trtllm.errors import ConfigError, first_error
from saw_trtllm.format import ROTATED, KVFormat
from saw_trtllm.model.config import Mapping, ModelConfig
from saw_trtllm.model.rope import table_bytes
from saw_trtllm.paths import is_file, is_folder
from saw_trtllm.plan.backend import BackendLimits
from saw_trtllm.plan.formats import default_rotate_v, engine_formats, without_folded
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.plan.warnings import key_bias_warning, tokenizer_warning
from saw_trtllm.plan.weights import EngineWeights
from saw_trtllm.plan.windows import layer_groups
from saw_trtllm.version import __version__


@dataclass(frozen=True)
class BuildPlan:
    """All that a build will do, worked out from nothing but flags and headers.

    Attributes
    ----------
    checkpoint : Checkpoint
    output_dir : Path
    config : EngineConfig
    backend : BackendLimits
        Of what builds and runs the engine.
    backend_reason : str
        Why this backend.
    calibration : Calibration or None
        What centers the keys, and the frames in the rotation's place.
    network : NetworkOptions
        How TensorRT builds the engine, for the backend ``tensorrt``.
    warnings : list of str
        What will not work, or not well, though the engine is built.
    """

    checkpoint: Checkpoint
    output_dir: Path
    config: EngineConfig
    backend: BackendLimits
    backend_reason: str
    calibration: Calibration | None = None
    network: NetworkOptions = field(default_factory=NetworkOptions)
    warnings: list[str] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Times that a build reports progress."""
        tensors = self.checkpoint.names() if self.backend.keeps_ranks else self.weights.shapes
        return len(tensors) * self.config.tp_size

    @property
    def weights(self) -> EngineWeights:
        """The engine's tensors."""
        return EngineWeights(self.checkpoint, self.config, self.calibration)

    def bytes_per_token(self, kv: str | None = None) -> int:
        """KV bytes of a token over all layers of a rank, in the plan's format or in another."""
        return self._stored_as(kv).bytes_per_token

    def sequence_bytes(self, num_tokens: int, kv: str | None = None) -> int:
        """KV bytes of a sequence of so many tokens on a rank, whose windows bound it, in the same formats."""
        return self._stored_as(kv).sequence_bytes(num_tokens)

    def _stored_as(self, kv: str | None) -> EngineConfig:
        """A rank's config, with another cache for all layers if one is named."""
        config = self.config.of_rank()
        if kv is None:
            return config
        model = config.pretrained_config
        saw = SawSection.of(KVFormat(kv, model.head_size, model.dtype), config.saw_int4.backend, __version__)
        return config.model_copy(update={"saw_int4": saw.model_copy(update={"kv_groups": config.saw_int4.kv_groups})})


def make_plan(options: BuildOptions, backend: BackendLimits, reason: str) -> BuildPlan:
    """Check the flags against the checkpoint and the backend, without reading weights or writing.

    Raises
    ------
    SawError
        In one sentence, the first thing that does not fit.
    """
    checkpoint = _open_checkpoint(options)
    plan = plan_engine(options, backend, reason, checkpoint)
    found = (tokenizer_warning(checkpoint), key_bias_warning(checkpoint, plan.config))
    return replace(plan, warnings=[warning for warning in found if warning is not None])


def plan_engine(options: BuildOptions, backend: BackendLimits, reason: str, checkpoint: Checkpoint) -> BuildPlan:
    """Like :func:`make_plan`, of a checkpoint whose weights may not be there; nothing is warned of."""
    model = checkpoint.config.model_copy(deep=True)
    if options.dtype != "auto":
        model.dtype = options.dtype
    elif model.dtype == "float32" and not backend.has_float32:
        model.dtype = "float16"
    # What the checkpoint says of its weights is in the section of this project, layer by layer.
    model.quantization = ModelConfig.model_fields["quantization"].get_default(call_default_factory=True)
    formats = engine_formats(checkpoint, options.qformat)
    rotate_v = default_rotate_v(checkpoint, formats) if options.rotate_v is None else options.rotate_v == "enable"
    kv_format = KVFormat(
        options.kv, model.head_size, model.dtype, options.hadamard_order, rotate_v, options.range_factor
    )
    if kv_format.rotate_v:
        formats = without_folded(checkpoint, formats)
    skipped, wide = layers_apart(options.kv_skip_layers, options.kv_bits, kv_format, model.num_hidden_layers)
    calibration = None
    if options.calibration is not None:
        _check_calibrated(options)
        calibration = Calibration.load(options.calibration)
        calibration.check(checkpoint)
    model = _split(model, options.tp_size, backend)
    for name, format in formats.items():
        shard_format(name, format, model, model.mapping.tp_size)
    backend.check(options, model, formats)
    network = _network_options(options, backend.name, model.dtype)
    config = EngineConfig(
        version=__version__,
        pretrained_config=model,
        build_config=_build_config(options, model, backend),
        saw_int4=SawSection.of(kv_format, backend.name, __version__).model_copy(
            update={
                "kv_skip_layers": skipped,
                "k8_layers": wide,
                "k_center": calibration is not None,
                "k_frame": calibration is not None,
                "quantized": formats,
            }
        ),
    )
    if backend.name != "tensorrt_llm":  # whose executor has pools of its own, a window each
        config.saw_int4.kv_groups = layer_groups(config)
    return BuildPlan(checkpoint, options.output_dir, config, backend, reason, calibration, network)


def _split(model: ModelConfig, tp_size: int | None, backend: BackendLimits) -> ModelConfig:
    """The model over the engine's ranks, whatever ranks the checkpoint is split over."""
    if tp_size is None and backend.keeps_ranks:
        return model
    return split_over_ranks(model, tp_size or 1, embedding=not backend.keeps_ranks)


def split_over_ranks(model: ModelConfig, tp_size: int, embedding: bool = True) -> ModelConfig:
    """A model over so many ranks, its ``embedding`` too if asked for.

    Raises
    ------
    ConfigError
        If they do not split it.
    """
    check_tp_size(model, tp_size)
    split: dict[str, Any] = {"mapping": Mapping(world_size=tp_size, tp_size=tp_size)}
    if tp_size > 1 and embedding:
        split |= {"use_parallel_embedding": True, "embedding_sharding_dim": 0}
    return model.model_copy(update=split)


def layers_apart(
    skipped: str | None, bits: str | None, kv_format: KVFormat, num_layers: int
) -> tuple[list[int], list[int]]:
    """The layers that ``kv_skip_layers`` and ``kv_bits`` name for a cache of ``kv_format``.

    Raises
    ------
    ConfigError
        If the cache has no such layers, or none is left that is as the others.
    """
    if skipped is not None and not kv_format.quantized:
        raise ConfigError("kv_skip_layers was given with --kv fp16, which has no layer to skip: leave it out")
    if bits is None:
        return parse_layers(skipped, num_layers), []
    if kv_format.kv != "saw_int4":
        raise ConfigError(f"kv_bits was given with --kv {kv_format.kv}, and it is for layers of saw_int4: leave it out")
    width, _, names = bits.partition(":")
    if width.strip() != "8/4" or not names:
        raise ConfigError(f"kv_bits {bits!r} is unknown: give 8/4, a colon and layers, as in 8/4:0,1,last")
    exact, wide = parse_layers(skipped, num_layers), parse_layers(names, num_layers, "kv_bits", "saw_k8v4")
    both = sorted(set(exact) & set(wide))
    if both:
        raise ConfigError(f"kv_bits and kv_skip_layers both name layer {both[0]}: name it in one of them")
    if len(exact) + len(wide) == num_layers:
        raise ConfigError(
            f"kv_bits and kv_skip_layers name all {num_layers} layers: give --kv saw_k8v4 in place of kv_bits"
        )
    return exact, wide


def parse_layers(text: str | None, num_layers: int, flag: str = "kv_skip_layers", whole: str = "fp16") -> list[int]:
    """The layers that ``kv_skip_layers``, or another flag, names, ascending; ``whole`` is a cache of only such layers.

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
                f"{flag} names {word.strip()!r} and the model has the layers 0 to {num_layers - 1}: give such "
                "numbers or last, separated by commas"
            )
        layers.add(layer)
    if len(layers) == num_layers:
        raise ConfigError(f"{flag} names all {num_layers} layers: give --kv {whole} instead")
    return sorted(layers)


def _open_checkpoint(options: BuildOptions) -> Checkpoint:
    checkpoint = Checkpoint.open_given(options.checkpoint_dir, options.model_dir)
    found = family_of(checkpoint.config).name
    if options.model not in (None, found):
        raise ConfigError(
            f"--model {options.model} was given and {checkpoint.folder} holds a {found} model: give --model {found}"
        )
    return checkpoint


def _build_config(options: BuildOptions, model: ModelConfig, backend: BackendLimits) -> BuildConfig:
    longest = backend.max_positions(model)
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(longest, max(model.max_position_embeddings, (options.max_input_len or 0) + 1))
    if max_seq_len < 2:
        raise ConfigError(f"max_seq_len {max_seq_len} has no room for a prompt and a text: give at least 2")
    max_input_len = max_seq_len - 1 if options.max_input_len is None else options.max_input_len
    if max_seq_len > longest:
        scaled = "" if longest == model.max_position_embeddings else f", which RoPE scaling stretches to {longest}"
        raise ConfigError(
            f"max_seq_len {max_seq_len} is beyond the model's max_position_embeddings {model.max_position_embeddings}"
            f"{scaled}: lower it, or give the checkpoint a RoPE scaling that reaches so far"
        )
    table = table_bytes(model, max_seq_len)
    if table > backend.free_memory():
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
        flags = [*("input_timing_cache", "output_timing_cache", "multiple_profiles", "builder_optimization_level")]
        flags.append("workers")
        given = [name for name in flags if getattr(options, name) is not None]
        given += ["strip_plan"] if options.strip_plan else []
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
        strip_plan=options.strip_plan,
    )


def _check_calibrated(options: BuildOptions) -> None:
    """A calibration's frames are rotations of their own."""
    if options.kv not in ROTATED:
        raise ConfigError(
            f"--calibration was given with --kv {options.kv}, and its frames belong to the rotated cache: give --kv "
            "saw_int4 or saw_k8v4"
        )
    if options.hadamard_order is not None:
        raise ConfigError(
            "--calibration and --hadamard_order were both given, and a calibration's frames stand in the rotation's "
            "place: leave one of them out"
        )
