"""The one exception that is shown to a user without a traceback."""


class UserError(ValueError):
    """Something that the user can mend.

    The message is one sentence (or two) that names the setting or file, the value seen, what is allowed
    and how to mend it. The command-line tools print it once, on one rank, and end with exit code 2.
    """
