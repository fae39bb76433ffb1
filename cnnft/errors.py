"""The user's mistake, in one sentence, and what to do about it."""


class CnnftError(Exception):
    """Something about the data, a file or the machine stops the command."""

    exit_code = 1


class UsageError(CnnftError):
    """A wrong flag or argument: an unknown name, a missing path, an impossible combination."""

    exit_code = 2
