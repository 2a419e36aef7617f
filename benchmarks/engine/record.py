"""The record of ``python -m benchmarks engine``: a JSON file that holds all that its tables and plots show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benchmarks.common.record import Record, RecordPart
from benchmarks.common.target import TargetResult
from benchmarks.engine.cases import LOOP_BATCH, MODELS, Part, model_config
from saw_trtllm.model.config import ModelConfig


class Shape(RecordPart):
    """Of the model whose engines are measured."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str = "float16"
    qformat: str = "full_prec"

    @classmethod
    def of(cls, model: ModelConfig, qformat: str = "full_prec") -> Shape:
        """That of a model."""
        return cls(
            num_layers=model.num_hidden_layers,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_key_value_heads,
            head_dim=model.head_size,
            vocab_size=model.vocab_size,
            dtype=model.dtype,
            qformat=qformat,
        )

    @property
    def model(self) -> str | None:
        """Whose it is, but for the number of layers."""
        mine = self.model_copy(update={"qformat": "full_prec"})
        known = {name: Shape.of(model_config(name, self.num_layers, dtype=self.dtype)) for name in MODELS}
        return next((name for name, shape in known.items() if shape == mine), None)

    def __str__(self) -> str:
        if (model := self.model) is not None:
            layers = MODELS[model].num_hidden_layers
            return f"{model}'s shape" + ("" if self.num_layers == layers else f", {self.num_layers} of {layers} layers")
        heads = f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}"
        return f"{self.num_layers} layers of {self.hidden_size}, heads {heads}, vocabulary {self.vocab_size}"


class Step(RecordPart):
    """A decode step of a batch, each sequence with so many tokens in the cache."""

    batch: int
    context: int
    repetitions: int
    p10_us: float
    median_us: float
    """From the end of a step to the end of the next, the next being launched before the result of the last is taken."""
    p90_us: float
    gpu_us: float
    """The GPU's part: of a step whose launch the GPU did not have to wait for."""
    alone_us: float
    """From the launch of a step to its result, nothing else in flight."""

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences."""
        return self.batch / self.median_us * 1e6


class Profile(RecordPart):
    """µs of each part of a step, its layers timed one by one by TensorRT: their sum is more than ``gpu_us``."""

    batch: int
    context: int
    parts: dict[Part, float]


class Loop(RecordPart):
    """Requests that all run at once through the whole runtime."""

    batch: int
    context: int
    """Of each sequence, in the middle of the time measured."""
    step_us: float
    """Time of a token of each sequence."""
    gpu_us: float
    """The GPU's part of such a step: a decode of the same batch and context, as :attr:`Step.gpu_us`."""

    @property
    def busy(self) -> float:
        """The GPU's share of the time."""
        return self.gpu_us / self.step_us


class StartUp(RecordPart):
    """A process of its own that opens the engine, in s."""

    open_s: float
    """Until requests may come, after the imports."""
    read_s: float
    """Of reading the engine's file and nothing else."""


class Engine(RecordPart):
    """What was measured of an engine."""

    kv: str
    bytes_per_token: int
    build_s: float | None
    """None for an engine that was there."""
    engine_bytes: int
    tokens: int
    """That fit into the memory that the engine leaves to a cache, were there no limit to its sequences."""
    memory: dict[str, int]
    """The executor's plan, by the names of :class:`saw_trtllm.backends.tensorrt.memory.MemoryPlan`."""
    start_up: StartUp | None
    steps: list[Step]
    too_large: list[tuple[int, int]]
    """Batches and contexts whose tokens did not fit."""
    profiles: list[Profile]
    loop: Loop | None

    def find(self, batch: int, context: int) -> Step | None:
        """A step, if it was measured."""
        return next((s for s in self.steps if (s.batch, s.context) == (batch, context)), None)


class PeerStep(RecordPart):
    """A decode step of somebody else's engine."""

    batch: int
    context: int
    step_us: float
    """Of a long text less a short one, by the tokens that it is longer."""


class Peer(RecordPart):
    """Somebody else's engine of the same shape, with random weights."""

    name: str
    kv: str
    dtype: str
    steps: list[PeerStep]

    def find(self, batch: int, context: int) -> PeerStep | None:
        """A step, if it was measured."""
        return next((s for s in self.steps if (s.batch, s.context) == (batch, context)), None)


class EngineResults(Record):
    """A run."""

    kind: Literal["engine"] = "engine"
    shape: Shape
    optimization_level: int | None
    """TensorRT's, of the engines that were built; None is its default."""
    decode_profile: bool
    tokens_per_block: int
    tp_size: int = 1
    """Ranks that each engine is split over, a GPU each; memory and bytes are of each."""
    gemm_plugin: str | None = None
    """The dtype of SawGemm, or None for TensorRT's own GEMMs."""
    engines: list[Engine]
    peers: list[Peer] = Field(default_factory=list)
    targets: list[TargetResult] = Field(default_factory=list)
    aborted: str | None = None
    """What ended the run before its end."""

    def engine(self, kv: str) -> Engine | None:
        """That of a format, if it was measured."""
        return next((e for e in self.engines if e.kv == kv), None)

    def speedups(self, over: str) -> dict[tuple[int, int], float]:
        """``saw_int4``'s tokens/s over another format's, by batch and context."""
        ours, theirs = self.engine("saw_int4"), self.engine(over)
        if ours is None or theirs is None:
            return {}
        return {
            (s.batch, s.context): other.median_us / s.median_us
            for s in ours.steps
            if (other := theirs.find(s.batch, s.context)) is not None
        }

    def over_peer(self, peer: Peer) -> dict[tuple[int, int], float]:
        """``saw_int4``'s tokens/s over a peer's, by batch and context."""
        ours = self.engine("saw_int4")
        found = [(step, ours.find(step.batch, step.context)) for step in peer.steps] if ours else []
        return {(step.batch, step.context): step.step_us / mine.median_us for step, mine in found if mine}

    @property
    def int4_ratio(self) -> float | None:
        """The largest of ``saw_int4``'s step times over ``int4``'s."""
        return max((1 / x for x in self.speedups("int4").values()), default=None)

    @property
    def speedup(self) -> float | None:
        """Over ``fp16`` at 64 x 8192."""
        return self.speedups("fp16").get((64, 8192))

    @property
    def least_speedup(self) -> float | None:
        """Over ``fp16``, at the batch and context where it is least."""
        return min(self.speedups("fp16").values(), default=None)

    @property
    def capacity(self) -> float | None:
        """Tokens of ``saw_int4`` over those of ``fp16`` in a pool of the same bytes."""
        ours, theirs = self.engine("saw_int4"), self.engine("fp16")
        return None if ours is None or theirs is None else theirs.bytes_per_token / ours.bytes_per_token

    @property
    def busy(self) -> float | None:
        """The GPU's share of the time at batch 64 through the whole runtime, with ``saw_int4``."""
        ours = self.engine("saw_int4")
        return None if ours is None or ours.loop is None or ours.loop.batch != LOOP_BATCH else ours.loop.busy

    @property
    def startup(self) -> float | None:
        """Seconds of a start beyond reading the engine's file, with ``saw_int4``."""
        ours = self.engine("saw_int4")
        return None if ours is None or ours.start_up is None else ours.start_up.open_s - ours.start_up.read_s
