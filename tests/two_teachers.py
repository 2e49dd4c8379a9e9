"""A method with two teachers of different architectures, as a user's own package would hold it."""

from __future__ import annotations

from kdrun.losses.divergence import kl_divergence
from kdrun.method import Method


class TwoTeachers(Method):
    """The mean of the divergences from two frozen networks."""

    def roles(self):
        return {"teacher": "teacher", "second": "second_teacher"}

    def losses(self, student, teachers, batch, progress):
        terms = {"supervised": self.supervised_loss(student, batch)}
        for role, teacher in teachers.items():
            terms[role] = kl_divergence(student.logits, teacher.logits, t_squared=False) / 2
        return terms
