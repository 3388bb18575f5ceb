"""One function for each job: what the command line calls, and what a program would.

Each opens checkpoints, asks the layers below, and writes through the one rewrite loop. Results are frozen dataclasses
with ``to_json()``.
"""

from unmergeable.ops.authenticity import verify_manifest
from unmergeable.ops.in_memory import protect_state_dict, restore_state_dict
from unmergeable.ops.inspection import inspect
from unmergeable.ops.keys import change_passphrase, show_key
from unmergeable.ops.map import derive_map
from unmergeable.ops.merging import merge
from unmergeable.ops.methods import methods, schema
from unmergeable.ops.protection import protect
from unmergeable.ops.publishing import push
from unmergeable.ops.recovery import recover
from unmergeable.ops.restoring import restore
from unmergeable.ops.rotation import rotate
from unmergeable.ops.verification import verify

__all__ = [
    "change_passphrase",
    "derive_map",
    "inspect",
    "merge",
    "methods",
    "protect",
    "protect_state_dict",
    "push",
    "recover",
    "restore",
    "restore_state_dict",
    "rotate",
    "schema",
    "show_key",
    "verify",
    "verify_manifest",
]
