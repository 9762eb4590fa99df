"""`python -m server` is `diskread`."""

from .cli import main

main(prog_name="diskread")
