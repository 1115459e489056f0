"""Models leave their run: as they are, merged, or to a hub, here one on this machine."""

from __future__ import annotations

import shutil
import socket

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny
from hub import Hub
from runs import srppo_command, write_recipe
from srppo.errors import ModelError, PublishError, RunDirError
from srppo.publish import export, push

IDS = torch.arange(2, 20)[None]
LORA = {"base": "srppo:miniature", "device": "cpu", "lora": {"rank": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert srppo_command("run", write_recipe(folder)).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    sft = {"optimizer": "adamw", "learning_rate": 0.03}
    assert srppo_command("run", write_recipe(folder, model=LORA, sft=sft)).code == 0
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with Hub() as there:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", there.url)
        yield there


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- export ---------------------------------------------------------------------------------------


def test_a_run_is_exported_as_its_policy(whole, tmp_path):
    done = srppo_command("export", whole, tmp_path / "out")
    assert (done.code, done.out) == (0, f"Model: {tmp_path / 'out'}\n")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (whole / "policy" / name).read_bytes()


def test_an_adapter_stays_one_and_still_loads(adapted, tmp_path):
    out = export(str(adapted), tmp_path / "out")
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()
    here, there = (AutoPeftModelForCausalLM.from_pretrained(p) for p in (adapted / "policy", out))
    assert torch.equal(logits(here), logits(there))
    assert ModelCard.load(out / "README.md").data.library_name == "peft"


def test_merged_it_is_a_whole_model_that_computes_the_same(adapted, tmp_path):
    done = srppo_command("export", adapted, tmp_path / "out", "--merge")
    assert done.code == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    apart = AutoPeftModelForCausalLM.from_pretrained(adapted / "policy")
    torch.testing.assert_close(logits(merged), logits(apart), atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny.BASE)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny.BASE).chat_template
    for directory in (tmp_path / "out", adapted / "policy"):
        generation = GenerationConfig.from_pretrained(directory)
        assert (generation.eos_token_id, generation.max_new_tokens) == (tokenizer.eos_token_id, 12)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert "trained as a LoRA adapter, which is merged" in card.text


def test_merging_a_whole_model_leaves_it_as_it_is(whole, tmp_path):
    out = export(str(whole), tmp_path / "out", merge=True)
    mine, theirs = (load_file(p / "model.safetensors") for p in (out, whole / "policy"))
    assert all(torch.equal(w, theirs[name]) for name, w in mine.items())


def test_another_number_format(whole, tmp_path):
    out = export(str(whole / "sft"), tmp_path / "out", dtype="bfloat16")
    weights = load_file(out / "model.safetensors")
    for name, weight in load_file(whole / "sft" / "model.safetensors").items():
        assert torch.equal(weights[name], weight.bfloat16())
    assert (out / "README.md").read_bytes() == (whole / "sft" / "README.md").read_bytes()


def test_what_was_written_into_a_card_stays(whole, tmp_path):
    first = export(str(whole), tmp_path / "first")
    (first / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    again = export(str(first), tmp_path / "again")
    assert (again / "README.md").read_text() == "---\nlicense: mit\n---\nMine."


def test_what_does_not_belong_to_the_model_stays_behind(whole, tmp_path):
    shutil.copytree(whole / "policy", tmp_path / "model")
    for name in ("optimizer.pt", "notes.docx", ".env"):
        (tmp_path / "model" / name).write_text("secret")
    out = export(str(tmp_path / "model"), tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {p.name for p in (whole / "policy").iterdir()}


def test_exports_that_cannot_be(whole, adapted, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    with pytest.raises(PublishError, match=r"taken is there already.*Give a new directory"):
        export(str(whole), tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
    with pytest.raises(PublishError, match=r"dtype=bfloat16.*Add --merge"):
        export(str(adapted), tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"nowhere.*does not exist"):
        export("./nowhere", tmp_path / "out")
    with pytest.raises(ModelError, match=r"'owner/name' is no directory of this machine"):
        export("owner/name", tmp_path / "out")
    (tmp_path / "hollow").mkdir()
    shutil.copy(whole / "policy" / "config.json", tmp_path / "hollow")
    with pytest.raises(ModelError, match=r"hollow' holds no weights"):
        export(str(tmp_path / "hollow"), tmp_path / "out")
    shutil.copytree(whole, tmp_path / "half", ignore=shutil.ignore_patterns("policy"))
    with pytest.raises(RunDirError, match=r"half has no policy yet.*half/sft"):
        export(str(tmp_path / "half"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_disk_is_left_as_it_was(whole, small_disk):
    with pytest.raises(PublishError, match=r"out .*o space left on device.*Free space"):
        export(str(whole), small_disk / "out")
    assert not list(small_disk.iterdir())


# --- push -----------------------------------------------------------------------------------------


def test_a_run_is_pushed_whole_in_one_commit(whole, hub):
    done = srppo_command("push", whole, "someone/small", "--private")
    assert (done.code, done.out) == (0, f"Pushed: {hub.url}/someone/small\n")
    assert hub.repositories["someone/small"]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_test"}
    ((name, files),) = hub.commits
    assert name == "someone/small"
    on_disk = {p.name: p.read_bytes() for p in (whole / "policy").iterdir()}
    assert files.keys() == on_disk.keys()
    assert {n for n, content in files.items() if content != on_disk[n]} == {"README.md"}
    card = files["README.md"].decode()
    assert 'name = "someone/small"' in card
    assert card.replace("someone/small", "OWNER/NAME") == on_disk["README.md"].decode()


def test_an_adapter_over_a_local_model_is_not_pushed_but_merged_it_is(adapted, hub, tmp_path):
    with pytest.raises(PublishError, match=r"directory of this machine.*srppo export .* --merge"):
        push(str(adapted), "someone/small")
    assert not hub.repositories
    push(str(export(str(adapted), tmp_path / "out", merge=True)), "someone/small")
    assert "model.safetensors" in hub.commits[0][1]


def test_an_adapter_over_a_model_of_the_hub_is_pushed(adapted, hub, tmp_path):
    out = export(str(adapted), tmp_path / "out")
    config = out / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny.BASE), "someone/base"))
    push(str(out), "someone/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} < hub.commits[0][1].keys()


def test_without_a_token_nothing_is_asked(whole, hub, monkeypatch):
    monkeypatch.setattr("srppo.publish.get_token", lambda: None)
    with pytest.raises(PublishError, match=r"no token.*'someone/small'.*hf auth login"):
        push(str(whole), "someone/small")
    assert not hub.tokens


@pytest.mark.parametrize(
    ("code", "cure"),
    [(401, "The token is not valid"), (403, "may not write there"), (418, "Try again later")],
)
def test_a_hub_that_refuses(whole, hub, code, cure):
    hub.refuse = code
    with pytest.raises(PublishError) as error:
        push(str(whole), "someone/small")
    message = str(error.value)
    assert f"({code}: You shall not pass): nothing was pushed. " in message
    assert cure in message


def test_a_card_that_the_hub_does_not_take(whole, hub, tmp_path):
    out = export(str(whole), tmp_path / "out")
    (out / "README.md").write_text("---\nlicense: no\n---\n")
    with pytest.raises(PublishError, match=r'card \(.*"license" must be one of.* README\.md'):
        push(str(out), "someone/small")
    assert not hub.commits


def test_no_network(whole, hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
        with pytest.raises(PublishError, match=rf"{nobody} cannot be reached .*HF_ENDPOINT"):
            push(str(whole), "someone/small")


@pytest.mark.parametrize("name", ["a/b/c", "some one/small", "someone/-small"])
def test_names_that_no_hub_takes(whole, hub, name):
    with pytest.raises(PublishError, match=f"'{name}' is not a name .*OWNER/NAME"):
        push(str(whole), name)
    assert not hub.repositories
