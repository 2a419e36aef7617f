"""An engine folder: ``config.json`` and ``rank{N}.engine``, as TensorRT-LLM lays it out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saw_trtllm.engine.executor_view import as_built
from saw_trtllm.engine.step import PoolLayout
from saw_trtllm.engine.windows import DECODES_AHEAD, most_blocks
from saw_trtllm.errors import ConfigError, EngineError, first_error
from saw_trtllm.format import FORMAT_VERSION, TOKENS_PER_BLOCK, KVFormat
from saw_trtllm.model.config import MAX_POSITIONS, ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.paths import is_folder, read_json

CONFIG_FILE = "config.json"
#: The calibration of an engine whose weights are elsewhere.
CALIBRATION_FILE = "calibration.safetensors"

#: What else has a config.json: a key of it, what it is, and saw-build's flag for it.
_NOT_ENGINES = (
    ("architectures", "a Hugging Face model", "--model_dir"),
    ("model_type", "a Hugging Face model", "--model_dir"),
    ("architecture", "a checkpoint of TensorRT-LLM", "--checkpoint_dir"),
)

#: Tokens of a prefill chunk where no other number is asked for, at most. Long enough to fill a GPU's matrix units,
#: short enough that decodes beside it do not stall, and the grain in which a 4-bit cache's prefixes are reused where
#: the text must be deterministic.
PREFILL_CHUNK = 512

BackendName = Literal["tensorrt_llm", "tensorrt", "reference"]


def engine_file(rank: int | str = 0) -> str:
    """Name of a rank's engine; of ``*`` the pattern of all."""
    return f"rank{rank}.engine"


def weights_file(rank: int | str = 0) -> str:
    """Name of the weights that a rank's engine does not hold itself; of ``*`` the pattern of all."""
    return f"rank{rank}.weights.safetensors"


def rank_files(folder: Path, rank: int = 0) -> list[Path]:
    """A rank's engine, and its weights if they are in a file of their own."""
    paths = [folder / name for name in (engine_file(rank), weights_file(rank))]
    return [path for path in paths if path.exists()]


def k_center_name(layer: int) -> str:
    """Name of a layer's center of keys in an engine file: fp32 ``[num_kv_heads, head_dim]``."""
    return f"transformer.layers.{layer}.attention.k_center"


def k_frame_name(layer: int) -> str:
    """Name of a layer's frame of keys in an engine file: fp32 ``[num_kv_heads, head_dim, head_dim]``."""
    return f"transformer.layers.{layer}.attention.k_frame"


def q_frame_name(layer: int) -> str:
    """Name of a layer's frame of queries in an engine file, the inverse transpose of that of its keys."""
    return f"transformer.layers.{layer}.attention.q_frame"


class PluginConfig(BaseModel):
    """TensorRT-LLM's plugin switches: those that its executor reads, with the values that a SAW engine has."""

    model_config = ConfigDict(extra="allow")

    gpt_attention_plugin: str = "auto"
    remove_input_padding: bool = True
    paged_kv_cache: bool = True
    tokens_per_block: int = 32
    context_fmha: bool = True
    use_paged_context_fmha: bool = True
    lora_plugin: str | None = None
    #: Of an engine of the backend tensorrt: the dtype of SawGemm, or None for TensorRT's own GEMMs.
    gemm_plugin: str | None = None


class BuildConfig(BaseModel):
    """An engine's limits, in ``trtllm-build``'s words and with its defaults where it has any."""

    model_config = ConfigDict(extra="allow")

    max_batch_size: int = Field(2048, gt=0)
    max_beam_width: Literal[1] = 1
    max_input_len: int = Field(gt=0)
    max_seq_len: int = Field(gt=1, le=MAX_POSITIONS)
    max_num_tokens: int = Field(8192, gt=0, le=MAX_POSITIONS)
    kv_cache_type: Literal["paged"] = "paged"
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    speculative_decoding_mode: int = 1  # none
    lora_config: dict[str, Any] = Field(default_factory=dict)
    plugin_config: PluginConfig = Field(default_factory=PluginConfig)

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} leaves no token to generate within max_seq_len "
                f"{self.max_seq_len}: lower the one or raise the other"
            )
        if self.tokens_per_block not in TOKENS_PER_BLOCK:
            valid = ", ".join(map(str, TOKENS_PER_BLOCK))
            raise ValueError(f"tokens_per_block {self.tokens_per_block} is not supported: choose one of {valid}")
        if self.max_num_tokens < self.max_batch_size + self.tokens_per_block:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} cannot hold a token of each of max_batch_size "
                f"{self.max_batch_size} sequences and a block of {self.tokens_per_block} tokens of a prompt: make it "
                f"at least {self.max_batch_size + self.tokens_per_block}, or lower max_batch_size"
            )
        return self

    @property
    def tokens_per_block(self) -> int:
        """Tokens of a KV block."""
        return self.plugin_config.tokens_per_block

    @property
    def most_prefill_chunk(self) -> int:
        """Tokens of the largest chunk that fits into a step beside any decodes."""
        most = self.max_num_tokens - self.max_batch_size
        return most - most % self.tokens_per_block

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prefill's chunk where no other number is asked for."""
        return min(PREFILL_CHUNK, self.most_prefill_chunk)


