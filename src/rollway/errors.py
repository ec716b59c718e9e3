"""The one exception that users see as a sentence."""


class RollwayError(Exception):
    """A mistake in input or environment: one sentence that names the file, row or key, and the mend."""
