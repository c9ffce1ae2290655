"The run as users start it: notebook by papermill, command, Python; and what must not be needed."
import json
import os
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest

from curve_reweight.experiment import run
from curve_reweight.grid import run_grid
from curve_reweight.setting import Setting, parameters_cell
from curve_reweight.weighting import methods

small = dict(method='curvenet_gdw', epochs=4, probe_epochs=10)


def facts(row):
    "A row without what may differ between two equal runs"
    return {k: v for k, v in row.items() if not k.startswith('seconds') and k != 'out_dir'}


def python(*args, **kw):
    "Run this Python with arguments"
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kw)


def run_notebook(root, folder, **params):
    "Run the experiment notebook with parameters"
    out = folder/'notebook.ipynb'
    papermill.execute_notebook(root/'nbs'/'20_run_setting.ipynb', out, params, cwd=root, progress_bar=False)
    return out


@pytest.mark.slow
def test_same_row_from_notebook_command_and_python(root, tmp_path):
    run_notebook(root, tmp_path, **small, out_dir=str(tmp_path/'notebook'))
    words = [word for name, value in small.items() for word in (f'--{name}', str(value))]
    done = python('-m', 'curve_reweight', *words, '--out_dir', str(tmp_path/'command'))
    assert done.returncode == 0, done.stderr
    assert 'test accuracy' in done.stdout and done.stderr == ''
    rows = [json.loads((tmp_path/name/'row.json').read_text()) for name in ('notebook', 'command')]
    here = run(Setting(**small)).row
    assert facts(rows[0]) == facts(rows[1]) == json.loads(json.dumps(facts(here)))


@pytest.mark.slow
def test_notebook_refuses_an_unknown_parameter(root, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'epoch', did you mean 'epochs'?"):
        run_notebook(root, tmp_path, epoch=3)


def test_notebook_has_the_settings_parameters(root):
    cells = nbformat.read(root/'nbs'/'20_run_setting.ipynb', as_version=4).cells
    text = next(c.source for c in cells if 'parameters' in c.metadata.get('tags', ()))
    *ours, compare = text.splitlines()
    assert '\n'.join(ours) == parameters_cell(), 'write the cell again: python .ci/make_parameters.py'
    assert compare.startswith('compare: bool = True')


own_rule = '''
import torch
from curve_reweight.weighting import Weighting

class Trust(Weighting):
    "Weights that fall with the loss, learnt from clean samples how fast"
    title = 'my own'

    def __init__(self,
        task,
        power:float=1., # Where it starts
    ):
        super().__init__(task)
        self.rate = torch.nn.Parameter(torch.tensor(power))

    def forward(self, batch): return (-self.rate*batch.loss).exp()
'''


@pytest.mark.slow
def test_a_rule_of_ones_own_is_one_file(root, tmp_path):
    "Run by name and with its option from the command line, by papermill and in a grid; nothing else is written"
    (tmp_path/'mine.py').write_text(own_rule)
    method, few = f'{tmp_path}/mine.py:Trust', dict(epochs=2, noise_rate=.3)
    words = [f'--{name}={value}' for name, value in {'method': method, 'power': 2, **few, 'out_dir': tmp_path/'command'}.items()]
    done = python('-m', 'curve_reweight', *words)
    assert done.returncode == 0, done.stderr
    executed = run_notebook(root, tmp_path, method=method, power=2, compare=False, **few, out_dir=str(tmp_path/'notebook'))
    assert 'my own' in executed.read_text()
    grid = {'name': 'own', 'fixed': {'method': method, **few}, 'product': {'power': [1, 2]}}
    assert run_grid(grid, tmp_path/'runs', workers=2, threads=1).status.tolist() == ['done', 'done']
    rows = [json.loads((tmp_path/name/'row.json').read_text()) for name in ('command', 'notebook')]
    table = pd.read_csv(tmp_path/'runs'/'own'/'rows.csv')
    assert table.power.tolist() == [1, 2] and table.test_acc_last[1] == rows[0]['test_acc_last'] and table.test_acc_last.nunique() == 2
    assert facts(rows[0]) == facts(rows[1]) and rows[0]['power'] == 2 and rows[0]['method'] == method and rows[0]['clip'] is None
    done = python('-m', 'curve_reweight', '--method', method, '--pover', '2')
    assert done.returncode == 2 and 'unrecognized arguments: --pover' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('words, message', [
    (['--noise_rate', '1.4'], 'noise_rate is 1.4'), (['--imbalance_ratio', '0.1'], 'write 10'), (['--noise_kind', 'x'], 'known: uniform'),
    (['--epochs', 'many'], "epochs is 'many', wanted int"), (['--epoch_count', '3'], 'unrecognized arguments'),
    (['--online', 'True'], 'curvenet_gdw does not read online: it takes the weights of every real step from the meta gradient'),
    (['--out_dir', '/dev/null/x'], "out_dir '/dev/null/x' cannot be written"), (['--lr', '1e30'], 'became')])
def test_command_says_what_is_wrong_in_one_sentence(words, message):
    few = '--method', 'curvenet_gdw', '--epochs', '2', '--probe_epochs', '2', '--drop_epochs', '0'
    done = python('-m', 'curve_reweight', *few, *words)
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_import_needs_no_notebook_packages_and_little_time():
    block = "import sys\nfor m in 'nbdev', 'papermill', 'IPython', 'jupyter', 'ipykernel', 'execnb': sys.modules[m] = None\n"
    code = block + "import curve_reweight\nfrom curve_reweight import Setting, Weighting, run\n" \
           "import curve_reweight.plots\nprint(Setting().method)"
    done = python('-c', code, cwd=os.path.sep)
    assert done.stdout == 'posterior_labels\n', done.stderr
    done = python('-X', 'importtime', '-c', 'import curve_reweight')
    assert 'torch' not in done.stderr  # heavy parts wait until they are used


@pytest.mark.slow
def test_papermill_command_writes_its_files(root, tmp_path):
    done = python('-m', 'papermill', str(root/'nbs'/'20_run_setting.ipynb'), str(tmp_path/'n.ipynb'), '-p', 'epochs', '3',
                  '-p', 'probe_epochs', '6', '-p', 'method', 'mwnet', '-p', 'out_dir', str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {'row.json', 'history.csv', 'suspects.csv', 'comparison.csv'} <= {p.name for p in tmp_path.iterdir()}


short = {'mlnt': dict(synthetic_batches=1, rounds=1), 'cleannet': dict(clean_net_steps=10, rounds=1), 'd2l': dict(lid_window=1, lid_start=1)}
@pytest.mark.slow
@pytest.mark.parametrize('method', [key for key in methods if key not in ('ceiling', 'oracle')])
def test_every_method_trains_a_resnet(method):
    few = dict(dataset='digits', model='resnet20', imbalance_ratio=20, epochs=4, probe_epochs=4, batch_size=64, wave_batch_size=64)
    row = run(Setting(method=method, meta_per_class=5, **few, **short.get(method, {}))).row
    assert 5 < row['test_acc_best'] <= 100
