"Grids of settings: what is skipped, what is run again, what a kill does."
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

import curve_reweight.experiment as experiment
import curve_reweight.grid as grid
from curve_reweight.experiment import run
from curve_reweight.forecast import probe_key
from curve_reweight.setting import Setting, facts


# A run without torch. It counts its attempts, keeps a checkpoint of `epochs` steps of `lr` seconds, and holds the folder's lock.
head = f'''import fcntl, json, os, signal, time
from pathlib import Path
folder = Path(out_dir)
held = open(folder/'.lock', 'a')
fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)

row = json.loads({json.dumps(facts(Setting(method='ce')))!r})
row.update(method=method, seed=seed, epochs=epochs, lr=float(lr), device=device)

def noted(name): return (folder/name).read_text().splitlines() if (folder/name).exists() else []
def note(name, text): (folder/name).write_text('\\n'.join([*noted(name), text, '']))

note('attempts', str(os.getpid()))
attempt = len(noted('attempts'))
for step in range(len(noted('steps')), epochs):
    note('steps', f'{{step}} {{os.getpid()}}')
    time.sleep(lr)
'''
tail = '''
row.update(steps=[int(line.split()[0]) for line in noted('steps')], threads=os.environ['OMP_NUM_THREADS'])
row.update(seconds_probe=0., seconds_train=1000.)
(folder/'row.json').write_text(json.dumps(row))'''


@pytest.fixture
def notebook(tmp_path):
    "A function that writes the notebook, with a middle of one's own"
    def write(middle=''):
        def cell(n, source, tags):
            about = {'cell_type': 'code', 'id': f'c{n}', 'metadata': {'tags': tags}}
            return {**about, 'source': source, 'outputs': [], 'execution_count': None}
        named = "method: str = 'ce'\nseed: int = 0\nepochs: int = 1\nlr: float = 0.0\ndevice: str = 'auto'\nout_dir: str = ''"
        cells = [cell(0, named, ['parameters']), cell(1, head + middle + tail, [])]
        kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
        path = tmp_path/'quick.ipynb'
        path.write_text(json.dumps({'cells': cells, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}))
        return path
    return write


def small(**kw):
    "A grid, two seeds unless told otherwise"
    return {'name': 'g', 'fixed': {'method': 'ce', 'epochs': 1, 'lr': .001}, 'seeds': 2, **kw}


def attempts(runs, name='g'):
    "How often each run of a grid was begun"
    return [len((p/'attempts').read_text().splitlines()) for p in sorted((runs/name).glob('*-*'))]


def rows(runs, name='g'):
    "Rows without what may differ between equal runs"
    return pd.read_csv(runs/name/'rows.csv', keep_default_na=False).drop(columns=['code', 'seconds_notebook']).to_dict('records')


def start(folder, *words, **kw):
    "The command, in a process of its own, with Ctrl-C as in a terminal, wherever the tests run"
    kw['preexec_fn'] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, '-m', 'curve_reweight.grid', *map(str, words)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def wait_for(what, seconds=300):
    "Wait until something is true"
    end = time.time() + seconds
    while not what():
        assert time.time() < end, 'waited in vain'
        time.sleep(.1)


def pids(runs, file='attempts'):
    "Kernels of all runs so far"
    return [int(line.split()[-1]) for path in runs.glob(f'g/*/{file}') for line in path.read_text().splitlines()]


def alive(pid):
    "Whether a process runs (a zombie does not)"
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False


def test_every_grid_that_is_there_can_be_run(root):
    for path in sorted((root/'grids').rglob('*.yaml')):
        runs, head = grid.expand(grid.load_grid(path)), path.read_text(encoding='utf-8')
        stated = re.search(r'^# ([\d,]+) runs?\b', head, re.M)
        assert int(stated[1].replace(',', '')) == len(runs), f'{path} says {stated[1]} runs, but has {len(runs)}'
        assert set(Counter(block for block, _ in runs)) == set(yaml.safe_load(head).get('blocks', {runs[0][0]})), f'{path}: an empty block'


