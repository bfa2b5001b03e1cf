"""The messages on the wire: our own minimal .proto files and the modules generated from them (`make protos`)."""


class MessageError(ValueError):
    """The peer sent bytes that are no message of the kind that was due."""
