"""The section of a model card that says how a release is protected, what that is worth, and what it does not stop.

Figures and verdicts come from the audits alone: from the one that the owner gives, or else from those that came with
this package, of other models. Nothing secret is in it, and no path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.card import front_matter, with_entries, with_section
from unmergeable.checkpoint.disk import read_file, replace_file
from unmergeable.checkpoint.hub import PREFIX, download_file, is_on_hub, is_repository
from unmergeable.checkpoint.listing import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    Listing,
    list_folder,
)
from unmergeable.checkpoint.manifest import Manifest, read_manifest, record_file
from unmergeable.defaults import RELEASE_SETTINGS
from unmergeable.errors import BadInput, UsageError, shown
from unmergeable.evaluation.cells import digest_of, digest_of_records
from unmergeable.evaluation.report.verdict import as_markdown, caveats, model_card, verdict
from unmergeable.evaluation.results import AuditResult, read_audit
from unmergeable.ops.recorded import earlier_steps
from unmergeable.ops.steps import steps_of
from unmergeable.protections import PROTECTIONS, Protection
from unmergeable.settings import configure, settings_of

SECTION = "protection"
"""What the comments around the section are called."""

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ReleaseCard:
    """The section, and what became of it.

    Attributes:
        text: the section, in Markdown.
        entries: what the front matter should say: ``base_model``, where it is known, and how the release relates to it.
        written: the card it was written to; None where it was not.
        notes: sentences that the owner has to read.
    """

    text: str
    entries: Mapping[str, str]
    written: Path | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "card": self.text,
            "front_matter": dict(self.entries),
            "written": None if self.written is None else str(self.written),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For a terminal: the section itself unless it was written somewhere."""
        shown_here = self.text.splitlines() if self.written is None else [f"Written: {self.written}"]
        return [*shown_here, *self.notes]


@dataclass(frozen=True)
class _Base:
    """A base, as far as it is known: its name on the hub, and the licence that its card names."""

    name: str | None = None
    licence: str | None = None
    link: str | None = None


def release_card(
    out: PathLike,
    *,
    base: PathLike | None = None,
    audit: PathLike | None = None,
    protection: str | None = None,
    repo: str | None = None,
    write: bool = False,
) -> ReleaseCard:
    """Make the section for a release, and write it into its README where ``write`` says so.

    Args:
        out: folder that ``protect`` wrote.
        base: what it was fine-tuned from: ``OWNER/NAME``, or ``hub:OWNER/NAME`` or a folder to read the licence from
            its card as well. None for what the release's own card says.
        audit: folder or ``audit.json`` of an audit of this release, or of its methods on its expert.
        protection: what the audit calls it, where it has several.
        repo: ``OWNER/NAME`` where the release will be.
        write: between two comments in ``out/README.md``, in place of an earlier section; nothing else changes but for
            ``base_model`` and ``base_model_relation``, which are added to its front matter where it has none.

    Raises:
        BadInput: ``out`` is no release, a card cannot be read, or the audit is none, or of something else.
        UsageError: a name is none.
    """
    if repo is not None and not is_repository(repo):
        raise UsageError(f"{shown(repo)} is no name of a repository: write OWNER/NAME.")
    listing = list_folder(Path(out))
    manifest = read_manifest(listing)
    if manifest is None or manifest.details.get("kind") != "protected":
        raise BadInput(f"{out} is no release (its {MANIFEST_NAME} says so); give the folder that `protect` wrote.")
    path = listing.folder / CARD_NAME
    text = _text(listing.file(CARD_NAME).path) if CARD_NAME in listing.files else ""
    said = front_matter(text, str(path))
    origin = _base(base, said, _named_by_adapter(listing))
    relation = "adapter" if listing.is_adapter else "finetune"
    steps = _steps(manifest)
    evidence = (
        None if audit is None else _evidence(read_audit(Path(audit)), steps, protection, _digests(listing, manifest))
    )
    section = "\n".join(_section(listing, manifest, steps, origin, evidence, repo))
    entries = {} if origin.name is None else {"base_model": origin.name, "base_model_relation": relation}
    if write:
        replace_file(path, with_section(with_entries(text, entries, str(path)), SECTION, section, str(path)).encode())
    return ReleaseCard(section + "\n", entries, path if write else None, tuple(_notes(origin, said, entries)))


def _text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text in UTF-8; save it as such.") from None


