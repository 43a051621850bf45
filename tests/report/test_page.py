"""report.html in a real browser: it opens alone, its counts are predictions.csv's, nothing is run
but its own script."""

import dataclasses
import json
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest

from lab.measure.failures import Transition
from lab.measure.gallery import Gallery
from lab.report import figures, headline, page, summary

HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=alert(1)>"
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
NO_FIGURE = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, or a word why there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(switch)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """A page in the browser, and what a person would do with it."""

    def __init__(self, browser, path, address=""):
        self.browser = browser
        for log in ("browser", "performance"):
            browser.get_log(log)  # of the page before
        browser.get("about:blank")
        start = time.perf_counter()
        browser.get(f"file://{path}{address}")
        self.seconds = time.perf_counter() - start

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def count(self):
        return self.run("return document.getElementById('count').textContent")

    def set(self, **filters):
        """As by hand: each field, then what the browser says when one changes."""
        self.run(
            "const form = document.getElementById('filters'); form.reset();"
            "for (const [name, value] of Object.entries(arguments[0])) {"
            "  const field = form.elements[name];"
            "  if (field.type === 'checkbox') field.checked = value; else field.value = value; }"
            "form.dispatchEvent(new Event('input'));",
            filters,
        )
        return self.count()

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)
        return self.count()

    def press(self, key):
        self.run(
            "document.activeElement.dispatchEvent("
            "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
            key,
        )

    def opened(self):
        return self.run(
            "const d = document.getElementById('opened');"
            "return d.open ? document.getElementById('opened-title').textContent : ''"
        )

    def requests(self):
        """The addresses of all that it asked for."""
        asked = []
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        return asked

    def assert_quiet(self):
        """Nothing in the console, nothing asked of any host."""
        assert self.browser.get_log("browser") == []
        for address in self.requests():
            assert address.startswith(("file:", "data:", "blob:", "about:")), address


