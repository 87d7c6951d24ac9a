"""The page of a report: whole, escaped, the same each time; and drawn by a browser, where one is."""

import dataclasses
import functools
import html
import math
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from onnxcomp import page, plots
from onnxcomp.budget import Budget
from onnxcomp.core import Change, Skip, Width
from onnxcomp.errors import OptionError
from onnxcomp.layers import layers
from onnxcomp.page import html_of
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.report import Figures, Histogram, LayerRow, Step, Trial
from tests.passes.small import context
from tests.passes.test_prune_depth import joins, residual
from tests.test_anatomy import rows_of
from tests.test_report import FULL

VOID = {"meta", "link", "wbr", "br", "img", "input", "hr"}
NASTY = (
    """<script>alert(1)</script> "q" 'a' & $\\alpha$ $$ é 漢字 ]]> --> url(#x) #010203 id="x" {x} ${y}"""
    "\x1b\x00\u202e end"
)
BUSY = dataclasses.replace(
    FULL,
    source=f"{NASTY}.onnx",
    output=f"{NASTY} out.onnx",
    metric="accuracy",
    steps=(
        Step(
            f"Prune({NASTY!r})",
            (Change(NASTY, f"went from '{NASTY}'"), *(Change(f"/model/layer{n}/conv/Conv", "int8") for n in range(40))),
            (Skip(NASTY, f"because of '{NASTY}'"), Skip("gemm", "no kernel")),
            tuple(
                Width(f"{NASTY} {n}", 8, (0, 2, 4), (0.1, 10.0, 0.0, math.inf, 2.0, 1e-6, 3.0, 0.2)) for n in range(30)
            ),
        ),
    ),
    trials=(
        Trial(NASTY, Figures(2000, 2e-3, (1e-3, 3e-3), 1.1, drop=0.002), "slower"),
        Trial("int8", Figures(1000, 1e-3, speedup=2.0, drop=0.004), "chosen"),
        Trial("int4", Figures(500, 1.5e-3, speedup=1.5, drop=math.inf), NASTY),
        Trial("fp16", Figures(900, 1.7e-3, speedup=1.3, drop=0.001), "not faster"),
    ),
    notes=(NASTY,),
    command="onnxcomp optimize 'a b.onnx' --exclude '<b>' -o b.onnx",
    layers=(
        LayerRow(NASTY, "Conv", 10.0, 4.0, 1000, 250, (f"Prune: {NASTY}",), 1e-3, Histogram(-1, 1, (1, 3, 2)), None),
        LayerRow("x" * 300, "Gemm", None, 3.0, 500, None, (), None, None, None),
        *(
            LayerRow(
                f"/a/very/deep/model/with/layer{n}/conv/Conv", "Conv", 10.0 + n, 3.0, 10_000, 2_500,
                ("Simplify: folded", "QuantizeStatic: int8"), 10.0**-n, Histogram(-1, 1, (1, 3, 2)),
                Histogram(-1, 1, (0, 5, 1)),
            )
            for n in range(40)
        ),
        LayerRow("", "", 3.0, 1.0),
    ),
)  # fmt: skip


def alone(**changes: Any) -> str:
    return html_of(dataclasses.replace(FULL, **changes))


