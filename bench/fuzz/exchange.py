"""Fuzz the ext_proc exchange with coverage guidance: `python -m bench.fuzz.exchange -runs=200000 [corpus folder]`.

One input is one stream: its accounting and destination, then messages. Some are raw bytes, most are real
ProcessingRequests of any phase in any order, whose headers and bodies come from the input. Without atheris
`python -m bench.fuzz.exchange --random N [seed]` plays N random inputs.

What must hold whatever comes: nothing is raised but `CallError`; every reply is a ProcessingResponse, and one for a
phase answers that phase or refuses; no header that we send carries a control character; when the stream is closed
nothing is in flight that the stream held.
"""

import random
import sys


def main() -> None:
    """The command."""
    if len(sys.argv) > 1 and sys.argv[1] == "--random":
        from bench.fuzz.exchange_player import make_player

        rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        play = make_player()
        for _ in range(int(sys.argv[2])):
            play(rng.randbytes(rng.randrange(200)))
        return
    import atheris

    with atheris.instrument_imports(include=["router"]):
        from bench.fuzz.exchange_player import make_player
    atheris.Setup(sys.argv, make_player())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
