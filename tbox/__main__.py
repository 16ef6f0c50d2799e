"""`python -m tbox`: the command line, where the script is not on PATH. Does nothing else."""

from tbox.cli.main import main

main()
