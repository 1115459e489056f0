"""Who trains and who does not."""

import torch

import tiny
from srppo.models.roles import Roles, ShardedRole


def test_the_policy_starts_as_sft_and_shares_no_memory_with_it():
    base, sft = tiny.model(seed=0), tiny.model(seed=1)
    roles = Roles.begin(base, sft, critic=True)
    for name, weight in roles.policy.model.state_dict().items():
        assert torch.equal(weight, sft.state_dict()[name])
        assert weight.data_ptr() != sft.state_dict()[name].data_ptr()
    assert all(p.requires_grad for p in roles.policy.parameters())
    assert all(p.requires_grad for p in roles.critic.parameters())
    assert not any(p.requires_grad for m in (base, sft) for p in m.parameters())


def test_dropout_stays_off_in_the_policy():
    """In train mode the ratio would differ from 1 before any update."""
    sft = tiny.model("gpt2")
    policy = Roles.begin(tiny.model("gpt2"), sft, critic=False).policy
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    assert torch.equal(policy(ids).logits, sft(ids).logits)


def test_without_a_critic_there_is_none():
    assert Roles.begin(tiny.model(), tiny.model(), critic=False).critic is None


def test_tied_embeddings_stay_tied_in_the_copy():
    policy = Roles.begin(tiny.model("gpt2"), tiny.model("gpt2"), critic=False).policy
    assert policy.model.lm_head.weight is policy.model.transformer.wte.weight


def test_the_policy_of_an_offloaded_model_in_pieces_is_where_the_role_computes(monkeypatch):
    """Its pieces wait in CPU memory, and there the policy must not stay."""
    places = []

    def in_float32(model, device, compute):
        places.append(device)
        return model

    monkeypatch.setattr("srppo.models.roles.in_float32", in_float32)
    ShardedRole(tiny.model(), torch.device("meta")).successor()
    assert places == [torch.device("meta")]
