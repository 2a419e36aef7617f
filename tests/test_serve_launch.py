"""The model repository, and how a server is found and started."""

import json
import os
import socket
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from fake_triton import model_config

from saw_trtllm.cli import triton as cli
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.serve import installation, metrics, names, repository
from saw_trtllm.serve.installation import Installation, find_server
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.ports import Ports
from saw_trtllm.serve.server import Server


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
            "num_input_tokens": ("INT32", [1]),
            "num_output_tokens": ("INT32", [1]),
        },
        "preprocessing": {
            "QUERY": ("STRING", [1]),
            "INPUT_ID": ("INT32", [-1]),
            "REQUEST_INPUT_LEN": ("INT32", [1]),
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
            "stop": ("BOOL", [1]),
            "output_ids": ("INT32", [-1, -1]),
            "sequence_length": ("INT32", [-1]),
        },
        "postprocessing": {
            "TOKENS_BATCH": ("INT32", [-1, -1]),
            "SEQUENCE_LENGTH": ("INT32", [-1]),
            "OUTPUT": ("STRING", [-1]),
        },
    }
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
    assert {t.name for t in ensemble.inputs} <= fed  # Triton refuses an ensemble with an unused input
    assert all(tensors[t.name][1:3] == t[1:3] for t in ensemble.outputs)


def test_config_files_are_what_protobuf_reads(tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    configs = repository.model_configs(Parameters(gpt_model_path="/e", tokenizer_dir="/t"), 16)
    repository.write_repository(tmp_path, configs)
    assert {p.name for p in tmp_path.iterdir()} == {"ensemble", "preprocessing", "tensorrt_llm", "postprocessing"}
    for name, config in configs.items():
        text = (tmp_path / name / "config.pbtxt").read_text()
        read = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert read == config
        assert (read.name, read.max_batch_size) == (name, 16)
        assert (tmp_path / name / "1").is_dir()
        assert (tmp_path / name / "1" / "model.py").is_file() == (name != "ensemble")
    assert configs["tensorrt_llm"].model_transaction_policy.decoupled
    assert configs["tensorrt_llm"].parameters["gpt_model_path"].string_value == "/e"
    assert configs["ensemble"].platform == "ensemble"


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
    parameters = Parameters(gpt_model_path="/e", add_special_tokens=False, max_tokens_in_paged_kv_cache=4096)
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
    docs = (Path(__file__).parent.parent / "docs" / "triton.md").read_text()
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
            Ports(http=port, grpc=free_port(), metrics=free_port()).check()
    with pytest.raises(ConfigError, match="grpc_port is 70000: it must be from 1 to 65535"):
        Ports(grpc=70000).check()
    with pytest.raises(ConfigError, match="must differ"):
        Ports(grpc=8000, http=8000).check()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    assert not (tmp_path / "backends").exists()


def test_server_for_another_python_is_refused(tmp_path):
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
    env = Installation(Path("tritonserver"), libraries=(Path("/ours"),)).environment()
    assert env["LD_LIBRARY_PATH"] == "/ours:/theirs"
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert (Path(env["PYTHONPATH"].split(":")[0]) / "saw_trtllm").is_dir()


def free_ports():
    return Ports(grpc=free_port(), http=free_port(), metrics=free_port())


def test_server_that_ends_before_it_is_ready(tmp_path, capfd):
    failure = (
        "E1 model_lifecycle.cc:1] \\\"failed to load 'tensorrt_llm' version 1: Internal: TritonModelException: "
        'no engine here: build one\\\\n\\\\nAt:\\\\n  model.py(1)\\"'
    )
    script = executable(tmp_path / "tritonserver", f'import sys\nsys.stderr.write("{failure}\\n")\nsys.exit(1)')
    with Server(Installation(script), tmp_path, free_ports()) as server, pytest.raises(EngineError) as e:
        server.wait_ready()
    assert str(e.value) == "tritonserver ended before it was ready: no engine here: build one"
    assert "model_lifecycle" in capfd.readouterr().err


def test_waiting_for_a_server_can_be_given_up(tmp_path):
    script = executable(tmp_path / "tritonserver", "import time\ntime.sleep(600)")
    stop = threading.Event()
    stop.set()
    with Server(Installation(script), tmp_path, free_ports()) as server:
        assert server.wait_ready(stop) is False
        assert server.poll() is None
    assert server.poll() is not None


# saw-triton


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
        assert cli.main(argv) == 2
    assert f"--http_port {port} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