def _steps(manifest: Manifest) -> list[Mapping[str, Any]]:
    """Method and settings of everything that was done, in order."""
    found: list[Mapping[str, Any]] = []
    for record in (*earlier_steps(manifest), manifest.details):
        recipe = record.get("recipe")
        steps = recipe.get("steps", [recipe]) if isinstance(recipe, dict) else []
        found += [step for step in steps if isinstance(step, dict) and isinstance(step.get("method"), str)]
    return found


def _protection(step: Mapping[str, Any]) -> Protection | None:
    """The method as it was set; None where this version does not know it so."""
    method, settings = PROTECTIONS.get(step["method"]), step.get("settings")
    try:
        return None if method is None else configure(method, settings if isinstance(settings, dict) else {})
    except UsageError:
        return None


def _named(step: Mapping[str, Any]) -> str:
    """A method with the settings that are not its defaults; of one that is not known here, all that there are."""
    settings = step.get("settings")
    known = _protection(step)
    given = dict(settings) if isinstance(settings, dict) else {}
    # Recipes leave out what a method's class has; a release may have something else by itself.
    given |= {name: getattr(known, name) for name in RELEASE_SETTINGS.get(step["method"], {}) if hasattr(known, name)}
    defaults = {} if known is None else {**settings_of(type(known)()), **RELEASE_SETTINGS.get(step["method"], {})}
    changed = [f"{name}={_value(value)}" for name, value in given.items() if defaults.get(name, ...) != value]
    name = f"`{_code(step['method'])}`"
    return f"{name} with `{_code(' '.join(changed))}`" if changed else name


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _named_by_adapter(listing: Listing) -> object:
    """What an adapter says that it was trained on, which may be a folder of its owner's; None for what is none."""
    config = listing.read_json(ADAPTER_CONFIG_NAME) if listing.is_adapter else None
    return config.get("base_model_name_or_path") if isinstance(config, dict) else None


def _base(given: PathLike | None, said: Mapping[str, Any], trained_on: object) -> _Base:
    """The base that was given, or else the one that the release itself names."""
    own = said.get("base_model", trained_on)
    own = own[0] if isinstance(own, list) and len(own) == 1 else own
    own = own if isinstance(own, str) and is_repository(own) else None
    if given is None:
        return _Base(own)
    text = os.fspath(given)
    if is_on_hub(text):
        card = download_file(text, CARD_NAME)
        return _licence(text.removeprefix(PREFIX).partition("@")[0], card)
    if Path(text).is_dir():
        listing = list_folder(Path(text))
        card = listing.file(CARD_NAME).path if CARD_NAME in listing.files else None
        return _licence(_name_in_cache(Path(text)) or own, card)
    if is_repository(text):
        return _Base(text)
    raise BadInput(f"base {text} is no folder and no name; give OWNER/NAME, {PREFIX}OWNER/NAME or a folder.")


def _name_in_cache(folder: Path) -> str | None:
    """``OWNER/NAME`` of a snapshot in the hub's cache, whose folders say it."""
    for parent in folder.resolve().parents:
        kind, _, name = parent.name.partition("--")
        if kind == "models" and is_repository(name.replace("--", "/", 1)):
            return name.replace("--", "/", 1)
    return None


def _licence(name: str | None, card: Path | None) -> _Base:
    if card is None:
        return _Base(name)
    said = front_matter(_text(card), f"the base's {CARD_NAME}")
    words = [said.get(key) for key in ("license", "license_name", "license_link")]
    licence, own_name, link = (str(word) if isinstance(word, str) else None for word in words)
    return _Base(name, own_name if licence in (None, "other") and own_name else licence, link)


def _evidence(
    result: AuditResult, steps: list[Mapping[str, Any]], asked: str | None, digests: frozenset[str]
) -> tuple[AuditResult, bool]:
    """The audit cut down to this release, and whether it was of the release itself and not of its methods.

    ``digests``: of the release's folder, as audits record what they read.

    Raises:
        BadInput: it has none that is this one, or several.
    """
    entries = {str(entry.get("name")): entry for entry in _entries(result.plan)}
    fitting = [
        name
        for name in result.audited
        if asked in (None, name)
        and (_is_of(entries[name], result, digests) if "checkpoint" in entries.get(name, {}) else False)
    ]
    is_release = bool(fitting)
    fitting = fitting or [
        name
        for name in result.audited
        if asked in (None, name)
        and name in entries
        and "method" in entries[name]
        and _are_made_by(entries[name], steps)
    ]
    if len(fitting) != 1:
        methods = ", ".join(step["method"] for step in steps)
        known = ", ".join(result.audited)
        if fitting:
            raise BadInput(f"the audit has {', '.join(fitting)} for this release; say which with --protection.")
        raise BadInput(
            f"the audit is not of this release, nor of {methods} with its settings (it has {known}); give the audit "
            "that is, or leave out --audit."
        )
    (name,) = fitting
    return replace(result, protections={name: result.audited[name]}), is_release


