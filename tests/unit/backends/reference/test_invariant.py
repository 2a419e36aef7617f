"""A row's bits do not depend on what is computed beside it, whatever the BLAS does with other numbers of rows."""

import json
import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saw_trtllm import SamplingParams
from saw_trtllm.backends.reference import gemm, invariant, threads
from saw_trtllm.backends.reference.executor import ReferenceExecutor
from saw_trtllm.backends.reference.gemm import linear, products, row_sum
from saw_trtllm.backends.reference.invariant import exp, tanh
from saw_trtllm.backends.reference.silu_mul import silu
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.runtime.sampling import SamplingState
from tests.support import ROOT
from tests.support.tolerance import sum_rounding

EPS = torch.finfo(torch.float32).eps
PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
#: What PyTorch computes in a way that it does not specify, element by element or over a row.
UNSPECIFIED = ("rsqrt", "tanh", "sigmoid", "silu", "log", "pow", "sum", "mean", "_softmax", "cumsum", "addcmul", "lerp")


@pytest.fixture(autouse=True)
def fresh_probes():
    """Each test probes for itself, since a stand-in for the BLAS may be at work."""
    caches = (gemm._tile_rows, gemm._has_the_bits_of, gemm._batches, invariant._exp_elements)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


class Calls(TorchDispatchMode):
    """Records each operator's name and the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.seen.add((func.overloadpacket.__name__, shapes))
        return func(*args, **(kwargs or {}))


class HostileBlas(TorchDispatchMode):
    """Matrix products whose last bits depend on the number of rows or products, or on a row's place among them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("linear", "matmul"):  # which inference mode leaves whole
            with self:
                return func.decompose(*args, **kwargs)
        if name not in ("mm", "addmm", "bmm"):
            return func(*args, **kwargs)
        bias, (x, matrix) = (args[0], args[1:3]) if name == "addmm" else (0, args)
        # One row at a time, so that the true BLAS has no say in it.
        pairs = [(x, matrix)] if name != "bmm" else list(zip(x, matrix, strict=True))
        y = torch.stack([torch.cat([row[None].clone() @ m for row in a]) for a, m in pairs]).view(*x.shape[:-1], -1)
        count, rows = len(pairs), x.shape[-2]
        place = torch.arange(count * rows).view(*x.shape[:-1], 1)
        wrong = {"rows": rows + 7 * count, "count": count, "place": place}[self.kind]
        y = y * (1 + 4 * EPS * (wrong % 251)) + bias
        return kwargs["out"].copy_(y) if "out" in kwargs else y


@pytest.fixture
def executor(engine):
    folder = engine("saw_int4")
    return ReferenceExecutor(folder, EngineConfig.load(folder), 1024, 0.5)


def run(executor, sequences, steps):
    """Logits and tokens of sequences, which are (number, prompt, params), that all run in the same steps."""
    texts, logits = [[] for _ in sequences], []
    for step in range(steps):
        parts, states = [], []
        for (number, prompt, params), text in zip(sequences, texts, strict=True):
            ids, start = (prompt, 0) if step == 0 else (text[-1:], len(prompt) + step - 1)
            kind = PREFILL if step == 0 else DECODE
            parts.append(StepSequence(ids, start, len(prompt) + steps, kind, range(2 * number, 2 * number + 2)))
            states.append(SamplingState(params, prompt, list(text)))
        output = executor.execute(StepInputs.pack(parts, 4), states, [False] * len(parts))
        logits.append(output.logits)
        for text, token in zip(texts, output.token_ids, strict=True):
            text.append(token)
    return [(text, [row[i].tolist() for row in logits]) for i, text in enumerate(texts)]


def requests(count, length):
    """Prompts of ``length`` tokens and more, every other one sampled."""
    ids = random(count, length + count).mul(300).long().abs().clamp(3, 1000).tolist()
    params = [
        SamplingParams(temperature=1.0 if i % 2 else 0.0, seed=i, return_generation_logits=True) for i in range(count)
    ]
    return [(i, ids[i][: length + i], params[i]) for i in range(count)]


# -- the functions


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_exact_arithmetic(bias):
    x, weight, b = random(77, 173), random(50, 173), random(50) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), b if b is None else b.double())
    bound = 173 * EPS * (x.abs().double() @ weight.abs().double().T + 1)
    assert ((linear(x, weight, b) - exact).abs() <= bound).all()

    x, matrices = random(3, 2, 5, 64), random(3, 2, 4, 64, 32)
    exact = x.double()[:, :, None] @ matrices.double()
    bound = 64 * EPS * (x.abs().double()[:, :, None] @ matrices.abs().double())
    for m in (matrices, matrices.mT.contiguous().mT):
        got = products(x, m)
        assert got.shape == (3, 2, 4, 5, 32)
        assert ((got - exact).abs() <= bound).all()


