"""The sampling kernel against the CPU sampler: the same choice for the same logits, parameters and number of the draw.

Both point with the same random number into cumulated probabilities, the CPU's summed in float64 and the kernel's in
fixed point. They differ by up to 1e-11 of the sum, so fewer than one draw in ten million fall to the neighbour in the
order; none of the fixed draws here does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.backends.tensorrt.sample_rows import StagedRows, TokenLists
from saw_trtllm.ops.sample import LISTED, ROW
from saw_trtllm.runtime.sampling import SamplingState, sample, top_logprobs
from saw_trtllm.runtime.sampling_params import MAX_TOP_LOGPROBS, SamplingParams

_C = pytest.importorskip("saw_trtllm._C")

DRAWS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 0.6},
    {"top_p": 1.0},
    {"top_p": 0.01},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.8, "temperature": 1.3},
    {"top_k": 100_000, "top_p": 0.5},
    {"top_k": 3, "logprobs": True},
    {"min_p": 0.05},
    {"min_p": 1.0, "temperature": 1.7},
    {"min_p": 0.3, "temperature": 2.0, "top_p": 0.8},
    {"min_p": 0.02, "top_k": 20, "logprobs": True},
]
VOCABS = [1, 2, 5, 127, 129, 1000, 4096, 32_000, 50_257, 128_256, 262_144]


def device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).cuda()


class Launch:
    """A launch's arrays on the GPU, with canaries after the outputs."""

    def __init__(self, logits, states, row_ends=None):
        self.logits, self.count = logits, len(states)
        rows = np.zeros(len(states), ROW)
        StagedRows(rows, logits.shape[-1]).fill(states)
        lists = TokenLists().of(states)
        listed = np.concatenate([np.zeros(1, LISTED), *lists.values()])
        listed["logit"] = np.nan
        masks = {i: s.mask for i, s in enumerate(states) if s is not None and s.mask is not None}
        self.masks = {i: device(mask) for i, mask in masks.items()}
        self.listed, start = device(listed), 1
        for i, one in lists.items():
            rows[i]["listed"], rows[i]["num_listed"] = self.listed.data_ptr() + start * LISTED.itemsize, len(one)
            start += len(one)
        for i, mask in self.masks.items():
            rows[i]["mask"] = mask.data_ptr()
        self.rows = device(rows)
        self.row_ends = None if row_ends is None else torch.tensor(row_ends, dtype=torch.int32, device="cuda")
        self.tokens = torch.full((len(states) + 1,), -7, dtype=torch.int32, device="cuda")
        self.logprobs = torch.full((len(states) + 1,), torch.nan, dtype=torch.float64, device="cuda")
        top = (len(states) + 1, MAX_TOP_LOGPROBS)
        self.top_tokens = torch.full(top, -7, dtype=torch.int32, device="cuda")
        self.top_logprobs = torch.full(top, torch.nan, dtype=torch.float64, device="cuda")

    def run(self):
        ops.sample(
            self.logits,
            self.rows,
            tokens=self.tokens[:-1],
            logprobs=self.logprobs[:-1],
            top_tokens=self.top_tokens[:-1],
            top_logprobs=self.top_logprobs[:-1],
            row_ends=self.row_ends,
            stream=torch.cuda.current_stream(),
        )

    def results(self):
        torch.cuda.synchronize()
        assert self.tokens[-1] == -7
        assert self.logprobs[-1].isnan()
        return self.tokens[:-1].tolist(), self.logprobs[:-1].cpu().numpy()


def launched(logits, states, row_ends=None):
    """A launch that is done; the logits must be as they were, and what lies around them is poison."""
    surrounded = torch.full((len(logits) + 2, logits.shape[1]), torch.nan)
    surrounded[1:-1] = torch.from_numpy(logits)
    before = surrounded.clone()
    on_gpu = surrounded.cuda()
    ends = [i + 2 for i in range(len(states))] if row_ends is None else [e + 1 for e in row_ends]
    launch = Launch(on_gpu, states, ends)
    launch.run()
    torch.cuda.synchronize()
    assert torch.equal(on_gpu.cpu().view(torch.int32), before.view(torch.int32))
    return launch


def draw(logits, states, row_ends=None):
    """Tokens and log-probabilities."""
    return launched(logits, states, row_ends).results()


def state(params, i=0, prompt=(), generated=(), banned=(), index=None, mask=None):
    return SamplingState(SamplingParams(seed=977 * i + 3, **params), list(prompt), list(generated), banned, index, mask)


