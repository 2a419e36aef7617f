"""One run: each case's contenders are prepared, their best variants chosen, and all timed in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Protocol

from benchmarks.common.target import TargetResult
from benchmarks.kernels.cases import UNITS, Case, Target
from benchmarks.kernels.record import Bandwidth, CaseResult, Measurement
from saw_trtllm.errors import SawError

logger = logging.getLogger(__name__)

Launch = Callable[[], Any]

#: A sample of a 4-bit contender's output lies within 0.99 of fp32 attention on random keys and values. Below this, what
#: was timed is not attention.
MIN_COSINE = 0.9


@dataclass
class Contender:
    """What one side runs in a case.

    Attributes
    ----------
    name : str
    variants : dict of str to callable
        What sets up a launch, by what tells it from the others: the fastest counts.
    bytes : int
        That must move, at least.
    flops : int
        0 where memory is what bounds it.
    cosine : callable, optional
        After a run: how near the output is to what it should be.
    layers : int
        That a launch runs one after the other: bytes and times are of one.
    """

    name: str
    variants: dict[str, Callable[[], Launch]]
    bytes: int
    flops: int = 0
    cosine: Callable[[], float] | None = None
    layers: int = 1


class MissingError(Exception):
    """A contender that cannot take part in a case: says why."""


class Timer(Protocol):
    """How launches are timed: :class:`benchmarks.kernels.timing.CudaTimer`, or a test's."""

    def prepare(self, launch: Launch) -> Any:
        """Run once, and capture: what the other methods take; ``captured`` tells whether it is a CUDA graph."""

    def estimate(self, prepared: Any) -> float:
        """A first median in µs."""

    def measure(self, prepared: Sequence[Any]) -> list[list[float]]:
        """Times in µs of each, taken in turn."""


def run_case(
    case: Case,
    contenders: Iterable[tuple[str, Callable[[], Contender]]],
    timer: Timer,
    bandwidth: Bandwidth,
) -> CaseResult:
    """Time a case's contenders.

    Parameters
    ----------
    case : Case
    contenders : iterable of (str, callable)
        Name, and what sets it up; raises :class:`MissingError` if it cannot.
    timer : Timer
    bandwidth : Bandwidth
        Of the card: shares are of ``copy_gbps`` for the write, of ``read_gbps`` for decode.
    """
    missing: dict[str, str] = {}
    ready: list[tuple[Contender, _Choice]] = []
    for name, set_up in contenders:
        try:
            contender = set_up()
            ready.append((contender, _best(contender, timer)))
        except (MissingError, SawError) as e:
            missing[name] = str(e)
    times = timer.measure([choice.prepared for _, choice in ready])
    peak = {"write": bandwidth.copy_gbps, "prefill": None}.get(case.suite, bandwidth.read_gbps)
    measurements = [
        _measurement(contender, choice, sample, peak) for (contender, choice), sample in zip(ready, times, strict=True)
    ]
    by_name = {m.contender: m for m in measurements}
    return CaseResult(
        suite=case.suite,
        name=case.name,
        batch=case.batch,
        tokens=case.tokens,
        history=case.history,
        num_heads=case.heads.num_heads,
        num_kv_heads=case.heads.num_kv_heads,
        head_dim=case.heads.head_dim,
        tokens_per_block=case.tokens_per_block,
        measurements=measurements,
        missing=missing,
        targets=[judge(case.suite, target, by_name) for target in case.targets],
    )


@dataclass
class _Choice:
    """A contender's fastest variant, as the timer prepared it, and why others could not run."""

    detail: str
    prepared: Any
    cosine: float | None
    failed: dict[str, str]


def _best(contender: Contender, timer: Timer) -> _Choice:
    prepared: dict[str, Any] = {}
    cosines: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for detail, set_up in contender.variants.items():
        try:
            variant = timer.prepare(set_up())
            cosines[detail] = _checked(contender)
            prepared[detail] = variant
        except Exception as e:  # what a peer raises for a variant that this card or version lacks is its own
            failed[detail] = first_line(e)
            logger.warning("%s %s: %s", contender.name, detail, failed[detail])
    if not prepared:
        raise MissingError("; ".join(f"{detail}: {why}" if detail else why for detail, why in failed.items()))
    detail = next(iter(prepared))
    if len(prepared) > 1:
        detail = min(prepared, key=lambda each: timer.estimate(prepared[each]))
    return _Choice(detail, prepared[detail], cosines[detail], failed)


def _checked(contender: Contender) -> float | None:
    """The cosine of what was just run, which must not be wrong."""
    cosine = contender.cosine() if contender.cosine else None
    if cosine is not None and not cosine >= MIN_COSINE:
        raise MissingError(f"its output is wrong, with a cosine of {cosine:.4f} to fp32 attention")
    return cosine


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, on one line."""
    if isinstance(error, MissingError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _measurement(contender: Contender, choice: _Choice, times: list[float], peak: float | None) -> Measurement:
    tenths = [each / contender.layers for each in quantiles(times, n=10, method="inclusive")]
    median = tenths[4]
    gbps = contender.bytes / median / 1e3
    return Measurement(
        contender=contender.name,
        detail=choice.detail,
        failed=choice.failed,
        median_us=round(median, 3),
        p10_us=round(tenths[0], 3),
        p90_us=round(tenths[8], 3),
        repetitions=len(times),
        cuda_graph=choice.prepared.captured,
        bytes=contender.bytes,
        gbps=round(gbps, 1),
        share=None if peak is None else round(gbps / peak, 4),
        tflops=round(contender.flops / median / 1e6, 1) if contender.flops else None,
        cosine=None if choice.cosine is None else round(choice.cosine, 5),
    )


def judge(suite: str, target: Target, measured: dict[str, Measurement]) -> TargetResult:
    """Hold a target against a case's measurements."""
    mine, other = measured.get(target.contender), measured.get(target.against or "")
    value = None
    if mine is not None:
        if target.quantity == "time":
            value = mine.median_us
        elif target.quantity == "share":
            value = mine.share
        elif other is not None and target.quantity == "extra":
            value = round(mine.median_us - other.median_us, 3)
        elif other is not None:
            value = mine.median_us / other.median_us
            value = round(1 / value if target.quantity == "speedup" else value, 4)
    return target.bound.judge(target.must(suite), value, UNITS[target.quantity])
