"""Packages that are imported when they are needed, and kept quiet while they work."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unmergeable.errors import UsageError


def optional_package(name: str, extra: str) -> Any:
    """A package that is imported when it is needed, and installed by ``extra``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"{name.replace('_', '-')} is not installed; pip install 'unmergeable[{extra}]'") from None


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Silence the log, progress bars and warnings of transformers or diffusers; afterwards all is as before."""
    log = library.utils.logging
    level, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if has_bars:
            log.enable_progress_bar()
