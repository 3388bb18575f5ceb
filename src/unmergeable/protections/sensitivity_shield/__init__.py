"""The sensitivity shield: the method, its arithmetic on weights, and the inputs of layers that it scores them by."""

from unmergeable.protections.sensitivity_shield.method import SensitivityShield

__all__ = ["SensitivityShield"]
