"""Which tensor of one checkpoint is which of another: the same network under the names that another tool gave it.

Names are compared as they are first, then as old files have them (``gamma`` for ``weight`` from TensorFlow,
``weight_g`` for the length of a normed weight from PyTorch before 2.0), and last under another prefix: ``bert.`` or
none, ``language_model.model.`` or ``model.language_model.``. Prefixes are learnt from the names themselves: the pair of
prefixes under which most tensors of equal shape meet is taken first, and a later pair may not map to elsewhere what an
earlier one maps as a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from unmergeable.checkpoint.spare import is_output_head

Shapes = Mapping[str, tuple[int, ...]]

_OLD_ENDINGS = {
    "gamma": "weight",
    "beta": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
_SHORTEST_SUFFIX = 2
"""Components that names must share behind another prefix: ``weight`` alone says nothing."""

_Prefixes = tuple[str, str]


def corresponding_names(template: Shapes, other: Shapes) -> dict[str, str]:
    """For each tensor of ``template`` that ``other`` has too, its name there, in the order of ``template``.

    Only names and shapes are compared, and shapes only to tell prefixes apart: a tensor that is found may have another
    shape.
    """
    found = {name: name for name in template if name in other}
    open_names = [name for name in template if name not in found]
    left = {name for name in other if name not in found}
    if open_names and left:
        modern = {_modern(name): name for name in left}
        found |= {name: modern[_modern(name)] for name in open_names if _modern(name) in modern}
        taken = set(found.values())
        open_names = [name for name in open_names if name not in found]
        left -= taken
        found |= _under_other_prefixes(
            {name: template[name] for name in open_names}, {_modern(name): name for name in sorted(left)}, other
        )
    return {name: found[name] for name in template if name in found}


def _modern(name: str) -> str:
    """The name with endings as PyTorch has them."""
    module, _, ending = name.rpartition(".")
    return f"{module}.{_OLD_ENDINGS.get(ending, ending)}" if module else name


def _under_other_prefixes(open_names: Shapes, left: Mapping[str, str], shapes: Shapes) -> dict[str, str]:
    """The rest of the pairs, one pair of prefixes after the other; ``left`` maps names as compared to those stored."""
    found: dict[str, str] = {}
    modules: set[_Prefixes] = set()
    unmatched, remaining = dict(open_names), dict(left)
    for prefixes in _candidates(unmatched, remaining, shapes):
        pairs = {name: other for name in unmatched if (other := _moved(_modern(name), prefixes)) in remaining}
        moved = {_modules(_modern(name), prefixes) for name in pairs}
        if not pairs or not _belongs(prefixes, pairs, modules) or any(_tears(pair, modules) for pair in moved):
            continue
        modules |= moved
        for name, other in pairs.items():
            unmatched.pop(name)
            found[name] = remaining.pop(other)
    return found


def _candidates(unmatched: Shapes, remaining: Mapping[str, str], shapes: Shapes) -> list[_Prefixes]:
    """Pairs of prefixes, those first under which most tensors of one shape meet, then the shortest."""
    by_suffix: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, stored in remaining.items():
        for prefix, suffix in _splits(name):
            by_suffix[suffix].append((prefix, stored))
    votes: Counter[_Prefixes] = Counter()
    for name, shape in unmatched.items():
        for prefix, suffix in _splits(_modern(name)):
            for theirs, stored in by_suffix.get(suffix, ()):
                if shapes[stored][1:] == shape[1:]:  # rows may be more: a vocabulary that grew
                    votes[prefix, theirs] += 1
    return sorted(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a name in a prefix, which ends before the first number, and the rest."""
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    for place in range(min(numbered, len(parts) - _SHORTEST_SUFFIX) + 1):
        yield ".".join(parts[:place]), ".".join(parts[place:])


def _moved(name: str, prefixes: _Prefixes) -> str | None:
    ours, theirs = prefixes
    if not _lies_in(name, ours):
        return None
    return _joined(theirs, _behind(name, ours))


def _modules(name: str, prefixes: _Prefixes) -> _Prefixes:
    """The first module behind the prefixes, under both names: what a pair of prefixes maps as a whole."""
    ours, theirs = prefixes
    module = _behind(name, ours).partition(".")[0]
    return _joined(ours, module), _joined(theirs, module)


def _belongs(prefixes: _Prefixes, names: Iterable[str], modules: Iterable[_Prefixes]) -> bool:
    """Whether these tensors speak for a pair of prefixes: layers and heads do, others only with what was mapped so."""
    if any(part.isdigit() for name in names for part in name.split(".")) or all(map(is_output_head, names)):
        return True
    return any(_joined(prefixes[1], _behind(ours, prefixes[0])) == theirs for ours, theirs in modules)


def _tears(module: _Prefixes, modules: Iterable[_Prefixes]) -> bool:
    """Whether a module is mapped elsewhere than what it is part of, or than a part of it."""
    return any(
        _lies_in(inner[0], outer[0]) != _lies_in(inner[1], outer[1])
        for other in modules
        for inner, outer in ((module, other), (other, module))
    )


def _joined(prefix: str, rest: str) -> str:
    return f"{prefix}.{rest}" if prefix and rest else prefix or rest


def _behind(name: str, prefix: str) -> str:
    return name[len(prefix) :].removeprefix(".") if _lies_in(name, prefix) else name


def _lies_in(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def further_names(other: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """The tensors that have no counterpart, in their order."""
    taken = set(found.values())
    return [name for name in other if name not in taken]
