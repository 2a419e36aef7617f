"""Files of blocks: whole or not there, of this engine or not used, within their size, and shared."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime import disk_cache
from saw_trtllm.runtime.block_table import Content
from saw_trtllm.runtime.disk_cache import DiskCache
from tests.support import ROOT

BLOCK, TOKENS = 5000, 4
FILE = 12 + 4 * 32 + 4 * TOKENS + BLOCK


def content(i):
    return Content(bytes([i % 256, i // 256]) * 16, bytes([i % 256]) * 32, np.arange(i, i + TOKENS, dtype=np.int32))


def block(i):
    return np.random.default_rng(i).integers(0, 256, BLOCK, dtype=np.uint8)


def cache_of(folder, size=1 << 30, fingerprint=b"f" * 32):
    return DiskCache(folder, size, fingerprint, BLOCK, TOKENS)


def filled(folder, count, **options):
    cache = cache_of(folder, **options)
    for i in range(count):
        cache.write(content(i), block(i)).result()
    return cache


def found(cache, i):
    """Whether a block is there, and if so, right."""
    memory = np.zeros(BLOCK, np.uint8)
    read = cache.read(content(i).key, memory).result()
    if read is None:
        return False
    assert (read.key, read.parent, read.tokens.tolist()) == (*content(i)[:2], content(i).tokens.tolist())
    assert np.array_equal(memory, block(i))
    return True


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_was_written_is_read_by_another(tmp_path):
    filled(tmp_path, 5).close()
    cache = cache_of(tmp_path)
    assert [cache.holds(content(i).key) for i in (0, 4, 5)] == [True, True, False]
    assert all(found(cache, i) for i in range(5))
    assert cache.stats() == {"disk_written_blocks_total": 0, "disk_read_blocks_total": 5}
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path)} == {0o600}


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a torn end": lambda path, _: os.truncate(path, FILE - 1),
    "nothing in it": lambda path, _: os.truncate(path, 0),
    "a byte too many": lambda path, _: path.write_bytes(path.read_bytes() + b"x"),
    "a byte of the head": lambda path, _: flip(path, 0),
    "a byte of the tokens": lambda path, _: flip(path, 12 + 3 * 32),
    "a byte of the block": lambda path, _: flip(path, FILE - 33),
    "a byte of the checksum": lambda path, _: flip(path, FILE - 1),
    "another block's file": lambda path, other: path.write_bytes(other.read_bytes()),
    "a file that goes away": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_a_miss_with_one_warning(damage, tmp_path, caplog):
    cache = filled(tmp_path, 3)
    paths = [next(tmp_path.rglob(f"{content(i).key.hex()}*")) for i in range(3)]
    for path in paths[:2]:
        DAMAGES[damage](path, paths[2])
    with caplog.at_level(logging.WARNING):
        assert [found(cache, i) for i in range(3)] == [False, False, True]
    assert len(caplog.records) == 1
    assert files(tmp_path) == paths[2:]  # what cannot be used is not found again


def test_a_file_of_another_engine_is_not_used(tmp_path, caplog):
    filled(tmp_path, 1)
    other = cache_of(tmp_path, fingerprint=b"g" * 32)
    assert not other.holds(content(0).key)
    theirs, ours = files(tmp_path)[0], other._path(content(0).key)
    os.makedirs(os.path.dirname(ours))
    os.link(theirs, ours)
    assert not found(other, 0)
    assert "is another engine's" in caplog.text


def test_the_size_is_kept_and_what_was_used_last_stays(tmp_path):
    size = 20 * FILE + 17
    cache = filled(tmp_path, 20, size=size)
    for i, path in enumerate(tmp_path.rglob("*.sawblock")):
        os.utime(path, (1000 + i, 1000 + i))
    assert found(cache, 3)
    for i in range(20, 35):
        cache.write(content(i), block(i)).result()
        assert sum(path.stat().st_size for path in files(tmp_path)) <= size
    assert found(cache, 3)
    assert all(found(cache, i) for i in range(20, 35))


def test_a_full_disk_is_no_harm(tmp_path, monkeypatch, caplog):
    cache = filled(tmp_path, 1)

    class Full:
        def __init__(self, path, *args, **options):
            self.file = open(path, *args, **options)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(memoryview(data)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(disk_cache, "open", Full, raising=False)
        patch.setattr(disk_cache, "_PAUSE", 0)
        for i in range(1, 4):
            cache.write(content(i), block(i)).result()
    assert [r.getMessage() for r in caplog.records] == [
        f"a block cannot be written to {tmp_path} ([Errno {errno.ENOSPC}] No space left on device): the cache goes on "
        "without"
    ]
    assert len(files(tmp_path)) == 1
    cache.write(content(4), block(4)).result()
    assert [found(cache, i) for i in range(5)] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("place", "size", "said"),
    [
        ("file/below", 1 << 20, "cannot be used"),
        ("", FILE - 1, "a block takes"),
        ("", 1 << 60, "has room for"),
    ],
)
def test_bad_folders_and_sizes_are_rejected(place, size, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=said):
        cache_of(tmp_path / place, size)


def test_bad_fields_are_rejected(tmp_path):
    tiers = {"host_cache_size": 1 << 20, "disk_cache_dir": tmp_path, "disk_cache_size": 1 << 20}
    KvCacheConfig(**tiers)
    for wrong in (
        {"host_cache_size": 0},
        {"enable_block_reuse": False},
        {"disk_cache_dir": None},
        {"disk_cache_dir": 3},
        {"disk_cache_size": 0},
        {"disk_cache_size": -1},
        {"disk_cache_size": "1 GB"},
    ):
        with pytest.raises(ConfigError, match="the KV cache's disk_cache"):
            KvCacheConfig(**tiers | wrong)


WRITER = """
import sys
from pathlib import Path
from tests.unit.runtime.test_disk_cache import block, cache_of, content
cache = cache_of(Path(sys.argv[1]))
print("ready", flush=True)
for i in range(100_000):
    cache.write(content(i % 60_000), block(i % 60_000)).result()
