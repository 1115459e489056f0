"""Roles over one backbone against models of their own, merged by hand."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from srppo.config import LoRAConfig, ModelConfig
from srppo.errors import ModelError
from srppo.models.load import load_model, load_tokenizer
from srppo.models.lora import Backbone
from srppo.models.memory import activation_checkpointing
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.models.start import start_frozen, start_sft
from srppo.rollout.hf import HFSampler

RANK, ALPHA = 4, 6.0
CONFIG = LoRAConfig(rank=RANK, alpha=ALPHA)
ALL = 10**6
WEIGHTS = "adapter_model.safetensors"


def shake(role, seed, size=0.03):
    """Random numbers in both factors of the role's adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in role.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def three(architecture="llama"):
    """base, sft and policy with adapters that are not zero, on one backbone."""
    backbone = Backbone(tiny.model(architecture), CONFIG, seed=0)
    sft = backbone.new()
    shake(sft, seed=1)
    policy = sft.successor()
    shake(policy, seed=2)
    return backbone.bare(), sft, policy


def merged(role, architecture="llama"):
    """W + alpha/rank B A, in a model that never saw peft."""
    model = tiny.model(architecture)
    weights = dict(model.named_parameters())
    factors = {n: p for n, p in role.model.named_parameters() if f".{role.adapter}." in n}
    with torch.no_grad():
        for name, A in factors.items():
            if ".lora_A." not in name:
                continue
            B = factors[name.replace(".lora_A.", ".lora_B.")]
            change = ALPHA / RANK * B @ A
            weight = weights[name.split(".lora_A.")[0] + ".weight"]
            weight += change.T if architecture == "gpt2" else change  # Conv1D is transposed
    return model


def train(policy, steps=3):
    """Some Adam steps on the likelihood of random responses."""
    y = tiny.sequences(seed=3)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(steps):
        loss_of(policy, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(role, y):
    """Mean NLL of the responses, by plain unpadded forwards; differentiable."""
    total = torch.tensor(0.0)
    for i in range(len(y)):
        prompt, response = tiny.row(y, i)
        logits = role(torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(-1)
        picked = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])
        total = total - picked.mean() / len(y)
    return total


def trainable(role):
    return {n for n, p in role.model.named_parameters() if p.requires_grad}


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("steps", [0, 3])
def test_the_roles_score_as_three_models_do(architecture, steps):
    roles = three(architecture)
    train(roles[2], steps)
    y = tiny.sequences()
    scores = [score(role, y, ALL) for role in roles]
    for role, found in zip(roles, scores, strict=True):
        expected = score(merged(role, architecture), y, ALL)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    differences = (scores[0] - scores[1], scores[1] - scores[2], scores[0] - scores[2])
    assert min(float(d.abs().max()) for d in differences) > 0.01


