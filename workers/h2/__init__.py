"""The HTTP/2 gRPC server transport. `server.H2Server` is its door.

A byte's way: `protocol` reads it from the socket, `connection` finds its frame, `call_handler` hands its message to the
call, `outbound` sends the reply within the client's windows. `Connection` is one object in five layers, each a file and
each knowing only those below: connection (frames and header blocks) > inbound (pieces of messages) > control (frames
that carry no message, and the clock) > call_handler (calls) > outbound (frames to the client). None of them touches a
socket or an event loop. Beside them stand `requests` on `hpack_decoder` (header blocks), `messages` (gRPC framing) and
`limits` (what a client may ask for).
"""
