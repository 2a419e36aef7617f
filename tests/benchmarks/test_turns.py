"""What reuse costs a conversation: the benchmark computes the rows that the runtime's steps write, at each place."""

import pytest
import torch

from benchmarks.accuracy import turns
from benchmarks.accuracy.turns import Turn
from saw_trtllm import KvCacheConfig, SamplingParams
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.eval.session import open_model
from saw_trtllm.eval.variants import grid
from tests.support.example import EXAMPLE

CHUNK = 32


def test_the_steps_of_a_conversation():
    conversation = [Turn([1, 2, 3], [4, 5]), Turn([1, 2, 3, 4, 5, 6], [7, 8])]
    expected = {
        "none": [0, 0, 0, 0, 4, 4, 7, 8],
        "reuse": [0, 0, 0, 4, 4, 4, 7, 8],  # the first answer's last token comes with the next turn
        "prompts": [0, 0, 0, 3, 4, 4, 7, 8],
        "decoded": [1, 2, 3, 4, 5, 6, 7, 8],
    }
    for history, first in expected.items():
        assert turns.steps_of(conversation, history, chunk=4).tolist() == first


@pytest.mark.parametrize(
    ("history", "cache"),
    [
        ("reuse", KvCacheConfig()),
        ("none", KvCacheConfig(enable_block_reuse=False)),
        ("none", KvCacheConfig(deterministic=True)),
    ],
)
def test_the_runtime_answers_from_these_rows(open_llm, history, cache):
    """The distributions that a conversation through the runtime ends with are those of its steps, and no other's."""
    llm = open_llm("int4", kv_cache_config=cache, prefill_chunk=CHUNK)
    conversation = []
    for new in ("class Counter:\n", "\n\nclass Timer:\n    def start(", "\n\nclass Lock:\n    def acquire("):
        said = [*conversation[-1].prompt, *conversation[-1].answer] if conversation else []
        params = SamplingParams(max_tokens=24, ignore_eos=True, return_generation_logits=True)
        answer = llm.generate([*said, *llm.tokenizer.encode(new)], params)
        conversation.append(Turn(answer.prompt_token_ids, answer.outputs[0].token_ids))
    found = torch.from_numpy(answer.outputs[0].generation_logits).float().log_softmax(-1)

    model = open_model(Checkpoint.open(EXAMPLE), 512)
    [variant] = grid(model.config, ["int4"])
    rows = variant.quantizer(model.exact)
    far = {
        name: turns.compare(found, turns.answer_logprobs(model, conversation[-1], rows, steps))[0]
        for name in ("reuse", "prompts", "none", "decoded")
        for steps in [turns.steps_of(conversation, name, CHUNK)]
    }
    nearest = far.pop(history)
    # Sums of another order move a code to its neighbor here and there.
    assert nearest < min(far.values()) / 3, (nearest, far)


def test_means_and_what_histories_differ_by():
    found = {"int4, none": [(1.0, 0.5), (3.0, 0.7)], "int4, reuse": [(1.5, 0.5), (3.5, 0.5)]}
    rows = turns.table(found)
    assert rows["int4, none"]["kl"] == pytest.approx([2.0, 1.0])
    assert rows["int4, reuse"]["kl_more"] == pytest.approx([0.5, 0.0])
    assert rows["int4, reuse"]["top1_more"] == pytest.approx([-0.1, 0.1])
    assert "kl_more" not in rows["int4, none"]
