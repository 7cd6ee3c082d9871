"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what is wrong where, what was found, what to do."""
