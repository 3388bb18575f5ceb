"""The tiny networks of the recoveries' tests."""

from attacks.conftest import network, one_thread

__all__ = ["network", "one_thread"]
