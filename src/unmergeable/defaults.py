"""What is done when nothing else is asked for; without imports, so that ``--help`` can say it."""

from collections.abc import Mapping

DEFAULT_METHOD = "gauge"

RELEASE_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "mergelock": {"quantisation": "kept"},
    "params": {"quantisation": "kept"},
    "gauge": {"quantisation": "kept"},
}
"""What a protection is set to where its name is all that is said: most people quantise a model that they download, and
a release must stand that as the original would."""

FREE_SETTINGS = frozenset(
    {"condition", "quantisation_friendly", "rotation", "untie", "as_published", "smallest", "largest"}
)
"""Settings of matrices that a quantised model does not stand: naming one asks for them, and for no setting of above."""


def release_settings(method: str, given: Mapping[str, object]) -> dict[str, object]:
    """The settings ``given`` for a protection, with those of a release where nothing speaks against them."""
    if FREE_SETTINGS.intersection(given):
        return dict(given)
    return {**RELEASE_SETTINGS.get(method, {}), **given}
