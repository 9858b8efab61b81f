"""The page, in a real browser: everything that a user can do with it."""

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, Keys

from allaprima.runtime import Pipeline, read_parameters
from allaprima.serve.errors import BusyError
from allaprima.serve.jobs import Order
from allaprima.serve.settings import ServerSettings
from allaprima.serve.studio import Studio

from .browser import Page, launched, until
from .conftest import LIMITS, Running, Serve, running
from .fakes import FakeStudio

NASTY = '<img src=x onerror="document.title=1"> & <b>bold</b>'


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One for all tests, since it takes a second to start."""
    with launched(tmp_path_factory.mktemp("browser")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """With one model, as most servers."""
    with running(FakeStudio(("shapes",), LIMITS), ServerSettings(limits=LIMITS)) as server:
        yield server


@pytest.fixture
def page(browser: Chrome, server: Running) -> Iterator[Page]:
    """The page of the shared server, ready; at the end nothing was complained of in the console."""
    page = Page(browser, server.url)
    page.open()
    page.wait_ready()
    yield page
    assert page.complaints() == []


def opens(folder: Path, limit: int | None) -> Pipeline:
    return Pipeline.open(folder, backend="ort", threads=1, memory_limit=limit)


def last_order(server: Running) -> Order:
    return server.studio.asked[-1]


def paint_steps(page: Page, server: Running, first: int, last: int) -> None:
    """One after the other, so that the page hears of each: it listens after it has asked for the picture."""
    for step in range(first, last + 1):
        server.studio.hold(after=step)
        until(lambda step=step: page.text("progress-text") == f"Step {step} of 20")


def picture_file(folder: Path, size: tuple[int, int] = (192, 128)) -> Path:
    path = folder / "a picture.png"
    Image.new("RGB", size, "orange").save(path)
    return path


def test_a_prompt_becomes_a_picture(page: Page, server: Running) -> None:
    server.studio.hold()
    page.paint("a red circle")
    shown = "return document.getElementById('preview').toDataURL()"
    paint_steps(page, server, 1, 5)
    until(lambda: page.shown("preview"))
    assert page.browser.title.startswith("25 %")
    first = page.run(shown)
    paint_steps(page, server, 6, 7)
    until(lambda: page.run(shown) != first)
    server.studio.go()
    page.painted()
    assert not page.shown("preview")
    assert not page.shown("progress-box")
    assert page.find("picture").get_attribute("alt") == "a red circle"
    assert page.run("return arguments[0].naturalWidth", page.find("picture")) == 128
    assert page.browser.title == "Allaprima"
    order = last_order(server)
    assert order.request.prompt == "a red circle"
    assert (order.request.num_inference_steps, order.request.guidance_scale) == (20, 2.0)
    assert order.preview_every == 1
    facts = page.text("parameters")
    for fact in ("a red circle", "shapes", "128 × 128", "20", "DDIM"):
        assert fact in facts
    assert len(page.all(".thumb")) == 1
    assert "done" in page.text("live") or "done" in page.run(
        "return document.getElementById('live').textContent"
    )


def test_the_settings_are_the_models_own(page: Page) -> None:
    assert (page.value("steps"), page.value("guidance")) == ("20", "2")
    assert (page.value("width"), page.value("height"), page.value("size")) == ("128", "128", "128x128")
    assert not page.shown("model-field")
    sizes = page.run("return [...document.getElementById('size').options].map(each => each.value)")
    assert sizes[-1] == "custom"
    for size in sizes[:-1]:
        assert all(int(side) % 32 == 0 for side in size.split("x"))


def test_every_setting_arrives(page: Page, server: Running) -> None:
    page.write("negative", "blue")
    page.write("steps", "5")
    page.write("guidance", "3.5")
    page.write("seed", "42")
    page.write("count", "2")
    page.choose("sampler", "euler_a")
    page.choose("size", "custom")
    page.write("width", "160")
    page.write("height", "100")
    assert page.value("height") == "96"
    assert "100 became 96" in page.text("size-note")
    page.paint("a circle")
    page.painted()
    asked = last_order(server).request
    assert (asked.negative_prompt, asked.num_inference_steps, asked.guidance_scale) == ("blue", 5, 3.5)
    assert (asked.seed, asked.num_images, asked.sampler) == (42, 2, "euler_a")
    assert (asked.width, asked.height) == (160, 96)
    assert len(page.all(".thumb")) == 2
    page.click("swap")
    assert (page.value("width"), page.value("height")) == ("96", "160")
    page.click("reset")
    assert (page.value("steps"), page.value("negative"), page.value("size")) == ("20", "", "128x128")


def test_a_painting_is_cancelled(page: Page, server: Running) -> None:
    server.studio.hold()
    page.paint("a red circle")
    until(lambda: page.shown("cancel") and server.studio.load().running)
    page.click("cancel")
    until(lambda: page.shown("failure"))
    assert page.text("failure") == "Cancelled"
    assert not server.studio.jobs()
    page.click("remove")
    assert page.all(".thumb") == []
    assert page.shown("empty")


def test_a_seed_is_used_again(page: Page, server: Running) -> None:
    page.paint("a red circle")
    page.painted()
    seed = int(
        page.run(
            "return [...document.querySelectorAll('dt')].find(e => e.textContent == 'Seed')"
            ".nextSibling.textContent"
        )
    )
    page.click("reuse-seed")
    assert page.value("seed") == str(seed)
    page.paint("a red circle")
    until(lambda: len(server.studio.asked) == 2)
    assert last_order(server).request.seed == seed
    page.click("seed-random")
    assert page.value("seed") == ""
    until(lambda: page.find("seed-last").is_enabled())
    page.click("seed-last")
    assert page.value("seed") == str(seed)


def test_settings_are_used_again(page: Page) -> None:
    page.write("negative", "blue")
    page.write("steps", "7")
    page.choose("sampler", "heun")
    page.paint("the first")
    page.painted()
    page.click("reset")
    page.paint("the second")
    until(lambda: len(page.all(".thumb")) == 2)
    page.all(".thumb")[1].click()
    page.painted()
    page.click("use")
    assert [page.value(id) for id in ("prompt", "negative", "steps", "sampler")] == [
        "the first",
        "blue",
        "7",
        "heun",
    ]
    assert page.value("seed") != ""
    assert page.focused == "prompt"


def test_a_picture_is_dropped(page: Page, server: Running) -> None:
    data = io.BytesIO()
    Image.new("RGB", (192, 128), "orange").save(data, "PNG")
    drop = """
        const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        for (const kind of ["dragover", "drop"]) {
          document.body.dispatchEvent(
            new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
        }
    """
    page.run(drop, base64.b64encode(data.getvalue()).decode())
    until(lambda: page.shown("strength"))
    assert "dropped.png, 192 × 128" in page.text("start-name")
    assert not page.shown("curtain")
    assert page.value("size") == "160x96" or (page.value("width"), page.value("height")) == ("160", "96")
    page.write("strength", "0.5")
    page.paint("a red circle")
    page.painted()
    asked = last_order(server).request
    assert asked.strength == 0.5
    assert asked.image.size == (192, 128)
    page.click("start-remove")
    assert not page.shown("strength")
    page.paint("a red circle")
    until(lambda: len(server.studio.asked) == 2)
    assert last_order(server).request.image is None


def test_a_picture_is_chosen_and_made_smaller(page: Page, server: Running, tmp_path: Path) -> None:
    page.find("start-file").send_keys(str(picture_file(tmp_path, (3000, 1500))))
    until(lambda: page.shown("strength"))
    assert "2048 × 1024" in page.text("start-name")
    page.paint("a red circle")
    until(lambda: server.studio.asked or page.shown("notice"))
    assert page.text("notice-text") == "" or "pixels" in page.text("notice-text")


def test_what_is_no_picture_is_said_to_be_none(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "words.png"
    path.write_text("words", encoding="utf-8")
    page.find("start-file").send_keys(str(path))
    until(lambda: page.shown("notice"))
    assert "“words.png” is not a picture" in page.text("notice-text")
    page.click("notice-close")
    assert not page.shown("notice")


def test_a_picture_of_the_gallery_is_painted_over(page: Page, server: Running) -> None:
    page.paint("a red circle")
    page.painted()
    page.click("paint-over")
    until(lambda: page.shown("strength"))
    page.paint("a blue circle")
    until(lambda: len(server.studio.asked) == 2)
    assert last_order(server).request.image.size == (128, 128)


def test_a_picture_is_downloaded_with_its_parameters(page: Page, tmp_path: Path) -> None:
    page.browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.write("seed", "42")
    page.paint("a red circle")
    page.painted()
    page.click("download")
    until(lambda: (tmp_path / "allaprima-42.png").exists())
    assert read_parameters(tmp_path / "allaprima-42.png")["prompt"] == "a red circle"


def test_the_keyboard_is_enough(page: Page, server: Running) -> None:
    keys = ActionChains(page.browser)
    page.run("document.body.focus()")
    keys.send_keys(Keys.TAB).perform()
    assert page.run("return document.activeElement.className") == "skip"
    keys.send_keys(Keys.ENTER, Keys.TAB).perform()
    page.run("document.getElementById('prompt').focus()")
    assert page.run("return document.activeElement.matches(':focus-visible')")
    ring = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(ring) == "solid"
    keys.send_keys("a red circle").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.painted()
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    until(lambda: len(page.all(".thumb")) == 2)
    page.painted()
    page.run("document.querySelector('.thumb').focus()")
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    current = [each.get_attribute("aria-current") for each in page.all(".thumb")]
    assert current == ["false", "true"]
    page.run("document.getElementById('queue-open').focus()")
    keys.send_keys(Keys.ENTER).perform()
    until(lambda: page.shown("queue"))
    keys.send_keys(Keys.ESCAPE).perform()
    until(lambda: not page.shown("queue"))
    assert page.focused == "queue-open"


def test_everything_has_a_name(page: Page) -> None:
    page.paint("a red circle")
    page.painted()
    nameless = page.run("""
        return [...document.querySelectorAll("input, select, textarea, button, progress, a, img")]
          .filter((each) => !each.closest("[aria-hidden=true], [hidden]") && each.checkVisibility())
          .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim() || each.alt))
          .filter((each) => !(each.tagName === "IMG" && each.closest("button[aria-label]")))
          .map((each) => each.outerHTML)
    """)
    assert nameless == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_their_ground(browser: Chrome, server: Running, dark: bool) -> None:
    page = Page(browser, server.url)
    page.open(dark=dark)
    page.wait_ready()
    page.click("paint")  # without a prompt, so that there is a notice
    contrasts = page.run("""
        const channel = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const light = (text) => {
          const [r, g, b] = text.match(/[\\d.]+/g).map((each) => channel(each / 255));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = (element) => {
          for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
          }
        };
        return [...document.querySelectorAll("h1, h2, p, label, legend, button, summary, select, textarea")]
          .filter((each) => each.checkVisibility() && !each.disabled && !each.classList.contains("unseen"))
          .map((each) => {
            const [a, b] = [light(getComputedStyle(each).color), light(ground(each))];
            return [each.outerHTML.slice(0, 60), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
          });
    """)
    assert len(contrasts) > 15
    assert [each for each in contrasts if each[1] < 4.5] == []
    body = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (body == "rgb(22, 21, 20)") is dark


def sideways(page: Page) -> int:
    """How many pixels the page can be scrolled sideways."""
    return int(page.run("return document.documentElement.scrollWidth - innerWidth"))


def test_a_phone_shows_it_without_scrolling_sideways(browser: Chrome, server: Running) -> None:
    page = Page(browser, server.url)
    page.open(width=360, height=740)
    page.wait_ready()
    assert page.run("return innerWidth") == 360
    assert not page.find("settings").get_property("open")
    assert sideways(page) == 0
    page.run("document.getElementById('settings').open = true")
    page.choose("size", "custom")
    assert sideways(page) == 0
    server.studio.hold()
    page.paint("w" * 300)
    until(lambda: page.shown("progress-box"))
    assert sideways(page) == 0
    page.click("queue-open")
    until(lambda: page.all("#queue-list li"))
    assert sideways(page) == 0
    page.click("queue-close")
    server.studio.go()
    page.painted()
    assert sideways(page) == 0
    too_wide = page.run("""
        return [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility())
          .filter((each) => each.getBoundingClientRect().right > 360.5)
          .filter((each) => !each.closest(".unseen, .easel, .skip"))
          .map((each) => each.outerHTML.slice(0, 80))
    """)
    assert too_wide == []


def test_what_is_said_is_shown_as_it_is(page: Page) -> None:
    page.paint(NASTY)
    page.painted()
    assert NASTY in page.text("parameters")
    assert page.browser.title == "Allaprima"
    assert page.all("#parameters img, #parameters b") == []
    page.click("queue-open")
    page.click("queue-close")


def test_the_queue_shows_what_waits(page: Page, server: Running) -> None:
    server.studio.hold()
    page.paint("the first")
    until(lambda: server.studio.load().running)
    page.paint("the second")
    until(lambda: page.text("progress-text") == "Next in the queue")
    page.paint("the third")
    until(lambda: page.text("progress-text").startswith("Waiting, 2"))
    page.click("queue-open")
    until(lambda: len(page.all("#queue-list li")) == 3)
    rows = [row.text for row in page.all("#queue-list li")]
    assert [row.splitlines()[0] for row in rows] == ["the first", "the second", "the third"]
    assert "Next in the queue · shapes" in rows[1]
    ActionChains(page.browser).click_and_hold(page.all("#queue-list button")[0]).perform()
    server.studio.hold(after=3)
    until(lambda: "Step 3 of 20" in page.text("queue-list"))  # it is drawn anew under the finger
    ActionChains(page.browser).release().perform()
    until(lambda: len(page.all("#queue-list li")) == 2)
    assert page.focused == "queue-close"
    assert page.text("queue-count") == "2"
    page.click("queue-close")
    server.studio.go()
    page.painted()
    until(lambda: not page.shown("queue-count"))


def test_refusals_are_told(page: Page, server: Running) -> None:
    page.click("paint")
    assert page.text("notice-text") == "Write a prompt first."
    assert page.focused == "prompt"
    page.write("seed", "seven")
    page.paint("a red circle")
    assert "The seed should be a whole number" in page.text("notice-text")
    assert page.focused == "seed"
    page.write("seed", "")
    page.write("steps", "0")
    page.click("paint")
    assert page.text("notice-text") == "Steps should be between 1 and 150."
    page.write("steps", "5")
    server.studio.busy = BusyError("the queue is full: try later", 7)
    page.click("paint")
    until(lambda: page.text("notice-text") == "the queue is full: try later")
    server.studio.busy = None
    page.click("paint")
    page.painted()
    assert not page.shown("notice")


def test_a_failure_is_told(page: Page, server: Running) -> None:
    server.studio.fails = RuntimeError("/secret/path")
    page.paint("a red circle")
    until(lambda: page.shown("failure"))
    assert "the server could not paint this" in page.text("failure")
    assert "secret" not in page.browser.page_source


def test_a_reload_keeps_the_session(page: Page) -> None:
    page.write("steps", "9")
    page.paint("a red circle")
    page.painted()
    page.open(fresh=False)
    page.wait_ready()
    page.painted()
    assert [each.get_attribute("aria-label") for each in page.all(".thumb")] == ["a red circle: Done"]
    assert (page.value("prompt"), page.value("steps")) == ("a red circle", "9")


def test_a_painting_goes_on_over_a_reload(page: Page, server: Running) -> None:
    server.studio.hold()
    page.paint("a red circle")
    until(lambda: page.shown("progress-box"))
    page.open(fresh=False)
    page.wait_ready()
    until(lambda: page.shown("progress-box"))
    server.studio.go()
    page.painted()


def test_a_lost_connection_is_taken_up_again(page: Page, server: Running) -> None:
    page.run("""
        const fetched = fetch;
        window.broken = true;
        window.fetch = (path, ...rest) => window.broken && path.endsWith("/events")
          ? Promise.reject(new TypeError("broken")) : fetched(path, ...rest);
    """)
    page.paint("a red circle")
    until(lambda: "Trying again" in page.text("progress-text"))
    page.run("window.broken = false")
    page.painted()


def test_many_paintings_at_once(page: Page, server: Running) -> None:
    """More than a browser has connections for: all are followed, and the last can be cancelled."""
    server.studio.hold()
    for number in range(8):
        page.paint(f"circle {number}")
        until(lambda number=number: len(page.all(".thumb")) == number + 1)
    until(lambda: page.shown("cancel"))
    page.click("cancel")
    until(lambda: server.studio.jobs()[-1].cancelled)
    server.studio.go()
    until(lambda: not server.studio.jobs())
    done = (
        "return [...document.querySelectorAll('.thumb img')].filter(each => each.naturalWidth == 128).length"
    )
    until(lambda: page.run(done) == 7)


def test_several_models_can_be_chosen(browser: Chrome, serve: Serve) -> None:
    server = serve(FakeStudio(("shapes", "other"), LIMITS))
    page = Page(browser, server.url)
    page.open()
    page.wait_ready()
    assert page.shown("model-field")
    page.choose("model", "other")
    page.paint("a red circle")
    page.painted()
    assert last_order(server).model == "other"
    assert "other" in page.text("parameters")


def test_what_the_server_allows(browser: Chrome, serve: Serve) -> None:
    page = Page(browser, serve(limits=replace(LIMITS, steps=12, images=2)).url)
    page.open()
    page.wait_ready()
    page.write("steps", "13")
    page.paint("a red circle")
    assert page.text("notice-text") == "Steps should be between 1 and 12."
    page.write("steps", "12")
    page.write("count", "3")
    page.click("paint")
    assert page.text("notice-text") == "Pictures should be between 1 and 2."


def test_a_key_is_asked_for(browser: Chrome, serve: Serve) -> None:
    server = serve(api_keys=("anna",))
    page = Page(browser, server.url)
    page.open()
    until(lambda: page.shown("key-dialog"))
    page.find("key").send_keys("wrong" + Keys.ENTER)
    until(lambda: page.text("key-text") == "That key is not known here.")
    page.find("key").send_keys(Keys.ESCAPE)
    until(lambda: page.shown("notice"))
    assert page.text("notice-text") == "This server wants an API key."
    page.click("paint")
    until(lambda: page.shown("key-dialog"))
    page.find("key").send_keys("anna" + Keys.ENTER)
    page.wait_ready()
    server.studio.hold()
    page.paint("a red circle")
    paint_steps(page, server, 1, 3)
    until(lambda: page.shown("preview"))
    server.studio.go()
    page.painted()
    assert page.run("return Object.values(localStorage)") == []
    assert page.run("return sessionStorage.getItem('allaprima.key')") == "anna"
    assert "anna" not in page.browser.current_url


def test_a_real_picture(browser: Chrome) -> None:
    """The whole way, with the small model."""
    with running(Studio(["shapes"], opens, lanes=2), ServerSettings()) as server:
        page = Page(browser, server.url)
        page.open()
        page.wait_ready()
        page.write("seed", "7")
        page.paint("a red circle above a blue square on a white background")
        until(lambda: page.shown("preview"), 60)
        page.painted()
        pixel = page.run("""
            const picture = document.getElementById("picture");
            const canvas = Object.assign(document.createElement("canvas"), { width: 128, height: 128 });
            canvas.getContext("2d").drawImage(picture, 0, 0);
            return [...canvas.getContext("2d").getImageData(2, 2, 1, 1).data];
        """)
        assert min(pixel) > 200
        assert page.complaints() == []
