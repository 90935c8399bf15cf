"""The playground in a real browser: Debian's chromium, driven by Playwright, against two models behind a router."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.api import create_api
from serving.asgi_call import call_asgi
from serving.gate import AccessConfig, Gate
from serving.router import create_router
from serving.service import InferenceService
from ul2r.inference import LanguageModel, complete, infill
from ul2r.testing.models import write_tiny_export

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt install chromium"),
]

KEY = "a-key-of-16-signs"
PROMPT = "The <slot> was calm, and <slot> was he."
LONG = 4000
"""Tokens of an answer that takes seconds, so that it can be stopped before its end."""
TIMEOUT_MS = 60_000
MIN_CONTRAST = 4.5
"""Of text, by WCAG 2.2, 1.4.3 (AA)."""

# Texts of a page that can be seen with their colors, those of placeholders among them. Controls that are switched off
# need no contrast by WCAG.
READ_COLORS = """() => {
  const parse = color => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const background = element => {
    for (let node = element; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] === 1) return color;
      if (color[3] !== 0) throw new Error(`a transparent background: ${node.outerHTML}`);
    }
    throw new Error("no background");
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.matches(":disabled, option")) continue;
    const text = [...element.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data).join("").trim();
    const shown = text || element.value;
    if (shown) found.push([shown, parse(getComputedStyle(element).color), background(element)]);
    if (element.placeholder)
      found.push([element.placeholder, parse(getComputedStyle(element, "::placeholder").color), background(element)]);
  }
  return found;
}"""


@dataclass(frozen=True)
class Site:
    """Served models.

    Attributes:
        url: Address of the page.
        locked_url: Another one, where `KEY` is asked for.
        single_url: That of the first model alone.
        model: The first of them once more.
        control: The second one.
        service: That of the first.
    """

    url: str
    locked_url: str
    single_url: str
    model: LanguageModel
    control: LanguageModel
    service: InferenceService


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("playground")
    folders = [
        write_tiny_export(root / "ul2r", max_positions=LONG + 100, seed=4),
        write_tiny_export(root / "control", attention="causal", seed=2),
    ]
    keys = root / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    services = [InferenceService(LanguageModel.load(folder), num_slots=2) for folder in folders]
    apis = {service.model_id: partial(call_asgi, create_api(service)) for service in services}
    with (
        _serve(create_router(apis)) as url,
        _serve(create_router(apis, Gate(AccessConfig(api_keys=keys)))) as locked_url,
        _serve(create_api(services[0])) as single_url,
    ):
        yield Site(url, locked_url, single_url, *map(LanguageModel.load, folders), services[0])
    for service in services:
        service.close()


@contextmanager
def _serve(api: FastAPI) -> Iterator[str]:
    """Serve an application in a thread, on a port that is free."""
    server = uvicorn.Server(uvicorn.Config(api, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """The page in a browser that has never seen it; nothing may be kept or come from elsewhere."""
    with browser.new_context() as context:
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        problems = list[str]()
        addresses = list[str]()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        yield page
        assert problems == []
        assert all(
            url.startswith((site.url, site.locked_url, site.single_url, "data:"))
            for url in addresses
        )
        kept = "[localStorage.length, sessionStorage.length, document.cookie]"
        assert page.evaluate(kept) == [0, 0, ""]
        assert page.evaluate("indexedDB.databases()") == []
        assert context.cookies() == []


def open_page(page: Page, url: str, prompt: str | None = None) -> None:
    page.goto(url)
    expect(page.locator("#model")).to_have_text("2 models")
    if prompt is not None:
        page.fill("#prompt", prompt)


def read_speed(page: Page, pane: int = 0) -> tuple[int, int, int, float]:
    """Return prompt tokens, completion tokens, milliseconds and tokens per second, as they are shown."""
    usage = page.locator(".usage").nth(pane)
    expect(usage).to_contain_text("tokens/s")
    found = re.fullmatch(
        r"(\d+) prompt tokens, (\d+) completion tokens · first text after (\d+) ms, ([\d.]+) tokens/s",
        usage.inner_text(),
    )
    assert found is not None
    return int(found[1]), int(found[2]), int(found[3]), float(found[4])


def test_a_completion_is_streamed_with_latency_and_speed(page: Page, site: Site) -> None:
    expected = complete(site.model, "The sea", max_tokens=300)
    open_page(page, site.url, "The sea")
    page.evaluate(
        """() => {
          window.lengths = new Set();
          const seen = () => window.lengths.add(document.querySelector(".output").textContent.length);
          new MutationObserver(seen).observe(document.querySelector("#answers"), {childList: true, subtree: true});
        }"""
    )
    page.fill("#max_tokens", "300")
    page.get_by_role("button", name="Complete").click()

    prompt_tokens, completion_tokens, _, speed = read_speed(page)
    assert (prompt_tokens, completion_tokens) == (
        expected.prompt_tokens,
        expected.completion_tokens,
    )
    assert speed > 0
    assert page.locator(".output").text_content() == "The sea" + expected.text
    assert page.locator(".output mark").all_text_contents() == [expected.text]
    # Text has come bit by bit.
    assert page.evaluate("window.lengths.size") > 10


def test_marked_slots_are_filled(page: Page, site: Site) -> None:
    """Slots are set by clicking into the text, and removed by clicking on them."""
    open_page(page, site.url, "The  was calm, and  was he.")
    page.get_by_role("button", name="Mark slots").click()
    for place in (4, 19 + len("<slot>")):
        click_at(page, place)
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    click_at(page, len("The <sl"))
    expect(page.locator("#prompt")).to_have_value(PROMPT.replace("<slot>", "", 1))
    click_at(page, 4)
    page.get_by_role("button", name="Mark slots").click()
    click_at(page, 0)
    expect(page.locator("#prompt")).to_have_value(PROMPT)

    page.fill("#max_tokens", "5")
    page.get_by_role("button", name="Infill").click()

    read_speed(page)
    expected = infill(site.model, PROMPT.split("<slot>"), max_tokens=5)
    assert page.locator(".output").text_content() == expected.text
    assert page.locator(".output mark").all_text_contents() == list(expected.fills)


def click_at(page: Page, place: int) -> None:
    """Click before a character of the prompt's first line."""
    left, width, top = page.evaluate(
        """() => {
          const style = getComputedStyle(document.querySelector("#prompt"));
          const context = document.createElement("canvas").getContext("2d");
          context.font = style.font;
          const left = parseFloat(style.paddingLeft) + parseFloat(style.borderLeftWidth);
          const top = parseFloat(style.paddingTop) + parseFloat(style.lineHeight) / 2;
          return [left, context.measureText("x").width, top];
        }"""
    )
    page.click("#prompt", position={"x": left + width * place, "y": top})


