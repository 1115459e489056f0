"""Model directories: what loads, and what a person is told when it does not."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from srppo.chat.speaker import Speaker
from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.miniature import BASE
from srppo.models.load import (
    cannot_load,
    check_same_tokens,
    context_length,
    fingerprint,
    frozen_copy,
    load_model,
    load_tokenizer,
    pick_device,
    resolve,
)
from srppo.models.start import start_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def directory(tmp_path):
    return tiny.copy_of_miniature(tmp_path / "model")


@pytest.fixture
def offline(monkeypatch):
    """Hub names fail at once, without a look at the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# --- what loads -----------------------------------------------------------------------------------


def test_the_miniature_goes_by_name():
    assert resolve("srppo:miniature") == str(BASE)
    assert load_model("srppo:miniature").config.model_type == "llama"
    assert context_length("srppo:miniature") == 64


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_saved_models_come_back_the_same_and_in_eval_mode(architecture, tmp_path):
    """GPT-2's output layer is tied to its embedding and not in the file: no missing weight."""
    saved = tiny.model(architecture)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not loaded.training
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert context_length(str(tmp_path)) == 64


def test_the_number_format_is_the_one_asked_for(directory):
    for dtype in ("float32", "bfloat16"):
        weights = {p.dtype for p in load_model(str(directory), dtype).parameters()}
        assert weights == {getattr(torch, dtype)}


def test_a_frozen_copy_is_one():
    model = tiny.model()
    copied = frozen_copy(model)
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(copied(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)


def test_context_length_is_none_where_the_model_does_not_say(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert context_length(str(tmp_path)) is None


# --- what does not --------------------------------------------------------------------------------


def truncate(directory):
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def only_pickle(directory):
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def drop_a_weight(directory):
    weights = load_file(directory / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, directory / WEIGHTS, {"format": "pt"})


def reshape_a_weight(directory):
    weights = load_file(directory / WEIGHTS)
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})


BROKEN = {
    "missing": (shutil.rmtree, "does not exist"),
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{oops"), "not a valid JSON"),
    "unknown architecture": (lambda d: edit(d / "config.json", model_type="nope"), "`nope`"),
    "not a language model": (lambda d: edit(d / "config.json", model_type="vit"), "ViTConfig"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), WEIGHTS),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "header"),
    "truncated weights": (truncate, "incomplete"),
    "pickle only": (only_pickle, WEIGHTS),
    "a weight missing": (drop_a_weight, "lacks 1 weight(s), model.norm.weight first"),
    "a weight of another shape": (reshape_a_weight, "mismatched"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_broken_model_directories_are_named_with_cause_and_cure(kind, directory):
    damage, cause = BROKEN[kind]
    damage(directory)
    with pytest.raises(ModelError) as error:
        load_model(str(directory))
    assert str(directory) in str(error.value)
    assert cause in str(error.value)
    assert "Give " in str(error.value)


FOREIGN = {
    "a number as text": {"hidden_size": "96"},  # a strict dataclass refuses it
    "no heads": {"num_attention_heads": 0},  # ZeroDivisionError
    "a quantiser that is not here": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "an attribute that cannot be set": {"use_return_dict": 3},  # AttributeError
    "padding outside the vocabulary": {"pad_token_id": 10**9},  # AssertionError
    "no tokens": {"vocab_size": 0},  # IndexError
}


@pytest.mark.parametrize("stated", FOREIGN.values(), ids=FOREIGN)
def test_configurations_that_no_library_expects_are_named(stated, directory):
    edit(directory / "config.json", **stated)
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded: \S") as error:
        load_model(str(directory))
    assert str(directory) in str(error.value)
    for load in (load_tokenizer, context_length):  # neither needs all of it
        with contextlib.suppress(ModelError):
            load(str(directory))


def test_a_pickle_is_not_even_opened(directory, tmp_path):
    """Unpickling runs code; the file would say so."""
    canary = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"model.norm.weight": Attack()}, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    with pytest.raises(ModelError):
        load_model(str(directory))
    assert not canary.exists()


