import numpy as np
import pytest

from saw_trtllm.backends.tensorrt.sample_rows import StagedRows, TokenLists
from saw_trtllm.ops.sample import BANNED, BY_LIKELIHOOD, BY_TOKEN, GREEDY, LISTED, NOTHING, ROW, UNSEEN
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

VOCAB = 1000


def state(generated=(), prompt=(1, 2), banned=(), index=None, **params):
    return SamplingState(SamplingParams(**params), list(prompt), list(generated), banned, index)


def staged(count=8):
    return StagedRows(np.full(count, 255, np.uint8).repeat(ROW.itemsize).view(ROW), VOCAB)


def as_dict(listed):
    assert len(set(listed["token"].tolist())) == len(listed), "a token stands twice in a list"
    return dict(zip(listed["token"].tolist(), listed["count"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("params", "draw"),
    [
        ({}, GREEDY),
        ({"temperature": 0.0, "top_p": 0.5}, GREEDY),
        ({"top_k": 1}, GREEDY),
        ({"temperature": 0.7}, BY_TOKEN),
        ({"top_k": 0}, BY_TOKEN),
        ({"min_p": 0.1}, BY_TOKEN),
        ({"top_k": 2}, BY_LIKELIHOOD),
        ({"top_p": 1.0}, BY_LIKELIHOOD),
    ],
)
def test_the_kind_of_draw(params, draw):
    rows = staged()
    rows.fill([state(**params)])
    assert rows.rows["draw"].tolist() == [draw] + [NOTHING] * 7


def test_every_field_of_a_row():
    rows = staged()
    params = {
        "temperature": 0.5,
        "top_p": 0.25,
        "min_p": 0.125,
        "top_k": 10**12,
        "seed": 2**64 - 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logprobs": True,
    }
    rows.fill([None, state([5, 6, 7], **params), state([5, 6, 7], index=4, temperature=2.0), state(top_k=7)])
    assert rows.rows[0]["draw"] == NOTHING
    assert rows.rows[1].tolist() == (2**64 - 1, 3, 0.5, 0.25, 0.125, 1.5, -1.0, 2.0, 0, 0, 0, VOCAB, BY_LIKELIHOOD, 1)
    assert rows.rows[2].tolist() == (0, 4, 2.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 0, BY_TOKEN, 0)
    assert rows.rows[3].tolist() == (0, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 7, BY_LIKELIHOOD, 0)


def test_rows_follow_the_sequences_that_come_and_go():
    rng = np.random.default_rng(4)
    rows, several = staged(6), [state(temperature=1.0 + i, seed=i) for i in range(9)]
    for step in range(60):
        chosen = rng.permutation(9)[: rng.integers(0, 7)]
        sampling = [None if rng.random() < 0.2 else several[i]._replace(number=step) for i in chosen]
        rows.fill(sampling)
        fresh = staged(6)
        fresh.fill(sampling)
        drawing = fresh.rows["draw"] != NOTHING
        assert (rows.rows["draw"] == fresh.rows["draw"]).all()
        assert (rows.rows[drawing] == fresh.rows[drawing]).all()


def test_lists_count_the_text_and_name_the_prompt():
    """From step to step as the texts grow, against counting anew."""
    rng = np.random.default_rng(5)
    lists, texts = TokenLists(), [[] for _ in range(5)]
    prompts = [rng.integers(0, 50, rng.integers(1, 300)).tolist() for _ in range(5)]
    params = [
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(repetition_penalty=0.9, frequency_penalty=1.0),
        SamplingParams(temperature=1.0),
    ]
    for step in range(80):
        used = [i for i in range(5) if (step + i) % 7]
        banned = (step % 50, 60) if step < 40 else ()
        given = lists.of([SamplingState(params[i], prompts[i], texts[i], banned) for i in used])
        for place, i in enumerate(used):
            expected = dict.fromkeys(prompts[i], 0) if params[i].repetition_penalty != 1 else {}
            for token in texts[i] if params[i].penalizes else ():
                expected[token] = expected.get(token, 0) + 1
            expected |= dict.fromkeys(banned, BANNED)
            assert as_dict(given[place]) == expected if expected else place not in given
        for i in used:
            texts[i] += rng.integers(0, 300, rng.integers(0, 4)).tolist()


def test_biases_stand_beside_the_counts():
    """A token that neither prompt nor text holds has a bias and no penalty, until it comes."""
    lists, text, bias = TokenLists(), [], {7: 2.0, 8: -1.0, 9: 0.5}
    for params, prompt in ((SamplingParams(logit_bias=bias, repetition_penalty=1.5), {9: 0, 3: 0}),) * 2:
        states = [SamplingState(params, [9, 3], text, (8,) if text else ())]
        [listed] = lists.of(states).values()
        seen = {7: text.count(7) or UNSEEN, 8: BANNED if text else UNSEEN, **prompt}
        assert as_dict(listed) == seen
        assert {t: b for t, b in zip(listed["token"].tolist(), listed["bias"].tolist(), strict=True) if b} == {
            token: value for token, value in bias.items() if seen[token] != BANNED
        }
        text += [7, 7]
    [listed] = TokenLists().of([SamplingState(SamplingParams(logit_bias=bias), [9], [7], ())]).values()
    assert as_dict(listed) == dict.fromkeys(bias, UNSEEN)


def test_a_list_is_not_taken_for_that_of_a_sequence_that_is_gone():
    lists = TokenLists()
    for i in range(50):  # an id may come again
        [listed] = lists.of([state([i, i], prompt=[99], repetition_penalty=2.0)]).values()
        assert as_dict(listed) == {99: 0, i: 2}
    for i in range(50):
        [listed] = lists.of([state([i, i], logit_bias={i: 1.0})]).values()
        assert as_dict(listed) == {i: UNSEEN}


def test_sizes_and_the_generator_are_the_kernels():
    kernels = pytest.importorskip("saw_trtllm._C")
    assert (ROW.itemsize, LISTED.itemsize) == (kernels.SAMPLE_ROW_BYTES, kernels.LISTED_TOKEN_BYTES)
    for seed in (0, 1, 12345, 2**63 + 11, 2**64 - 1):
        for index in (0, 1, 2, 1000, 2**40):
            numpys = np.random.Generator(np.random.Philox(key=seed, counter=index)).random()
            assert kernels.philox_uniform(seed, index) == numpys
