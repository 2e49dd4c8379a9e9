#!/usr/bin/env python3
"""Write the table of methods in README.md from conf/method and the methods themselves.

Usage: scripts/document.py            write it
       scripts/document.py --check    exit status 1 where README.md is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from kdrun.build import resolve
from kdrun.catalogue import Catalogue, shipped, target_of
from kdrun.method import Method
from kdrun.targets import module_docstring

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- methods: written by scripts/document.py -->\n"
END = "<!-- end of methods -->\n"


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    before = README.read_text(encoding="utf-8")
    head, _, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        print(f"{README.name} lacks the lines {BEGIN.strip()} and {END.strip()}", file=sys.stderr)
        return 1
    after = f"{head}{BEGIN}{table()}{END}{tail}"
    if "--check" in arguments:
        if after != before:
            print(f"{README.name} is not up to date: run scripts/document.py", file=sys.stderr)
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


def table() -> str:
    """A Markdown table with a row for each shipped method."""
    catalogue = Catalogue((shipped(),))
    rows = ["| `method=` | published as | reads |", "|---|---|---|"]
    for name in catalogue.choices("method"):
        target = target_of(catalogue.path("method", name)) or ""
        title = module_docstring(target.rpartition(".")[0]).partition("\n\n")[0]
        title = " ".join(title.split()).removesuffix(".")
        rows.append(f"| `{name}` | {title} | {reads(resolve(target))} |")
    return "\n".join(rows) + "\n"


def reads(method: type[Method]) -> str:
    """What a method's loss is made of."""
    parts = ["logits" if method.taps is Method.taps else "features"]
    if method.relational:
        parts.append("relations in the batch")
    if method.trainable_roles:
        parts.append(f"trains {', '.join(method.trainable_roles)} too")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
