"""A folder with one HTML page that holds the tables and the plots, and the numbers as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.eval.analysis import HISTOGRAM_RANGE
from saw_trtllm.eval.session import Evaluation
from saw_trtllm.eval.tables import difference_table, layer_table, quality_table, suggestion_table, weights_table
from saw_trtllm.files import replacing_folder
from saw_trtllm.format import ROTATED

try:
    import matplotlib.figure
    from jinja2 import Environment

except ImportError as e:
    raise BackendUnavailableError(
        f"--report needs {e.name}, which is not installed: pip install 'saw-trtllm[eval]'"
    ) from e

_PAGE_FILE = "report.html"
_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>saw-eval: {{ about.model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 2rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
</style>
<h1>{{ about.model }}</h1>
<p>{{ about.architecture }}, {{ about.num_layers }} layers, {{ about.num_heads }} query and
{{ about.num_kv_heads }} KV heads of {{ about.head_dim }}, {{ about.dtype }}. {{ about.num_tokens }} tokens in
{{ about.num_windows }} windows of {{ about.max_seq_len }};
every token reads the keys and values of all tokens up to itself from the cache, as a decode does.
{{ about.device }}, {{ about.seconds }} s, saw_trtllm {{ about.saw_trtllm }}, torch {{ about.torch }}.</p>
{% for title, header, rows in tables %}
<h2>{{ title }}</h2>
<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% for caption, svg in plots %}<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</html>
"""
_LAYER_TITLE = (
    "Layers: the largest channel of the keys over the median one, and the errors of the softmax's logits (nats) and of "
    "outputs (relative)"
)


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``report.html`` and ``results.json``.

    Parameters
    ----------
    evaluation : Evaluation
    folder : Path
        Made if it is not there.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    tables = [
        ("Caches", *quality_table(evaluation)),
        ("Caches against each other; ~ is within two standard errors", *difference_table(evaluation)),
        (_LAYER_TITLE, *layer_table(evaluation)),
    ]
    if evaluation.with_weights is not None:
        tables.insert(
            1, ("Against the model that the weights were quantized from", *weights_table(evaluation.with_weights))
        )
    if evaluation.suggestion is not None:
        tables.append((f"More bits for layers of {evaluation.suggested_for}", *suggestion_table(evaluation)))
    environment = Environment(autoescape=True)
    page = environment.from_string(_PAGE).render(about=evaluation.about, tables=tables, plots=_plots(evaluation))
    try:
        with replacing_folder(folder, (_PAGE_FILE, "results.json")) as part:
            (part / "results.json").write_text(json.dumps(evaluation.as_dict(), indent=1) + "\n", encoding="utf-8")
            (part / _PAGE_FILE).write_text(page, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written ({e.strerror or e}): choose another --report folder") from e
    return folder / _PAGE_FILE


def _plots(evaluation: Evaluation) -> list[tuple[str, str]]:
    plots = [_memory_plot(evaluation), _position_plot(evaluation), _order_plot(evaluation)]
    for what in ("scores", "outputs"):
        plots += _error_plots(evaluation, what)
    return [plot for plot in [*plots, _channel_plot(evaluation), _histogram_plot(evaluation)] if plot is not None]


def _figure(width: float = 8, height: float = 4, columns: int = 1) -> tuple[matplotlib.figure.Figure, Any]:
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure: matplotlib.figure.Figure) -> str:
    """The element ``<svg>`` of a figure, as it stands in a page: text as text, the same bytes for the same numbers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "saw"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    page = buffer.getvalue()
    return page[page.index("<svg") :]


def _memory_plot(evaluation: Evaluation) -> tuple[str, str]:
    figure, (axes,) = _figure()
    for name, q in evaluation.qualities.items():
        axes.plot(q.bytes_per_token, q.perplexity, "o", label=name)
    axes.set(xlabel="bytes of cache per token", ylabel="perplexity", xlim=(0, None))
    perplexities = [q.perplexity for q in evaluation.qualities.values()]
    if max(perplexities) > 3 * min(perplexities):
        axes.set_yscale("log")
    axes.legend(fontsize=8, loc="upper right")
    return "Memory against quality: down and to the left is better.", _svg(figure)


def _position_plot(evaluation: Evaluation) -> tuple[str, str] | None:
    figure, (axes,) = _figure()
    for name, q in evaluation.qualities.items():
        if any(q.kl_by_position.values()):
            axes.plot(list(q.kl_by_position), list(q.kl_by_position.values()), "o-", label=name)
    if not axes.lines:
        return None
    axes.set(
        xlabel="tokens of context, up to",
        ylabel="KL divergence from the exact cache, nats",
        xscale="log",
        ylim=(0, None),
    )
    axes.legend(fontsize=8, loc="upper right")
    return "Divergence by length of the context.", _svg(figure)


def _order_plot(evaluation: Evaluation) -> tuple[str, str] | None:
    lines: dict[str, dict[int, float]] = {}
    for name, q in evaluation.qualities.items():
        order = evaluation.settings[name]["hadamard_order"]
        if evaluation.settings[name]["kv"] in ROTATED:
            lines.setdefault(name.replace(f" h{order}", ""), {})[order] = q.perplexity
    if not any(len(line) > 1 for line in lines.values()):
        return None
    figure, (axes,) = _figure()
    for label, line in lines.items():
        axes.plot(list(line), list(line.values()), "o-", label=label)
    for kv, style in (("fp16", ":"), ("int4", "--")):
        values = [q.perplexity for n, q in evaluation.qualities.items() if evaluation.settings[n]["kv"] == kv]
        if values:
            axes.axhline(values[0], color="grey", linestyle=style, label=kv)
    orders = sorted({order for line in lines.values() for order in line})
    axes.set(xlabel="Hadamard order", ylabel="perplexity", xscale="log", xticks=orders, xticklabels=orders)
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper right")
    return "Perplexity by order of the rotation.", _svg(figure)


def _error_plots(evaluation: Evaluation, what: str) -> list[tuple[str, str]]:
    """A map of layers and heads for each quantized cache, three in a row, on one scale."""
    caches = [(n, getattr(e, what)) for n, e in evaluation.errors.items() if evaluation.settings[n]["kv"] != "fp16"]
    if not caches:
        return []
    top = max(value for _, layers in caches for heads in layers for value in heads)
    text = {
        "scores": "Error of the softmax's logits (nats, standard deviation over keys) by layer and head",
        "outputs": "Relative error of attention's outputs by layer and head",
    }[what]
    plots = []
    for start in range(0, len(caches), 3):
        row = caches[start : start + 3]
        figure, columns = _figure(3.2 * len(row) + 0.8, 0.8 + min(6, 1.6 + 0.12 * len(row[0][1])), len(row))
        for axes, (name, layers) in zip(columns, row, strict=True):
            image = axes.imshow(layers, aspect="auto", vmin=0, vmax=top, cmap="viridis")
            axes.set_title(name, fontsize=8)
            axes.set(xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=list(columns))
        plots.append((f"{text}, each layer's input being exact.", _svg(figure)))
    return plots


def _channel_plot(evaluation: Evaluation) -> tuple[str, str]:
    o = evaluation.outliers
    figure, (left, right) = _figure(10, 4, 2)
    left.plot(o.k_channels, label="as they are")
    left.plot(o.k_channels_rotated, label="rotated")
    left.set(xlabel="channel", ylabel="rms of keys", yscale="log", title=f"layer {o.worst[0]}, KV head {o.worst[1]}")
    left.legend(fontsize=8, loc="upper right")
    for label, ratios in (("keys", o.k_ratio), ("keys, rotated", o.k_ratio_rotated), ("values", o.v_ratio)):
        right.plot([max(heads) for heads in ratios], "o-", label=label)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="layer", ylabel="largest channel over median", yscale="log", title="worst head of each layer")
    right.legend(fontsize=8, loc="upper right")
    caption = "Where the outliers sit: rms of the channels of keys after RoPE, and how far the largest stands out."
    return caption, _svg(figure)


def _histogram_plot(evaluation: Evaluation) -> tuple[str, str]:
    o = evaluation.outliers
    bins = len(o.k_histogram)
    width = 2 * HISTOGRAM_RANGE / bins
    centers = [-HISTOGRAM_RANGE + (i + 0.5) * width for i in range(bins)]
    figure, (axes,) = _figure()
    for label, density in (("before rotation", o.k_histogram), ("after", o.k_histogram_rotated)):
        # A bin with nothing in it has no place on a logarithmic axis.
        axes.plot(centers, [value or float("nan") for value in density], label=label)
    axes.set(xlabel="component of a key over the rms of its row", ylabel="density", yscale="log")
    axes.legend(fontsize=8, loc="upper right")
    return "Distribution of the keys of all layers before and after rotation by the largest order.", _svg(figure)
