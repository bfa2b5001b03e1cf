class MessageError(ValueError):
    """The peer sent bytes that are no message of the kind that was due."""
