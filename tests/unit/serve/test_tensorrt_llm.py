"""``saw-triton --backend tensorrtllm``: TensorRT-LLM's own model repository, filled in."""

import importlib.util
import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.common.ports import free_ports
from saw_trtllm.backends.tensorrt_llm import for_executor
from saw_trtllm.cli import triton as cli
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.serve import tensorrtllm_repository as repository
from saw_trtllm.serve.installation import find_server
from saw_trtllm.serve.ports import Ports
from saw_trtllm.serve.server import Server

SOURCE = os.environ.get("SAW_TENSORRT_LLM_SOURCE")
REAL_TEMPLATE = Path(SOURCE or "") / "triton_backend" / "all_models" / "inflight_batcher_llm"

#: The placeholders of TensorRT-LLM's templates, in the places where it has them.
INSTANCES = "instance_group [ { count: ${%s_instance_count} kind: KIND_CPU } ]\n"
QUEUE = """dynamic_batching {
  max_queue_delay_microseconds: ${max_queue_delay_microseconds}
  default_queue_policy: { max_queue_size: ${max_queue_size} }
}
"""
PARAMETERS = {
    "preprocessing": {
        "tokenizer_dir": "${tokenizer_dir}",
        "add_special_tokens": "${add_special_tokens}",
        "multimodal_model_path": "${multimodal_model_path}",
        "gpt_model_path": "${engine_dir}",
        "max_num_images": "${max_num_images}",
    },
    "tensorrt_llm": {
        "gpt_model_type": "${batching_strategy}",
        "gpt_model_path": "${engine_dir}",
        "max_beam_width": "${max_beam_width}",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "max_tokens_in_paged_kv_cache": "${max_tokens_in_paged_kv_cache}",
        "kv_cache_free_gpu_mem_fraction": "${kv_cache_free_gpu_mem_fraction}",
        "enable_kv_cache_reuse": "${enable_kv_cache_reuse}",
        "enable_chunked_context": "${enable_chunked_context}",
        "kv_cache_onboard_blocks": "${kv_cache_onboard_blocks}",
        "decoding_mode": "${decoding_mode}",
    },
    "postprocessing": {"tokenizer_dir": "${tokenizer_dir}", "skip_special_tokens": "${skip_special_tokens}"},
    "ensemble": {},
    "tensorrt_llm_bls": {"accumulate_tokens": "${accumulate_tokens}", "tensorrt_llm_model_name": "tensorrt_llm"},
}
EXTRA = {
    "preprocessing": 'backend: "python"\n' + QUEUE + INSTANCES % "preprocessing",
    "tensorrt_llm": 'backend: "${triton_backend}"\nmodel_transaction_policy { decoupled: ${decoupled_mode} }\n'
    + QUEUE
    + 'output [ { name: "context_logits" data_type: ${logits_datatype} dims: [ -1, -1 ] } ]\n',
    "postprocessing": 'backend: "python"\n' + INSTANCES % "postprocessing",
    "ensemble": 'platform: "ensemble"\n',
    "tensorrt_llm_bls": 'backend: "python"\nmodel_transaction_policy { decoupled: ${decoupled_mode} }\n'
    + INSTANCES % "bls",
}


@pytest.fixture
def template(tmp_path):
    folder = tmp_path / "all_models"
    for name in repository.MODELS:
        (folder / name / "1").mkdir(parents=True)
        text = f'name: "{name}"\nmax_batch_size: ${{triton_max_batch_size}}\n' + EXTRA[name]
        for key, value in PARAMETERS[name].items():
            text += f'parameters: {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
        (folder / name / "config.pbtxt").write_text(text)
        if name != "ensemble":
            (folder / name / "1" / "model.py").write_text(MODEL)
    return folder


MODEL = """
class TritonPythonModel:
    calls = []

    def initialize(self, args):
        self.calls.append(args)
"""


@pytest.fixture
def engine_dir(engine, tmp_path):
    """A folder such as TensorRT-LLM's build leaves, with the example's tokenizer."""
    source, folder = engine("saw_int4"), tmp_path / "engine"
    folder.mkdir()
    config = EngineConfig.load(source).model_dump(mode="json", exclude={"saw_int4": {"checksums"}})
    section = config.pop("saw_int4") | {"backend": "tensorrt_llm"}
    config["pretrained_config"] = for_executor(config["pretrained_config"] | {"saw_int4": section})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.fixture
