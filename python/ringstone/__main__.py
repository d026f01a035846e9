"""`python -m ringstone` is `ringstone`."""

from ringstone.cli import main

main()
