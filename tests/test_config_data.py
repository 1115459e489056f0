"""Settings of the data: short and long forms of sources, and what cannot be combined."""

from __future__ import annotations

import pytest

from srppo.config import load_recipe, parse_recipe
from srppo.config_data import SourceConfig
from srppo.errors import ConfigError

BASE = {"name": "n", "output_dir": "o", "model": {"base": "b"}}
LONG = {"source": "b", "weight": 2.0, "limit": 3, "columns": {"prompt": "Q"}, "split": "test"}


def data(**settings):
    return parse_recipe({**BASE, "data": settings}).data


@pytest.mark.parametrize(
    ("written", "sources", "dumped"),
    [
        ("a", [{"source": "a"}], "a"),
        (["a"], [{"source": "a"}], "a"),
        ({"source": "a"}, [{"source": "a"}], "a"),
        (["a", "b"], [{"source": "a"}, {"source": "b"}], ["a", "b"]),
        ([{"source": "a", "weight": 1}, LONG], [{"source": "a", "weight": 1.0}, LONG], None),
    ],
)
def test_a_source_is_a_string_a_group_of_settings_or_a_list(written, sources, dumped):
    read = data(demonstrations=written)
    assert read.demonstrations == [SourceConfig(**source) for source in sources]
    plain = read.model_dump()["demonstrations"]
    assert plain == (dumped or sources)
    assert data(demonstrations=plain) == read


def test_a_mixture_on_the_command_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: n\noutput_dir: o\nmodel: {base: b}\ndata: {demonstrations: d}\n")
    override = "data.demonstrations=[{source: a, weight: 3}, {source: alpaca=b.csv, weight: 1}]"
    read = load_recipe(path, [override]).data.demonstrations
    assert [(s.source, s.weight) for s in read] == [("a", 3.0), ("alpaca=b.csv", 1.0)]
    (one,) = load_recipe(path, ["data.demonstrations=alpaca=b.csv"]).data.demonstrations
    assert one.source == "alpaca=b.csv"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"demonstrations": []}, "an empty list of sources holds no rows. Name one"),
        ({"demonstrations": ["a", {"source": "b", "weight": 1}]}, "a has no weight and others"),
        ({"demonstrations": {"source": "a", "weight": 0}}, "demonstrations.0.weight=0: input"),
        ({"demonstrations": {"source": "a", "wieght": 1}}, "Did you mean 'weight'?"),
        ({"demonstrations": {"weight": 1}}, "demonstrations.0.source: missing"),
        ({"demonstrations": 5}, "data.demonstrations.0=5"),
        ({"demonstrations": {"source": "a", "stream": True}}, "Set limit to the rows"),
        ({"demonstrations": "a", "columns": {"question_text": "q"}}, "KNOWN is one of messages"),
        ({"demonstrations": "a", "overlap": "other"}, "Set data.prompts, or data.overlap=disj"),
        ({"demonstrations": "a", "overlap": "disjoint"}, "Set data.demonstrations_limit."),
        ({"demonstrations": "a", "overlap": "same", "prompts": "b"}, "Set data.prompts=null"),
        ({"overlap": "same"}, "Set data.demonstrations, or data.prompts."),
        ({"demonstrations": "a", "overlap": "half"}, "data.overlap='half'"),
        ({"demonstrations": "a", "assistant_turns": "first"}, "data.assistant_turns='first'"),
    ],
)
def test_what_is_refused_names_value_and_cure(settings, words):
    with pytest.raises(ConfigError) as caught:
        data(**settings)
    assert words in str(caught.value)


def test_the_cures_cure_and_the_default_follows_from_the_prompts():
    assert data(demonstrations="a").stage_2_prompts == "same"
    assert data(demonstrations="a", prompts="b").stage_2_prompts == "other"
    read = data(demonstrations="a", overlap="disjoint", demonstrations_limit=5)
    assert read.stage_2_prompts == "disjoint"
