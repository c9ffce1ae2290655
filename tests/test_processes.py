"One training by two processes, which speak through gloo: the same numbers as one process, and what happens when one of them dies."
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from curve_reweight import slmo
from curve_reweight.core import load_checkpoint, seed_everything
from curve_reweight.corruption import BiasedData
from curve_reweight.data import Samples
from curve_reweight.experiment import run
from curve_reweight.loop import Training, probabilities, shared_probabilities
from curve_reweight.probe import LossCurves, own_curves, probe, probe_plan, whole_curves
from curve_reweight.processes import SampleTable, joined, own_rows, size, total, traffic
from curve_reweight.replay import recorder
from curve_reweight.setting import Setting
from curve_reweight.train import Meta, Task, train
from curve_reweight.weighting import find_method

several = multiprocessing.get_context('forkserver')  # a server that has imported everything, so that each process starts at once
several.set_forkserver_preload(['curve_reweight.experiment'])


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def process(number, port, log, work, args):
    "One of two processes, as torchrun would start it; what it says goes to a file"
    for stream in 1, 2: os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    work(*args)


def start_two(folder, work, *args):
    port = free_port()
    logs = [folder/f'{number}.log' for number in range(2)]
    for log in logs: log.write_text('')
    both = [several.Process(target=process, args=(number, port, str(logs[number]), work, args)) for number in range(2)]
    for p in both: p.start()
    return both, logs


def in_two(folder, work, *args, seconds=400):
    "Let two processes work to their end"
    both, logs = start_two(folder, work, *args)
    for p in both: p.join(seconds)
    assert [p.exitcode for p in both] == [0, 0], '\n'.join(log.read_text() for log in logs)
    return [log.read_text() for log in logs]


# Numbers: 20 steps in float64

def data():
    g = torch.Generator().manual_seed(0)
    def samples(n):
        x = torch.randn(n, 8, generator=g, dtype=torch.float64)
        return Samples(x, x[:, :5].argmax(1))
    train_set, meta, test = samples(320), samples(64), samples(101)
    return BiasedData(train_set, meta, test, train_set.y, None, tuple('abcde'), np.arange(320), np.arange(320, 384))


def network(norm=False):
    seed_everything(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(8, 16), middle, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)).double()


cases = {  # Name → method, its options, and changes of the training and the meta step
    'cross-entropy': ('ce', {}, {'drw': True}), 'mwnet': ('mwnet', {}, {}), 'normalised': ('mwnet', {'normalise_weights': True}, {}),
    'curvenet': ('curvenet', {}, {}), 'gdw': ('gdw', {}, {}), 'curvenet_gdw': ('curvenet_gdw', {'curve_std': True}, {}),
    'l2rw': ('l2rw', {}, {}), 'insw': ('insw', {}, {}), 'soft_label': ('soft_label', {}, {}), 'gen_label': ('gen_label', {}, {}),
    'cmwnet': ('cmwnet', {'normalise_weights': True}, {}), 'focal': ('focal', {}, {}), 'reed_hard': ('reed_hard', {}, {}),
    'SLMO': ('mwnet', {}, {'skip_layers': '2'}), 'SLMO, eval': ('curvenet', {}, {'skip_layers': '2', 'skipped_mode': 'eval'}),
    'online': ('curvenet', {}, {'online': True}), 'meta_every': ('mwnet', {}, {'meta_every': 2}),
    'Adam': ('mwnet', {}, {'optimizer': 'adam', 'virtual_step': 'optimizer'}), 'double backward': ('mwnet', {}, {'engine': 'double_backward'}),
    'famus': ('famus', {'open_layers': 2}, {}), 'famus, drawn': ('famus', {'open_layers': 2}, {}),
    'sync_bn': ('mwnet', {}, {'sync_bn': True}), 'sync_bn, double backward': ('gdw', {}, {'sync_bn': True, 'engine': 'double_backward'}),
}


