"""The page in a real headless Chromium, at a phone's and a desktop's width, and by keyboard."""

import os
import shutil

import pytest
import videos

pytest.importorskip("selenium")
pytest.importorskip("gradio")

import served
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import stoa_jax
from stoa_jax.serve import app

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds; the first time includes compilation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = stoa_jax.load(served.write_model(folder / "model"))
    return model, served.write_library(folder / "cache", model)


@pytest.fixture(scope="module")
def address(library):
    page = served.open_page(*library, limits=app.Limits(upload_bytes=300_000, upload_seconds=6))
    with served.running(page) as address:
        yield address


@pytest.fixture(scope="module", params=[(390, 844), (1300, 900)], ids=["phone", "desk"])
def chromium(request):
    assert CHROMIUM and DRIVER, "install chromium and chromium-driver"
    width, height = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.quit()


class Visitor:
    """A user of the page."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.until("document.querySelector('#query textarea, #query input')")
        browser.get_log("browser")  # of earlier pages

    def run(self, script, *arguments):
        return self.browser.execute_script(f"return {script}", *arguments)

    def until(self, script):
        WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: self.run(script), script)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def see(self, selector, text):
        """Wait for a text in a part of the page."""
        script = f"(document.querySelector('{selector}')?.innerText || '').includes(arguments[0])"
        wait = WebDriverWait(self.browser, PATIENCE, 0.1)
        wait.until(lambda _: self.run(script, text), f"{text!r} in {selector}")

    def type(self, selector, text, *keys):
        field = self.find(f"{selector} textarea, {selector} input")
        field.clear()
        field.send_keys(text, *keys)

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def tab_to(self, selector, most=80):
        """Press Tab until an element has the focus."""
        for _ in range(most):
            if self.run("document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by Tab")

    def shot(self, name):
        """Save a screenshot of the whole page to STOA_SCREENSHOTS, if set."""
        folder = os.environ.get("STOA_SCREENSHOTS")
        if not folder:
            return
        os.makedirs(folder, exist_ok=True)
        width, height = self.run("[innerWidth, innerHeight]")
        whole = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        long = {**whole, "height": min(7000, self.run("document.documentElement.scrollHeight"))}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", long)
        self.browser.save_screenshot(os.path.join(folder, f"{name}-{width}.png"))
        back = {**whole, "height": height}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", back)

    def errors(self):
        """Return the browser's errors, except missing fonts and videos."""
        return [
            entry["message"]
            for entry in self.browser.get_log("browser")
            if entry["level"] == "SEVERE" and "/clip/" not in entry["message"]
        ]


@pytest.fixture
def visitor(chromium, address):
    return Visitor(chromium, address)


def fits(visitor):
    width, window = visitor.run("[document.documentElement.scrollWidth, innerWidth]")
    return width <= window


def test_search_play_look_closer_ask_and_explain(visitor):
    visitor.type("#query", "a red ball grows", Keys.ENTER)
    visitor.see("#status", "8 moments for “a red ball grows”")
    visitor.until("document.querySelectorAll('#results video').length == 7")
    assert fits(visitor)
    # The .avi plays too, transcoded, and every result starts at its start time.
    ready = "[...document.querySelectorAll('#results video')].every(v => v.readyState >= 1)"
    visitor.until(ready)
    assert visitor.run("[...document.querySelectorAll('#results video')].every(v => !v.error)")
    video = visitor.find("#results video")
    visitor.run("arguments[0].play()", video)
    visitor.until("document.querySelector('#results video').currentTime > 0.3")
    assert visitor.run("document.querySelector('#results video').src.includes('#t=0.00,')")
    visitor.shot("results")

    visitor.find("#look-1:not([disabled]), #look-2").click()
    visitor.until("document.querySelector('#film img')")
    assert visitor.run("document.querySelector('#film img').naturalWidth") > 100
    visitor.see("#caption", "Caption")
    visitor.see("#film", "Film and trajectories")
    visitor.see("#film", "action 1 →")
    visitor.until("document.activeElement.id == 'closer'")
    visitor.type("#question", "what colour is the ball?", Keys.ENTER)
    visitor.see("#answer", "%")
    visitor.type("#sentence", "two stars push a heart", Keys.ENTER)
    visitor.see("#film", "two stars push a heart")
    assert fits(visitor)
    visitor.shot("closer")
    assert visitor.errors() == []


def test_by_keyboard_alone(visitor):
    visitor.tab_to("#query textarea, #query input")
    visitor.press("a heart moves", Keys.ENTER)
    visitor.see("#status", "8 moments")
    visitor.tab_to("#results video")
    visitor.tab_to("#results button:not([disabled])")
    outline = visitor.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is visible
    visitor.press(Keys.ENTER)
    visitor.until("document.querySelector('#film img')")
    visitor.until("document.activeElement.id == 'closer'")
    visitor.tab_to("#question textarea, #question input")
    visitor.press("how many?", Keys.ENTER)
    visitor.see("#answer", "%")
    visitor.tab_to("#film .film")  # the arrow keys scroll a long film
    visitor.browser.get(visitor.browser.current_url)
    visitor.until("document.querySelector('#query textarea, #query input')")
    visitor.tab_to("#by-clip button")
    visitor.press(Keys.ENTER)
    visitor.until("document.querySelector('#clip-file')?.offsetParent")
    visitor.tab_to("#clip-file")
    visitor.tab_to("#search-clip")