def test_two_models_answer_one_prompt_side_by_side(page: Page, site: Site) -> None:
    open_page(page, site.url, "The sea")
    page.select_option("#model_b", "tiny-base")
    page.fill("#max_tokens", "20")
    page.get_by_role("button", name="Complete").click()

    for pane, model in enumerate((site.model, site.control)):
        expected = complete(model, "The sea", max_tokens=20)
        assert read_speed(page, pane)[1] == expected.completion_tokens
        panel = page.locator(".answer").nth(pane)
        assert panel.locator("h2").inner_text() == model.metadata.run
        assert panel.locator(".output").text_content() == "The sea" + expected.text
    left, right = (page.locator(".answer").nth(i).bounding_box() for i in range(2))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_a_model_that_cannot_infill_says_so_next_to_the_one_that_can(
    page: Page, site: Site
) -> None:
    open_page(page, site.url, PROMPT)
    page.select_option("#model_b", "tiny-base")
    expect(page.locator("#causal_text")).to_contain_text(
        "tiny-base completes prompts without a mode"
    )
    page.select_option("#mode", "NLG")
    page.fill("#max_tokens", "5")
    page.get_by_role("button", name="Infill").click()

    read_speed(page)
    expected = infill(site.model, PROMPT.split("<slot>"), mode="NLG", max_tokens=5)
    assert page.locator(".output").first.text_content() == expected.text
    expect(page.locator(".output.error")).to_contain_text("'tiny-base' was trained causally")

    page.fill("#prompt", "The sea")
    page.get_by_role("button", name="Complete").click()
    read_speed(page, 1)
    with_mode = complete(site.model, "The sea", mode="NLG", max_tokens=5)
    without = complete(site.control, "The sea", max_tokens=5)
    assert page.locator(".output mark").all_text_contents() == [with_mode.text, without.text]

    page.select_option("#model_b", "")
    page.select_option("#model_a", "tiny-base")
    expect(page.get_by_role("button", name="Infill")).to_be_disabled()
    assert page.locator("#mode option").all_text_contents() == ["default"]


def test_the_keyboard_is_enough(page: Page, site: Site) -> None:
    open_page(page, site.url, "")
    page.focus("#prompt")
    for part in PROMPT.split("<slot>")[:-1]:
        page.keyboard.type(part)
        page.keyboard.press("Alt+s")
    page.keyboard.type(PROMPT.split("<slot>")[-1])
    expect(page.locator("#prompt")).to_have_value(PROMPT)

    reached = list[str]()
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.id || document.activeElement.value, "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(name)
        assert name is None or outline == "solid", f"{name}: the focus cannot be seen"
        if name == "max_tokens":
            page.keyboard.type("5")
        if name == "mode":
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowDown")
    controls = ["model_a", "model_b", "mode", "max_tokens", "temperature", "seed", "mark", "slot"]
    assert reached[: len(controls) + 2] == [*controls, "complete", "infill"]

    mode = page.input_value("#mode")
    assert mode in {"NLG", "NLU"}
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    read_speed(page)
    expected = infill(site.model, PROMPT.split("<slot>"), mode=mode, max_tokens=5)
    assert page.locator(".output").text_content() == expected.text


