from __future__ import annotations

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kdrun.cli import run as kdrun
from kdrun.report.results import Entry, results_of_runs
from kdrun.report.runs import Run

from .conftest import write_run

pytest.importorskip("matplotlib")
from kdrun.report import drawings  # noqa: E402
from kdrun.report.pages import _sign as sign_of  # noqa: E402
from kdrun.report.pages import run_page, table_page  # noqa: E402

NASTY = "<script>alert(1)</script>&\"'$x_1$"
SECTIONS = ("comparison", "curves", "calibration", "agreement", "terms", "sensitivity")


def with_records(run: Run, seed: int) -> Run:
    """A run that has curves, predictions and provenance too."""
    generator = np.random.default_rng(seed)
    lines = ["epoch,loss,weighted/supervised,weighted/kd,validation/accuracy"]
    lines += [f"{e},{2 / e},{1 / e},{0.5 / e},{60 + 9 * e + seed}" for e in (1, 2, 3)]
    (run.directory / "metrics.csv").write_text("\n".join(lines))
    for name in set(run.artefacts.values()):
        folder = run.directory.parents[3] / "store" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.csv").write_text("\n".join(lines))
    target = generator.integers(4, size=60)
    arrays = {"index": np.arange(60, dtype=np.int32), "target": target.astype(np.int32)}
    for label in ("teacher", "alone/last", "distilled/last"):
        wrong = generator.random(60) < 0.2
        arrays[f"{label}/prediction"] = np.where(wrong, (target + 1) % 4, target).astype(np.int32)
        arrays[f"{label}/confidence"] = generator.uniform(0.3, 1, 60).astype(np.float32)
    save_file(arrays, run.directory / "predictions.safetensors")
    environment = {"packages": {"torch": "2.9"}, "git": {"commit": "c" * 40, "diff": NASTY}}
    (run.directory / "env.json").write_text(json.dumps(environment | {"processor": NASTY}))
    (run.directory / "config.yaml").write_text("method:\n  temperature: 4.0\n")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two methods, one of them at two temperatures, two seeds; texts that break careless pages."""
    found = []
    for seed in (0, 1):
        hot = "method.temperature=8"
        found.append(write_run(tmp_path, "kd", seed, 90.0 + seed))
        found.append(write_run(tmp_path, "kd", seed, 91.0 - seed, words=hot, key="1"))
        found.append(write_run(tmp_path, NASTY.replace("/", "|"), seed, 92.0 + 2 * seed))
    return [with_records(run, run.seed) for run in found]


class Elements(html.parser.HTMLParser):
    """Tags, ids and texts of a page; fails on tags that are closed out of order."""

    VOID = ("meta", "input", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_table_page_has_every_section_and_is_whole(runs: list[Run], tmp_path: Path) -> None:
    page = table_page(results_of_runs(runs, title=NASTY, baseline="kd"), tmp_path)
    elements = Elements(page)
    assert {*SECTIONS, "overview", "details", "provenance"} <= set(elements.ids)
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.tags["svg"] == 8  # one each, and the loss terms of three configurations
    assert elements.tags["script"] == 1
    assert elements.tags["img"] == elements.tags["link"] == 0
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_run_page_has_every_section_and_is_whole(runs: list[Run]) -> None:
    page = run_page(runs[0])
    elements = Elements(page)
    assert {"results", "curves", "calibration", "confusion", "provenance"} <= {*elements.ids}
    assert elements.tags["svg"] == 7
    assert "<script>alert" not in page
    assert "temperature: 4.0" in page and "cccccccccccc with uncommitted changes" in page


def test_pages_load_nothing_from_elsewhere(runs: list[Run], tmp_path: Path) -> None:
    for page in (table_page(results_of_runs(runs, title="t"), tmp_path), run_page(runs[0])):
        sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
        assert all(source.startswith(("#", "data:")) for source in sources)
        assert "@import" not in page and "url(http" not in page
        assert len(page) < 600_000


def test_drawings_take_their_colours_from_the_page(runs: list[Run], tmp_path: Path) -> None:
    page = table_page(results_of_runs(runs, title="t"), tmp_path)
    assert "var(--ink)" in page and "var(--data0)" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", drawings))
    assert colours <= {"#000000", "#ffffff"}  # numbers on the colours of a heat map


def test_the_same_results_give_the_same_page(runs: list[Run], tmp_path: Path) -> None:
    results = results_of_runs(runs, title="t")
    assert table_page(results, tmp_path) == table_page(results, tmp_path)


@pytest.mark.filterwarnings("error")
def test_long_labels_are_whole_in_every_drawing(runs: list[Run], tmp_path: Path) -> None:
    words = "dataset.scale=standard method.divergence=forward method.teacher_weight=0.25"
    long = [write_run(tmp_path / "long", "bdkd", 0, 90.0, words=words, key="2")]
    long.append(write_run(tmp_path / "long", "bdkd", 0, 91.0, words="dataset.scale=none", key="3"))
    results = results_of_runs([with_records(run, 0) for run in long], title="t")
    drawn = drawings.of_results(results)
    for section in ("comparison", "curves", "calibration", "agreement"):
        text = re.sub(r"<[^>]*>|\s", "", drawn[section][0].svg)  # however it is broken into lines
        assert words.replace(" ", "") in text, section


def test_runs_without_records_still_have_a_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "kd"), write_run(tmp_path, "dkd", accuracy=float("nan"))]
    page = table_page(results_of_runs(runs, title="t"), tmp_path)
    ids = Elements(page).ids
    assert "comparison" in ids and "curves" not in ids
    assert "results" in Elements(run_page(runs[0])).ids


def test_pages_are_written_beside_what_they_show(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdrun(["report", str(runs[0].directory), "--html"]) == 0
    assert kdrun(["report", str(tmp_path), "--html"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [str(runs[0].directory / "report.html"), str(tmp_path / "report.html")]
    page = (tmp_path / "report.html").read_text()
    assert 'href="digits/resnet20-resnet8/kd-00000000/seed0/report.html"' in page
    assert kdrun(["report", str(tmp_path), "--html", "format=csv"]) == 2


# -- in a browser ----------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PROBE = """
<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#cells tbody tr")].filter((r) => !r.hidden);
  const told = {};
  const type = (control, value) => {
    control.value = value;
    control.dispatchEvent(new Event("input"));
  };
  const heads = document.querySelectorAll("#cells thead button");
  heads[2].click();
  told.rising = rows().map((row) => row.cells[2].textContent);
  heads[2].click();
  told.falling = rows().map((row) => row.cells[2].textContent);
  told.sorted = heads[2].closest("th").getAttribute("aria-sort");
  const [search] = document.querySelectorAll("input[type=search]");
  type(search, "temperature=8");
  told.found = rows().length;
  told.count = document.querySelector("output").textContent;
  type(search, "");
  told.all = rows().length;
  told.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  told.page = style("body").backgroundColor;
  told.text = style("figure svg text").fill;
  told.alerts = window.alerted === true;
  const pre = document.createElement("pre");
  pre.id = "told";
  pre.textContent = JSON.stringify(told);
  document.body.append(pre);
});
</script>
"""


def browse(page: str, folder: Path, *flags: str) -> dict:
    """Open a page in a browser, sort and filter it, and tell what is seen."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags]
        + [f"--user-data-dir={folder / 'profile'}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_table_can_be_sorted_and_filtered(runs: list[Run], tmp_path: Path, width: int) -> None:
    runs.append(write_run(tmp_path, "kd", 0, 70.0, pair=("vgg13", "vgg8")))
    page = table_page(results_of_runs(runs, title=NASTY), tmp_path)
    told = browse(page, tmp_path, f"--window-size={width},900")
    known = [float(text) for text in told["rising"] if text != "missing"]
    assert known == sorted(known)
    assert told["rising"][-2:] == told["falling"][-2:] == ["missing", "missing"]
    assert [float(text) for text in told["falling"][:-2]] == known[::-1]
    assert told["sorted"] == "descending"
    assert (told["found"], told["all"]) == (2, 10)
    assert told["count"] == "2 of 10 rows"
    assert told["overflow"] == 0
    assert told["alerts"] is False


@pytest.mark.slow
@in_a_browser
def test_light_and_dark(runs: list[Run], tmp_path: Path) -> None:
    page = table_page(results_of_runs(runs, title="t"), tmp_path)
    light = browse(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    dark = browse(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["page"], light["text"]) == ("rgb(252, 252, 250)", "rgb(29, 33, 38)")
    assert (dark["page"], dark["text"]) == ("rgb(20, 23, 26)", "rgb(228, 231, 234)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("error")
def test_a_method_that_diverged_is_on_the_page(tmp_path: Path, value: float) -> None:
    """All runs of one temperature, and of one method, have results that are no numbers."""
    runs = [write_run(tmp_path, "kd", 0, 90.0)]
    for number, (method, hot) in enumerate([("kd", 8), ("dkd", 2), ("dkd", 4)], start=1):
        words = f"method.temperature={hot}"
        runs.append(write_run(tmp_path, method, 0, value, words=words, key=str(number)))
    results = results_of_runs([with_records(run, run.seed) for run in runs], title="t")
    drawn = drawings.of_results(results)
    assert len(drawn["comparison"]) == 1 and not drawn["sensitivity"]
    page = table_page(results, tmp_path)
    assert (">nan<" if value != value else ">inf<") in page


@pytest.mark.parametrize("direction", ["max", "min"])
def test_no_difference_that_is_no_number_is_good_or_bad(direction: str) -> None:
    blank = Entry("a", "c", "distilled", "loss", direction, {0: float("nan")}, 1, published=1.0)
    assert sign_of(blank) == ""
    assert sign_of(replace(blank, values={0: 2.0})) == ("good" if direction == "max" else "bad")


@pytest.mark.parametrize("name", ["metrics.csv", "predictions.safetensors"])
def test_a_damaged_record_is_one_line(
    runs: list[Run], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (runs[0].directory / name).write_text("epoch,loss\n1,?\n")
    assert kdrun(["report", "--html", str(runs[0].directory)]) == 2
    told = capsys.readouterr().err
    assert f"{runs[0].directory / name} is damaged" in told and told.count("\n") == 1


def test_columns_without_figures_are_counted(runs: list[Run], tmp_path: Path, monkeypatch) -> None:
    results = results_of_runs(runs, title="t")
    assert "figures: of" not in table_page(results, tmp_path)
    monkeypatch.setattr(drawings, "MOST_COLUMNS", 1)
    pairs = [write_run(tmp_path / "o", "kd", pair=("vgg13", "vgg8")), *runs]
    page = table_page(results_of_runs(pairs, title="t"), tmp_path)
    assert "figures: of the first 1 of 2 columns" in page


def test_links_lead_to_folders_of_any_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "50% #1")
    (run.directory / "report.html").write_text("")
    page = table_page(results_of_runs([run], title="t"), tmp_path)
    assert 'href="50%25%20%231/digits/resnet20-resnet8/kd-00000000/seed0/report.html"' in page