"""


def test_a_process_that_is_killed_leaves_whole_files_or_none(tmp_path):
    for count in (10, 100):
        with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            while len(list(tmp_path.rglob("*.sawblock"))) < count:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
    (tmp_path / "part.sawblock.tmp").write_bytes(b"torn")  # as one that was killed in the middle would leave
    cache = cache_of(tmp_path)
    paths = list(tmp_path.rglob("*.sawblock"))
    assert paths
    for path in paths:
        i = int.from_bytes(bytes.fromhex(path.stem[:4]), "little")
        assert found(cache, i)
    os.utime(tmp_path / "part.sawblock.tmp", (1000, 1000))
    cache.write(content(70_000 % 65_536), block(1)).result()
    assert not (tmp_path / "part.sawblock.tmp").exists()


# -- under a runtime


PROMPTS = [list(range(10 + i, 150 + i)) for i in range(2)]


def answers(folder, disk, prompts=PROMPTS, **cache):
    tiers = {"host_cache_size": 1 << 24, "disk_cache_dir": disk, "disk_cache_size": 1 << 26}
    with LLM(folder, kv_cache_config=KvCacheConfig(**{"max_tokens": 512} | tiers | cache)) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        outputs = llm.generate(prompts, params)
        stats = llm.stats()
    return [o.outputs[0].token_ids for o in outputs], [o.num_reused_tokens for o in outputs], stats


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_a_restart_finds_what_was_computed(kv, engine, tmp_path, caplog):
    texts, reused, _ = answers(engine(kv), tmp_path)
    assert reused == [0, 0]
    prompts = [[*p, *t, 5, 6] for p, t in zip(PROMPTS, texts, strict=True)]
    expected, _, _ = answers(engine(kv), tmp_path / "other", prompts)
    found, reused, stats = answers(engine(kv), tmp_path, prompts)
    if kv == "fp16":  # rows of 4 bits depend a little on what was computed beside them
        assert found == expected
    assert reused == [128, 128]  # whole blocks
    assert stats.disk_read_blocks_total == 8
    assert not caplog.records
    # A byte of each file: the texts are those of an empty cache.
    for path in tmp_path.glob("*/*/*.sawblock"):
        flip(path, path.stat().st_size // 2)
    damaged, reused, _ = answers(engine(kv), tmp_path, prompts)
    assert damaged == expected
    assert reused == [0, 0]
    assert len(caplog.records) == 1


def test_files_are_of_an_engine_a_salt_and_a_rule(engine, tmp_path):
    answers(engine("saw_int4"), tmp_path)
    for kv, cache in (("int4", {}), ("fp16", {}), ("saw_int4", {"deterministic": True})):
        assert answers(engine(kv), tmp_path, **cache)[1] == [0, 0]
    salted = [{"prompt_token_ids": prompt, "cache_salt": "a tenant's"} for prompt in PROMPTS]
    assert answers(engine("saw_int4"), tmp_path, salted)[1] == [0, 0]
    assert answers(engine("saw_int4"), tmp_path, salted)[1] == [128, 128]
    # The same engine with other weights, by its checksum.
    with pytest.MonkeyPatch.context() as patch:
        load = disk_cache.engine_fingerprint

        def other(config, rule):
            changed = replace_checksum(config)
            return load(changed, rule)

        patch.setattr(disk_cache, "engine_fingerprint", other)
        assert answers(engine("saw_int4"), tmp_path)[1] == [0, 0]


def test_files_are_of_the_weights_wherever_an_engine_has_them(engine):
    config = EngineConfig.load(engine("saw_int4"))
    names = ["rank0.engine", "rank0.weights.safetensors", "calibration.safetensors", "tokenizer.json"]

    def fingerprint(changed):
        checksums = {name: "1" if name == changed else "0" for name in names}
        section = config.saw_int4.model_copy(update={"checksums": checksums})
        return disk_cache.engine_fingerprint(config.model_copy(update={"saw_int4": section}), "any")

    found = [fingerprint(name) for name in names]
    assert len(set(found)) == 4
    assert found[-1] == fingerprint(None)


def replace_checksum(config):
    checksums = {name: "0" * 64 for name in config.saw_int4.checksums}
    return config.model_copy(update={"saw_int4": config.saw_int4.model_copy(update={"checksums": checksums})})


def test_two_runtimes_share_a_folder(engine, tmp_path):
    tiers = KvCacheConfig(512, host_cache_size=1 << 24, disk_cache_dir=tmp_path, disk_cache_size=1 << 26)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(engine("fp16"), kv_cache_config=tiers) as one, LLM(engine("fp16"), kv_cache_config=tiers) as two:
        first = one.generate(PROMPTS[0], params)
        for _ in range(1200):  # written in the background
            if one.stats().disk_written_blocks_total >= 4:
                break
            time.sleep(0.05)
        second = two.generate(PROMPTS[0], params)
        assert second.num_reused_tokens == 128
        assert second.outputs[0].token_ids == first.outputs[0].token_ids