def written(results, tmp_path):
    path = tmp_path / "report.html"
    told = list(summary.parts(results))
    shown = page.report(results, headline.headline(results), told, NO_FIGURE, {})
    path.write_text(shown, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def predictions(made_tiny_run):
    return pd.read_csv(made_tiny_run / "results" / "predictions.csv")


def wrong(predictions, keys):
    """Which images each network gets wrong."""
    return {key: ~predictions[f"{key}_correct"] for key in keys}


KEYS = ("baseline", "se_attention")


def test_it_opens_alone(chromium, made_tiny_run):
    """The run's own file: no message, no request to any host, and what is said stands in it."""
    opened = Page(chromium, made_tiny_run / "results" / "report.html")
    opened.assert_quiet()
    text = opened.run("return document.body.innerText")
    record = json.loads((made_tiny_run / "results" / "comparison.json").read_text())
    assert record["conclusion"] in text and record["command"] in text
    assert record["device"] in text and "commit" in text
    assert re.search(r"\d{4}-\d\d-\d\d", text)
    for heading in ("Does it help?", "What is taken for what", "Stress tests", "Failures"):
        assert heading in text
    broken = opened.run(
        "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
    )
    assert broken == 0


def test_each_cell_of_the_confusions_shows_its_images(chromium, results, predictions, tmp_path):
    opened = Page(chromium, written(results, tmp_path))
    cells = opened.run(
        "return [...document.querySelectorAll('.cell')].map("
        "c => [c.dataset.true, c.dataset.predicted, c.dataset.network, c.textContent])"
    )
    assert len(cells) > 20
    seen = dict.fromkeys(KEYS, 0)
    for true, called, key, shown in cells:
        names = results.classes[int(true)], results.classes[int(called)]
        rows = predictions[
            (predictions["true_class"] == names[0]) & (predictions[f"{key}_predicted"] == names[1])
        ]
        assert int(shown) == len(rows)
        seen[key] += len(rows)
        selector = f'.cell[data-true="{true}"][data-predicted="{called}"][data-network="{key}"]'
        assert opened.click(selector).startswith(f"{len(rows)} of ")
    for key, mistakes in wrong(predictions, KEYS).items():
        assert seen[key] == mistakes.sum()
    opened.assert_quiet()


def test_each_bar_of_the_transitions_shows_its_images(chromium, results, predictions, tmp_path):
    opened = Page(chromium, written(results, tmp_path))
    first, other = wrong(predictions, KEYS).values()
    same = predictions["baseline_predicted"] == predictions["se_attention_predicted"]
    expected = {
        Transition.CORRECTED: first & ~other,
        Transition.BROKEN: ~first & other,
        Transition.SAME_CLASS: first & other & same,
        Transition.OTHER_CLASS: first & other & ~same,
    }
    for way, images in expected.items():
        assert opened.click(f'.bar[data-way="{way}"]').startswith(f"{images.sum()} of "), way
        assert opened.set(way=str(way)).startswith(f"{images.sum()} of "), way
    assert opened.set() == f"{(first | other).sum()} of {(first | other).sum()} images"


@pytest.mark.parametrize("key", ["", *KEYS])
def test_filters_combine(chromium, results, predictions, tmp_path, key):
    """What is asked of a mistake is asked of one network's answer: the one named, or any."""
    opened = Page(chromium, written(results, tmp_path))
    asked = [key] if key else list(KEYS)
    for label, called, sure in ((0, "", 0), ("", 3, 12), (6, 3, 0), ("", "", 15), (2, "", 11)):
        found = np.zeros(len(predictions), bool)
        for one in asked:
            holds = ~predictions[f"{one}_correct"].to_numpy()
            if called != "":
                holds &= predictions[f"{one}_predicted"] == results.classes[called]
            holds &= (1000 * predictions[f"{one}_confidence"]).round() >= 10 * sure
            found |= holds
        if label != "":
            found &= predictions["true_class"] == results.classes[label]
        count = opened.set(true=str(label), predicted=str(called), network=key, sure=str(sure))
        assert count.startswith(f"{found.sum()} of "), (label, called, sure)
    index = int(results.failures.gallery.index[0])
    assert opened.set(index=str(index)).split()[0] != "0"
    assert opened.run("return document.querySelector('.tile').getAttribute('aria-label')")


def with_people(results):
    """The same with people's answers, and suspects."""
    gallery = results.failures.gallery
    count = len(gallery.index)
    share = np.linspace(0, 1, count)
    people = ((1 - share) / 9)[:, None].repeat(10, 1)
    people[np.arange(count), gallery.labels] = share
    changed = dataclasses.replace(gallery, people=people, is_suspect=np.arange(count) % 5 == 0)
    dossier = dataclasses.replace(results.failures, gallery=changed)
    return dataclasses.replace(results, failures=dossier)


def test_people_and_suspects_are_filters_too(chromium, results, tmp_path):
    changed = with_people(results)
    gallery = changed.failures.gallery
    opened = Page(chromium, written(changed, tmp_path))
    agree = (1000 * gallery.people[np.arange(len(gallery.labels)), gallery.labels]).round()
    assert opened.set(agree="40").startswith(f"{(agree <= 400).sum()} of ")
    assert opened.set(suspect=True).startswith(f"{gallery.is_suspect.sum()} of ")
    both = (agree <= 400) & gallery.is_suspect
    assert opened.set(agree="40", suspect=True).startswith(f"{both.sum()} of ")
    opened.click(".tile")
    opened.run("document.querySelector('.tile').click()")
    assert "people:" in opened.run("return document.getElementById('opened').innerText")
    opened.assert_quiet()


def test_the_address_keeps_the_filter(chromium, results, tmp_path):
    path = written(results, tmp_path)
    opened = Page(chromium, path)
    everything = opened.count()
    narrowed = opened.set(true="3", network="baseline", sure="11")
    address = opened.run("return location.hash")
    assert address == "#failures?true=3&network=baseline&sure=11" and narrowed != everything
    again = Page(chromium, path, address)
    assert again.count() == narrowed
    again.run("location.hash = '#failures?true=4'")
    again.run("dispatchEvent(new HashChangeEvent('hashchange'))")
    assert again.run("return document.getElementById('filters').elements.true.value") == "4"
    nonsense = Page(chromium, path, "#failures?true=zebra&sure=<b>&network=%E2%82%AC&what=1")
    assert nonsense.count().endswith("images")
    nonsense.assert_quiet()


def test_an_image_opens_and_keys_turn_the_pages(chromium, results, tmp_path):
    opened = Page(chromium, written(results, tmp_path))
    count = len(results.failures.gallery.index)
    opened.run("document.querySelector('.tile').click()")
    first = results.failures.gallery.index[0]
    assert opened.opened().startswith(f"Image {first}:") and f"(1 of {count})" in opened.opened()
    text = opened.run("return document.getElementById('opened').innerText")
    for name in results.classes:
        assert text.count(name) >= 2  # in each network's list
    assert opened.run("return document.querySelectorAll('#opened canvas').length") == 3
    painted = opened.run(
        "return [...document.querySelectorAll('#opened canvas')].map(c =>"
        " new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)"
    )
    assert min(painted) > 3  # not one colour
    opened.press("ArrowRight")
    assert f"(2 of {count})" in opened.opened()
    opened.press("ArrowLeft")
    opened.press("ArrowLeft")
    assert f"({count} of {count})" in opened.opened()
    from selenium.webdriver.common.keys import Keys

    chromium.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert opened.opened() == ""
    opened.assert_quiet()


def test_the_pixels_and_maps_are_the_images(chromium, results, tmp_path):
    """The first, a middle and the last tile, as the browser has decoded and painted them."""
    gallery = results.failures.gallery
    opened = Page(chromium, written(results, tmp_path))
    for image in (0, len(gallery.index) // 2, len(gallery.index) - 1):
        opened.run("open(arguments[0])", image)
        painted = opened.run(
            "const c = document.querySelector('#opened canvas');"
            "return [...c.getContext('2d').getImageData(0, 0, 224, 224).data]"
        )
        large = np.array(painted).reshape(224, 224, 4)[3::7, 3::7, :3]
        assert np.array_equal(large, gallery.pixels[image])
        opened.run("document.getElementById('opened').close()")


def test_tables_sort_by_their_numbers(chromium, results, tmp_path):
    opened = Page(chromium, written(results, tmp_path))
    table = "#verdict .sortable:last-of-type"
    script = (
        "const t = [...document.querySelectorAll('#verdict .sortable')].at(-1);"
        "t.tHead.rows[0].cells[arguments[0]].querySelector('button').click();"
        "return [...t.tBodies[0].rows].map(r => r.cells[arguments[0]].dataset.value)"
    )
    rising = [float(value) for value in opened.run(script, 1)]
    assert rising == sorted(rising) and len(set(rising)) > 1, table
    falling = [float(value) for value in opened.run(script, 1)]
    assert falling == sorted(rising, reverse=True)
    names = opened.run(script, 0)
    assert names == sorted(names, key=str.lower)


def renamed(results, name):
    """With a class, both networks and the command of other people's making."""
    networks = []
    for of_network in results.networks:
        network = dataclasses.replace(of_network.network, title=f"{name}{of_network.network.key}")
        networks.append(dataclasses.replace(of_network, network=network))
    setup = dataclasses.replace(results.setup, command=f"python main.py --output-dir {name}")
    classes = (name, *results.classes[1:])
    return dataclasses.replace(results, classes=classes, networks=tuple(networks), setup=setup)


def test_names_are_never_markup(chromium, results, tmp_path):
    opened = Page(chromium, written(renamed(results, HOSTILE), tmp_path))
    assert opened.run("return document.title") == results.dataset
    assert opened.run("return document.querySelectorAll('img[onerror]').length") == 0
    opened.run("document.querySelector('.tile').click()")
    assert HOSTILE in opened.run("return document.getElementById('opened').textContent")
    assert opened.run("return document.title") == results.dataset
    opened.assert_quiet()


def test_nothing_else_may_run(chromium, results, tmp_path):
    """The policy lets no other script in, wherever it might have come from."""
    path = written(results, tmp_path)
    text = path.read_text()
    path.write_text(text.replace("</main>", "<script>document.title = 'hacked'</script></main>"))
    opened = Page(chromium, path)
    assert opened.run("return document.title") == results.dataset
    assert "Content Security Policy" in opened.browser.get_log("browser")[0]["message"]


def with_failures(results, count):
    """With so many failures, made up."""
    rng = np.random.default_rng(0)
    networks = [of_network.network.key for of_network in results.networks]
    labels = rng.integers(0, 10, count)
    probabilities = {}
    heatmaps = {}
    for key in networks:
        probabilities[key] = rng.dirichlet(np.ones(10), count).astype(np.float32)
        called = probabilities[key].argmax(1)
        labels = np.where(called == labels, (labels + 1) % 10, labels)
        heatmaps[key] = rng.random((count, 4, 4), np.float32)
    gallery = Gallery(
        index=np.arange(count),
        pixels=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
        labels=labels,
        probabilities=probabilities,
        heatmaps=heatmaps,
        people=None,
        is_suspect=np.zeros(count, bool),
    )
    dossier = dataclasses.replace(results.failures, gallery=gallery)
    return dataclasses.replace(results, failures=dossier)


def test_there_may_be_no_failure(chromium, results, tmp_path):
    opened = Page(chromium, written(with_failures(results, 0), tmp_path))
    assert opened.count() == "0 of 0 images"
    opened.assert_quiet()


@pytest.mark.parametrize("count", [1000, 10_000])
def test_many_failures_open_and_filter_at_once(chromium, results, tmp_path, count):
    """Of images that can't be made smaller, since they are noise."""
    path = written(with_failures(results, count), tmp_path)
    opened = Page(chromium, path)
    assert opened.count() == f"{count} of {count} images"
    milliseconds = opened.run(
        "const took = [];"
        "for (let k = 0; k < 10; k += 1) {"
        "  document.getElementById('filters').elements.true.value = String(k);"
        "  const start = performance.now(); update(); grid.getBoundingClientRect();"
        "  took.push(performance.now() - start); }"
        "return took.sort((a, b) => a - b)[5]"
    )
    print(
        f"{count} failures: {path.stat().st_size / 1e6:.1f} MB, opens in {opened.seconds:.2f} s, "
        f"filters in {milliseconds:.0f} ms"
    )
    assert opened.seconds < 2 * 5 and milliseconds < 100 * 5  # five times slower machines, loaded
    opened.assert_quiet()


def test_a_run_without_its_parts_has_a_page(chromium, results, tmp_path):
    """What failed is told; no stress tests, no dossier, nothing compared."""
    bare = dataclasses.replace(
        results,
        stress=None,
        failures=None,
        comparisons=(),
        explained=(),
        failed={"failures": f"ValueError: {HOSTILE}"},
    )
    opened = Page(chromium, written(bare, tmp_path))
    assert "Not all was measured" in opened.run("return document.body.innerText")
    assert HOSTILE in opened.run("return document.body.textContent")
    opened.assert_quiet()


def test_the_first_figure_is_the_same_in_each_run(results):
    assert figures.accuracy_svg(results) == figures.accuracy_svg(results)


def test_the_headline_fits_a_terminal(results):
    lines = headline.headline(results).lines()
    assert 2 <= len(lines) <= 14 and max(map(len, lines)) <= 80


def test_a_page_of_ones_own_pictures(chromium, tmp_path):
    """Names are other people's; it opens alone too."""
    answers = [page.OwnAnswer(HOSTILE, "cat 97%", page.photo_address(PIXELS))]
    pictures = []
    for name, is_unlike in (("cat.jpg", False), (HOSTILE, True)):
        square, small = page.photo_address(PIXELS), page.picture_address(PIXELS[:32, :32])
        pictures.append(page.OwnPicture(name, square, small, is_unlike, answers))
    path = tmp_path / "report.html"
    path.write_text(page.own_pictures(pictures, 0.99, "Such a warning is given"), encoding="utf-8")
    opened = Page(chromium, path)
    text = opened.run("return document.body.innerText")
    assert text.count(HOSTILE) == 3 and text.count("stranger than 99% of the test images") == 1
    assert opened.run("return [...document.images].every(i => i.complete && i.naturalWidth)")
    assert opened.run("return document.title") == "What the networks say of these pictures"
    opened.assert_quiet()
