"""The tree of errors is what its docstring draws, and nothing else is raised on purpose."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path

import pytest

import unmergeable
from unmergeable import errors
from unmergeable.errors import UnmergeableError

SOURCE = Path(unmergeable.__file__).parent
CLASSES = {
    name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, BaseException)
}
EXIT_CODES = {
    "UnmergeableError": 1,
    "DiskError": 1,
    "UsageError": 2,
    "BadInput": 3,
    "CheckpointError": 3,
    "UnsupportedArchitecture": 3,
    "Mismatch": 3,
    "NotEquivalent": 4,
    "KeyFileError": 5,
}


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Parent and exit code of each error, read off the drawing in the module's docstring."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^( {4}[│├└─ ]*)([A-Z]\w+)\s+(\d )?", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < depth]
        code = int(match[3]) if match[3] else above[-1][2]
        tree[name] = (above[-1][1] if above else None, code)
        above.append((depth, name, code))
    return tree


def test_the_drawing_shows_every_error_with_its_parent_and_exit_code() -> None:
    declared = {
        name: (None if kind is UnmergeableError else kind.__bases__[0].__name__, kind.exit_code)
        for name, kind in CLASSES.items()
    }
    assert drawn_tree() == declared


def test_exit_codes_are_the_ones_of_the_command_line() -> None:
    assert {name: kind.exit_code for name, kind in CLASSES.items()} == EXIT_CODES


@pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda kind: kind.__name__)
def test_an_error_is_its_message(kind: type[UnmergeableError]) -> None:
    assert issubclass(kind, UnmergeableError)
    assert kind.__doc__
    with pytest.raises(UnmergeableError) as caught:
        raise kind("tensor x is missing; is the checkpoint complete?")
    assert str(caught.value) == "tensor x is missing; is the checkpoint complete?"


# Raised where the language asks for it, or caught a few lines further down and turned into an error of ours.
BUILTIN_ON_PURPOSE = {
    "__init__.py": {"AttributeError"},
    "evaluation/__init__.py": {"AttributeError"},
    "checkpoint/manifest.py": {"TypeError"},  # of a field of another type; readers turn it into CheckpointError
    "evaluation/records.py": {"KeyError", "TypeError"},  # of a field that is missing or another; BadInput for readers
    "evaluation/results.py": {"ValueError"},  # of numbers that do not fit together; BadInput for readers
    "evaluation/packing.py": {"ValueError"},
    "evaluation/plans/plan.py": {"NotImplementedError"},  # of a method that a subclass has
    "memory.py": {"AssertionError"},
    "settings.py": {"ValueError"},
    "polynomials/modeling_polynomial.py": {"AttributeError"},  # runs where this package is not installed
    "gauge/activations.py": {"KeyError"},  # of a table that is empty for networks without a stream
    "gauge/key.py": {"ValueError"},
    "cli/app.py": {"KeyboardInterrupt"},
    # of methods that a subclass has
    "protections/base.py": {"NotImplementedError"},
    "protections/controls.py": {"NotImplementedError"},
    "protections/exact.py": {"NotImplementedError"},
    "protections/polynomial.py": {"NotImplementedError"},
    "protections/trained.py": {"NotImplementedError"},
}


def builtins_raised(source: str) -> set[str]:
    """Names of the built-in exceptions that a module raises."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            kind = getattr(builtins, raised.id, None) if isinstance(raised, ast.Name) else None
            if inspect.isclass(kind) and issubclass(kind, BaseException):
                found.add(kind.__name__)
    return found


def test_modules_raise_errors_of_the_tree_only() -> None:
    modules = sorted(SOURCE.rglob("*.py"))
    assert len(modules) > 20
    for module in modules:
        name = module.relative_to(SOURCE).as_posix()
        assert builtins_raised(module.read_text()) <= BUILTIN_ON_PURPOSE.get(name, set()), name


def test_a_builtin_error_would_be_noticed() -> None:
    assert builtins_raised("def f(x):\n    raise RuntimeError(x)") == {"RuntimeError"}
    assert builtins_raised("def f():\n    raise TypeError") == {"TypeError"}
    assert builtins_raised("from unmergeable.errors import BadInput\nraise BadInput('x')") == set()


def test_written_messages_are_one_line() -> None:
    for module in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            if name not in CLASSES:
                continue
            texts = [leaf.value for leaf in ast.walk(node.exc) if isinstance(leaf, ast.Constant)]
            assert not any(isinstance(text, str) and "\n" in text for text in texts), f"{module}:{node.lineno}"