def test_list_of_full_grids_says_what_they_have(root):
    listed = re.findall(r'^\| `(\w+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$', (root/'grids'/'README.md').read_text(encoding='utf-8'), re.M)
    counted = {}
    for path in (root/'grids'/'full').glob('*.yaml'):
        settings = [job.setting for job in grid.make_jobs(grid.load_grid(path), 'nowhere')]
        probes = {probe_key(s): s.probe_epochs for s in settings} # runs share them
        probes.pop(None, None)
        counted[path.stem] = len(settings), sum(s.epochs for s in settings) + sum(probes.values())
    assert {name: tuple(int(n.replace(',', '')) for n in numbers) for name, *numbers in listed} == counted
    total = tuple(map(sum, zip(*counted.values())))
    assert '| all | | {:,} | {:,} |'.format(*total) in (root/'grids'/'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
def test_skipped_changed_parameter_changed_code(tmp_path, notebook, monkeypatch):
    runs, how = tmp_path/'runs', dict(notebook=notebook(), workers=2)
    def blocks(name): return small(blocks={name: {}})
    assert grid.run_grid(blocks('a'), runs, dry_run=True, **how).status.tolist() == ['new', 'new'] and not runs.exists()
    assert grid.run_grid(blocks('a'), runs, devices=['cpu:0', 'cpu:1'], **how).status.tolist() == ['done', 'done']
    assert sorted(row['device'] for row in rows(runs)) == ['cpu:0', 'cpu:1'] and [row['block'] for row in rows(runs)] == ['a', 'a']
    again = grid.run_grid(blocks('b'), runs, **how)
    assert again.status.tolist() == ['skipped', 'skipped'] and attempts(runs) == [1, 1]
    assert [row['block'] for row in rows(runs)] == ['b', 'b']
    # one value more: only it would run, and the other keeps its folder though its name would be another
    more = small(seeds=1, product={'epochs': [1, 2]}, fixed={'method': 'ce', 'lr': .001})
    planned = grid.run_grid(more, runs, dry_run=True, **how)
    assert planned.status.tolist() == ['done', 'new'] and planned.seconds.tolist() == [1000, 2000] and planned.run[0] == again.run[0]
    # other code: nothing is taken over, the old files stand aside
    before, one = rows(runs), small(seeds=1, blocks={'b': {}})
    monkeypatch.setattr(grid, 'code_version', lambda setting: 'other')
    assert grid.run_grid(one, runs, dry_run=True, **how).status.tolist() == ['other code']
    assert grid.run_grid(one, runs, any_code=True, **how).status.tolist() == ['skipped'] and attempts(runs) == [1, 1]
    assert grid.run_grid(one, runs, devices=['cpu:0'], **how).status.tolist() == ['done']
    assert attempts(runs) == [1, 1] and (runs/'g'/again.run[0]/'old-1'/'row.json').exists()
    assert pd.read_csv(runs/'g'/'rows.csv').code[0] == 'other'
    assert [{**row, 'device': ''} for row in rows(runs)] == [{**row, 'device': ''} for row in before]


rule = '''
from curve_reweight.weighting import Weighting

class Trust(Weighting):
    needs_meta = False

    def __init__(self,
        task,
        power:float=1., # How fast weights fall with the loss
    ):
        super().__init__(task)
        self.power = power

    def forward(self, batch): return (-self.power*batch.loss).exp()
'''


def test_own_rule_with_its_own_options(tmp_path, notebook, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.py').write_text(rule)
    blocks = {'mine': {'product': {'power': [1, 2]}}}
    settings = {'name': 'g', 'fixed': {'method': 'mine.py:Trust', 'epochs': 1, 'lr': .001}, 'blocks': blocks}
    how = dict(notebook=notebook('row["power"] = float(power)\n'), workers=2, threads=1)
    table = grid.run_grid(settings, 'runs', **how)
    assert table.status.tolist() == ['done', 'done'], table.error.tolist()
    assert [float(row['power']) for row in rows(tmp_path/'runs')] == [1, 2]
    assert [run.rpartition('-')[0] for run in table.run] == ['mine-power1.0', 'mine-power2.0']
    # the default, given or not, is one run; another rule makes its own runs stale
    blocks['default'] = {}
    assert grid.run_grid(settings, 'runs', dry_run=True, **how).status.tolist() == ['done', 'done']
    (tmp_path/'mine.py').write_text(rule.replace('-self.power', '-2*self.power'))
    assert grid.run_grid(settings, 'runs', dry_run=True, **how).status.tolist() == ['other code', 'other code']
    blocks['default'] = {'fixed': {'pover': 1}}
    with pytest.raises(ValueError, match="block 'default': unknown parameter 'pover', did you mean 'power'?"):
        grid.run_grid(settings, 'runs', **how)


@pytest.mark.slow
def test_failing_runs_leave_the_others_and_the_exit_status_tells(tmp_path, notebook, monkeypatch, capsys):
    path, runs = tmp_path/'g.yaml', tmp_path/'runs'
    note = notebook('if seed == 0: raise ValueError("no such\\nthing")\nif seed == 2: row["epochs"] = 7\nif seed == 3: os._exit(3)\n')
    options = ['--runs', str(runs), '--notebook', str(note), '--threads', '1', '--retry', '0', '--workers', '2']
    def command(**kw):
        path.write_text(yaml.safe_dump(small(**kw)))
        monkeypatch.setattr(sys, 'argv', ['curve_reweight_grid', str(path), *options])
        try: grid.main()
        except SystemExit as e: return e.code, capsys.readouterr().out.splitlines()
        return 0, capsys.readouterr().out.splitlines()
    status, lines = command(seeds=4)
    at = {seed: next((runs/'g').glob(f'seed{seed}*')) for seed in range(4)}
    assert status == 1 and attempts(runs) == [1, 1, 1, 1], 'an exception is not tried again, nor is a death with --retry 0'
    assert lines == ['4 runs: 2 failed, 1 done, 1 unfinished',
                     f'failed: {at[0].name}', f'    ValueError: no such, see {at[0]/"run.ipynb"}',
                     f'failed: {at[2].name}', f"    no row.json with the run's parameters was written, see {at[2]/'run.ipynb'}",
                     f'unfinished: {at[3].name}', f'    ended with exit status 1, see {at[3]/"papermill.log"}']
    assert 'no such' in (at[0]/'run.ipynb').read_text() and 'DeadKernelError' in (at[3]/'papermill.log').read_text()
    assert [row['threads'] for row in rows(runs) if row['seed'] == 1] == [1]
    assert command(seeds=[1]) == (0, ['1 run: 1 skipped'])


@pytest.mark.slow
def test_killed_grid_ends_everything_and_goes_on_to_the_same_rows(tmp_path, notebook):
    settings, note, runs = small(fixed={'method': 'ce', 'epochs': 12, 'lr': .25}, seeds=1), notebook(), tmp_path/'runs'
    (tmp_path/'g.yaml').write_text(yaml.safe_dump(settings))
    killed = start(tmp_path, 'g.yaml', '--notebook', note)
    wait_for(lambda: pids(runs, 'steps'))
    killed.kill(); killed.communicate()
    first = pids(runs)
    assert grid.run_grid(settings, runs, notebook=note).status.tolist() == ['done'] and not any(map(alive, first))
    steps = [line.split() for path in runs.glob('g/*/steps') for line in path.read_text().splitlines()]
    assert [int(n) for n, _ in steps] == list(range(12)) and len({pid for _, pid in steps}) == 2, 'from the checkpoint, not from the start'
    grid.run_grid(settings, tmp_path/'undisturbed', notebook=note)
    assert attempts(runs) == [2] and rows(runs) == rows(tmp_path/'undisturbed')


@pytest.mark.slow
def test_dying_worker_loses_its_run_only_and_is_tried_once_more(tmp_path, notebook):
    note = notebook('''
if seed == 0 and attempt == 1: os._exit(0)
if seed == 1 and attempt == 1:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
''')
    table = grid.run_grid(small(), tmp_path, workers=2, notebook=note)
    assert table.status.tolist() == ['done', 'done'] and attempts(tmp_path) == [2, 2]


@pytest.mark.parametrize('text, message', [
    ('fixed: {epoch: 3}', "g.yaml: the grid: unknown parameter 'epoch', did you mean 'epochs'?"),
    ('product: {method: [ce, curve]}', "unknown method 'curve'; known: "),
    ('fixed: {epochs: many}', "epochs is 'many', wanted int"),
    ('fixd: {}', "the grid has the unknown key 'fixd'"),
    ('product: {lr: []}', 'the product of the grid is empty'),
    ('product: {lr: [1, 1.0]}', 'the grid repeats a setting: '),
    ('fixed: {lr: 1\n', 'g.yaml, line 2: '),
    ('fixed: {data_root: a}', "quick.ipynb has no parameter 'data_root'"),
    ('blocks: {a: {}, b: {fixed: {method: ce, clip: 1.0}}}', "block 'b': ce does not read clip: it is an option of gdw, curvenet_gdw"),
    ('fixed: {method: "nowhere.py:Rule"}', "the grid: method 'nowhere.py:Rule': there is no file ")])
def test_command_refuses_in_one_sentence(tmp_path, notebook, monkeypatch, text, message):
    (tmp_path/'g.yaml').write_text(text)
    options = ['--runs', str(tmp_path/'runs'), '--notebook', str(notebook())]
    monkeypatch.setattr(sys, 'argv', ['curve_reweight_grid', str(tmp_path/'g.yaml'), *options])
    with pytest.raises(SystemExit) as e: grid.main()
    assert message in e.value.code and '\n' not in e.value.code and not (tmp_path/'runs').exists()


@pytest.mark.parametrize('name, backend', [('papermill', 'threading'), ('submitit', 'slurm'), ('distributed', 'dask')])
def test_missing_extra_is_named(tmp_path, notebook, monkeypatch, name, backend):
    monkeypatch.setitem(sys.modules, name, None)
    extra, slurm = {'threading': 'grid'}.get(backend, backend), {'timeout_min': 5} if backend == 'slurm' else None
    with pytest.raises(ImportError, match=rf"{name} is not installed: pip install 'curve_reweight\[{extra}\]'"):
        grid.run_grid(small(), tmp_path, notebook=notebook(), backend=backend, slurm=slurm)


def test_without_the_repository_the_notebook_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(grid.curve_reweight, '__file__', str(tmp_path/'curve_reweight'/'__init__.py'))
    with pytest.raises(FileNotFoundError, match='run in a checkout of the repository, or name a notebook'): grid.find_notebook(None)


@pytest.mark.slow
def test_submitit(tmp_path, notebook):
    pytest.importorskip('submitit')
    how, slurm = dict(notebook=notebook(), backend='slurm', threads=1), dict(cluster='local', timeout_min=5)
    with pytest.raises(ValueError, match="submitit: .*'gpus'"): grid.run_grid(small(), tmp_path, slurm={**slurm, 'gpus': 1}, **how)
    assert grid.run_grid(small(seeds=1), tmp_path, slurm=slurm, **how).status.tolist() == ['done'] and len(rows(tmp_path)) == 1


@pytest.mark.slow
def test_dask(tmp_path, notebook):
    distributed = pytest.importorskip('distributed')
    how = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=False)
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster):
        table = grid.run_grid(small(), tmp_path, backend='dask', notebook=notebook(), threads=1)
    assert table.status.tolist() == ['done', 'done'] and attempts(tmp_path) == [1, 1] and len(rows(tmp_path)) == 2


