"""A rank's process: it makes the calls that the leader makes, on an executor of its own, and decides nothing."""

from __future__ import annotations

import logging
import os
import pickle
import platform
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saw_trtllm.backends.registry import open_executor
from saw_trtllm.engine.config import EngineConfig, engine_file, weights_file
from saw_trtllm.errors import EngineError, RankError, SawError
from saw_trtllm.parallel.channel import LeaderGoneError, RankChannel
from saw_trtllm.parallel.codec import StepDecoder
from saw_trtllm.plan.checksums import verify_engine
from saw_trtllm.plan.ranks import build_id
from saw_trtllm.runtime.collectives import Rendezvous, join
from saw_trtllm.runtime.door import Address
from saw_trtllm.runtime.executor import Executor, PendingStep, StepOutput
from saw_trtllm.runtime.host_cache import PendingTransfer
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSpec:
    """What a rank's process is started with.

    Attributes
    ----------
    rank, size : int
    folder : str
        The engine folder, which lies at the same path on every machine.
    address : Address
        Where the leader listens.
    """

    rank: int
    size: int
    folder: str
    address: Address


class Opening(NamedTuple):
    """How the ranks open the engine.

    Attributes
    ----------
    kv_cache : KvCacheConfig
    meeting : Address
        Where the ranks meet rank 0.
    verify : bool
        Whether each compares its engine file with its checksum: it may not be the file that the leader sees.
    timeout : float
        Seconds that the ranks wait for one another.
    """

    kv_cache: KvCacheConfig
    meeting: Address
    verify: bool
    timeout: float


class Opened(NamedTuple):
    """What a rank says of the engine that it has opened; see :class:`saw_trtllm.runtime.executor.Executor`.

    Attributes
    ----------
    num_blocks, num_host_blocks, num_ready_host_blocks, asynchronous
    pid : int
        Of its process.
    """

    num_blocks: int
    num_host_blocks: int
    num_ready_host_blocks: int
    asynchronous: bool
    pid: int


class Taken(NamedTuple):
    """A step's result.

    Attributes
    ----------
    output : StepOutput
        Of rank 0 all of it, of the others the tokens.
    num_transferred : int
        Transfers that are done.
    num_ready_host_blocks : int
    """

    output: StepOutput
    num_transferred: int
    num_ready_host_blocks: int


def run_rank(spec: RankSpec) -> None:
    """Be a rank, until the leader says that it is over or has gone."""
    channel = RankChannel(spec.address, spec.rank, spec.size)
    channel.end_with_leader()
    try:
        with ExitStack() as resources:
            _serve(spec, channel, resources)
    except LeaderGoneError:
        log.info("the leader of rank %d has gone", spec.rank)
    except Exception as e:
        log.exception("rank %d of %d failed", spec.rank, spec.size)
        with suppress(OSError):  # the leader may have gone too
            channel.say(e if isinstance(e, SawError) else RankError(f"{type(e).__name__}: {e}"))


def _serve(spec: RankSpec, channel: RankChannel, resources: ExitStack) -> None:
    folder = Path(spec.folder)
    config = EngineConfig.load(folder)
    with Rendezvous(channel.host) as meeting:
        channel.say((build_id(config), meeting.address))
        opening: Opening = pickle.loads(channel.receive().body)
        if opening.verify:
            _verify(folder, spec.rank)
        if spec.rank == 0:
            collectives = meeting.wait(spec.size, opening.timeout)
        else:
            collectives = join(opening.meeting, spec.rank, spec.size, opening.timeout)
    resources.callback(collectives.close)
    executor = open_executor(folder, config, opening.kv_cache, collectives)
    resources.callback(executor.shutdown)
    host_blocks = (executor.num_host_blocks, executor.num_ready_host_blocks)
    channel.say(Opened(executor.num_blocks, *host_blocks, executor.asynchronous, os.getpid()))
    _follow(executor, channel, StepDecoder(config.pool_layout), spec.rank)


def _follow(executor: Executor, channel: RankChannel, decoder: StepDecoder, rank: int) -> None:
    """Make the leader's calls, in its order."""
    steps: deque[PendingStep] = deque()
    transfers: deque[PendingTransfer] = deque()
    num_transferred = 0
    while True:
        _, command, body = channel.receive()
        if command == "launch":
            steps.append(executor.launch(*decoder.decode(body)))
        elif command == "draw":
            steps[-1].draw(decoder.decode_draws(body))
        elif command == "take":
            output = steps.popleft().result()
            while transfers and transfers[0].done():
                transfers.popleft()
                num_transferred += 1
            if rank != 0:
                output = StepOutput(output.token_ids, [], [])
            channel.say(Taken(output, num_transferred, executor.num_ready_host_blocks))
        elif command == "transfer":
            transfers.append(executor.transfer(*pickle.loads(body)))
        elif command == "wait":
            while num_transferred < pickle.loads(body):
                transfers.popleft().wait()
                num_transferred += 1
            channel.say(num_transferred)
        else:
            return


def _verify(folder: Path, rank: int) -> None:
    try:
        verify_engine(folder, only=(engine_file(rank), weights_file(rank)))
    except EngineError as e:
        raise EngineError(f"on {platform.node()}: {e}") from e
