"""The HTTP/2 gRPC server transport. `server.H2Server` is its door; read on from there."""
