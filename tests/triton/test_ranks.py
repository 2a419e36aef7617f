"""An engine that is split over two ranks under a real tritonserver: one of them is killed under load."""

import pytest

from benchmarks.serving.rank_clients import ask_triton, kill_under_load
from tests.support.example import build_example
from tests.triton.test_server import running_server

pytestmark = pytest.mark.triton


def test_clients_get_their_texts_although_a_rank_is_killed(tmp_path):
    """The leader is in the Python backend, the ranks are processes beside it."""
    engine = build_example(tmp_path / "engine", kv="fp16", tp_size=2, max_batch_size=8, max_seq_len=256)
    prompts = [f"def read_{i}(path):" for i in range(6)]
    with running_server(engine, tmp_path, "--ranks", "processes", "--retry", 3) as server:
        found = kill_under_load(ask_triton, f"http://127.0.0.1:{server.http}", server.process.pid, prompts, 48)
    assert (found["with rank 1 killed"], found["once more"]) == ("6 of 6 as at rest",) * 2
    assert "the group of 2 ranks was lost" in server.log.read_text()
