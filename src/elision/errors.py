"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the value, the place it stands in (file, field, argument) and the remedy.
    The command line prints it and exits with code 2; nothing has been written when it is raised.
    """
