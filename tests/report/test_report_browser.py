"""The page in headless Chromium: no errors or requests, all images, a working slider, a layout that fits phones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from test_report import GAINS, fake_grids, fake_summary, picture, with_corrections, with_measurements

from atdiff.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs chromium and chromium-driver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a page with every section and return its address."""
    path = tmp_path_factory.mktemp("browser") / "report.html"
    summary = with_measurements(with_corrections(fake_summary()))
    summary["cells"] = [cell for cell in summary["cells"] if cell["sampler"] != "iddpm"]
    write_report(summary, path, fake_grids(), real=picture(200))
    return path.as_uri()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.get("about:blank")  # the requests of the browser's own start page are over
    yield browser
    browser.quit()


@pytest.fixture
def browser(driver: Any, page: str) -> Any:
    """Open the page anew at desktop size."""
    resize(driver, 1200)
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page)
    return driver


def resize(driver: Any, width: int) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shown(browser: Any) -> list[tuple[str, str]]:
    script = "return [...document.querySelectorAll('.sheet')].filter(s => s.offsetHeight > 0)"
    sheets = browser.execute_script(script + ".map(s => [s.dataset.sampler, s.dataset.steps])")
    return [tuple(sheet) for sheet in sheets]


def choose(browser: Any, sampler: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("css selector", "#viewer select")).select_by_visible_text(sampler)


def test_page_logs_no_errors_and_sends_no_requests(browser: Any, page: str) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page in sent
    assert {url.partition(":")[0] for url in sent if url != page} <= {"data"}


def test_every_image_is_shown_with_alt_text(browser: Any) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    pictures = browser.execute_script(
        "return Promise.all([...document.images].map(i => i.decode().then(() => [i.alt, i.naturalWidth])))"
    )
    # metrics, corrections; losses, steps saved, recall beside FD; seeds by sampler; measured; grids, real images, flip
    assert len(pictures) == (2 + 2) + 3 + 2 + 3 + 5 * (1 + len(GAINS)) + 2
    assert all(alt and width > 0 for alt, width in pictures)


