"""The accuracy record as tables, numbers and a plot."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.accuracy.record import AccuracyResults
from benchmarks.common.report import Report, Table, environment_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"example": "example", "outliers": "planted outliers", "key bias": "planted key bias"}
_RIVALS = {
    "per channel": "KIVI: keys per channel, groups of 32, the latest up to 127 tokens in 16 bits",
    "per channel, no exact tail": "the same without 16-bit tokens (not to be had in a decode)",
    "codebook of 1": "1 centroid (centring, of V too), residual in 4 bits",
    "codebook of 16": "16 centroids, residual in 4 bits",
    "codebook of 256": "256 centroids, residual in 4 bits",
    "hessian": "Hessian-aware rounding of keys",
}


def report(results: AccuracyResults) -> Report:
    """What the record says."""
    real = [m for m in results.models if m not in TITLES]
    if real:
        return _real_report(results, results.models[real[0]])
    models = [m for m in TITLES if m in results.models]
    tables, numbers = _values(results, models)
    return Report(tables, numbers, {"keys": partial(_key_plot, results.models, models)})


def _real_report(results: AccuracyResults, found: dict) -> Report:
    """A checkpoint's caches: what each costs, and how far apart they are."""
    caches = {name: q for name, q in found["caches"].items() if name != "fp16"}
    table = [["cache", "bytes/token", "nats lost", "KL mean", "KL p99", "top-1", f"KL less that of {_OURS}"]]
    for name, q in caches.items():
        table.append(
            [
                name,
                f"{q['bytes_per_token']:,.0f}",
                f"{q['nats_lost']:+.4f}",
                f"{q['kl_mean']:.4f} ± {q['kl_error']:.4f}",
                f"{q['kl_p99']:.3f}",
                f"{100 * q['top1_agreement']:.1f} %",
                _apart(found["differences"][name].get(_OURS)),
            ]
        )
    numbers = {
        "tokens": f"{results.num_tokens:,}",
        "window": f"{results.window}",
        "calibration tokens": f"{results.calibration_tokens:,}",
        "seconds": f"{found['seconds']:.0f}",
        "half": f"{100 * found['split_half_excess']:.1f} %",
    }
    numbers |= {f"kl {name}": f"{q['kl_mean']:.4f}" for name, q in caches.items()}
    numbers |= {f"top-1 {name}": f"{100 * q['top1_agreement']:.1f} %" for name, q in caches.items()}
    chosen = {name: caches[name] for name in _CHOSEN if name in caches}
    tables = {"environment": environment_table(results.environment), "caches": table}
    tables["positions"] = _position_table(chosen)
    plots = {"bytes": partial(_bytes_plot, caches), "top1": partial(_top1_plot, caches)}
    plots["positions"] = partial(_real_position_plot, chosen)
    if "layers" in found:
        plots["layers"] = partial(_real_layer_plot, {name: found["layers"][name] for name in chosen})
    return Report(tables, numbers, plots)


#: What others are compared with, token by token.
_OURS = "saw_int4, calibrated"
#: Caches that are told apart by context and by layer.
_CHOSEN = ("fp8 e4m3, no scales", "the paper's recipe", "saw_int4", _OURS, "saw_k8v4, calibrated")


def _apart(difference: dict | None) -> str:
    return "" if difference is None else f"{difference['mean']:+.4f} ± {difference['error']:.4f}"


def _position_table(caches: dict) -> Table:
    positions = list(next(iter(caches.values()))["kl_by_position"])
    rows = [[str(p), *(f"{q['kl_by_position'][p]:.4f}" for q in caches.values())] for p in positions]
    return [["tokens of context, up to", *caches], *rows]


