"""``chat_template`` of a configuration: the one that most models have, one of mergekit's by its name, or a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput

FILE_NAME = "chat_template.jinja"


def chat_template_of(named: str, models: Iterable[TensorSource]) -> str | None:
    """The template that a configuration asks for; None for ``auto`` where no model has one.

    Of templates that equally many models have, the one of the model listed first is taken.

    Raises:
        BadInput: it is no template, nor the name of one that mergekit has.
    """
    if named == "auto":
        found = Counter(template for model in models if (template := stored_template(model)) is not None)
        return found.most_common(1)[0][0] if found else None
    if "{" in named:
        return named
    folder = _mergekits()
    path = None if folder is None else folder / f"{named}.jinja"
    if path is not None and "/" not in named and path.is_file():
        return path.read_text(encoding="utf-8")
    if folder is None:
        known = "names are those of mergekit's templates: pip install 'unmergeable[mergekit]', or write the text itself"
    else:
        known = f"mergekit has {', '.join(sorted(file.stem for file in folder.glob('*.jinja')))}"
    raise BadInput(f"chat_template: {named!r} is neither auto nor a template in Jinja; {known}.")


def stored_template(model: TensorSource) -> str | None:
    """The chat template among a model's files: the default one, without space around it."""
    files = model.index.side_files
    if FILE_NAME in files:
        return read_file(files[FILE_NAME]).decode().strip() or None
    if "tokenizer_config.json" not in files:
        return None
    try:
        template = json.loads(read_file(files["tokenizer_config.json"])).get("chat_template")
    except (ValueError, AttributeError):
        raise BadInput(f"tokenizer_config.json of {model.description} is no JSON object; download it again.") from None
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template.strip() or None if isinstance(template, str) else None


def _mergekits() -> Path | None:
    """The folder of mergekit's own templates, where it is installed; it is not imported."""
    spec = find_spec("mergekit")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (folder := Path(place) / "_data" / "chat_templates").is_dir():
            return folder
    return None
