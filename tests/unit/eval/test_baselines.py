"""The paper's peers do what their papers say, each on data that shows it."""

import pytest
import torch

from saw_trtllm.backends.reference.quantizers import QuantizedRows, bytes_per_token, round_rows
from saw_trtllm.backends.reference.window import Attended, History, WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.eval.baselines import Codebook, HessianRounding, PerChannelKeys, gather
from saw_trtllm.eval.metrics import evaluate
from saw_trtllm.format import KVFormat
from tests.support.eval_text import calibration_ids, held_out_ids
from tests.support.example import EXAMPLE

N, HEADS, D = 96, 2, 64


@pytest.fixture(scope="module")
def example():
    checkpoint = Checkpoint.open(EXAMPLE)
    return WindowModel(checkpoint.config, checkpoint.load, 512)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(q=None, k=None, v=None):
    k = noise(N, HEADS, D) if k is None else k
    return [Attended(noise(N, 2 * HEADS, D, seed=1) if q is None else q, k, k if v is None else v, None)]


def relative(x, y):
    return float((x - y).norm() / y.norm())


# -- per channel


def test_channels_have_their_own_scale():
    """Outlier channels cost a row its small components, and a channel nothing."""
    k = noise(N, HEADS, D)
    k[..., [3, 40]] *= 100
    v = noise(N, HEADS, D, seed=2)
    read, values = PerChannelKeys().quantize(0, k, v)
    small = [i for i in range(D) if i not in (3, 40)]
    assert relative(read[..., small], k[..., small]) < 0.1
    assert relative(round_rows(k, 1)[..., small], k[..., small]) > 0.8
    torch.testing.assert_close(values, round_rows(v, 1))


def test_groups_are_of_tokens():
    """A token changes the codes of its group's other tokens, and of no other group's."""
    k = noise(N, HEADS, D)
    changed = k.clone()
    changed[40] *= 5
    difference = (
        (PerChannelKeys().quantize(0, k, k)[0] - PerChannelKeys().quantize(0, changed, k)[0]).abs().amax((1, 2))
    )
    assert (difference[32:64] > 0).all()
    assert (difference[:32] == 0).all()
    assert (difference[64:] == 0).all()


@pytest.mark.parametrize("rival", [PerChannelKeys(residual=32), PerChannelKeys(order=128, residual=64)])
def test_a_window_is_what_is_decoded_token_by_token(example, rival):
    """The latest tokens are exact for each query, as when it was decoded: one that looked ahead would differ."""
    ids = torch.tensor([held_out_ids(100)])
    history = History(rival, example.config.num_hidden_layers)
    decoded = torch.cat([example.hidden(token, history=history) for token in ids.split(1, dim=1)], 1)
    window = example.hidden(ids, rival)
    exact = example.hidden(ids)
    # Products of other shapes are rounded otherwise, and codes may fall to the other side of an edge.
    assert (decoded - window).norm() < 0.4 * (window - exact).norm()
    ahead = example.hidden(ids, PerChannelKeys(rival.order, residual=0))
    assert (decoded - ahead).norm() > (window - exact).norm()
    until = rival.residual - 1
    assert (window[:, :until] - exact[:, :until]).abs().max() < 0.02 < (window[:, until] - exact[:, until]).abs().max()


def test_a_residual_is_of_whole_groups():
    with pytest.raises(ValueError, match="not a multiple"):
        PerChannelKeys(group=32, residual=48)


# -- codebooks


def test_centroids_take_the_clusters():
    centers = 20 * noise(16, D)
    k = centers[torch.arange(N) % 16][:, None] + noise(N, HEADS, D, seed=3) * 0.01
    errors = {n: relative(Codebook(sample(k=k), n).quantize(0, k, k)[0], k) for n in (1, 16)}
    assert errors[16] < 0.002 < 0.05 < errors[1]


def test_one_centroid_is_centring():
    k = noise(N, HEADS, D) + 8 * noise(HEADS, D, seed=4)
    read = Codebook(sample(k=k), 1, order=64).quantize(0, k, k)[0]
    center = k.mean(0)
    ours = QuantizedRows(KVFormat("saw_int4", D, range_factor=1.0), k_center=center[None])
    torch.testing.assert_close(read, ours.quantize(0, k, k)[0])
    assert relative(read, k) < 0.5 * relative(round_rows(k, 64), k)


def test_more_centroids_than_tokens_are_harmless():
    k = noise(10, HEADS, D)
    assert Codebook(sample(k=k), 16).quantize(0, k, k)[0].isfinite().all()


# -- Hessian-aware rounding


def test_rounding_follows_the_queries():
    """Correlated queries: the scores' error falls, though the keys' own grows."""
    mixing = noise(D, D, seed=5) * torch.logspace(0, -2, D)
    q = noise(4000, 2 * HEADS, D, seed=6) @ mixing.T
    k = noise(N, HEADS, D)
    read = HessianRounding(sample(q=q, k=k)).quantize(0, k, k)[0]
    plain = round_rows(k, 1)

    def score_error(x):
        return float(((x - k)[:, 0] @ q[:, 0].T).square().mean().sqrt())

    assert score_error(read) < 0.6 * score_error(plain)
    assert relative(read, k) > relative(plain, k)


def test_rounding_is_plain_where_queries_have_no_direction():
    k = noise(N, HEADS, D)
    q = torch.eye(D).repeat(8, 1)[:, None].expand(-1, 2 * HEADS, -1)
    torch.testing.assert_close(HessianRounding(sample(q=q, k=k)).quantize(0, k, k)[0], round_rows(k, 1))


# -- on the example model


def test_peers_on_the_example(example):
    """All are caches that work, and cost what they say."""
    data = gather(example, torch.tensor(calibration_ids(1024)).view(2, 512))
    assert [x.k.shape for x in data] == [(1024, 2, 128)] * 4
    peers = {
        "per channel": PerChannelKeys(),
        "codebook": Codebook(data, 16, order=128),
        "hessian": HessianRounding(data, order=128),
        "row": QuantizedRows(KVFormat("saw_int4", 128, range_factor=1.0)),
    }
    found = evaluate(example, torch.tensor(held_out_ids(512))[None], peers)
    assert all(0 < q.kl_mean < 0.1 for q in found.values())
    assert found["codebook"].kl_mean < found["row"].kl_mean
    assert {n: q.bytes_per_token for n, q in found.items()} == {
        "per channel": 4 * 2 * (64 + 16 + 68),
        "codebook": 4 * 2 * 2 * 69,
        "hessian": 4 * 2 * 2 * 68,
        "row": 4 * 2 * 2 * 68,
    }
    assert bytes_per_token(peers["row"], 4, 2, 128) == 1088
