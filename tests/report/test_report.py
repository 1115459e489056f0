"""What the page says, what it survives, and what it refuses."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from scipy.stats import binomtest

from srppo.errors import RunDirError
from srppo.report import build
from srppo.report.numbers import duration, fixed, plain, wilson
from srppo.report.samples import visible

VOID = {"meta", "link", "br", "img", "input", "hr"}
DOCS = Path(__file__).parents[2] / "docs"
FILES = ["run.json", "data.json", "audit.json", "results.json", "samples.jsonl"]
FILES += ["metrics/sft.jsonl", "metrics/ppo.jsonl"]
EMPTY = "No run.json and|No results.json|No metrics|No audit.json|No samples.jsonl"


class Page(HTMLParser):
    """Parses a page and insists that every element is closed by its own tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def edit(run_dir: Path, file: str, **changes: object) -> None:
    path = run_dir / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def keep(run_dir: Path, *names: str) -> None:
    """Only these files stay: quicker than to draw them all."""
    for name in set(FILES) - set(names):
        (run_dir / name).unlink(missing_ok=True)


def test_the_page_says_what_the_files_say(report):
    assert report.name == "report.html"
    page = Page(report)
    assert "Accuracy, sampled at T=1, base → sft → policy:" in page.text
    assert "4.9 → 28.7 → 87.5 %" in page.text
    assert "kl_coef 0.33 would follow the held-out optimum" in page.text
    for fact in ("c867b78f0c2f", "AMD EPYC 7B13", "2 min 29 s", "ppo.kl_coef", "5.23.0"):
        assert fact in page.text
    assert "12 of the 400 PPO prompts" in page.text
    assert "rollout 59 %, scoring 12 %, update 29 %" in page.text
    assert "In 86 % of random pairs, an sft sample has a higher reward" in page.text
    assert "β = 1/(λ* − 1) = 0.33" in page.text
    assert not re.search(EMPTY, page.text)


def test_the_documentation_has_the_pages_order(report):
    """docs/report.md goes through the page from the top; the headline has no heading."""
    sections = re.findall(r"<section id=.*?<h2>(.*?)</h2>", report.read_text(), re.DOTALL)
    documented = re.findall(r"^\*\*(.+?)\.\*\*", (DOCS / "report.md").read_text(), re.MULTILINE)
    assert ["Headline", *sections] == [
        "Audit of the reward" if name == "Audit" else name for name in documented
    ]


def test_every_figure_is_there(report):
    names = Page(report).values("data-name")
    expected = {"strip-0", "strip-1", "strip-2", "rewards", "lambda", "sft-loss", "eval-0"}
    expected |= {f"ppo-{key}" for key in ("reward", "objective", "kl_sft", "kl_base", "entropy")}
    expected |= {f"ppo-{key}" for key in ("response_length", "eos_rate", "grad_norm")}
    assert expected <= set(names)
    assert len(names) == len(set(names))


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = Page(report)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    links = page.values("href") + page.values("src")
    assert links
    assert all(link.startswith("#") for link in links)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert any("default-src 'none'" in value for value in page.values("content"))


def test_ids_are_unique_and_references_resolve(report):
    page = Page(report)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [link[1:] for link in page.values("href")]
    references += re.findall(r"url\(#([^)]+)\)", page.source)
    assert set(references) <= set(ids)


def test_model_output_is_text_wherever_it_appears(run_dir):
    hostile = '"><script>alert(3)</script></svg>$\\frac{1}{2}$'
    results = json.loads((run_dir / "results.json").read_text())
    for row in results["rows"]:
        row["group"] = hostile if row["group"] == "unseen" else row["group"]
        row["scores"][hostile] = 0.5
    edit(run_dir, "results.json", rows=results["rows"], primary=hostile)
    edit(run_dir, "audit.json", warnings=[hostile])
    edit(run_dir, "run.json", name=hostile, recipe={hostile: hostile}, command=hostile)
    line = {"step": 30, f"eval/{hostile}/{hostile}": 0.5}
    (run_dir / "metrics" / "ppo.jsonl").write_text(json.dumps(line) + "\n")
    with (run_dir / "samples.jsonl").open("a") as file:
        response = {"tokens": [{"text": hostile, "log_ratio": 1}]}
        file.write(json.dumps({"prompt": "x", "responses": {hostile: response}}) + "\n")
    page = Page(build(run_dir))
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.text.count("<script>alert(3)</script></svg>$\\frac{1}{2}$") >= 6
    assert "</style><img src=x onerror=alert(2)>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert not [value for value in page.values("style") if "alert" in value]