def trained(case):
    "All that 20 steps change"
    name, options, changes = cases[case]
    d, method = data(), find_method(name)
    curves = own_curves(LossCurves(torch.rand(320, 12, generator=torch.Generator().manual_seed(1)), d.train.y, np.ones(12)))
    seed_everything(0)
    rule = method.factory(Task(d, network, curves=curves), **options)
    rule = rule and rule.double()
    in_training = {k: changes[k] for k in ('optimizer', 'sync_bn', 'drw') if k in changes}
    training = Training(epochs=4, lr=.01 if 'optimizer' in changes else .1, batch_size=64, schedule='cosine', **in_training)
    meta = Meta(**{'meta_batch_size': 32, 'virtual_step': method.virtual_step, **{k: v for k, v in changes.items() if k not in in_training}})
    model = network('sync_bn' in changes)
    with patch.object(slmo, '_gumbel', slmo._gumbel if 'drawn' in case else torch.zeros_like): result = train(model, d, rule, training, meta)
    for p in model.parameters(): torch.testing.assert_close(total(p.detach()), size()*p.detach())  # processes stay together
    torch.testing.assert_close(shared_probabilities(model, d.test), probabilities(model, d.test))
    weights = {} if result.weights is None else {'weights': result.weights}
    numbers = {k: torch.tensor(result.history[k]) for k in ('loss', 'meta_loss', 'test_acc')}
    own = {} if rule is None else {f'rule {k}': v for k, v in rule.state_dict().items() if v is not None and v.is_floating_point()}
    assert rule is None or all(len(m) == len(own_rows(range(320))) for m in rule.modules() if isinstance(m, SampleTable))
    buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers, **own, **weights, **numbers}


def all_cases(names, file):
    with joined():
        found = {case: trained(case) for case in names}
        found['traffic'] = counted()
    if int(os.environ['RANK']) == 0: torch.save(found, file)


def counted():
    "Bytes that are sent for a step, and the least that could be"
    d, rule, net = data(), find_method('mwnet').factory(None).double(), network()
    one = replace(d, test=None)
    before = dict(traffic)
    train(net, one, rule, Training(epochs=1, batch_size=64), Meta(meta_batch_size=32, virtual_step='plain'))
    floor = 8*(3*sum(p.numel() for p in net.parameters()) + sum(p.numel() for p in rule.parameters()))
    return (traffic['bytes'] - before['bytes'])/5, floor


def check(folder, names):
    in_two(folder, all_cases, names, str(folder/'found.pt'))
    together = torch.load(folder/'found.pt')
    for case in names:
        if 'drawn' in case: continue  # one process draws otherwise than two
        alone = trained(case)
        assert alone.keys() == together[case].keys()
        for name, a in alone.items():
            b = together[case][name]
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, equal_nan=True,
                                       msg=lambda m, name=name, case=case: f'{case}, {name}: {m}')
    sent, floor = together['traffic']
    assert sent == floor + 8*5 + 8*(3 + 320)/5  # two counts, two losses, another count; once a check of the tangent and the samples' weights


first = ['mwnet', 'normalised', 'curvenet', 'gdw', 'curvenet_gdw', 'l2rw', 'insw', 'soft_label', 'SLMO', 'online', 'meta_every']
def test_two_processes_train_what_one_does(tmp_path): check(tmp_path, first)


@pytest.mark.slow
def test_so_do_the_others(tmp_path): check(tmp_path, [case for case in cases if case not in first])


def probed(file):
    "Curves of the probe, with rates that fall into a wave, and what is left of them when they are read again"
    d = data()
    with joined():
        own = probe(network(), d.train, probe_plan(10, .1, 64, 32), Training())
        rows, whole = len(own.losses), whole_curves(own)
    if int(os.environ['RANK']) == 0: torch.save([rows, whole.losses], file)
    else: assert whole is None


