"Images through the whole of a run, and the options that change how it is computed."
import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from curve_reweight.datasets import cifar10_classes
from curve_reweight.experiment import Setting, run
from curve_reweight.meta import meta_gradient
from curve_reweight.reuse import Compiled, forward_pass
from curve_reweight.steps import optimizer_step, step_and_meta_gradient
from curve_reweight.weighting import logit_gradient

few = dict(dataset='cifar10_jpeg', model='resnet32', noise_kind='flip2', imbalance_ratio=2., meta_per_class=2, method='curvenet_gdw',
           probe_epochs=2, epochs=2, batch_size=50, meta_batch_size=20)


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    "300 small JPEGs in CIFAR-10's layout, each class with a colour of its own; with `CIFAR10_JPEG`, that folder's first images"
    root, given, draw = tmp_path_factory.mktemp('jpegs'), os.environ.get('CIFAR10_JPEG'), np.random.default_rng(0)
    for part, n in ('train', 20), ('test', 10):
        for c, name in enumerate(cifar10_classes):
            folder = root/part/name
            folder.mkdir(parents=True)
            for i in range(n):
                if given: shutil.copy(Path(given)/part/name/f'{i:04}.jpg', folder)
                else:
                    pixels = draw.integers(0, 128, (32, 32, 3)) + 100*np.array([c & 1, c >> 1 & 1, c >> 2 & 1])
                    Image.fromarray(pixels.astype(np.uint8)).save(folder/f'{i:04}.jpg', quality=75)
    return root


@pytest.mark.slow
def test_resnet32_on_jpegs_from_end_to_end(jpegs, tmp_path):
    done = run(Setting(**few, drop_epochs=0, data_root=str(jpegs), out_dir=str(tmp_path), probe_cache=str(tmp_path/'cache')))
    assert done.row['dataset'] == 'cifar10_jpeg' and done.row['n_test'] == 100 and 100 < done.row['n_train'] < 180
    assert done.row['realised_noise_rate'] > .2 and 0 <= done.row['test_acc_last'] <= 100
    assert {'row.json', 'history.csv', 'suspects.csv', 'curves.npz'} <= {p.name for p in tmp_path.iterdir()}


def test_online_and_skipped_layers_on_jpegs(jpegs):
    cheap = dict(method='mwnet', epochs=1, online=True, skip_layers=3, precision='bf16', channels_last=True)
    assert run(Setting(**{**few, **cheap}, data_root=str(jpegs))).result.history.loss.notna().all()


def test_tensorboard(jpegs, tmp_path):
    pytest.importorskip('tensorboard')
    run(Setting(method='ce', epochs=2, tensorboard=True, out_dir=str(tmp_path)))
    assert any(p.name.startswith('events.out') and p.stat().st_size > 100 for p in tmp_path.iterdir())


def test_tensorboard_needs_a_folder():
    with pytest.raises(ValueError, match='needs an out_dir'): Setting(tensorboard=True)


compiles = pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on the CPU')


@pytest.mark.slow
@compiles
@pytest.mark.parametrize('how', [dict(method='ce'), dict(method='curvenet_gdw', drop_epochs=0),
                                 dict(method='mwnet', online=True, skip_layers=1)], ids=lambda how: how['method'])
def test_compiled_steps_compute_the_same(how):
    data = dict(dataset='digits', model='small_cnn', train_on_meta=False, imbalance_ratio=1.)
    eager = Setting(**data, **how, epochs=3, probe_epochs=3, batch_size=64, lr=.01)
    a, b = run(eager), run(replace(eager, compile=True))
    assert np.abs(a.result.history[['loss', 'meta_loss']] - b.result.history[['loss', 'meta_loss']]).max().max() < 1e-3
    assert a.result.weights is None or (a.result.weights - b.result.weights).abs().max() < 1e-2


@pytest.mark.slow
@compiles
@pytest.mark.parametrize('engine', ['jvp', 'finite_difference'])
def test_compiled_meta_gradient_with_dropout_and_batch_norm(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(.3), nn.Linear(16, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(4, (n,)),
                torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))) for n in (8, 8, 5)]

    def gradients(passes):
        "Meta gradients of three batches in a row, the last of another size, by look-ahead and online"
        torch.manual_seed(1)
        for x, y, x_meta, y_meta in batches:
            forward = forward_pass(passes, x, engine)
            D = logit_gradient(forward.logits, y)
            yield meta_gradient(forward, optimizer, D, x_meta, y_meta, optimizer_step, engine)[1]
            yield step_and_meta_gradient(forward, optimizer, D, x_meta, y_meta, engine)[1]

    start = copy.deepcopy(model.state_dict())
    torch._dynamo.reset(); counters.clear()
    ours = list(gradients(Compiled(model)))
    assert counters['stats']['unique_graphs'] >= 3 - (engine != 'jvp') and not counters['graph_break'] # it was compiled, all of it
    model.load_state_dict(start); optimizer.state.clear()
    for a, b in zip(ours, gradients(model)): assert (a - b).norm() < (1e-10 if engine == 'jvp' else 1e-4)*b.norm()


@pytest.mark.slow
def test_a_million_curves_are_held_once():
    "300 epochs of 200,000 samples, normalised, weighed and written, take little more than their 240 MB (a million: 1.2 GB)"
    code = r'''
import re, tempfile, torch
from curve_reweight.curves import RelativeCurves
from curve_reweight.probe import LossCurves
from curve_reweight.weighting import CurveNet, make_batch
peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', open('/proc/self/status').read())[1])/1e3 # MB
torch.set_num_threads(1)
before, curves = peak(), LossCurves(torch.ones(200_000, 300), torch.arange(200_000) % 14, torch.ones(300).numpy())
net = CurveNet(RelativeCurves(curves), 14)
net(make_batch(torch.arange(256), torch.zeros(256, 14), torch.zeros(256).long()))
with tempfile.TemporaryDirectory() as d:
    curves.save(f'{d}/curves.npz')
    after = peak()
print(after - before)
'''
    if sys.platform != 'linux': pytest.skip('reads /proc')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 230 < float(done.stdout) < 1.25*240, done.stdout
