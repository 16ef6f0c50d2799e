"""The base of every error a person can mend; it carries where and how, and never does anything else."""

from __future__ import annotations


class TboxError(Exception):
    """An expected failure: the world or the input is at fault, not the program.

    `str()` is one line that names the file or field and the mend. The command line prints that line and
    exits with `exit_code` (2: bad usage or input; 1: the answer is no).
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{head}; {self.mend}" if self.mend else head
        return " ".join(line.split())


class Refused(TboxError):
    """The input was understood and the answer is no (exit 1)."""

    exit_code = 1
