"""Comparisons of result directories: against scipy and statsmodels, and what is refused."""

import json
import math
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from scored import KINDS, change, demo, random_scores, write
from srppo.errors import ConfigError, RunDirError
from srppo.eval.compare import compare

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("out"))


@pytest.fixture
def out(made, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(made, tmp_path / "out")


def named(out, *names):
    return {name: out / name for name in names or ("base", "sft", "srppo")}


def row(comparison, task, metric, model):
    (found,) = [
        r
        for r in comparison["rows"]
        if (r["task"], r["metric"], r["model"]) == (task, metric, model)
    ]
    return found


def scores(directory, task, metric):
    text = (directory / "samples" / f"{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["scores"][metric] for line in text.split("\n") if line]


def edit_samples(directory, task, function):
    """Writes what `function` makes of the lines, as objects."""
    path = directory / "samples" / f"{task}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    path.write_text("".join(json.dumps(line) + "\n" for line in function(lines)))


# --- results --------------------------------------------------------------------------------------


def test_scores_stand_as_they_were_measured_with_length_and_ends(made):
    comparison = compare(named(made))
    assert [m["name"] for m in comparison["models"]] == ["base", "sft", "srppo"]
    for name, directory in named(made).items():
        tasks = json.loads((directory / "results.json").read_text())["tasks"]
        for task, measured in tasks.items():
            for metric, values in measured["metrics"].items():
                found = row(comparison, task, metric, name)
                assert {key: found[key] for key in values} == values
                for key in ("mean_length", "eos_rate", "truncated_responses", "empty"):
                    assert found[key] == measured[key]
    json.dumps(comparison, allow_nan=False)


@pytest.mark.parametrize("task", ["gsm8k", "gpqa", "ifeval"])
def test_proportions_are_those_of_statsmodels_and_scipy(made, task):
    metric = next(iter(KINDS[task]))
    comparison = compare(named(made))
    first = scores(made / "base", task, metric)
    for name in ("sft", "srppo"):
        second = scores(made / name, task, metric)
        found = row(comparison, task, metric, name)
        pairs = list(zip(first, second, strict=True))
        table = [[pairs.count((a, b)) for b in (1, 0)] for a in (1, 0)]
        oracle = stats.ttest_rel(second, first)
        assert found["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
        assert (found["gained"], found["lost"]) == (pairs.count((0, 1)), pairs.count((1, 0)))
        assert found["difference"] == pytest.approx((sum(second) - sum(first)) / 200)
        interval = (found["difference_low"], found["difference_high"])
        assert interval == pytest.approx(tuple(oracle.confidence_interval()))
        assert found["noise"] == pytest.approx((interval[1] - interval[0]) / 2)
        assert found["test"] == "McNemar, exact"


def test_win_rates_are_compared_by_the_paired_t_test_or_unpaired_where_there_are_no_scores(made):
    comparison = compare(named(made))
    first, second = (scores(made / name, "alpaca_eval", "win_rate") for name in ("base", "sft"))
    found = row(comparison, "alpaca_eval", "win_rate", "sft")
    assert found["p"] == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert found["test"] == "paired t"
    controlled = row(comparison, "alpaca_eval", "length_controlled_win_rate", "sft")
    base = row(comparison, "alpaca_eval", "length_controlled_win_rate", "base")
    stderr = math.hypot(base["stderr"], controlled["stderr"])
    assert controlled["difference_stderr"] == pytest.approx(stderr)
    z = (controlled["value"] - base["value"]) / stderr
    assert controlled["p"] == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert controlled["test"] == "normal, unpaired"
    assert controlled["gained"] is controlled["lost"] is controlled["questions"] is None


def test_holm_is_over_the_headlines_of_each_pair(made):
    comparison = compare(named(made))
    for name in ("sft", "srppo"):
        rows = [r for r in comparison["rows"] if r["model"] == name]
        heads = [r for r in rows if r["headline"]]
        assert [r["metric"] for r in heads] == [next(iter(m)) for m in KINDS.values()]
        oracle = multipletests([r["p"] for r in heads], method="holm")[1]
        assert [r["p_holm"] for r in heads] == pytest.approx(list(oracle))
        assert all(r["p_holm"] is None for r in rows if not r["headline"])


def test_every_model_is_compared_with_the_first_or_with_the_one_named(made):
    for against, comparison in {
        "base": compare(named(made)),
        "sft": compare(named(made), against="sft"),
    }.items():
        assert {r["against"] for r in comparison["rows"]} == {against, None}
        assert {r["model"] for r in comparison["rows"] if r["against"] is None} == {against}
        assert [r["model"] for r in comparison["rows"][:3]] == ["base", "sft", "srppo"]


@FEW
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40))
def test_swapped_models_flip_signs_and_nothing_else(tmp_path, seed, n):
    rng = random.Random(seed)
    a, b = (
        write(tmp_path / name, random_scores(rng.random(), rng.uniform(0.1, 0.9), n))
        for name in "ab"
    )
    one, other = compare({"a": a, "b": b}), compare({"b": b, "a": a})
    for r in one["rows"]:
        if r["against"] is None:
            continue
        s = row(other, r["task"], r["metric"], "a")
        for key in ("p", "p_holm", "test", "questions"):
            assert r[key] == s[key]
        for key in ("difference_stderr", "noise"):
            assert r[key] == pytest.approx(s[key], abs=1e-12)
        assert (r["gained"], r["lost"]) == (s["lost"], s["gained"])
        for mine, theirs in (
            ("difference", "difference"),
            ("difference_low", "difference_high"),
            ("difference_high", "difference_low"),
        ):
            if r[mine] is None:
                assert s[theirs] is None
            else:
                assert r[mine] == pytest.approx(-s[theirs], abs=1e-12)


@FEW
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_identical_models_differ_by_nothing(tmp_path, seed, n):
    a = write(tmp_path / "a", random_scores(seed, 0.5, n))
    comparison = compare({"a": a, "again": a})
    rows = [r for r in comparison["rows"] if r["model"] == "again"]
    assert len(rows) == 7
    for r in rows:
        assert (r["difference"], r["p"]) == (0, 1)
        assert r["gained"] in (0, None)
        assert r["lost"] in (0, None)
        assert r["p_holm"] in (1, None)
        if r["kind"] == "proportion":
            assert r["noise"] == pytest.approx(min(1, 3 / n))  # the rule of three


# --- notes ----------------------------------------------------------------------------------------


def test_what_is_noise_is_said(out):
    comparison = compare(named(out, "base", "sft"), tasks=["gsm8k"])
    noise = 100 * row(comparison, "gsm8k", "flexible", "sft")["noise"]
    assert comparison["notes"] == [
        "gsm8k, 200 questions: a difference from base below so many points cannot be told from "
        f"chance: {noise:.1f} (sft)."
    ]
    again = compare({"sft": out / "sft", "copy": out / "sft"}, tasks=["gsm8k"])
    assert again["notes"][0].endswith("1.5 (copy). That is so for copy.")


def test_settings_seeds_data_and_notes_that_differ_are_said(out):
    change(out / "base", "gsm8k", notes=["Both."])
    change(out / "sft", seed=1)
    settings = {"max_gen_toks": 1280, "num_fewshot": 0, "wins": 12}
    change(out / "sft", "gsm8k", settings=settings, notes=["Odd.", "Both."])
    change(out / "sft", "gsm8k", data_sha256="f" * 64)
    notes = compare(named(out, "base", "sft"), tasks=["gsm8k"])["notes"]
    assert "gsm8k: max_gen_toks is 1280 (sft), 512 (base)." in notes
    assert "gsm8k: seed is 1 (sft), 0 (base)." in notes
    assert any("data_sha256 is ffffffffffff... (sft)" in note for note in notes)
    assert "gsm8k, sft: Odd." in notes
    assert [note for note in notes if "Both." in note] == ["gsm8k: Both."]
    assert not any("num_fewshot" in note or "wins" in note for note in notes)


def test_tasks_that_failed_or_are_missing_are_left_out_and_said(out):
    tree = json.loads((out / "sft" / "results.json").read_text())
    del tree["tasks"]["gpqa"], tree["tasks"]["ifeval"]
    change(out / "sft", tasks=tree["tasks"], failed={"gpqa": "access to it is gated"})
    comparison = compare(named(out))
    assert {r["task"] for r in comparison["rows"]} == {"gsm8k", "alpaca_eval"}
    assert "gpqa failed for sft (access to it is gated): not compared." in comparison["notes"]
    assert "ifeval is missing for sft: not compared." in comparison["notes"]
    with pytest.raises(ConfigError, match=r"ifeval is missing for sft.*holds gsm8k, alpaca_eval"):
        compare(named(out), tasks=["gsm8k", "ifeval"])


def test_questions_without_a_score_are_left_out_of_both_and_said(out):
    def unjudged(lines):
        lines[3]["scores"]["win_rate"] = None
        return lines

    kept = [x for i, x in enumerate(scores(out / "sft", "alpaca_eval", "win_rate")) if i != 3]
    edit_samples(out / "sft", "alpaca_eval", unjudged)
    metrics = json.loads((out / "sft/results.json").read_text())["tasks"]["alpaca_eval"]["metrics"]
    metrics["win_rate"] |= {"value": sum(kept) / 199, "n": 199}
    change(out / "sft", "alpaca_eval", metrics=metrics)
    comparison = compare(named(out, "base", "sft"))
    assert row(comparison, "alpaca_eval", "win_rate", "sft")["questions"] == 199
    assert any("the 199 questions that both have, of 199 and 200" in n for n in comparison["notes"])


# --- refusals -------------------------------------------------------------------------------------

UNLIKE = {
    "version": ({"version": 5}, "version is 5 and 4; evaluate both with the same lm-eval"),
    "template": ({"template": "plain"}, "template is plain and chat; use the same --chat-template"),
    "its text": ({"template_sha256": "0" * 64}, "template_sha256 is 000000000000... and "),
    "unknown": ({"template": None}, "template is unknown and chat"),
    "judge": ({"headline": "strict"}, "headline is strict and flexible; score both with the same"),
    "prompts": ({"prompts_sha256": "0" * 64}, "prompts_sha256 differs though no prompt does"),
}


@pytest.mark.parametrize(("values", "message"), UNLIKE.values(), ids=UNLIKE)
def test_models_that_were_not_asked_the_same_are_refused(out, values, message):
    change(out / "sft", "gsm8k", **values)
    with pytest.raises(ConfigError) as error:
        compare(named(out))
    assert f"gsm8k, sft and base: {message}" in str(error.value)
    for cure in ("--tasks", "--force", "in the same way"):
        assert cure in str(error.value)
    assert "srppo and base" not in str(error.value)
    assert {r["task"] for r in compare(named(out), tasks=["gpqa"])["rows"]} == {"gpqa"}


JUDGED = {
    "judge": ({"judge": "mine"}, {}, "judge is mine and gpt; have both judged by the same"),
    "baseline": ({"baseline": "b"}, {}, "baseline is b and gpt4; score both against the same"),
    "outputs": (
        {},
        {"data_sha256": "f" * 64},
        "sha256 of the baseline's outputs is ffffffffffff... and ",
    ),
    "form": ({"form": "letter"}, {}, "form is letter and weighted; have both judged in the same"),
    "its template": ({"template_sha256": "0" * 64}, {}, "form's template is 000000000000... and "),
}


@pytest.fixture
def judged(out):
    """All models' pairs by the same judge; its settings."""
    how = {"judge": "gpt", "baseline": "gpt4", "form": "weighted", "template_sha256": "1" * 64}
    for directory in named(out).values():
        change(directory, "alpaca_eval", settings=how)
    return how


@pytest.mark.parametrize(("settings", "values", "message"), JUDGED.values(), ids=JUDGED)
def test_win_rates_that_were_judged_in_another_way_are_refused(
    out, judged, settings, values, message
):
    assert compare(named(out))
    change(out / "sft", "alpaca_eval", settings={**judged, **settings}, **values)
    with pytest.raises(ConfigError) as error:
        compare(named(out))
    assert f"alpaca_eval, sft and base: {message}" in str(error.value)
    assert "--force" in str(error.value)
    assert "srppo and base" not in str(error.value)
    notes = compare(named(out), force=True)["notes"]
    assert any(message in note and note.endswith("Compared all the same.") for note in notes)


def test_annotations_that_do_not_say_how_the_judge_was_asked_are_compared(out, judged):
    change(out / "sft", "alpaca_eval", settings={"judge": "gpt", "baseline": "gpt4"})
    change(out / "srppo", "alpaca_eval", data_sha256=None)
    notes = compare(named(out))["notes"]
    assert "alpaca_eval: form is unknown (sft), weighted (base)." in notes


@pytest.mark.parametrize("given", ["auto", "run", "own.jinja", "hub"])
def test_the_template_to_ask_both_through_is_named(out, tmp_path, given):
    """The first model's, in its or its run's directory, in the file that was given, or where no
    file is."""
    change(out / "sft", "gsm8k", template="plain", template_sha256=None)
    own, path = tmp_path / "own.jinja", tmp_path / "model"
    (path / "policy").mkdir(parents=True)
    (path / ("policy" if given == "run" else ".") / "chat_template.jinja").write_text(
        "{{ messages }}"
    )
    own.write_text("{{ messages }}")
    results = json.loads((out / "base/results.json").read_text())
    results["model"]["path"] = "owner/name" if given == "hub" else str(path)
    results["config"] = {"chat_template": str(own) if given == "own.jinja" else "auto"}
    (out / "base/results.json").write_text(json.dumps(results))
    file = {
        "auto": f"{path}/chat_template.jinja, which is base's",
        "run": f"{path}/policy/chat_template.jinja, which is base's",
        "own.jinja": f"{own}, which is base's",
        "hub": "a file with base's, of the tokenizer of owner/name",
    }[given]
    cure = f"plain and chat; use the same --chat-template for both, {file}; and another --out."
    with pytest.raises(ConfigError) as error:
        compare(named(out))
    assert cure in str(error.value)


def test_all_reasons_are_given_at_once(out):
    change(out / "sft", "gsm8k", version=5, template="plain")
    change(out / "srppo", "ifeval", version=3)
    with pytest.raises(ConfigError) as error:
        compare(named(out))
    assert str(error.value).count("\n  ") == 3


def test_other_prompts_are_refused_with_their_number_and_the_first(out):
    def reworded(lines):
        for i in (7, 9):
            lines[i]["prompt_sha256"] = "0" * 64
        return lines

    edit_samples(out / "sft", "gsm8k", reworded)
    with pytest.raises(ConfigError, match="2 prompts differ, the first at doc_id 7; use the same"):
        compare(named(out))


def test_other_questions_are_refused(out):
    def shifted(lines):
        return [{**line, "doc_id": line["doc_id"] + 5} for line in lines]

    edit_samples(out / "sft", "gsm8k", shifted)
    with pytest.raises(ConfigError, match="10 questions are in one of them only"):
        compare(named(out))


@pytest.mark.parametrize("same_data", [True, False])
def test_another_number_of_questions_is_refused_or_forced_on_the_common_ones(out, same_data):
    some = {"gsm8k": {m: v[:80] for m, v in random_scores(9, 0.5, 200)["gsm8k"].items()}}
    write(out / "few", some, **({} if same_data else {"data_sha256": None}))
    with pytest.raises(ConfigError, match=r"n is 80 and 200; use the same --limit, or"):
        compare(named(out, "base", "few"))
    comparison = compare(named(out, "base", "few"), force=True)
    found = row(comparison, "gsm8k", "flexible", "few")
    first, second = (scores(out / name, "gsm8k", "flexible")[:80] for name in ("base", "few"))
    assert found["questions"] == 80
    assert found["difference"] == pytest.approx((sum(second) - sum(first)) / 80)
    assert any(note.endswith("--resume. Compared all the same.") for note in comparison["notes"])
    back = compare(named(out, "few", "base"), force=True)
    assert any("the 80 questions that both have, of 200 and 80" in note for note in back["notes"])


def test_forced_models_without_a_common_question_are_refused_still(out):
    def reworded(lines):
        return [{**line, "prompt_sha256": f"{line['doc_id']:064x}"} for line in lines]

    edit_samples(out / "sft", "gsm8k", reworded)
    change(out / "sft", "gsm8k", data_sha256="0" * 64)
    with pytest.raises(ConfigError, match="no question in common"):
        compare(named(out), force=True)


def test_other_templates_are_forced_question_by_question(out):
    """A base model with its plain prompt: another prompt text, the same question."""

    def plain(lines):
        return [{**line, "prompt_sha256": f"{line['doc_id']:064x}"} for line in lines]

    expected = row(compare(named(out)), "gsm8k", "flexible", "sft")
    edit_samples(out / "base", "gsm8k", plain)
    change(out / "base", "gsm8k", template="plain", template_sha256=None, prompts_sha256="0" * 64)
    comparison = compare(named(out), force=True)
    assert row(comparison, "gsm8k", "flexible", "sft") == expected
    assert any("template is chat and plain" in note for note in comparison["notes"])


def test_a_question_with_more_instructions_than_in_the_other_model_is_refused(out):
    def longer(lines):
        lines[0]["scores"]["inst_strict"] *= 2  # twice the same: the mean changes little
        return lines

    edit_samples(out / "sft", "ifeval", longer)
    metrics = json.loads((out / "sft/results.json").read_text())["tasks"]["ifeval"]["metrics"]
    flat = [x for v in scores(out / "sft", "ifeval", "inst_strict") for x in v]
    metrics["inst_strict"]["value"] = sum(flat) / len(flat)
    change(out / "sft", "ifeval", metrics=metrics)
    with pytest.raises(ConfigError, match=r"inst_strict: a question has more scores.*same version"):
        compare(named(out))


def test_metrics_that_not_all_have_are_left_out_and_said(out):
    metrics = json.loads((out / "sft/results.json").read_text())["tasks"]["gsm8k"]["metrics"]
    change(out / "sft", "gsm8k", metrics={"flexible": metrics["flexible"]})
    comparison = compare(named(out), tasks=["gsm8k"])
    assert {r["metric"] for r in comparison["rows"]} == {"flexible"}
    assert "gsm8k: strict is not there for all models." in comparison["notes"]


def test_one_model_and_unknown_names_are_refused(made):
    with pytest.raises(ConfigError, match=r"nothing to compare base with.*base=DIR sft=DIR"):
        compare(named(made, "base"))
    with pytest.raises(ConfigError, match=r"--against policy is none of the models \(base, sft"):
        compare(named(made), against="policy")
    with pytest.raises(ConfigError, match="mmlu is missing for base"):
        compare(named(made), tasks=["mmlu"])


def test_no_common_task_is_refused(out):
    write(out / "only", {"gpqa": {"accuracy": [0, 1]}})
    tree = json.loads((out / "sft/results.json").read_text())
    del tree["tasks"]["gpqa"]
    change(out / "sft", tasks=tree["tasks"])
    with pytest.raises(ConfigError, match="no task in common"):
        compare(named(out, "sft", "only"))


# --- files ----------------------------------------------------------------------------------------


def broken(out, message):
    with pytest.raises(RunDirError, match=message) as error:
        compare(named(out))
    text = str(error.value)
    assert str(out / "sft") in text
    assert any(cure in text for cure in ("srppo eval", "Update srppo", "give one of them"))
    return text


def test_missing_directories_and_files_are_named(out):
    (out / "sft/samples/gpqa.jsonl").unlink()
    broken(out, r"samples/gpqa.jsonl cannot be read")
    (out / "sft/results.json").unlink()
    broken(out, "results.json is missing: there are no scores")
    shutil.rmtree(out / "sft")
    broken(out, "results.json cannot be read")


def test_the_directory_above_says_what_it_holds(out):
    with pytest.raises(RunDirError, match=r"holds base, sft, srppo: give one of them"):
        compare({"base": out / "base", "all": out})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "has schema None, not 1"),
        ("[" * 10**5, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ('{"tasks": {}}', "has schema None, not 1"),
        ('{"rows": [], "groups": []}', "It is of `srppo run`"),
        ('{"schema": 0}', "has schema 0, not 1"),
        ('{"schema": 2}', r"has schema 2, not 1.*Update srppo"),
        ('{"schema": 1}', "model: field required"),
    ],
)
def test_results_of_another_kind_are_named(out, text, message):
    (out / "sft/results.json").write_text(text)
    broken(out, message)


