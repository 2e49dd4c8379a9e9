"""What stops a run on purpose: mistakes that the user can mend, and signals."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; its message is one clear line, shown without a traceback.

    Args:
        message: what is wrong and what to change.
        exit_code: the exit status of the command.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigErrors(UserError):
    """Everything that is wrong with a configuration, one line each.

    Args:
        problems: the lines; what was typed may hold line breaks, which become spaces.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        lines = [" ".join(problem.splitlines()) for problem in problems]
        self.problems = list(dict.fromkeys(lines))
        super().__init__("\n".join(self.problems))


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was written.

    Args:
        resume_command: what to type to continue.
        signal_number: the signal, SIGINT (2) or SIGTERM (15).
    """

    def __init__(self, resume_command: str, *, signal_number: int = 2) -> None:
        super().__init__(f"interrupted; continue with: {resume_command}")
        self.resume_command = resume_command
        self.exit_code = 128 + signal_number
