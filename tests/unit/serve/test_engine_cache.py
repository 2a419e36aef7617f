"""Engines that saw-serve builds: kept by all that they depend on, and no longer than there is room."""

import fcntl
import json
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.backend import ReferenceBackend
from saw_trtllm.build import plan_build
from saw_trtllm.errors import ConfigError
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.serve import engine_cache
from saw_trtllm.serve.engine_cache import cached_engine, engine_key, uncached_engine
from tests.support.models import make_hf_model

ROOM = 1 << 40


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_hf_model(tmp_path_factory.mktemp("small"), "llama")[0]


@pytest.fixture
def model(small, tmp_path):
    return shutil.copytree(small, tmp_path / "model")


@pytest.fixture
def serve(tmp_path):
    """Use the cache once: the engine's folder, and whether it was there."""

    def serve(model, max_bytes=ROOM, **options):
        found = []
        options = {"max_batch_size": 4, "max_seq_len": 64, **options}
        build = BuildOptions(model_dir=model, backend="reference", **options)
        with cached_engine(build, tmp_path / "cache", max_bytes, lambda plan, there: found.append(there)) as folder:
            LLM(folder, kv_cache_config={"max_tokens": 64}).shutdown()
        return folder, found[0]

    return serve


def test_an_engine_that_one_uses_can_be_used_by_another(small, tmp_path, monkeypatch):
    def flock(file, how):  # fails where the other one would have to be waited for
        fcntl.flock(file, how | fcntl.LOCK_NB)

    monkeypatch.setattr(engine_cache, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))
    options = BuildOptions(model_dir=small, backend="reference", max_batch_size=4, max_seq_len=64)
    with cached_engine(options, tmp_path, ROOM) as first, cached_engine(options, tmp_path, ROOM) as second:
        assert first == second


def test_an_engine_is_built_once_and_anew_when_anything_changes(serve, model, monkeypatch):
    first, found = serve(model)
    assert not found
    assert serve(model) == (first, True)
    seen = {first}

    def changed(**options):
        folder, found = serve(model, **options)
        assert not found
        assert folder not in seen
        seen.add(folder)

    changed(max_batch_size=5)
    changed(max_seq_len=48)
    changed(kv="int4")
    changed(range_factor=0.95)
    changed(dtype="float16")
    monkeypatch.setattr(engine_cache, "__version__", "9.9.9")
    changed()
    monkeypatch.setattr(ReferenceBackend, "available", lambda self: "another machine")
    changed()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    changed()
    (model / "chat_template.jinja").write_text("x")
    changed()
    monkeypatch.setattr(engine_cache, "_SMALL", 0)
    monkeypatch.setattr(engine_cache, "_END", 16)
    changed()
    weights = model / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    changed()


def test_the_key_has_the_calibration_the_libraries_and_the_machine(model, tmp_path, monkeypatch):
    options = BuildOptions(model_dir=model, backend="reference", output_dir=tmp_path / "engine")
    plan = plan_build(options)
    calibration, library = tmp_path / "calib.safetensors", tmp_path / "lib" / "libsaw_kernels.so"
    library.parent.mkdir()
    library.write_bytes(b"one")
    monkeypatch.setattr(engine_cache, "library_path", lambda name: library)
    section = plan.config.saw_int4.model_copy(update={"backend": "tensorrt"})
    on_gpu = replace(plan, config=plan.config.model_copy(update={"saw_int4": section}))
    keys = [engine_key(plan, options), engine_key(on_gpu, options)]
    for content in (b"one", b"two"):
        calibration.write_bytes(content)
        keys.append(engine_key(plan, options.model_copy(update={"calibration": calibration})))
    library.write_bytes(b"two")  # built anew
    keys.append(engine_key(on_gpu, options))
    section = section.model_copy(update={"tensorrt_version": "10.6.0"})
    keys.append(engine_key(replace(plan, config=plan.config.model_copy(update={"saw_int4": section})), options))
    section = section.model_copy(update={"compute_capability": "10.0"})
    keys.append(engine_key(replace(plan, config=plan.config.model_copy(update={"saw_int4": section})), options))
    assert len(set(keys)) == len(keys)
    assert engine_key(plan, options) == keys[0]


def test_the_least_recently_used_goes_first_and_never_one_that_is_held(serve, model):
    first, _ = serve(model)
    second, _ = serve(model, max_seq_len=48)
    os.utime(f"{second}.lock", (1, 1))
    size = sum(file.stat().st_size for file in first.iterdir())
    third, _ = serve(model, max_batch_size=3, max_bytes=int(2.5 * size))
    assert [folder.is_dir() for folder in (first, second, third)] == [True, False, True]
    _, found = serve(model, max_bytes=0)
    assert found
    assert [folder.is_dir() for folder in (first, third)] == [True, False]


def test_two_that_want_the_same_engine_build_it_once(serve, model, monkeypatch):
    builds, real = [], engine_cache.build

    def build(plan):
        builds.append(plan.output_dir)
        real(plan)

    monkeypatch.setattr(engine_cache, "build", build)
    threads = [threading.Thread(target=serve, args=(model,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_without_a_cache_nothing_is_left(model):
    options = BuildOptions(model_dir=model, backend="reference", max_batch_size=4, max_seq_len=64)
    with uncached_engine(options) as folder, LLM(folder, kv_cache_config={"max_tokens": 64}) as llm:
        assert len(llm.generate([1], SamplingParams(max_tokens=2, ignore_eos=True)).outputs[0].token_ids) == 2
    assert not folder.exists()


def test_a_cache_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    options = BuildOptions(model_dir=model, backend="reference")
    cached = cached_engine(options, tmp_path / "file" / "cache", ROOM)
    with pytest.raises(ConfigError, match=r"cannot be written .*give another --cache_dir"), cached:
        pass
