"""What a runtime tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass
class Stats:
    """Gauges and counters of a runtime.

    Attributes
    ----------
    num_running, num_waiting : int
        Sequences now.
    used_blocks, free_blocks, max_blocks, tokens_per_block : int
        The KV cache. Free blocks may still hold prefixes for reuse.
    host_blocks, max_host_blocks : int
        Blocks that the host holds, and may hold.
    stored_blocks_total, loaded_blocks_total : int
        Blocks copied to the host and back.
    loaded_tokens_total : int
        Tokens whose blocks came back, of one block table or of several.
    disk_written_blocks_total, disk_read_blocks_total : int
        Blocks written to files, and read from them.
    evicted_blocks_total, host_evicted_blocks_total : int
        Blocks that could be found in the pool, or on the host, and were given up for others.
    block_bytes : int
        Bytes of a block: what each of those moved.
    requests_total, preemptions_total, restarts_total : int
        Requests that came, sequences that had to make room, and times that the executor lost a rank and began anew.
    prompt_tokens_total, reused_tokens_total, generated_tokens_total : int
        Tokens of prompts, those of them found in the cache, and generated tokens.
    ttft_seconds_sum, ttft_count : float, int
        Time from a request's arrival to its first token.
    """

    num_running: int = 0
    num_waiting: int = 0
    used_blocks: int = 0
    free_blocks: int = 0
    max_blocks: int = 0
    tokens_per_block: int = 0
    host_blocks: int = 0
    max_host_blocks: int = 0
    stored_blocks_total: int = 0
    loaded_blocks_total: int = 0
    loaded_tokens_total: int = 0
    disk_written_blocks_total: int = 0
    disk_read_blocks_total: int = 0
    evicted_blocks_total: int = 0
    host_evicted_blocks_total: int = 0
    block_bytes: int = 0
    requests_total: int = 0
    preemptions_total: int = 0
    restarts_total: int = 0
    prompt_tokens_total: int = 0
    reused_tokens_total: int = 0
    generated_tokens_total: int = 0
    ttft_seconds_sum: float = 0.0
    ttft_count: int = 0

    @property
    def hit_rates(self) -> dict[str, float]:
        """The share of all prompts' tokens that was found in each tier: "pool", "host" and "disk".

        What came back from the host is counted once for all who find it, and of that what was read from the disk before
        by the share of its blocks.
        """
        loaded = min(self.loaded_tokens_total, self.reused_tokens_total)
        read = loaded * min(self.disk_read_blocks_total / max(self.loaded_blocks_total, 1), 1)
        tokens = {"pool": self.reused_tokens_total - loaded, "host": loaded - read, "disk": read}
        return {tier: count / max(self.prompt_tokens_total, 1) for tier, count in tokens.items()}

    def since(self, before: Stats) -> Stats:
        """The gauges as they are, and what the counters have counted since ``before``."""
        counted = [f.name for f in fields(self) if f.name.endswith(("_total", "_sum", "_count"))]
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counted})