# Kills the process that waits for papermill: a worker of loky or dask, a job of submitit
kill_worker = '''
if seed == 0 and attempt == 1:
    time.sleep(2)
    os.kill(int(open(f'/proc/{os.getppid()}/stat').read().split()[3]), signal.SIGKILL)
    time.sleep(60)
'''


@pytest.mark.slow
def test_submitit_job_is_killed(tmp_path, notebook):
    how = dict(backend='slurm', slurm=dict(cluster='local', timeout_min=5), threads=1)
    table = grid.run_grid(small(), tmp_path, notebook=notebook(kill_worker), **how)
    assert table.status.tolist() == ['done', 'done'] and attempts(tmp_path) == [2, 1] and len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_dask_worker_is_killed(tmp_path, notebook):
    distributed = pytest.importorskip('distributed')
    how = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster):
        table = grid.run_grid(small(), tmp_path, backend='dask', notebook=notebook(kill_worker), threads=1)
    assert table.status.tolist() == ['done', 'done'] and attempts(tmp_path) == [2, 1] and len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_loky_worker_is_killed(tmp_path, notebook):
    table = grid.run_grid(small(seeds=4), tmp_path, workers=2, backend='loky', notebook=notebook(kill_worker), threads=1)
    first, *others = attempts(tmp_path)
    assert table.status.tolist() == ['done']*4 and first == 2 and sorted(others)[:2] == [1, 1] # at most one other was under way


