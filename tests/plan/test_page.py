"""docs/scaling.md shows what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from runs import srppo_command

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"```bash\n(srppo run [^`]*)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_plans_on_the_page_are_the_commands_own(monkeypatch):
    """Each line of them; lines may be left out."""
    monkeypatch.chdir(ROOT)
    shown = SHOWN.findall((ROOT / "docs/scaling.md").read_text(encoding="utf-8"))
    assert len(shown) == 5
    for command, lines in shown:
        done = srppo_command(*shlex.split(command.replace("\\\n", ""))[1:])
        assert done.code == 0, done.err
        printed = {" ".join(line.split()) for line in done.out.splitlines()}
        for line in lines.splitlines():
            assert " ".join(line.split()) in printed, line
