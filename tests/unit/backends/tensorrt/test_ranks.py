"""Which GPU is whose, and what is said where GPUs or NCCL are lacking; without either."""

import threading
from types import SimpleNamespace

import pytest

from saw_trtllm.backends.tensorrt import ranks
from saw_trtllm.backends.tensorrt.cuda import runtime
from saw_trtllm.errors import BackendUnavailableError, EngineError
from tests.support.ranks import local_group, on_ranks


@pytest.fixture
def machine(monkeypatch):
    """Makes one of so many GPUs; each thread has one in use."""

    def make(count):
        state = threading.local()

        def call(function, *arguments):
            if function is runtime.cudaSetDevice:
                (state.device,) = arguments
            if function is runtime.cudaGetDeviceProperties:
                return SimpleNamespace(uuid=SimpleNamespace(bytes=bytes([arguments[0]] * 16)))
            return count if function is runtime.cudaGetDeviceCount else state.device

        monkeypatch.setattr(ranks, "call", call)

        def use(collectives):
            ranks.use_gpu_of_rank(collectives)
            return state.device

        return use

    return make


def test_ranks_of_a_machine_have_a_gpu_each(machine):
    assert on_ranks(local_group(3), machine(4)) == [0, 1, 2]


def test_fewer_gpus_than_ranks(machine):
    sentence = "the engine is split over 4 ranks, a GPU each, and they have 2: run them on machines with as many GPUs"
    with pytest.raises(EngineError, match=sentence):
        on_ranks(local_group(4), machine(2))


@pytest.fixture
def nccl(monkeypatch):
    """Installs an NCCL for each rank, of these versions."""

    def install(*versions):
        monkeypatch.setattr(ranks, "load_nccl", lambda: None if None in versions else SimpleNamespace(**functions))

        def get_version(number):
            number._obj.value = versions[threading.current_thread().rank]
            return 0

        functions = {"ncclGetErrorString": SimpleNamespace(), "ncclGetVersion": get_version}

        def join(collectives):
            threading.current_thread().rank = collectives.rank
            ranks._Nccl(collectives)

        return join

    return install


@pytest.mark.parametrize(
    ("versions", "error", "sentence"),
    [
        ([None, None], BackendUnavailableError, "needs NCCL, which cannot be loaded: pip install nvidia-nccl-cu12"),
        (
            [21703, 21703],
            BackendUnavailableError,
            r"NCCL 2\.17 is installed and an engine of several ranks needs 2\.18",
        ),
        ([22809, 22907], EngineError, r"the ranks have NCCL 2\.28\.9, 2\.29\.7: install one version on all machines"),
    ],
)
def test_nccl_that_is_missing_old_or_of_two_versions(versions, error, sentence, nccl):
    with pytest.raises(error, match=sentence):
        on_ranks(local_group(2), nccl(*versions))