def test_each_mode_is_explained_in_a_sentence(page: Page, site: Site) -> None:
    open_page(page, site.url)
    modes = [option.get_attribute("value") for option in page.locator("#mode option").all()]
    assert modes == ["", "NLG", "NLU", "S2S"]

    sentences = set()
    for mode in modes:
        page.select_option("#mode", mode)
        sentence = page.locator("#mode_text").inner_text()
        assert sentence.endswith(".")
        assert sentence.count(".") == 1
        assert not mode or sentence.startswith(mode)
        sentences.add(sentence)
    assert len(sentences) == len(modes)
    assert page.locator("#mode").get_attribute("aria-describedby") == "mode_text"


@pytest.mark.parametrize(
    ("button", "prompt", "message"),
    [
        ("Complete", "a" * (LONG + 200), "too long"),
        ("Complete", PROMPT, "Complete does not fill slots"),
        ("Infill", "no gap", "the prompt has no slot"),
    ],
)
def test_an_error_is_shown_in_words(
    page: Page, site: Site, button: str, prompt: str, message: str
) -> None:
    open_page(page, site.url, prompt)
    page.get_by_role("button", name=button).click()

    error = page.locator(".output.error")
    expect(error).to_contain_text(message)
    assert "{" not in error.inner_text()
    # It can be tried again.
    expect(page.get_by_role("button", name=button)).to_be_enabled()


def test_a_server_that_has_gone_is_an_error_in_words(page: Page, site: Site) -> None:
    open_page(page, site.url, "The sea")
    page.context.set_offline(True)
    page.get_by_role("button", name="Complete").click()

    expect(page.locator(".output.error")).to_have_text("The server cannot be reached.")


def test_a_server_with_keys_asks_for_one(page: Page, site: Site) -> None:
    page.goto(site.locked_url)
    expect(page.locator("#model")).to_have_text("This server asks for a key.")
    for key, text in (("wrong", "The server does not know this key."), (KEY, "2 models")):
        page.fill("#key", key)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text(text)
    expect(page.locator("#key")).to_be_hidden()
    page.fill("#prompt", "The sea")
    page.keyboard.press("Control+Enter")
    read_speed(page)


@pytest.mark.parametrize("way", ["button", "key"])
def test_a_stream_is_stopped_in_the_middle(page: Page, site: Site, way: str) -> None:
    statistics = site.service.engine.engine.statistics
    before = statistics.cancelled
    page.goto(site.single_url)
    expect(page.locator("#model")).to_have_text("tiny-ul2r · step 3 · prefix attention")
    page.fill("#prompt", "The sea")
    page.fill("#max_tokens", str(LONG))
    page.keyboard.press("Control+Enter")
    expect(page.locator(".output mark")).not_to_be_empty()
    if way == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()

    expect(page.locator(".usage")).to_have_text("stopped")
    shown = page.locator(".output").text_content()
    assert shown is not None
    assert shown.startswith("The sea")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    # The engine hears of it in its own time, but long before the answer's end; meanwhile others are answered.
    page.fill("#max_tokens", "1")
    for _ in range(200):
        page.keyboard.press("Control+Enter")
        read_speed(page)
        if statistics.cancelled > before:
            break
    assert statistics.cancelled == before + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(page: Page, site: Site, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(site.locked_url)
    expect(page.locator("#key")).to_be_visible()
    pairs = page.evaluate(READ_COLORS)
    open_page(page, site.url, PROMPT)
    page.get_by_role("button", name="Mark slots").click()
    page.fill("#max_tokens", "5")
    page.get_by_role("button", name="Infill").click()
    read_speed(page)
    pairs += page.evaluate(READ_COLORS)
    page.get_by_role("button", name="Complete").click()
    expect(page.locator(".output.error")).to_be_visible()
    pairs += page.evaluate(READ_COLORS)

    assert len(pairs) > 60
    _, (*page_color, _) = pairs[0][1:]
    assert (luminance(page_color) < 0.1) == (scheme == "dark")
    for text, (*ink, _), (*paper, _) in pairs:
        dark, light = sorted((luminance(ink), luminance(paper)))
        contrast = (light + 0.05) / (dark + 0.05)
        assert contrast >= MIN_CONTRAST, f"{text!r}: {ink} on {paper}"


def luminance(color: list[float]) -> float:
    """Return the relative luminance of sRGB values up to 255, by WCAG 2.2."""
    channels = [value / 255 for value in color]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_narrow_window_needs_no_sideways_scrolling(page: Page, site: Site) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    open_page(page, site.url, "a" * 500 + "<slot>")
    page.fill("#max_tokens", "200")
    page.get_by_role("button", name="Infill").click()
    read_speed(page)
    page.select_option("#model_b", "tiny-base")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".output")).to_have_count(2)

    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in page.locator("button, input, select, textarea").all():
        box = control.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 390)


def test_the_page_may_load_and_send_nothing_elsewhere(page: Page, site: Site) -> None:
    open_page(page, site.url)

    blocked = page.evaluate(
        """url => new Promise(resolve => {
          document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
          fetch(url).then(() => resolve("sent"), () => {});
        })""",
        site.locked_url,
    )

    assert blocked.startswith(site.locked_url)
