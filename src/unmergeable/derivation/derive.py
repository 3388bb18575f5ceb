"""From a specimen to its proven blocks, and the reasons for what is left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from unmergeable.architecture.blocks import Attention, FeedForward, Mixture
from unmergeable.architecture.rules import symmetry_map
from unmergeable.architecture.symmetry import Role
from unmergeable.derivation import attentions
from unmergeable.derivation.build import Specimen
from unmergeable.derivation.feed_forwards import feed_forward, mixtures
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Proof, Prover
from unmergeable.derivation.scene import Scene, Unexplained, layer_of
from unmergeable.derivation.watch import AttentionCall, watch

NO_ATTENTION = "attention in the network"
"""What the reason is given for that a network has none."""

Block = Attention | FeedForward
AnyBlock = TypeVar("AnyBlock", Attention, FeedForward)


@dataclass
class Derivation:
    """Blocks whose every group is proven, and why other places have none.

    ``proofs`` are by the name of the space; of blocks that differ in their layer's number alone, the first was tried
    by itself. ``joint`` is the change of the outputs when every group of every block acts at once.
    """

    blocks: list[Block] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    proofs: dict[str, Proof] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    joint: float = 0.0


def without_numbers(text: str) -> str:
    """A tensor's name with ``{}`` in place of the numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", text)


def derive(specimen: Specimen) -> Derivation:
    """Watch a network, propose its blocks and prove them."""
    found = _Search(specimen, share=True).run()
    if found.joint > TOLERANCE:  # blocks of one form differ, and each has to be proven by itself
        found = _Search(specimen, share=False).run()
    if found.joint > TOLERANCE:
        found.reasons["everything at once"] = f"changes the function by {found.joint:.1e}"
        found.blocks, found.mixtures = [], []
    return found


def _epsilon(specimen: Specimen) -> float:
    """That of the network's norms, as its config gives it."""
    names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
    return next((float(specimen.config[name]) for name in names if specimen.config.get(name)), 1e-6)


class _Search:
    def __init__(self, specimen: Specimen, *, share: bool) -> None:
        self.share = share
        disk = Disk(specimen.network)
        self.scene = Scene(watch(specimen), disk)
        self.prover = Prover(specimen, disk)
        self.epsilon = _epsilon(specimen)
        self.result = Derivation()
        self._verdicts: dict[str, tuple[str, ...]] = {}

    def run(self) -> Derivation:
        for call in self.scene.trace.attentions:
            where = layer_of(self.scene.trace.products[call.position - 1].name)
            try:
                self._add(self._attention_either_way(call))
            except Unexplained as reason:
                self.result.reasons[f"attention in {where}"] = str(reason)
        if not self.scene.trace.attentions:
            convolutions = "; the network has convolutions" if self.scene.trace.convolutions else ""
            self.result.reasons[NO_ATTENTION] = f"no softmax over products of queries and keys was seen{convolutions}"
        taken = {
            (output.weight, place)
            for block in self.result.blocks
            if isinstance(block, Attention)
            for output in block.outputs
            for place in range(output.offset, output.offset + block.num_heads * block.value_size)
        }
        for index, product in enumerate(self.scene.trace.products):
            named = {block.name: block.up.weight for block in self.result.blocks if isinstance(block, FeedForward)}
            try:
                self._add(self._first_proven(feed_forward(self.scene, index, taken, named), "feed_forward"))
            except Unexplained as reason:
                self.result.reasons[product.name] = str(reason)
        for mixture in mixtures(self.result.blocks, self.scene.disk):
            try:
                self.result.mixtures.append(self._mixture(mixture))
            except Unexplained as reason:
                self.result.reasons[f"experts of {mixture.name}"] = str(reason)
        symmetry = symmetry_map(self.result.blocks, mixtures=self.result.mixtures)
        every = symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
        self.result.joint = self.prover.together(symmetry, every)
        return self.result

    def _add(self, block: Block) -> None:
        if block.name not in {other.name for other in self.result.blocks}:
            self.result.blocks.append(block)

    def _attention_either_way(self, call: AttentionCall) -> Attention:
        """The block of an attention, whichever of the two axes before tokens counts its heads."""
        try:
            return self._attention(call)
        except Unexplained:
            if call.turned is None:
                raise
            return self._attention(call.turned)

    def _attention(self, call: AttentionCall) -> Attention:
        block = self._first_proven(attentions.attention(self.scene, call), "value_output")
        try:
            options = (
                replace(block, parts=parts, norm=norm, joined=joined, heads_limit="")
                for parts, norm, joined in attentions.scores(self.scene, call, block, self.epsilon)
            )
            scored = self._first_proven(options, "query_key")
        except Unexplained as reason:
            self.result.reasons[f"queries and keys of {block.name}"] = str(reason)
            return block
        scored = replace(scored, position="rotary" if any(part.rotary for part in scored.parts) else "none")
        try:
            return self._first_proven([scored], "heads") if scored.groups > 1 else scored
        except Unexplained:
            return replace(scored, heads_limit="reordering heads changes the function")

    def _mixture(self, mixture: Mixture) -> Mixture:
        """The mixture, if its experts may be reordered."""
        symmetry = symmetry_map((), mixtures=[mixture])
        for name, space in symmetry.spaces.items():
            proof = self.prover.prove(symmetry, space)
            if not proof.holds:
                raise Unexplained(f"not proven; {proof}")
            self.result.proofs[name] = proof
        return mixture

    def _first_proven(self, options: Iterable[AnyBlock], role: Role) -> AnyBlock:
        """The first proposal whose groups of a role are all proven."""
        tried: list[str] = []
        for block in options:
            key = f"{role} {without_numbers(re.sub(r'slice=[0-9]+', 'slice=', repr(block)).replace(chr(39), '.'))}"
            if key not in self._verdicts or not self.share:
                self._verdicts[key] = self._failures(block, role)
            if not self._verdicts[key]:
                return block
            tried += self._verdicts[key]
        raise Unexplained("; ".join(["not proven", *tried]))

    def _failures(self, block: Block, role: Role) -> tuple[str, ...]:
        """What speaks against a group of this role; the proofs are kept where nothing speaks against any."""
        symmetry = symmetry_map([block])
        proofs: dict[str, Proof] = {}
        for name, space in symmetry.select(role).items():
            proofs[name] = self.prover.prove(symmetry, space)
            if not proofs[name].holds:
                return (f"{name.rsplit('.', 1)[-1]}: {proofs[name]}",)
        self.result.proofs |= proofs
        return ()
