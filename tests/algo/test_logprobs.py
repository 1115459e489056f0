import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from srppo.algo import logprobs as module
from srppo.algo.logprobs import token_entropy, token_logprobs
from srppo.errors import ShapeError


@pytest.fixture(params=[1, 40, 1 << 20], ids=["token by token", "several chunks", "one chunk"])
def chunk_elements(request, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", request.param)


def random_logits(*shape, dtype=torch.float64, seed=0):
    return 3 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("chunk_elements")
def test_logprobs_are_those_of_the_probabilities_that_made_the_logits():
    """Logits log p + c have log-probability log p, whatever c."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    shift = torch.linspace(-50, 50, 15, dtype=torch.float64).view(3, 5, 1)
    ids = torch.arange(15).view(3, 5) % 4
    torch.testing.assert_close(token_logprobs(p.log() + shift, ids), p[ids].log())


@pytest.mark.usefixtures("chunk_elements")
def test_logprobs_sum_to_one_and_odds_are_logit_differences():
    logits = random_logits(2, 3, 7)
    each = torch.stack([token_logprobs(logits, torch.full((2, 3), v)) for v in range(7)], dim=-1)
    torch.testing.assert_close(each.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(each - each[..., :1], logits - logits[..., :1])


@pytest.mark.usefixtures("chunk_elements")
def test_gradient_by_finite_differences():
    logits = random_logits(3, 4, 5).requires_grad_()
    ids = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids), logits)
    long = random_logits(3, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x[:, :-1], ids), long)


def test_gradient_of_the_expected_logprob_is_zero_at_the_distribution_itself():
    """The score function has mean zero: sum_v p(v) d log p(v) = 0."""
    logits = random_logits(6).requires_grad_()
    each = token_logprobs(logits.expand(6, 6), torch.arange(6))
    (logits.detach().softmax(0) * each).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_scored_in_float32(dtype):
    """Exact in float64 on the very same (rounded) logits."""
    logits = random_logits(4, 6, 500, dtype=torch.float32).to(dtype).requires_grad_()
    ids = torch.randint(500, (4, 6), generator=torch.Generator().manual_seed(1))
    result = token_logprobs(logits, ids)
    assert result.dtype == torch.float32
    exact = logits.detach().double()
    exact = (exact.gather(-1, ids[..., None]).squeeze(-1)) - exact.exp().sum(-1).log()
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)
    result.sum().backward()
    assert logits.grad.dtype == dtype
    assert token_entropy(logits).dtype == torch.float32


@pytest.mark.usefixtures("chunk_elements")
def test_nan_logits_at_padding_leak_neither_forward_nor_backward():
    clean = random_logits(2, 3, 5)
    ids = torch.tensor([[1, 2, 0], [4, 0, 0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    grads = []
    for padding in (0.0, math.nan):
        logits = clean.masked_fill(~mask[..., None], padding).requires_grad_()
        torch.where(mask, token_logprobs(logits, ids), 0.0).sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)
    assert (grads[1][~mask] == 0).all()
    assert (grads[1][mask] != 0).all()


def test_impossible_tokens():
    logits = torch.tensor([0.0, -torch.inf, 0.0]).requires_grad_()
    logprobs = token_logprobs(logits.expand(2, 3), torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([-math.log(2), -math.inf])
    logprobs[0].backward()
    assert logits.grad.tolist() == [0.5, 0, -0.5]
    assert token_entropy(logits).item() == pytest.approx(math.log(2))


@pytest.mark.usefixtures("chunk_elements")
def test_batch_of_one_equals_batch_of_many():
    logits = random_logits(4, 6, 5)
    ids = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(1))
    alone = torch.cat([token_logprobs(logits[i : i + 1], ids[i : i + 1]) for i in range(4)])
    assert torch.equal(token_logprobs(logits, ids), alone)
    assert torch.equal(token_logprobs(logits[2, 3], ids[2, 3]), alone[2, 3])
    alone = torch.cat([token_entropy(logits[i : i + 1]) for i in range(4)])
    assert torch.equal(token_entropy(logits), alone)


@pytest.mark.usefixtures("chunk_elements")
def test_entropy_of_known_distributions():
    """log V if uniform, zero if certain, and that of a mixture over disjoint halves."""
    assert token_entropy(torch.zeros(2, 3, 8)).flatten().tolist() == pytest.approx(
        [math.log(8)] * 6
    )
    assert token_entropy(torch.tensor([[1e4, 0.0, 0.0]])).item() == 0
    logits = random_logits(5, 2, 4)
    doubled = torch.cat([logits, logits], dim=-1)
    torch.testing.assert_close(token_entropy(doubled), token_entropy(logits) + math.log(2))


def test_entropy_is_minus_the_expected_logprob_and_carries_no_gradient():
    logits = random_logits(5, 6).requires_grad_()
    each = torch.stack([token_logprobs(logits, torch.full((5,), v)) for v in range(6)], dim=-1)
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy, -(each.exp() * each).sum(-1).detach())
    assert not entropy.requires_grad


class LargestFloat32(TorchDispatchMode):
    """Records the most elements that any float32 tensor made inside had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


def test_no_whole_float32_copy_and_no_copy_of_a_slice(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 800)
    logits = random_logits(4, 11, 200).bfloat16().requires_grad_()
    ids = torch.zeros(4, 10, dtype=torch.long)
    shifted = logits[:, :-1]
    with LargestFloat32() as largest:
        token_logprobs(shifted, ids).sum().backward()
        token_entropy(shifted)
    assert largest.elements == 800
    storages = {rows.untyped_storage().data_ptr() for _, (rows,) in module.token_chunks(shifted)}
    assert storages == {logits.untyped_storage().data_ptr()}


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3, 5\).*\(2, 3\).*\(2, 4\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
