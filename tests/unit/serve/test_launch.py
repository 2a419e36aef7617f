"""The model repository, and how a server is found and started."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

import saw_trtllm
from benchmarks.common.ports import free_ports
from saw_trtllm.cli import triton as cli
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.serve import canary as canary_module
from saw_trtllm.serve import installation, launcher, metrics, names, repository, session
from saw_trtllm.serve import log as log_module
from saw_trtllm.serve.canary import Canary
from saw_trtllm.serve.installation import Installation, check_flags, find_server
from saw_trtllm.serve.log import BUSY, ServerLog
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.ports import Ports
from saw_trtllm.serve.server import BusyStartError, Server
from tests.support import ROOT
from tests.support.fakes.triton import model_config


@pytest.fixture(scope="module")
def engine_dir(engine):
    return engine("saw_int4")


# Names and configuration


def test_names_are_those_of_tensorrt_llm():
    ours = {m.name: {t.name: (t.dtype, list(t.dims)) for t in m.inputs + m.outputs} for m in names.MODELS}
    theirs = {
        "ensemble": {
            "text_input": ("STRING", [1]),
            "max_tokens": ("INT32", [1]),
            "bad_words": ("STRING", [-1]),
            "stop_words": ("STRING", [-1]),
            "exclude_input_in_output": ("BOOL", [1]),
            "end_id": ("INT32", [1]),
            "pad_id": ("INT32", [1]),
            "top_k": ("INT32", [1]),
            "top_p": ("FP32", [1]),
            "temperature": ("FP32", [1]),
            "length_penalty": ("FP32", [1]),
            "repetition_penalty": ("FP32", [1]),
            "presence_penalty": ("FP32", [1]),
            "frequency_penalty": ("FP32", [1]),
            "min_tokens": ("INT32", [1]),
            "seed": ("UINT64", [1]),
            "return_log_probs": ("BOOL", [1]),
            "return_context_logits": ("BOOL", [1]),
            "return_generation_logits": ("BOOL", [1]),
            "return_num_input_tokens": ("BOOL", [1]),
            "return_num_output_tokens": ("BOOL", [1]),
            "num_return_sequences": ("INT32", [1]),
            "beam_width": ("INT32", [1]),
            "stream": ("BOOL", [1]),
            "text_output": ("STRING", [-1]),
            "cum_log_probs": ("FP32", [-1]),
            "output_log_probs": ("FP32", [-1, -1]),
            "context_logits": ("FP32", [-1, -1]),
            "generation_logits": ("FP32", [-1, -1, -1]),
            "batch_index": ("INT32", [1]),
            "sequence_index": ("INT32", [1]),
            "num_input_tokens": ("INT32", [1]),
            "num_output_tokens": ("INT32", [1]),
        },
        "preprocessing": {
            "QUERY": ("STRING", [1]),
            "INPUT_ID": ("INT32", [-1]),
            "REQUEST_INPUT_LEN": ("INT32", [1]),
            "DECODER_INPUT_ID": ("INT32", [-1]),
            "REQUEST_DECODER_INPUT_LEN": ("INT32", [1]),
            "BAD_WORDS_IDS": ("INT32", [2, -1]),
            "EMBEDDING_BIAS": ("FP32", [-1]),
            "STOP_WORDS_DICT": ("STRING", [-1]),
            "STOP_WORDS_IDS": ("INT32", [2, -1]),
        },
        "tensorrt_llm": {
            "input_ids": ("INT32", [-1]),
            "input_lengths": ("INT32", [1]),
            "request_output_len": ("INT32", [1]),
            "streaming": ("BOOL", [1]),
            "runtime_top_k": ("INT32", [1]),
            "runtime_top_p": ("FP32", [1]),
            "len_penalty": ("FP32", [1]),
            "stop_words_list": ("INT32", [2, -1]),
            "bad_words_list": ("INT32", [2, -1]),
            "embedding_bias": ("FP32", [-1]),
            "decoder_input_ids": ("INT32", [-1]),
            "decoder_input_lengths": ("INT32", [1]),
            "stop": ("BOOL", [1]),
            "output_ids": ("INT32", [-1, -1]),
        },
        "postprocessing": {
            "TOKENS_BATCH": ("INT32", [-1, -1]),
            "OUTPUT": ("STRING", [-1]),
        },
    }
    theirs["tensorrt_llm_bls"] = theirs["ensemble"]
    for name, tensors in theirs.items():
        assert {k: ours[name].get(k) for k in tensors} == tensors


def test_ensemble_wires_every_tensor_to_one_of_the_same_type():
    models = {m.name: m for m in names.MODELS}
    ensemble = models[names.ENSEMBLE]
    tensors = {t.name: t for t in ensemble.inputs}
    fed = set()
    for step in names.STEPS:
        inputs = {t.name: t for t in models[step.model].inputs}
        assert {t.name for t in inputs.values() if not t.optional} <= step.inputs.keys()
        for theirs, ours in step.inputs.items():
            assert (inputs[theirs].dtype, inputs[theirs].dims) == (tensors[ours].dtype, tensors[ours].dims), theirs
            # A step would never begin if something that it cannot do without were left out.
            assert inputs[theirs].optional or not tensors[ours].optional
            fed.add(ours)
        outputs = {t.name: t for t in models[step.model].outputs}
        for theirs, ours in step.outputs.items():
            tensors[ours] = outputs[theirs]
    assert {t.name for t in ensemble.inputs} <= fed  # Triton rejects an ensemble with an unused input
    assert all(tensors[t.name][1:3] == t[1:3] for t in ensemble.outputs)


def test_config_files_are_what_protobuf_reads(tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    configs = repository.model_configs(Parameters(gpt_model_path="/e", tokenizer_dir="/t"), 16)
    repository.write_repository(tmp_path, configs)
    assert {p.name for p in tmp_path.iterdir()} == {m.name for m in names.MODELS}
    for name, config in configs.items():
        text = (tmp_path / name / "config.pbtxt").read_text()
        read = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert read == config
        assert (read.name, read.max_batch_size) == (name, 16)
        assert (tmp_path / name / "1" / "model.py").is_file()
    assert configs["tensorrt_llm"].model_transaction_policy.decoupled
    assert configs["tensorrt_llm"].parameters["gpt_model_path"].string_value == "/e"
    assert configs["ensemble"].backend == "python"
    unary = repository.model_configs(Parameters(gpt_model_path="/e", decoupled_mode=False), 16)
    assert unary["ensemble"].platform == unary["tensorrt_llm_bls"].platform == "ensemble"


def test_repository_in_place_keeps_the_models(tmp_path, monkeypatch):
    configs = repository.model_configs(Parameters(gpt_model_path="/e"), 1)
    repository.write_repository(tmp_path, configs)
    before = (tmp_path / "tensorrt_llm" / "1" / "model.py").read_bytes()
    monkeypatch.setattr(repository, "template_folder", lambda: tmp_path)
    repository.write_repository(tmp_path, configs)
    assert (tmp_path / "tensorrt_llm" / "1" / "model.py").read_bytes() == before != b""


def test_repository_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    configs = repository.model_configs(Parameters(gpt_model_path="/e"), 1)
    with pytest.raises(ConfigError, match="give another --model_repo"):
        repository.write_repository(tmp_path / "file" / "repo", configs)


def test_template_without_models_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(repository.saw_trtllm, "__file__", str(tmp_path / "saw_trtllm" / "__init__.py"))
    with pytest.raises(BackendUnavailableError, match="triton_model_repo is neither"):
        repository.template_folder()
    model = tmp_path / "saw_trtllm" / "triton_model_repo" / "tensorrt_llm" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.touch()
    assert repository.template_folder() == tmp_path / "saw_trtllm" / "triton_model_repo"  # as in a wheel


def test_parameters_come_back_from_their_strings():
    parameters = Parameters(
        model_name="m", gpt_model_path="/e", add_special_tokens=False, max_tokens_in_paged_kv_cache=4096
    )
    strings = parameters.strings(tuple(Parameters.model_fields))
    assert strings["add_special_tokens"] == "false"
    assert strings["tokenizer_dir"] == ""
    assert Parameters.read(model_config(**strings)) == parameters


@pytest.mark.parametrize(("name", "value"), [("stats_check_period_ms", "soon"), ("max_tokens_in_paged_kv_cache", "0")])
def test_wrong_parameter_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Parameters.read(model_config(**{name: value}))


@pytest.mark.parametrize("title", ["ensemble", "preprocessing", "tensorrt_llm", "postprocessing", "metrics"])
def test_docs_have_the_tables_of_the_code(title):
    docs = (ROOT / "docs" / "triton.md").read_text()
    models = {m.name: m for m in names.MODELS}
    known = names.ENSEMBLE_MODEL[1:3] if title == "tensorrt_llm" else ((), ())
    tables = [metrics.table()] if title == "metrics" else map(names.table, models[title][1:3], known)
    for table in tables:
        assert table in docs


# Finding and starting a server


def test_ports_in_use_out_of_range_and_equal():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--http_port {port} cannot be used on 127.0.0.1"):
            Ports(http=port, **dict(zip(("grpc", "metrics"), free_ports(2), strict=True))).check()
    with pytest.raises(ConfigError, match="grpc_port is 70000: it must be from 1 to 65535"):
        Ports(grpc=70000).check()
    with pytest.raises(ConfigError, match="must differ"):
        Ports(grpc=8000, http=8000).check()


def executable(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_server_on_path_is_preferred_and_keeps_its_backends(tmp_path, monkeypatch):
    server = executable(tmp_path / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(server.parent), prepend=os.pathsep)
    found = find_server(None, tmp_path / "backends")
    assert (found.executable, found.backends) == (server, None)


def test_server_for_another_python_is_rejected(tmp_path):
    server = executable(tmp_path / "bin" / "tritonserver")
    stub = tmp_path / "backends" / "python" / installation.STUB
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"\0libpython2.7.so.1.0\0")
    with pytest.raises(BackendUnavailableError, match=r"is for Python 2\.7 and this is 3"):
        find_server(server, tmp_path / "b")


def test_server_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is not an executable file"):
        find_server(tmp_path / "tritonserver", tmp_path / "b")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'saw-trtllm\[triton\]'"):
        find_server(None, tmp_path / "b")


def test_interpreter_without_shared_library(tmp_path, monkeypatch):
    server = executable(tmp_path / "bin" / "tritonserver")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match="--enable-shared"):
        find_server(server, tmp_path / "b")


def test_environment_puts_its_folders_in_front(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/theirs")
    env = Installation(Path("tritonserver"), libraries=(Path("/ours"),), python=Path("/python/bin")).environment()
    assert env["LD_LIBRARY_PATH"] == "/ours:/theirs"
    assert env["PATH"].split(":")[0] == "/python/bin"


def ports():
    return Ports("127.0.0.1", *free_ports(3))


def test_server_that_ends_before_it_is_ready(tmp_path, capfd):
    failure = (
        "E1 model_lifecycle.cc:1] \\\"failed to load 'tensorrt_llm' version 1: Internal: TritonModelException: "
        'no engine here: build one\\\\n\\\\nAt:\\\\n  model.py(1)\\"'
    )
    script = executable(tmp_path / "tritonserver", f'import sys\nsys.stderr.write("{failure}\\n")\nsys.exit(1)')
    with Server(Installation(script), tmp_path, ports()) as server, pytest.raises(EngineError) as e:
        server.wait_ready()
    assert str(e.value).startswith("tritonserver ended before it was ready: no engine here: build one (its log: ")
    assert capfd.readouterr().err == ""  # the sentence is enough
    [log] = tmp_path.parent.glob(f"{tmp_path.name}.*.log")
    assert str(log) in str(e.value)
    assert "model_lifecycle" in log.read_text()


def test_a_start_that_triton_gives_up_is_told_from_a_failure(tmp_path):
    lines = "terminate called after throwing an instance of 'x'\\n  what():  boost::interprocess::lock_exception\\n"
    script = executable(tmp_path / "tritonserver", f'import os, sys\nsys.stderr.write("{lines}")\nos.abort()')
    with Server(Installation(script), tmp_path, ports()) as server, pytest.raises(BusyStartError, match=BUSY):
        server.wait_ready()


def test_waiting_for_a_server_can_be_given_up(tmp_path):
    script = executable(tmp_path / "tritonserver", "import time\ntime.sleep(600)")
    with Server(Installation(script), tmp_path, ports()) as server:
        assert server.wait_ready(lambda: True) is False
        assert server.poll() is None
    assert server.poll() is not None


# A server that ends badly, and its processes

#: Ignores SIGTERM, leaves an orphan that holds its stderr, and a region as Triton's Python backend names them.
STUBBORN = """\
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
[prefix] = [a.partition("prefix-name=")[2] for a in sys.argv if "prefix-name=" in a]
open(f"/dev/shm/{prefix}region", "w").write(sys.argv[0])
time.sleep(600)
"""


def traces(script):
    """Processes and regions of a server."""
    processes = [p.pid for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
    return processes, [f for f in Path("/dev/shm").glob("saw_triton_*region") if _text(f) == str(script)]


def _text(path):
    """Empty if it has gone meanwhile."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_left_of_a_server_that_does_not_end(tmp_path):
    script = executable(tmp_path / "tritonserver", STUBBORN)
    server = Server(Installation(script), tmp_path, ports())
    wait_for(lambda: all(traces(script)))
    assert len(traces(script)[0]) == 2
    server.stop()
    assert traces(script) == ([], [])


