"""Training runs as one HTML file: what it shows, what it refuses, what a browser makes of it."""

import base64
import html
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from browser import browser, visit
from PIL import Image
from tiny_runs import PER_EPOCH, config

import blocksparse_jax as bsj
from experiments import report
from experiments.bench import run_layers
from experiments.reporting.html import charts, layers, pictures, runs
from experiments.reporting.html.layers import network_of
from experiments.reporting.html.page import CURVES
from experiments.training.execution import masks_of
from experiments.training.run import Run

SPARSE = ("conv1/kernel", "conv2/kernel", "conv3/kernel")
VOID = {"meta", "link", "img", "br", "path", "use"}
ODD = "a<b>&'\"$x_$\u202e"


RESULT = {
    "test_accuracy": 0.9125,
    "density": 0.1984,
    "step_ms_median": 26.56,
    "step_ms_iqr": 2.7,
    "train_seconds": 1234.5,
    "device": "a cpu",
}


def row_of(step):
    """A row of metrics.jsonl, as a run writes it, with numbers of its own."""
    loss = {"loss": 2 / step, "train_accuracy": step / 25, "lr": 0.05}
    if step % PER_EPOCH:
        return {"kind": "train", "step": step, "epoch": step // PER_EPOCH, **loss}
    numbers = {"test_accuracy": step / 24, "density": 0.1984, "itop": step / 50, "sad": 1 / step}
    epoch = step // PER_EPOCH - 1
    times = {"step_ms_median": 26.56, "step_ms_iqr": 2.7}
    return {"kind": "epoch", "step": step, "epoch": epoch, **loss, **numbers, **times}


ROWS = [row_of(step) for step in (3, 6, 9, 11, 12, 15, 18, 21, 22)]


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """A run of two epochs with its first checkpoint, rows and a result; tests copy its folder.

    `test_train` renders one that has trained.
    """
    run = Run(config(tmp_path_factory.mktemp("runs"), "random-channel", epochs=2, log_every=3))
    path = run.folder.path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run.folder.write_result(RESULT)
    run.folder.close()
    return run


@pytest.fixture(scope="module")
def network(run):
    """The network of the run and of its copies."""
    return network_of(run.folder, run.config)


@pytest.fixture
def quick(monkeypatch, network):
    """Pages without charts, of a network that is there already: both take longest."""
    monkeypatch.setattr(charts, "chart", lambda title, curves: "<svg></svg>")
    monkeypatch.setattr(runs, "network_of", lambda folder, config: network)


@pytest.fixture(name="copy")
def _copy(run, tmp_path):
    """Makes a copy of the run's folder, with other fields in its config."""

    def copy(name, **fields):
        folder = tmp_path / name
        shutil.copytree(run.folder.path, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return copy


def page_of(tmp_path, *folders, **fields):
    out = tmp_path / "page.html"
    settings = report.ReportConfig(runs=tuple(map(str, folders)), out=str(out), **fields)
    assert report.main(settings) == []
    text = out.read_text(encoding="utf-8")
    Nesting().check(text)
    return text


class Nesting(html.parser.HTMLParser):
    """Checks that tags close in order, and that nothing is fetched from elsewhere."""

    def check(self, text):
        self.open = []
        self.feed(text)
        assert self.open == []
        assert not re.search(r"url\((?!#)|@import|<script", text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), value
        assert tag != "img" or dict(attributes)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def cells(text, row):
    """The cells of the first table row that begins with a name."""
    line = re.search(rf"<tr><th scope='row'>{re.escape(row)}</th>(.*?)</tr>", text)[1]
    return [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", line)]


def test_a_run_is_rendered_in_its_folder_with_all_that_is_known_of_it(run, copy, capsys):
    folder = copy("a")
    report.cli([str(folder)])
    assert f"1 run: {folder / 'report.html'}\n" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    Nesting().check(text)
    assert cells(text, "2")[2] == "91.67%"
    results = text[text.index("<tbody>") : text.index("</table>")]
    for shown in ("ended", "91.25%", "0.1984", "26.6 (2.7)", "1,234"):
        assert f">{shown}</td>" in results
    assert "Trained on a cpu." in text
    assert text.count('role="img"') == len(CURVES)
    for title, kind, name in CURVES:
        values = [row[name] for row in ROWS if row["kind"] == kind]
        assert f'aria-label="{title} over the epochs: a ends at {values[-1]:.4g}"' in text
    for name in SPARSE:
        mask = np.asarray(masks_of(run.state)[name.split("/")[0]]["kernel"])
        shape, pattern, weights, density, flops, fill, theory, measured = cells(text, name)
        assert shape == "x".join(map(str, mask.shape))
        assert pattern.startswith("1 groups of ")
        assert weights == f"{mask.sum():,} of {mask.size:,}"
        assert (density, theory) == (f"{mask.mean():.4f}", f"{mask.mean():.1%}")
        assert fill == "1.00, 1.00"
        positions = 64 if name == "conv1/kernel" else 16
        assert flops == f"{mask.sum() * positions / 1e6:.3f} of {mask.size * positions / 1e6:.3f}"
        assert measured == "not measured"
    assert re.findall(r"alt='Mask of (\S+):", text) == list(SPARSE)
    assert cells(text, "sparsity") == ["0.8"]


@pytest.mark.usefixtures("quick")
def test_runs_stand_side_by_side(copy, tmp_path):
    copy("a"), copy("b", seed=1)
    (tmp_path / "c").mkdir()  # holds no run
    text = page_of(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "a")
    assert "<h1>2 training runs</h1>" in text
    differ = text[text.index("Settings that differ") : text.index("Settings that all runs have")]
    assert cells(differ, "seed") == ["0", "1"]
    assert "sparsity" not in differ
    assert [len(re.findall(rf"stroke='var\(--c{i}\)'", text)) for i in range(3)] == [3, 3, 0]


@pytest.mark.usefixtures("quick")
def test_a_folder_of_runs_stands_for_them(copy, tmp_path):
    copy("sweep/a"), copy("sweep/b")
    text = page_of(tmp_path, tmp_path / "sweep")
    assert re.findall(r"<a href='#run\d'>(.*?)</a>", text) == ["a", "b"] * 2
    assert "All runs have the same settings." in text


@pytest.mark.usefixtures("quick")
def test_a_name_with_odd_characters_is_escaped(copy, tmp_path):
    text = page_of(tmp_path, copy(ODD), copy("b"))
    assert "<b>" not in text
    assert "\u202e" not in text
    assert html.escape(ODD.replace("\u202e", "\\u202e")) in text


def test_a_run_under_way_shows_what_there_is(copy, tmp_path):
    folder = copy("a")
    (folder / "result.json").unlink()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:20])
    text = page_of(tmp_path, folder)
    assert f"not ended: step 15 of {2 * PER_EPOCH}" in text
    assert cells(text, "1")[:3] == ["0.1818", "44.00%", "45.83%"]
    path.write_text("".join(lines[:3]))
    text = page_of(tmp_path, folder)
    assert "No epoch has ended yet." in text
    assert text.count("No run has a value yet.") == len(CURVES) - 1, "the loss is there"
    path.unlink()
    text = page_of(tmp_path, folder)
    assert f"step 0 of {2 * PER_EPOCH}" in text
    shutil.rmtree(folder / "checkpoints")
    assert "No layers:" in page_of(tmp_path, folder)


@pytest.mark.usefixtures("quick")
def test_numbers_that_are_not_finite_are_left_out(copy, tmp_path):
    folder = copy("a")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 99, "loss": NaN}\n')
    assert "nan" not in page_of(tmp_path, folder).lower().replace("nan-", "")


