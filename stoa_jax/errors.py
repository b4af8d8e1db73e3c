"""The error a user can mend: one line that says what, where, and how."""


class UserError(Exception):
    """Bad input or configuration. `main` prints its one line and exits with code 2."""
