"""The page as a browser shows it: nothing overflows, nothing is fetched, nothing complains.

Chromium is driven over its debugging pipe: nothing but the standard library.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from srppo.report import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
# Chromium reads commands from descriptor 3 and writes events to descriptor 4.
LAUNCH = """
import os, sys
commands, events = [os.dup2(int(fd), 20 + int(fd), inheritable=False) for fd in sys.argv[1:3]]
os.dup2(commands, 3)
os.dup2(events, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """`open` a page, `evaluate` in it; `errors` and `requests` are of the page that is open."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        commands_out, self._commands = os.pipe()
        self._events, events_in = os.pipe()
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(commands_out), str(events_in), *arguments],
            pass_fds=(commands_out, events_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(events_in)
        self._buffer, self._id, self._session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path, width: int, height: int, *, dark: bool = False) -> None:
        self.errors.clear()
        self.requests.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **metrics, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        os.close(self._commands)
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._events)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._events, 1 << 20)
            assert chunk, f"{CHROMIUM} ended early"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
        ):
            self.errors.append(json.dumps(params))
        return message


PHONE, DESKTOP = (390, 844), (1280, 900)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


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


LUMINANCE = """
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
    seen = browser.evaluate(LUMINANCE)
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
