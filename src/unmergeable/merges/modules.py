"""What sentence-transformers keeps around networks, in a merge: the template's modules, their layers merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safetensors.torch import load, save
from torch import Tensor

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.modules import MODULES_NAME, is_module_file, module_folders_of
from unmergeable.merges.members import Member

State = dict[str, Tensor]


def merged_modules(
    template: Member,
    models: Sequence[Member],
    merge: Callable[[Sequence[State]], Mapping[str, Tensor]] | None,
    notes: list[str],
) -> dict[str, bytes]:
    """The layers around the template's network, by file, where the merge has others.

    Args:
        template: whose modules the merge has.
        models: what is merged: the base, if it is read, and the experts.
        merge: merges the layers of one module; None where the merge cannot: it learns, or varies from tensor to tensor.
        notes: told of layers that are not merged, and of modules that are left out.
    """
    beside = template.source.index.side_files
    result: dict[str, bytes] = {}
    for name in filter(is_module_file, beside):
        paths = [member.source.index.side_files.get(name) for member in models]
        files = [None if path is None else read_file(path) for path in paths]
        own = read_file(beside[name])
        if all(data == own for data in files):
            continue
        states = [load(data) for data in files if data is not None]
        if merge is None or len(states) < len(files) or not _are_alike(states):
            notes.append(f"{name} is that of {template.role}: it is not merged.")
        else:
            result[name] = save(dict(merge(states)), {"format": "pt"})
    if MODULES_NAME not in beside:
        for member in models:
            if MODULES_NAME in member.source.index.side_files:
                folders = module_folders_of(member.source.index.side_files)
                notes.append(
                    f"{', '.join([MODULES_NAME, *folders])} of {member.role} are left out: {template.role} has none "
                    f"of its own; --template {member.role.removeprefix('expert ')} keeps them."
                )
    return result


def _are_alike(states: Sequence[State]) -> bool:
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    return all(other == shapes[0] for other in shapes)
