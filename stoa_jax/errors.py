"""Errors that the user can fix; the message says in one line what is wrong, where, and how."""


class UserError(Exception):
    """Invalid input or configuration. Programs print it in one line and exit with code 2."""


class InputError(UserError):
    """A video, text, detection or option that a call cannot use."""


class MissingHead(UserError):
    """The weights lack what a call needs, for example an answer head."""


class NotCalibrated(UserError):
    """The model has no threshold because its match probabilities were never calibrated."""
