"""``soup``: the average of those experts that make it better on held-out data (greedy soup, arXiv 2203.05482).

Experts are fine-tunes of one base on one task. The best of them starts the soup; the others, in the order of their
validation scores, join the average as long as the score of the average does not fall (recipe 1 of the paper). What is
written is

    theta = mean of theta_i over the experts in the soup

Here an expert outside it has the coefficient 0. Without data every expert is in: the paper's uniform soup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from unmergeable.merges.base import Inputs, TensorMerge, TermsOf, positive_coefficients
from unmergeable.merges.fisher import require_examples
from unmergeable.merges.linear import Linear


@dataclass(frozen=True)
class Soup:
    """``examples`` is the most that are read of each data set; they are labelled, and not those trained on."""

    name: ClassVar[str] = "soup"
    needs_base: ClassVar[bool] = False
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {}

    examples: int = 1000
    seed: int = 0

    def validate(self) -> None:
        require_examples(self.examples)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """1 for the experts in the soup, 0 for the others; 1 by default. Raises UsageError for a negative one."""
        return positive_coefficients(self.name, coefficients)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        return Linear().prepare(inputs, terms)
