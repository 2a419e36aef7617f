import logging
import shutil
from functools import cache

import pytest

from saw_trtllm import LLM, KvCacheConfig, progress
from tests.support.chat_templates import COMMENTS
from tests.support.example import build_example

pytest_plugins = ["tests.support.fold_skips", "tests.support.gpu"]


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Give the example model's engine of a kv format, built once a session with logits to be had."""

    pytest.importorskip("torch", reason="PyTorch is not installed")

    @cache
    def build(kv):
        options = {"kv": kv, "gather_all_token_logits": True, "max_num_tokens": 4096}
        return build_example(tmp_path_factory.mktemp(kv), **options)

    return build


@pytest.fixture(scope="session")
def chat_engine(engine, tmp_path_factory):
    """The example's engine with a chat template: the example was taught none, and writes on in Python."""
    folder = shutil.copytree(engine("saw_int4"), tmp_path_factory.mktemp("chat") / "example")
    (folder / "chat_template.jinja").write_text(COMMENTS)
    return folder


@pytest.fixture
def open_llm(engine):
    """Open the example's engines with ``LLM``'s arguments, with texts that do not depend on what is in the cache unless
    a cache is given; what was opened is shut down after the test."""
    opened = []

    def open_(kv="saw_int4", **options):
        opened.append(LLM(engine(kv), **{"kv_cache_config": KvCacheConfig(deterministic=True)} | options))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.shutdown()


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """A slow machine writes no lines where a test looks for none."""
    monkeypatch.setattr(progress, "INTERVAL", 3600.0)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """A command that a test runs in this process logs to the stderr that pytest gave it, which ends with the test."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
