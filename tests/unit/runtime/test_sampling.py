import copy
import dataclasses
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.sampling import SamplingState, _penalize, sample, top_logprobs
from saw_trtllm.runtime.sampling_params import SamplingParams
from tests.support.tolerance import sum_rounding

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0, 0.9], dtype=np.float32)
DRAWS = 3000


def draw(logits=LOGITS, prompt=(), generated=(), banned=(), **params):
    state = SamplingState(SamplingParams(**params), list(prompt), list(generated), banned)
    return sample(np.asarray(logits, dtype=np.float32), state)[0]


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def frequencies(**params):
    """Tokens drawn under many seeds."""
    return np.bincount([draw(seed=s, **params) for s in range(DRAWS)], minlength=len(LOGITS))


def assert_drawn_from(counts, probabilities):
    """Pearson's chi-square against its mean and spread: the mean is the degrees of freedom, the variance twice that."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * DRAWS
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    assert_drawn_from(frequencies(temperature=temperature), softmax(LOGITS / temperature))


@pytest.mark.parametrize("top_k", [2, 3, 7, 8, 100])
def test_top_k(top_k):
    kept = np.sort(LOGITS)[::-1][:top_k].min()
    assert_drawn_from(frequencies(top_k=top_k), softmax(np.where(kept <= LOGITS, LOGITS, -np.inf)))


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_min_p(min_p, temperature):
    """As transformers' MinPLogitsWarper: after the temperature, a share of the likeliest token's probability."""
    p = softmax(LOGITS / (temperature or 1.0))
    kept = np.where(p >= min_p * p.max(), p, 0)
    assert_drawn_from(frequencies(min_p=min_p, temperature=temperature), kept / kept.sum())


def test_logit_bias_is_added_before_the_penalties():
    assert draw(logit_bias={6: 5.5}) == 6
    assert draw(logit_bias={6: 5.5}, generated=[6], repetition_penalty=2.0) == 0
    assert draw(logit_bias={0: -100, 5: -100.0}) == 1


def test_top_logprobs_are_the_likeliest_in_order():
    expected = np.log(softmax(LOGITS))
    found = top_logprobs(LOGITS, 3)
    assert [token for token, _ in found] == [0, 5, 1]
    bound = sum_rounding(len(LOGITS), 1.0)
    assert [value for _, value in found] == pytest.approx(expected[[0, 5, 1]].tolist(), abs=bound)
    assert len(top_logprobs(LOGITS, 100)) == len(LOGITS)
    for count in range(1, 8):  # of those that equal the last, the first tokens
        equals = np.array([0, 1, 2, 1] * 40 + [1, 0], np.float32)
        assert [token for token, _ in top_logprobs(equals, 40 + count)][40:] == [1, 3, 5, 7, 9, 11, 13][:count]


@pytest.mark.parametrize("top_p", [0.1, 0.4, 0.8, 0.99, 1.0])
def test_top_p(top_p):
    """The fewest of the likeliest tokens that hold the share are kept."""
    p = softmax(LOGITS)
    order = np.argsort(-p)
    count = next(n for n in range(1, 9) if n == 8 or p[order[:n]].sum() >= top_p)
    kept = np.where(np.isin(np.arange(8), order[:count]), p, 0)
    assert_drawn_from(frequencies(top_p=top_p), kept / kept.sum())


def test_top_p_is_of_what_temperature_and_top_k_leave():
    p = softmax(LOGITS[[0, 5, 1, 7]] / 0.7)
    assert p[0] < 0.6 < p[0] + p[1]
    kept = np.zeros(8)
    kept[[0, 5]] = p[:2] / p[:2].sum()
    assert_drawn_from(frequencies(temperature=0.7, top_k=4, top_p=0.6), kept)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.0}, {"top_k": 1, "temperature": 5.0}, {"top_p": 0.0}, {"temperature": 0.0, "top_p": 0.9}],
)
def test_greedy(params):
    assert SamplingParams(**params).greedy
    assert {draw(seed=s, **params) for s in range(50)} == {0}


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 0}])
def test_asking_for_sampling_samples(params):
    assert not SamplingParams(**params).greedy
    assert len({draw(seed=s, **params) for s in range(50)}) > 1


def test_ties_fall_by_token_id():
    flat = np.zeros(6)
    assert draw(flat) == 0
    assert {draw(flat, top_k=3, seed=s) for s in range(100)} == {0, 1, 2}
    assert {draw(flat, top_p=0.5, seed=s) for s in range(100)} == {0, 1, 2}
    many = np.tile([1.0, 2.0, 3.0], 500)
    assert {draw(many, top_k=2, seed=s) for s in range(50)} == {2, 5}
    assert {draw(many, top_p=0.0021, seed=s) for s in range(50)} == {2, 5}


def test_a_draw_depends_on_seed_and_index_alone():
    params = {"temperature": 1.0}
    drawn = [draw(generated=[1] * n, seed=s, **params) for s in range(20) for n in range(20)]
    assert drawn == [draw(generated=[2] * n, prompt=[3], seed=s, **params) for s in range(20) for n in range(20)]
    assert len({tuple(drawn[i : i + 20]) for i in range(0, 400, 20)}) == 20
    assert draw(**params) == draw(seed=0, **params)
    assert 0 <= draw(seed=2**64 - 1, **params) < 8
    assert draw(seed=np.int64(5), **params) == draw(seed=5, **params)


def test_draws_of_one_seed_follow_the_distribution():
    counts = np.bincount([draw(temperature=1.0, seed=9, generated=[0] * n) for n in range(DRAWS)], minlength=8)
    assert_drawn_from(counts, softmax(LOGITS))


def test_repetition_penalty_divides_or_multiplies():
    logits = [2.0, 1.9, -1.0, -1.1, 0.0]
    assert draw(logits, prompt=[0], repetition_penalty=1.1) == 1  # 2 / 1.1 < 1.9
    assert draw(logits, generated=[0], repetition_penalty=1.1) == 1
    assert draw(logits, generated=[0, 0, 0], repetition_penalty=1.05) == 0  # once, however often
    assert draw([-1.0, -1.05], generated=[0], repetition_penalty=1.1) == 1  # -1 * 1.1 < -1.05
    assert draw(logits, prompt=[1], repetition_penalty=0.5) == 1  # 1.9 / 0.5


def test_presence_and_frequency_penalties_count_the_text_alone():
    logits = [2.0, 1.5, 1.0]
    assert draw(logits, prompt=[0, 0], presence_penalty=1.0, frequency_penalty=1.0) == 0
    assert draw(logits, generated=[0, 0], presence_penalty=0.6) == 1
    assert draw(logits, generated=[0, 0], presence_penalty=0.4) == 0
    assert draw(logits, generated=[0, 0], frequency_penalty=0.26) == 1
    assert draw(logits, generated=[0], frequency_penalty=0.26) == 0
    assert draw(logits, generated=[2], presence_penalty=-1.1) == 2


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 0.8, "presence_penalty": 0.2, "frequency_penalty": -0.3},
    ],
)
def test_penalized_distribution(params):
    prompt, generated = [1, 4, 4], [0, 5, 5, 5]
    adjusted = LOGITS.astype(np.float64)
    for token in {*prompt, *generated}:
        penalty = params.get("repetition_penalty", 1.0)
        adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
    for token in set(generated):
        adjusted[token] -= params.get("presence_penalty", 0)
        adjusted[token] -= params.get("frequency_penalty", 0) * generated.count(token)
    counts = frequencies(prompt=prompt, generated=generated, temperature=1.0, **params)
    assert_drawn_from(counts, softmax(adjusted))


def test_banned_tokens_never_come():
    assert draw(banned=(0,)) == 5
    left = np.where(np.isin(np.arange(8), [0, 5]), -np.inf, LOGITS)
    assert_drawn_from(frequencies(banned=(0, 5), temperature=1.0), softmax(left))
    assert draw(banned=(0,), repetition_penalty=0.01, generated=[0]) == 5


@pytest.mark.parametrize("params", [{}, {"temperature": 3.0, "top_k": 2}, {"repetition_penalty": 2.0}])
def test_logprob_is_the_models_own(params):
    state = SamplingState(SamplingParams(logprobs=True, **params), [0], [0])
    token, logprob = sample(LOGITS, state)
    assert logprob == pytest.approx(np.log(softmax(LOGITS.astype(np.float64)))[token], abs=1e-12)
    assert sample(LOGITS, state._replace(params=SamplingParams(**params))) == (token, 0.0)


def test_logits_are_left_as_they_are():
    logits = LOGITS.copy()
    draw(logits, generated=[0], repetition_penalty=2.0, temperature=1.0, top_k=3, top_p=0.5, banned=(1,))
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_extreme_temperatures(temperature):
    drawn = {draw(temperature=temperature, seed=s) for s in range(200)}
    assert drawn == ({0} if temperature < 1 else set(range(8)))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5}])
def test_broken_logits_give_some_token(params):
    """A model that overflows answers nonsense; it does not take the others of its step along."""
    for broken in ([np.nan] * 8, [np.nan, 1, 2, 3, 4, 5, 6, 7]):
        assert 0 <= draw(broken, **params) < 8


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5: it must be a whole number"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": np.float32("nan")}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": -0.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty is 1e-45: it must be a number from 0.001 to 1000"),
        ({"repetition_penalty": np.float32(1e-45)}, "repetition_penalty"),
        ({"repetition_penalty": 1e30}, "repetition_penalty"),
        ({"presence_penalty": -1e300}, "presence_penalty"),
        ({"frequency_penalty": 1e300}, "frequency_penalty"),
        ({"temperature": 10**400}, "temperature is a number of 1329 bits"),
        ({"temperature": Fraction(1, 2)}, "temperature"),
        ({"min_tokens": 10**5000}, "min_tokens is a number of 16610 bits"),
        ({"logprobs": 5}, "logprobs is 5: it must be True or False, and top_logprobs says how many more"),
        ({"logprobs": None}, "logprobs is None"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no': it must be True or False"),
        ({"n": 0}, "n is 0: it must be a whole number from 1 to 128"),
        ({"best_of": 2}, "SamplingParams has no best_of: ask for n texts"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_logprobs": True}, "top_logprobs"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"bad": [""]}, "bad is"),
        ({"bad": 7}, "bad is 7"),
        ({"bad_token_ids": ["a"]}, "bad_token_ids"),
        ({"temprature": 0.1}, "SamplingParams has no temprature: write temperature"),
        ({"zzz": 0.1}, "SamplingParams has no zzz: leave it out; there are max_tokens, min_tokens"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": None}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"end_id": 1.0}, "end_id"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": 1}, "stop_token_ids"),
        ({"bad_token_sequences": [[]]}, "bad_token_sequences"),
        ({"stop_token_sequences": [[]]}, "stop_token_sequences"),
        ({"stop_token_sequences": [1]}, "stop_token_sequences"),
        ({"stop_token_sequences": ["a"]}, "stop_token_sequences"),
    ],
)
def test_bad_parameters_are_rejected(params, said):
    with pytest.raises(RequestError, match=said):
        SamplingParams(**params)


EXTREMES = {
    "temperature": [None, 0.0, 5e-324, np.float32(1e-45), 1.0, 1.7e308],
    "top_p": [None, 0.0, 5e-324, np.float32(1e-45), 1.0],
    "repetition_penalty": [1.0, 1e-3, 1e3],
    "presence_penalty": [0.0, 5e-324, -1e3, 1e3],
    "frequency_penalty": [0.0, 5e-324, -1e3, 1e3],
}


@pytest.mark.parametrize("scale", [1.0, 65504.0, 1e30])
def test_what_is_accepted_gives_finite_logits(scale):
    """NaN would choose a token at random, without a word; warnings are errors here."""
    logits = (LOGITS / np.abs(LOGITS).max() * scale).astype(np.float32)
    generated = [0] * 1000 + [4, 6]
    for values in itertools.product(*EXTREMES.values()):
        params = SamplingParams(logprobs=True, **dict(zip(EXTREMES, values, strict=True)))
        state = SamplingState(params, [1], generated, banned=(5,))
        penalized = _penalize(logits.astype(np.float64), state)
        assert np.isfinite(np.delete(penalized, 5)).all()
        token, logprob = sample(logits, state)
        assert 0 <= token < 8
        assert token != 5
        assert math.isfinite(logprob)


def test_copies_and_pickles_are_the_same():
    params = SamplingParams(max_tokens=3, top_p=0.5)
    assert (
        pickle.loads(pickle.dumps(params)) == copy.copy(params) == dataclasses.replace(params, max_tokens=3) == params
    )


def test_numpys_numbers_are_numbers():
    params = SamplingParams(max_tokens=np.int32(3), temperature=np.float32(0.5), top_k=np.int64(0), seed=np.uint64(7))
    assert params.max_tokens == 3
    assert draw(temperature=np.float32(0.5), seed=np.uint64(7)) == draw(temperature=0.5, seed=7)
