"""D*: known answers, the attacker's selection, the interval, and that testing contenders alone changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from unmergeable.evaluation.selection import BARS, Menu, area_under, choice, pareto_front, skill_to_keep
from unmergeable.evaluation.worst_case import area_between, contenders, difference, worst_case, worst_cases

EXAMPLES = 400


def rows(*shares: float, examples: int = EXAMPLES) -> np.ndarray:
    """Rows whose first examples are right, as many as ``shares`` says."""
    return np.array([[number < round(share * examples) for number in range(examples)] for share in shares], float)


def menu(*attacks: tuple[float, float, float]) -> Menu:
    """Attacks given by their scores on the defended task (validation), the rider's, and the defended one (test)."""
    return Menu(*(rows(*column) for column in zip(*attacks, strict=True)))


RIDER = rows(0.8)[0]
WITHOUT = menu((0.3, 0.8, 0.3))
STRONG = menu((0.9, 0.4, 0.9), (0.8, 0.78, 0.8), (0.6, 0.8, 0.6))


@pytest.mark.parametrize(
    ("protected", "expected"),
    [
        (STRONG, 0.0),  # nothing changed
        (menu((0.1, 0.1, 0.1)), 1.0),  # the attacker is left with what it had
        (menu((0.55, 0.8, 0.55)), 0.5),  # (0.8 - 0.55) / (0.8 - 0.3)
        (menu((0.95, 0.7, 0.95), (0.55, 0.77, 0.55)), 0.5),  # the first does not keep 95 % of 0.8
        (menu((0.7, 0.8, 0.4), (0.55, 0.8, 0.7)), 0.8),  # selected on validation, judged on test
    ],
)
def test_known_answers(protected: Menu, expected: float) -> None:
    found = worst_case(STRONG, protected, WITHOUT, RIDER, resamples=50)
    assert found.d_star == pytest.approx(expected)
    assert (found.unprotected, found.reference) == pytest.approx((0.8, 0.3))
    assert found.best_unprotected == 1
    assert found.low <= found.d_star <= found.high
    assert not found.is_small


def test_without_a_victim_worth_defending_there_is_no_share() -> None:
    found = worst_case(WITHOUT, WITHOUT, WITHOUT, RIDER, resamples=50)
    assert np.isnan([found.d_star, found.low, found.high]).all()
    assert found.is_small


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Credits are coin flips with known chances, so the true D* is known: (0.8 - 0.6) / (0.8 - 0.3) = 0.4.

    Of 200 intervals at 95 %, 190 should hold it; 4 standard deviations of that count are 12. A control with an interval
    of half the width misses far more often.
    """
    generator = np.random.default_rng(0)

    def flips(chance: float) -> np.ndarray:
        return (generator.random((1, 200)) < chance).astype(float)

    held = held_by_half = 0
    for trial in range(200):
        rider = flips(0.8)
        unprotected, protected, without = (Menu(flips(p), rider, flips(p)) for p in (0.8, 0.6, 0.3))
        found = worst_case(unprotected, protected, without, rider[0], seed=trial, resamples=100)
        held += found.low <= 0.4 <= found.high
        quarter = (found.high - found.low) / 4
        held_by_half += found.low + quarter <= 0.4 <= found.high - quarter
    assert 178 <= held <= 200
    assert held_by_half < 178


def test_only_contenders_need_a_test() -> None:
    """With NaN in place of every other test the result is the same to the last bit; without one contender it is not."""
    generator = np.random.default_rng(1)
    chances = generator.uniform(0.2, 0.9, 60)
    whole = Menu(
        *(
            (generator.random((60, 150)) < chance[:, None]).astype(float)
            for chance in (chances, 1 - chances / 2, chances)
        )
    )
    rider = (generator.random(150) < 0.6).astype(float)
    without = Menu(
        *(np.repeat(rows[:1], 1, axis=0) for rows in (whole.defended * 0, whole.rider * 0 + rider, whole.test * 0))
    )
    numbers = contenders(whole, without, rider, resamples=200)
    assert 1 < len(numbers) < 60

    def tested(kept: list[int]) -> Menu:
        test = np.full_like(whole.test, np.nan)
        test[kept] = whole.test[kept]
        return Menu(whole.defended, whole.rider, test)

    full = worst_case(whole, whole, without, rider, resamples=200)
    assert worst_case(tested(numbers), tested(numbers), without, rider, resamples=200) == full
    lacking = [number for number in numbers if number != full.best_protected]
    assert np.isnan(worst_case(whole, tested(lacking), without, rider, resamples=200).d_star)


def test_a_bar_that_decides_is_seen() -> None:
    """One attack keeps 96 % of the free-rider's skill: it counts at the two lower bars, and not at the highest."""
    protected = menu((0.8, 0.8 * 0.96, 0.8))
    found = worst_cases(STRONG, protected, WITHOUT, RIDER, resamples=20)
    assert [round(one.kept_share, 2) for one in found] == [0.9, 0.95, 0.98]
    # At 98 % nothing but 0.6 is left of the unprotected expert, and nothing of the protected one.
    assert [one.unprotected for one in found] == pytest.approx([0.8, 0.8, 0.6])
    assert [one.d_star for one in found] == pytest.approx([0.0, 0.0, 1.0])
    assert found[1] == worst_case(STRONG, protected, WITHOUT, RIDER, resamples=20)


