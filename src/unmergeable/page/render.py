"""Filling in a template."""

from __future__ import annotations

from typing import Any

from unmergeable.errors import UsageError


def render(template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        template: its path inside this package, ``demo/page.html.j2``. Values are escaped unless it says otherwise.
        values: everything the template names; a missing one is an error.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise UsageError("jinja2 is not installed; pip install 'unmergeable[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unmergeable", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)