@pytest.mark.slow
def test_ctrl_c_ends_everything(tmp_path, notebook):
    (tmp_path/'g.yaml').write_text(yaml.safe_dump(small(fixed={'method': 'ce', 'epochs': 100, 'lr': .25})))
    stopped = start(tmp_path, 'g.yaml', '--notebook', notebook(), '--workers', 2, start_new_session=True)
    wait_for(lambda: len(set(pids(tmp_path/'runs', 'steps'))) == 2)
    os.killpg(stopped.pid, signal.SIGINT)
    out, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 1 and 'Traceback' not in err
    assert err.splitlines()[-1].endswith('stopped; the same command goes on from here')
    wait_for(lambda: not any(map(alive, pids(tmp_path/'runs'))), 120)


def lasting(row):
    "A row without what may differ between equal runs"
    return {k: v for k, v in row.items() if not k.startswith('seconds') and k not in ('out_dir', 'threads', 'save_model')}


watched = rule.replace('import Weighting', """import Weighting
import os, time""") + """
    def start_epoch(self, epoch, plan):
        with open('epochs', 'a') as f: f.write(f'{epoch} {os.getpid()}\\n')
        if self.power == 3: raise RuntimeError('no such\\nthing')
        time.sleep(.1)
"""


def test_direct_runs_give_the_rows_of_runs_by_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.py').write_text(watched)
    blocks = {'package': {'product': {'method': ['ce', 'gdw']}},
              'mine': {'fixed': {'method': 'mine.py:Trust'}, 'product': {'power': [1, 3]}}}
    settings = {'name': 'g', 'fixed': {'epochs': 2, 'noise_rate': .2}, 'blocks': blocks}
    table = grid.run_grid(settings, 'runs', direct=True, threads=1)
    assert table.status.tolist() == ['done', 'done', 'done', 'failed'], table.error.tolist()
    jobs = grid.make_jobs(settings, tmp_path/'runs'/'g')
    for job in jobs[:3]:
        row = json.loads((job.folder/'row.json').read_text())
        assert row['threads'] == 1 and (job.folder/'history.csv').exists() and not (job.folder/'run.ipynb').exists()
    # what failed is told in one sentence, in full in a file, and is tried again with the next start
    said = f'RuntimeError: no such, see {jobs[3].folder/"error.txt"}'
    assert table.error.tolist() == ['', '', '', said] and 'Traceback' in (jobs[3].folder/'error.txt').read_text()
    info = json.loads((jobs[3].folder/'run.json').read_text())
    assert info['direct'] and info['error'] == 'RuntimeError: no such'
    assert grid.run_grid(settings, 'runs', direct=True, dry_run=True).status.tolist() == ['done', 'done', 'done', 'failed']
    assert len({line.split()[1] for line in (tmp_path/'epochs').read_text().splitlines()}) == 1, 'one worker for all'
    # the rows of the package's methods, one after the other in one process, are those of runs by themselves
    for n, method in enumerate(['ce', 'gdw']):
        alone = run(Setting(method=method, epochs=2, noise_rate=.2)).row
        row = json.loads((jobs[n].folder/'row.json').read_text())
        assert lasting(row) == lasting(json.loads(json.dumps(alone)))