def test_nothing_is_left_of_a_launcher_that_is_killed(tmp_path):
    script = executable(tmp_path / "tritonserver", STUBBORN)
    code = (
        "import sys, time; from pathlib import Path; from saw_trtllm.serve import server as s;"
        "s.EXIT_TIMEOUT = 0.5; ports = s.Ports('127.0.0.1', *map(int, sys.argv[3:]));"
        "server = s.Server(s.Installation(Path(sys.argv[1])), Path(sys.argv[2]), ports); time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, script, tmp_path, *map(str, free_ports(3))])
    wait_for(lambda: all(traces(script)))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: traces(script) == ([], []))


def test_a_server_that_waits_for_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(session, "_REST_GRACE", 0.2)
    code = (
        "import os, signal, time; child = os.fork();"
        "handler = lambda *_: child and os.kill(child, 9);"  # the models unload, and the server stays
        "signal.signal(signal.SIGTERM, handler); print(flush=True); time.sleep(600)"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout.read(2) == b"\n\n"
    assert session.end(server.pid, "none", grace=60)
    assert server.wait() == -signal.SIGKILL
    server.stdout.close()


def test_a_server_whose_main_thread_alone_has_ended_is_still_there():
    """It looks like a zombie, and its children are not yet anybody else's to reap."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start();"
        "print(flush=True); ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout.read(1) == b"\n"
        wait_for(lambda: psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE)
        assert [process.pid for process in session.members(server.pid)] == [server.pid]
        session.end(server.pid, "none", grace=0)
        assert server.wait(timeout=60) == -signal.SIGKILL


class FakeServer:
    """A server whose failures are given: as it starts (an error), or while it runs (a sentence)."""

    endpoints: ClassVar = {"HTTP": "here"}

    def __init__(self, outcome):
        self._outcome = outcome
        self.stopped = False

    def wait_ready(self, stopped):
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return True

    def watch(self, stopped):
        return self._outcome

    def stop(self, hurry):
        self.stopped = True


@pytest.fixture
def launch(monkeypatch):
    """Run ``launch`` with servers of these outcomes; gives its exit code and how many were started."""
    monkeypatch.setattr(launcher.session, "become_subreaper", lambda: None)  # pytest's orphans are not ours
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(outcomes, restart):
        servers = []

        def start():
            servers.append(FakeServer(outcomes[len(servers)]))
            return servers[-1]

        try:
            return launcher.launch(start, restart), len(servers)
        finally:
            assert all(server.stopped for server in servers)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_failed_server_is_started_again(launch, capsys):
    outcomes = ["tritonserver crashed", EngineError("no port"), "tritonserver is stuck", None]
    assert launch(outcomes, restart=3) == (0, 4)
    assert capsys.readouterr().out == "ready: HTTP here\n" * 3


def test_restarts_come_to_an_end(launch, capsys):
    assert launch(["tritonserver crashed"] * 3, restart=2) == (1, 3)
    assert capsys.readouterr().err == "error: tritonserver crashed\n"
    with pytest.raises(EngineError, match="no engine"):  # a first start that fails will fail again
        launch([EngineError("no engine")], restart=2)


def test_a_start_that_triton_gives_up_is_no_failure_of_the_server(launch, capsys):
    """A server that was lost comes back also where its new start meets the load that may have cost it."""
    busy = BusyStartError("lock")
    assert launch([busy, "tritonserver crashed", busy, busy, "tritonserver crashed", None], restart=2) == (0, 6)
    assert capsys.readouterr().out == "ready: HTTP here\n" * 3
    assert launch([busy, None], restart=0) == (0, 2)
    with pytest.raises(EngineError, match="lock, 4 times: start it when the machine is less busy"):
        launch([busy] * 4, restart=9)
    assert launch(["tritonserver crashed", *[busy] * 5], restart=2) == (1, 6)


class FakeTriton(BaseHTTPRequestHandler):
    """Answers the canary's request with an error if the class has one, and shows its tokens in the metrics."""

    error: ClassVar[str | None] = None
    tokens: ClassVar[itertools.count | list] = itertools.count()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(400 if self.error else 200, json.dumps({"error": self.error}))

    def do_GET(self):
        self._answer(200, f'saw_generated_tokens_total{{model="tensorrt_llm"}} {next(self.tokens)}\n')

    def _answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def canary(monkeypatch):
    """Start a canary against a fake of its own, which a busy machine may take long to answer."""
    opened, started = canary_module._open, []
    monkeypatch.setattr(canary_module, "_open", lambda asked, timeout: opened(asked, timeout=60))

    def start(timeout):
        fake = type("Fake", (FakeTriton,), {})
        http = ThreadingHTTPServer(("127.0.0.1", 0), fake)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        started.append((Canary(url, f"{url}/metrics", timeout), http))
        return started[-1][0], fake

    yield start
    for canary, http in started:
        canary.stop()
        http.shutdown()
        http.server_close()


def test_canary_tells_that_the_first_request_failed(canary):
    bird, fake = canary(60)
    fake.error = "Stub process 'preprocessing_0_0' is not healthy."
    bird.start(60)
    wait_for(lambda: bird.failure)
    assert bird.failure == f"failed its first request: {fake.error}"
    assert not bird.answered


def test_canary_fails_only_without_answers_and_without_tokens(canary):
    bird, fake = canary(0.1)
    bird.start(60)
    wait_for(lambda: bird.answered)
    fake.error = "the queue is full"
    seen = next(fake.tokens)
    wait_for(lambda: next(fake.tokens) > seen + 20)  # texts grow: a full queue is no failure
    assert bird.failure is None
    fake.tokens = itertools.repeat(7)
    wait_for(lambda: bird.failure)
    assert bird.failure.endswith("the queue is full")


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            "E1 model_lifecycle.cc:642] \"failed to load 'preprocessing' version 1: Internal: ModuleNotFoundError: "
            "No module named 'pydantic'\\n\\nAt:\\n  model.py(5)\"\nerror: creating server: Internal - failed to load",
            "ModuleNotFoundError: No module named 'pydantic'",
        ),
        ("/bin/tritonserver: unrecognized option '--rate'\nUsage: tritonserver", "unrecognized option '--rate'"),
        (
            "tritonserver: error while loading shared libraries: libdcgm.so.4: cannot open",
            "error while loading shared libraries: libdcgm.so.4: cannot open",
        ),
        (
            "terminate called after throwing an instance of\n  what():  unpack_from requires\n\nAt:",
            "unpack_from requires",
        ),
        (
            "terminate called after throwing an instance of 'boost::interprocess::lock_exception'\n"
            "  what():  boost::interprocess::lock_exception",
            BUSY,
        ),
        ("Usage: tritonserver\ninvalid argument for --log-format\n\n", "invalid argument for --log-format"),
    ],
)
def test_cause_of_a_failed_start_is_found_in_the_log(tmp_path, lines, cause):
    log = ServerLog(tmp_path / "log")
    log.path.write_text(lines)
    assert log.cause() == cause


