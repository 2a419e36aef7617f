import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.rope import rotary_cos_sin, table_bytes
from tests.support.tolerance import EPS

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def model_config(head_dim, base, scaling):
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_size=head_dim,
        intermediate_size=64,
        vocab_size=10,
        max_position_embeddings=4096,
        rotary_base=base,
        rotary_scaling=scaling,
    )


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.0},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN | {"attention_factor": 0.7},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        YARN | {"truncate": False},
        YARN | {"factor": 0.5},
    ],
)
@pytest.mark.parametrize(("head_dim", "base"), [(64, 10000.0), (128, 500000.0), (96, 1e6), (256, 10000.0)])
def test_table_is_transformers(head_dim, base, scaling):
    parameters = {"rope_type": "default", "rope_theta": base} | (scaling or {})
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=parameters)
    num_positions = 1000
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(num_positions)[None])
    table = rotary_cos_sin(model_config(head_dim, base, scaling), num_positions)
    assert table.dtype == np.float32
    assert table.shape == (num_positions, head_dim // 2, 2)
    for i, theirs in enumerate((cos, sin)):
        # Both halves of a head turn by the same angles. Theirs are products in fp32.
        halves = np.concatenate([table[..., i]] * 2, axis=-1)
        np.testing.assert_allclose(halves, theirs[0], rtol=0, atol=2 * num_positions * EPS)


def test_unknown_scaling_is_rejected():
    with pytest.raises(ValidationError, match="dynamic"):
        model_config(64, 10000.0, {"rope_type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    ("base", "scaling"),
    [
        (0.0, None),
        (-1.0, None),
        (float("nan"), None),
        (float("inf"), None),
        (10000.0, {"rope_type": "linear"}),
        *(
            (10000.0, {"rope_type": "linear", "factor": bad})
            for bad in (0, -2.0, 1e-300, float("nan"), "2", True, None)
        ),
        *((10000.0, {k: v for k, v in LLAMA3.items() if k != key}) for key in LLAMA3),
        (10000.0, LLAMA3 | {"high_freq_factor": 1.0}),
        (10000.0, YARN | {"attention_factor": float("nan")}),
        (10000.0, YARN | {"beta_fast": -1.0}),
        (10000.0, YARN | {"original_max_position_embeddings": 0}),
    ],
)
def test_what_would_give_a_table_of_garbage_is_rejected(base, scaling):
    with pytest.raises(ValidationError):
        model_config(64, base, scaling)


@pytest.mark.parametrize(("head_dim", "scaling"), [(64, None), (128, YARN)])
def test_a_table_is_the_same_in_pieces(monkeypatch, head_dim, scaling):
    """1000 rows at once or 64 at a time, of which the last piece is not full."""
    config = model_config(head_dim, 10000.0, scaling)
    whole = rotary_cos_sin(config, 1000)
    monkeypatch.setattr("saw_trtllm.model.rope._ROWS_AT_ONCE", 64)
    np.testing.assert_array_equal(rotary_cos_sin(config, 1000), whole)
    assert table_bytes(config, 1000) == whole.nbytes
