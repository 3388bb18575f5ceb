"""One function for each job: what the command line calls, and what a program would.

Each opens checkpoints, asks the layers below, and writes through the one rewrite loop. Results are frozen dataclasses
with ``to_json()``.
"""

from unmergeable.api.inspection import inspect
from unmergeable.api.merging import merge
from unmergeable.api.methods import methods, schema
from unmergeable.api.protection import protect
from unmergeable.api.recovery import recover
from unmergeable.api.restoring import restore
from unmergeable.api.verification import verify

__all__ = ["inspect", "merge", "methods", "protect", "recover", "restore", "schema", "verify"]
