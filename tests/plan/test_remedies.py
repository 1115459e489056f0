"""What is tried, in which order, and what is taken back."""

from __future__ import annotations

from srppo.config import parse_recipe
from srppo.plan.remedies import changed, first_that_fits


def recipe(**sections):
    return parse_recipe(
        {"name": "a", "output_dir": "b", "model": {"base": "c"}, "data": {"demonstrations": "d"}}
        | sections
    )


def made_up(r):
    """Bytes as if each setting saved a fixed share."""
    size = 1000.0
    size -= 100 * (r.ppo.gradient_checkpointing + r.sft.gradient_checkpointing)
    size -= 100 * (r.ppo.max_tokens_per_batch <= 4096)
    size -= 100 * (r.model.dtype == "bfloat16") + 50 * r.model.offload
    return size - 300 * (r.model.lora is not None) - 100 * (r.model.quantize is not None)


def test_the_first_that_suffices_is_enough():
    found = first_that_fits(recipe(), 2048, 850, made_up)
    assert found.fits
    assert found.overrides == "sft.gradient_checkpointing=true ppo.gradient_checkpointing=true"


def test_batches_shrink_no_further_than_needed():
    found = first_that_fits(recipe(), 2048, 700, made_up)
    assert found.changes["ppo.max_tokens_per_batch"] == 4096
    assert found.changes["sft.micro_batch_size"] == 2


def test_what_the_last_one_makes_needless_is_taken_back():
    found = first_that_fits(recipe(), 2048, 520, made_up)
    assert found.overrides == (
        "sft.gradient_checkpointing=true ppo.gradient_checkpointing=true model.lora.rank=16"
    )


def test_what_the_recipe_has_already_is_not_proposed():
    given = {"base": "c", "lora": {"rank": 8}, "dtype": "bfloat16", "offload": True}
    found = first_that_fits(recipe(model=given), 2048, 500, made_up)
    assert found.overrides == "sft.gradient_checkpointing=true ppo.gradient_checkpointing=true"
    assert found.peak == made_up(changed(recipe(model=given), found.changes)) == 350


def test_nothing_fits():
    found = first_that_fits(recipe(), 2048, 0, made_up)
    assert not found.fits
    assert found.peak == 150
    assert "model.quantize=4bit" in found.overrides
