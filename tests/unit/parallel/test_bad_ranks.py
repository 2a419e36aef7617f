"""What is wrong with ranks is said in one sentence before anything starts."""

import os
import shutil
import sys
import threading
import types

import pytest

from saw_trtllm import LLM
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError, RankError
from saw_trtllm.parallel import open as opening
from saw_trtllm.parallel import processes, ray_ranks
from saw_trtllm.parallel.ray_ranks import RayRanks
from saw_trtllm.plan.ranks import build_id, check_build
from saw_trtllm.plugins.gpus import Driver
from saw_trtllm.serve.openai.replicas import replicas
from tests.support.example import build_example


@pytest.fixture(scope="module")
def tp2(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("tp2"), kv="fp16", tp_size=2)


def fake_ray(version="2.60.0", **resources):
    ray = types.ModuleType("ray")
    ray.__version__ = version
    ray.is_initialized = lambda: True
    ray.cluster_resources = lambda: resources
    return ray


def test_a_missing_file_of_a_rank_is_named(tp2, tmp_path):
    folder = shutil.copytree(tp2, tmp_path / "engine")
    (folder / "rank1.engine").unlink()
    with pytest.raises(EngineError, match=r"lacks rank1\.engine of an engine that is split over 2 ranks"):
        LLM(folder, verify=False, parallel_config={"ranks": "processes"})


def test_blocks_of_ranks_do_not_go_to_the_disk(tp2, tmp_path):
    cache = {"host_cache_size": 1 << 20, "disk_cache_dir": tmp_path / "disk", "disk_cache_size": 1 << 24}
    with pytest.raises(ConfigError, match="disk_cache_dir is for engines of one rank"):
        LLM(tp2, kv_cache_config=cache, parallel_config={"ranks": "processes"})


@pytest.mark.parametrize("field", ["step_timeout", "start_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), "1"])
def test_a_time_that_is_none_is_rejected(tp2, field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*: it must be a number of seconds above 0"):
        LLM(tp2, parallel_config={field: value})


def test_too_few_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(processes, "Driver", types.SimpleNamespace(load=lambda: Driver((13, 0), [None])))
    with pytest.raises(EngineError, match="split over 2 ranks, a GPU each, and this machine has 1"):
        processes.LocalProcesses(2, True, threading.Event())


def test_a_cluster_without_enough_gpus_is_rejected(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(CPU=64.0, GPU=1.0))
    with pytest.raises(EngineError, match="split over 2 ranks, a GPU each, and the Ray cluster has 1: add machines"):
        RayRanks(2, True, threading.Event())


def test_a_cluster_that_stays_full_is_rejected(monkeypatch):
    """What was asked of it is taken back, so that nothing comes of it later."""
    ray, removed = fake_ray(CPU=64.0, GPU=8.0), []
    group = types.SimpleNamespace(wait=lambda seconds: False)
    ray.util = types.SimpleNamespace(
        placement_group=lambda *args, **kwargs: group, remove_placement_group=removed.append
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_ranks, "PLACEMENT_TIMEOUT", 0.0)
    with pytest.raises(EngineError, match="the Ray cluster has had no room for 2 ranks within 0 s: end what else runs"):
        RayRanks(2, True, threading.Event())
    assert removed == [group]


def test_the_cluster_that_is_named_is_joined_or_named(monkeypatch):
    ray, asked = fake_ray(CPU=64.0), []
    ray.is_initialized, ray.init = lambda: False, lambda **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_ranks.connect(2) is ray
    assert asked[0]["address"] == "head:6379"
    assert "num_cpus" not in asked[0], "a cluster has what it has"
    ray.init = lambda **options: ray.of_another_version
    with pytest.raises(BackendUnavailableError, match="Ray does not start or answer at RAY_ADDRESS=head:6379"):
        ray_ranks.connect(2)


def test_ray_that_is_missing_is_said(monkeypatch, tp2):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'saw-trtllm\[ray\]', or give parallel_config"):
        LLM(tp2)


@pytest.mark.parametrize("version", ["2.9.3", "3.0.0"])
def test_ray_of_another_release_is_said(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(version))
    with pytest.raises(BackendUnavailableError, match=f"Ray {version} is installed and 2.40 or newer"):
        RayRanks(2, False, threading.Event())


def test_ranks_of_another_build_are_named(tp2):
    ours = build_id(EngineConfig.load(tp2))
    older = b"0.0.1".ljust(32) + ours[32:]
    with pytest.raises(EngineError, match=r"rank 1 runs saw-trtllm 0\.0\.1 and the leader .*: install one release"):
        check_build(1, older, "the leader", ours)
    with pytest.raises(EngineError, match="rank 1 has another build of the engine than the leader: copy one engine"):
        check_build(1, ours[:32] + bytes(32), "the leader", ours)
    check_build(1, ours, "the leader", ours)


def test_a_rank_that_does_not_start_is_said_with_its_words(tp2, monkeypatch):
    class Broken(processes.LocalProcesses):
        code = "raise SystemExit(3)"

    monkeypatch.setitem(opening.LAUNCHERS, "processes", Broken)
    with pytest.raises(RankError, match=r"the process of rank \d has ended with exit code 3: see its log"):
        LLM(tp2, parallel_config={"ranks": "processes"})


def test_an_interrupt_of_the_terminal_is_for_the_leader_alone(tp2):
    with LLM(tp2, parallel_config={"ranks": "processes"}) as llm:
        assert not {os.getpgid(pid) for pid in llm.executor.pids} & {os.getpgid(0)}


def test_replicas_of_engines_with_several_gpus_need_ray():
    config = types.SimpleNamespace(tp_size=2, saw_int4=types.SimpleNamespace(backend="tensorrt"))
    spec = types.SimpleNamespace(config=lambda: config, options={"parallel_config": {"ranks": "processes"}})
    with pytest.raises(ConfigError, match="need --ranks ray, which gives each its GPUs"):
        replicas([spec], 2, [], [], 0, "load").__enter__()
