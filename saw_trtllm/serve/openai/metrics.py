"""Prometheus metrics of the server: the runtime's gauges and counters as they are, and times as histograms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from saw_trtllm.runtime.outputs import RequestOutput
from saw_trtllm.runtime.stats import Stats

_Number = tuple[str, Callable[[Stats], float]]


def _moved(name: str, doc: str, blocks: Callable[[Stats], float]) -> dict[str, _Number]:
    """Blocks that were moved, and their bytes."""
    return {
        f"{name}_blocks": (f"Blocks {doc}", blocks),
        f"{name}_bytes": (f"Bytes of the blocks {doc}", lambda s: blocks(s) * s.block_bytes),
    }


_GAUGES: dict[str, _Number] = {
    "saw_requests_running": ("Requests that run", lambda s: s.num_running),
    "saw_requests_waiting": ("Requests that wait for blocks or a place in the batch", lambda s: s.num_waiting),
    "saw_kv_blocks_used": ("Blocks of the KV cache that requests hold", lambda s: s.used_blocks),
    "saw_kv_blocks_max": ("Blocks of the KV cache", lambda s: s.max_blocks),
    "saw_kv_tokens_per_block": ("Tokens of a block", lambda s: s.tokens_per_block),
    "saw_host_blocks": ("Blocks that the host holds", lambda s: s.host_blocks),
    "saw_host_blocks_max": ("Blocks that it may hold", lambda s: s.max_host_blocks),
}
_COUNTERS: dict[str, _Number] = {
    "saw_requests": ("Requests that were accepted, one for each text", lambda s: s.requests_total),
    "saw_prompt_tokens": ("Tokens of their prompts", lambda s: s.prompt_tokens_total),
    "saw_reused_tokens": ("Those of them that were found in the cache", lambda s: s.reused_tokens_total),
    "saw_generation_tokens": ("Tokens generated", lambda s: s.generated_tokens_total),
    **_moved("saw_stored", "copied to the host", lambda s: s.stored_blocks_total),
    **_moved("saw_loaded", "that came back from it", lambda s: s.loaded_blocks_total),
    **_moved("saw_disk_written", "written to files", lambda s: s.disk_written_blocks_total),
    **_moved("saw_disk_read", "read from them", lambda s: s.disk_read_blocks_total),
    "saw_evicted_blocks": ("Blocks of the pool given up for others", lambda s: s.evicted_blocks_total),
    "saw_host_evicted_blocks": ("Blocks of the host given up", lambda s: s.host_evicted_blocks_total),
    "saw_preemptions": ("Requests put back for want of blocks", lambda s: s.preemptions_total),
    "saw_restarts": ("Times that a rank, and all that had begun, was lost", lambda s: s.restarts_total),
}
_FIRST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics(Collector):
    """The metrics of a server's models.

    Parameters
    ----------
    stats : dict of callable
        Gives the runtime's stats, by the model's name.
    """

    def __init__(self, stats: Mapping[str, Callable[[], Stats]]) -> None:
        self._stats = stats
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.first = self._histogram("saw_time_to_first_token_seconds", "From arrival to the first token", _FIRST)
        self.between = self._histogram("saw_inter_token_seconds", "Between tokens, as the client gets them", _BETWEEN)
        self.whole = self._histogram("saw_request_seconds", "From arrival to the end", _WHOLE)
        self.finished = Counter("saw_finished", "Texts that ended", ["model", "finish_reason"], registry=self.registry)
        self.errors = Counter("saw_errors", "Requests answered by an error", ["code"], registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """The runtime's numbers as they are now."""
        stats = {model: read() for model, read in self._stats.items()}
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, (doc, value) in names.items():
                metric = family(name, doc, labels=["model"])
                for model, numbers in stats.items():
                    metric.add_metric([model], value(numbers))
                yield metric
        hits = GaugeMetricFamily(
            "saw_hit_rate", "Share of the prompts' tokens found in a tier", labels=["model", "tier"]
        )
        for model, numbers in stats.items():
            for tier, rate in numbers.hit_rates.items():
                hits.add_metric([model, tier], rate)
        yield hits

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, doc, ["model"], buckets=buckets, registry=self.registry)


class Meter:
    """Takes the times of one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._first = metrics.first.labels(model)
        self._between = metrics.between.labels(model)
        self._whole = metrics.whole.labels(model)
        self._finished = metrics.finished
        self._model = model
        self._begin = time.monotonic()
        self._last: dict[int, float] = {}

    def piece(self, output: RequestOutput) -> None:
        """Note a piece that has come."""
        now = time.monotonic()
        for completion in output.outputs:
            last = self._last.get(completion.index)
            if last is None:
                self._first.observe(now - self._begin)
            elif completion.token_ids_diff:
                self._between.observe((now - last) / len(completion.token_ids_diff))
            self._last[completion.index] = now
            if completion.finish_reason is not None:
                self._finished.labels(self._model, completion.finish_reason).inc()
        if output.finished:
            self._whole.observe(now - self._begin)
