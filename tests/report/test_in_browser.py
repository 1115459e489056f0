"""The pages as a browser shows them: nothing overflows, nothing is fetched, nothing complains."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from scored import demo
from srppo.eval.compare import compare
from srppo.report import build
from srppo.report.comparison import render

PHONE, DESKTOP = (390, 844), (1280, 900)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison of three models."""
    out = demo(tmp_path_factory.mktemp("out"))
    page = out / "compare.html"
    models = {name: out / name for name in ("base", "sft", "srppo")}
    page.write_text(render(compare(models), "html"), encoding="utf-8")
    return page


@pytest.mark.parametrize("size", [(320, 640), PHONE, (820, 1180), DESKTOP])
@pytest.mark.parametrize("dark", [False, True])
def test_a_comparison_fits_its_window_and_asks_for_nothing(browser, comparison, size, dark):
    browser.open(comparison, *size, dark=dark)
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth <= innerWidth && innerWidth == {size[0]}")
    assert browser.errors == []
    assert browser.requests == [comparison.resolve().as_uri()]
    seen = browser.evaluate(CONTRASTS)
    assert seen["dark"] is dark
    assert seen["axes"] > 4.5
    assert seen["lines"] > 3


@pytest.mark.parametrize("size", [(320, 640), PHONE, (820, 1180), DESKTOP])
@pytest.mark.parametrize("dark", [False, True])
def test_no_sideways_scroll_no_request_no_complaint(browser, report, size, dark):
    browser.open(report, *size, dark=dark)
    browser.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth <= innerWidth && innerWidth == {size[0]}")
    assert browser.evaluate(f"{root}.scrollHeight") > 2000
    assert browser.errors == []
    assert browser.requests == [report.resolve().as_uri()]


def test_words_without_a_break_do_not_widen_the_page(browser, run_dir):
    word = "x" * 400
    response = {"tokens": [{"text": word, "log_ratio": 1.0}], "scores": {word: 1.0}}
    line = {"prompt": word, "group": word, "responses": {"sft": response, word: response}}
    (run_dir / "samples.jsonl").write_text(json.dumps(line) + "\n")
    for name, changes in {
        "run.json": {
            "name": word,
            "command": word,
            "recipe": {word: word},
            "versions": {word: word},
        },
        "audit.json": {"warnings": [word], "top_tokens": [{"token": word}]},
        "data.json": {"prompts": {"source": word, "dropped": {word: 1}}},
    }.items():
        path = run_dir / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    results = json.loads((run_dir / "results.json").read_text().replace("unseen", word))
    (run_dir / "results.json").write_text(json.dumps(results))
    line = {"step": 30, f"eval/{word}/{word}": 0.5}
    (run_dir / "metrics" / "ppo.jsonl").write_text(json.dumps(line) + "\n")
    browser.open(build(run_dir), *PHONE)
    browser.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE[0]


def test_the_wide_table_scrolls_in_its_own_box(browser, report):
    browser.open(report, *PHONE)
    box = "document.querySelector('[aria-label=Results]')"
    assert browser.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    assert browser.evaluate(f"getComputedStyle({box}).overflowX") == "auto"


CONTRASTS = """
(() => {
  const parse = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const paper = parse(getComputedStyle(document.body).backgroundColor);
  const over = ([r, g, b, a = 1]) => [r, g, b].map((c, i) => a * c + (1 - a) * paper[i]);
  const seen = (element, name) => light(over(parse(getComputedStyle(element)[name])));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const filled = (element) => seen(element, "backgroundColor");
  return {
    dark: light(paper) < 0.05,
    text: Math.min(...all(".tokens span").filter((e) => e.className)
      .map((e) => contrast(seen(e, "color"), filled(e)))),
    axes: Math.min(...all("svg text").map((e) => contrast(seen(e, "fill"), light(paper)))),
    lines: Math.min(...all("svg path").filter((e) => e.style.stroke.startsWith("var"))
      .map((e) => contrast(seen(e, "stroke"), light(paper)))),
  };
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_axes_lines_and_tokens_can_be_read_in_both_modes(browser, report, dark):
    """Contrast by WCAG 2: 4.5 for text, 3 for lines."""
    browser.open(report, *DESKTOP, dark=dark)
    seen = browser.evaluate(CONTRASTS)
    assert seen["dark"] is dark
    assert seen["text"] > 4.5
    assert seen["axes"] > 4.5
    assert seen["lines"] > 3


def test_a_tap_on_a_token_shows_its_value_without_widening_the_page(browser, report):
    browser.open(report, *PHONE)
    browser.evaluate("window.token = [...document.querySelectorAll('.tokens span')].at(-1)")
    assert browser.evaluate("getComputedStyle(token, '::after').content") == "none"
    browser.evaluate("token.focus()")
    shown = browser.evaluate("getComputedStyle(token, '::after').content")
    assert "log-ratio" in shown
    assert browser.evaluate("token.dataset.r") in shown
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE[0]
