"""An evaluation as rows of text, for the terminal and the report."""

from __future__ import annotations

import math
from typing import cast

from saw_trtllm.eval.metrics import Quality
from saw_trtllm.eval.session import Evaluation
from saw_trtllm.eval.suggest import Suggestion

#: Caches that fit beside each other.
_MAX_COLUMNS = 4


def quality_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the caches, one a row."""
    header = ["cache", "bytes/token", "perplexity", "nats lost", "KL mean", "KL p99", "KL max", "top-1"]
    greedy = any(q.greedy_agreement is not None for q in evaluation.qualities.values())
    rows = []
    for name, q in evaluation.qualities.items():
        row = [name, f"{q.bytes_per_token:,.0f}", f"{q.perplexity:,.3f}", f"{q.nats_lost:+.4f}"]
        row += [_with_error(q.kl_mean, q.kl_error), f"{q.kl_p99:.3f}", f"{q.kl_max:.3f}", f"{q.top1_agreement:.2%}"]
        if greedy:
            row.append("-" if q.greedy_agreement is None else f"{q.greedy_agreement:.0%}")
        rows.append(row)
    return header + ["greedy"] * greedy, rows


def weights_table(with_weights: dict[str, Quality]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of weights and cache together, one cache a row: the exact one's is what weights cost alone."""
    rows = [
        [
            name,
            f"{q.perplexity:,.3f}",
            f"{q.nats_lost:+.4f}",
            _with_error(q.kl_mean, q.kl_error),
            f"{q.top1_agreement:.2%}",
        ]
        for name, q in with_weights.items()
    ]
    return ["quantized weights with", "perplexity", "nats lost", "KL mean", "top-1"], rows


def difference_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of quantized caches against each other: KL of the row less that of the column, over the latter.

    What lies within two standard errors is ``~``: the text is too short to tell the two apart.
    """
    q = evaluation.qualities
    names = [n for n in q if evaluation.settings[n]["kv"] != "fp16"]
    rows = []
    for i, one in enumerate(names, 1):
        cells = []
        for other in names:
            d = evaluation.differences[one].get(other)
            of = q[other].kl_mean
            if d is None:
                cells.append("")
            else:
                cells.append(f"{d.mean / of:+.0%} ± {d.error / of:.0%}" if d.is_real and of > 0 else "~")
        rows.append([f"{i} {one}", *cells])
    return ["KL of the row less that of", *(f"cache {i}" for i in range(1, len(names) + 1))], rows


def suggestion_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what more bits for layers pay: each by itself, then the best together."""
    s = cast(Suggestion, evaluation.suggestion)
    header = ["layers", "KL mean", "KL gone", "bytes/token", "nats gone per KiB"]
    rows = [["none", f"{s.kl_mean:.4f}", "", f"{s.bytes_per_token:,.0f}", ""]]
    for kept in s.layers + s.together[1:]:
        parts = (("16: ", kept.layers), ("8/4: ", kept.k8_layers))
        layers = " ".join(bits + ",".join(map(str, found)) for bits, found in parts if found)
        rows.append(
            [
                layers,
                f"{kept.kl_mean:.4f}",
                f"{kept.gain:.0%} ± {kept.gain_error:.0%}",
                f"{kept.bytes_per_token:,.0f}",
                f"{kept.gain_per_kib:.4f}",
            ]
        )
    return header, rows


def layer_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the layers: where the outliers sit, and the errors of scores and outputs, rms over heads.

    Only the last few quantized caches have a column.
    """
    o = evaluation.outliers
    caches = [n for n in evaluation.errors if evaluation.settings[n]["kv"] != "fp16"][-_MAX_COLUMNS:]
    header = ["layer", "key outlier", "at", "rotated", *(f"{name}: logits, outputs" for name in caches)]
    rows = []
    for i, ratios in enumerate(o.k_ratio):
        head = ratios.index(max(ratios))
        row = [
            str(i),
            f"{ratios[head]:.1f}x",
            f"head {head} dim {o.k_largest[i][head]}",
            f"{max(o.k_ratio_rotated[i]):.1f}x",
        ]
        for name in caches:
            errors = evaluation.errors[name]
            row.append(f"{rms(errors.scores[i]):.4f} {rms(errors.outputs[i]):.4f}")
        rows.append(row)
    return header, rows


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.4f} ± {error:.4f}" if math.isfinite(error) else f"{mean:.4f}"


def rms(values: list[float]) -> float:
    """Root of the mean square."""
    return math.sqrt(sum(x * x for x in values) / len(values))
