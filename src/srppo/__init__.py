"""srppo: align a language model from demonstrations alone (Self-Rewarding PPO).

import srppo
run = srppo.start("recipes/miniature.yaml", "ppo.kl_coef=0.5")
run.all()  # or run.sft(), run.ppo(), run.controls(), run.evaluate(), run.report()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srppo.pipeline import Run

__version__ = "0.1.0"
__all__ = ["__version__", "start"]


def start(
    recipe: str | Path, *overrides: str, fresh: bool = False, allow_change: bool = False
) -> Run:
    """Read a recipe and its data, and open its run directory; the stages are methods of the result.

    Args:
        recipe: path of a YAML file.
        overrides: `key.sub=value`, each on top of the recipe.
        fresh: start over; a run that is there is moved aside.
        allow_change: go on with one that was begun by another recipe, data, models or code.

    Raises:
        SrppoError: whatever can be known to fail before anything is trained.
    """
    from srppo.config import load_recipe  # late: `import srppo` stays free of torch

    checked = load_recipe(recipe, list(overrides))
    from srppo.pipeline import (
        Run,
    )  # later still: seconds, and a mistake in the recipe is told first

    return Run(checked, source=str(recipe), fresh=fresh, allow_change=allow_change)
