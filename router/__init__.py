"""The decision: bytes and numbers in, a pod out. No sockets, no processes, no clock of its own."""
