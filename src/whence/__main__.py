"""The command `whence`, also as `python -m whence`: it can be stopped in one line while it is being imported."""

import signal

from whence.cli.stopping import stoppable


def main() -> None:
    """Run the command line as a process, and exit with its code."""
    try:
        with stoppable():
            from whence.cli.app import run

            run()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said: no traceback while Python ends


if __name__ == "__main__":
    main()
