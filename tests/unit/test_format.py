import numpy as np
import pytest
import torch

from saw_trtllm import format as fmt
from saw_trtllm.backends.reference import int4
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import HEAD_DIMS, KVFormat
from tests.support.tolerance import EPS, sum_rounding

ROTATIONS = [(d, o) for d in HEAD_DIMS for o in (16, 32, 64, 128, 256) if d % o == 0]


def sylvester(order):
    """Build H(2n) = [[H, H], [H, -H]], normalized."""
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(order)


def block_diagonal(head_dim, order):
    return np.kron(np.eye(head_dim // order), sylvester(order))


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# -- rotation


@pytest.mark.parametrize("order", [1, 2, 16, 32, 64, 128, 256])
def test_hadamard_is_sylvesters_and_orthonormal(order):
    h = fmt.hadamard(order)
    assert h.dtype == np.float32
    np.testing.assert_array_equal(h, sylvester(order).astype(np.float32))
    np.testing.assert_allclose(h.astype(np.float64) @ h.T, np.eye(order), atol=2 * EPS)


@pytest.mark.parametrize(("head_dim", "order"), ROTATIONS)
def test_rotation_is_the_block_diagonal_product(head_dim, order, rng):
    x = rng.standard_normal((5, 3, head_dim))
    expected = x @ block_diagonal(head_dim, order)
    atol = sum_rounding(order, np.abs(x).max() / order**0.5)
    np.testing.assert_allclose(fmt.rotate(x, order), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(int4.rotate(torch.from_numpy(x), order), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("head_dim", "order"), ROTATIONS)
def test_rotation_leaves_scores_and_itself_undone(head_dim, order, rng):
    q, k = (torch.from_numpy(rng.standard_normal((64, head_dim))).float() for _ in range(2))
    rq, rk = int4.rotate(q, order), int4.rotate(k, order)
    assert not torch.allclose(rk, k, atol=0.1)
    atol = sum_rounding(head_dim, (rq.abs().max() * rk.abs().max()).item())
    torch.testing.assert_close(rq @ rk.T, q @ k.T, atol=atol, rtol=0)
    atol = sum_rounding(order, rk.abs().max().item() / order**0.5)
    torch.testing.assert_close(int4.rotate(rk, order), k, atol=2 * atol, rtol=0)


def test_order_1_rotates_nothing(rng):
    x = rng.standard_normal((4, 96)).astype(np.float32)
    np.testing.assert_array_equal(fmt.rotate(x, 1), x)
    np.testing.assert_array_equal(int4.rotate(torch.from_numpy(x), 1), x)


# -- rows


def test_row_bytes():
    assert [KVFormat("saw_int4", d).row_bytes for d in (64, 96, 128, 256)] == [36, 52, 68, 132]
    assert [KVFormat("int4", d).row_bytes for d in (64, 96, 128, 256)] == [36, 52, 68, 132]
    assert [KVFormat("fp16", 128, t).row_bytes for t in ("float16", "bfloat16", "float32")] == [256, 256, 512]


def test_a_token_of_fp16_takes_3_76_times_as_much():
    small, large = (KVFormat(kv, 128).bytes_per_token(32, 8) for kv in ("saw_int4", "fp16"))
    assert (small, large) == (32 * 8 * 136, 32 * 8 * 512)
    assert KVFormat("saw_int4", 128).pool_shape(7, 32, 8, 64) == (7, 32, 2, 8, 64, 68)


def test_every_pair_of_codes_has_its_byte():
    low, high = np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8), indexing="ij")
    codes = torch.from_numpy(np.stack([low.ravel(), high.ravel()], axis=-1).reshape(4, 128))
    packed = int4.pack(codes)
    assert packed.shape == (4, 64)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(packed.flatten(), torch.from_numpy((low + 16 * high).ravel()))
    assert torch.equal(int4.unpack(packed), codes)


def test_bytes_of_a_row():
    """Codes 0..15 over and over, scale 0.5, lo -3: every value is exact, so that the bytes can be written down."""
    y = torch.arange(64).remainder(16) * 0.5 - 3
    row = int4.encode_rows(y, KVFormat("int4", 64, range_factor=1.0))
    assert row[:8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert row.tolist() == [*row[:8].tolist() * 4, 0x00, 0x38, 0x00, 0xC2]  # fp16 0.5 and -3, little end first
    assert torch.equal(int4.decode_rows(row, KVFormat("int4", 64)), y)


def test_bytes_of_a_row_of_8_bits():
    """Codes 0 to 255 in steps of 17, scale 0.5, lo -3."""
    kv_format = KVFormat("saw_k8v4", 64)
    codes = torch.arange(64).remainder(16) * 17
    row = int4.encode_rows(codes * 0.5 - 3, kv_format, wide=True)
    assert row.tolist() == [*codes.tolist(), 0x00, 0x38, 0x00, 0xC2]
    assert torch.equal(int4.decode_rows(row, kv_format, wide=True), codes * 0.5 - 3)
    assert (kv_format.k_row_bytes, kv_format.row_bytes, kv_format.pair_bytes) == (68, 36, 104)
    assert kv_format.bytes_per_token(30, 3) == 30 * 3 * 104


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fp16_rows_are_the_engines_dtype(dtype, rng):
    y = torch.from_numpy(rng.standard_normal((3, 2, 64))).float()
    rows = int4.encode_rows(y, KVFormat("fp16", 64, dtype))
    assert rows.dtype == torch.uint8
    assert rows.shape == (3, 2, KVFormat("fp16", 64, dtype).row_bytes)
    expected = y.to(getattr(torch, dtype)).float()
    assert torch.equal(int4.decode_rows(rows, KVFormat("fp16", 64, dtype)), expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_encode_and_decode_rows(head_dim, rng):
    kv_format = KVFormat("saw_int4", head_dim, range_factor=0.9)
    y = torch.from_numpy(rng.standard_normal((5, 3, head_dim))).float()
    rows = int4.encode_rows(y, kv_format)
    assert rows.shape == (5, 3, kv_format.row_bytes)
    codes, scale, lo = int4.quantize(y, 0.9)
    tail = rows.numpy()[..., head_dim // 2 :].copy().view(np.float16)
    np.testing.assert_array_equal(tail[..., 0], scale.numpy())
    np.testing.assert_array_equal(tail[..., 1], lo.numpy())
    nibbles = rows.numpy()[..., : head_dim // 2, None] >> np.array([0, 4], dtype=np.uint8) & 15
    np.testing.assert_array_equal(nibbles.reshape(codes.shape), codes.numpy())
    assert torch.equal(int4.decode_rows(rows, kv_format), int4.dequantize(codes, scale, lo))


# -- quantization


def scalar_quantize(row, range_factor):
    """Follow the formula of the format's description, one number at a time."""
    f32, f16 = np.float32, np.float16
    lowest, highest = min(row), max(row)
    mid = (highest + lowest) / f32(2)
    half = f32(range_factor) * (highest - lowest) / f32(2)
    lo = f16(mid - half)
    scale = f16(max(f32(2) * half, f32(15 * 2.0**-24)) / f32(15))
    codes = []
    for y in row:
        level = np.rint((y - f32(lo)) / f32(scale))  # to even, like every rint
        codes.append(int(min(max(level, 0), 15)))
    return codes, scale, lo


@pytest.mark.parametrize("range_factor", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0, 300.0, 5e3])
def test_quantize_is_the_formula(spread, range_factor, rng):
    rows = (rng.standard_normal((6, 64)) * spread + rng.standard_normal((6, 1)) * spread).astype(np.float32)
    codes, scale, lo = int4.quantize(torch.from_numpy(rows), range_factor)
    assert (codes.dtype, scale.dtype, lo.dtype) == (torch.uint8, torch.float16, torch.float16)
    for i, row in enumerate(rows):
        expected = scalar_quantize(list(row), range_factor)
        assert codes[i].tolist() == expected[0]
        assert scale[i].item() == expected[1]
        assert lo[i].item() == expected[2]


def test_codes_are_rounded_to_even():
    y = torch.tensor([0, 15, 0.5, 1.5, 2.5, 3.5, 13.5, 14.5] * 8)
    codes, scale, lo = int4.quantize(y)
    assert (scale.item(), lo.item()) == (1.0, 0.0)
    assert codes[:8].tolist() == [0, 15, 0, 2, 2, 4, 14, 14]


@pytest.mark.parametrize(
    ("spread", "offset"), [(1, 0), (1, 30), (1e-3, 0), (1e-5, 1), (1e-8, 0), (200, -40), (8e3, 0), (1e-3, 60000)]
)
def test_error_is_within_the_bound_of_the_scale(spread, offset, rng):
    """Bound the error by half a step, or at the ends by what rounding lo and scale to fp16 cut off the range.

    A value below lo is off by less than lo's rounding; one above lo + 15 scale by lo's and 15 times scale's.
    """
    y = (rng.standard_normal((200, 128)) * spread + offset).astype(np.float32)
    codes, scale, lo = int4.quantize(torch.from_numpy(y))
    error = np.abs(int4.dequantize(codes, scale, lo).numpy().astype(np.float64) - y)
    step = scale.numpy().astype(np.float64)
    lo_rounding, scale_rounding = (np.spacing(np.abs(t.numpy())).astype(np.float64) / 2 for t in (lo, scale))
    bound = np.maximum(step / 2, lo_rounding + 15 * scale_rounding)
    fp32 = 4 * np.spacing(np.abs(y).max(-1)).astype(np.float64)
    assert (error <= (bound + fp32)[:, None]).all()
    assert (error > step[:, None] / 4).any()


def test_gaussian_rows_use_all_codes(rng):
    codes, _, _ = int4.quantize(torch.from_numpy(rng.standard_normal((50, 128))))
    assert (codes.amin(-1) == 0).all()
    assert (codes.amax(-1) == 15).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 0.1, 60000.0, -60000.0, 2.0**-24, 1e-30])
def test_constant_rows(value):
    y = torch.full((64,), value)
    codes, scale, lo = int4.quantize(y)
    assert scale.item() == 2.0**-24
    back = int4.dequantize(codes, scale, lo)
    assert (back == back[0]).all()
    assert abs(back[0].item() - y[0].item()) <= np.spacing(np.float16(abs(value))) / 2


def test_rows_beyond_fp16_saturate():
    y = torch.linspace(-1e6, 1e6, 64)
    codes, scale, lo = int4.quantize(y)
    back = int4.dequantize(codes, scale, lo)
    assert (scale.item(), lo.item()) == (65504.0, -65504.0)
    assert torch.isfinite(back).all()
    assert (back.diff() >= 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_default_range_factor_is_the_best_for_gaussian_rows(head_dim, rng):
    """Within 1 % of the least mean square error of a fine grid, and well below that of min-max."""
    y = torch.from_numpy(rng.standard_normal((4000, head_dim))).float()

    def mean_square(range_factor):
        return (int4.dequantize(*int4.quantize(y, range_factor)) - y).square().mean().item()

    default = mean_square(KVFormat("saw_int4", head_dim).range_factor)
    assert default < 1.01 * min(mean_square(g) for g in np.arange(0.84, 1.001, 0.01))
    assert default < 0.97 * mean_square(1.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_chosen_ends_are_the_first_of_least_error(head_dim, rng):
    """Against every pair by itself, in order; a tenth less noise than the range factor's on Gaussian rows."""
    y = torch.from_numpy(rng.normal(size=(500, head_dim)).astype(np.float32))
    errors = []
    for low in fmt.END_CUTS:
        for high in fmt.END_CUTS:
            width = y.amax(-1) - y.amin(-1)
            lo = (y.amin(-1) + low * width).half().float()[:, None]
            scale = ((1 - low - high) * width / 15).half().float()[:, None]
            errors.append((((y - lo) / scale).round().clamp(0, 15) * scale + lo - y).square().sum(-1))
    error = (int4.dequantize(*int4.quantize(y, end_cuts=fmt.END_CUTS)) - y).square().sum(-1)
    torch.testing.assert_close(error, torch.stack(errors).amin(0))
    fixed = (int4.dequantize(*int4.quantize(y, fmt.RANGE_FACTORS[head_dim])) - y).square().sum(-1)
    assert error.mean() < 0.93 * fixed.mean()
    constant = torch.full((1, head_dim), 3.0)
    assert torch.equal(int4.dequantize(*int4.quantize(constant, end_cuts=fmt.END_CUTS)), constant)


def test_range_factor_trades_the_extremes_for_the_middle(rng):
    y = torch.from_numpy(rng.standard_normal((500, 128))).float()

    def mean_square(range_factor):
        codes, scale, lo = int4.quantize(y, range_factor)
        return (int4.dequantize(codes, scale, lo) - y).square().mean().item(), scale.float().mean().item()

    (full, full_scale), (less, less_scale) = mean_square(1.0), mean_square(0.9)
    assert less_scale == pytest.approx(0.9 * full_scale, rel=2**-10)  # both are fp16
    assert less < full
    assert mean_square(0.3)[0] > full


@pytest.mark.parametrize(("channels", "factor"), [(1, 60), (2, 50), (2, 80)])
def test_rotation_quarters_the_score_error_of_outlier_channels(channels, factor, rng):
    k, q = rng.standard_normal((2000, 128)), rng.standard_normal((100, 128))
    k[:, rng.choice(128, channels, replace=False)] *= factor

    def score_error(kv):
        kv_format = KVFormat(kv, 128, range_factor=1.0)
        stored = int4.rotate(torch.from_numpy(k), kv_format.hadamard_order)
        read = int4.decode_rows(int4.encode_rows(stored, kv_format), kv_format)
        scores = int4.rotate(torch.from_numpy(q), kv_format.hadamard_order).double() @ read.double().T
        return np.sqrt(np.mean((scores.numpy() - q @ k.T) ** 2))

    assert KVFormat("saw_int4", 128).hadamard_order == 128
    assert score_error("int4") > 4 * score_error("saw_int4")


# -- KVFormat


def test_defaults():
    assert [KVFormat("saw_int4", d).hadamard_order for d in HEAD_DIMS] == [64, 32, 128, 256]
    assert KVFormat("saw_int4", 128).rotate_v
    assert not KVFormat("saw_int4", 128, rotate_v=False).rotate_v
    for kv in ("int4", "fp16"):
        assert (KVFormat(kv, 128).hadamard_order, KVFormat(kv, 128).rotate_v) == (1, False)
    assert [KVFormat("int4", d).range_factor for d in HEAD_DIMS] == [0.97, 0.95, 0.94, 0.90]
    assert KVFormat("fp16", 64).range_factor == 1.0
    assert [KVFormat(kv, 64).quantized for kv in ("fp16", "int4", "saw_int4")] == [False, True, True]


def test_orders_of_a_head_dim():
    assert [fmt.hadamard_orders(d) for d in HEAD_DIMS] == [
        [16, 32, 64],
        [16, 32],
        [16, 32, 64, 128],
        [16, 32, 64, 128, 256],
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv": "fp8"}, "fp8"),
        ({"head_dim": 80}, "head_dim 80"),
        ({"dtype": "int8"}, "int8"),
        ({"hadamard_order": 8}, "hadamard_order 8"),
        ({"hadamard_order": 0}, "hadamard_order 0"),
        ({"hadamard_order": -16}, "hadamard_order -16"),
        ({"hadamard_order": 48, "head_dim": 96}, "hadamard_order 48"),
        ({"hadamard_order": 64, "head_dim": 96}, "hadamard_order 64"),
        ({"hadamard_order": 256}, "hadamard_order 256"),
        ({"hadamard_order": 1}, "hadamard_order 1"),
        ({"kv": "int4", "hadamard_order": 128}, "no rotation"),
        ({"kv": "fp16", "rotate_v": True}, "no rotation"),
        ({"range_factor": 0.0}, "range_factor"),
        ({"range_factor": 1.01}, "range_factor"),
        ({"range_factor": float("nan")}, "range_factor"),
    ],
)
def test_bad_formats_are_rejected(fields, said):
    with pytest.raises(ConfigError, match=said):
        KVFormat(**{"kv": "saw_int4", "head_dim": 128} | fields)
