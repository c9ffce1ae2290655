"`python -m curve_reweight`: the command line, see nbs/19_command.ipynb."
from .command import main

main()
