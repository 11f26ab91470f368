"""What a scorer gives: outcomes per question, numbers by the original's rule and by ours, and what was wrong."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np


RESAMPLES = 1000


@dataclass
class Outcome:
    """One question.

    Args:
        question_id: as in the question file.
        ours: 0 to 1 by our rule; `None` where it is not counted.
        original: 0 to 1 by the original's rule; `None` where it is not counted.
        parsed: what the answer was read as.
        truth: what was expected.
        category: group of the question.
        prediction: place of its answer in the predictions file, where the id alone does not find it.
    """

    question_id: str | int
    ours: float | None
    original: float | None
    parsed: str = ""
    truth: str = ""
    category: str = ""
    prediction: int | None = None


@dataclass
class Statistic:
    """A number of some items: `compute` gets the indices of a sample, drawn from `size` items."""

    size: int
    compute: Callable[[np.ndarray], float]

    def value(self) -> float | None:
        return None if not self.size else _to_number(self.compute(np.arange(self.size)))

    def interval(self, seed: int = 0) -> list[float] | None:
        """The middle 95% of the values of resampled items (bootstrap)."""
        if not self.size:
            return None
        rng = np.random.default_rng(seed)
        values = [self.compute(rng.integers(0, self.size, self.size)) for _ in range(RESAMPLES)]
        return [_to_number(value) for value in np.nanpercentile(values, (2.5, 97.5))]


def _to_number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def mean_of(values: Iterable[float | None]) -> Statistic:
    """The mean in percent of those values that are there."""
    present = np.array([value for value in values if value is not None], dtype=float)
    return Statistic(len(present), lambda indices: 100 * present[indices].mean())


@dataclass
class Score:
    """All that is known about a set of predictions.

    Args:
        original: what the original's code prints or writes, by the keys of its own; `{"error": ...}` where it stops.
        outcomes: one per question.
        numbers: name -> what the original's rule gives, what ours gives (either may be `None`).
        problems: kind -> names of what it befell.
    """

    original: dict
    outcomes: list[Outcome] = field(default_factory=list)
    numbers: dict[str, tuple[Statistic | None, Statistic | None]] = field(default_factory=dict)
    problems: dict[str, list] = field(default_factory=lambda: defaultdict(list))

    def summarise(self) -> dict:
        """Name -> value and interval by each rule, categories included: plain data for a results file.

        Where the original's code stops there is no number by its rule.
        """
        numbers = dict(self.numbers)
        groups = defaultdict(list)
        for outcome in self.outcomes:
            groups[outcome.category].append(outcome)
        if len(groups) > 1:
            for name, members in sorted(groups.items()):
                means = (mean_of(o.original for o in members), mean_of(o.ours for o in members))
                numbers.setdefault(f"category: {name}", means)
        summary = {}
        for name, rules in numbers.items():
            summary[name] = {}
            for rule, statistic in zip(("original", "ours"), rules, strict=True):
                if rule == "original" and "error" in self.original:
                    continue
                if statistic is not None and (value := statistic.value()) is not None:
                    summary[name][rule] = value
                    summary[name][f"{rule}_interval"] = statistic.interval()
                    summary[name]["count"] = statistic.size
        return {name: values for name, values in summary.items() if values}

    def count_problems(self) -> dict[str, dict]:
        """Kind -> how many, and the first of them."""
        return {kind: {"count": len(names), "first": names[:5]} for kind, names in self.problems.items() if names}


def score_means(original: dict, outcomes: list[Outcome], problems: dict | None = None) -> Score:
    """A score whose one number is the mean of its outcomes."""
    numbers = {"accuracy": (mean_of(o.original for o in outcomes), mean_of(o.ours for o in outcomes))}
    return Score(original, outcomes, numbers, problems or defaultdict(list))


def join_answers(answers: list[dict], known: Iterable) -> tuple[dict, dict[str, list]]:
    """Answers by the id of their question; of several the last counts, as in the originals' dictionaries.

    Args:
        answers: rows of a predictions file.
        known: ids of the questions.

    Returns:
        The answers; and problems: the ids that occur twice, that have no question, and that have no answer.
    """
    asked, said = Counter(iter(known)), Counter(answer["question_id"] for answer in answers)
    problems = defaultdict(list)
    problems["answered twice"] = [name for name, count in said.items() if count > 1]
    problems["asked twice"] = [name for name, count in asked.items() if count > 1]
    problems["answers without a question"] = [name for name in said if name not in asked]
    problems["questions without an answer"] = [name for name in asked if name not in said]
    return {answer["question_id"]: answer for answer in answers}, problems