def test_the_area_between_fronts_by_hand() -> None:
    """Unprotected: 0.8 up to 97.5 % of the skill, 0.6 to the end. The strip begins at 80 %."""
    unprotected = (0.8 * 0.175 + 0.6 * 0.025) / 0.2
    protected = (0.5 * 0.1 + 0.3 * 0.1) / 0.2
    halved = menu((0.5, 0.8 * 0.9, 0.5))
    assert area_between(STRONG, STRONG, WITHOUT, RIDER) == 0
    assert area_between(STRONG, halved, WITHOUT, RIDER) == pytest.approx(
        (unprotected - protected) / (unprotected - 0.3)
    )
    assert area_between(STRONG, menu((0.1, 0.1, 0.1)), WITHOUT, RIDER) == pytest.approx(1)
    assert np.isnan(area_between(WITHOUT, STRONG, WITHOUT, RIDER))
    # Selected on validation, judged on test; what is dominated, or keeps too little, has no part in it.
    lucky = (np.array([0.9, 0.8, 0.7]), np.array([0.1, 0.9, 0.5]), np.array([1.0, 0.9, 0.5]))
    assert area_under(*lucky, least=0.8) == pytest.approx(0.1)


def test_the_error_of_the_denominator_is_that_of_two_proportions() -> None:
    """Independent examples right with chances p and q: sqrt((p (1 - p) + q (1 - q)) / n), to 4 standard deviations of
    a standard deviation estimated from 2000 draws (1 / sqrt(4000) of it), and the rounding of the drawn shares."""
    generator = np.random.default_rng(2)
    p, q = ((generator.random((1, EXAMPLES)) < chance).astype(float) for chance in (0.7, 0.4))
    one, other = (Menu(rows(share), rows(0.8), test) for share, test in ((0.9, p), (0.1, q)))
    found = worst_case(one, one, other, RIDER, resamples=2000)
    difference = p[0] - q[0]
    expected = difference.std() / EXAMPLES**0.5
    assert found.denominator_error == pytest.approx(expected, rel=4 / 4000**0.5)
    assert found.denominator == pytest.approx(difference.mean())


def test_the_error_of_a_test_is_that_of_two_attacks_over_the_same_examples() -> None:
    """As above, over what the victim adds; however unsure the selection is. Attacks alike have none."""
    generator = np.random.default_rng(2)
    p, q = ((generator.random((1, EXAMPLES)) < chance).astype(float) for chance in (0.7, 0.5))
    one = Menu(rows(0.9), rows(0.8), p)
    # Beside the selected attack another, chosen in half of the draws, whose test is much worse.
    close = generator.random((1, EXAMPLES)) < 0.5
    other = Menu(
        np.concatenate([close, ~close]).astype(float), np.concatenate([rows(0.8)] * 2), np.concatenate([q, 0 * q])
    )
    number = int(other.defended.mean(axis=1).argmax())
    nothing = Menu(rows(0.1), rows(0.8), np.zeros((1, EXAMPLES)))
    found = worst_case(one, other, nothing, RIDER, resamples=2000)
    expected = (p[0] - other.test[number]).std() / EXAMPLES**0.5 / p.mean()
    assert found.test_error == pytest.approx(expected, rel=4 / 4000**0.5)
    assert worst_case(one, one, nothing, RIDER).test_error == 0


