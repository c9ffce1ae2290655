"A million samples with 300 probe epochs: what a run takes of memory, beside the package, the samples and the model."
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

script = '''
import resource, sys
from pathlib import Path

import numpy as np
import torch

from curve_reweight.corruption import BiasedData
from curve_reweight.data import make_samples
from curve_reweight.experiment import run
from curve_reweight.probe import LossCurves, _by_sample, _mapped
from curve_reweight.setting import Setting

folder, N, T, C = Path(sys.argv[1]), int(sys.argv[2]), 300, 10
rng = np.random.default_rng(0)
true = torch.from_numpy(rng.integers(0, C, N + 2000))
x = torch.eye(C)[true] + torch.from_numpy(rng.normal(0, .5, (N + 2000, C)).astype(np.float32))
noisy = torch.from_numpy(rng.random(N) < .3)
y = torch.where(noisy, (true[:N] + 1) % C, true[:N])
meta, test = (make_samples(x[i:i + 1000], true[i:i + 1000], C) for i in (N, N + 1000))
data = BiasedData(make_samples(x[:N], y, C), meta, test, true[:N], None, tuple(map(str, range(C))), np.arange(N), N + np.arange(1000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

big = dict(method='curvenet', model='mlp', epochs=1, batch_size=4096, wave_batch_size=4096, lr=.01, train_on_meta=False, curves_on_disk=True)
first = run(Setting(**big, probe_epochs=2, out_dir=str(folder/'probed')), data)
assert tuple(first.curves.losses.shape) == (N, 2) and first.curves.losses.dtype == torch.float16

with open(folder/'curves.f32', 'wb') as f: # as a probe writes them, epoch by epoch
    for t in range(T): f.write((rng.random(N, np.float32) + noisy.numpy()).tobytes())
_by_sample(folder/'curves.f32', folder/'curves.npy', N, T)
long = LossCurves(_mapped(folder/'curves.npy'), y, np.full(T, .1), folder/'curves.npy')
run(Setting(**big, probe_epochs=T, out_dir=str(folder/'run')), data, curves=long)
again = LossCurves.load(folder/'run'/'curves.npz')
assert torch.equal(again.losses[::9999], long.losses[::9999])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/2**20)
'''


@pytest.mark.slow
def test_a_million_samples_take_less_than_two_gigabytes(tmp_path):
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path), '1000000'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gigabytes = float(done.stdout)
    print(f'{gigabytes:.2f} GB')
    assert gigabytes < 2
    losses, table = np.load(tmp_path/'run/curves.npy', mmap_mode='r'), pd.read_csv(tmp_path/'run/suspects.csv')
    means = np.concatenate([losses[i:i + 2**16, 5:].mean(1, np.float64) for i in range(0, len(losses), 2**16)])[table['index']]
    relative = means - table.label.map(pd.Series(means).groupby(table.label).mean())
    assert np.abs(relative - table.curve).max() < 1e-4  # by NumPy, from the file
