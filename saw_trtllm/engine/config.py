"""An engine folder: ``config.json`` and ``rank{N}.engine``, as TensorRT-LLM lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from saw_trtllm.engine.executor_view import as_built
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.engine.pools import Pool, Region, regions_of
from saw_trtllm.engine.step import PoolLayout
from saw_trtllm.engine.windows import DECODES_AHEAD, most_blocks
from saw_trtllm.errors import ConfigError, EngineError, first_error
from saw_trtllm.format import FORMAT_VERSION, KVFormat
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.paths import is_file, is_folder, read_json

CONFIG_FILE = "config.json"
#: The calibration of an engine whose weights are elsewhere.
CALIBRATION_FILE = "calibration.safetensors"

#: What else has a config.json: a key of it, what it is, and saw-build's flag for it.
_NOT_ENGINES = (
    ("architectures", "a Hugging Face model", "--model_dir"),
    ("model_type", "a Hugging Face model", "--model_dir"),
    ("architecture", "a checkpoint of TensorRT-LLM", "--checkpoint_dir"),
)

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
        if not is_file(folder / CONFIG_FILE, EngineError):
            raise EngineError(f"{folder.absolute()} holds no {CONFIG_FILE}: give the --output_dir of saw-build")
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
