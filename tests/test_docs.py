"""The site builds without a warning, and every command and script on its pages runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warm import warm_srppo

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    "compare.md": "tests/report/test_comparison.py",
    "evaluation.md": "tests/eval/test_documents.py",
    "alpaca.md": "tests/eval/test_documents.py",
    "plugins.md": "tests/plugins/test_trl.py",
}
"""Pages whose commands another test runs."""
SHORT = "data.max_prompt_tokens=24 data.max_response_tokens=12"
"""The miniature has 64 positions."""
SMALL = (
    f"controls=null data.demonstrations_limit=24 data.held_out=4 data.prompts_limit=16 {SHORT} "
    "ppo.steps=2 ppo.rollouts_per_step=8 ppo.minibatch_size=8 eval.limit=12 eval.every=null "
    "audit.prompts=4"
)
NAMES = {"MODEL": "srppo:miniature", "SOURCE": "mine.jsonl", "RECIPE": "recipes/miniature.yaml"}
"""What a reader fills in."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def as_run(line: str) -> str:
    """A line of a page with a reader's names, and small."""
    line = re.sub(r"\b(MODEL|SOURCE|RECIPE)\b", lambda match: NAMES[match[0]], line)
    if "--dry-run" in line:
        return f"{line} {SHORT}" if NAMES["MODEL"] in line else line
    if re.match(r"srppo (run|sft|audit|ppo) ", line):
        shown = "baselines" in line or "controls." in line  # what the line is about
        return f"{line.split('#')[0]} {SMALL.removeprefix('controls=null ') if shown else SMALL}"
    return line


def runnable(text: str) -> str:
    """Without what the test run stands on already."""
    lines = text.splitlines()
    return "\n".join(as_run(x) for x in lines if not x.startswith(("make install", "source ")))


def test_every_page_with_code_is_run():
    with_code = {p.name for p in PAGES if any(kind in ("bash", "python") for kind, _ in blocks(p))}
    assert {"index.md", "own-data.md", "api.md"} <= with_code
    for page, test in ELSEWHERE.items():
        assert page in with_code
        assert page in (ROOT / test).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with warm_srppo(folder):
            yield folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ELSEWHERE], ids=lambda p: p.stem
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, binaries):
    code = [(kind, text) for kind, text in blocks(page) if kind in ("bash", "python")]
    if not code:
        pytest.skip("no code on this page")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (own,) = re.findall(
        r"<<'ROWS'\n(.*?)^ROWS", (ROOT / "docs/own-data.md").read_text(), re.M | re.S
    )
    (tmp_path / "mine.jsonl").write_text(own)
    for kind, text in code:
        command = (
            ["bash", "-eu", "-c", runnable(text)]
            if kind == "bash"
            else [sys.executable, "-c", text]
        )
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
            input="copy : d e f\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"


def test_the_site_builds_without_a_warning(tmp_path):
    if not shutil.which("mkdocs", path=str(Path(sys.executable).parent)):
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "<math" in (tmp_path / "math" / "index.html").read_text(encoding="utf-8")
    asked = re.findall(
        r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (tmp_path / "index.html").read_text()
    )
    assert asked == []