@pytest.mark.slow
def test_curves_of_two_processes_are_those_of_one(tmp_path):
    in_two(tmp_path, probed, str(tmp_path/'curves.pt'))
    rows, losses = torch.load(tmp_path/'curves.pt')
    d = data()
    alone = probe(network(), d.train, probe_plan(10, .1, 64, 32), Training())
    assert rows == 160
    torch.testing.assert_close(losses, alone.losses, rtol=1e-5, atol=1e-6)


# Runs

small = dict(dataset='digits', method='curvenet_gdw', model='small_cnn', epochs=4, probe_epochs=4, batch_size=64,
             wave_batch_size=32, noise_rate=.2, imbalance_ratio=2., checkpoint_seconds=0.)


def command(words):
    from curve_reweight.experiment import main
    sys.argv = ['curve_reweight', *words]
    main()


def words_of(settings): return [word for name, value in settings.items() for word in (f'--{name}', str(value))]


def wait_for(condition, process, seconds=120):
    "Wait until something is true, or the process has ended"
    until = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < until: time.sleep(.01)


def row(out): return json.loads((out/'row.json').read_text())


def test_a_run_of_two_processes_ends_like_that_of_one(tmp_path):
    out = tmp_path/'out'
    said = in_two(tmp_path, command, words_of({**small, 'out_dir': out}))
    assert 'test accuracy' in said[0] and said[1] == ''
    alone, two = run(Setting(**small)), row(out)
    assert two['processes'] == 2 and 'processes' not in alone.row
    assert {k for k in two if k != 'processes'} == set(alone.row)
    assert abs(two['test_acc_last5'] - alone.row['test_acc_last5']) < 10 and abs(two['noise_auc'] - alone.row['noise_auc']) < .15
    curves = LossCurves.load(out/'curves.npz')
    assert curves.losses.shape == alone.curves.losses.shape and curves.losses.isfinite().all()
    assert not list(out.glob('*.pt')) and {'model.safetensors', 'history.csv', 'suspects.csv', 'predictions.csv'} <= {p.name for p in out.iterdir()}
    weights = pd.read_csv(out/'suspects.csv').weight
    assert len(weights) == two['n_train'] and weights.nunique() > .9*len(weights)


def test_one_of_two_dies_and_the_other_goes_on_alone(tmp_path):
    out = tmp_path/'out'
    words = words_of({**small, 'method': 'curvenet', 'epochs': 6, 'out_dir': out})
    both, logs = start_two(tmp_path, command, words)
    wait_for(lambda: (out/'train.previous.pt').exists(), both[0])
    both[1].kill()
    both[0].join(60)
    said = logs[0].read_text()
    assert both[0].exitcode == 1 and both[1].exitcode == -signal.SIGKILL and not (out/'row.json').exists()
    assert re.fullmatch(r'curve_reweight: another of the 2 processes has ended.*goes on from the last checkpoint.*\n', said), said
    before = load_checkpoint(out, 'train')['state']
    assert before['learned']['kept']['rows'].ne(1).sum() > 64  # rows of both processes
    last = several.Process(target=command, args=(words,))
    last.start()
    last.join(120)
    assert last.exitcode == 0 and 'processes' not in row(out) and len(pd.read_csv(out/'history.csv')) == 6
    assert row(out)['test_acc_last'] > 60


@pytest.mark.parametrize('words, message', [
    (dict(method='co_teaching'), 'co_teaching cannot be trained by several processes; these can: .*curvenet_gdw'),
    (dict(method='mwnet', batch_size=16), 'batch_size is 16, of which 4 processes would have few'),
    (dict(method='mwnet', meta_batch_size=31), 'meta_batch_size is 31'), (dict(method='curvenet'), 'wave_batch_size is 16'),
    (dict(method='ce', sync_bn=True, compile=True), 'choose sync_bn or compile')])
