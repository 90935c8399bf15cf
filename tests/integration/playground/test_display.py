"""The playground is readable in light and dark and on a phone, and loads nothing from elsewhere."""

from __future__ import annotations

from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from tests.integration.playground.pages import PROMPT, Site, open_page, read_speed

pytestmark = pytest.mark.integration

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
    directive = page.evaluate(
        """url => new Promise(resolve => {
          document.addEventListener("securitypolicyviolation", event => resolve(event.effectiveDirective));
          setTimeout(() => resolve("sent"), 10000);
          const form = document.createElement("form");
          form.action = url;
          document.body.append(form);
          form.submit();
        })""",
        site.locked_url,
    )
    assert directive == "form-action"
