"""The one exception of this package."""


class KappaTuneError(ValueError):
    """A mistake the user can mend: the message says what was found, what was expected and what to type."""
