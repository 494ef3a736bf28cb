"""What is raised for mistakes that a user can mend."""


class UserError(ValueError):
    """A wrong value, file or combination that the user gave; the message says what was given and what to do.

    The commands print its message alone. Every other exception is a fault of the program and shows its traceback.
    """
