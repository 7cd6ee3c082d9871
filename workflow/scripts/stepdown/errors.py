"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what is wrong where, what was found, what to do."""

    def __init__(self, text: str):
        # A file may be called anything, and a library's reason may have any number of lines.
        super().__init__(text.replace("\n", "\\n"))
