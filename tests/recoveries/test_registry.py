"""The registry holds every method of the folder under its own name."""

from __future__ import annotations

import importlib
import pkgutil

from unmergeable import recoveries
from unmergeable.recoveries import RECOVERIES


def test_every_method_of_the_folder_is_registered() -> None:
    modules = [module.name for module in pkgutil.iter_modules(recoveries.__path__)]
    found = {
        value
        for module in modules
        for value in vars(importlib.import_module(f"unmergeable.recoveries.{module}")).values()
        if isinstance(value, type) and "summary" in vars(value)
    }

    assert found == set(RECOVERIES.values())
    for name, method in RECOVERIES.items():
        assert name == method.name == method.__module__.rpartition(".")[2]
        assert "base" in method.needs
