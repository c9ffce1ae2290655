"The experiment notebook's cell of parameters, from the package's own tables: `python .ci/make_parameters.py`."
from pathlib import Path

import nbformat

from curve_reweight.setting import parameters_cell

path = Path(__file__).parents[1]/'nbs'/'20_run_setting.ipynb'
compare = 'compare: bool = True  # run the controls beside the method; grids do not'

if __name__ == '__main__':
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ()))
    cell.source = f'{parameters_cell()}\n{compare}'
    nbformat.write(notebook, path)
