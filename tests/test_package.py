"""The façade: eight verbs and a schema, nothing heavy at import, and what an installer needs to know."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import unmergeable
from unmergeable import attacks, evaluation, merges, ops, protections
from unmergeable.progress import Progress, silent

PACKAGE = Path(unmergeable.__file__).parent
ROOT = PACKAGE.parent.parent


def test_the_public_names_are_those_of_the_api_and_audit() -> None:
    homes = {
        **dict.fromkeys(ops.__all__, ops),
        **dict.fromkeys(("Audit", "audit"), evaluation),
        "register_attack": attacks,
        "register_merge": merges,
        "register_protection": protections,
    }
    assert sorted(unmergeable.__all__) == sorted(homes)
    for name in unmergeable.__all__:
        public = getattr(unmergeable, name)
        assert public == getattr(homes[name], name)
        assert callable(public)
        assert inspect.getdoc(public)


@pytest.mark.parametrize("package", ["attacks", "data", "evaluation", "merges", "protections", "tasks"])
def test_packages_need_no_import_of_their_own(package: str) -> None:
    program = f"import unmergeable; print(unmergeable.{package}.__name__)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == f"unmergeable.{package}"


def test_what_evaluation_exports_is_there() -> None:
    for name in evaluation.__all__:
        assert getattr(evaluation, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'audt'"):
        evaluation.audt  # noqa: B018


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'protectt'"):
        unmergeable.protectt  # noqa: B018
    assert not hasattr(unmergeable, "audits")


LIGHT = [
    "unmergeable",
    "unmergeable.errors",
    "unmergeable.progress",
    "unmergeable.settings",
    "unmergeable.randomness",
    "unmergeable.gauge.key",
    "unmergeable.architecture",
    "unmergeable.checkpoint.index",
    "unmergeable.cli",
]


@pytest.mark.parametrize("module", LIGHT)
def test_import_does_not_load_torch(module: str) -> None:
    assert not loads_torch(module)


def test_torch_would_be_noticed() -> None:
    assert loads_torch("unmergeable.gauge.act")


def loads_torch(module: str) -> bool:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return ran.stdout.strip() == "True"


def test_importing_touches_neither_logging_nor_the_global_generators() -> None:
    program = (
        "import logging, random\n"
        "state, handlers = random.getstate(), list(logging.getLogger().handlers)\n"
        "import unmergeable.randomness, unmergeable.settings\n"
        "assert random.getstate() == state and logging.getLogger().handlers == handlers"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_installed_package_is_this_one() -> None:
    declared = (ROOT / "pyproject.toml").read_text().splitlines()
    assert f'version = "{importlib.metadata.version("unmergeable")}"' in declared
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="unmergeable")
    assert f'unmergeable = "{command.value}"' in declared
    assert (PACKAGE / "py.typed").exists()  # or type checkers ignore every annotation


def test_silence_is_a_progress() -> None:
    report: Progress = silent
    report("verifying", 1, 2, "tensors")
