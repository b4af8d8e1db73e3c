"""Errors that the user can fix; each says in one line what is wrong, where, and how to fix it."""


class UserError(Exception):
    """Invalid input or configuration. Programs print it in one line and exit with code 2."""
