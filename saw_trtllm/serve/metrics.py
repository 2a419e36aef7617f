"""The metrics on Triton's metrics port: their names, and where their values come from.

Where TensorRT-LLM's Triton models have a metric, its name and labels are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from saw_trtllm.runtime.stats import Stats

GAUGE, COUNTER = "GAUGE", "COUNTER"

REQUESTS = "nv_trt_llm_request_metrics"
BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
HIT_RATE = "saw_hit_rate"


class Metric(NamedTuple):
    """A time series.

    Attributes
    ----------
    family : str
        Its name.
    labels : dict
        Besides ``model`` and ``version``, which all have.
    kind : {"GAUGE", "COUNTER"}
    value : callable
        Takes the runtime's stats.
    doc : str
    """

    family: str
    labels: Mapping[str, str]
    kind: str
    value: Callable[[Stats], float]
    doc: str


def _requests(request_type: str, value: Callable[[Stats], float], doc: str) -> Metric:
    return Metric(REQUESTS, {"request_type": request_type}, GAUGE, value, doc)


def _blocks(block_type: str, value: Callable[[Stats], float], doc: str) -> Metric:
    return Metric(BLOCKS, {"kv_cache_block_type": block_type}, GAUGE, value, doc)


def _counter(name: str, value: Callable[[Stats], float], doc: str) -> Metric:
    return Metric(name, {}, COUNTER, value, doc)


def _hit_rate(tier: str, doc: str) -> Metric:
    return Metric(HIT_RATE, {"tier": tier}, GAUGE, lambda s: s.hit_rates[tier], doc)


def _moved(name: str, blocks: Callable[[Stats], float], doc: str) -> tuple[Metric, Metric]:
    return (
        _counter(f"saw_{name}_blocks_total", blocks, f"blocks {doc}"),
        _counter(f"saw_{name}_bytes_total", lambda s: blocks(s) * s.block_bytes, "their bytes"),
    )


METRICS = (
    _requests("active", lambda s: s.num_running + s.num_waiting, "requests that are not finished"),
    _requests("scheduled", lambda s: s.num_running, "requests that run"),
    _requests("waiting", lambda s: s.num_waiting, "requests that wait for blocks or for a place in the batch"),
    _blocks("max", lambda s: s.max_blocks, "blocks of the KV cache"),
    _blocks("used", lambda s: s.used_blocks, "blocks that requests hold"),
    _blocks("free", lambda s: s.free_blocks, "the others; they may still hold prefixes for reuse"),
    _blocks("fraction", lambda s: s.used_blocks / max(s.max_blocks, 1), "used / max"),
    _blocks("tokens_per", lambda s: s.tokens_per_block, "tokens of a block"),
    _blocks("host", lambda s: s.host_blocks, "blocks that the host holds"),
    *_moved("stored", lambda s: s.stored_blocks_total, "copied to the host"),
    *_moved("loaded", lambda s: s.loaded_blocks_total, "that came back from it"),
    *_moved("disk_written", lambda s: s.disk_written_blocks_total, "written to files"),
    *_moved("disk_read", lambda s: s.disk_read_blocks_total, "read from them"),
    _counter("saw_evicted_blocks_total", lambda s: s.evicted_blocks_total, "blocks of the pool given up for others"),
    _counter("saw_host_evicted_blocks_total", lambda s: s.host_evicted_blocks_total, "blocks of the host given up"),
    _counter("saw_requests_total", lambda s: s.requests_total, "requests that were accepted"),
    _counter("saw_prompt_tokens_total", lambda s: s.prompt_tokens_total, "tokens of their prompts"),
    _counter("saw_reused_tokens_total", lambda s: s.reused_tokens_total, "those of them that were found in the cache"),
    _hit_rate("pool", "share of the prompts' tokens that was found in the pool"),
    _hit_rate("host", "and that came back from the host"),
    _hit_rate("disk", "and that was read from files"),
    _counter("saw_generated_tokens_total", lambda s: s.generated_tokens_total, "tokens generated"),
    _counter("saw_preemptions_total", lambda s: s.preemptions_total, "requests put back for want of blocks"),
    _counter("saw_restarts_total", lambda s: s.restarts_total, "times that a rank, and all that had begun, was lost"),
    _counter(
        "saw_time_to_first_token_seconds_sum", lambda s: s.ttft_seconds_sum, "seconds from arrival to first token"
    ),
    _counter("saw_time_to_first_token_seconds_count", lambda s: s.ttft_count, "how many first tokens those are of"),
)

_FAMILY_DOCS = {
    REQUESTS: "Requests of the runtime",
    BLOCKS: "Blocks of the KV cache",
    HIT_RATE: "Prompts' tokens found, by tier",
}


class MetricsReporter:
    """Sets Triton's metrics from the runtime's stats.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    model, version : str
        Labels of every metric.
    """

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        common = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._series: list[tuple[Metric, Any]] = []
        for metric in METRICS:
            if metric.family not in self._families:
                self._families[metric.family] = pb_utils.MetricFamily(
                    name=metric.family,
                    description=_FAMILY_DOCS.get(metric.family, metric.doc),
                    kind=getattr(pb_utils.MetricFamily, metric.kind),
                )
            series = self._families[metric.family].Metric(labels={**metric.labels, **common})
            self._series.append((metric, series))
        self._last = [0.0] * len(self._series)

    def update(self, stats: Stats) -> None:
        """Report what has changed."""
        for i, (metric, series) in enumerate(self._series):
            value = float(metric.value(stats))
            if metric.kind == GAUGE and value != self._last[i]:
                series.set(value)
            elif metric.kind == COUNTER and value > self._last[i]:
                series.increment(value - self._last[i])
            self._last[i] = value


def table() -> str:
    """The metrics as a table in Markdown."""
    rows = ["| name | labels | kind | |", "|---|---|---|---|"]
    for m in METRICS:
        labels = ", ".join(f'{k}="{v}"' for k, v in m.labels.items())
        rows.append(f"| `{m.family}` | {f'`{labels}`' if labels else ''} | {m.kind.lower()} | {m.doc} |")
    return "\n".join(rows)