def _real_position_plot(caches: dict, figure: Figure) -> None:
    axes = figure.subplots()
    for name, q in caches.items():
        axes.plot([int(p) for p in q["kl_by_position"]], list(q["kl_by_position"].values()), "o-", label=name)
    axes.set(xlabel="tokens of context, up to", ylabel="KL from fp16", xscale="log", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _real_layer_plot(layers: dict[str, list[float]], figure: Figure) -> None:
    axes = figure.subplots()
    for name, errors in layers.items():
        axes.plot(errors, ".-", label=name)
    axes.set(xlabel="layer", ylabel="error of attention's output, relative", yscale="log", ylim=(None, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _bytes_plot(caches: dict, figure: Figure) -> None:
    axes = figure.subplots()
    for name, q in caches.items():
        axes.errorbar(q["bytes_per_token"], q["kl_mean"], yerr=2 * q["kl_error"], fmt="o", label=name)
    axes.set(ylabel="KL from fp16", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    _over_bytes(figure, axes)


def _top1_plot(caches: dict, figure: Figure) -> None:
    axes = figure.subplots()
    for name, q in caches.items():
        axes.plot(q["bytes_per_token"], 100 * q["top1_agreement"], "o", label=name)
    axes.set(ylabel="tokens with fp16's likeliest, %")
    _over_bytes(figure, axes)


def _over_bytes(figure: Figure, axes: Axes) -> None:
    figure.set_size_inches(6.4, 3.8)
    axes.set(xlabel="bytes of cache a token", xlim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _values(results: AccuracyResults, models: list[str]) -> tuple[dict[str, Table], dict[str, str]]:
    """Tables and numbers by the names of their places."""
    data = results.models
    example = data["example"]
    minutes = sum(data[m]["seconds"] for m in models) / 60
    layer_bytes = example["suggestion"]["layers"][0]["bytes_per_token"] - example["suggestion"]["bytes_per_token"]
    tables = {"environment": environment_table(results.environment)}
    tables |= {f"levers {m}": _lever_table(data, m) for m in models} | {
        "recovered": _recovered_table(data, models[1:]),
        "errors": _error_table(data, models),
        "orders": _order_table(data, models),
        "orders with levers": _order_lever_table(data, models),
        "factors": _factor_table(data),
        "layers": _layer_table(example["suggestion"]),
        "positions": _position_table({row: example["levers"][row] for row in ("int4", "recipe", "γ", "all levers")}),
        "peers": _peer_table(data, models),
    }
    numbers = {
        "minutes": f"{minutes:.0f}",
        "tokens": f"{results.num_tokens:,}",
        "window": f"{results.window}",
        "calibration tokens": f"{results.calibration_tokens:,}",
        "calibration seconds": f"{example['calibration_seconds']}",
        "range factor": f"{results.range_factor}",
        "target": _target([data[m]["levers"] for m in models[1:]]),
        "third": _third(example["levers"]),
        "mean key": f"{100 * _mean(example['outliers']['k_bias']):.0f}",
        "largest value": f"{max(max(heads) for m in models for heads in data[m]['outliers']['v_ratio']):.1f}",
        "layer bytes": f"{layer_bytes:.0f}",
    }
    rows = example["orders"] | example["peers"] | example["levers"]
    divergences = {f"kl {row}": f"{q['kl_mean']:.4f}" for row, q in rows.items()}
    return tables, numbers | divergences


def _recovered(levers: dict, row: str) -> float:
    """Share of the nats that plain INT4 loses which another cache does not lose."""
    return 1 - levers[row]["nats_lost"] / levers["int4"]["nats_lost"]


def _recovered_table(data: dict, models: list[str]) -> Table:
    known = ("recipe", "γ", "γ, centred", "γ, smoothed", "all levers")
    columns = [c for c in known if all(c in data[m]["levers"] for m in models)]
    rows = [[TITLES[m], *(f"{100 * _recovered(data[m]['levers'], c):.1f} %" for c in columns)] for m in models]
    return [["", *columns], *rows]


def _target(models: list[dict]) -> str:
    doubled = all(levers["int4"]["perplexity"] >= 2 * levers["fp16"]["perplexity"] for levers in models)
    recipe, ours = (min(_recovered(levers, row) for levers in models) for row in ("recipe", "all levers"))
    met = doubled and recipe >= 0.85 and ours >= 0.98
    return (
        f"**{'met' if met else 'missed'}**, with {100 * recipe:.1f} % and {100 * ours:.1f} % in the worse of the two."
    )


def _third(levers: dict) -> str:
    nats, kl = (levers["all levers"][key] / levers["recipe"][key] for key in ("nats_lost", "kl_mean"))
    return (
        f"in nats **{'met' if nats <= 1 / 3 else 'missed'}** ({100 * nats:.0f} %), in KL "
        f"**{'met' if kl <= 1 / 3 else 'missed'}** ({100 * kl:.0f} %)."
    )


def _error_table(data: dict, models: list[str]) -> Table:
    header = ["layer", *(f"{TITLES[m]}: {row}" for m in models for row in data[m]["errors"])]
    columns = [errors["scores"] for m in models for errors in data[m]["errors"].values()]
    rms = [[f"{(sum(x * x for x in heads) / len(heads)) ** 0.5:.3f}" for heads in scores] for scores in columns]
    return [header, *([f"{i}", *row] for i, row in enumerate(zip(*rms, strict=True)))]


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def _lever_table(data: dict, model: str) -> Table:
    levers = data[model]["levers"]
    header = ["cache", "bytes/token", "perplexity", "nats lost", "KL mean", "KL p99", "top-1", "greedy"]
    rows = [
        [
            name,
            f"{q['bytes_per_token']:,.0f}",
            f"{q['perplexity']:,.3f}",
            f"{q['nats_lost']:+.4f}",
            f"{q['kl_mean']:.4f}",
            f"{q['kl_p99']:.3f}",
            f"{100 * q['top1_agreement']:.1f} %",
            f"{100 * q.get('greedy_agreement', 1.0):.0f} %",
        ]
        for name, q in levers.items()
    ]
    return [header, *rows]


def _order_table(data: dict, models: list[str]) -> Table:
    header = ["order"] + [f"{TITLES[m]}, {what}" for m in models for what in ("K", "K and V")]
    rows = []
    for order in (1, 16, 32, 64, 128):
        row = ["none" if order == 1 else str(order)]
        for m in models:
            for what in ("K", "KV"):
                q = data[m]["orders"].get(f"{order} {what}")
                row.append("" if q is None else f"{q['kl_mean']:.4f}")
        rows.append(row)
    return [header, *rows]


def _order_lever_table(data: dict, models: list[str]) -> Table:
    known = {"-": "γ", "c": "+ centred", "s": "+ smoothed", "cs": "+ both"}
    columns = {c: what for c, what in known.items() if all(f"16 {c}" in data[m]["order levers"] for m in models)}
    header = ["order"] + [f"{TITLES[m]}: {what}" for m in models for what in columns.values()]
    rows = []
    for order in (1, 16, 32, 64, 128):
        cells = [f"{data[m]['order levers'][f'{order} {c}']['kl_mean']:.4f}" for m in models for c in columns]
        rows.append(["none" if order == 1 else str(order), *cells])
    return [header, *rows]


def _factor_table(data: dict) -> Table:
    factors = data["example"]["factors"]
    gammas = sorted({name.split()[1] for name in factors}, key=float, reverse=True)
    header = ["γ", *(f"{part}: {what}" for part in ("K", "V", "K and V") for what in ("KL", "nats lost"))]
    rows = []
    for gamma in gammas:
        row = [gamma]
        for part in ("K", "V", "KV"):
            q = factors[f"{part} {gamma}"]
            row += [f"{q['kl_mean']:.4f}", f"{q['nats_lost']:+.4f}"]
        rows.append(row)
    return [header, *rows]


def _peer_table(data: dict, models: list[str]) -> Table:
    header = ["", "bytes/token", *(f"KL, {TITLES[m]}" for m in models), "pages", "fused attention", "no calibration"]
    rows = []

    def add(name: str, found: list[dict], demands: list[str]) -> None:
        cells = [f"{q['kl_mean']:.4f}" for q in found]
        rows.append([name, f"{found[0]['bytes_per_token']:,.0f}", *cells, *demands])

    ours = {
        "plain INT4": "int4",
        "the paper's recipe, order 128": "recipe",
        "ours, γ only": "γ",
        "ours, all levers": "all levers",
    }
    for title, row in ours.items():
        calibrated = "no" if row == "all levers" else "yes"
        add(title, [data[m]["levers"][row] for m in models], ["yes", "yes", calibrated])
    for name, title in _RIVALS.items():
        for order, suffix in ((1, ""), (128, ", rotated")):
            found = [data[m]["peers"][f"{name} {order}"] for m in models]
            add(title + suffix, found, [found[0][k] for k in ("pages", "fused", "calibration_free")])
    return [header, *rows]


def _layer_table(suggestion: dict) -> Table:
    rows = [["none", f"{suggestion['kl_mean']:.4f}", "", f"{suggestion['bytes_per_token']:,.0f}"]]
    for kept in suggestion["layers"] + suggestion["together"][1:]:
        layers = ", ".join(map(str, kept["layers"]))
        rows.append(
            [layers, f"{kept['kl_mean']:.4f}", f"{100 * kept['gain']:.0f} %", f"{kept['bytes_per_token']:,.0f}"]
        )
    return [["layers kept", "KL mean", "KL gone", "bytes/token"], *rows]


def _key_plot(data: dict, models: list[str], figure: Figure) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    figure.set_size_inches(3.6 * len(models) + 0.6, 3.4)
    columns = list(figure.subplots(1, len(models), squeeze=False)[0])
    for axes, m in zip(columns, models, strict=True):
        outliers = data[m]["outliers"]
        axes.plot(sorted(outliers["k_channels"]), label="as they are")
        axes.plot(sorted(outliers["k_channels_rotated"]), label="rotated, order 128")
        axes.set(xlabel=f"channels by size (layer {outliers['worst'][0]}, KV head {outliers['worst'][1]})")
        axes.set(title=TITLES[m], yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    columns[0].set_ylabel("rms of keys")
    columns[0].legend(loc="upper left")
