"""Our engine beside its peers: one workload, one process for each measurement, interleaved rounds.

    python bench/run.py --help

One thread each, and one measurement at a time. bench/README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from case import SIZES, Case
from srppo.models.precision import multiplies_bfloat16
from table import summary, table

HERE = Path(__file__).parent
PEER = HERE.parent / ".bench" / "bin" / "python"
ENGINES = {
    "trl-ppo": [str(PEER), "trl_ppo.py"],
    "trl-ppo-micro8": [str(PEER), "trl_ppo.py", "8"],
    "trl-rloo": [sys.executable, "trl_groups.py", "rloo"],
    "trl-grpo": [sys.executable, "trl_groups.py", "grpo"],
    "ours-ppo": [sys.executable, "ours.py", "ppo"],
    "ours-ppo-bf16": [sys.executable, "ours.py", "ppo-bf16"],
    "ours-all-action": [sys.executable, "ours.py", "all-action"],
    "ours-rloo": [sys.executable, "ours.py", "rloo"],
}
"""Interpreter, script and what follows DIR, STEPS and SEED; a new row is a line here."""
DEFAULT = ["trl-ppo", "trl-rloo", "trl-grpo", "ours-ppo", "ours-ppo-bf16", "ours-all-action"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["9m"], choices=SIZES)
    parser.add_argument("--engines", nargs="+", default=DEFAULT, choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of which the first does not count")
    parser.add_argument("--ends", nargs="+", default=["early"], choices=["early", "full"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/measurements.jsonl"))
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step does not count. Try --steps 2.")
    engines = [e for e in args.engines if multiplies_bfloat16() or not e.endswith("-bf16")]
    for engine in set(args.engines) - set(engines):
        print(f"{engine} is left out: this processor multiplies no bfloat16.", file=sys.stderr)
    if not engines:
        sys.exit("Nothing is left to measure.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    with args.out.open("w") as out, tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            for ends in args.ends:
                directory = Path(scratch) / size / ends
                build(replace(SIZES[size], early=ends == "early"), directory)
                for round_ in range(args.rounds):
                    for engine in engines:
                        line = {"size": size, "ends": ends, "engine": engine, "round": round_}
                        line |= measure(engine, directory, args.steps, seed=round_)
                        lines.append(line)
                        out.write(json.dumps(line) + "\n")
                        out.flush()
                print(table(summary(lines, size, ends), size, ends), flush=True)
    print(f"\nEvery measurement: {args.out}")


def build(case: Case, directory: Path) -> None:
    """The case's models and prompts."""
    directory.mkdir(parents=True, exist_ok=True)
    start([sys.executable, "workload.py", str(directory), json.dumps(asdict(case))])


def measure(engine: str, directory: Path, steps: int, seed: int) -> dict[str, object]:
    """One process from start to end; its last line says what it measured."""
    interpreter, script, *rest = ENGINES[engine]
    began = time.monotonic()
    said = start([interpreter, script, str(directory), str(steps), str(seed), *rest])
    line = json.loads(said.splitlines()[-1])
    cpu = ", ".join(f"{s:.2f}" for s in line["cpu_seconds"])
    took = time.monotonic() - began
    print(f"{engine}: {cpu} CPU s a step, {line['peak_mb']:.0f} MB ({took:.0f} s)", file=sys.stderr)
    return line


def start(command: list[str]) -> str:
    """What a script of this folder prints; its whole complaint if it fails."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    interpreter, script, *rest = command
    if not Path(interpreter).exists():
        sys.exit(f"{interpreter} is missing, and with it {script}'s engine: make .bench/installed")
    done = subprocess.run(
        [interpreter, str(HERE / script), *rest],
        env=os.environ | one_thread | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