def test_elementwise_functions_and_sums_are_pytorchs():
    x = random(7, 1001) * 10
    assert (row_sum(x) - x.double().sum(-1, keepdim=True)).abs().max() <= sum_rounding(1001, float(x.abs().max()))
    assert row_sum(x[:, :1]).equal(x[:, :1])
    torch.testing.assert_close(exp(x), x.double().exp().float(), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(tanh(x), x.double().tanh().float(), rtol=0, atol=4 * EPS)
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x.double()).float(), rtol=8 * EPS, atol=1e-30)
    assert torch.equal(silu(torch.tensor([-200.0, 0.0, 200.0])), torch.tensor([-0.0, 0.0, 200.0]))
    assert exp(torch.tensor([-torch.inf, 0.0])).tolist() == [0, 1]
    assert exp(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("width", [64, 160, 1001])
@pytest.mark.parametrize("function", [silu, exp, row_sum, lambda x: linear(x, random(40, x.shape[1]))])
def test_a_row_is_the_same_beside_any_others(function, width):
    """1001 columns: the tails of vector loops fall on another column in each row."""
    x = random(300, width)
    single = torch.cat([function(row) for row in x.split(1)])
    for rows in (2, 3, 8, 17, 64, 300):
        assert torch.equal(torch.cat([function(part) for part in x.split(rows)]), single)
    assert torch.equal(function(x.flatten()[3 * width :].view(297, width)), single[3:])  # at another address


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_the_same_beside_any_others(transposed):
    x, matrices = random(70, 300, 64), random(70, 2, 64, 128)
    if transposed:
        matrices = matrices.mT.contiguous().mT
    single = products(x[:1], matrices[:1])
    assert torch.equal(products(x[:1, :1], matrices[:1]), single[:, :, :1])
    for count in (2, 5, 70):
        assert torch.equal(products(x[:count], matrices[:count])[:1], single)
    last = products(x[-1:, :5], matrices[-1:])
    assert torch.equal(products(x, matrices)[-1:, :, :5], last)


@pytest.mark.parametrize(("kind", "sizes"), [("rows", (16,)), ("count", (4, 8, 16, 32, 64, 128, 256)), ("place", (1,))])
def test_tiles_shrink_where_the_library_asks_for_it(kind, sizes):
    with HostileBlas(kind):
        assert gemm._tile_rows(96, 40, True, (1, 1), 256) == sizes
        assert gemm._batches(96, 40, True, (1, 1), sizes[0]) == (1,)


def test_tiles_of_a_few_rows_are_tiles_of_many():
    """How many rows there are decides what is probed, and nothing else."""
    sizes = [gemm._tile_rows(96, 40, True, (1, 1), limit) for limit in (16, 64, 512)]
    assert all(16 in found and set(found) <= set(more) for found, more in pairwise(sizes))


def test_the_probe_tells_places_of_an_elementwise_loop_apart(monkeypatch):
    """A tail of 5 elements, as scalar code after a vector loop leaves it, is found out."""
    true_exp = torch.exp

    def exp_with_a_tail(x):
        y = true_exp(x)
        return torch.cat([y[:-5], y[-5:] * (1 + 4 * EPS)]) if len(y) > 5 else y

    monkeypatch.setattr(torch, "exp", exp_with_a_tail)
    assert invariant._exp_elements(1) == (1,)


# -- the whole model


def test_the_number_of_rows_never_reaches_the_library(executor):
    """All products and transcendental functions of all steps are calls of a few shapes, whatever the batch."""
    elements = invariant._exp_elements(torch.get_num_threads())
    for count in (1, 3):
        with Calls() as calls:
            run(executor, requests(count, 20 + count), 3)
        names = {name for name, _ in calls.seen}
        assert not names & {*UNSPECIFIED, *PRODUCTS} - {"mm", "bmm"}
        operands = {shapes[0] for name, shapes in calls.seen if name in ("mm", "bmm")}
        assert {shape[-2] for shape in operands} <= {*gemm._BASE_ROWS, *gemm._MORE_ROWS}
        assert {shape[0] for shape in operands if len(shape) == 3} <= {*gemm._MORE_PRODUCTS}
        assert {s[0] for name, s in calls.seen if name == "exp"} <= {(n,) for n in elements}


class ThreadCounts(TorchDispatchMode):
    """Records for each operator how much it multiplies and how many threads it may take."""

    def __init__(self):
        super().__init__()
        self.small, self.large, self.others = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = self.others
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            seen = self.large if args[0].shape[-2] * args[1].numel() >= gemm._SHARED else self.small
        seen.add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


def test_a_calls_number_of_threads_follows_from_its_shape(executor, monkeypatch):
    """One, but for a large product; and the thread that ran the step has as many as before, whatever came."""
    monkeypatch.setattr(gemm, "_SHARED", 1 << 18)
    monkeypatch.setattr(executor, "_num_threads", 3)
    before, sequences = torch.get_num_threads(), requests(3, 50)
    torch.set_num_threads(3)
    try:
        with ThreadCounts() as counts:
            run(executor, sequences, 2)
        assert (counts.small, counts.large, counts.others) == ({1}, {3}, {1})
        monkeypatch.setattr(executor._model, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(executor, sequences, 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_step_beside_another_has_all_its_threads():
    """A thread that has not used PyTorch before takes the number of the last that set one, which may be in a step."""
    before, found = torch.get_num_threads(), []

    def step():
        with threads.one_thread(3), threads.all_threads():
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    try:
        with threads.one_thread(3):
            other = threading.Thread(target=step)
            other.start()
            other.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3, 3]


@pytest.mark.parametrize("kind", ["rows", "count", "place"])
def test_a_hostile_blas_does_not_change_a_bit(executor, kind):
    sequences = requests(3, 12)
    with HostileBlas(kind):
        single = [run(executor, [sequence], 3)[0] for sequence in sequences]
        batch = run(executor, sequences, 3)
    assert batch == single


# -- the BLAS as it is


@pytest.mark.parametrize(
    "setting",
    [{}, {"MKL_CBWR": "COMPATIBLE"}, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}],
    ids=["default", "compatible", "avx2"],
)
def test_a_batch_changes_no_token_whatever_mkl_does(engine, setting):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "TRUE"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.batch_invariance", engine("saw_int4")],
        cwd=ROOT,
        env=environment | setting,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr  # else one busy core holds up every call of two threads
    for found in json.loads(done.stdout):
        assert found["batch"] == found["single"], found["num_threads"]
        assert len(set(map(tuple, found["single"]))) == 16
