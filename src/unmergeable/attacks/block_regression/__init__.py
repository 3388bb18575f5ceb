"""``block_regression``: the base's layers, changed as little as will make them compute what the release's compute."""

from unmergeable.attacks.block_regression.block_regression import BlockRegression
from unmergeable.attacks.block_regression.regression import RegressionResult, block_regression

__all__ = ["BlockRegression", "RegressionResult", "block_regression"]
