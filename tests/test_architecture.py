"""What the documents say about the code is so: names, paths, keys, settings, layout.

The README's tree. README.md holds one fenced block with a line `src/srppo/`. In it, every line is

    [indent]path  [annotation]

- two spaces of indent for each level; a path that ends in `/` is a folder, and deeper lines below
  it are inside it; a path may itself hold slashes (`src/srppo/`, `.ci/run`);
- at least two spaces between path and annotation; a line without annotation is fine;
- lines in box-drawing characters are fine, too: `│   ├── ` counts as indent;
- a path may be a pattern (`docs/*.md`), but not below `src/srppo/`.

Every path exists, and every pattern matches something. Every Python module below `src/srppo/` is
listed by name; a folder's line stands for its `__init__.py`. Each Markdown file of docs/, recipe,
example and benchmark is listed, by name or by pattern, or its folder is listed without anything
below it.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

import srppo
from enumerable import EOS, LENGTH, PROMPTS, fine_tuned, tiny_llama
from srppo import config, errors
from srppo.baselines.pairs import train_pairs
from srppo.config import PPOConfig, load_recipe
from srppo.config_controls import PairsConfig
from srppo.data.chat import Example
from srppo.eval.evaluate import load_scorer
from srppo.models.roles import Role, Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "srppo"
README = ROOT / "README.md"
MATH = ROOT / "docs" / "math.md"
METRICS = ROOT / "docs" / "metrics.md"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def repository_files() -> list[Path]:
    """What is committed, and what would be: everything that git does not ignore."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in done.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


# --- the README's tree ---------------------------------------------------------------------------