def upload(visitor, path):
    if not visitor.run("document.querySelector('#clip-file')?.offsetParent"):
        visitor.find("#by-clip button").click()
        visitor.until("document.querySelector('#clip-file')?.offsetParent")
    visitor.find("#clip-file").send_keys(str(path))
    visitor.find("#search-clip").click()


def test_search_by_a_clip(visitor, library):
    path = sorted((library[1] / "videos").glob("test-*.mp4"))[2]
    upload(visitor, path)
    visitor.see("#status", "8 moments for your clip")
    visitor.until("document.querySelectorAll('#results video').length == 7")
    visitor.see("#results", "similarity 1.00")


def test_bad_uploads_are_one_message(visitor, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0\1\2 this is no video" * 50)
    long = videos.write(tmp_path / "long.mp4", count=96, codec="libx264")
    (tmp_path / "large.mp4").write_bytes(bytes(400_000))
    visitor.find("#by-clip button").click()
    visitor.until("document.querySelector('#clip-file')?.offsetParent")
    visitor.find("#search-clip").click()
    visitor.see("#status [role=alert]", "Choose a video file first.")
    upload(visitor, tmp_path / "broken.mp4")
    visitor.see("#status [role=alert]", "The uploaded file cannot be read as a video")
    visitor.shot("broken-upload")
    upload(visitor, long)
    visitor.see("#status [role=alert]", "lasts 8 s; the limit is 6 s")
    upload(visitor, tmp_path / "large.mp4")
    visitor.see("#status [role=alert]", "larger than the limit")
    assert len(visitor.browser.find_elements(By.CSS_SELECTOR, "[role=alert]")) == 1


def test_a_vanished_video_is_one_message(visitor, library):
    visitor.type("#query", "a ball", Keys.ENTER)
    visitor.see("#results [role=alert]", "vanished.mp4: the video was moved or deleted")
    visitor.see("#status", "1 of them cannot be shown")
    assert visitor.run("document.querySelectorAll('#results button[disabled]').length") == 1
    # A video that disappears while the page is open.
    first = visitor.find("#results video").get_attribute("aria-label")
    name = first.split(": ")[1].split(",")[0]
    path = library[1] / "videos" / name
    path.rename(path.with_suffix(".away"))
    try:
        number = first.split(":")[0].removeprefix("Result ")
        visitor.find(f"#look-{number}").click()
        visitor.see("#problem [role=alert], #player [role=alert]", "moved or deleted")
        visitor.shot("vanished")
    finally:
        path.with_suffix(".away").rename(path)


def test_nothing_typed_is_one_message(visitor):
    visitor.find("#search").click()
    visitor.see("#status [role=alert]", "Type some text first.")


def test_names_for_screen_readers(visitor):
    visitor.type("#query", "a ball", Keys.ENTER)
    visitor.until("document.querySelectorAll('#results video').length == 7")
    visitor.find("#look-1:not([disabled]), #look-2").click()
    visitor.until("document.querySelector('#film img')")
    nameless = visitor.run(
        """[...document.querySelectorAll('button, input, textarea, video, img, [role=region]')]
        .filter(e => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label')
          || e.getAttribute('aria-labelledby') || e.alt || e.title || e.innerText?.trim()
          || e.closest('label')))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert visitor.run("document.documentElement.lang")
    levels = visitor.run("[...document.querySelectorAll('h1, h2, h3')].map(h => h.tagName)")
    assert levels[0] == "H1" and levels.count("H1") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(visitor, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    visitor.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    visitor.browser.get(visitor.browser.current_url)
    visitor.until("document.querySelector('#query textarea, #query input')")
    visitor.type("#query", "a ball", Keys.ENTER)
    visitor.until("document.querySelectorAll('#results .soft').length == 8")
    visitor.shot(scheme)
    bars = visitor.run("getComputedStyle(document.querySelector('#results')).colorScheme")
    assert ("dark" in bars) == (scheme == "dark")  # scroll bars too
    poor = visitor.run(CONTRAST)
    visitor.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert poor == []


# The contrast of each text to the nearest background, by WCAG's definition; 4.5 is level AA.
CONTRAST = """(() => {
  const rgba = (s) => (s.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0.9) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const e of document.querySelectorAll('.page h1, .page h3, .page p, label span, #status p')) {
    if (!e.offsetParent || !e.innerText.trim()) continue;
    const a = light(rgba(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(e.innerText.slice(0, 40) + ' ' + ratio.toFixed(2));
  }
  return poor; })()"""
