"""The command line: what was typed, to a verb. Neither torch nor Lightning is imported here."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kdrun import __version__
from kdrun.catalogue import GROUPS, Catalogue, nearest, open_catalogue
from kdrun.errors import ConfigErrors, Interrupted, UserError
from kdrun.help import FIRST_WORDS, HELP
from kdrun.startup import start_computing


@dataclass
class CommandLine:
    """What was typed, taken apart.

    Attributes:
        words: everything but flags.
        config_dirs: folders given with ``--config-dir``.
        multirun: whether ``-m`` was given.
        help: whether ``--help`` was given; likewise ``version``.
    """

    words: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)
    multirun: bool = False
    help: bool = False
    version: bool = False

    @property
    def flags(self) -> list[str]:
        """The flags that a command must repeat to find the same configs."""
        return [part for place in self.config_dirs for part in ("--config-dir", place)]

    def catalogue(self) -> Catalogue:
        """The config files."""
        return open_catalogue(self.config_dirs)


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit status.

    0: done. 1: a run of a sweep failed, or something broke (with a traceback). 2: a mistake in what
    was typed. 130, 143: stopped by a signal after a checkpoint was written.
    """
    # A network given as a dotted path may lie where the command was typed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _dispatch(_read(arguments))
    except UserError as error:
        _say(str(error))
        return error.exit_code
    except Interrupted as stop:
        _say(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            _say_broken(error)
            return 1
        # A file that may not be read, a name too long, a directory in the way.
        _say(f"{error.filename}: {error.strerror}")
        return 2
    except Exception as error:
        ended = _signal_among_several()
        if ended:
            _say("interrupted; the same command continues")
            return 128 + ended
        _say_broken(error)
        return 1


def _signal_among_several() -> int:
    """The signal that this process has received, where it is one of several.

    Such a process may find the others gone before it has looked at the signal itself.
    """
    from kdrun.interruption import SignalWatch
    from kdrun.launch import is_launched

    return SignalWatch.latest if is_launched() else 0


def _say(text: str) -> None:
    from kdrun.launch import is_main
    from kdrun.redaction import redact

    if is_main():
        print(redact(text), file=sys.stderr, flush=True)


def _say_broken(error: Exception) -> None:
    """The traceback of what is no user's mistake; one line in all processes but the first."""
    from kdrun.launch import is_main

    if is_main():
        traceback.print_exception(error)
    else:
        rank = os.environ.get("RANK", "?")
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _read(arguments: Sequence[str]) -> CommandLine:
    line = CommandLine()
    rest = iter(arguments)
    if arguments and arguments[0] == "complete":
        return CommandLine(words=list(arguments))
    for word in rest:
        if word in ("-m", "--multirun"):
            line.multirun = True
        elif word in ("-h", "--help"):
            line.help = True
        elif word == "--version":
            line.version = True
        elif word == "--config-dir" or word.startswith("--config-dir="):
            place = word.partition("=")[2] or next(rest, "")
            if not place:
                raise UserError("--config-dir needs a folder")
            line.config_dirs.append(place)
        else:
            line.words.append(word)
    return line


def _dispatch(line: CommandLine) -> int:
    if line.version:
        print(f"kdrun {__version__}")
        return 0
    if line.help or line.words[:1] == ["help"]:
        print(_help())
        return 0
    if not line.words and not line.multirun:
        print(FIRST_WORDS)
        return 0
    first = line.words[0] if line.words else ""
    if first and "=" not in first and not first.startswith(("-", "~")):
        verb = VERBS.get(first)
        if verb is None:
            raise UserError(_unknown_verb(first, line))
        line.words = line.words[1:]
        return verb.action(line)
    return _run(line)


# -- verbs -----------------------------------------------------------------------------------------


def _run(line: CommandLine) -> int:
    catalogue = line.catalogue()
    if line.multirun:
        from kdrun.sweep import sweep

        return sweep(line.words, line.flags, catalogue)
    from kdrun.run import run as run_words

    return run_words(line.words, line.flags, catalogue).exit_code


def _ls(line: CommandLine) -> int:
    from kdrun.browse import ls

    print(ls(line.catalogue(), line.words))
    return 0


def _show(line: CommandLine) -> int:
    from kdrun.browse import show

    print(show(line.catalogue(), line.words))
    return 0


def _cp(line: CommandLine) -> int:
    from kdrun.browse import cp

    print(cp(line.catalogue(), line.words))
    return 0


def _config(line: CommandLine) -> int:
    import yaml

    from kdrun.config import compose

    values = compose(line.words, line.catalogue()).values
    print(yaml.safe_dump(values, sort_keys=False), end="")
    return 0


def _validate(line: CommandLine) -> int:
    if line.multirun:
        from kdrun.sweep_plan import check as check_sweep

        problems = check_sweep(line.words, line.catalogue())
        if problems:
            raise ConfigErrors(problems)
        print("valid")
        return 0
    from kdrun.build import allowing
    from kdrun.config import compose
    from kdrun.members import MEMBERS, member_runs

    config = compose(line.words, line.catalogue())
    runs = member_runs(line.words, config.values[MEMBERS], line.catalogue())
    start_computing()
    from kdrun.side_by_side import check_methods
    from kdrun.validation import check

    check_methods(runs)
    for label, each in [(run.label, run.config) for run in runs] or [("", config)]:
        if label:
            print(f"{label}:")
        with allowing(each.values["allow_packages"]):
            for fact in check(each.values, each.names):
                print(fact)
    print("valid")
    return 0


def _resume(line: CommandLine) -> int:
    from kdrun.run import run_config
    from kdrun.runs import open_run, resume_config, stored_words

    run = open_run(_one_run(line, "resume"))
    stored = _read(stored_words(run))
    stored.config_dirs += line.config_dirs
    config, words = resume_config(run, stored.words, stored.catalogue())
    return run_config(config, words, stored.flags).exit_code


def _diff(line: CommandLine) -> int:
    from kdrun.runs import diff, open_run

    if len(line.words) != 2:
        raise UserError("diff takes two runs: kdrun diff outputs/.../seed0 outputs/.../seed0")
    print(diff(open_run(line.words[0]), open_run(line.words[1])))
    return 0


def _eval(line: CommandLine) -> int:
    from kdrun.runs import open_run

    run = open_run(_one_run(line, "eval", more=True))
    start_computing()
    from kdrun.deployment import evaluate_run

    evaluate_run(run, line.words[1:], line.catalogue())
    return 0


def _export(line: CommandLine) -> int:
    from kdrun.runs import open_run

    run = open_run(_one_run(line, "export", more=True))
    start_computing()
    from kdrun.deployment import export_run

    export_run(run, line.words[1:])
    return 0


def _doctor(line: CommandLine) -> int:
    from kdrun.doctor import examine

    report = examine()
    print(report.text)
    return 1 if report.problems else 0


def _complete(line: CommandLine) -> int:
    from kdrun.completion import complete

    typed = os.environ.get("COMP_LINE", "")
    point = int(os.environ.get("COMP_POINT", len(typed)))
    word = line.words[1] if len(line.words) > 1 else ""
    shown = [name for name, verb in VERBS.items() if verb.summary]
    for name in complete(typed[:point], word, open_catalogue(), shown):
        print(name)
    return 0


def _table(line: CommandLine) -> int:
    from kdrun.table import main

    return main(line.words, line.flags, line.catalogue())


def _report(line: CommandLine) -> int:
    from kdrun.report.command import main

    return main(line.words, line.catalogue())


def _store(line: CommandLine) -> int:
    from kdrun.store_command import main

    return main(line.words)


def _one_run(line: CommandLine, verb: str, more: bool = False) -> str:
    if not line.words or (len(line.words) > 1 and not more):
        raise UserError(f"{verb} takes the directory of a run: kdrun {verb} outputs/.../seed0")
    return line.words[0]


# -- the list of verbs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """A command.

    Attributes:
        action: does it and returns the exit status.
        usage: what follows the verb.
        summary: what it does; empty: not listed.
    """

    action: Callable[[CommandLine], int]
    usage: str = ""
    summary: str = ""


VERBS = {
    "ls": Verb(_ls, "KIND [PATTERN]", "list methods, models, datasets, recipes, ..."),
    "show": Verb(_show, "GROUP=NAME", "what a choice is, its options with types and ranges"),
    "config": Verb(_config, "[key=value ...]", "print the composed config of a command"),
    "validate": Verb(_validate, "[key=value ...]", "check a command, networks and shapes included"),
    "cp": Verb(_cp, "GROUP/NAME FILE", "copy a shipped config for editing"),
    "resume": Verb(_resume, "RUN", "continue an interrupted run from its directory"),
    "eval": Verb(_eval, "RUN [key=value ...]", "evaluate a finished run again"),
    "export": Verb(_export, "RUN [FILE]", "write the student for other programs"),
    "diff": Verb(_diff, "RUN RUN", "config and results of two runs side by side"),
    "table": Verb(_table, "NAME", "run and print a table of methods and seeds"),
    "report": Verb(_report, "TABLE|DIR", "tables and curves of finished runs"),
    "store": Verb(_store, "ls|verify|gc", "artefacts that runs share: list, check, clean up"),
    "doctor": Verb(_doctor, "", "versions, extras, hardware: what a bug report needs"),
    "complete": Verb(_complete),
}


def _help() -> str:
    rows = [
        f"  {f'{name} {verb.usage}'.strip():30} {verb.summary}"
        for name, verb in VERBS.items()
        if verb.summary
    ]
    return HELP.format(verbs="\n".join(["Verbs", *rows]), groups=" ".join(f"{g}=" for g in GROUPS))


def _unknown_verb(word: str, line: CommandLine) -> str:
    verbs = [name for name, verb in VERBS.items() if verb.summary]
    meant = nearest(word, verbs)
    if meant is None:
        catalogue = line.catalogue()
        for group in GROUPS:
            if word in catalogue.choices(group):
                meant = f"{group}={word}"
                break
    hint = f" Did you mean {meant}?" if meant else ""
    return f"{word}: no such command.{hint} (commands: {', '.join(verbs)})"
