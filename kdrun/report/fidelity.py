"""When does distillation help? The hypothesis tests of the generalization-fidelity study.

Ramesh, Sengupta and Chakraborty, On the Generalization vs Fidelity Paradox in Knowledge
Distillation, Findings of ACL 2025 (arXiv 2505.15442). The improvement of a distilled student over
the same student trained alone is tested, task by task:

1. Is it positive (one-sided t-test), and does the method matter (one-way analysis of variance)?
2. Does it go with the teacher's score (Spearman's rank correlation)?
3. With the student's size, and with the score of the student alone?
4. With the agreement of the distilled student with its teacher?
5. With its fidelity: how close it is to the teacher beyond the answer?

As in the study, variants of a method (temperatures) are reduced to the best one for each pair of
networks and task. Its caveats hold here: rows share teachers and students and are not independent,
the best of several variants is optimistic, and there are many tests (``holm`` corrects for that).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.errors import UserError
from kdrun.report.alignment import aligned
from kdrun.report.results import Results
from kdrun.report.statistics import Test, anova, correlation, holm, mean_and_std, one_sample

ALL = "all methods"


@dataclass(frozen=True)
class Outcome:
    """One distilled student.

    Attributes:
        task: what was learnt; ``teacher``, ``student``, ``method``: from whom, by whom, how.
        score: of the distilled student, larger is better.
        student_score: of the student alone, trained as long; ``teacher_score``: of the teacher.
        size: of the student, in any unit.
        agreement: how often the distilled student answers as its teacher; None where unknown.
        fidelity: a similarity of the two beyond the answer, larger is closer; None where unknown.
    """

    task: str
    teacher: str
    student: str
    method: str
    score: float
    student_score: float
    teacher_score: float
    size: float
    agreement: float | None = None
    fidelity: float | None = None

    @property
    def improvement(self) -> float:
        """What distillation has added."""
        return self.score - self.student_score


@dataclass(frozen=True)
class Finding:
    """A test of one hypothesis on one task.

    Attributes:
        hypothesis: its number and what it asks.
        group: a method, or all of them.
        task: the task.
        kind: what ``test.statistic`` is: ``t``, ``F`` or ``rho``.
    """

    hypothesis: str
    group: str
    task: str
    kind: str
    test: Test


def best_variants(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """For each task, pair of networks and method, the variant with the best score."""
    best: dict[tuple[str, str, str, str], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.task, outcome.teacher, outcome.student, outcome.method)
        if key not in best or _better(outcome.score, best[key].score):
            best[key] = outcome
    return list(best.values())


def _better(score: float, other: float) -> bool:
    """Whether a score is the larger one; any is better than none (NaN)."""
    return score > other or (math.isnan(other) and not math.isnan(score))


def analyse(outcomes: Iterable[Outcome]) -> list[Finding]:
    """All tests, for all methods together and for each, on each task."""
    rows = best_variants(outcomes)
    findings = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        methods = list(dict.fromkeys(row.method for row in of_task))
        groups = {ALL: of_task}
        if len(methods) > 1:
            groups |= {name: [r for r in of_task if r.method == name] for name in methods}
        for group, members in groups.items():
            gains = [row.improvement for row in members]
            test = one_sample(gains, "greater")
            findings.append(Finding("1 improvement > 0", group, task, "t", test))
            for hypothesis, attribute in CORRELATIONS.items():
                known = [row for row in members if getattr(row, attribute) is not None]
                if not known:
                    continue
                x = [row.improvement for row in known]
                y = [getattr(row, attribute) for row in known]
                test = correlation(x, y)
                findings.append(Finding(hypothesis, group, task, "rho", test))
        by_method = [
            [row.improvement for row in groups[name]] for name in methods if name in groups
        ]
        if len(by_method) > 1:
            test = anova(by_method)
            findings.append(Finding("1 the method matters", ALL, task, "F", test))
    return findings


CORRELATIONS = {
    "2 with the teacher's score": "teacher_score",
    "3 with the student's size": "size",
    "3 with the student's own score": "student_score",
    "4 with agreement": "agreement",
    "5 with fidelity": "fidelity",
}
"""What the improvement is correlated with."""


def text(findings: Sequence[Finding], corrected: bool = False) -> str:
    """The findings as lines ``statistic (p)``, a column for each task, and what to think of them.

    Args:
        findings: of ``analyse``.
        corrected: show p-values after Holm's correction over all findings.
    """
    if not findings:
        raise UserError("there is nothing to analyse: no run has a student alone and a teacher")
    p_values = [finding.test.p_value for finding in findings]
    shown = holm(p_values) if corrected else p_values
    tasks = list(dict.fromkeys(finding.task for finding in findings))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for finding, p_value in zip(findings, shown, strict=True):
        line = cells.setdefault((finding.hypothesis, finding.group), {})
        line[finding.task] = _cell(finding, p_value)
    rows = [["hypothesis", "over", *tasks]]
    for (hypothesis, group), line in sorted(cells.items(), key=lambda item: item[0][0]):
        rows.append([hypothesis, group, *(line.get(task, "") for task in tasks)])
    sizes = {finding.test.n for finding in findings if finding.group == ALL}
    notes = [
        f"n = {', '.join(map(str, sorted(sizes)))}; t, F or rho (p) [95% interval of rho]; "
        f"p {'after' if corrected else 'without'} correction for {len(findings)} tests",
        "rows share teachers and students and are not independent; the best variant of each method "
        "is taken, which is optimistic",
    ]
    return "\n".join([aligned(rows, left=2), *notes])


def _cell(finding: Finding, p_value: float | None) -> str:
    test = finding.test
    if test.statistic is None or p_value is None:
        return "?"
    interval = "" if test.low is None else f" [{test.low:.2f}, {test.high:.2f}]"
    return f"{test.statistic:.2f} ({p_value:.2f}){interval}"


# -- where outcomes come from ----------------------------------------------------------------------


def outcomes_of(results: Results) -> list[Outcome]:
    """The distilled students of a table of results, each the mean over its seeds.

    Scores are of the metric of the table, negated where smaller is better; size is the number of
    parameters, fidelity the negative divergence KL(teacher || student).
    """
    outcomes = []
    for entry in results.entries:
        runs = [r for r in entry.runs if {"teacher", "alone"} <= r.networks.keys()]
        if entry.network != "distilled" or not runs:
            continue
        sign = 1.0 if entry.direction == "max" else -1.0

        def mean(network: str, metric: str, runs=runs) -> float | None:
            found = [run.results(network, results.epoch).get(metric) for run in runs]
            known = [value for value in found if value is not None]
            return mean_and_std(known)[0] if known else None

        names = runs[0].names
        divergence = mean("distilled", "kl")
        outcomes.append(
            Outcome(
                task=names["dataset"],
                teacher=names["teacher"],
                student=names["student"],
                method=names["method"],
                score=sign * mean("distilled", entry.metric),
                student_score=sign * mean("alone", entry.metric),
                teacher_score=sign * mean("teacher", entry.metric),
                size=float(runs[0].networks["alone"]["parameters"]),
                agreement=mean("distilled", "agreement"),
                fidelity=None if divergence is None else -divergence,
            )
        )
    return outcomes


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes from a CSV file whose columns are named like the attributes of ``Outcome``.

    ``task``, ``agreement`` and ``fidelity`` may be left out; further columns are not read.

    Raises:
        UserError: a column is missing, or a number is none.
    """
    texts, numbers = ("teacher", "student", "method"), ("score", "student_score", "teacher_score")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in (*texts, *numbers, "size") if name not in columns]
        if missing:
            raise UserError(
                f"{path}: no column {', '.join(missing)} (columns: {', '.join(columns)})"
            )
        return [_outcome(line, path, number) for number, line in enumerate(reader, start=2)]


def _outcome(line: dict[str, str], path: Path, number: int) -> Outcome:
    def value(name: str) -> float:
        try:
            found = float(line[name])
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"{path}, line {number}: {name} is no number: {line[name]}")
        return found

    return Outcome(
        task=line.get("task") or "score",
        teacher=line["teacher"],
        student=line["student"],
        method=line["method"],
        score=value("score"),
        student_score=value("student_score"),
        teacher_score=value("teacher_score"),
        size=value("size"),
        agreement=value("agreement") if line.get("agreement") else None,
        fidelity=value("fidelity") if line.get("fidelity") else None,
    )
