"""The engines' own code where it is installed, a transcript of it where it is not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import srppo

ENGINES = Path(__file__).parents[1] / ".engines"
PLUGINS = Path(srppo.__file__).parent / "plugins"


def use(monkeypatch, name: str, **content: object) -> None:
    """A module of that name, its parents included, with this content."""
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        module = ModuleType(part)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, part, module)
    for key, value in content.items():
        setattr(module, key, value)


def use_wheels(monkeypatch, package: str) -> None:
    """That package, as `make engines` has installed it; the project's own packages come first."""
    if not (ENGINES / package).is_dir():
        pytest.skip(f"{package} is not installed: make engines")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ENGINES)])


def fresh(monkeypatch, name: str) -> ModuleType:
    """A plugin, imported anew: what it derives from depends on the test."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # so that it is forgotten afterwards
    return module
