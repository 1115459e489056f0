"""Model directories of somebody who means harm: refused with a message, nothing run or filled."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

import tiny
from runs import srppo_command, write_recipe
from srppo.config import LoRAConfig
from srppo.errors import ModelError
from srppo.models.load import context_length, load_model, load_tokenizer
from srppo.models.lora import Backbone
from srppo.models.untrusted import check_directory


@pytest.fixture
def directory(tmp_path):
    return tiny.copy_of_miniature(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    place = tmp_path / "adapter"
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(place)
    tiny.model().save_pretrained(tmp_path / "below")
    edit(place / "adapter_config.json", base_model_name_or_path=str(tmp_path / "below"))
    return place


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_honest_directories_pass(directory, adapter):
    check_directory(str(directory))
    check_directory(str(adapter))
    check_directory("owner/on-the-hub")
    assert load_model(str(adapter))


SIZES = {
    "vocab_size": 10**12,
    "hidden_size": 10**10,
    "intermediate_size": 10**15,
    "num_hidden_layers": 10**9,
    "num_attention_heads": 10**8,
    "head_dim": 2**40,
}


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_made(directory, key):
    edit(directory / "config.json", **{key: SIZES[key]})
    with pytest.raises(ModelError, match=rf"config\.json states {key}={SIZES[key]}, more than"):
        load_model(str(directory))


@pytest.mark.parametrize(
    ("key", "size", "words"),
    [
        ("ffn_dim", 10**9, "a model of 65"),  # 32 rows up, 32 down, a bias
        ("max_position_embeddings", 10**11, "a model of 32"),
        ("ffn_dim", 2**62, "a model that cannot be built"),
    ],
)
def test_sizes_by_any_name_are_counted_before_anything_is_made(tmp_path, key, size, words):
    """Learned positions, and a width that others call otherwise."""
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48}
    config = OPTConfig(
        **sizes, word_embed_proj_dim=32, num_hidden_layers=1, max_position_embeddings=64
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    check_directory(str(tmp_path))
    edit(tmp_path / "config.json", **{key: size})
    with pytest.raises(ModelError, match=rf"config\.json describes {words}.*fit its"):
        load_model(str(tmp_path))


def test_nested_configurations_are_looked_into(directory):
    edit(directory / "config.json", text_config={"num_hidden_layers": 10**9})
    with pytest.raises(ModelError, match="num_hidden_layers=1000000000"):
        check_directory(str(directory))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("where", ["model", "part", "each part"])
def test_attention_is_not_fetched_from_the_hub(directory, key, where, monkeypatch):
    edit(directory / "config.json", **{key: "eager"})
    assert load_model(str(directory)).config._attn_implementation == "eager"
    fetched = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetched.append)
    name = "someone/kernel@main:attend"
    stated = {
        "model": {key: name},
        "part": {"text_config": {key: name}},
        "each part": {key: {"": "sdpa", "text_config": name}},
    }[where]
    edit(directory / "config.json", **stated)
    with pytest.raises(ModelError, match=rf"config\.json states {key}=.*someone/kernel.*Remove"):
        load_model(str(directory))
    assert not fetched


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "a/b", "..", 7])
def test_an_index_that_leads_out_of_the_directory_is_refused(directory, name, tmp_path):
    (directory / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no file name"):
        load_model(str(directory))


def test_an_index_of_the_directorys_own_files_loads(directory):
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    (directory / "model.safetensors").unlink()
    for i, some in enumerate([names[:5], names[5:]]):
        save_file(
            {n: weights[n] for n in some}, directory / f"part-{i}.safetensors", {"format": "pt"}
        )
    where = {n: f"part-{int(i >= 5)}.safetensors" for i, n in enumerate(names)}
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_model(str(directory))
    assert torch.equal(loaded.state_dict()[names[0]], weights[names[0]])


class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def load_as_adapter(adapter):
    Backbone(tiny.model(), LoRAConfig(), seed=0).load(adapter)


@pytest.mark.parametrize("load", [load_as_adapter, lambda a: load_model(str(a))])
def test_an_adapter_is_not_unpickled(adapter, tmp_path, load):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Canary(tmp_path / "ran")}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load(adapter)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_as_adapter, lambda a: load_model(str(a))])
def test_an_adapter_does_not_choose_what_is_imported(adapter, tmp_path, load, monkeypatch):
    (tmp_path / "evil_core.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_core")
    with pytest.raises(ModelError, match="would import the module 'evil_core'"):
        load(adapter)
    assert not (tmp_path / "ran").exists()
    assert "evil_core" not in sys.modules


def test_an_adapters_rank_is_that_of_its_weights(adapter):
    edit(adapter / "adapter_config.json", r=10**12)
    with pytest.raises(ModelError, match="states r=1000000000000"):
        load_as_adapter(adapter)
    edit(adapter / "adapter_config.json", r=4, rank_pattern={"q_proj": 10**12})
    with pytest.raises(ModelError, match="states r=1000000000000"):
        load_as_adapter(adapter)


@pytest.mark.parametrize("read", [load_model, context_length, load_tokenizer])
def test_code_of_a_directory_is_not_run_even_where_a_person_could_be_asked(
    directory, tmp_path, read, monkeypatch
):
    """transformers asks on a terminal unless it is told."""
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    monkeypatch.setattr("signal.alarm", lambda *a: None)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    code = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.C",
        "AutoTokenizer": ["evil.C"] * 2,
    }
    edit(directory / "config.json", model_type="evil", auto_map=code)
    edit(directory / "tokenizer_config.json", tokenizer_class="Evil", auto_map=code)
    with pytest.raises(ModelError):
        read(str(directory))
    assert not (tmp_path / "ran").exists()


def test_the_command_line_says_so_and_ends_with_code_2(directory, tmp_path):
    edit(directory / "config.json", num_hidden_layers=10**9)
    done = srppo_command("run", write_recipe(tmp_path, model={"base": str(directory)}))
    assert done.code == 2
    assert "num_hidden_layers=1000000000, more than its weights can hold" in done.err
    assert "Traceback" not in done.err
