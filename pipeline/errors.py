"""The two ways in which a command ends early: a problem the user can act on, and a stop that can be resumed."""

from __future__ import annotations


class PipeError(Exception):
    """A problem that one line explains: what is wrong, where, and what to do about it.

    Args:
        what: the problem in one clause.
        where: file, row or key it concerns.
        fix: what the user can do.
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = what if where is None else f"{what}, {where}"
        super().__init__(line if fix is None else f"{line}; {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        # The default would rebuild from the joined line alone; worker processes send these errors home.
        return (_rebuild, (self.what, self.where, self.fix))


def _rebuild(what: str, where: object | None, fix: str | None) -> PipeError:
    return PipeError(what, where=where, fix=fix)


class Stopped(Exception):
    """A signal asked us to stop and everything needed to go on is on disk (`pipe` exits with 75).

    Args:
        where: how far the work is.
        go_on: what the user does to go on.
    """

    def __init__(self, where: str, go_on: str = "the same command goes on from here") -> None:
        super().__init__(f"{where}; {go_on}")
