"""Controls are written by :func:`unmergeable.ops.protection.write_control`."""

from unmergeable.ops.protection import write_control

__all__ = ["write_control"]