def test_results_that_are_no_text_are_named(out):
    (out / "sft/results.json").write_bytes(b"\xff\xfe\x00")
    broken(out, "results.json cannot be read")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": -1}, "tasks.gsm8k.n=-1"),
        ({"n": "many"}, "tasks.gsm8k.n='many'"),
        ({"metrics": {}}, "headline of gsm8k"),
        ({"eos_rate": 98.0}, "tasks.gsm8k.eos_rate=98.0"),
        ({"mean_length": math.nan}, "tasks.gsm8k.mean_length=nan"),
        ({"n": 199}, "holds 200 questions, 200 different ones, results.json speaks of 199"),
    ],
)
def test_values_that_cannot_be_are_named(out, values, message):
    change(out / "sft", "gsm8k", **values)
    broken(out, message)


def test_per_cent_are_no_fractions(out):
    metrics = json.loads((out / "sft/results.json").read_text())["tasks"]["gsm8k"]["metrics"]
    metrics["strict"]["value"] = 45.3
    change(out / "sft", "gsm8k", metrics=metrics)
    broken(out, r"tasks.gsm8k.metrics.strict.value=45.3")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda lines: lines[:-1], "holds 199 questions, 199 different ones"),
        (lambda lines: [*lines[:-1], lines[0]], "holds 200 questions, 199 different ones"),
        (lambda lines: [], "holds 0 questions"),
        (
            lambda lines: [{**x, "scores": {**x["scores"], "strict": 1}} for x in lines],
            "mean of stric",
        ),
        (lambda lines: [{**x, "scores": {}} for x in lines], "the mean of flexible is nan"),
        (lambda lines: [{**x, "scores": {"flexible": 0.5}} for x in lines], "flexible=0.5 is not"),
        (
            lambda lines: [{**x, "scores": {"flexible": [1]}} for x in lines],
            "not what a proportion",
        ),
        (lambda lines: [{**x, "scores": None} for x in lines], "line 1: scores=None"),
        (lambda lines: [{"doc_id": 1}], "line 1: prompt_sha256: field required"),
        (lambda lines: [[]], r"line 1: all of it=\[\]"),
    ],
)
def test_samples_that_cannot_be_are_named(out, function, message):
    edit_samples(out / "sft", "gsm8k", function)
    assert "gsm8k.jsonl" in broken(out, message)


def test_a_line_that_was_cut_off_is_named(out):
    path = out / "sft/samples/gsm8k.jsonl"
    path.write_text(path.read_text()[:-20])
    broken(out, r"gsm8k.jsonl, line 200 is not valid JSON")
