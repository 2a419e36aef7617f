"""The soak in small: whatever happens, each request is answered or fails, and each file opens or is rejected."""

import json

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

pytest.importorskip("tritonclient", reason="the soak's server is asked by Triton's clients")

from benchmarks.soak.__main__ import losses
from benchmarks.soak.files import soak_files
from benchmarks.soak.requests import FaultyExecutor, soak_requests
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE


def test_requests_among_failures_lose_nothing():
    # A seed of tight pools: sequences are preempted hundreds of times, however the clients' threads take turns.
    counts = soak_requests(6000, seed=13)
    assert losses(counts) == 0, counts
    for kind in ("answered", "failed", "cancelled", "dropped", "injected failures", "preemptions"):
        assert counts[kind] > 20, counts


def test_the_soak_notices_a_wrong_block(monkeypatch):
    """Its oracle is the text that each request must give."""
    real = FaultyExecutor.launch

    def launch(self, step, sampling, context_logits):
        step.kv_cache_block_offsets[:, :, :, 0] = 0
        return real(self, step, sampling, context_logits)

    monkeypatch.setattr(FaultyExecutor, "launch", launch)
    assert soak_requests(300, seed=1)["WRONG"] > 20


def test_damaged_files_are_opened_or_rejected():
    counts = soak_files(240, seed=3, model=EXAMPLE)
    assert losses(counts) == 0, counts
    assert min(counts["opened"], counts["rejected"]) > 20, counts


# What it found.


@pytest.mark.parametrize("token", [0.5, ["x"], {"content": 7}])
def test_named_tokens_that_are_no_text(tmp_path, token):
    (tmp_path / "tokenizer.json").write_bytes((EXAMPLE / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has the token .*: give its text"):
        Tokenizer.load(tmp_path)


def test_a_calibration_with_other_names(tmp_path):
    """Of its model's fields and of its weights: a flipped bit may make a line's end of a letter."""
    import torch

    from saw_trtllm.calibrate import calibrate

    checkpoint, path = Checkpoint.open(EXAMPLE), tmp_path / "calib.safetensors"
    calibrate(checkpoint, torch.arange(1, 513).view(2, 256)).save(path)
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    save_file(tensors, path, metadata | {"model": metadata["model"].replace("rotary_base", "rotary_bass")})
    with pytest.raises(ConfigError, match="cannot be read as a calibration"):
        Calibration.load(path)
    save_file(tensors | {"probe.x\n": tensors["k_center"]}, path, metadata)
    with pytest.raises(ConfigError, match=r"other weights than .* has in 'x\\n'"):
        Calibration.load(path).check(checkpoint)
