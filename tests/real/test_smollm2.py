"""A real checkpoint on the CPU: it computes what transformers does, and its 4-bit caches lose what they did."""

import copy

import pytest
import torch

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.quantizers import Fp8, QuantizedRows
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.eval.metrics import difference, measure
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from tests.support.quantized import CASES, Case, awq, write_quantized
from tests.support.real import topics, windows
from tests.support.tolerance import chain_rounding

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a Python function that adds two numbers.",
)
ROWS = KVFormat("saw_int4", 64)
#: Groups of 64, since 128 does not divide 576.
AWQ = CASES["awq"].config | {"group_size": 64}


@pytest.fixture(scope="module")
def model(smollm2):
    checkpoint = Checkpoint.open(smollm2[0])
    return WindowModel(checkpoint.config, checkpoint.load_finite, 512)


def test_the_exact_cache_is_transformers(smollm2, model):
    """30 layers of sums of 576 and 1536 terms, in another order."""
    ids = windows(smollm2[0], topics(0, 4), 1, 128)
    with torch.inference_mode():
        expected = smollm2[1](ids).logits
    ours = model.logits(model.hidden(ids))
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=chain_rounding(30 * (576 + 1536), float(expected.abs().max()))
    )
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_answers_are_transformers(smollm2, tmp_path):
    """Greedy, through build, engine, chat template, scheduler and pool."""
    folder, theirs = smollm2
    options = {"kv": "fp16", "max_batch_size": 4, "max_num_tokens": 512, "max_seq_len": 256}
    build(plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="reference", **options)))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with LLM(tmp_path / "engine") as llm:
        answers = llm.chat(chats, SamplingParams(max_tokens=16))
        prompts = [llm.chat_prompt(chat)["prompt_token_ids"] for chat in chats]
    for answer, prompt in zip(answers, prompts, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        end = (2,) if answer.outputs[0].finish_reason == "stop" else ()
        assert [*answer.outputs[0].token_ids, *end][:16] == expected[0, len(prompt) :].tolist()[:16]
    assert "Paris" in answers[0].outputs[0].text


#: What each cache loses at most: half as much again as was measured.
MOST = {"fp8": 0.018, "int4": 0.2, "rotated": 0.086, "frames": 0.018}


def test_caches_lose_what_they_did(smollm2, model):
    """And in this order, beyond chance; a calibration on other pages leaves a third of the rotation's loss."""
    calibration = calibrate(Checkpoint.open(smollm2[0]), windows(smollm2[0], topics(40, 79), 4, 512))
    caches = {
        "fp8": Fp8(),
        "int4": QuantizedRows(KVFormat("int4", 64, range_factor=1.0)),
        "rotated": QuantizedRows(ROWS),
        "frames": QuantizedRows.calibrated(ROWS, ROWS, calibration),
    }
    measured = measure(model, windows(smollm2[0], topics(0, 40), 2, 512), caches)
    found = {name: sums.quality(0.0).kl_mean for name, sums in measured.items()}
    assert {name: kl for name, kl in found.items() if not kl < MOST[name]} == {}
    for worse, better in (("int4", "rotated"), ("rotated", "frames"), ("rotated", "fp8")):
        d = difference(measured[worse], measured[better])
        assert d.is_real
        assert d.mean > 0
    assert found["frames"] < found["rotated"] / 2.5


@pytest.mark.parametrize("case", [Case(awq(64), AWQ), CASES["fbgemm_fp8"]], ids=["INT4", "FP8"])
def test_quantized_weights_are_transformers_with_the_dequantized_ones(smollm2, tmp_path, case):
    """Each token's logits to fp32's rounding, so that divergences from any other model are the same too."""
    folder, original = smollm2
    theirs = copy.deepcopy(original)
    checkpoint = Checkpoint.open(write_quantized(tmp_path / "quantized", theirs, folder, case))
    model = WindowModel(checkpoint.config, checkpoint.load_finite, 128)
    ids = windows(folder, topics(0, 4), 1, 128)
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert not torch.allclose(expected, original(ids).logits, atol=0.1)
    ours = model.logits(model.hidden(ids))
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=chain_rounding(30 * (576 + 1536), float(expected.abs().max()))
    )
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