@pytest.mark.usefixtures("quick")
def test_a_run_with_kernels_of_another_machine_is_shown(copy, tmp_path):
    text = page_of(tmp_path, copy("a", implementation="triton"))
    assert cells(text, "implementation") == ["triton"]


def test_a_run_without_its_data_is_shown_without_layers(copy, tmp_path, monkeypatch):
    def load(*_):
        raise FileNotFoundError("cifar10 is not prepared:\npython -m experiments.prepare_data")

    monkeypatch.setattr(layers, "load", load)
    text = page_of(tmp_path, copy("a"))
    assert "No layers: cifar10 is not prepared: python -m experiments.prepare_data</p>" in text
    assert "Mask of" not in text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "missing, so .* is not the folder of a run"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a map"),
        (lambda folder: (folder / "config.json").write_text('{"seed": 1}'), "other fields than"),
        (lambda folder: edit(folder, epochs="many"), "epochs: expected"),
        (lambda folder: edit(folder, dataset="nothing"), "dataset: expected"),
        (lambda folder: (folder / "metrics.jsonl").write_text("x\n{}\n"), "line 1 is not JSON"),
        (lambda folder: (folder / "result.json").write_text("{"), "not JSON"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line_and_the_others_rendered(
    copy, tmp_path, capsys, damage, words
):
    good, bad = copy("good"), copy("bad")
    damage(bad)
    with pytest.raises(SystemExit) as stop:
        report.cli([str(bad), str(good), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {bad}: ")
    assert re.search(words, line)
    assert "<title>good: " in (tmp_path / "page.html").read_text()


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_where_no_folder_is_a_runs_nothing_is_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        report.cli([str(tmp_path / "file"), str(tmp_path / "nothing"), "--measure"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [
        ["error", f" {tmp_path / name}"] for name in ("file", "nothing")
    ]
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--measure"], "--out and --measure are of run folders"),
        (["--check", "runs/a"], "check: expected no run folders"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(capsys, arguments, words):
    with pytest.raises(SystemExit):
        report.cli(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_measured_times_stand_beside_the_theory(copy, tmp_path, monkeypatch):
    """Every layer is checked and called; the clock is the test's."""
    called = []

    def time_in_turn(calls, rounds):
        called.append(list(calls))
        assert all(call() > 0 for call in calls.values())
        clock = {"dense": 8.0, "sparse": 3.0}
        return {name: [clock[name[0]] + (name[1] == "NHWC")] * rounds for name in calls}

    monkeypatch.setattr(run_layers, "time_in_turn", time_in_turn)
    text = page_of(tmp_path, copy("a"), measure=True)
    timed = [("dense", "NHWC"), ("dense", "CHWN"), ("sparse", "CHWN")]
    assert called == [timed] * len(SPARSE)
    for name in SPARSE:
        assert cells(text, name)[-3:] == ["37.5%", "8 (0)", "3 (0)"]
    assert cells(text, "stem/kernel")[-3:] == ["—"] * 3
    assert f"medians of {run_layers.ROUNDS} " in text


def test_labels_are_short_and_differ(tmp_path):
    folders = [tmp_path / "x" / "a", tmp_path / "y" / "a"]
    assert runs.labels_of(folders) == ["x/a", "y/a"]
    assert runs.labels_of(folders[:1]) == ["a"]


def pixels_of(picture):
    data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def layer_of(mask, layout):
    return layers.Layer("conv", mask.shape, int(mask.sum()), 1, "", mask, layout, None)


def test_a_picture_shows_the_filters_of_a_group_side_by_side():
    """Filters 0 and 2 keep one of two taps of channel 0, filters 1 and 3 both of channel 1."""
    mask = np.zeros((1, 2, 2, 4), bool)
    mask[0, 0, 0, [0, 2]] = mask[0, :, 1, [1, 3]] = True
    arrays = [np.array(rows) for rows in ([[0, 2], [1, 3]], [[0], [1]], [[0], [0]])]
    layout = bsj.BlockLayout(*arrays, shape=mask.shape)
    pixels = pixels_of(pictures.mask_picture(layer_of(mask, layout)))
    assert pixels.shape == (192, 96, 3)
    assert pixels[96].tolist() == [list(pictures._RED)] * 96
    shades = [[pixels[row, column, 0] for column in (10, 80)] for row in (10, 80, 110, 180)]
    assert shades == [[127, 255]] * 2 + [[255, 0]] * 2
    pixels = pixels_of(pictures.mask_picture(layer_of(mask, bsj.Dense())))
    shades = [[pixels[row, column, 0] for column in (10, 80)] for row in (10, 80, 110, 180)]
    assert shades == [[127, 255], [255, 0]] * 2


def test_a_picture_of_a_large_layer_shows_means():
    mask = np.zeros((1, 1, 40, 1024), bool)
    mask[..., ::2] = True
    pixels = pixels_of(pictures.mask_picture(layer_of(mask, bsj.Dense())))
    assert pixels.shape == (512, 40, 3)
    assert (pixels == 127).all()


HARNESS = """<!doctype html><body><script>
const page = {page};
for (const width of [400, 1400]) {{
  const frame = document.body.appendChild(document.createElement("iframe"));
  frame.style.cssText = `border: 0; height: 900px; width: ${{width}}px`;
  frame.onload = () => {{
    const inside = frame.contentDocument, root = inside.documentElement;
    const images = [...inside.images].filter((one) => one.complete && one.naturalWidth > 0);
    const charts = [...inside.querySelectorAll(".charts svg")].map(
      (one) => one.getBoundingClientRect().width);
    document.body.dataset[`at${{width}}`] = JSON.stringify(
      {{overflow: root.scrollWidth - width, images: images.length, charts}});
  }};
  frame.srcdoc = page;
}}
console.error("of the harness");
</script></body>"""


@pytest.mark.skipif(browser() is None, reason="no browser is installed: apt-get install chromium")
def test_a_browser_shows_the_page_without_errors(copy, tmp_path):
    """A screenshot, the console, and the layout on narrow and wide screens."""
    page_of(tmp_path, copy("a"), copy(ODD))
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    console, _ = visit(page, f"--screenshot={picture}", "--window-size=1400,2000")
    assert console == []
    with Image.open(picture) as image:
        assert image.size == (1400, 2000)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(11, 107, 184), (191, 75, 0)} <= colors, "both curves are drawn"

    harness = tmp_path / "harness.html"
    source = json.dumps(page.read_text()).replace("</", "<\\/")
    harness.write_text(HARNESS.format(page=source), encoding="utf-8")
    console, dom = visit(harness, "--dump-dom", "--virtual-time-budget=5000")
    assert len(console) == 1, "errors of a page are seen"
    assert "of the harness" in console[0]
    for width in (400, 1400):
        found = json.loads(html.unescape(re.search(rf'data-at{width}="(.*?)"', dom)[1]))
        assert found["overflow"] <= 0, "tables scroll, not the page"
        assert found["images"] == 2 * len(SPARSE)
        assert len(found["charts"]) == len(CURVES)
        assert min(found["charts"]) > 300
