"""What is measured where a processor lacks something."""

from __future__ import annotations

import sys

import pytest

import run


def test_a_processor_without_bfloat16_measures_the_other_rows_and_says_so(
    tmp_path, monkeypatch, capsys
):
    measured = []
    monkeypatch.setattr(run, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(run, "build", lambda case, directory: None)
    monkeypatch.setattr(run, "table", lambda *of: "")

    def measure(engine, *of, **and_of):
        measured.append(engine)
        return {"cpu_seconds": [1.0], "mean_length": 1.0, "peak_mb": 1.0}

    monkeypatch.setattr(run, "measure", measure)
    out = ["--rounds", "1", "--out", str(tmp_path / "lines.jsonl")]
    monkeypatch.setattr(sys, "argv", ["run.py", *out])
    run.main()
    assert measured == ["trl-ppo", "trl-rloo", "trl-grpo", "ours-ppo", "ours-all-action"]
    assert "ours-ppo-bf16 is left out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py", "--engines", "ours-ppo-bf16", *out])
    with pytest.raises(SystemExit, match="Nothing is left to measure"):
        run.main()
