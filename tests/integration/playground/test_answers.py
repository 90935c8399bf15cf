"""The playground answers: completions, slots, two models, keyboard alone, errors, stopping."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.integration.playground.pages import (
    EXAMPLES,
    KEY,
    LONG,
    PROMPT,
    Site,
    open_page,
    read_speed,
)
from ul2r.inference import complete, infill

pytestmark = pytest.mark.integration


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
    for pane in range(2):
        read_speed(page, pane)
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

    assert page.input_value("#mode") == "NLU"
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    read_speed(page)
    expected = infill(site.model, PROMPT.split("<slot>"), mode="NLU", max_tokens=5)
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
    refused = "The server does not know this key."
    for key, text in (("wrong", refused), ("ключ", refused), (KEY, "2 models")):
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


def test_models_are_not_changed_under_their_answers(page: Page, site: Site) -> None:
    open_page(page, site.url, "The sea")
    page.fill("#max_tokens", str(LONG))
    page.keyboard.press("Control+Enter")
    for name in ("#model_a", "#model_b"):
        expect(page.locator(name)).to_be_disabled()
    page.keyboard.press("Escape")
    for name in ("#model_a", "#model_b"):
        expect(page.locator(name)).to_be_enabled()


def test_the_page_begins_with_an_example_of_the_model(page: Page, site: Site) -> None:
    open_page(page, site.url)
    expect(page.locator("#prompt")).to_have_value(EXAMPLES[0])
    assert len(page.locator("#example option").all()) == len(EXAMPLES)
    page.select_option("#example", index=1)
    expect(page.locator("#prompt")).to_have_value(EXAMPLES[1].replace("\r\n", "\n"))

    # The slot of a long one is in sight, at its end here.
    page.select_option("#example", index=2)
    page.wait_for_function("prompt.scrollTop + prompt.clientHeight > prompt.scrollHeight - 60")
    # What is changed is no example any more.
    page.get_by_role("button", name="Insert slot").click()
    expect(page.locator("#example")).to_have_value("")
    page.select_option("#example", index=0)

    # Examples that suit every model, for one that has none of its own; without slots, since it is causal.
    page.select_option("#model_a", "tiny-base")
    expect(page.locator("#prompt")).to_have_value("Once upon a time there was")
    expect(page.locator("#example")).to_have_value("Once upon a time there was")
    # What was written stays.
    page.fill("#prompt", "mine")
    page.select_option("#model_a", "tiny-ul2r")
    expect(page.locator("#prompt")).to_have_value("mine")
