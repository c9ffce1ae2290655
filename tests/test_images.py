"Images through the whole of a run, and the options that change how it is computed."
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curve_reweight.datasets import cifar10_classes
from curve_reweight.experiment import Setting, run

few = dict(dataset='cifar10_jpeg', model='resnet32', noise_kind='flip2', imbalance_ratio=2., meta_per_class=2, probe_epochs=2, drop_epochs=0, epochs=2, batch_size=50, meta_batch_size=20)


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
                else: Image.fromarray((draw.integers(0, 128, (32, 32, 3)) + 100*np.array([c & 1, c >> 1 & 1, c >> 2 & 1])).astype(np.uint8)).save(folder/f'{i:04}.jpg', quality=75)
    return root


def test_resnet32_on_jpegs_from_end_to_end(jpegs, tmp_path):
    done = run(Setting(**few, data_root=str(jpegs), out_dir=str(tmp_path), probe_cache=str(tmp_path/'cache')))
    assert done.row['dataset'] == 'cifar10_jpeg' and done.row['n_test'] == 100 and 100 < done.row['n_train'] < 180
    assert done.row['realised_noise_rate'] > .2 and 0 <= done.row['test_acc_last'] <= 100
    assert {'row.json', 'history.csv', 'weights.csv', 'curves.npz'} <= {p.name for p in tmp_path.iterdir()}


def test_online_and_skipped_layers_on_jpegs(jpegs):
    assert run(Setting(**{**few, 'method': 'mwnet', 'epochs': 1}, online=True, skip_layers=3, data_root=str(jpegs), precision='bf16', channels_last=True)).result.history.loss.notna().all()


def test_tensorboard(jpegs, tmp_path):
    pytest.importorskip('tensorboard')
    run(Setting(method='ce', epochs=2, tensorboard=True, out_dir=str(tmp_path)))
    assert any(p.name.startswith('events.out') and p.stat().st_size > 100 for p in tmp_path.iterdir())


def test_tensorboard_needs_a_folder():
    with pytest.raises(ValueError, match='needs an out_dir'): Setting(tensorboard=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on the CPU')
def test_compiled_steps_compute_the_same():
    eager = Setting(method='ce', epochs=2, batch_size=64, imbalance_ratio=1., lr=.01)
    a, b = run(eager), run(replace(eager, compile=True))
    assert np.abs(a.result.history.loss - b.result.history.loss).max() < 1e-3


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