def test_contenders_serve_every_bar_and_the_fronts() -> None:
    generator = np.random.default_rng(3)
    chances = generator.uniform(0.2, 0.9, 40)
    whole = Menu(
        *(
            (generator.random((40, 150)) < chance[:, None]).astype(float)
            for chance in (chances, 1 - chances / 2, chances)
        )
    )
    rider = (generator.random(150) < 0.6).astype(float)
    without = Menu(whole.defended[:1] * 0, rider[None], whole.test[:1] * 0)
    numbers = contenders(whole, without, rider, resamples=50)
    test = np.full_like(whole.test, np.nan)
    test[numbers] = whole.test[numbers]
    tested = Menu(whole.defended, whole.rider, test)
    for menus in ((whole, tested, without, rider), (tested, tested, without, rider)):
        assert worst_cases(*menus, resamples=50) == worst_cases(whole, whole, without, rider, resamples=50)
        assert area_between(*menus) == area_between(whole, whole, without, rider)
    # Control: those of one bar alone do not serve another.
    few = contenders(whole, without, rider, BARS[:1], resamples=50)
    assert set(few) < set(numbers)


def test_pareto_front() -> None:
    first, second = [0.9, 0.5, 0.5, 0.2, 0.1, 0.9], [0.1, 0.5, 0.4, 0.9, 0.9, 0.1]
    assert pareto_front(first, second) == [3, 1, 0]


def test_the_attacker_picks_what_keeps_its_skill() -> None:
    """95 % of 0.8 is 0.76: exactly that is enough, in whatever order it is added up; of equal attacks the first."""
    defended, rider = np.array([0.9, 0.7, 0.7, 0.6]), np.array([0.75, sum([0.19] * 4), 0.8, 0.8])
    assert choice(defended, rider, 0.8) == 1
    assert choice(defended, rider - 0.1, 0.8) is None
    assert skill_to_keep(0.8) == pytest.approx(0.76)
    assert choice(defended, np.full(4, 0.8), 0.8) == 0  # control: the first counts once it keeps enough


def test_a_part_of_a_menu() -> None:
    whole = menu((0.9, 0.4, 0.9), (0.8, 0.78, 0.8), (0.6, 0.8, 0.6))
    assert (whole.only([2, 0]).defended == whole.defended[[2, 0]]).all()
    assert worst_case(STRONG, whole.only([]), WITHOUT, RIDER, resamples=20).d_star == pytest.approx(1.0)


def test_the_difference_of_two_menus_by_hand() -> None:
    """The first of ``STRONG`` does not keep 95 % of the rider's skill: the best on weights gets 0.8, a student 0.65."""
    weights, students = STRONG.joined(WITHOUT), menu((0.7, 0.79, 0.65)).joined(WITHOUT)
    found = difference(weights, students, RIDER, resamples=200)
    assert (found.first, found.second) == pytest.approx((0.8, 0.65))
    assert found.value == pytest.approx(0.15)
    # Paired: the student is right where the weights are, and wrong on 15 % of all examples, counted with an error of
    # sqrt(0.15 * 0.85 / 400) = 0.018; unpaired it would be sqrt((0.8 * 0.2 + 0.65 * 0.35) / 400) = 0.031.
    assert 0.15 - 4 * 0.018 < found.low < 0.15 - 0.018
    assert 0.15 + 0.018 < found.high < 0.15 + 4 * 0.018
    assert found.high - found.low < 2 * 1.96 * 0.025
    assert difference(students, weights, RIDER, resamples=200).value == pytest.approx(-0.15)


def test_without_anything_to_gain_there_is_no_difference() -> None:
    """Both are left with what can be had without the victim."""
    found = difference(
        menu((0.1, 0.8, 0.1)).joined(WITHOUT), menu((0.9, 0.1, 0.9)).joined(WITHOUT), RIDER, resamples=50
    )
    assert (found.value, found.low, found.high) == (0, 0, 0)
