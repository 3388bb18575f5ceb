"""The standard attacker tries what there is, and its versions stay as they are."""

from __future__ import annotations

import pytest

from unmergeable.attacks import ATTACKS
from unmergeable.errors import BadInput
from unmergeable.evaluation.attackers import ATTACKERS, attacker_named
from unmergeable.evaluation.methods import ON_MERGES, attack_reads
from unmergeable.evaluation.plans.entries import read_merge


def test_the_newest_standard_has_every_attack_that_needs_no_data() -> None:
    """Those that need public fine-tunes of the base are left to plans, which can name some."""
    tried = {step for chain in attacker_named("standard", "here").recoveries for step in chain.split(", ")}
    assert tried == {name for name in ATTACKS if not attack_reads(name) and name not in ON_MERGES}


def test_a_version_does_not_change() -> None:
    """A new attack or merge makes a new version."""
    assert attacker_named("standard-0", "here") == ATTACKERS["standard-0"]
    assert ATTACKERS["standard-0"].merges == ("linear", "task_arithmetic", "ties", "slerp")
    assert len(ATTACKERS["standard-0"].recoveries) == 9
    assert [read_merge(name, "here").name for name in ATTACKERS["standard-0"].merges]


def test_an_unknown_attacker_is_refused() -> None:
    with pytest.raises(BadInput, match="here: no attacker is called 'standart'; did you mean 'standard'"):
        attacker_named("standart", "here")