class Reader(HTMLParser):
    """Fails on tags that do not close; keeps the text and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


REPORTS = {
    "full": FULL,
    "busy": BUSY,
    "bare": dataclasses.replace(
        FULL,
        original=Figures(10),
        result=Figures(10),
        metric="",
        steps=(),
        trials=(),
        notes=(),
        budget=Budget(),
        recipe="",
    ),
    "unmet": dataclasses.replace(FULL, met=False, unmet=("<too slow>",)),
}


@functools.cache
def shown(name: str) -> str:
    return html_of(REPORTS[name])


@pytest.mark.parametrize("name", REPORTS)
def test_every_tag_closes_and_nothing_is_fetched(name: str) -> None:
    text = shown(name)
    reader = Reader(text)
    assert "script" not in reader.tags
    assert not {"img", "iframe", "object", "embed", "base", "form"} & reader.tags
    for attribute, value in reader.attributes:
        assert not attribute.startswith("on")
        if attribute in {"href", "src"}:
            assert value.startswith("#") or value == "data:,"
    assert not re.search(r"@import|url\((?!#)", text.replace(html.escape("url(#x)"), ""))


@pytest.mark.parametrize("name", REPORTS)
def test_plots_are_xml_and_no_two_share_an_identifier(name: str) -> None:
    text = shown(name)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    roots = [ElementTree.fromstring(drawing) for drawing in drawings]
    assert (len(roots) > 10) == (name == "busy")
    for root in roots:
        assert root.get("viewBox")
        assert root.get("aria-label")
        assert root.get("width") is None
    attributes = [(key, value) for root in roots for element in root.iter() for key, value in element.attrib.items()]
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = {value.removeprefix("#") for key, value in attributes if key == "href"}
    used |= {name for key, value in attributes if key != "aria-label" for name in re.findall(r"url\(#([^)]+)", value)}
    assert used <= set(ids)


@pytest.mark.parametrize("name", REPORTS)
def test_the_same_report_gives_the_same_page(name: str) -> None:
    assert html_of(REPORTS[name]) == shown(name)


def test_names_come_out_as_they_are() -> None:
    text = shown("busy")
    plain = NASTY.replace("\x1b", "\\x1b").replace("\x00", "\\x00").replace("\u202e", "\\u202e")
    reader = Reader(text)
    assert reader.text.count(plain) >= 8  # heading, source, candidate, verdict, note, layer, change, skip
    drawn = [
        "".join(element.itertext())
        for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert plots.shortened(NASTY) in drawn
    assert "x" * 300 in reader.text
    assert not any("x" * 50 in name for name in drawn)
    assert "1 left" not in text


@pytest.mark.parametrize("name", ["$a$", "#010203", 'id="x"', "a\nb", "漢字", "a & b", "<b>"])
def test_a_plot_reads_no_name_as_anything_else(name: str) -> None:
    (words, _) = ElementTree.fromstring(plots.bars([plots.Bars(name, "1", 1.0, 1.0, "c0")], "t")).iter(
        "{http://www.w3.org/2000/svg}text"
    )
    assert words.text == " ".join(name.split())


@pytest.mark.parametrize("length", [1, 35, 36, 37, 300])
def test_long_names_lose_their_middle(length: int) -> None:
    name = "".join(chr(97 + place % 26) for place in range(length))
    short = plots.shortened(name, 36)
    assert len(short) == min(length, 36)
    if length > 36:
        head, _, tail = short.partition("…")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert abs(len(head) - len(tail)) <= 1
    else:
        assert short == name


def test_names_that_differ_differ_when_shortened() -> None:
    names = [f"/model/encoder/layer.{n}/attention/self/{part}/{'x' * 30}/MatMul" for n in range(9) for part in "qkv"]
    short = plots.told_apart(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) == 44
    hopeless = ["x" * 60 + middle + "x" * 60 for middle in "ab"]
    assert plots.told_apart(hopeless) == [plots.shortened(name) for name in hopeless]


def test_the_headline_says_what_was_measured_and_where() -> None:
    environment = {"provider": "CPUExecutionProvider", "threads": 0, "batch": 7, "machine": "a machine", "seed": 5}
    text = Reader(alone(environment={**FULL.environment, **environment})).text
    for words in (
        "4.00x smaller", "4.00 KB", "1.00 KB", "25.0% of the original", "2.00x faster [1.90x, 2.25x]",
        "2.00 ms [1.90 ms, 2.10 ms]", "1.00 ms [900 µs, 1.10 ms]", "0.50 points worse [-0.20, +1.20]",
        "99.00% [98.00%, 100.00%]", "98.50% [97.00%, 100.00%]",
        "Within the budget: a drop of at most 1 points", "CPU", "ONNX Runtime's own choice", "Batch7", "a machine",
        "medians", "40 samples", "Seed5", "SHA-25600", "quantize-static: {keep: [gemm]}", "a note",
    ):  # fmt: skip
        assert words in text, words


def test_a_broken_budget_is_said_loudly() -> None:
    text = Reader(shown("unmet")).text
    assert "NOT within the budget: <too slow>" in text
    assert "Within the budget" not in text


def test_empty_sections_say_so_in_a_sentence() -> None:
    text = Reader(shown("bare")).text
    for words in (
        "Nothing was measured that could be compared.", "Layers were not looked at.", "Nothing was pruned",
        "There are no weights", "Nothing was changed.", "No technique left anything out", "nothing else to know",
        "The recipe is empty.", "No limits were given",
    ):  # fmt: skip
        assert words in text, words
    assert "NaN" not in text


def test_what_is_unknown_is_a_dash_and_no_zero() -> None:
    unknown = LayerRow("gone", "Conv", 10.0, None, 100, None)
    table = html_of(dataclasses.replace(FULL, layers=(unknown,))).partition("1 layer as a table")[2]
    row = re.search(r"<tr><td[^>]*>gone</td>.*?</tr>", table, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    assert cells == ["gone", "Conv", "10.0 µs", "–", "100 B", "–", "–", "–"]


def test_the_table_of_layers_sums_up_what_both_models_take() -> None:
    text = Reader(shown("busy")).text
    whole = sum(row.microseconds or 0 for row in BUSY.layers), sum(row.microseconds_after or 0 for row in BUSY.layers)
    assert whole == (1193.0, 128.0)
    assert "in all1.19 ms128 µs" in text.replace(" in all", "in all").replace("in all ", "in all")


def test_layers_that_were_fitted_again_or_went_are_not_as_they_were() -> None:
    model = residual(1, 1)
    stem, *_ = [layer.name for layer in layers(model)]
    technique = PruneDepth(parts=((joins(model)[0], 1),), jointly=False)
    outcome = technique(model, context(8))
    steps = (Step.of(technique, outcome),)
    rows = rows_of(model, outcome.model, steps).values()
    text = Reader(alone(layers=tuple(row for row in rows if row.op in {"Conv", "Gemm"} and row.name != stem))).text
    assert text.count(f"PruneDepth: gone with the branch at '{joins(model)[0]}'") == 2
    assert "after: prune depth" in text
    assert "after: as it was" not in text


def test_layers_that_were_only_cleaned_up_say_so_and_others_do_not() -> None:
    cleaned = LayerRow("a", "Add", 2.0, 1.0, 10, 10, ("Simplify: folded", "Unfuse: written as a Sum"))
    other = LayerRow("b", "Conv", 2.0, 1.0, 10, 5, ("Unfuse: written as a Sum", "QuantizeStatic: uint8"))
    text = Reader(alone(layers=(cleaned, other))).text
    assert "after: clean-up" in text
    assert "after: quantize static" in text
    assert "2 layers as a table" in text


def test_commands_break_at_options_only() -> None:
    text = html.unescape(shown("busy"))
    assert "onnxcomp optimize 'a b.onnx' \\\n  --exclude '<b>' \\\n  -o b.onnx" in text


@pytest.mark.parametrize("metric", ["accuracy", "relative-error", NASTY])
@pytest.mark.parametrize(
    "trials",
    [(), BUSY.trials, (Trial("a", Figures(1, 1e-3, speedup=1.0, drop=0.0), ""),), (Trial("a", Figures(1), ""),)],
)
def test_any_number_of_points_can_be_drawn(metric: str, trials: tuple[Trial, ...]) -> None:
    for budget in (Budget(), Budget(max_drop=0.01, max_latency=1e-3, min_speedup=2)):
        text = alone(metric=metric, trials=trials, budget=budget)
        assert text.count("<svg") == 1
        assert ("the budget<" in text) == (budget != Budget())


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [plots.Point(x, y, "") for x, y in ((1, 0), (2, 0), (0.5, 1), (0.7, 2), (0.5, 3), (0.2, 5))]
    assert [(point.latency, point.loss) for point in plots._front(points)] == [(0.2, 5), (0.5, 1), (1, 0)]


@pytest.mark.parametrize(
    "saliency",
    [(), (0.0,) * 4, (math.nan,) * 4, (1.0,) * 4, (1e-9, 1.0, 2.0, 5.0), (-1.0, 0.0, 1.0, 2.0)],
)
def test_any_saliency_can_be_drawn(saliency: tuple[float, ...]) -> None:
    step = Step("Prune()", (Change("a", "went"),), (), (Width("a", 4, (0, 1), saliency),))
    text = Reader(alone(steps=(step,))).text
    assert "4 → 2" in text
    assert ("What went and what stayed" in text) == any(map(math.isfinite, saliency))


def test_the_style_of_the_user_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    usual = shown("busy")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "#ff0000")
    assert html_of(BUSY) == usual


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=re.escape("pip install 'onnxcomp[report]'")):
        page.require()


def test_the_page_needs_no_matplotlib_until_it_is_made() -> None:
    assert "onnxcomp.page" in sys.modules
    source = Path(str(plots.__file__)).read_text()
    assert not re.search(r"^(?:import|from) matplotlib", source, re.MULTILINE)


# --- in a browser ---------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, words = walk.currentNode.textContent.trim();
    if (!words) continue;
    const style = getComputedStyle(element);
    const own = light(parse(element.closest("svg") ? style.fill : style.color)), other = light(behind(element));
    const ratio = (Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05);
    if (ratio < worst[0]) worst = [ratio, words];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'onnxcomp[browser]' to open the page")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in REPORTS}
    for name, path in paths.items():
        path.write_text(shown(name), encoding="utf-8")
    return paths


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", REPORTS)
def test_a_browser_shows_it(
    browser: Any, written: dict[str, Path], name: str, size: tuple[int, int], scheme: str
) -> None:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    view, said, asked = context.new_page(), [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("dialog", lambda dialog: said.append(dialog.message))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(written[name].as_uri())
    assert said == []
    assert asked == [written[name].as_uri()]
    view.evaluate("document.querySelectorAll('details').forEach(box => box.open = true)")
    width, room = view.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room
    headings = view.locator("h1, h2")
    assert headings.count() == 10
    assert all(headings.nth(place).is_visible() for place in range(headings.count()))
    for box in view.locator("svg").all()[:30]:
        edges = box.bounding_box()
        assert edges["x"] >= 0
        assert edges["x"] + edges["width"] <= size[0]
    dark = sum(view.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 384
    assert dark == (scheme == "dark")
    ratio, words = view.evaluate(CONTRAST)
    assert ratio >= 4.5, words  # what WCAG 2 asks of small text
    context.close()
