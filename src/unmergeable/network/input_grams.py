"""Moved to :mod:`unmergeable.network.linear_layers`; kept until nothing imports it from here."""

from unmergeable.network.linear_layers import MEMORY_BUDGET, LinearLayer, linear_layers

__all__ = ["MEMORY_BUDGET", "LinearLayer", "linear_layers"]