def packed(allowed):
    """A mask of a row of booleans."""
    bits = np.packbits(allowed, bitorder="little")
    return np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint8)]).view(np.uint32)


def check(logits, states, tolerance=1e-8):
    tokens, logprobs = draw(logits, states)
    expected = [sample(row, s) for row, s in zip(logits, states, strict=True)]
    assert tokens == [token for token, _ in expected]
    for s, got, (_, logprob) in zip(states, logprobs, expected, strict=True):
        assert abs(got - logprob) < tolerance if s.params.logprobs else np.isnan(got)


def random_logits(rng, rows, vocab, spread=3.0, dtype=np.float32):
    return (rng.standard_normal((rows, vocab)) * spread).astype(dtype).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(31)


@pytest.mark.parametrize("vocab", VOCABS)
def test_choices_are_the_cpus(vocab, rng):
    repeats = 8 if vocab < 10_000 else 2
    states = [state(p, i, index=i * 7) for i, p in enumerate(DRAWS * repeats)]
    check(random_logits(rng, len(states), vocab), states)
    rounded = random_logits(rng, len(states), vocab, dtype=np.float16)  # what an fp16 engine gives: many are equal
    check(rounded, states)


@pytest.mark.parametrize("params", DRAWS)
@pytest.mark.parametrize("kind", ["equal", "ties", "flat", "steep", "shifted", "huge", "masked", "zeros", "one"])
def test_shapes_of_the_distribution(kind, params, rng):
    rows, vocab = 12, 3001
    logits = {
        "equal": lambda: np.full((rows, vocab), 1.25, np.float32),
        "ties": lambda: np.round(random_logits(rng, rows, vocab)),
        "flat": lambda: random_logits(rng, rows, vocab, 1e-4),
        "steep": lambda: random_logits(rng, rows, vocab, 40),
        "shifted": lambda: random_logits(rng, rows, vocab) - 300,
        "huge": lambda: random_logits(rng, rows, vocab, 1e30),
        "masked": lambda: np.where(rng.random((rows, vocab)) < 0.9, -np.inf, random_logits(rng, rows, vocab)),
        "zeros": lambda: np.where(rng.random((rows, vocab)) < 0.5, np.float32(-0.0), np.float32(0.0)),
        "one": lambda: np.where(np.arange(vocab) == 2999, np.float32(5), -np.inf) * np.ones((rows, 1)),
    }[kind]()
    check(logits.astype(np.float32), [state(params, i) for i in range(rows)])


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e30, 1e300])
@pytest.mark.parametrize("params", [{}, {"top_k": 40}, {"top_p": 0.7001}])  # of equal ones, 0.7 would end between two
def test_extreme_temperatures(temperature, params, rng):
    states = [state({**params, "temperature": temperature}, i) for i in range(16)]
    check(random_logits(rng, 16, 5000), states)


@pytest.mark.parametrize("params", DRAWS)
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": -0.4},
        {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    ],
)
def test_penalties_and_bans(params, penalties, rng):
    vocab, states = 5003, []
    for i in range(16):
        prompt, generated = (rng.integers(0, 200, n).tolist() for n in (rng.integers(1, 3000), rng.integers(0, 60)))
        banned = tuple(rng.choice(300, i % 4, replace=False).tolist())
        states.append(state({**params, **penalties}, i, prompt, generated, banned))
    logits = random_logits(rng, 16, vocab)
    logits[:, :300] += 4  # so that they matter
    check(logits, states)


@pytest.mark.parametrize("params", DRAWS)
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.5}])
def test_biases(params, penalties, rng):
    """Of tokens that prompt and text hold, and of others, which have no penalty; some are banned too."""
    vocab, states = 5003, []
    for i in range(16):
        prompt, generated = (rng.integers(0, 200, rng.integers(1, 300)).tolist() for _ in range(2))
        tokens = rng.choice(400, rng.integers(1, 300), replace=False).tolist()
        bias = dict(zip(tokens, rng.uniform(-9, 9, len(tokens)), strict=True))
        states.append(state({**params, **penalties, "logit_bias": bias}, i, prompt, generated, tuple(tokens[: i % 3])))
    check(random_logits(rng, 16, vocab), states)


