"""The standard attacker tries what there is, and its versions stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmergeable.attacks import ATTACKS
from unmergeable.errors import BadInput
from unmergeable.evaluation.attackers import ATTACKERS, attacker_named
from unmergeable.evaluation.methods import ON_MERGES, attack_reads, merge_takes_coefficients
from unmergeable.evaluation.plans.audit_plan import FewShotEntry
from unmergeable.evaluation.plans.entries import read_merge, read_recovery
from unmergeable.evaluation.plans.fields import require_unique


def test_the_newest_standard_has_every_attack_that_needs_no_data() -> None:
    """Those that need public fine-tunes of the base are left to plans, which can name some."""
    tried = {step for chain in attacker_named("standard", "here").recoveries for step in chain.split(", ")}
    assert tried >= {name for name in ATTACKS if not attack_reads(name) and name not in ON_MERGES}


def test_a_version_does_not_change() -> None:
    """A new attack or merge makes a new version."""
    assert attacker_named("standard-0", "here") == ATTACKERS["standard-0"]
    assert ATTACKERS["standard-0"].merges == ("linear", "task_arithmetic", "ties", "slerp")
    assert len(ATTACKERS["standard-0"].recoveries) == 9
    assert [read_merge(name, "here").name for name in ATTACKERS["standard-0"].merges]


@pytest.mark.parametrize("name", ATTACKERS)
def test_every_attacker_is_made_of_what_there_is(name: str, tmp_path: Path) -> None:
    attacker = ATTACKERS[name]
    assert attacker.name == name
    merges = [read_merge(merge, "here") for merge in attacker.merges]
    recoveries = [read_recovery(recovery, "here", tmp_path) for recovery in attacker.recoveries]
    require_unique([entry.name for entry in (*merges, *recoveries)], "here")
    assert merge_takes_coefficients(merges[0].method, {}) or attacker.combines == "all", "the first is searched"
    for samples in (16, 100):
        assert FewShotEntry(trainings=attacker.trainings).methods(samples)


def test_who_is_stronger_has_all_that_the_weaker_ones_have() -> None:
    quick, standard, full = (attacker_named(name, "here") for name in ("quick", "standard", "full"))
    for less, more in ((quick, standard), (standard, full)):
        assert set(less.merges) <= set(more.merges)
        assert set(less.recoveries) <= set(more.recoveries)
        assert more.extends >= less.extends
        assert more.by_part >= less.by_part


def test_an_unknown_attacker_is_refused() -> None:
    with pytest.raises(BadInput, match="here: no attacker is called 'standart'; did you mean 'standard'"):
        attacker_named("standart", "here")
