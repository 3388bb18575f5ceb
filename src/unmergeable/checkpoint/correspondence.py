"""Which tensor of one checkpoint is which of another: the same network under the names that another tool gave it.

Names are compared as they are first, then as old files from TensorFlow have them (``gamma`` for ``weight``), and last
under another prefix: ``bert.`` or none, ``language_model.model.`` or ``model.language_model.``. Prefixes are learnt
from the names themselves: the pair of prefixes under which most tensors of equal shape meet is taken first, and a later
pair may not tear apart what an earlier one maps as a whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

Shapes = Mapping[str, tuple[int, ...]]

_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}
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
    accepted: list[_Prefixes] = []
    unmatched, remaining = dict(open_names), dict(left)
    for ours, theirs in _candidates(unmatched, remaining, shapes):
        if any(_tears(ours, theirs, earlier) for earlier in accepted):
            continue
        pairs = {name: other for name in unmatched if (other := _moved(_modern(name), ours, theirs)) in remaining}
        if pairs:
            accepted.append((ours, theirs))
            found |= {name: remaining[other] for name, other in pairs.items()}
            for name, other in pairs.items():
                unmatched.pop(name)
                remaining.pop(other, None)
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


def _moved(name: str, ours: str, theirs: str) -> str | None:
    if not _lies_in(name, ours):
        return None
    suffix = name[len(ours) :].removeprefix(".")
    return f"{theirs}.{suffix}" if theirs else suffix


def _tears(ours: str, theirs: str, earlier: _Prefixes) -> bool:
    """Whether a pair of prefixes maps part of what ``earlier`` maps, and elsewhere."""
    return _lies_in(ours, earlier[0]) != _lies_in(theirs, earlier[1])


def _lies_in(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def further_names(other: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """The tensors that have no counterpart, in their order."""
    taken = set(found.values())
    return [name for name in other if name not in taken]