def test_a_worker_loads_its_data_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(experiment, 'setting_source', lambda setting: loaded.append(setting.data_root) or len(loaded))
    experiment._loaded.cache_clear()
    runs = [Setting(seed=seed, data_root=root) for root, seed in (('a', 0), ('a', 1), ('b', 0), ('b', 1), ('a', 2))]
    assert [experiment.loaded_source(setting) for setting in runs] == [1, 1, 2, 2, 3] and loaded == ['a', 'b', 'a']
    experiment._loaded.cache_clear()


@pytest.mark.slow
def test_killed_direct_grid_leaves_no_worker_and_goes_on_to_the_same_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.py').write_text(watched)
    settings = {'name': 'g', 'fixed': {'method': 'mine.py:Trust', 'epochs': 25, 'checkpoint_seconds': 0.}}
    (tmp_path/'g.yaml').write_text(yaml.safe_dump(settings))
    def epochs(): return [line.split() for line in Path('epochs').read_text().splitlines()] if Path('epochs').exists() else []
    killed = start(tmp_path, 'g.yaml', '--direct', '--threads', 1)
    wait_for(lambda: len(epochs()) > 5)
    killed.kill()
    wait_for(lambda: not alive(int(epochs()[0][1])), 5)
    assert grid.run_grid(settings, 'runs', direct=True, dry_run=True).status.tolist() == ['unfinished']
    assert grid.run_grid(settings, 'runs', direct=True, threads=1).status.tolist() == ['done']
    numbers = [int(n) for n, _ in epochs()]
    assert numbers[0] == 0 and numbers.count(0) == 1 and numbers[-1] == 24, 'from the checkpoint, not from the start'
    grid.run_grid(settings, 'undisturbed', direct=True, threads=1)
    assert [*map(lasting, rows(tmp_path/'runs'))] == [*map(lasting, rows(tmp_path/'undisturbed'))]