def test_code_in_a_model_directory_is_not_run(directory, tmp_path):
    canary = tmp_path / "ran"
    (directory / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")
    edit(directory / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    with pytest.raises(ModelError):
        load_model(str(directory))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where/at/all", "a/b/c"])
def test_local_names_are_not_looked_up_on_the_hub(name):
    for load in (load_model, load_tokenizer, context_length):
        with pytest.raises(ModelError, match="does not exist") as error:
            load(name)
        assert str(error.value).count("Give ") == 1


@pytest.mark.parametrize("name", ["runs/nope", "runs/no pe"])
def test_a_name_in_a_directory_that_is_here_is_not_looked_up_on_the_hub(
    name, tmp_path, monkeypatch
):
    """Offline or not: `srppo chat runs/nope` is a slip of the pen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket", None)
    (tmp_path / "runs").mkdir()
    for load in (load_model, load_tokenizer, context_length):
        with pytest.raises(ModelError, match="does not exist, and 'runs' is a directory") as error:
            load(name)
        assert f"hf download {name}" in str(error.value)


def test_a_model_of_the_hub_that_is_on_this_machine_goes_before_a_directory_like_its_owner(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner").mkdir()
    cached = tmp_path / "cache" / "models--owner--name"
    (cached / "snapshots/1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("1")
    with pytest.raises(ModelError, match="does not exist"):
        resolve("owner/name")
    (cached / "snapshots/1/config.json").write_text("{}")
    assert resolve("owner/name") == "owner/name"


def test_hub_names_that_cannot_be_reached(offline):
    for load in (load_model, load_tokenizer, context_length):
        with pytest.raises(ModelError, match=r"no-such-owner/model.*hub name"):
            load("no-such-owner/model")


def test_only_the_packaged_model_goes_by_a_name_of_ours():
    with pytest.raises(ModelError, match="srppo:miniature"):
        resolve("srppo:gigantic")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", ""])
def test_devices_that_are_not_there(device):
    with pytest.raises(ModelError, match=r"model\.device=") as error:
        pick_device(device)
    assert "auto" in str(error.value)
    assert str(error.value).count("\n") == 0


def test_auto_is_a_device_that_works():
    assert torch.empty(1, device=pick_device("auto")).device.type in ("cpu", "cuda")


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused(directory):
    edit(directory / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no EOS token") as error:
        load_tokenizer(str(directory))
    assert str(directory) in str(error.value)
    assert "eos_token" in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [lambda f: f.unlink(), lambda f: f.write_text("{"), lambda f: edit(f, model=3)],
)
def test_a_tokenizer_that_is_missing_or_broken(damage, directory):
    damage(directory / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(str(directory))


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(directory):
    """Texts with such a token would end stage 1 and `srppo chat` with an IndexError."""
    tokenizer = load_tokenizer(str(directory))
    size = load_model(str(directory)).config.vocab_size
    assert len(tokenizer) == size
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(directory)
    for start in (
        lambda: start_tokenizer(ModelConfig(base=str(directory))),
        lambda: Speaker.load("x", str(directory), "float32", "cpu"),
    ):
        with pytest.raises(
            ModelError, match=f"has {size + 1} tokens, '<extra>' with the id {size}"
        ):
            start()


def test_a_model_may_have_more_embeddings_than_tokens(directory):
    model = load_model(str(directory))
    model.resize_token_embeddings(128)
    model.save_pretrained(directory)
    tokenizer = start_tokenizer(ModelConfig(base="srppo:miniature", sft=str(directory)))
    assert len(tokenizer) < model.config.vocab_size == 128


def test_a_model_directory_without_tokenizer_is_said_to_have_none(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer: .* Copy tokenizer\.json and "):
        load_tokenizer(str(directory))


def test_what_a_library_says_is_quoted_to_the_end_of_its_sentence():
    said = "It needs one of: \n(1) a file, \n(2) a class. \nInstall it."
    assert ": It needs one of: (1) a file, (2) a class. Install it. Give" in cannot_load(
        "tokenizer", "x", ValueError(said)
    )
    assert ": No. Give" in cannot_load("model", "x", ValueError("No\nmore"))


def test_equal_tokenizers_pass():
    check_same_tokens(tiny.tokenizer(), tiny.tokenizer(), "base", "sft")


def test_the_first_token_that_differs_is_named_with_both_ids():
    """c and d have changed places, h is new: c comes first."""
    base, sft = tiny.tokenizer("a b c d e"), tiny.tokenizer("a b d c e h")
    with pytest.raises(ModelError) as error:
        check_same_tokens(base, sft, "the-base", "the-sft")
    assert "'the-base'" in str(error.value)
    assert "'the-sft'" in str(error.value)
    assert "3 token(s): 'c' is 4 in one and 5 in the other" in str(error.value)


def test_a_token_of_one_tokenizer_only_is_a_difference():
    with pytest.raises(ModelError, match="'z' is None in one and 10 in the other"):
        check_same_tokens(tiny.tokenizer(), tiny.tokenizer("a b c d e f g h z"), "base", "sft")


def test_the_same_vocabulary_with_another_eos_is_refused():
    with pytest.raises(ModelError, match="EOS is '<eos>' in base"):
        check_same_tokens(tiny.tokenizer(), tiny.tokenizer(eos="a"), "base", "sft")


# --- what tells one model from another ------------------------------------------------------------


def test_a_fingerprint_is_that_of_the_files(directory, tmp_path):
    copy = tiny.copy_of_miniature(tmp_path / "copy")
    assert fingerprint(str(directory)) == fingerprint(str(copy)) == fingerprint("srppo:miniature")
    weights = bytearray((copy / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / WEIGHTS).write_bytes(weights)
    assert fingerprint(str(directory)) != fingerprint(str(copy))
    before = fingerprint(str(directory))
    edit(directory / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(str(directory)) != before


def test_a_model_on_the_hub_that_cannot_be_reached_has_none(offline):
    with pytest.raises(ModelError, match="owner/model"):
        fingerprint("owner/model")