def test_slider_moves_by_keyboard_and_announces_its_value(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("css selector", "#viewer input[type=range]")
    label = browser.find_element("css selector", "#viewer output")
    assert (shown(browser), label.text) == ([("ddim", "5")], "5 steps")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert (shown(browser), label.text) == ([("ddim", "10")], "10 steps")
    assert slider.get_attribute("aria-valuetext") == "10 steps"
    slider.send_keys(Keys.END)
    assert (shown(browser), label.text) == ([("ddim", "20")], "20 steps")
    slider.send_keys(Keys.HOME)
    assert shown(browser) == [("ddim", "5")]


def test_slider_moves_by_pointer(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    slider = browser.find_element("css selector", "#viewer input[type=range]")
    end = slider.size["width"] // 2 - 4
    ActionChains(browser).move_to_element(slider).click().perform()
    assert shown(browser) == [("ddim", "10")]
    ActionChains(browser).move_to_element_with_offset(slider, end, 0).click().perform()
    assert shown(browser) == [("ddim", "20")]


def test_changing_the_sampler_keeps_the_steps_if_available(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("css selector", "#viewer input[type=range]")
    choose(browser, "iddpm")  # which has no 5 steps
    assert shown(browser) == [("iddpm", "10")]
    slider.send_keys(Keys.END)
    assert shown(browser) == [("iddpm", "20")]
    choose(browser, "ddim")
    assert shown(browser) == [("ddim", "20")]
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(browser) == [("ddim", "10")]


def test_two_arms_flip_at_equal_seeds(browser: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.select import Select

    face, said = (browser.find_element("css selector", f".flip {name}") for name in (".face", "output"))
    first, second = map(Select, browser.find_elements("css selector", ".flip select"))

    def flipped() -> tuple[str, str]:
        return said.text, face.find_element("css selector", "img").get_attribute("src")

    def grid(arm: str) -> str:
        sheet = ".sheet:not([hidden])" if arm else "#viewer"
        return browser.find_element("css selector", f"{sheet} img[data-arm='{arm}']").get_attribute("src")

    assert flipped() == ("A: plain", grid("plain"))
    face.click()
    assert flipped() == ("B: at-residual", grid("at-residual"))
    ActionChains(browser).send_keys("f").perform()
    assert flipped() == ("A: plain", grid("plain"))
    first.select_by_visible_text("real images")
    assert flipped() == ("A: real images", grid(""))
    second.select_by_visible_text("at")
    ActionChains(browser).send_keys("f").perform()  # an open list would take the key as a letter
    face.click()
    before = flipped()
    choose(browser, "iddpm")
    assert flipped()[0] == before[0] == "B: at"
    assert flipped()[1] == grid("at") != before[1]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["chart", "samples"])
def test_clicks_enlarge_and_restore_an_image(browser: Any, width: int, kind: str) -> None:
    resize(browser, width)
    image = browser.execute_script(
        f"const i = [...document.querySelectorAll('img.{kind}')].find(i => i.offsetHeight > 0);"
        "i.scrollIntoView({block: 'center', inline: 'start'}); return i"
    )
    small = image.size
    browser.execute_script("arguments[0].closest('button').click()", image)
    box = browser.execute_script(
        "const b = document.querySelector(':popover-open').getBoundingClientRect(); return [b.left, b.top, b.width]"
    )
    assert box[:2] == [0, 0]
    assert box[2] >= width - 20
    assert image.size["width"] > 1.2 * small["width"]
    browser.execute_script("arguments[0].closest('button').click()", image)
    assert browser.find_elements("css selector", ":popover-open") == []
    assert image.size == small


def test_phone_layout_keeps_steps_and_best_arm_in_view(browser: Any) -> None:
    resize(browser, 390)
    left, right = browser.execute_script(
        "const t = document.querySelector('#table table'); const h = t.tHead.rows[0].cells;"
        "const b = h[2].getBoundingClientRect(); return [b.left, b.left + 60]"
    )
    head = browser.find_elements("css selector", "#table table.comparison thead th")
    assert [cell.text for cell in head[:2]] == ["steps", "plain"]
    assert head[2].text.startswith("at-residual ★")
    assert 0 < left < right < 390
    moved = browser.execute_script(
        "const s = document.querySelector('#table .scroll'); const c = s.querySelector('tbody tr:nth-child(2) th');"
        "const before = c.getBoundingClientRect().left; s.scrollLeft = 300;"
        "return [before, c.getBoundingClientRect().left, s.scrollLeft]"
    )
    assert abs(moved[0] - moved[1]) <= 1
    assert moved[2] > 0


def test_table_of_contents_leads_to_its_sections(browser: Any) -> None:
    for link in browser.find_elements("css selector", ".contents a[href^='#']"):
        link.click()
        place = browser.execute_script("return document.querySelector(':target').getBoundingClientRect().top")
        assert place < 844


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, width: int) -> None:
    resize(browser, width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    root = "document.documentElement"
    wide, visible = browser.execute_script(f"return [{root}.scrollWidth, {root}.clientWidth]")
    assert wide == visible  # the window less its scroll bar
    assert width - 20 < visible <= width
    grids = browser.execute_script("return [...document.querySelectorAll('img.samples')].map(i => i.offsetWidth)")
    assert max(grids) >= 90


def test_print_shows_all_grids_and_details(browser: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert len(shown(browser)) == 5
        controls, heading = (
            browser.find_element("css selector", f".interactive {name}") for name in (".controls", "h3")
        )
        assert not controls.is_displayed()
        assert heading.is_displayed()
        heights = "return [...document.querySelectorAll('details table')].map(t => t.offsetHeight)"
        assert min(browser.execute_script(heights)) > 0
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_page_is_complete_without_scripts(browser: Any, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        sheets = browser.find_elements("css selector", ".sheet")
        assert [sheet.is_displayed() for sheet in sheets] == [True] * 5
        assert not browser.find_element("css selector", ".controls").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_dark_mode_is_dark(browser: Any) -> None:
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(background)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        assert browser.execute_script(background) == "rgb(23, 24, 27)" != light
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
