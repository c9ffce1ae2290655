"Steps that a GPU would replay, on the CPU: a stand-in notes every operation, and does the same ones again on the same memory."
import collections
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from curve_reweight.experiment import run
from curve_reweight.setting import Setting


class Noted(TorchDispatchMode):
    "Notes the operations that are done, as a CUDA graph notes kernels"
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default: raise RuntimeError('the step asks for a number')
        outputs = func(*args, **(kwargs or {}))
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):  # a view needs no work
            self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def again(self):
        for func, args, kwargs, outputs in self.calls:
            for kept, now in zip(tree_flatten(outputs)[0], tree_flatten(func(*args, **kwargs))[0]):
                if isinstance(kept, torch.Tensor) and kept is not now and not kept._is_zerotensor(): kept.copy_(now)


class OnTheCPU:
    "A recorder: what Python decides and which memory it names is frozen at the recording"
    replays = 0

    def aside(self, call): return call(), True

    def __call__(self, call):
        with Noted() as noted: outputs = call()
        done = iter([None])  # the recording was a step itself, as it is on no GPU

        @torch.no_grad()
        def replay():
            OnTheCPU.replays += 1
            if next(done, 0) == 0: noted.again()
        return replay, outputs


weight_net = dict(weight_optimizer='sgd', weight_lr=.1)  # Adam counts its steps on a GPU, or asks the CPU for their number
cases = {
    'ce': {}, 'focal': {}, 'class_balanced': {}, 'reed_hard': {}, 'ldam_drw': {}, 'o2u': {}, 'glc': {}, 'meta_only': {}, 'fine_tuning': {},
    'posterior_labels': {},
    'l2rw': {}, 'insw': {}, 'mwnet': weight_net, 'cmwnet': weight_net, 'curvenet': weight_net, 'gdw': weight_net, 'curvenet_gdw': weight_net,
    'mwnet online': {**weight_net, 'online': True, 'meta_every': 2}, 'curvenet skip': {**weight_net, 'skip_layers': 1},
    'gdw differences': {**weight_net, 'engine': 'finite_difference'}, 'ce drw': {'drw': True},
    'mwnet eval': {**weight_net, 'skip_layers': 1, 'skipped_mode': 'eval'},
}


def last(case):
    short = dict(dataset='digits', model='small_cnn', epochs=5, probe_epochs=5, batch_size=32, wave_batch_size=32)
    done = run(Setting(method=case.split()[0], **short, **cases[case]))
    row = {k: v for k, v in done.row.items() if not k.startswith('seconds')}
    return json.dumps(row), done.result.history.to_csv(), [p.detach() for p in done.result.model.parameters()], done.result.weights


fast = 'ldam_drw', 'l2rw', 'curvenet_gdw', 'mwnet online'
@pytest.mark.parametrize('case', [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases])
def test_replayed_steps_are_the_same(case, monkeypatch):
    plain = last(case)
    for room in 'train', 'probe': monkeypatch.setattr(f'curve_reweight.{room}.recorder', lambda *_: OnTheCPU())
    monkeypatch.setattr(OnTheCPU, 'replays', 0)
    monkeypatch.setattr(torch.nn.functional, 'one_hot', lambda y, num_classes: torch.eye(num_classes, dtype=torch.int64)[y])  # torch's looks at y, though not on a GPU
    replayed = last(case)
    assert OnTheCPU.replays > 20
    assert replayed[:2] == plain[:2]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], replayed[2]))
    assert plain[3] is None or torch.equal(plain[3], replayed[3])


class Waits(TorchDispatchMode):
    "Counts operations for which the CPU would wait for a GPU: those whose outcome, or its size, Python has to know"
    names = {'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::equal', 'aten::unique_consecutive', 'aten::_unique2'}

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = name in ('aten::index', 'aten::index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.names or by_mask: self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(monkeypatch, case, batch_size):
    "How often an epoch waits: the operations, and tensors fetched to the CPU or to Python"
    with monkeypatch.context() as m, Waits() as counted:
        def fetching(name):
            fetch = getattr(torch.Tensor, name)
            def noted(self, *args, **kwargs):
                counted.found[name] += 1
                return fetch(self, *args, **kwargs)
            m.setattr(torch.Tensor, name, noted)
        for name in 'cpu', 'tolist', 'numpy': fetching(name)
        short = dict(dataset='digits', model='small_cnn', epochs=2, probe_epochs=2, batch_size=batch_size, wave_batch_size=batch_size)
        run(Setting(method=case.split()[0], **short, **cases[case]))
    return counted.found


@pytest.mark.parametrize('case', ['l2rw', 'curvenet_gdw', 'mwnet online', 'insw', *(pytest.param(c, marks=pytest.mark.slow) for c in ('ce', 'gdw', 'curvenet'))])
def test_no_step_waits_for_the_gpu(case, monkeypatch):
    few, many = waits(monkeypatch, case, 64), waits(monkeypatch, case, 32)
    assert few and few == many  # what waits does so once an epoch or once a run
