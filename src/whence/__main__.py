"""`python -m whence`."""

from whence.cli.app import main

main()
