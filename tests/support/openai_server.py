"""The server of OpenAI's API in this process, for real clients."""

import contextlib
import threading
import time

from saw_trtllm import LLM, KvCacheConfig
from saw_trtllm.serve.openai.app import make_app
from saw_trtllm.serve.openai.model import ServedModel
from saw_trtllm.serve.openai.server import ServerOptions, listen, make_server


@contextlib.contextmanager
def serving(app, **options):
    """Serve an application, and give its address."""
    options = ServerOptions(port=0, timeout_graceful_shutdown=1, **options)
    socket, url = listen(options)
    server = make_server(app, options)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


@contextlib.contextmanager
def serving_engines(folders, api_keys=(), tokens=4096, **options):
    """Serve engines by name, and give the address and the models."""
    with contextlib.ExitStack() as stack:
        cache = KvCacheConfig(tokens, deterministic=True)
        models = [
            ServedModel(name, stack.enter_context(LLM(folder, kv_cache_config=cache, **options)), folder)
            for name, folder in folders.items()
        ]
        url = stack.enter_context(serving(make_app(models, api_keys)))
        yield url, models


def wait_until_idle(llm, seconds=60):
    """Wait until nothing runs and no block is held."""
    deadline = time.monotonic() + seconds
    while (stats := llm.stats()).num_running or stats.num_waiting or stats.used_blocks:
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)
