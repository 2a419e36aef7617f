"""``python -m benchmarks kernels``: our kernels beside their peers, on one GPU in one run."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.environment import describe, version_of
from benchmarks.common.record import Environment
from benchmarks.kernels import layers, paged_attention, rotate_quantize_kv
from benchmarks.kernels.cases import FLASHINFER_PEERS, OURS, Case, select_cases
from benchmarks.kernels.peers import FlashInfer, Official
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.record import Results
from benchmarks.kernels.run import Contender, first_line, run_case
from benchmarks.kernels.timing import FLUSH, CudaTimer, measure_bandwidth
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.ops.arrays import kernels

logger = logging.getLogger(__name__)

QUICK_REPETITIONS = 30


def run_kernels(
    suites: Sequence[str],
    peers: Sequence[str],
    official_dir: Path | None,
    *,
    quick: bool = False,
    commit: str | None = None,
    command: str = "python -m benchmarks kernels",
) -> Results:
    """Measure suites on the current GPU.

    Parameters
    ----------
    suites, peers : sequence of str
        Of :data:`~benchmarks.kernels.cases.SUITES` and :data:`~benchmarks.kernels.cases.PEERS`.
    official_dir : Path, optional
        Where the official kernels' files are; needed for that peer.
    quick : bool
        A few cases of each suite, with fewer repetitions.
    commit : str, optional
        For a tree without its git repository.
    command : str
        As it was typed, for the record.

    Raises
    ------
    SawError
        If there is no GPU, the kernels are not built, or a peer is not there.
    """
    cases = select_cases(suites, peers, quick)
    if not torch.cuda.is_available():
        raise BackendUnavailableError("PyTorch sees no CUDA GPU: the kernels are measured on one; check nvidia-smi")
    kernels()
    flashinfer = FlashInfer() if set(FLASHINFER_PEERS) & set(peers) else None
    official = Official(official_dir) if "official" in peers and official_dir else None
    environment = _environment(command, commit, flashinfer, official)
    with tqdm(total=len(cases), desc="compiling", unit="case", disable=None) as bar:
        if flashinfer:
            flashinfer.compile(cases)
        timer = CudaTimer(QUICK_REPETITIONS) if quick else CudaTimer()
        bandwidth = measure_bandwidth(timer)
        torch.cuda.empty_cache()
        results, aborted = [], None
        for case in cases:
            bar.set_description(f"{case.suite} {case.name}")
            try:
                results.append(run_case(case, _contenders(case, flashinfer, official), timer, bandwidth))
            except RuntimeError as e:
                # A kernel faulted, after which CUDA runs nothing more in this process, or memory ran out.
                logger.exception("%s %s", case.suite, case.name)
                aborted = (
                    f"{case.suite} {case.name} ended the run ({first_line(e)}): --peers none and --suite tell which "
                    f"contender it is"
                )
                break
            except KeyboardInterrupt:
                aborted = f"{case.suite} {case.name} was interrupted"
                break
            gc.collect()  # closures hold the case's tensors in cycles
            torch.cuda.empty_cache()
            bar.update()
    return Results(environment=environment, flush=FLUSH, bandwidth=bandwidth, cases=results, aborted=aborted)


def _environment(
    command: str, commit: str | None, flashinfer: FlashInfer | None, official: Official | None
) -> Environment:
    """Where kernels are measured, and beside which versions of the peers."""
    return describe(
        command,
        commit,
        gpu=torch.cuda.get_device_name(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=version_of("triton"),
        flashinfer=version_of("flashinfer-python") if flashinfer else None,
        official=official.digest if official else None,
    )


def _contenders(
    case: Case, flashinfer: FlashInfer | None, official: Official | None
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Each contender's name and what sets it up, on tensors that all of them share."""
    problem = None if case.suite == "write" else Problem.make(case)
    for name in case.contenders:
        if name in OURS:
            set_up = {
                "decode": paged_attention.decode,
                "prefill": paged_attention.prefill,
                "write": rotate_quantize_kv.write,
                "layers": layers.layers,
            }[case.suite]
        else:
            set_up = getattr(flashinfer if name in FLASHINFER_PEERS else official, case.suite)
        yield name, partial(set_up, problem or case, name)