def test_tokens_are_shaded_by_sign_and_size(run_dir):
    tokens = {"big": 2.0, "small": 0.5, "none": 0.0, "bad": -2.0, "beyond": 40.0, "lost": None}
    sampled = [{"text": text, "log_ratio": ratio} for text, ratio in tokens.items()]
    often = [token for token in sampled if token["text"] != "beyond"] * 20  # sets the scale: 2 nats
    response = {"tokens": [*sampled, *often], "truncated": True}
    line = {"prompt": "x", "responses": {"sft": response}}
    keep(run_dir, "samples.jsonl")
    (run_dir / "samples.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(build(run_dir)).source
    found = re.findall(r'<span(?: class="(\w+)")? data-r="([^"]*)" tabindex="-1">(\w+)<', page)
    shades = {text: (shade, value) for shade, value, text in found}
    assert shades == {
        "big": ("p6", "+2.00"),
        "small": ("p2", "+0.50"),
        "none": ("", "0.00"),
        "bad": ("n6", "−2.00"),
        "beyond": ("p6", "+40.00"),
        "lost": ("", "–"),
    }
    assert "truncated, no EOS" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<eos>", "⟨eos⟩"),
        ("<|im_end|>", "⟨im_end⟩"),
        ("</s>", "⟨/s⟩"),
        ("\n\n", "↵\n↵\n"),
        ("", "∅"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("<script>", "<script>"),
        (" a<b", " a<b"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("missing", FILES)
def test_one_missing_file_costs_one_part(run_dir, missing):
    (run_dir / "metrics" / "ppo.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (run_dir / missing).unlink()
    page = Page(build(run_dir))
    assert "miniature" in page.text or missing == "run.json"
    alone = {"run.json": "No run.json", "audit.json": "No audit.json"}
    alone |= {"results.json": "No results.json", "samples.jsonl": "No samples.jsonl"}
    assert alone.get(missing, "") in page.text


@pytest.mark.parametrize("only", FILES)
def test_one_file_alone_makes_a_page(run_dir, only):
    keep(run_dir, only)
    page = Page(build(run_dir))
    assert len(re.findall(EMPTY, page.text)) == 4


def test_the_headline_falls_back_to_what_there_is(run_dir):
    keep(run_dir, "run.json", "results.json", "metrics/sft.jsonl", "metrics/ppo.jsonl")
    lines = [{"step": step, "reward": step / 10, "kl_sft": 0.5} for step in range(1, 31)]
    (run_dir / "metrics" / "ppo.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    results = json.loads((run_dir / "results.json").read_text())
    bare = [{**row, "scores": {}} for row in results["rows"]]
    edit(run_dir, "results.json", rows=bare)
    assert "Mean reward in nats per response, decoding T=1" in Page(build(run_dir)).text
    edit(run_dir, "results.json", rows=[])
    assert "base → sft → policy: 3.07 → 1.39 → 0.410" in Page(build(run_dir)).text
    (run_dir / "results.json").unlink()
    assert "went from 0.100 to 3 nats, at 0.500 nats of KL to sft." in Page(build(run_dir)).text
    (run_dir / "metrics" / "ppo.jsonl").unlink()
    assert "Over 14 SFT steps the loss went from" in Page(build(run_dir)).text
    (run_dir / "metrics" / "sft.jsonl").unlink()
    assert "This run has no result yet." in Page(build(run_dir)).text


JUNK = [None, True, 3, -1e308, "text", [], [None, 1, "x", []], {}, {"a": None}]


@pytest.mark.parametrize("name", FILES)
def test_values_of_the_wrong_type_are_left_out(run_dir, name):
    """Every value of the file, outer and one level in, becomes junk: the page is built all the
    same."""
    keep(run_dir, name)
    path = run_dir / name
    content = json.loads(path.read_text().splitlines()[0])
    for junk in JUNK:
        inner = {
            k: dict.fromkeys(v, junk) if isinstance(v, dict) else junk for k, v in content.items()
        }
        if isinstance(content.get("rows"), list):
            inner["rows"] = [dict.fromkeys(content["rows"][0], junk)]
        if name == "samples.jsonl":
            inner["responses"] = {"sft": dict.fromkeys(content["responses"]["sft"], junk)}
        for variant in (dict.fromkeys(content, junk), inner):
            path.write_text(json.dumps({**variant, "step": 1}) + "\n")
            Page(build(run_dir))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b'{"a": ', b"[1, 2]\n", b'{"a": "\xff"}\n'])
def test_a_corrupt_file_is_named_with_the_cure(run_dir, name, content):
    (run_dir / name).write_bytes(content + b"\n")
    with pytest.raises(
        RunDirError, match=r"the report cannot be built\. Restore the file"
    ) as caught:
        build(run_dir)
    assert str(run_dir / name) in str(caught.value)
    assert not (run_dir / "report.html").exists()


def test_a_line_cut_off_by_a_kill_is_left_out_and_said(run_dir):
    (run_dir / "metrics" / "ppo.jsonl").write_text('{"step": 30, "reward": 1.0}\n')
    with (run_dir / "metrics" / "ppo.jsonl").open("a") as file:
        file.write('{"step": 31, "rew')
    assert "The last line of ppo.jsonl is incomplete" in Page(build(run_dir)).text


def test_steps_repeated_by_a_resumed_run_are_drawn_once(run_dir):
    keep(run_dir, "metrics/ppo.jsonl")
    lines = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 5.0}, {"step": 2, "reward": 7.25}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "entropy": 0.5}])
    (run_dir / "metrics" / "ppo.jsonl").write_text(text)
    labels = Page(build(run_dir)).values("aria-label")
    assert "Reward, nats per response, over 2 steps: 1 → 7.25" in labels
    assert "Entropy, nats per token, over 1 steps: 0.500" in labels