@pytest.mark.parametrize("params", DRAWS)
@pytest.mark.parametrize("vocab", [1, 31, 33, 130, 3001, 32_000])
def test_masks(params, vocab, rng):
    """Of few and of most tokens, beside rows without one, and with penalties and bans."""
    states = []
    for i in range(16):
        allowed = rng.random(vocab) < (0.001, 0.2, 0.97)[i % 3]
        allowed[rng.integers(0, vocab)] = True
        words = {"repetition_penalty": 1.5} if i % 2 and vocab > 2 else {}
        banned = (0,) if i % 5 == 4 and allowed[1:].any() else ()
        mask = None if i % 4 == 3 else packed(allowed)
        states.append(state({**params, **words, "logprobs": True}, i, [0], [vocab - 1], banned, mask=mask))
    check(random_logits(rng, 16, vocab), states)


@pytest.mark.parametrize("vocab", [1, 5, 129, 3001, 32_000, 128_256])
@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.5}, {"top_p": 0.7, "temperature": 2.0}])
def test_the_likeliest_tokens_and_their_logprobs_are_the_cpus(vocab, changes, rng):
    """Of the logits as they came, equals by token; beside rows that want none, and nothing after what is wanted."""
    counts = [0, 1, 5, 20, MAX_TOP_LOGPROBS]
    logits = random_logits(rng, len(counts), vocab, dtype=np.float16)  # with equals
    masks = [packed(rng.random(vocab) < 0.5) if i % 2 else None for i in range(len(counts))]
    for mask in masks:
        if mask is not None:
            mask[0] |= 1
    prompt = rng.integers(0, vocab, 9).tolist()
    states = [state({**changes, "top_logprobs": n}, i, prompt, mask=masks[i]) for i, n in enumerate(counts)]
    launch = launched(logits, states)
    tokens, logprobs = launch.top_tokens.tolist(), launch.top_logprobs.cpu().numpy()
    for row, count in enumerate(counts):
        expected = top_logprobs(logits[row], count) if count else []
        assert tokens[row][: len(expected)] == [token for token, _ in expected]
        np.testing.assert_allclose(logprobs[row, : len(expected)], [x for _, x in expected], rtol=0, atol=1e-8)
        assert set(tokens[row][len(expected) :]) <= {-7}
    assert set(tokens[-1]) == {-7}


def test_the_likeliest_banned(rng):
    logits = random_logits(rng, 8, 1000)
    banned = [tuple(np.argsort(-row)[:5].tolist()) for row in logits]
    params = [{}, {"temperature": 1.0}, {"top_k": 3}, {"top_p": 0.5}] * 2
    check(logits, [state({**p, "logprobs": True}, i, banned=banned[i]) for i, p in enumerate(params)])


def test_rows_are_found_and_others_left_alone(rng):
    logits = random_logits(rng, 9, 700)
    states = [state({"temperature": 1.0, "logprobs": True}, i) if i != 2 else None for i in range(4)]
    tokens, logprobs = draw(logits, states, row_ends=[3, 4, 9, 1])
    for i, row in ((0, 2), (1, 3), (3, 0)):
        token, logprob = sample(logits[row], states[i])
        assert (tokens[i], round(logprobs[i], 7)) == (token, round(logprob, 7))
    assert tokens[2] == -1
    assert np.isnan(logprobs[2])


@pytest.mark.parametrize("vocab", [1001, 32_000])
def test_a_choice_is_the_same_alone_and_in_any_batch(vocab, rng):
    """Eight CTAs work on a lone row, one on each of many."""
    states = [state({**p, "logprobs": True}, i) for i, p in enumerate(DRAWS)]
    logits = random_logits(rng, len(states), vocab)
    alone = [draw(logits[i : i + 1], [s]) for i, s in enumerate(states)]
    for repeats in (1, 2, 4, 20):
        tokens, logprobs = draw(np.tile(logits, (repeats, 1)), states * repeats)
        assert tokens == [t for t, _ in alone for t in t] * repeats
        np.testing.assert_array_equal(logprobs, np.concatenate([p for _, p in alone] * repeats))


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"top_k": 9}, {"top_p": 0.8}, {}])
def test_broken_logits_give_some_token(params, rng):
    logits = random_logits(rng, 6, 2000)
    logits[0] = np.nan
    logits[1, ::3] = np.nan
    logits[2, 7] = np.inf
    logits[3] = -np.inf
    logits[4] = np.inf
    tokens, _ = draw(logits, [state({**params, "logprobs": True}, i) for i in range(6)])
    assert all(0 <= t < 2000 for t in tokens)
    assert tokens[2] == 7
    assert tokens[1] % 3 != 0
    assert tokens[5] == sample(logits[5], state(params, 5))[0]


