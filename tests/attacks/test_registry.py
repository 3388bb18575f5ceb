"""The registry holds every method of the folder under its own name."""

from __future__ import annotations

import importlib
import pkgutil

from unmergeable import attacks
from unmergeable.attacks import ATTACKS


def test_every_method_of_the_folder_is_registered() -> None:
    modules = [module.name for module in pkgutil.iter_modules(attacks.__path__)]
    found = {
        value
        for module in modules
        for value in vars(importlib.import_module(f"unmergeable.attacks.{module}")).values()
        if isinstance(value, type) and "summary" in vars(value)
    }

    assert found == set(ATTACKS.values())
    for name, method in ATTACKS.items():
        assert name == method.name == method.__module__.rpartition(".")[2]
        assert "base" in method().requirements().needs
