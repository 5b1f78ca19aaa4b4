"""The page: results and settings side by side, curves over each other, the layers of each run."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from experiments.reporting.html import charts
from experiments.reporting.html.layers import Layer
from experiments.reporting.html.pictures import mask_picture
from experiments.reporting.html.runs import ReportedRun, number
from experiments.reporting.html.style import STYLE
from experiments.reporting.html.tables import Markup, table

# Title, kind of the rows, name of the number.
CURVES = (
    ("Training loss", "train", "loss"),
    ("Test accuracy", "epoch", "test_accuracy"),
    ("Training accuracy", "epoch", "train_accuracy"),
    ("Density", "epoch", "density"),
    ("SAD", "epoch", "sad"),
    ("Exploration (ITOP)", "epoch", "itop"),
)


class Measured(NamedTuple):
    """The times of a run's layers, as `experiments.bench.run_layers` gives them.

    Attributes:
      how: what was timed where, in words.
      times: layer name -> `dense_ms` and `sparse_ms`, each a median and an interquartile range.
    """

    how: str
    times: Mapping[str, Any]


def page(runs: Sequence[ReportedRun], measured: Mapping[str, Measured]) -> str:
    """Renders runs.

    Args:
      runs: at least one.
      measured: label of a run -> the times of its layers.

    Returns:
      An HTML document that needs no other file.
    """
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} training runs"
    sections = [_results(runs), _settings(runs), _curves(runs)]
    sections += [_run(i, run, measured.get(run.label)) for i, run in enumerate(runs)]
    links = "".join(
        f"<li><a href='#{anchor}'>{escape(text)}</a></li>"
        for anchor, text in [
            *(("results", "Results"), ("settings", "Settings"), ("curves", "Curves")),
            *((f"run{i}", run.label) for i, run in enumerate(runs)),
        ]
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"  # else a browser asks the server for one
        f"<title>{escape(title)}: blocksparse_jax</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{escape(title)}</h1><nav aria-label='Sections'><ul>{links}</ul></nav>"
        f"</header>\n<main>{''.join(sections)}</main></body></html>\n"
    )


def _results(runs: Sequence[ReportedRun]) -> str:
    columns = ["run", "method", "network and data", "state", "test accuracy", "density"]
    columns += ["kept FLOPs", "training FLOPs", "ever active", "step, ms (IQR)", "seconds"]
    rows = []
    for i, run in enumerate(runs):
        config, seconds = run.config, number(run.value("train_seconds"))
        rows.append(
            [
                Markup(f"{_swatch(i)} <a href='#run{i}'>{escape(run.label)}</a>"),
                config.method,
                f"{config.model} on {config.dataset}",
                run.status,
                _percent(run.value("test_accuracy"), 2),
                _decimal(run.value("density"), 4),
                _percent(run.value("kept_flops_fraction")),
                _percent(run.value("training_flops_fraction")),
                _percent(run.value("itop")),
                _spread(run.value("step_ms_median"), run.value("step_ms_iqr")),
                None if seconds is None else f"{seconds:,.0f}",
            ]
        )
    note = (
        "<p>Kept FLOPs: multiplications of the forward pass, of the dense network's. Training "
        "FLOPs: those of all steps, of a dense training's. Ever active: weights that some mask has "
        f"kept so far (ITOP). {_devices(runs)}</p>"
    )
    results = table("Where each run stands", columns, rows, text_columns=4)
    return f"<section id='results'><h2>Results</h2>{results}{note}</section>"


def _devices(runs: Sequence[ReportedRun]) -> str:
    devices = dict.fromkeys(str(run.value("device")) for run in runs if run.value("device"))
    return escape(f"Trained on {'; '.join(devices)}.") if devices else ""


def _settings(runs: Sequence[ReportedRun]) -> str:
    """What differs between runs in a table, and what all have in common below it."""
    settings = [run.settings for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    differ = [name for name, row in values.items() if any(value != row[0] for value in row)]
    text = ""
    if differ:
        rows = [[name, *values[name]] for name in differ]
        columns = ["setting", *(run.label for run in runs)]
        text = table("Settings that differ", columns, rows, text_columns=len(columns))
    elif len(runs) > 1:
        text = "<p>All runs have the same settings.</p>"
    common = [[name, row[0]] for name, row in values.items() if name not in differ]
    caption = "Settings that all runs have" if len(runs) > 1 else "Settings"
    shared = table(caption, ["setting", "value"], common, text_columns=2)
    return (
        f"<section id='settings'><h2>Settings</h2>{text}"
        f"<details><summary>{caption}</summary>{shared}</details></section>"
    )


def _curves(runs: Sequence[ReportedRun]) -> str:
    figures = []
    for title, kind, name in CURVES:
        drawn = [
            charts.Curve(run.label, i, *points)
            for i, run in enumerate(runs)
            if (points := run.curve(kind, name))[0]
        ]
        picture = charts.chart(title, drawn) if drawn else "<p>No run has a value yet.</p>"
        figures.append(f"<figure><figcaption>{title}</figcaption>{picture}</figure>")
    legend = "".join(f"<li>{_swatch(i)} {escape(run.label)}</li>" for i, run in enumerate(runs))
    return (
        f"<section id='curves'><h2>Curves</h2><ul class='legend'>{legend}</ul>"
        f"<div class='charts'>{''.join(figures)}</div><p>SAD (sparse architecture divergence): "
        "the fraction of the masks' entries that changed within an epoch. Exploration: the "
        "fraction of the weights that some mask has kept so far.</p></section>"
    )


def _run(index: int, run: ReportedRun, measured: Measured | None) -> str:
    config = run.config
    line = f"{config.method}: {config.model} on {config.dataset}, seed {config.seed}; {run.status}"
    parts = [f"<h2>{_swatch(index)} {escape(run.label)}</h2><p>{escape(line)}</p>"]
    if run.network is None:
        parts.append(f"<p class='missing'>No layers: {escape(run.missing)}</p>")
    else:
        parts += [_layers(run, measured), _pictures(run.network.layers)]
    parts.append(_epochs(run))
    return f"<section id='run{index}'>{''.join(parts)}</section>"


def _layers(run: ReportedRun, measured: Measured | None) -> str:
    assert run.network is not None
    layers = run.network.layers
    times = {} if measured is None else measured.times
    columns = ["layer", "shape", "pattern", "kept weights", "density", "kept MFLOPs"]
    columns += ["block fill", "time in theory", "time measured"]
    columns += ["dense, ms (IQR)", "sparse, ms (IQR)"] if times else []
    rows = []
    for layer in layers:
        time = times.get(layer.name)
        fill = None if layer.fill is None else ", ".join(f"{part:.2f}" for part in layer.fill)
        row = [layer.name, "x".join(map(str, layer.shape)), layer.pattern]
        row += [f"{layer.kept:,} of {layer.weights:,}", f"{layer.density:.4f}"]
        row += [_flops([layer]), fill, None if layer.mask is None else f"{layer.density:.1%}"]
        if layer.mask is None:
            row.append(None)
        else:
            row.append(f"{time.sparse_ms[0] / time.dense_ms[0]:.1%}" if time else "not measured")
        if times:
            row += [_spread(*time.dense_ms), _spread(*time.sparse_ms)] if time else [None, None]
        rows.append(row)
    kept, of = sum(layer.kept for layer in layers), sum(layer.weights for layer in layers)
    total = ["all of these", "", "", f"{kept:,} of {of:,}", f"{kept / of:.4f}", _flops(layers)]
    total += [""] * (len(columns) - len(total))
    how = "not measured, <code>--measure</code> times the layers on the machine at hand"
    how = how if measured is None else escape(measured.how)
    note = (
        "<p>MFLOPs: millions of multiply-adds for one image. Block fill: kept weights of the "
        "rectangles that the groups touch, in the matrix of the forward pass and in that of the "
        "input gradient. Times are fractions of the dense layer's: in theory as its FLOPs; "
        f"measured: {how}.</p>"
    )
    caption = f"Layers at step {run.network.step:,}"
    return table(caption, columns, rows, text_columns=3, total=total) + note


def _pictures(layers: Sequence[Layer]) -> str:
    figures = []
    for layer in layers:
        if layer.mask is not None and layer.mask.ndim == 4:
            *_, channels, filters = layer.shape
            text = (
                f"Mask of {layer.name}: {filters} filters down, {channels} input channels across, "
                f"density {layer.density:.4f}, {layer.pattern}"
            )
            figures.append(
                f"<figure><img src='{mask_picture(layer)}' alt='{escape(text)}' loading='lazy'>"
                f"<figcaption>{escape(layer.name)}<br>density {layer.density:.4f}</figcaption>"
                "</figure>"
            )
    if not figures:
        return ""
    return (
        "<h3>Masks</h3><p>A pixel is a kernel slice: white keeps no tap, black keeps all. Filters "
        "down, by group where there are groups, with red lines between them; input channels "
        f"across.</p><div class='masks'>{''.join(figures)}</div>"
    )


def _epochs(run: ReportedRun) -> str:
    if not run.epochs:
        return "<p>No epoch has ended yet.</p>"
    columns = ["epoch", "loss", "training accuracy", "test accuracy", "learning rate", "density"]
    columns += ["SAD", "ever active", "training FLOPs", "step, ms (IQR)"]
    rows = [
        [
            f"{row['step'] // run.steps_per_epoch}",
            _decimal(row.get("loss"), 4),
            _percent(row.get("train_accuracy"), 2),
            _percent(row.get("test_accuracy"), 2),
            _decimal(row.get("lr"), 6),
            _decimal(row.get("density"), 4),
            _decimal(row.get("sad"), 4),
            _percent(row.get("itop")),
            _percent(row.get("training_flops_fraction")),
            _spread(row.get("step_ms_median"), row.get("step_ms_iqr")),
        ]
        for row in run.epochs
    ]
    numbers = table(f"Epochs of {run.label}", columns, rows, text_columns=0)
    return f"<details><summary>Numbers of every epoch</summary>{numbers}</details>"


def _swatch(index: int) -> str:
    """A short piece of a run's curve."""
    dash = {"-": "", "--": "7 3", ":": "3 3", "-.": "8 2 3 2"}[charts.dashes(index)]
    return (
        "<svg class='swatch' viewBox='0 0 24 8' aria-hidden='true'><path d='M1 4H23' "
        f"stroke='var(--c{index % charts.COLORS})' stroke-dasharray='{dash}'/></svg>"
    )


def _flops(layers: Sequence[Layer]) -> str:
    kept, of = (
        sum(getattr(layer, name) * layer.positions for layer in layers) / 1e6
        for name in ("kept", "weights")
    )
    return f"{kept:,.3f} of {of:,.3f}"


def _percent(value: Any, digits: int = 1) -> str | None:
    return None if number(value) is None else f"{value:.{digits}%}"


def _decimal(value: Any, digits: int) -> str | None:
    return None if number(value) is None else f"{value:.{digits}f}"


def _spread(median: Any, iqr: Any) -> str | None:
    if number(median) is None:
        return None
    return f"{median:.3g}" + ("" if number(iqr) is None else f" ({iqr:.2g})")
