"""What the kernels' benchmark measures and what it must reach: shapes and targets are data, and need no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from benchmarks.common.target import Limit, Unit
from saw_trtllm.errors import ConfigError

Suite = Literal["decode", "write", "prefill", "layers"]
SUITES: tuple[str, ...] = get_args(Suite)

#: Our kernels by the format of the cache; ``bf16`` is kv ``fp16`` with rows of bfloat16. ``folded`` is the write of
#: ``saw_int4`` as engines do it, V's rotation being folded into their weights, and ``framed`` that of calibrated ones.
OURS = ("saw_int4", "saw_k8v4", "folded", "framed", "int4", "bf16")
#: What others cache in 8 bits, the fastest of which is "the fp8 peer"; XQA is TensorRT-LLM's own kernel.
FP8_PEERS = ("xqa_fp8", "flashinfer_fp8")
#: All that come with the package flashinfer.
FLASHINFER_PEERS = (*FP8_PEERS, "xqa", "flashinfer")
PEERS = (*FLASHINFER_PEERS, "official")
LABELS = {
    "saw_int4": "saw_int4",
    "saw_k8v4": "saw_k8v4",
    "folded": "saw_int4, V folded",
    "framed": "saw_int4, frames",
    "int4": "int4",
    "bf16": "bf16 rows",
    "xqa_fp8": "XQA fp8",
    "flashinfer_fp8": "FlashInfer fp8",
    "xqa": "XQA bf16",
    "flashinfer": "FlashInfer bf16",
    "official": "official Triton INT4",
}

#: What bounds a suite, where it is memory.
BOUNDS = {"decode": "of read bandwidth", "write": "of copy bandwidth", "layers": "of read bandwidth"}
UNITS: dict[str, Unit] = {"time": "µs", "share": "%", "ratio": "x", "speedup": "x", "extra": "µs"}

#: KV length of each sequence of a write of single tokens, and new tokens of each sequence of larger ones.
WRITE_CONTEXT = 1024
WRITE_CHUNK = 2048
#: Of the suite ``layers``: a write and a decode of each in one graph, whose time is given by layer.
LAYERS = 32


@dataclass(frozen=True)
class Heads:
    """Shape of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}"


LLAMA = Heads(32, 8, 128)


@dataclass(frozen=True)
class Target:
    """A number that a contender must reach in a case.

    Attributes
    ----------
    contender : str
    quantity : {"time", "share", "ratio", "speedup", "extra"}
        Median in µs; share of the bandwidth that bounds the suite; time over ``against``'s time; ``against``'s time
        over it; µs more than ``against``.
    limit : float
        The most for time, ratio and extra, the least for share and speedup.
    against : str, optional
        The contender that ratio, speedup and extra compare with.
    """

    contender: str
    quantity: Literal["time", "share", "ratio", "speedup", "extra"]
    limit: float
    against: str | None = None

    @property
    def bound(self) -> Limit:
        """The limit with its side."""
        return Limit(self.limit, least=self.quantity in ("share", "speedup"))

    def must(self, suite: str) -> str:
        """In words."""
        name, limit = LABELS[self.contender], f"{self.limit:g}"
        if self.quantity == "time":
            return f"{name}: at most {limit} µs"
        if self.quantity == "share":
            return f"{name}: at least {100 * self.limit:g} % {BOUNDS[suite]}"
        other = LABELS[self.against or ""]
        if self.quantity == "extra":
            return f"{name}: at most {limit} µs more than {other}"
        if self.quantity == "ratio":
            return f"{name}: at most {limit}x the time of {other}"
        return f"{name}: at least {limit}x the speed of {other}"


@dataclass(frozen=True)
class Case:
    """One shape, measured for all contenders in turn.

    Attributes
    ----------
    suite : {"decode", "write", "prefill", "layers"}
    batch : int
        Sequences.
    tokens : int
        New tokens of the step, of all sequences.
    history : int
        Tokens of each sequence in the pool before the step's own.
    heads : Heads
    contenders : tuple of str
        Of :data:`OURS` and :data:`PEERS`.
    targets : tuple of Target
    quick : bool
        Part of a quick run.
    """

    suite: Suite
    batch: int
    tokens: int
    history: int
    contenders: tuple[str, ...]
    heads: Heads = LLAMA
    targets: tuple[Target, ...] = ()
    quick: bool = False
    tokens_per_block: int = 64

    @property
    def name(self) -> str:
        """Unique among the cases of a suite."""
        if self.suite == "decode":
            heads = "" if self.heads == LLAMA else f" {self.heads}"
            return f"{self.batch}x{self.context}{heads}"
        if self.suite == "layers":
            return f"{self.batch}x{self.context}"
        return str(self.tokens) if self.suite == "write" else f"{self.tokens} after {self.history}"

    @property
    def chunk(self) -> int:
        """New tokens of each sequence."""
        return self.tokens // self.batch

    @property
    def context(self) -> int:
        """KV length of each sequence, with the step's tokens."""
        return self.history + self.chunk


