"""The Python API: a recipe, stage by stage.

    python examples/api.py [KEY=VALUE]...       for instance ppo.steps=2 output_dir=runs/api

Each stage leaves its output in the run directory; one that is done already is not done again.
"""

import sys
from pathlib import Path

import srppo

RECIPE = Path(__file__).parents[1] / "recipes" / "miniature.yaml"


def main(*overrides: str) -> Path:
    run = srppo.start(RECIPE, "controls=null", *overrides)  # reads the data, trains nothing yet
    sft = run.sft()  # stage 1 -> sft/
    findings = run.audit()  # is the reward worth climbing? -> audit.json
    policy = run.ppo()  # stage 2 -> policy/
    results = run.evaluate()  # base, sft and policy on held-out prompts -> results.json
    page = run.report()  # -> report.html

    print(f"SFT model      {sft}\naligned model  {policy}\nreport         {page}")
    for warning in findings["warnings"] if findings else []:
        print(f"warning        {warning}")
    for row in results["rows"]:
        scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
        print(f"{row['model']:8}{row['decoding']:8}{row['group']:14}{scores}")
    return page


if __name__ == "__main__":
    main(*sys.argv[1:])
