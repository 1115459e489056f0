"""`python -m srppo`."""

from srppo.cli import main

main()