def _entries(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    protect = plan.get("protect")
    methods = protect.get("methods") if isinstance(protect, dict) else None
    for entry in methods if isinstance(methods, list) else ():
        if isinstance(entry, str):
            yield {"name": entry, "method": entry}
        elif isinstance(entry, dict):
            yield {"name": entry.get("method"), **entry}


def _is_of(entry: Mapping[str, Any], result: AuditResult, digests: frozenset[str]) -> bool:
    name = Path(str(entry["checkpoint"])).name
    read = [result.digests[name]] if name in result.digests else result.digests.values()
    return not digests.isdisjoint(read)


def _digests(listing: Listing, manifest: Manifest) -> frozenset[str]:
    """What an audit records of this folder: as it is, and as it was before its card was edited."""
    own = record_file(listing.file(MANIFEST_NAME).path, MANIFEST_NAME)
    return frozenset((digest_of(listing.folder), digest_of_records([*manifest.outputs, own])))


def _are_made_by(entry: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> bool:
    """Whether an entry of a plan applies the methods of this release, with the same settings."""
    names = [name.strip() for name in str(entry["method"]).split(",")]
    if names != [step["method"] for step in steps]:
        return False
    settings = entry.get("settings")
    try:
        wanted = [
            single
            for step in steps_of(names, settings if isinstance(settings, dict) else {})
            for single in (protection.recipe() for protection in step.single)
        ]
    except UsageError:
        return False
    return bool(
        json.loads(json.dumps(wanted)) == [{key: step.get(key) for key in ("method", "settings")} for step in steps]
    )


def _section(
    listing: Listing,
    manifest: Manifest,
    steps: list[Mapping[str, Any]],
    base: _Base,
    evidence: tuple[AuditResult, bool] | None,
    repo: str | None,
) -> Iterator[str]:
    yield "## Protection against merging"
    yield ""
    done = ", then ".join(map(_named, steps)) or "a method that is not known"
    yield f"The weights of this model were changed by {done} (unmergeable {_code(manifest.tool_version)})."
    yield from _exactness(manifest)
    yield ""
    yield "### What it is worth"
    yield ""
    yield from _worth(manifest, steps, evidence)
    yield ""
    yield "### What it does not stop"
    yield ""
    yield from _not_stopped(manifest)
    yield ""
    yield "### Base model and licence"
    yield ""
    yield from _origin(base, "adapter" if listing.is_adapter else "finetune")
    yield ""
    yield "### Use"
    yield ""
    yield from _use_of_adapter(repo or "OWNER/NAME") if listing.is_adapter else _use(listing, repo or "OWNER/NAME")
    yield from _for_the_owner(manifest, repo or "OWNER/NAME")


def _exactness(manifest: Manifest) -> Iterator[str]:
    measured = manifest.details.get("measured")
    error = measured.get("largest_block_error") if isinstance(measured, dict) else None
    if isinstance(measured, dict) and isinstance(measured.get("product_error"), float):
        yield (
            f"It is an adapter in another basis of its rank: what it adds to the base moved by "
            f"{measured['product_error']:.1e}, relative, which is rounding."
        )
        return
    if isinstance(error, float) and not earlier_steps(manifest):
        yield (
            f"It computes what the model computed before, up to rounding: the largest relative difference of a block "
            f"was {error:.1e}, measured on the stored weights."
        )
    elif "key_fingerprint" not in manifest.details:
        yield "This changes what the model computes."


def _worth(
    manifest: Manifest, steps: list[Mapping[str, Any]], evidence: tuple[AuditResult, bool] | None
) -> Iterator[str]:
    if evidence is None:
        yield "This release was not audited. Of the methods this is known, from audits of other models:"
        yield ""
        for step in steps:
            known = _protection(step)
            if known is None:
                note = manifest.details.get("note")
                said = f" {as_markdown(note)}" if isinstance(note, str) else ""
                yield f"* No audit that comes with unmergeable says what {_named(step)} stops.{said}"
            else:
                yield f"* {as_markdown(known.limits)}"
        return
    result, is_release = evidence
    ((name, protection),) = result.audited.items()
    what = "this release" if is_release else "these methods, with these settings, under keys of the audit's own"
    yield f"Audited: {what}."
    yield ""
    if result.passed:
        yield as_markdown(verdict(name, protection))
        yield ""
        for line in caveats(protection):
            yield f"* {as_markdown(line)}"
    yield ""
    yield model_card(result).rstrip("\n")


def _not_stopped(manifest: Manifest) -> Iterator[str]:
    if "key_fingerprint" in manifest.details:
        yield (
            "* Somebody who holds the base model and knows the method finds the way back without the key "
            "(`unmergeable recover`)."
        )
    yield "* Anybody can use the model, train it further, and train another model on its answers."
    yield "* What was ever published without the protection still merges."
    if manifest.details.get("key_from_public_seed") is True:
        yield "* **The key was drawn from a public seed: anybody can make it again.**"


def _origin(base: _Base, relation: str) -> Iterator[str]:
    if base.name is None:
        yield "The base model is not named here."
    else:
        yield f"Fine-tuned from [{base.name}](https://huggingface.co/{base.name}) (`base_model_relation: {relation}`)."
    if base.licence is None:
        yield "Read the licence of the base: its terms may go with this model. A protection changes none of them."
        return
    link = f" ({as_markdown(base.link)})" if base.link else ""
    yield (
        f"Licence of the base, as its card says: `{_code(base.licence)}`{link}. Its terms may go with this model; a "
        "protection changes none of them."
    )


def _use(listing: Listing, repo: str) -> Iterator[str]:
    config = listing.read_config() if CONFIG_NAME in listing.files else {}
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    maps = config.get("auto_map")
    if not name.isidentifier():
        yield f"Load `{repo}` as you would the base model; it needs no code and no key."
        yield ""
        return
    needs_code = isinstance(maps, dict) and bool(maps)
    classes = [key for key in maps if str(key).startswith("AutoModel")] if isinstance(maps, dict) else []
    loader = str(classes[-1]) if needs_code and classes and str(classes[-1]).isidentifier() else name
    yield "```python"
    yield f"from transformers import {loader}"
    yield ""
    code = ", trust_remote_code=True" if needs_code else ""
    yield f'model = {loader}.from_pretrained("{repo}"{code})'
    yield "```"
    yield ""
    if needs_code:
        yield "It comes with code of its own, in this repository; read it before you run it."
        yield ""


def _use_of_adapter(repo: str) -> Iterator[str]:
    yield "```python"
    yield "from peft import PeftModel"
    yield ""
    yield f'model = PeftModel.from_pretrained(base, "{repo}")  # base: the base model, loaded as usual'
    yield "```"
    yield ""


def _for_the_owner(manifest: Manifest, repo: str) -> Iterator[str]:
    signer = manifest.signature.get("public_key") if manifest.signature is not None else None
    if signer is not None:
        yield "Whether the files are those that were protected (get the public key from the owner by another way):"
        yield ""
        yield "```"
        yield f"unmergeable verify {PREFIX}{repo} --manifest --public-key {_code(str(signer))}"
        yield "```"
        yield ""
    fingerprint = manifest.details.get("key_fingerprint")
    if isinstance(fingerprint, str):
        yield f"Whoever holds the key (fingerprint `{_code(fingerprint[:8])}`) gets the weights before the protection:"
        yield ""
        yield "```"
        yield f"unmergeable restore {PREFIX}{repo} --key KEY --out restored"
        yield "```"
    else:
        yield "There is no key: the weights before the protection are with their owner alone."


def _notes(base: _Base, said: Mapping[str, Any], entries: Mapping[str, str]) -> Iterator[str]:
    if base.name is None:
        yield "The base has no name here: give --base OWNER/NAME, or write base_model into the front matter."
    for name, value in entries.items():
        own = said.get(name, value)
        if own != value and own != [value]:
            yield f"Warning: the card says {name}: {shown(own)} and not {value}, and was left so; look which is right."
    own = said.get("license_name") if said.get("license") in (None, "other") else said.get("license")
    if own is None:
        yield "Warning: the card names no licence: write `license:` into its front matter."
    elif base.licence is not None and own != base.licence:
        yield f"Warning: the card says license: {shown(own)}, the base's {base.licence}; look whether that is allowed."
