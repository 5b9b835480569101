"""`python -m mmaas` is `mmaas`."""

from mmaas.cli import main

main()