def preload(tmp_path, monkeypatch):
    path = tmp_path / "libsaw_trtllm_preload.so"
    path.touch()
    monkeypatch.setattr(cli, "library_path", lambda name: path)
    return path


def read(folder, name):
    return text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def values(config):
    return {key: value.string_value for key, value in config.parameters.items()}


def run(capsys, *args):
    code = cli.main([*map(str, args)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("backend", repository.BACKENDS)
@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "source"])
def test_the_repository_is_filled_in(capsys, template, engine_dir, preload, tmp_path, backend, real):
    if real and not REAL_TEMPLATE.is_dir():
        pytest.skip("SAW_TENSORRT_LLM_SOURCE names no source with TensorRT-LLM's Triton models")
    source, repo = REAL_TEMPLATE if real else template, tmp_path / "repo"
    flags = ["--engine_dir", engine_dir, "--model_repo", repo, "--template_repo", source, "--backend", backend]
    code, said = run(capsys, *flags, "--kv_cache_free_gpu_memory_fraction", "0.7", "--triton_max_batch_size", "16")
    assert code == 0
    assert sorted(p.name for p in repo.iterdir()) == sorted(repository.MODELS)
    for name in repository.MODELS:
        assert "${" not in (repo / name / "config.pbtxt").read_text()
        assert read(repo, name).max_batch_size == 16
        assert (repo / name / "1").is_dir()
    model = read(repo, "tensorrt_llm")
    assert model.backend == {"tensorrtllm": "tensorrtllm", "tensorrtllm_python": "python"}[backend]
    assert model.model_transaction_policy.decoupled
    wanted = {
        "gpt_model_path": str(engine_dir),
        "gpt_model_type": "inflight_fused_batching",
        "max_beam_width": "1",
        "enable_kv_cache_reuse": "true",
        "enable_chunked_context": "true",
        "kv_cache_free_gpu_mem_fraction": "0.7",
    }
    assert wanted.items() <= values(model).items()
    assert model.dynamic_batching.default_queue_policy.max_queue_size == 4096
    # Left to TensorRT-LLM's defaults.
    assert not {"max_tokens_in_paged_kv_cache", "kv_cache_onboard_blocks", "decoding_mode"} & values(model).keys()
    before = values(read(repo, "preprocessing"))
    assert (before["tokenizer_dir"], before["multimodal_model_path"]) == (str(engine_dir), "")
    assert ("LD_PRELOAD" in said.out) == (backend == "tensorrtllm")
    if backend == "tensorrtllm":
        assert f'LD_PRELOAD="{preload}' in said.out
    assert (repo / "tensorrt_llm" / "1" / "tensorrt_llm_model.py").exists() == (backend == "tensorrtllm_python")


ECHO = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            ids, count = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
                for name in ("input_ids", "request_output_len")
            )
            ids = ids[: int(count[0])].astype(np.int32)
            outputs = {"output_ids": ids[None, None], "sequence_length": np.array([[len(ids)]], np.int32)}
            response = pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in outputs.items()])
            request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.triton
