"""revert_to_base: put the base's tensors where a protection changed the network's structure.

The simplest answer to protections that replace layers by something else (MergeBarrier, arXiv 2511.10712, and TaylorMLP,
arXiv 2410.05331, replace feed-forwards by polynomials): the result has the base's configuration and the base's tensors,
except those that the protected checkpoint still holds under the same name, in the same shape and dtype. What the
expert learnt in the replaced layers is lost; what it learnt elsewhere merges again.

``tensors`` reverts more, whether or not their structure changed: whatever its pattern finds in a tensor's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch, UsageError
from unmergeable.polynomials.layout import names_on_disk
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class RevertToBase:
    """``tensors``: a regular expression, searched in names; empty for none."""

    name: ClassVar[str] = "revert_to_base"
    summary: ClassVar[str] = "the base's tensors in place of layers whose structure was changed"

    tensors: str = ""

    def validate(self) -> None:
        """Raises UsageError where ``tensors`` is no regular expression."""
        try:
            re.compile(self.tensors)
        except re.error as error:
            raise UsageError(f"revert_to_base: tensors is no regular expression ({error}): {self.tensors!r}.") from None

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",), structure="any")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Decides for every tensor of the base, from names and shapes alone.

        Raises:
            Mismatch: when no tensor of the protected checkpoint can be kept.
            UsageError: when none is to be reverted.
        """
        protected, base = inputs.protected, inputs.base
        held = names_on_disk(protected.config, protected.description, protected.names)
        same = [name for name in base.names if name in held and protected.spec(held[name]) == base.spec(name)]
        kept = [name for name in same if not self.tensors or re.search(self.tensors, name) is None]
        if not kept:
            raise Mismatch(f"{protected.description} holds no tensor of {base.description} to keep; give its base.")
        if len(kept) == len(base.names):
            raise UsageError(
                f"revert_to_base: every tensor of {base.description} is in {protected.description} unchanged in shape: "
                "say which to revert with tensors=PATTERN."
            )
        edits = {name: partial(_taken_from, protected, held[name]) for name in kept}
        return Recovered(base, edits, {"tensors_kept": len(kept), "tensors_reverted": len(base.names) - len(kept)})


def _taken_from(source: TensorSource, name: str, tensor: Tensor) -> Tensor:
    return source.tensor(name)


revert_to_base = in_memory(RevertToBase)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