class StepLimits(NamedTuple):
    """What a step holds: the limits of :class:`BuildConfig` that bound one another."""

    max_batch_size: int
    max_num_tokens: int
    tokens_per_block: int

    @classmethod
    def of(cls, max_batch_size: int | None, max_num_tokens: int | None, tokens_per_block: int | None) -> StepLimits:
        """Fill in the defaults for None. Where they do not fit what is given, they give way to it."""
        defaults = BuildConfig.model_fields
        if tokens_per_block is None:
            most = PluginConfig.model_fields["tokens_per_block"].default
            room = most if max_num_tokens is None else max_num_tokens - (max_batch_size or 1)
            fitting = [size for size in TOKENS_PER_BLOCK if size <= min(most, room)]
            tokens_per_block = max(fitting, default=TOKENS_PER_BLOCK[0])
        if max_batch_size is None:
            most = defaults["max_batch_size"].default
            room = most if max_num_tokens is None else max_num_tokens - tokens_per_block
            max_batch_size = max(1, min(most, room))
        if max_num_tokens is None:
            max_num_tokens = max(defaults["max_num_tokens"].default, max_batch_size + tokens_per_block)
        return cls(max_batch_size, max_num_tokens, tokens_per_block)


class WeightsSource(BaseModel):
    """Where the weights of an engine are that holds none.

    Attributes
    ----------
    checkpoint_dir : str
    checksums : dict
        Of the checkpoint's config and of the files of its weights, by name.
    """

    checkpoint_dir: str
    checksums: dict[str, str]


class SawSection(BaseModel):
    """What a runtime must know of a SAW engine, and match.

    The versions that a TensorRT engine depends on are None in one that does not.
    """

    format_version: int = FORMAT_VERSION
    package_version: str
    backend: BackendName
    kv: str
    head_dim: int
    hadamard_order: int
    rotate_v: bool
    range_factor: float
    row_bytes: int
    #: Layers whose cache has rows of the engine's dtype, in a pool of their own, ascending.
    kv_skip_layers: list[int] = Field(default_factory=list)
    #: Layers of a cache of 4 bits whose keys have 8, in a pool of their own, ascending.
    k8_layers: list[int] = Field(default_factory=list)
    #: Layers that share a block table, of each table: all of them have one window, or none. Without any, one table is
    #: that of all layers, and holds all of a sequence's tokens.
    kv_groups: list[list[int]] = Field(default_factory=list)
    #: Whether the engine file holds a center of the keys of each layer, ``[num_kv_heads, head_dim]`` in fp32.
    k_center: bool = False
    #: Whether it holds frames of keys and queries, ``[num_kv_heads, head_dim, head_dim]`` in fp32, in place of their
    #: rotation, of each layer that is not skipped.
    k_frame: bool = False
    #: Of the weights that are quantized, by the tensor's name.
    quantized: dict[str, WeightFormat] = Field(default_factory=dict)
    plugin_version: str | None = None
    tensorrt_version: str | None = None
    compute_capability: str | None = None
    #: Of an engine that was built without weights.
    weights: WeightsSource | None = None
    #: By file name; :mod:`saw_trtllm.plan.checksums` writes and compares them.
    checksums: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, kv_format: KVFormat, backend: BackendName, package_version: str) -> SawSection:
        """Record a format."""
        return cls(
            package_version=package_version,
            backend=backend,
            kv=kv_format.kv,
            head_dim=kv_format.head_dim,
            hadamard_order=kv_format.hadamard_order,
            rotate_v=kv_format.rotate_v,
            range_factor=kv_format.range_factor,
            row_bytes=kv_format.row_bytes,
        )

    def kv_format(self, dtype: str) -> KVFormat:
        """The format that was recorded; ``dtype`` is the engine's."""
        return KVFormat(self.kv, self.head_dim, dtype, self.hadamard_order, self.rotate_v, self.range_factor)


