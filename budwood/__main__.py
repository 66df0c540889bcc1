"""`python -m budwood`, the same as the command `budwood`."""

from budwood.cli import main

main()