@pytest.mark.skipif(not REAL_TEMPLATE.is_dir(), reason="SAW_TENSORRT_LLM_SOURCE names no TensorRT-LLM's Triton models")
def test_a_real_server_takes_the_filled_models(capsys, engine_dir, tmp_path):
    """TensorRT-LLM's pre- and postprocessing and its ensemble; in the engine's place one that repeats the prompt."""
    repo = tmp_path / "repo"
    flags = ["--engine_dir", engine_dir, "--model_repo", repo, "--template_repo", REAL_TEMPLATE]
    assert run(capsys, *flags, "--backend", "tensorrtllm_python")[0] == 0
    (repo / "tensorrt_llm" / "1" / "model.py").write_text(ECHO)
    shutil.rmtree(repo / "tensorrt_llm_bls")  # it wants more of TensorRT-LLM's packages
    if importlib.util.find_spec("requests") is None:  # for images alone
        (repo / "preprocessing" / "1" / "requests.py").touch()
    try:
        installation = find_server(None, tmp_path / "backends")
    except BackendUnavailableError as e:
        pytest.skip(str(e))
    grpc, http, metrics = free_ports(3)
    with Server(installation, repo, Ports(grpc=grpc, http=http, metrics=metrics)) as server:
        assert server.wait_ready()
        body = json.dumps({"text_input": "The KV cache holds", "max_tokens": 5}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{http}/v2/models/ensemble/generate", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.loads(answer.read())["text_output"]
    assert text
    assert "The KV cache holds".startswith(text)


def test_the_tokens_of_the_cache_are_handed_on(capsys, template, engine_dir, preload, tmp_path):
    flags = ["--engine_dir", engine_dir, "--model_repo", tmp_path / "repo", "--template_repo", template]
    flags += ["--backend", "tensorrtllm", "--kv_cache_max_tokens", "4096", "--kv_cache_reuse", "disable"]
    assert run(capsys, *flags)[0] == 0
    found = values(read(tmp_path / "repo", "tensorrt_llm"))
    assert (found["max_tokens_in_paged_kv_cache"], found["enable_kv_cache_reuse"]) == ("4096", "false")


def test_the_python_model_loads_the_plugins_first(capsys, template, engine_dir, tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    flags = ["--engine_dir", engine_dir, "--model_repo", repo, "--template_repo", template]
    for _ in range(2):  # again on a repository that is there
        assert run(capsys, *flags, "--backend", "tensorrtllm_python")[0] == 0
    path = repo / "tensorrt_llm" / "1" / "model.py"
    assert path.with_name("tensorrt_llm_model.py").read_text() == MODEL
    spec = importlib.util.spec_from_file_location("triton_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    monkeypatch.setattr(module, "load_plugins", lambda: model.calls.append("plugins"))
    model.initialize({"model_name": "tensorrt_llm"})
    assert model.calls == ["plugins", {"model_name": "tensorrt_llm"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: (t / "ensemble" / "config.pbtxt").unlink(),
            "has no ensemble/config.pbtxt: give TensorRT-LLM 1.2.1's",
        ),
        (lambda t: (t / "ensemble" / "config.pbtxt").write_text("max_batch_size: ${what}"), "cannot be filled in"),
        (
            lambda t: (t / "ensemble" / "config.pbtxt").write_text('backend: "${what}"'),
            "asks for what, which saw-triton",
        ),
    ],
)
def test_templates_of_another_release(capsys, template, engine_dir, preload, tmp_path, change, message):
    change(template)
    flags = ["--engine_dir", engine_dir, "--model_repo", tmp_path / "repo", "--template_repo", template]
    code, said = run(capsys, *flags, "--backend", "tensorrtllm")
    assert code == 2
    assert message in said.err
    assert not (tmp_path / "repo").exists()


def test_an_engine_of_another_backend(capsys, engine, template, tmp_path):
    with pytest.raises(
        EngineError, match=r"is of the backend reference, and TensorRT-LLM serves its own: build it with"
    ):
        repository.check_engine(engine("saw_int4"))
    flags = ["--engine_dir", engine("saw_int4"), "--template_repo", template, "--backend", "tensorrtllm"]
    assert run(capsys, *flags, "--model_repo", tmp_path / "repo")[0] == 2


def test_ranks_are_started_by_mpi(capsys, engine_dir, template, preload, tmp_path):
    config = json.loads((engine_dir / "config.json").read_text())
    config["pretrained_config"]["mapping"] = {"world_size": 2, "tp_size": 2, "pp_size": 1}
    (engine_dir / "config.json").write_text(json.dumps(config))
    flags = ["--engine_dir", engine_dir, "--template_repo", template, "--backend", "tensorrtllm", "--launch"]
    code, said = run(capsys, *flags, "--model_repo", tmp_path / "repo")
    assert code == 2
    assert "launch_triton_server.py --world_size 2" in said.err


def test_the_server_gets_the_library_preloaded(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/theirs.so")
    environment = cli.Installation(Path("tritonserver"), preload=(Path("/ours.so"),)).environment()
    assert environment["LD_PRELOAD"].split(":") == ["/ours.so", "/theirs.so"]
    monkeypatch.delenv("LD_PRELOAD")
    assert "LD_PRELOAD" not in cli.Installation(Path("tritonserver")).environment()


def test_unknown_template_is_named():
    with pytest.raises(ConfigError, match="--template_repo"):
        repository.find_template(None)