@pytest.mark.slow
def test_ctrl_c_and_a_dying_worker_in_a_direct_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine.py').write_text(watched.replace('time.sleep(.1)', """
        if epoch == 3 and not os.path.exists('died'):
            open('died', 'w').close()
            os.kill(os.getpid(), 9)
        time.sleep(.5)"""))
    settings = small(fixed={'method': 'mine.py:Trust', 'epochs': 8, 'checkpoint_seconds': 0.})
    assert grid.run_grid(settings, 'runs', direct=True, workers=2, threads=1).status.tolist() == ['done', 'done']
    (tmp_path/'epochs').unlink()
    (tmp_path/'g.yaml').write_text(yaml.safe_dump(small(fixed={'method': 'mine.py:Trust', 'epochs': 90})))
    stopped = start(tmp_path, 'g.yaml', '--direct', start_new_session=True)
    wait_for(lambda: Path('epochs').exists())
    os.killpg(stopped.pid, signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 1 and 'Traceback' not in err and 'stopped; the same command goes on from here' in err
    wait_for(lambda: not alive(int(Path('epochs').read_text().split()[1])), 5)


def finish(job, code, **row):
    "Files of a direct run that is done, without the run"
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder/'run.json').write_text(json.dumps({'direct': True, 'exit': 0, 'error': '', 'code': code, 'seconds': 9.}))
    (job.folder/'row.json').write_text(json.dumps({**facts(job.setting), 'seconds_probe': 0., 'seconds_train': 8., **row}))


def test_rows_of_the_table_count_without_a_folder(tmp_path, monkeypatch):
    (tmp_path/'grids').mkdir()
    path, table = tmp_path/'grids'/'g.yaml', tmp_path/'results'/'g.csv'
    path.write_text(yaml.safe_dump({'table': '../results/g.csv', 'seeds': 3, 'fixed': {'method': 'ce', 'lr': .1}}))
    jobs, how = grid.make_jobs(grid.load_grid(path), tmp_path/'here'/'g'), dict(direct=True)
    for job in jobs: finish(job, grid.code_version(job.setting), test_acc_last=90.5, test_acc_per_class=[90, 91])
    assert grid.run_grid(path, tmp_path/'here', **how).status.tolist() == ['skipped']*3
    written = table.read_bytes()
    assert pd.read_csv(table, dtype=str).key.tolist() == [job.key for job in jobs]
    # another machine has no folders; a second gathering changes no letter
    other = grid.run_grid(path, tmp_path/'there', dry_run=True, **how)
    assert other.status.tolist() == ['in table']*3 and other.seconds.tolist() == [9]*3 and not (tmp_path/'there').exists()
    assert grid.run_grid(path, tmp_path/'there', **how).status.tolist() == ['in table']*3 and table.read_bytes() == written
    # one seed more is new, whatever the row beside it says
    path.write_text(path.read_text().replace('seeds: 3', 'seeds: 4'))
    assert grid.run_grid(path, tmp_path/'there', dry_run=True, **how).status.tolist() == ['in table']*3 + ['new']
    # other code: rows stay until there are new ones
    path.write_text(path.read_text().replace('seeds: 4', 'seeds: 3'))
    monkeypatch.setattr(grid, 'code_version', lambda setting: 'present')
    assert grid.run_grid(path, tmp_path/'there', dry_run=True, **how).status.tolist() == ['other code']*3
    assert grid.run_grid(path, tmp_path/'there', any_code=True, **how).status.tolist() == ['in table']*3 and table.read_bytes() == written
    jobs = grid.make_jobs(grid.load_grid(path), tmp_path/'there'/'g')
    finish(jobs[1], 'present', test_acc_last=70)
    grid._gather_table(table, jobs, {job.folder.name: 'present' for job in jobs})
    after = pd.read_csv(table)
    assert (after.code == 'present').tolist() == [False, True, False] and after.test_acc_last.tolist() == [90.5, 70, 90.5]
    assert grid.run_grid(path, tmp_path/'there', dry_run=True, **how).status.tolist() == ['other code', 'done', 'other code']
    for job in jobs: finish(job, 'present')
    (tmp_path/'grids'/'none.yaml').write_text(path.read_text().replace('table: ../results/g.csv', 'name: g'))
    assert grid.run_grid(tmp_path/'grids'/'none.yaml', tmp_path/'there', **how).status.tolist() == ['skipped']*3
    assert pd.read_csv(table).equals(after), 'a grid without a table writes none'
    # a grid that has become smaller: its other rows are kept beside the table
    for seeds in 2, 1:
        path.write_text(re.sub(r'seeds: \d', f'seeds: {seeds}', path.read_text()))
        grid.run_grid(path, tmp_path/'there', **how)
    assert len(pd.read_csv(table)) == 1 and pd.read_csv(f'{table}.old').key.tolist() == [jobs[2].key, jobs[1].key]


def test_a_grid_shows_its_table_while_runs_come_and_at_the_end(tmp_path, monkeypatch):
    settings, shown = {'name': 'g', 'seeds': 2, 'product': {'method': ['ce', 'gdw']}}, []
    jobs = grid.make_jobs(settings, tmp_path/'g')
    def end(job): finish(job, grid.code_version(job.setting), test_acc_last=80 + 2*job.setting.seed)
    def run_all(left, do, retry, table, collect, **how):
        end(jobs[3]); collect(); end(jobs[1]); collect()
    for job in jobs[:3:2]: end(job)
    monkeypatch.setattr(grid, '_run_all', run_all)
    grid.run_grid(settings, tmp_path, direct=True, show=shown.append)
    assert len(shown) == 2, 'not after every run'
    assert '80.00 (1 of 2)' in shown[0] and shown[0].count('81.00 ± 1.41') == 1 and shown[1].count('81.00 ± 1.41') == 2
    assert (tmp_path/'g'/'table.txt').read_text() == shown[1] + '\n'
    grid.run_grid(settings, tmp_path, direct=True, show=shown.append)
    assert len(shown) == 3 and shown[2] == shown[1], 'once where nothing is left to do'


def test_rows_of_changed_code_are_confirmed_by_a_few_runs(tmp_path, monkeypatch):
    path, table = tmp_path/'g.yaml', tmp_path/'g.csv'
    path.write_text(yaml.safe_dump({'table': 'g.csv', 'seeds': 3, 'product': {'method': ['ce', 'gdw']}}))
    jobs, accuracy = grid.make_jobs(grid.load_grid(path), tmp_path/'here'/'g'), {'ce': 90.5, 'gdw': 80.25}
    for job in jobs: finish(job, f'old {job.setting.method}', test_acc_last=accuracy[job.setting.method], commit='first')
    monkeypatch.setattr(grid, 'code_version', lambda setting: f'old {setting.method}')
    grid.run_grid(path, tmp_path/'here', direct=True)
    monkeypatch.setattr(grid, 'code_version', lambda setting: f'new {setting.method}')
    def run_all(left, *rest, **how):
        ran.append([job.folder.name for job in left])
        for job in left: finish(job, f'new {job.setting.method}', test_acc_last=accuracy[job.setting.method], commit='second', new_one=1)
    ran = []
    monkeypatch.setattr(grid, '_run_all', run_all)
    accuracy['gdw'] = 80.26
    after = grid.run_grid(path, tmp_path/'there', direct=True, confirm=1)
    assert len(ran[0]) == 2, 'one of each kind'
    rows = pd.read_csv(table)
    assert rows[rows.method == 'ce'].code.tolist() == ['new ce']*3
    assert rows[rows.method == 'ce'].commit.tolist() == ['second', 'first', 'first']
    assert rows[rows.method == 'gdw'].code.tolist() == ['new gdw', 'old gdw', 'old gdw']
    assert after.status.tolist().count('differs') == 1 and after.error.max() == 'test_acc_last is 80.26, was 80.25'
    again = grid.run_grid(path, tmp_path/'third', dry_run=True, direct=True).status.tolist()
    assert again.count('in table') == 4 and again.count('other code') == 2
    with pytest.raises(ValueError, match='confirm is how many rows'):
        grid.run_grid(path, tmp_path/'there', direct=True, confirm=1, any_code=True)


def test_tuned_parameters_reach_the_run(tmp_path):
    (tmp_path/'tuned.csv').write_text('method,lr,epochs,clip\nce,0.01,,\ngdw,0.02,3.0,0.1\n')
    (tmp_path/'g.yaml').write_text('tuned: tuned.csv\nfixed: {lr: 0.5}\nproduct: {method: [ce, gdw]}\n')
    ce, gdw = grid.make_jobs(grid.load_grid(tmp_path/'g.yaml'), tmp_path/'runs')
    its = dict(lr=.5, out_dir='its own', save_model=False) # a grid keeps rows, and models if they are asked for
    assert ce.setting == Setting(method='ce', **its) and ce.key == grid.setting_key(ce.setting)
    assert gdw.setting == Setting(method='gdw', epochs=3, clip=.1, **its) and gdw.params['clip'] == .1


@pytest.mark.slow
def test_real_notebook_killed_and_started_again(tmp_path):
    (tmp_path/'mine.py').write_text(rule)
    mine = {'method': f'{tmp_path}/mine.py:Trust', 'power': 2}
    blocks = {'package': {'product': {'method': ['mwnet', 'curvenet']}}, 'mine': {'fixed': mine}}
    settings = {'name': 'g', 'fixed': dict(epochs=12, probe_epochs=10, noise_rate=.4, checkpoint_seconds=0.), 'blocks': blocks}
    (tmp_path/'g.yaml').write_text(yaml.safe_dump(settings))
    killed = start(tmp_path, 'g.yaml', '--threads', 1)
    wait_for(lambda: list(tmp_path.glob('runs/g/*/run.json')))
    time.sleep(7); killed.kill(); killed.communicate()
    out, err = start(tmp_path, 'g.yaml', '--threads', 1).communicate(timeout=600)
    assert out.endswith('3 runs: 3 done\n'), err
    grid.run_grid(settings, tmp_path/'undisturbed', threads=1)
    def lasting(runs): return [{k: v for k, v in row.items() if not k.startswith('seconds')} for row in rows(runs)]
    assert lasting(tmp_path/'runs') == lasting(tmp_path/'undisturbed')