def test_training_the_policy_leaves_base_and_sft_as_they_were_to_the_bit():
    base, sft, policy = three()
    y = tiny.sequences()
    before = [score(role, y, ALL) for role in (base, sft, policy)]
    train(policy)
    after = [score(role, y, ALL) for role in (base, sft, policy)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_cached_decoding_under_each_role(architecture):
    prompts = tiny.sequences().prompt_ids
    for role in three(architecture):
        found, expected = (
            HFSampler(model, eos_token_id=tiny.EOS, max_new_tokens=8).sample(prompts, seed=0)
            for model in (role, merged(role, architecture))
        )
        assert torch.equal(found.sequences.response_ids, expected.sequences.response_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_two_roles_decode_in_turns():
    """Extrapolation asks base and sft for every token."""
    base, sft, _ = three()
    prompts = tiny.sequences().prompt_ids
    found, expected = (
        HFSampler(b, base=a, lam=2.0, eos_token_id=tiny.EOS, max_new_tokens=8).sample(prompts, 0)
        for a, b in ((base, sft), (merged(base), merged(sft)))
    )
    assert torch.equal(found.sequences.response_ids, expected.sequences.response_ids)


@pytest.mark.parametrize("start", ["base", "sft"])
def test_a_successor_starts_equal_to_what_it_succeeds(start):
    base, sft, _ = three()
    role = {"base": base, "sft": sft}[start]
    y = tiny.sequences()
    assert torch.equal(score(role.successor(), y, ALL), score(role, y, ALL))


# --- who trains, what is in force -----------------------------------------------------------------


def test_only_the_policys_adapter_is_trained_whatever_was_active():
    base, sft, policy = three()
    expected = {n for n, _ in policy.model.named_parameters() if f".{policy.adapter}." in n}
    assert len(expected) == 28  # seven layers in each of two blocks, two factors each
    y = tiny.sequences()
    for role in (policy, base, sft, policy, sft):
        score(role, y, ALL)
        with role.active():
            assert trainable(policy) == expected
        assert trainable(policy) == expected
    by_id = {id(p) for n, p in policy.model.named_parameters() if n in expected}
    assert {id(p) for p in policy.parameters()} == by_id
    assert base.parameters() == sft.parameters() == []


def test_the_policy_is_in_force_again_afterwards_also_after_an_error():
    base, sft, policy = three()
    ids = torch.tensor([[1, 2, 3]])
    expected = policy(ids).logits
    with pytest.raises(RuntimeError, match="stop"), base.active(), sft.active():
        raise RuntimeError("stop")
    assert torch.equal(policy.model(ids).logits, expected)


def test_roles_can_be_nested():
    base, sft, _ = three()
    ids = torch.tensor([[1, 2, 3]])
    alone = base(ids).logits
    with base.active() as model:
        sft(ids)
        assert torch.equal(model(ids).logits, alone)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_another_role_between_forward_and_backward_changes_no_gradient(checkpointing):
    """What activation checkpointing computes again is the policy's, too."""
    base, sft, policy = three()
    y = tiny.sequences()
    found = []
    for between in (False, True):
        with activation_checkpointing(policy.model, checkpointing):
            loss = loss_of(policy, y)
            if between:
                score(base, y, ALL)
                score(sft, y, ALL)
            loss.backward()
        found.append([p.grad.clone() for p in policy.parameters()])
        for p in policy.parameters():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(g.abs().max() > 0 for g in found[0])


def test_the_gradient_is_that_of_the_merged_model():
    """d/dB of f(W + s B A) is s df/dW A^T, and d/dA is s B^T df/dW."""
    _, _, policy = three()
    y, whole = tiny.sequences(), merged(policy)
    loss_of(policy, y).backward()
    loss_of(whole, y).backward()
    name = "model.layers.1.mlp.up_proj"
    layer = policy.model.get_submodule(name)
    A, B = layer.lora_A[policy.adapter].weight, layer.lora_B[policy.adapter].weight
    dW = whole.get_submodule(name).weight.grad
    torch.testing.assert_close(B.grad, ALPHA / RANK * dW @ A.T, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(A.grad, ALPHA / RANK * B.T @ dW, atol=1e-6, rtol=1e-4)


def test_the_seed_decides_a_fresh_adapter_and_nothing_else_changes():
    models = [(tiny.model(), seed) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    one, two, other = (Backbone(m, CONFIG, s).new() for m, s in models)
    same = [
        [torch.equal(a, b) for a, b in zip(one.parameters(), x.parameters(), strict=True)]
        for x in (two, other)
    ]
    assert all(same[0])
    assert not all(same[1])
    assert torch.equal(torch.get_rng_state(), before)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_roles_together_are_one_backbone_and_two_adapters(dtype):
    backbone = Backbone(tiny.model().to(dtype), CONFIG, seed=0)
    weights = sum(p.nbytes for p in tiny.model().to(dtype).parameters())
    sft = backbone.new()
    roles = (backbone.bare(), sft, sft.successor())
    storages = {p.data_ptr(): p for r in roles for p in r.model.parameters()}
    attention, mlp = [(32, 32), (32, 16), (32, 16), (32, 32)], 3 * [(32, 48)]
    adapter = 2 * sum(RANK * (a + b) for a, b in attention + mlp)
    assert sum(p.nbytes for p in storages.values()) == weights + 2 * 4 * adapter  # float32
    assert {p.dtype for p in roles[2].parameters()} == {torch.float32}


# --- directories ----------------------------------------------------------------------------------


@pytest.fixture
def base_dir(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def model_config(base_dir, **settings):
    return ModelConfig(base=base_dir, **{"lora": CONFIG, "device": "cpu", **settings})


@pytest.fixture
def adapter_dir(base_dir, tmp_path):
    """What stage 1 leaves, and the log-probabilities that belong to it."""
    role = start_sft(model_config(base_dir), seed=0)
    shake(role, seed=1)
    role.save_pretrained(tmp_path / "sft")
    tiny.tokenizer().save_pretrained(tmp_path / "sft")
    return str(tmp_path / "sft"), score(role, tiny.sequences(), ALL)


def test_an_adapter_directory_is_what_peft_loads(adapter_dir):
    path, expected = adapter_dir
    theirs = AutoPeftModelForCausalLM.from_pretrained(path)
    found = score(theirs.get_base_model(), tiny.sequences(), ALL)
    assert torch.equal(found, expected)


def test_and_what_we_load_over_the_base_or_merged_into_it(adapter_dir, base_dir, tmp_path):
    path, expected = adapter_dir
    y = tiny.sequences()
    base, sft = start_frozen(model_config(base_dir), path, seed=0)
    assert base.model is sft.model
    assert torch.equal(score(base, y, ALL), score(tiny.model(), y, ALL))
    assert torch.equal(score(sft, y, ALL), expected)
    assert torch.equal(score(sft.sibling(path), y, ALL), expected)
    whole = load_model(path)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(score(whole, y, ALL), expected, atol=1e-5, rtol=0)
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(score(load_model(str(tmp_path / "whole")), y, ALL), score(whole, y, ALL))
    assert len(load_tokenizer(path)) == len(tiny.tokenizer())


def test_without_lora_an_adapter_is_merged_into_the_recipes_base(adapter_dir, base_dir, tmp_path):
    path, expected = adapter_dir
    (tmp_path / "base").rename(tmp_path / "moved")
    config = model_config(str(tmp_path / "moved"), lora=None)
    base, sft = start_frozen(config, path, seed=0)
    assert base.model is not sft.model
    torch.testing.assert_close(score(sft, tiny.sequences(), ALL), expected, atol=1e-5, rtol=0)


def test_an_adapter_on_bfloat16_weights_is_loaded_as_exactly_as_it_was_saved(
    adapter_dir, base_dir, tmp_path
):
    path, _ = adapter_dir
    _, sft = start_frozen(model_config(base_dir, dtype="bfloat16"), path, seed=0)
    assert {p.dtype for n, p in sft.model.named_parameters() if "lora" not in n} == {torch.bfloat16}
    sft.successor().save_pretrained(tmp_path / "again")
    names = ["sft/adapter_model.safetensors", "again/adapter_model.safetensors"]
    one, two = ((tmp_path / name).read_bytes() for name in names)
    assert one == two


def test_over_a_whole_sft_model_the_policy_is_an_adapter_and_base_a_second_copy(base_dir, tmp_path):
    tiny.model(seed=1).save_pretrained(tmp_path / "whole")
    base, sft = start_frozen(model_config(base_dir), tmp_path / "whole", seed=0)
    policy = sft.successor()
    assert policy.model is sft.model
    assert policy.model is not base.model
    shake(policy, seed=2)
    y = tiny.sequences()
    assert torch.equal(score(base, y, ALL), score(tiny.model(seed=0), y, ALL))
    assert torch.equal(score(sft, y, ALL), score(tiny.model(seed=1), y, ALL))
    assert not torch.equal(score(policy, y, ALL), score(sft, y, ALL))


def test_an_adapter_of_another_model_is_refused(adapter_dir, tmp_path):
    path, _ = adapter_dir
    tiny.model("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit") as error:
        start_frozen(model_config(str(tmp_path / "other")), path, seed=0)
    assert "model.base" in str(error.value)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_modules(path):
    edit_json(path / "adapter_config.json", target_modules=["c_attn"])


def fewer_modules(path):
    """So that some of the weights have no place."""
    edit_json(path / "adapter_config.json", target_modules=["q_proj"])


def weights_missing(path):
    weights = load_file(path / WEIGHTS)
    save_file(dict(sorted(weights.items())[3:]), path / WEIGHTS, {"format": "pt"})


def another_rank(path):
    edit_json(path / "adapter_config.json", r=1)


MISFITS = {
    "modules": (other_modules, "c_attn"),
    "too many weights": (fewer_modules, "lora_"),
    "too few weights": (weights_missing, "lora_"),
    "shape": (another_rank, "size mismatch for .*lora_"),
}


@pytest.mark.parametrize(("change", "named"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("lora", [CONFIG, None])
def test_an_adapter_that_fits_in_part_is_refused_over_the_base_and_merged(
    change, named, lora, adapter_dir, base_dir
):
    path, _ = adapter_dir
    change(Path(path))
    with pytest.raises(ModelError, match=rf"does not fit .*\(.*{named}.*\): it was trained on"):
        start_frozen(model_config(base_dir, lora=lora), path, seed=0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (IA3Config(task_type="CAUSAL_LM"), "its kind is"),
        (LoraConfig(bias="all", target_modules="all-linear"), "bias"),
        (LoraConfig(modules_to_save=["lm_head"], target_modules="all-linear"), "modules_to_save"),
        (LoraConfig(init_lora_weights="pissa", target_modules="all-linear"), "weights below"),
    ],
)
def test_adapters_that_change_more_than_low_rank_factors_are_refused(
    config, named, base_dir, tmp_path
):
    get_peft_model(load_model(base_dir), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"not a plain LoRA adapter.*{named}"):
        start_frozen(model_config(base_dir), tmp_path / "adapter", seed=0)


def test_a_damaged_adapter_is_refused(adapter_dir, base_dir):
    path, _ = adapter_dir
    with open(f"{path}/adapter_model.safetensors", "wb") as f:
        f.write(b"not weights")
    with pytest.raises(ModelError, match="adapter of"):
        start_frozen(model_config(base_dir), path, seed=0)


def test_layers_that_are_not_there_are_refused(base_dir):
    lora = LoRAConfig(target_modules=["no_such_layer"])
    with pytest.raises(ModelError, match=r"no_such_layer.*all-linear"):
        start_sft(model_config(base_dir, lora=lora), seed=0)


def test_an_adapter_on_the_output_head_is_refused(base_dir):
    """Its weights are used directly where logits are computed in pieces."""
    lora = LoRAConfig(target_modules=["lm_head", "q_proj"])
    with pytest.raises(ModelError, match="output head"):
        start_sft(model_config(base_dir, lora=lora), seed=0)


def test_an_adapter_is_no_base_for_another(adapter_dir):
    path, _ = adapter_dir
    with pytest.raises(ModelError, match="Merge it"):
        start_sft(model_config(path), seed=0)


# --- quantised weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.05), ("4bit", 0.3)])
def test_quantised_weights_under_float32_adapters(bits, error, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, y = wide_model(), tiny.sequences()
    whole.save_pretrained(tmp_path)
    start_sft(model_config(str(tmp_path), quantize=bits), seed=0).save_pretrained(
        tmp_path / "adapter"
    )
    base, sft = start_frozen(
        model_config(str(tmp_path), quantize=bits), tmp_path / "adapter", seed=0
    )
    policy = sft.successor()
    for role in (base, sft, policy):
        off = (score(role, y, ALL) - score(whole, y, ALL))[y.mask].abs().mean()
        assert 0 < float(off) < error
    unquantised = Backbone(whole, CONFIG, seed=0).load(tmp_path / "adapter").successor()
    one, two = (gradient(r, y) for r in (policy, unquantised))
    assert float(torch.cosine_similarity(one, two, dim=0)) > 0.9
    before = score(sft, y, ALL)
    train(policy)
    assert torch.equal(score(sft, y, ALL), before)
    assert not torch.equal(score(policy, y, ALL), before)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def gradient(role, y):
    loss_of(role, y).backward()
    return torch.cat([p.grad.flatten() for p in role.parameters()])


def wide_model():
    """Layers as wide as the blocks of 64 that numbers are quantised in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**{**tiny.SHAPE, **sizes})).eval()


def test_quantising_without_bitsandbytes_names_the_extra(monkeypatch, base_dir):
    monkeypatch.setattr("srppo.models.load.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'srppo\[quantize\]'"):
        start_sft(model_config(base_dir, quantize="4bit"), seed=0)


# --- offloading -----------------------------------------------------------------------------------


def test_an_offloaded_model_visits_the_device_once_while_it_is_active(monkeypatch):
    """A stand-in for the move: there may be no second device here."""
    model, moves = tiny.model(), []
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)))
    role = Role(model, torch.device("cuda"))
    with role.active() as inside:
        assert inside is model
        assert moves == ["cuda"]
        with role.active():
            assert moves == ["cuda"]
        assert moves == ["cuda"]
    assert moves == ["cuda", "cpu"]
    with pytest.raises(RuntimeError, match="stop"), role.active():
        raise RuntimeError("stop")
    assert moves == ["cuda", "cpu"] * 2
    assert role.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_models_score_on_the_gpu_and_leave_it(base_dir):
    config = ModelConfig(base=base_dir, device="cuda", offload=True)
    base, sft = start_frozen(config, base_dir, seed=0)
    found = score(base, tiny.sequences(), ALL)
    torch.testing.assert_close(found, score(tiny.model(), tiny.sequences(), ALL), atol=1e-4, rtol=0)
    assert {p.device.type for r in (base, sft) for p in r.model.parameters()} == {"cpu"}
    assert sft.successor().device.type == "cuda"


def test_nothing_moves_where_weights_are_at_home(monkeypatch, base_dir):
    base, sft = start_frozen(model_config(base_dir, lora=None, offload=True), base_dir, seed=0)
    for role in (base, sft, sft.successor(), *three()):
        monkeypatch.setattr(role.model, "to", None)
        score(role, tiny.sequences(), ALL)