def test_what_several_processes_cannot_do_is_refused(words, message, monkeypatch):
    for room in 'weighting', 'processes', 'experiment': monkeypatch.setattr(f'curve_reweight.{room}.size', lambda: 4)
    monkeypatch.setattr('curve_reweight.processes.rank', lambda: 0)
    with pytest.raises(ValueError, match=message): run(Setting(dataset='digits', model='small_cnn', **words))


def test_steps_of_several_processes_are_not_recorded(monkeypatch):
    monkeypatch.setattr('curve_reweight.replay.size', lambda: 2)
    assert recorder(Training(), 'cuda') is None


@pytest.mark.slow
@pytest.mark.parametrize('method', ['ce', 'glc', 'fine_tuning', 'posterior_labels', 'meta_only', 'oracle', 'ldam_drw', 'ceiling', 'insw',
                                    'soft_label', 'famus'])
def test_other_methods_and_more_processes_in_the_middle(method, tmp_path):
    "One process begins, two go on"
    out = tmp_path/'out'
    words = words_of({**small, 'method': method, 'epochs': 8, 'out_dir': out})
    alone = several.Process(target=command, args=(words,))
    alone.start()
    wait_for(lambda: list(out.glob('*.previous.pt')), alone)
    alone.kill(); alone.join()
    in_two(tmp_path, command, words)
    expected = run(Setting(**{**small, 'method': method, 'epochs': 8})).row
    assert row(out)['processes'] == 2 and abs(row(out)['test_acc_last5'] - expected['test_acc_last5']) < 10


@pytest.mark.slow
def test_mnist5k_is_within_noise_of_one_process(tmp_path):
    settings = dict(method='curvenet_gdw', epochs=10, probe_epochs=10)
    in_two(tmp_path, command, words_of({**settings, 'out_dir': tmp_path/'out'}), seconds=3000)
    alone = [run(Setting(**settings, seed=seed)).row for seed in range(3)]
    acc = [r['test_acc_last5'] for r in alone]
    assert min(acc) - 2 < row(tmp_path/'out')['test_acc_last5'] < max(acc) + 2


@pytest.mark.slow
def test_torchrun_starts_it_and_says_errors_once(tmp_path):
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'curve_reweight']
    words = words_of({**small, 'method': 'mwnet', 'out_dir': tmp_path/'out'})
    done = subprocess.run([*start, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('test accuracy') == 1 and row(tmp_path/'out')['processes'] == 2, done.stderr
    for bad, sentence in ('--noise_rate=2', 'noise_rate is 2'), ('--method=har', 'har cannot be trained by several processes'):
        done = subprocess.run([*start, *words, bad, f'--out_dir={tmp_path}/refused'], capture_output=True, text=True)
        assert done.returncode != 0 and done.stderr.count(sentence) == 1, done.stderr


@pytest.mark.slow
def test_torchrun_starts_it_again_when_a_process_dies(tmp_path):
    out = tmp_path/'out'
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '--max-restarts=1', '-m', 'curve_reweight']
    words = words_of({**small, 'method': 'insw', 'epochs': 12, 'out_dir': out})
    with open(tmp_path/'said', 'w') as said: agent = subprocess.Popen([*start, *words], stdout=said, stderr=said)
    until = time.monotonic() + 300
    while not (out/'train.previous.pt').exists() and agent.poll() is None and time.monotonic() < until: time.sleep(.01)
    children = Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(400) == 0, (tmp_path/'said').read_text()
    history = pd.read_csv(out/'history.csv')
    assert row(out)['processes'] == 2 and history.epoch.tolist() == list(range(12)) and len(children) == 2


def test_own_loop_on_the_page(root):
    "The code of docs/own_loop.md, run as it stands"
    blocks = re.findall(r'```python\n(.*?)```', (root/'docs'/'own_loop.md').read_text(encoding='utf-8'), re.S)
    names = {}
    for block in blocks: exec(block, names)
    assert names['weights'].shape == (64,) and names['weights'].std() > 0
    assert names['clean_accuracy'] > 80