def test_graph_replays_see_new_inputs_and_two_runs_agree(rng):
    vocab, rows = 8000, len(DRAWS)
    first, second = (random_logits(rng, rows, vocab) for _ in range(2))
    states = [[state(p, 3 * i + k, [1, 2], [3, 4], (5,)) for i, p in enumerate(DRAWS)] for k in range(2)]
    launches = [Launch(torch.from_numpy(x).cuda(), s) for x, s in zip((first, second), states, strict=True)]
    for launch in launches:
        launch.run()
    expected = [launch.results() for launch in launches]
    captured = Launch(torch.from_numpy(first).cuda(), states[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for k in (0, 1, 1, 0):
        captured.logits.copy_(launches[k].logits)
        captured.rows.copy_(launches[k].rows)  # with the addresses of that launch's lists
        captured.tokens[:-1] = -3
        graph.replay()
        tokens, logprobs = captured.results()
        assert tokens == expected[k][0]
        wanted = ~np.isnan(expected[k][1])
        np.testing.assert_array_equal(logprobs[wanted], expected[k][1][wanted])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_negative_ids_become_the_last_tokens(count, rng):
    tokens = rng.integers(0, 1000, 64)
    ids = np.where(rng.random(count) < 0.5, rng.integers(0, 1000, count), -1 - rng.integers(0, 64, count))
    on_gpu = torch.tensor(np.append(ids, -1), dtype=torch.int32, device="cuda")
    source = torch.tensor(tokens, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    code = _C.resolve_tokens(input_ids=on_gpu.data_ptr(), num_tokens=count, tokens=source.data_ptr(), stream=stream)
    assert code == 0
    assert on_gpu[:-1].tolist() == np.where(ids < 0, tokens[np.clip(-1 - ids, 0, 63)], ids).tolist()
    assert on_gpu[-1] == -1


def test_a_vocabulary_beyond_the_sums_is_rejected():
    logits = torch.zeros(1, _C.MAX_VOCAB + 4, device="cuda")
    code = _C.sample(
        logits=logits.data_ptr(),
        row_ends=0,
        rows=0,
        tokens=0,
        logprobs=0,
        top_tokens=0,
        top_logprobs=0,
        max_top=0,
        num_rows=1,
        vocab_size=logits.shape[1],
        stream=0,
    )
    assert "InvalidValue" in _C.error_string(code)


def test_the_sampler_draws_step_after_step(rng):
    """GpuSampler over CUDA's own bindings: penalties that grow, sequences that come and go, both sets in turn."""
    pytest.importorskip("cuda.bindings")
    from saw_trtllm.backends.tensorrt.sampler import GpuSampler

    sampler, vocab = GpuSampler(6, 30_000), 30_000  # whose masks are larger than what there is room for at first
    torch.cuda.synchronize()
    texts = [[] for _ in range(6)]
    params = [
        SamplingParams(temperature=1.0, seed=i, logprobs=True, repetition_penalty=(1.0, 1.4)[i % 2]) for i in range(6)
    ]
    prompts = [rng.integers(0, vocab, 2000).tolist() for _ in range(6)]
    stream = torch.cuda.current_stream().cuda_stream
    for step in range(30):
        used = [i for i in range(6) if (step + i) % 5]
        logits = random_logits(rng, len(used), vocab, 1.0)
        masks = {i: packed(rng.random(vocab) < 0.5) for i in used if step > 20 and i % 2}
        states = [
            SamplingState(params[i], prompts[i], texts[i], (i,) if step < 9 else (), mask=masks.get(i)) for i in used
        ]
        on_gpu = torch.from_numpy(logits).cuda()
        sampler.prepare(states)
        sampler.enqueue(on_gpu.data_ptr(), 0, len(used), stream)
        ids = torch.tensor([-1 - j for j in range(len(used))], dtype=torch.int32, device="cuda")
        sampler.resolve(ids.data_ptr(), len(used), stream)
        expected = [sample(row, s)[0] for row, s in zip(logits, states, strict=True)]
        assert ids.tolist() == expected
        for i, token in zip(used, expected, strict=True):
            texts[i].append(token)
    assert sampler.nbytes > 6 * (ROW.itemsize + 12)
    sampler.close()