def test_an_evaluated_reward_between_0_and_1_is_not_a_percentage(run_dir):
    keep(run_dir, "metrics/ppo.jsonl")
    line = {"step": 5, "eval/reward/all": 0.5, "eval/accuracy/all": 0.5}
    (run_dir / "metrics" / "ppo.jsonl").write_text(json.dumps(line) + "\n")
    labels = Page(build(run_dir)).values("aria-label")
    assert "reward by group over steps, at the end: all 0.500" in labels
    assert "accuracy by group over steps, at the end: all 50" in labels


@pytest.mark.parametrize(
    ("star", "recipe", "at_recipe", "says"),
    [
        (1, 6, 3.08, "nothing left to extrapolate"),
        (2, 6, 3.08, "farther than the log-ratio supports"),
        (4, 6, 0.36, "past the best λ, but the log-ratio still carries"),
        (4, 3, 0.32, "the recipe is supported"),
    ],
)
def test_the_lambda_curve_is_read_out(run_dir, star, recipe, at_recipe, says):
    keep(run_dir, "audit.json")
    curve = {"lams": [0, 1, 2, 6], "nll": [3.07, 0.76, 0.31, 51.5], "nll_sft": 0.76}
    curve |= {"lam_star": star, "lam_recipe": recipe, "nll_recipe": at_recipe}
    edit(run_dir, "audit.json", curve=curve)
    page = Page(build(run_dir))
    assert says in page.text
    assert "mathdefault" not in page.text


def test_a_score_that_is_no_share_has_no_interval(run_dir):
    keep(run_dir, "results.json")
    row = {"model": "sft", "decoding": "T=1", "group": "g", "n": 10, "scores": {"rating": 7.5}}
    edit(run_dir, "results.json", rows=[row], groups=["g"], primary="rating")
    page = Page(build(run_dir))
    assert "rating as scored, with no interval" in page.text
    assert 'class="pm"' not in page.source


@pytest.mark.parametrize(("successes", "n"), [(0, 480), (480, 480), (1, 3), (138, 480), (1, 1)])
def test_wilson_agrees_with_scipy(successes, n):
    oracle = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes / n, n) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_the_interval_covers_the_figure_at_0_and_1(report):
    page = Page(report).source
    assert '>0.0 <span class="pm">±0.8</span>' in page
    assert '>100.0 <span class="pm">±0.8</span>' in page


def test_numbers_are_written_for_people():
    assert [plain(x) for x in (None, 0.0, 4.0, 1234567, -0.12345, 12.345, 2e-7)] == [
        *("–", "0", "4", "1 234 567", "−0.123", "12.3", "2.00e−7"),
    ]
    assert [fixed(x, 1, sign=True) for x in (0.04, -0.04, 1.26, -2)] == [
        "0.0",
        "0.0",
        "+1.3",
        "−2.0",
    ]
    assert [duration(x) for x in (None, 12.34, 59.97, 245, 7800)] == [
        *("–", "12.3 s", "60.0 s", "4 min 5 s", "2 h 10 min"),
    ]


def test_same_files_same_bytes_whatever_the_users_matplotlib_style(run_dir):
    keep(run_dir, "results.json", "metrics/sft.jsonl", "audit.json", "samples.jsonl")
    first = build(run_dir).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9}):
        assert build(run_dir).read_bytes() == first
    assert b"<metadata" not in first


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="is not a directory"):
        build(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match="there is nothing to report"):
        build(tmp_path)


def test_a_page_that_cannot_be_written_is_an_error_of_ours(run_dir):
    keep(run_dir, "run.json")
    (run_dir / "report.html").mkdir()
    with pytest.raises(RunDirError, match="cannot be written"):
        build(run_dir)
    assert not list(run_dir.glob("*.partial"))


def test_what_changed_on_the_way_is_said_on_top_and_in_full(run_dir, report):
    assert "Changed on the way" not in Page(report).text
    changed = ["ppo.learning_rate was 0.001 and is now 1e-05", "data holds <b>something else</b>"]
    edit(run_dir, "run.json", changes=[{"at": "2026-01-12T10:00:00+00:00", "changed": changed}])
    keep(run_dir, "run.json")
    text = Page(build(run_dir)).text
    assert text.count("Changed on the way") == 2
    for words in ("2026-01-12T10:00:00+00:00", *changed):
        assert words in text
