"""`python -m undiffuse.cli`, for launchers that want a module."""

from undiffuse.cli import main

main()
