"""An adapter (peft) merged into its base while it is read.

What is read equals what peft's ``merge_and_unload``, saving and loading gives, for every kind that stores a sum with
weights of the base or their replacement: LoRA with its patterns, rank-stabilised LoRA (arXiv:2312.03732), DoRA, AdaLoRA
(arXiv:2303.10512), LoHa, LoKr, VeRA, trained tokens, norms, modules that were saved whole, and parameters of stacked
experts. Sums are computed in float64 in blocks of rows and rounded once to the base's dtype; what the adapter leaves
alone comes from the base byte for byte.

Anything else is refused with the reason, and so is what peft itself merges into something that does not compute what
the adapter computes.

    settings    what ``adapter_config.json`` says          keys      what belongs to which module
    file        the tensors                                 names     modules in memory against tensors on disk
    updates     the formulas                                skeleton  the network without its weights
    matching    which tensor becomes what                   heads     tied weights, heads of other tasks
    merged      the result as a source
"""

from unmergeable.checkpoint.adapter.merged import BASE_HAS_ONE, AdaptedCheckpoint, combine_side_files
from unmergeable.checkpoint.adapter.settings import AdapterSettings
from unmergeable.checkpoint.adapter.updates import add_low_rank

__all__ = ["BASE_HAS_ONE", "AdaptedCheckpoint", "AdapterSettings", "add_low_rank", "combine_side_files"]