def tree_paths(markdown: str) -> list[str]:
    """Paths of the tree, whole, in order; folders end in `/`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    (block,) = [b for b in blocks if re.search(r"^\W*src/srppo/( |$)", b, re.MULTILINE)]
    paths: list[str] = []
    above: list[tuple[int, str]] = []  # (indent, folder) of the folders that we are in
    for line in filter(str.strip, block.splitlines()):
        indent, path, _ = re.fullmatch(r"([\s│├└─]*)(\S+)(\s{2,}\S.*|\s*)", line).groups()
        above = [(i, folder) for i, folder in above if i < len(indent)]
        whole = (above[-1][1] if above else "") + path
        paths.append(whole)
        if path.endswith("/"):
            above.append((len(indent), whole))
    return paths


def test_the_tree_of_a_readme_is_read_as_described():
    plain = (
        "x\n```text\nMakefile       all\nsrc/srppo/\n  algo/        pure\n    a.py\n  b.py\n```\n"
    )
    boxes = (
        "```\n├── Makefile\n├── src/srppo/\n│   ├── algo/\n│   │   └── a.py  x\n│   └── b.py\n```"
    )
    expected = [
        "Makefile",
        "src/srppo/",
        "src/srppo/algo/",
        "src/srppo/algo/a.py",
        "src/srppo/b.py",
    ]
    assert tree_paths(plain) == tree_paths(boxes) == expected


def test_every_path_of_the_tree_exists():
    paths = tree_paths(read(README))
    assert len(paths) == len(set(paths))
    missing = [path for path in paths if not list(ROOT.glob(path))]
    not_folders = [p for p in paths if p.endswith("/") and not (ROOT / p).is_dir()]
    assert (missing, not_folders) == ([], [])


def test_every_module_is_in_the_tree():
    listed = set(tree_paths(read(README)))
    modules = [path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")]
    unlisted = [
        str(path)
        for path in modules
        if str(path) not in listed
        and not (path.name == "__init__.py" and f"{path.parent}/" in listed)
    ]
    assert unlisted == []


@pytest.mark.parametrize("pattern", ["docs/*.md", "recipes/*.yaml", "examples/*.py", "bench/*.py"])
def test_documents_recipes_examples_and_benchmarks_are_in_the_tree(pattern):
    listed = tree_paths(read(README))
    folder = f"{Path(pattern).parent}/"
    below = [path for path in listed if path.startswith(folder) and path != folder]
    if folder in listed and not below:
        return
    found = [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
    assert [path for path in found if not any(fnmatch(path, entry) for entry in below)] == []


# --- names ---------------------------------------------------------------------------------------


def test_exported_names():
    assert srppo.__all__ == ["__version__", "start"]
    for name in srppo.__all__:
        assert hasattr(srppo, name)
    assert f'version = "{srppo.__version__}"' in read(ROOT / "pyproject.toml")


def test_importing_the_package_and_asking_for_help_do_not_load_torch():
    code = (
        "import sys, srppo, srppo.cli\n"
        "sys.argv = ['srppo', '--help']\n"
        "try:\n    srppo.cli.main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_error_tree_is_drawn_as_it_is():
    drawn = dict(re.findall(r"[├└]── (\w+) .*\((\w+)\)$", errors.__doc__, re.MULTILINE))
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert kinds.keys() == {"SrppoError", *drawn}
    assert re.search(r"^ *SrppoError$", errors.__doc__, re.MULTILINE)
    for name, builtin in drawn.items():
        assert [base.__name__ for base in kinds[name].__bases__] == ["SrppoError", builtin]
        assert kinds[name].__doc__


# --- docs/math.md --------------------------------------------------------------------------------


def equations() -> list[tuple[str, str, str]]:
    """(function, file, test) of each row of the last table."""
    return re.findall(r"\| `(\w+)` \| `(src/\S+)` \| `(tests/\S+)` \|", read(MATH))


def test_the_table_of_equations_has_every_equation():
    rows = read(MATH).split("## Equations, functions")[1]
    numbered = re.findall(r"\\tag\{(\d+)\}", read(MATH))
    assert numbered == [str(n) for n in range(1, len(numbered) + 1)]
    first = [int(n) for n in re.findall(r"\((\d+)\)", rows)]
    ranges = re.findall(r"\((\d+)\) to \((\d+)\)", rows)
    covered = {*first, *(n for a, b in ranges for n in range(int(a), int(b)))}
    assert covered == set(map(int, numbered))
    lines = [line for line in rows.splitlines() if line.startswith("| ")][1:]
    assert len(equations()) == len(lines)


@pytest.mark.parametrize(("function", "file", "test"), equations())
def test_functions_files_and_tests_of_the_equations_exist(function, file, test):
    path = ROOT / file
    assert path.is_file()
    module = importlib.import_module(
        str(path.relative_to(ROOT / "src").with_suffix("")).replace("/", ".")
    )
    found = getattr(module, function)
    assert found.__module__ == module.__name__, "imported there, not defined there"
    assert (ROOT / test).is_file()


# --- settings ------------------------------------------------------------------------------------

SECTIONS = {
    name: field.annotation
    for name, field in config.Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section)
}
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += [f"docs/{name}.md" for name in ("math", "metrics", "data", "plugins", "baselines")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_named_in_the_documents_exist(document):
    named = re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)", read(ROOT / document))
    unknown = [
        f"{section}.{key}"
        for section, key in named
        if key not in SECTIONS[section].model_fields and key not in ("json", "jsonl", "py", "txt")
    ]
    assert unknown == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_the_documents_lead_somewhere(document):
    path = ROOT / document
    text = read(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", read(there), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]
            assert anchor in slugs, target


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_says_what_to_expect(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = "".join(line for line in read(path).splitlines() if line.startswith("#"))
    for word in ("Hardware:", "Time:", "Expected:"):
        assert word in head


def test_the_scorer_of_the_contributing_guide_works(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", read(ROOT / "CONTRIBUTING.md"), re.DOTALL)
    (tmp_path / "scores.py").write_text(code)
    score = load_scorer(f"python:{tmp_path / 'scores.py'}:score")
    rows = [{"answer": 4}, {"answer": "5"}, {"answer": "6"}]
    assert score(rows, [" 4", "4", "6"], [True, True, False]) == {"exact": [1.0, 0.0, 0.0]}


# --- docs/metrics.md -----------------------------------------------------------------------------


def documented(section: str) -> dict[str, re.Pattern]:
    """Names in the first column of the section's tables, as patterns: `<x>` is any text."""
    text = read(METRICS).split(f"\n## {section}\n")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(names) == len(set(names))
    return {n: re.compile(re.sub(r"<\w+>", "[^/]+", re.escape(n))) for n in names}


def require_same(section: str, written: set[str]) -> None:
    patterns = documented(section)
    undocumented = {key for key in written if not any(p.fullmatch(key) for p in patterns.values())}
    unwritten = {n for n, p in patterns.items() if not any(p.fullmatch(key) for key in written)}
    assert (undocumented, unwritten) == (set(), set())


def flat(value: object, key: str = "") -> set[str]:
    """`a.b[].c` for every leaf of a JSON value; a list of plain values is a leaf."""
    if isinstance(value, dict):
        return {k for name, inner in value.items() for k in flat(inner, f"{key}.{name}")}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k for item in value for k in flat(item, f"{key}[]")}
    return {key.removeprefix(".").removeprefix("[].")}


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in read(path).splitlines()]


KINDS = [
    PPOConfig(**settings, steps=1, rollouts_per_step=8, minibatch_size=4, max_kl=1e9)
    for settings in (
        {"estimator": "ppo", "value_warmup_steps": 1, "token_clip": 0.1, "kl_ref": "base"},
        {"estimator": "rloo", "responses_per_prompt": 4, "plausibility": 0.1},
    )
]
"""Settings with which everything optional is logged, by one or the other."""


