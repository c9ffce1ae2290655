"`python -m curve_reweight`: the command line, see nbs/14_experiment.ipynb."
from .experiment import main

main()