def _decode(batch: int, context: int, *targets: Target, heads: Heads = LLAMA, quick: bool = False) -> Case:
    peers = PEERS if heads == LLAMA else ("flashinfer",)
    within = Target("saw_int4", "ratio", 1.01, "int4")
    contenders = ("saw_int4", "int4", "bf16", *peers)
    if heads == LLAMA:
        contenders = ("saw_int4", "saw_k8v4", "int4", "bf16", *peers)
    return Case("decode", batch, batch, context - 1, contenders, heads, (*targets, within), quick)


def _decode_cases() -> list[Case]:
    large = (
        Target("saw_int4", "share", 0.90),
        Target("saw_int4", "speedup", 3.4, "flashinfer"),
        Target("saw_int4", "speedup", 4.6, "official"),
        Target("bf16", "ratio", 1.08, "flashinfer"),
    )
    cases = []
    for batch, context, limit, over_xqa in ((64, 8192, 139, 2.15), (128, 4096, 140, 1.85), (256, 2048, 142, 1.9)):
        targets = Target("saw_int4", "time", limit), Target("saw_int4", "speedup", over_xqa, "xqa_fp8")
        cases.append(_decode(batch, context, *targets, *large, quick=batch == 64))
    cases.append(_decode(32, 16384, Target("saw_int4", "time", 146), *large))
    for batch, context, limit in (
        (32, 4096, 43),
        (8, 32768, 75.5),
        (8, 4096, 17.5),
        (1, 131072, 43),
        (1, 16384, 13),
        (1, 4096, 9),
    ):
        cases.append(_decode(batch, context, Target("saw_int4", "time", limit), quick=context == 4096))
    for heads in (Heads(32, 32, 128), Heads(64, 8, 128), Heads(16, 2, 256), Heads(32, 8, 64)):
        share = {1: 0.78, 4: 0.83, 8: 0.85}[heads.group]
        cases.append(_decode(64, 8192, Target("saw_int4", "share", share), heads=heads))
    return cases


def _write_cases() -> list[Case]:
    contenders = ("saw_int4", "folded", "framed", "int4", "official")
    small = (Target("saw_int4", "ratio", 1.05, "int4"), Target("saw_int4", "ratio", 0.5, "official"))
    cases = []
    for tokens in (1, 4, 8, 16, 64, 256):
        quick = tokens in (1, 256)
        targets = (*small, Target("framed", "extra", 1.0, "folded")) if tokens <= 64 else small
        cases.append(Case("write", tokens, tokens, WRITE_CONTEXT - 1, contenders, targets=targets, quick=quick))
    for tokens in (2048, 8192, 32768):
        last = tokens == 32768
        targets = (
            Target("saw_int4", "share", 0.85),
            Target("folded", "share", 0.85),
            Target("framed", "ratio", 1.15, "folded"),
        )
        targets = targets if last else ()
        cases.append(Case("write", tokens // WRITE_CHUNK, tokens, 0, contenders, targets=targets, quick=last))
    return cases


def _prefill_cases() -> list[Case]:
    contenders = ("saw_int4", "bf16", "flashinfer")
    targets = (Target("saw_int4", "speedup", 0.97, "flashinfer"),)
    cases = [Case("prefill", 1, 8192, 0, contenders, targets=targets, quick=True)]
    for history in (0, 4096, 8192, 16384, 32768, 65536, 131072):
        aimed = history in (8192, 32768, 131072)
        quick = history == 32768
        cases.append(Case("prefill", 1, 2048, history, contenders, targets=targets if aimed else (), quick=quick))
    return cases


def _layers_cases() -> list[Case]:
    limits = {(1, 4096): 12.5, (8, 4096): 22, (64, 8192): 142}
    return [
        Case(
            "layers", batch, batch, context - 1, ("saw_int4",), targets=(Target("saw_int4", "time", limit),), quick=True
        )
        for (batch, context), limit in limits.items()
    ]


CASES: tuple[Case, ...] = (*_decode_cases(), *_write_cases(), *_prefill_cases(), *_layers_cases())


def select_cases(suites: Sequence[str], peers: Sequence[str], quick: bool) -> list[Case]:
    """The cases of some suites, with the contenders to be measured.

    Parameters
    ----------
    suites : sequence of str
        Of :data:`SUITES`.
    peers : sequence of str
        Those of :data:`PEERS` that are there.
    quick : bool
        Only a few cases of each suite.

    Raises
    ------
    ConfigError
        If a suite or a peer is unknown.
    """
    for kind, given, known in (("suite", suites, SUITES), ("peer", peers, PEERS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{kind} {name!r} is unknown: choose among {', '.join(known)}")
    absent = set(PEERS) - set(peers)
    return [
        replace(
            case,
            contenders=tuple(c for c in case.contenders if c not in absent),
            targets=tuple(t for t in case.targets if t.against not in absent),
        )
        for case in CASES
        if case.suite in suites and (case.quick or not quick)
    ]
