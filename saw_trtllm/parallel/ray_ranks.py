"""Ranks as actors of Ray: the one file that imports it, and only when ranks are started."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from saw_trtllm.errors import BackendUnavailableError, EngineError
from saw_trtllm.parallel.rank import RankSpec, run_rank

#: Seconds that Ray may take to find room for the ranks.
PLACEMENT_TIMEOUT = 60.0
#: Seconds after which the wait for it looks whether it is to end.
_PATIENCE = 0.5
#: No reports to Ray's makers; and its own 10 seconds for the first processes are short on a machine that is busy.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "60"}
#: Ray's releases whose interface this is.
_SUPPORTED = ((2, 40), (3, 0))


class RayRanks:
    """The ranks of a group in a placement group of Ray, on as few machines as it can.

    See :class:`saw_trtllm.parallel.group.RankProcesses`.

    Parameters
    ----------
    size : int
        Ranks.
    needs_gpus : bool
        Whether each has a GPU of its own.
    ended : threading.Event
        Ends the wait for room.

    Raises
    ------
    BackendUnavailableError
        If Ray is not installed, is of another release, or cannot be reached.
    EngineError
        If the cluster has no room, or the event came first.
    """

    def __init__(self, size: int, needs_gpus: bool, ended: threading.Event) -> None:
        self._ray = ray = connect(num_cpus=size)
        self._resources = {"CPU": 1.0, "GPU": 1.0} if needs_gpus else {"CPU": 1.0}
        has = ray.cluster_resources()
        for name, each in self._resources.items():
            if has.get(name, 0) < size * each:
                raise EngineError(
                    f"the engine is split over {size} ranks, a {name} each, and the Ray cluster has "
                    f"{has.get(name, 0):g}: add machines to it, or build the engine anew with a smaller --tp_size"
                )
        self._runs: list[Any] = []
        self._group = ray.util.placement_group([self._resources] * size, strategy="PACK")
        deadline = time.monotonic() + PLACEMENT_TIMEOUT
        while not (placed := self._group.wait(_PATIENCE)) and time.monotonic() < deadline and not ended.is_set():
            pass
        if not placed:
            self.end()
            raise EngineError(
                f"the Ray cluster has had no room for {size} ranks within {PLACEMENT_TIMEOUT:g} s: end what else runs "
                "there, or add machines to it"
            )
        nodes = ray.util.placement_group_table(self._group)["bundles_to_node_id"].values()
        here = ray.get_runtime_context().get_node_id()
        self.host: str | None = None if set(nodes) == {here} else ray.util.get_node_ip_address()

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Start an actor for each rank.

        Raises
        ------
        EngineError
            If Ray cannot.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor, ranks = self._ray.remote(_Rank), []
        for spec in specs:
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=spec.rank)
            cpus, gpus = self._resources["CPU"], self._resources.get("GPU", 0)
            ranks.append(actor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place).remote())
        try:
            places = self._ray.get([rank.place.remote() for rank in ranks])
        except self._ray.exceptions.RayError as e:
            raise EngineError(f"Ray could not start the ranks ({str(e).splitlines()[0]}): see its logs") from e
        for rank, spec, (here, _) in zip(ranks, specs, places, strict=True):
            visible = [gpu for node, gpus in places if node == here for gpu in gpus]
            self._runs.append((rank, rank.run.remote(spec, visible)))

    def failure(self) -> str | None:
        """The first that has ended."""
        for number, (_, run) in enumerate(self._runs):
            if self._ray.wait([run], timeout=0)[0]:
                try:
                    self._ray.get(run)
                    return f"rank {number} has ended: see its log"
                except self._ray.exceptions.RayError as e:
                    return f"rank {number} has ended ({str(e).splitlines()[0]}): see its log"
        return None

    def end(self) -> None:
        """Have Ray kill them: a placement group takes its processes along, whatever they do."""
        with suppress(Exception):  # Ray itself may have gone, and they with it
            self._ray.util.remove_placement_group(self._group)
            for _, run in self._runs:
                self._ray.wait([run])


class _Rank:
    """An actor of Ray."""

    def place(self) -> tuple[str, list[str]]:
        """Its machine, and the GPUs that it was given."""
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids().get("GPU", [])

    def run(self, spec: RankSpec, gpus: list[str]) -> None:
        """Be a rank that sees the GPUs of all ranks of its machine, in their order: it reads the others' memory."""
        import ray

        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        run_rank(spec)
        ray.actor.exit_actor()  # an actor outlives its calls, and the leader waits for its process to end


def connect(num_cpus: int) -> Any:
    """Ray's module, connected: to what this process is connected to, to RAY_ADDRESS, or to a Ray of its own here.

    Parameters
    ----------
    num_cpus : int
        That a Ray of its own is to have at least.

    Raises
    ------
    BackendUnavailableError
        If Ray is not installed, is of another release, or cannot be reached.
    """
    try:
        import ray
    except ImportError as e:
        raise BackendUnavailableError(
            "the ranks of a tensor parallel engine are started by Ray, which is not installed: pip install "
            "'saw-trtllm[ray]', or give parallel_config={'ranks': 'processes'} (--ranks processes) on one machine"
        ) from e
    release = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if not _SUPPORTED[0] <= release < _SUPPORTED[1]:
        raise BackendUnavailableError(
            f"Ray {ray.__version__} is installed and 2.40 or newer, but not 3, is needed: pip install 'saw-trtllm[ray]'"
        )
    if ray.is_initialized():
        return ray
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cpus = max(num_cpus, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as e:
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        raise BackendUnavailableError(f"Ray does not start or answer {where} ({e}): see docs/scale.md") from e
    return ray