class Pool(NamedTuple):
    """Layers whose rows have one format and one block table, and lie in a block in this order.

    Attributes
    ----------
    format : KVFormat
    layers : sequence of int
    table : int
        Their block table.
    region : int
        The memory that they lie in, which they share with the pools of the same format of other tables: a block is
        given to one table or to another.
    """

    format: KVFormat
    layers: Sequence[int]
    table: int = 0
    region: int = 0


class Region(NamedTuple):
    """Memory of blocks: rows of one format, of so many layers each."""

    format: KVFormat
    num_layers: int


def regions_of(pools: Sequence[Pool]) -> list[Region]:
    """The regions that pools lie in."""
    most: dict[int, Region] = {}
    for pool in pools:
        known = most.get(pool.region, Region(pool.format, 0))
        most[pool.region] = Region(pool.format, max(known.num_layers, len(pool.layers)))
    return [most[i] for i in sorted(most)]


class EngineConfig(BaseModel):
    """An engine's ``config.json``."""

    version: str
    pretrained_config: ModelConfig
    build_config: BuildConfig
    saw_int4: SawSection

    @classmethod
    def load(cls, folder: Path | str) -> EngineConfig:
        """Read and check ``folder/config.json``.

        Raises
        ------
        EngineError
            If there is no engine, it is not one of ours, or its cache format is another version's.
        """
        folder = Path(folder)
        if not is_folder(folder, EngineError):
            raise EngineError(f"{folder} is not a folder: give the --output_dir of saw-build")
        raw = as_built(read_json(folder / CONFIG_FILE, EngineError))
        section = raw.get("saw_int4")
        for key, what, flag in _NOT_ENGINES:
            if key in raw and "build_config" not in raw:
                raise EngineError(
                    f"{folder} holds {what}, not an engine: build one with saw-build {flag} {folder} --output_dir "
                    "engine, and give that"
                )
        if not isinstance(section, dict):
            raise EngineError(f"{folder} holds no engine of saw-build: its {CONFIG_FILE} has no section saw_int4")
        version = section.get("format_version")
        if version != FORMAT_VERSION:
            raise EngineError(
                f"the engine in {folder} has KV-cache format version {version} and this runtime reads version "
                f"{FORMAT_VERSION}: build the engine anew with saw-build"
            )
        try:
            config = cls.model_validate(raw)
            fmt = config.kv_format
        except ValidationError as e:
            raise EngineError(f"{folder / CONFIG_FILE} is damaged: {first_error(e)}") from e
        except ConfigError as e:
            raise EngineError(f"{folder / CONFIG_FILE} is damaged: {e}") from e
        stored, model = config.saw_int4, config.pretrained_config
        if (stored.row_bytes, stored.head_dim) != (fmt.row_bytes, model.head_size):
            raise EngineError(
                f"{folder / CONFIG_FILE} is damaged: it names rows of {stored.row_bytes} bytes for heads of "
                f"{stored.head_dim}, where its format has {fmt.row_bytes} and its model heads of {model.head_size}"
            )
        skipped, wide, layers = stored.kv_skip_layers, stored.k8_layers, range(model.num_hidden_layers)
        apart = [*skipped, *wide]
        if any(x != sorted(set(x) & set(layers)) for x in (skipped, wide)) or not len(set(apart)) == len(apart) < len(
            layers
        ):
            raise EngineError(
                f"{folder / CONFIG_FILE} is damaged: it skips the layers {skipped} of a model that has {len(layers)}, "
                f"and keeps 8-bit keys of {wide}"
            )
        groups = stored.kv_groups
        if groups and sorted(i for group in groups for i in group) != list(layers):
            raise EngineError(
                f"{folder / CONFIG_FILE} is damaged: its kv_groups {groups} are not all layers, each once"
            )
        if any(len({config.window(i) for i in group}) != 1 for group in groups):
            raise EngineError(f"{folder / CONFIG_FILE} is damaged: layers of one of its kv_groups have other windows")
        return config

    def save(self, folder: Path) -> None:
        """Write ``folder/config.json``, without checksums: those are of the files beside an earlier one."""
        text = json.dumps(self.model_dump(mode="json", exclude={"saw_int4": {"checksums"}}), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @property
    def tp_size(self) -> int:
        """Ranks that the engine is split over."""
        return self.pretrained_config.mapping.tp_size

    def of_rank(self) -> EngineConfig:
        """The same with what one rank has of the model; see :meth:`saw_trtllm.model.config.ModelConfig.of_rank`."""
        return self.model_copy(update={"pretrained_config": self.pretrained_config.of_rank(self.tp_size)})

    @property
    def kv_format(self) -> KVFormat:
        """How the engine's cache is stored, save for the layers that are named apart."""
        return self.saw_int4.kv_format(self.pretrained_config.dtype)

    def window(self, layer: int) -> int | None:
        """Tokens that a layer sees, or None if no sequence is longer."""
        window = self.pretrained_config.window(layer)
        return window if window is not None and window < self.build_config.max_seq_len else None

    @property
    def windows(self) -> list[int | None]:
        """Of each block table, the tokens that its layers see, by which a sequence's blocks are bounded."""
        return [self.window(group[0]) for group in self.saw_int4.kv_groups] or [None]

    @property
    def pools(self) -> list[Pool]:
        """The pools of the cache, those of the first block table first.

        Of a table the first pool has :attr:`kv_format`, further ones the layers that are named apart; a block has the
        same index in each of them.
        """
        model, saw = self.pretrained_config, self.saw_int4
        kept = [i for i in range(model.num_hidden_layers) if i not in (*saw.kv_skip_layers, *saw.k8_layers)]
        formats = [(self.kv_format, kept)]
        if saw.k8_layers:
            formats.append((self.kv_format.with_8bit_keys(), saw.k8_layers))
        if saw.kv_skip_layers:
            formats.append((KVFormat("fp16", model.head_size, model.dtype), saw.kv_skip_layers))
        pools = []
        for table, group in enumerate(saw.kv_groups or [range(model.num_hidden_layers)]):
            for region, (kv_format, layers) in enumerate(formats):
                shared = [i for i in layers if i in group]
                if shared:
                    pools.append(Pool(kv_format, shared, table, region))
        return pools

    @property
    def regions(self) -> list[Region]:
        """The memory of the pools."""
        return regions_of(self.pools)

    @property
    def pool_layout(self) -> PoolLayout:
        """How a step names the blocks of each pool."""
        pools, regions = self.pools, self.regions
        return PoolLayout([regions[pool.region].num_layers for pool in pools], [pool.table for pool in pools])

    def layer_format(self, layer: int) -> KVFormat:
        """How the cache of a layer is stored."""
        return next(pool.format for pool in self.pools if layer in pool.layers)

    @property
    def framed_layers(self) -> list[int]:
        """Layers of whose keys and queries the engine file holds frames: those with rotated rows, where it has any."""
        if not self.saw_int4.k_frame:
            return []
        return sorted(i for pool in self.pools if pool.format.rotated for i in pool.layers)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of a token over all layers."""
        heads = self.pretrained_config.num_key_value_heads
        return sum(pool.format.bytes_per_token(len(pool.layers), heads) for pool in self.pools)

    @property
    def region_bytes(self) -> list[int]:
        """Bytes of a block in each region."""
        tokens, heads = self.build_config.tokens_per_block, self.pretrained_config.num_key_value_heads
        return [tokens * region.format.bytes_per_token(region.num_layers, heads) for region in self.regions]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, whatever table it is given to."""
        return sum(self.region_bytes)

    def blocks_for(self, num_tokens: int, step: int = DECODES_AHEAD) -> int:
        """Blocks of a sequence of so many tokens; see :func:`saw_trtllm.engine.windows.most_blocks`."""
        return most_blocks(num_tokens, self.windows, self.build_config.tokens_per_block, step)

    def sequence_bytes(self, num_tokens: int) -> int:
        """KV bytes of a sequence of so many tokens."""
        return self.blocks_for(num_tokens) * self.block_bytes

    def blocks_of_tokens(self, num_tokens: int) -> int:
        """Blocks of a cache of so many tokens, in sequences as long as they may be.

        They are enough for one sequence of them all, while it is computed too.
        """
        build = self.build_config
        if self.windows == [None]:
            return num_tokens // build.tokens_per_block
        longest = build.max_seq_len
        alone = self.blocks_for(min(num_tokens, longest), build.prefill_chunk)
        return max(alone, num_tokens * self.blocks_for(longest) // longest)

    def tokens_of_blocks(self, num_blocks: int) -> int:
        """Tokens that so many blocks hold, in sequences as long as they may be."""
        build = self.build_config
        if self.windows == [None]:
            return num_blocks * build.tokens_per_block
        return num_blocks * build.max_seq_len // self.blocks_for(build.max_seq_len)
