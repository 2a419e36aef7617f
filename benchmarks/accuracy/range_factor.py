"""Errors of 4-bit rows by range factor: where the defaults of ``saw_trtllm.format.RANGE_FACTORS`` come from.

    python -m benchmarks.accuracy.range_factor --model_dir examples/tiny_llama --text FILE

Prints a Markdown table: mean square error of rows over that of min-max (γ = 1), and of attention scores where keys are
meant (after taking out what a query's scores have in common, which the softmax ignores).
"""

import argparse
from pathlib import Path

import torch

from saw_trtllm.backends.reference.int4 import dequantize, quantize, rotate
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.eval.outliers import plant_key_bias, plant_outliers
from saw_trtllm.eval.text import load_tokenizer, read_text
from saw_trtllm.format import HEAD_DIMS, hadamard_orders

GAMMAS = (1.0, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.9, 0.88, 0.85, 0.8)


def row_error(y: torch.Tensor, gamma: float) -> torch.Tensor:
    return dequantize(*quantize(y, gamma)) - y


def score_error(q: torch.Tensor, error: torch.Tensor) -> float:
    """Mean square error of scores: q ``[n, heads, D]`` on the keys' errors ``[m, kv_heads, D]``."""
    groups = q.unflatten(1, (error.shape[1], -1))
    scores = torch.einsum("qhgd,khd->hgqk", groups, error)
    return (scores - scores.mean(-1, keepdim=True)).square().mean().item()


def show(name: str, errors: list[float]) -> None:
    best = GAMMAS[min(range(len(errors)), key=errors.__getitem__)]
    print(f"| {name} | {' | '.join(f'{e / errors[0]:.3f}' for e in errors)} | {best} |", flush=True)


def gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    for head_dim in HEAD_DIMS:
        y = torch.randn(20000, head_dim, generator=generator)
        show(f"Gaussian rows, head_dim {head_dim}", [row_error(y, g).square().mean().item() for g in GAMMAS])


def model_rows(name: str, checkpoint: Checkpoint, ids: list[int], orders: list[int]) -> None:
    seen = []
    model = WindowModel(checkpoint.config, checkpoint.load, len(ids))
    model.hidden(torch.tensor([ids]), observe=lambda layer, a: seen.append(a))
    for order in orders:
        rows, scores, values = ([0.0] * len(GAMMAS) for _ in range(3))
        for a in seen:
            q, k, v = (rotate(x, order) for x in (a.q[::8], a.k, a.v))
            for i, gamma in enumerate(GAMMAS):
                error = row_error(k, gamma)
                rows[i] += (error.square().mean() / k.square().mean()).item()
                scores[i] += score_error(q, error)
                values[i] += (row_error(v, gamma).square().mean() / v.square().mean()).item()
        for what, errors in (("K", rows), ("scores", scores), ("V", values)):
            show(f"{name}, order {order}, {what}", errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--max_tokens", type=int, default=1024)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model_dir)
    ids = load_tokenizer(checkpoint).encode(read_text(args.text))[: args.max_tokens]
    print(f"| error / that of γ = 1 | {' | '.join(map(str, GAMMAS))} | best |")
    print("|" + " --- |" * (len(GAMMAS) + 2))
    gaussian()
    orders = hadamard_orders(checkpoint.config.head_size)
    model_rows(args.model_dir.name, checkpoint, ids, [1, *orders])
    model_rows("planted outliers", plant_outliers(checkpoint), ids, [1, orders[-1]])
    model_rows("planted key bias", plant_key_bias(checkpoint), ids, [1, orders[-1]])


if __name__ == "__main__":
    main()