def test_log_does_not_fill_the_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log_module, "_MAX_BYTES", 100)
    log = ServerLog(tmp_path / "log")
    with log.open() as server:
        for n in range(50):
            server.write(b"line %d\n" % n)
            log.follow()
    assert log.path.stat().st_size <= 108
    assert capsys.readouterr().err == "".join(f"line {n}\n" for n in range(50))


def test_models_can_import_what_the_launcher_can(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "by_pythonpath.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "target")
    found = find_server(executable(tmp_path / "bin" / "tritonserver"), tmp_path / "backends")
    # Isolated, as Triton's Python backend runs from Python 3.11 on.
    code = "import by_pythonpath, psutil, saw_trtllm; print(psutil.__file__, saw_trtllm.__file__)"
    python = [found.python / "python3", "-I", "-c", code]
    done = subprocess.run(python, capture_output=True, text=True, cwd="/", env={})
    # Of the installed one: Ray puts a psutil of its own before it in a process that has imported Ray.
    installed = metadata.distribution("psutil").locate_file("psutil/__init__.py")
    assert done.stdout == f"{installed} {saw_trtllm.__file__}\n", done.stderr


def test_numpy_2_is_named_before_the_server_starts(tmp_path, monkeypatch):
    pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(installation.np, "__version__", "2.3.1")
    with pytest.raises(BackendUnavailableError, match=r"is for NumPy 1 and this is 2\.3\.1"):
        find_server(None, tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--http-port=1"], "--http-port cannot be passed on: use --http_port"),
        (["--rate-limit=off", "--log-verb", "1"], "--log-verbose cannot be passed on: use --log_level"),
        (["--backend-config=python,shm-region-prefix-name=x"], "gives each server its own"),
        (["rate-limit"], "'rate-limit' is no flag"),
    ],
)
def test_flags_that_contradict_ours_are_not_passed_on(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_flags(flags)


# saw-triton


def test_cli_passes_flags_on_and_warns_of_what_is_open(engine_dir, tmp_path, capsys, monkeypatch):
    server = str(executable(tmp_path / "bin" / "tritonserver"))
    argv = ["--engine_dir", str(engine_dir), "--model_repo", str(tmp_path / "repo"), "--tritonserver", server]
    for host, release, warned in (
        ("127.0.0.2", "", False),
        ("0.0.0.0", "", True),
        ("0.0.0.0", "25.07", True),
        ("0.0.0.0", "25.08", False),
    ):
        monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", release)
        assert cli.main([*argv, "--host", host, "--", "--rate-limit=off"]) == 0
        out, err = capsys.readouterr()
        assert out.endswith(" --rate-limit=off\n")
        assert ("CVE-2025-23310" in err) == warned


def test_cli_writes_a_repository_and_says_how_to_start(engine_dir, tmp_path, capsys):
    repo = tmp_path / "repo"
    assert cli.main(["--engine_dir", str(engine_dir), "--model_repo", str(repo), "--kv_cache_max_tokens", "4096"]) == 0
    out = capsys.readouterr().out
    assert f"--model-repository={repo}" in out
    assert "LD_LIBRARY_PATH=" in out
    config = (repo / "tensorrt_llm" / "config.pbtxt").read_text()
    assert f'"{engine_dir}"' in config
    assert '"4096"' in config


def cli_errors(tmp_path, engine_dir):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((engine_dir / "config.json").read_bytes())
    old = tmp_path / "old"
    old.mkdir()
    config = json.loads((engine_dir / "config.json").read_text())
    config["saw_int4"]["format_version"] = 99
    (old / "config.json").write_text(json.dumps(config))
    (tmp_path / "file").touch()
    engine = ["--engine_dir", str(engine_dir), "--model_repo", str(tmp_path / "repo")]
    return {
        "no engine": (["--engine_dir", str(tmp_path / "none")], "is not a folder"),
        "no tokenizer": (["--engine_dir", str(bare)], "--tokenizer_dir"),
        "other version": (["--engine_dir", str(old)], "format version 99"),
        "not writable": ([*engine[:2], "--model_repo", str(tmp_path / "file" / "r")], "give another --model_repo"),
        "bad tokens": ([*engine, "--kv_cache_max_tokens", "0"], "max_tokens_in_paged_kv_cache"),
        "bad batch": ([*engine, "--triton_max_batch_size", "0"], "triton_max_batch_size is 0"),
        "huge batch": ([*engine, "--triton_max_batch_size", str(2**31)], "it must be from 1 to 2147483647"),
        "no port": ([*engine, "--http_port", "0"], "http_port is 0: it must be from 1 to 65535"),
        "bad server": ([*engine, "--tritonserver", str(tmp_path / "none")], "is not an executable file"),
        "equal ports": ([*engine, "--launch", "--grpc_port", "8000"], "must differ"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no engine",
        "no tokenizer",
        "other version",
        "not writable",
        "bad tokens",
        "bad batch",
        "huge batch",
        "no port",
        "bad server",
        "equal ports",
    ],
)
def test_cli_errors_are_one_sentence_and_code_2(engine_dir, tmp_path, capsys, case):
    argv, sentence = cli_errors(tmp_path, engine_dir)[case]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_cli_names_a_port_in_use_before_it_writes(engine_dir, tmp_path, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        argv = ["--engine_dir", str(engine_dir), "--model_repo", str(tmp_path / "r"), "--launch", "--http_port", port]
        for name, other in zip(("grpc", "metrics"), free_ports(2), strict=True):
            argv += [f"--{name}_port", str(other)]
        assert cli.main(argv) == 2
    assert f"--http_port {port} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
