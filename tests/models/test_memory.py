"""Activation checkpointing: the same gradients, layers computed twice, no trace left. And what
happens when memory runs out all the same.
"""

import copy

import pytest
import torch

import tiny
from srppo.errors import ModelError, TrainingError
from srppo.models.memory import Budget, activation_checkpointing, is_out_of_memory

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def gradients(model, on):
    model.zero_grad()
    with activation_checkpointing(model, on):
        model(IDS, use_cache=False).logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture(params=tiny.ARCHITECTURES)
def model(request):
    return tiny.model(request.param)


def layer_passes(model):
    """How often the first layer's MLP ran, as a list that grows."""
    passes = []
    (mlp, *_) = [m for n, m in model.named_modules() if n.endswith("0.mlp")]
    mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_gradients_are_the_same_to_the_bit_in_eval_mode(model):
    plain, again = gradients(model, on=False), gradients(model, on=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not model.training


def test_layers_are_computed_again_with_gradients_only(model):
    passes = layer_passes(model)
    gradients(model, on=True)
    assert len(passes) == 2
    with torch.no_grad(), activation_checkpointing(model, on=True):
        model(IDS)
    assert len(passes) == 3
    gradients(model, on=False)
    assert len(passes) == 4


def test_cached_decoding_goes_on_inside(model):
    with torch.no_grad():
        expected = model(IDS).logits[:, -1]
        with activation_checkpointing(model, on=True):
            cache = model(IDS[:, :-1], use_cache=True).past_key_values
            found = model(IDS[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_less_is_kept_for_the_backward_pass(model):
    """Bytes that autograd holds, each storage once."""
    held = {}
    for on in (False, True):
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            activation_checkpointing(model, on),
        ):
            model(IDS.repeat(16, 4), use_cache=False)
        held[on] = sum(n for n, _ in storages.values())
    assert held[True] < 0.75 * held[False]


def test_a_copy_made_inside_computes_with_its_own_weights(model):
    with activation_checkpointing(model, on=True):
        copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)
        expected = tiny.ARCHITECTURES[model.config.model_type]().eval()
        expected.load_state_dict(copied.state_dict())
        assert torch.equal(copied(IDS).logits, expected(IDS).logits)


def test_a_model_without_such_layers_is_refused():
    with (
        pytest.raises(ModelError, match="gradient_checkpointing=false"),
        activation_checkpointing(torch.nn.Linear(2, 2), on=True),
    ):
        pass


# --- when memory runs out -------------------------------------------------------------------------

ERRORS = {
    "a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 8000000000000 bytes."
    ),
    "Python": MemoryError,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_budget_is_halved_until_the_work_fits_and_stays_so(kind):
    said, tried = [], []

    def work(size):
        tried.append(size)
        if size > 300:
            raise ERRORS[kind]()
        return size * 2

    budget = Budget(1000, said.append)
    assert budget.fit(work, undo=lambda: tried.append("undone")) == 500
    assert tried == [1000, "undone", 500, "undone", 250]
    assert budget.fit(work) == 500
    assert tried[5:] == [250]
    assert len(said) == 2
    assert "memory ran out" in said[0]


def test_the_cpus_own_error_is_known():
    """What torch really raises; nothing is allocated."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_are_not_tried_again():
    def work(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Budget(8).fit(work)


def test_what_never_fits_is_said():
    def work(size):
        raise MemoryError

    with pytest.raises(TrainingError, match=r"even for one sequence.*gradient_checkpointing"):
        Budget(8).fit(work)