class Elsewhere(HFSampler):
    """As another engine is: the trainer computes log-probabilities of its own."""

    def sample(self, *args, **kwargs):
        return replace(super().sample(*args, **kwargs), exact=False)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> list[list[dict]]:
    """What tiny runs of KINDS log."""
    base = tiny_llama(seed=0, width=8, layers=1)
    sft = fine_tuned(base, seed=0)
    found = []
    for settings in KINDS:
        roles = Roles.begin(base, sft, critic=settings.estimator == "ppo")
        run_dir = tmp_path_factory.mktemp(settings.estimator)
        with MetricsLog(run_dir, "ppo") as log:
            train_ppo(
                roles,
                Elsewhere(roles.policy, eos_token_id=EOS, max_new_tokens=LENGTH),
                PROMPTS,
                settings,
                seed=0,
                log=log,
                importance_cap=2.0,
                reporter=Reporter(quiet=True),
                evaluate=lambda: {"eval/accuracy/all": 0.0, "eval/reward/all": 0.0},
            )
        found.append(json_lines(run_dir / "metrics" / "ppo.jsonl"))
    return found


def test_the_metrics_of_stage_2_are_documented_and_the_documented_ones_logged(logs):
    require_same("metrics/ppo.jsonl", {key for lines in logs for line in lines for key in line})


def test_what_the_documents_say_of_the_first_step_is_so(logs):
    """The policy is still the SFT model, the critic still constant."""
    for settings, (first, *_) in zip(KINDS, logs, strict=True):
        assert first["kl_sft"] == pytest.approx(0, abs=1e-6)
        expected = first["reward"] - settings.kl_coef * first["kl_ref"]
        assert first["objective"] == pytest.approx(expected, abs=1e-5)
        if not settings.is_bounded:
            assert first["kl_base"] == pytest.approx(first["reward"], abs=1e-5)
        if settings.estimator == "ppo":
            assert first["value_explained_variance"] == pytest.approx(0, abs=1e-5)
            assert first["value_loss"] == pytest.approx(0.5, abs=0.2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The whole method on the miniature, as small as it goes."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    run = srppo.start(
        ROOT / "recipes" / "miniature.yaml",
        f"output_dir={path}",
        "controls=null",
        "data.demonstrations_limit=8",
        "data.held_out=4",
        "sft.epochs=1",
        "ppo.steps=1",
        "ppo.rollouts_per_step=4",
        "eval.limit=3",
        "eval.every=null",
        "eval.temperatures=[0.0]",
        "eval.side_by_side=2",
    )
    run.all()
    return path


def test_the_metrics_of_stage_1_are_documented_and_the_documented_ones_logged(run_dir):
    lines = json_lines(run_dir / "metrics" / "sft.jsonl")
    require_same("metrics/sft.jsonl", {key for line in lines for key in line})


def test_the_metrics_of_pairs_are_documented_and_the_documented_ones_logged(tmp_path):
    policy = Role(tiny_llama(seed=0, width=8, layers=1))
    sampler = HFSampler(policy, eos_token_id=EOS, max_new_tokens=LENGTH)
    examples = [Example(prompt, [5, EOS]) for prompt in PROMPTS]
    with MetricsLog(tmp_path, "pairs") as log:
        train_pairs(
            policy, sampler, examples, PairsConfig(), seed=0, log=log,
            reporter=Reporter(quiet=True),
        )  # fmt: skip
    lines = json_lines(tmp_path / "metrics" / "pairs.jsonl")
    written = {key for line in lines for key in line}
    require_same("metrics/controls/NAME.jsonl, of a control on pairs", written)


@pytest.mark.parametrize("file", ["audit.json", "results.json"])
def test_the_keys_of_the_json_files_are_documented_and_the_documented_ones_written(file, run_dir):
    require_same(file, flat(json.loads(read(run_dir / file))))


def test_the_keys_of_data_json_are_documented(run_dir):
    """All that are written; reasons for dropping rows are written only where rows are dropped."""
    patterns = documented("data.json").values()
    written = flat(json.loads(read(run_dir / "data.json")))
    assert [k for k in written if not any(p.fullmatch(k) for p in patterns)] == []
    assert len(written) > 50


def test_the_keys_of_the_samples_are_documented_and_the_documented_ones_written(run_dir):
    require_same("samples.jsonl", flat(json_lines(run_dir / "samples.jsonl")))


# --- layout --------------------------------------------------------------------------------------

FORBIDDEN = [f"{ROOT}/", "/tmp/", "/home/", "/root/", "../shared"]
"""Paths of one machine."""


def test_nothing_names_a_path_of_one_machine():
    found = []
    for path in repository_files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        try:
            text = read(path)
        except UnicodeDecodeError:
            continue  # weights
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_no_source_file_is_longer_than_a_person_can_hold_in_the_head():
    lengths = {
        str(path.relative_to(ROOT)): len(read(path).splitlines())
        for pattern in ("*.py", "*.j2", "*.css")
        for path in PACKAGE.rglob(pattern)
    }
    assert {path: n for path, n in lengths.items() if n > 400} == {}
