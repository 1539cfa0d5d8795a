"""The page in headless Chromium: sort, filter, hover, keys, pictures, a phone; and no request to anywhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halotune.report.page import write_page
from tests.report.samples import METHODS, write_run, write_sweep

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="needs selenium, of halotune[dev]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --window-size=1300,1000"
).split()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven methods with three seeds, one run that failed early, and one with pictures."""
    place = write_sweep(tmp_path_factory.mktemp("report") / "runs", steps=40, layers=4)
    write_run(place / "pictures", "HRA r8", 3, steps=40, layers=4, pictures=True)
    failed = write_run(place / "failed", seed=4, steps=10, status="failed", label="</script>", config={"adapter": {"r": 9}})
    (failed / "changes.json").unlink()
    write_page([place], place / "index.html")
    return (place / "index.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Open:
    """A page in a browser, freshly loaded."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.all("#changes svg"))

    def wait(self, condition: Any) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 10).until(lambda _: condition())

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        return self.browser.find_element("css selector", css)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(f"return {code}", *arguments)

    def names(self) -> list[str]:
        """Of the rows that are seen, in their order."""
        return [e.text for e in self.all("#table tbody:not([hidden]) > tr:first-child a.name")]

    def column(self, number: int) -> list[float]:
        cells = self.all(f"#table tbody > tr:first-child > :nth-child({number})")
        return [float(value) for e in cells if (value := e.get_attribute("data-value"))]

    def tip(self, chart: Any) -> str:
        text = self.wait(lambda: self.js("arguments[0].querySelector('[aria-label=tip] text')?.textContent", chart))
        return text.replace("\u200b", "\n").strip()


@pytest.fixture
def opened(chromium: Any, page: str) -> Iterator[Open]:
    chromium.get_log("browser")
    yield Open(chromium, page)
    assert not chromium.get_log("browser")  # no error, no warning


def test_a_click_sorts_the_best_first_and_another_the_worst(opened: Open) -> None:
    accuracy = opened.all("#table thead button")[2]
    accuracy.click()
    assert opened.one("th[aria-sort]").text.startswith("best accuracy")
    assert opened.column(3) == sorted(opened.column(3), reverse=True)
    accuracy.click()
    assert opened.column(3) == sorted(opened.column(3))
    opened.all("#table thead button")[3].click()  # of losses the least is the best
    assert opened.column(4) == sorted(opened.column(4))
    opened.all("#table thead button")[0].click()
    names = opened.names()
    assert names == sorted(names, key=str.lower)


def test_sorting_keeps_the_runs_below_their_row(opened: Open) -> None:
    opened.one("#row-2 .expand").click()
    opened.all("#table thead button")[2].click()
    runs = opened.all("#row-2 tr.run")
    assert [run.text.split()[:2] for run in runs] == [["seed", str(i)] for i in range(3)]
    assert all(run.is_displayed() for run in runs) and not opened.one("#row-1 tr.run").is_displayed()


def test_the_filter_is_of_rows_and_charts(opened: Open) -> None:
    assert len(opened.names()) == len(METHODS) + 1
    opened.one("#filter").send_keys("HRA finish")
    assert set(opened.names()) == {"HRA r8", "HRA r8, λ = 1e-5"}
    assert opened.one("#count").text == "2 of 8 rows"
    assert len(opened.all("#changes svg")) == 2 == len(opened.all("#curves-legend li"))
    opened.one("#filter").send_keys(" nothing")
    assert not opened.names() and "Missing" in opened.one("#curves").text


def test_a_box_takes_a_row_out_of_the_curves(opened: Open) -> None:
    opened.one("#row-0 .draw").click()
    assert len(opened.all("#curves-legend li")) == len(METHODS)
    opened.one("#all").click()  # all are drawn but one: none is
    assert not opened.all("#curves svg")


def test_hovering_shows_the_point(opened: Open) -> None:
    for place, words in ("#curves", ("step", "loss: ")), ("#fronts", ("best accuracy: ", "trained parameters: ")):
        chart = opened.one(f"{place} svg")
        dot = opened.one("#fronts svg g[aria-label=dot] circle") if place == "#fronts" else chart
        opened.js("arguments[0].scrollIntoView({block: 'center'})", chart)
        webdriver.ActionChains(opened.browser).move_to_element(dot).perform()
        text = opened.tip(chart)
        assert any(text.startswith(name) for name in METHODS) and all(word in text for word in words)


def test_arrow_keys_move_through_a_heat_map(opened: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    chart = opened.one("#changes svg")
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    said = opened.one("#said").get_attribute("textContent").split("\n")
    assert opened.tip(chart).split("\n") == said
    assert said[1] == "layer 1, attention.self.key_proj" and float(said[2]) > 0


def test_every_control_can_be_reached_with_tab(opened: Open) -> None:
    controls = opened.all("button, input, select, summary, main svg[role=img]")
    shown = [e for e in controls if e.is_displayed() and e.get_attribute("class") != "close"]
    assert len(shown) > 40 and all(opened.js("arguments[0].tabIndex", e) == 0 for e in shown)
    assert all(e.accessible_name for e in shown)


def test_the_front_is_what_no_other_beats(opened: Open) -> None:
    lines = [
        [c.get_attribute("data-value") for c in e.find_elements("css selector", "tr:first-child > *")]
        for e in opened.all("#table tbody")
    ]
    for figure, cost in zip(opened.all("#fronts figure"), (5, 6, 7), strict=True):
        points = {line[0]: (float(line[2]), float(line[cost])) for line in lines if line[2]}
        front = {
            name
            for name, (quality, price) in points.items()
            if not any(q >= quality and p <= price and (q, p) != (quality, price) for q, p in points.values())
        }
        assert set(figure.text.split("On the front: ")[1].split("; ")) == front


def test_another_metric_and_scale(opened: Open) -> None:
    before = opened.one("#curves").get_attribute("innerHTML")
    opened.one("#metric option:nth-child(5)").click()
    assert opened.one("#curves svg").get_attribute("aria-label").startswith("evaluation accuracy over steps")
    drawn = {before, opened.one("#curves").get_attribute("innerHTML")}
    for box in "log", "smooth":
        opened.one(f"#{box}").click()
        drawn.add(opened.one("#curves").get_attribute("innerHTML"))
    assert len(drawn) == 4


def test_dark_and_light(opened: Open) -> None:
    def colours() -> list[list[int]]:
        found = opened.js("['background-color', 'color'].map((name) => getComputedStyle(document.body).getPropertyValue(name))")
        return [[int(x) for x in re.findall(r"\d+", colour)] for colour in found]

    paper, ink = colours()
    assert min(paper) > 200 and max(ink) < 80
    assert opened.one("#theme").text == "Dark"
    opened.one("#theme").click()
    paper, ink = colours()
    assert max(paper) < 80 and min(ink) > 200


def test_a_picture_opens_large_and_arrows_turn_pages(opened: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.one(".picture").click()
    viewer = opened.one("#viewer")
    assert viewer.is_displayed() and viewer.text.startswith("HRA r8, seed 3, a dog in the jungle, subject")
    webdriver.ActionChains(opened.browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert "a dog in the jungle, base" in viewer.text
    assert opened.js("arguments[0].naturalWidth", opened.one("#viewer img")) == 64
    webdriver.ActionChains(opened.browser).send_keys(Keys.ESCAPE).perform()
    opened.wait(lambda: not viewer.is_displayed())


def test_a_name_leads_to_how_its_runs_were_made(opened: Open) -> None:
    opened.all("#table a.name")[0].click()
    details = opened.wait(lambda: opened.one("details[open]"))
    assert "halotune train nlu --task sst2 --seed 0" in details.text


def test_a_phone_scrolls_in_one_direction(opened: Open) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened.wait(lambda: opened.one("#curves svg").size["width"] < 340)
        assert opened.js("document.documentElement.scrollWidth") == 360
        assert opened.js("arguments[0].scrollWidth > arguments[0].clientWidth", opened.one(".scroll"))  # the table in its frame
        assert all(svg.size["width"] < 340 for svg in opened.all("main svg[role=img]"))
    finally:
        opened.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_asked_of_another_place(opened: Open) -> None:
    assert opened.js("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length") == 0


def test_the_browser_refuses_requests_for_the_page(chromium: Any, page: str) -> None:
    opened = Open(chromium, page)
    opened.js("addEventListener('securitypolicyviolation', ({ blockedURI }) => { window.blocked = blockedURI; })")
    opened.js("(document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/picture.png' })), 1)")
    assert opened.wait(lambda: opened.js("window.blocked")).startswith("http://127.0.0.1:9")


def test_runs_of_which_almost_nothing_is_known(chromium: Any, tmp_path: Path) -> None:
    for name, text in ("none", "{}"), ("half", '{"label": "half", "status": "running", "resu'):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    write_page([tmp_path], tmp_path / "page.html")
    chromium.get_log("browser")
    chromium.get((tmp_path / "page.html").as_uri())
    sections = {s.text.split("\n")[0]: s.text for s in chromium.find_elements("css selector", "main section")}
    drawn = ("Quality and cost", "Learning curves", "What the adapters changed")
    assert all("Missing: no row" in sections[name] for name in drawn)
    assert sections["Runs"].count("incomplete") == 2
    assert not chromium.get_log("browser")


def test_one_run_alone_has_no_comparison(chromium: Any, tmp_path: Path) -> None:
    write_page([write_run(tmp_path / "run", steps=20, layers=2)], tmp_path / "page.html")
    opened = Open(chromium, (tmp_path / "page.html").as_uri())
    assert opened.one("h1").text == "HRA r8"
    assert not opened.one("#fronts").is_displayed() and not opened.one("#filter").is_displayed()
    assert len(opened.all("#curves svg")) == len(opened.all("#changes svg")) == 1
