"""Controls on disk: the expert changed in a way that protects nothing, for an audit to find that out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.manifest import Manifest
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.errors import UsageError
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.ops.workers import one_thread_per_kernel
from unmergeable.progress import Progress, silent
from unmergeable.protections import CONTROLS
from unmergeable.randomness import Stream
from unmergeable.settings import configure, nearest, settings_of


@one_thread_per_kernel()
def write_control(
    expert: Path,
    *,
    base: Path,
    out: Path,
    method: str,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write ``expert`` to ``out`` as the control ``method`` changes it.

    Tensors that the base lacks or holds in another shape (an output head of another task), and tensors that are not
    floating point, are copied.

    Raises:
        UsageError: no such control, or a setting out of range.
        BadInput: the checkpoints cannot be used, or ``out`` exists.
    """
    if method not in CONTROLS:
        raise UsageError(f"no control is called {method!r}{nearest(method, CONTROLS)}")
    control = configure(CONTROLS[method], settings or {})
    source, architecture = open_with_architecture(expert)
    origin = open_base(base, source, architecture)
    stream = Stream.from_seed(seed).child(f"control.{method}")

    def edit(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: control.edit(tensor, origin.tensor(name), stream.child(name))

    shared = set(origin.names)
    edits = {
        name: edit(name)
        for name in source.names
        if name in shared
        and origin.spec(name).shape == source.spec(name).shape
        and torch_dtype(source.spec(name).dtype).is_floating_point
    }
    recipe = {"method": method, "settings": settings_of(control), "seed": seed}
    return rewrite(
        source,
        out,
        output_like(source, edits),
        manifest={"kind": "control", "recipe": recipe, "architecture": architecture.family},
        resume_token=f"control {recipe}",
        also_read={"base": origin},
        threads=threads,
        progress=progress,
    )
