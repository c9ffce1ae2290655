"""Bad input ends in one clear sentence before any work, or is harmless: never in an internal error, a hang, or a wrong result."""
import os
import time
import traceback
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn

from curve_reweight import estimator, grid
from curve_reweight.classifier import Classifier, images_in, load_classifier, save_classifier
from curve_reweight.core import lock
from curve_reweight.corruption import biased_from_samples, make_biased
from curve_reweight.data import ImageTensor, Reader, Samples, Source, digits, make_samples
from curve_reweight.datasets import csv_manifest, image_folder
from curve_reweight.estimator import ReweightedClassifier
from curve_reweight.experiment import run
from curve_reweight.probe import LossCurves
from curve_reweight.setting import Setting, known_options, parameters

small = Setting(dataset='digits', model='small_cnn', method='ce', epochs=1, probe_epochs=4)
bounded = settings(max_examples=80, deadline=30000, derandomize=True, suppress_health_check=list(HealthCheck))
sentences = (ValueError, TypeError, OSError)
count = 0


def refusal(f, kinds=sentences):
    "The sentence that a call ends with, or scikit-learn's own lines; None where it goes through"
    global count
    count += 1
    try: f()
    except kinds as e: said, trace = str(e), traceback.extract_tb(e.__traceback__)
    else: return None
    assert said and len(said) < 2000 and ('\n' not in said.strip() or 'sklearn' in trace[-1].filename), said
    return said


def refused(words, f):
    said = refusal(f)
    assert said is not None, f'was taken, wanted a sentence with {words!r}'
    assert words in said, said


# --- settings

wrong_settings = {
    'is a fraction|must be a fraction': dict(noise_rate=1.5), 'noise_rate': dict(noise_rate=float('nan')),
    'imbalance_ratio': dict(imbalance_ratio=.5), 'would be left empty': dict(imbalance_ratio=1e6),
    'does not read noise_map': dict(noise_map={0: 1}), 'does not read noise_matrix': dict(noise_matrix=[[1]]),
    'classes are whole numbers': dict(noise_kind='asymmetric', noise_map={.5: 1}),
    'to itself': dict(noise_kind='asymmetric', noise_map={0: 0}), 'names class 77': dict(noise_kind='asymmetric', noise_map={0: 77}),
    'needs noise_matrix': dict(noise_kind='matrix'),
    'must hold probabilities': dict(noise_kind='matrix', noise_matrix=(np.eye(10)*2).tolist()),
    'drop_epochs is -1': dict(method='curvenet', drop_epochs=-1), 'drop_epochs is 4': dict(method='curvenet', drop_epochs=4),
    'embedding is 0': dict(method='curvenet', embedding=0), 'clip is -1': dict(method='gdw', clip=-1.),
    'clip is inf': dict(method='gdw', clip=float('inf')), 'lr is inf': dict(lr=float('inf')), 'lr is nan': dict(lr=float('nan')),
    'lr is 0': dict(lr=0.), 'label_lr is 0': dict(method='soft_label', label_lr=0.), 'weight_decay is -1': dict(weight_decay=-1.),
    'momentum is 2': dict(momentum=2.), 'momentum and zero dampening': dict(momentum=0.), 'seed is': dict(seed=2**70),
    'split_seed is': dict(split_seed=-1), 'epochs is': dict(epochs=10**12), 'drw_start is 2': dict(drw=True, drw_start=2.),
    'workers is -1': dict(workers=-1), 'checkpoint_seconds is -1': dict(checkpoint_seconds=-1.),
    'levels 0 to 2': dict(method='mwnet', skip_layers=9), 'skip_layers is -1': dict(method='mwnet', skip_layers=-1),
    'no module': dict(method='mwnet', skip_layers='none'), 'wanted int or str': dict(method='mwnet', skip_layers=[0]),
    'meta_every is 0': dict(method='mwnet', meta_every=0), 'is no method': dict(method=None),
    'there is no file': dict(method='nowhere.py:Rule'), 'unknown method': dict(method='curvnet'), 'unknown schedule': dict(schedule='x'),
    'drops rise': dict(schedule=[[-1], .1]), 'cannot be used': dict(optimizer='lbfgs'), 'dense gradients': dict(optimizer='SparseAdam'),
    'unknown optimizer': dict(optimizer='sgdd'), 'cannot be read': dict(pretrained='nowhere.pt'), 'zero byte': dict(out_dir='a\0b'),
    'cannot be written': dict(out_dir='/dev/null/x'), 'leave data_root empty': dict(data_root='/tmp'),
    'low_loss_per_class': dict(method='mwnet', meta_per_class=0, low_loss_per_class=10**5), 'unknown parameter': dict(nois_rate=.4),
    'does not read clip': dict(clip=.1), 'wanted float': dict(lr='0.1'), 'wanted int': dict(epochs=1.5),
    'does not read image_size': dict(image_size=32), 'does not read skip_broken': dict(skip_broken=True),
    'needs an out_dir or a probe_cache': dict(curves_on_disk=True),
    'must be from 1 to': dict(low_loss_per_class=0), 'at least 2 samples': dict(batch_size=1),
    'val_per_class is -1': dict(val_per_class=-1), 'fewer than meta_per_class': dict(meta_per_class=10**6),
    'unknown crop': dict(crop='corner'), 'unknown model': dict(model='resnet33'), 'cannot be used here': dict(device='cuda:99'),
    'forget_rate': dict(method='co_teaching', forget_rate=2.), 'first_epochs is 0': dict(method='s_model', first_epochs=0),
    'anchor_percentile is 0': dict(method='forward', anchor_percentile=0.), 'wanted list or str': dict(method='forward', transition=3),
    'lid_neighbours is 1': dict(method='d2l', lid_neighbours=1), 'update_start is 2': dict(method='joint_optimization', update_start=2.),
    'dirichlet is 0': dict(method='lccn', dirichlet=0.), 'does not read first_epochs': dict(method='ce', first_epochs=3),
}


@pytest.mark.parametrize('words', wrong_settings)
def test_wrong_settings_are_refused_before_training(words, monkeypatch):
    monkeypatch.setattr('curve_reweight.experiment._trained', None) # whoever trains fails
    monkeypatch.setattr('curve_reweight.experiment.needed_probe', None)
    named = {n: getattr(small, n) for n in ('dataset', 'model', 'method', 'epochs', 'probe_epochs')}
    said = refusal(lambda: run(Setting(**{**named, **wrong_settings[words]})))
    assert said and any(w in said for w in words.split('|')), said


anything = st.one_of(st.none(), st.booleans(), st.integers(-10**30, 10**30), st.floats(), st.text(max_size=8),
                     st.lists(st.integers(), max_size=3),
                     st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.floats()),
                                     st.one_of(st.integers(), st.floats()), max_size=2))


@bounded
@given(st.dictionaries(st.sampled_from(sorted({*parameters, *known_options()} - {'method'})), anything, max_size=3),
       st.sampled_from(['ce', 'curvenet_gdw', 'co_teaching']))
def test_any_value_of_any_parameter_is_taken_or_refused(given_, method):
    def make(): Setting(**{'dataset': 'digits', 'method': method, **given_})
    refusal(make, (ValueError, TypeError, FileNotFoundError))


# --- arrays

arrays = hnp.arrays(st.one_of(hnp.floating_dtypes(endianness='='), hnp.integer_dtypes(), hnp.boolean_dtypes(),
                              hnp.complex_number_dtypes(), hnp.datetime64_dtypes(), hnp.unicode_string_dtypes(max_len=3)),
                    hnp.array_shapes(min_dims=0, max_dims=5, max_side=5))


@bounded
@given(arrays, arrays)
def test_any_arrays_are_samples_or_refused(x, y):
    made = []
    refusal(lambda: made.append(make_samples(x, y, 3)), ValueError)
    for s in made:
        assert s.x.dtype == torch.float32 and s.x.isfinite().all() and s.y.dtype == torch.int64 and 0 <= s.y.min() <= s.y.max() < 3


class Reached(Exception): pass


@pytest.fixture
def no_training(monkeypatch):
    def stop(*_, **__): raise Reached
    monkeypatch.setattr(estimator, 'run', stop)


tables = st.one_of(
    arrays, st.lists(st.lists(st.one_of(st.floats(), st.text(max_size=2), st.none()), max_size=3), max_size=4),
    st.none(), st.text(max_size=4), st.integers(),
    st.dictionaries(st.text(max_size=2), st.lists(st.one_of(st.floats(), st.dates(), st.none()), min_size=4, max_size=4),
                    min_size=1, max_size=3).map(pd.DataFrame))


@settings(bounded, suppress_health_check=list(HealthCheck))
@given(tables, st.one_of(arrays, st.lists(st.one_of(st.integers(0, 2), st.text(max_size=1), st.none(), st.floats()), max_size=5),
                         st.none()))
def test_any_table_is_fitted_or_refused(no_training, X, y):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        def fit():
            try: ReweightedClassifier(method='ce').fit(X, y)
            except Reached: pass # all checks are behind it
        refusal(fit)


def test_what_looks_like_data_and_is_not(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 2
    refused('masked array', lambda: make_samples(np.ma.masked_array(x, x > 0), y, 2))
    refused('wanted real numbers', lambda: make_samples(x + 1j, y, 2))
    refused('channels come first', lambda: make_samples(np.zeros((6, 8, 8, 3)), y, 2))
    refused('channels come first', lambda: ImageTensor(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), (.5,)*3, (.5,)*3))
    refused('channels come first', lambda: ReweightedClassifier().fit(np.zeros((6, 8, 8, 3)), y))
    refused('differ in size', lambda: make_samples([[1], [1, 2]], [0, 1], 2))
    refused('out of range', lambda: make_samples(x, y + 1, 2))
    samples = make_samples(x, y, 2)
    refused('two classes are called', lambda: biased_from_samples(samples, None, None, ('a', 'a')))
    refused('one class only', lambda: biased_from_samples(make_samples(x, y*0, 1), None, None, ('a',)))
    refused('are the same samples', lambda: biased_from_samples(samples, samples, None, ('a', 'b')))
    refused('holds no sample of class 2', lambda: biased_from_samples(samples, None, None, ('a', 'b', 'c')))
    refused('two classes are called', lambda: make_biased(Source(samples, samples, ('a', 'a'))))
    beyond = Source(samples, Samples(samples.x, samples.y + 5), ('a', 'b'))
    refused('the test set has labels from 5 to 6', lambda: run(replace(small, model='mlp', imbalance_ratio=1., meta_per_class=1), beyond))
    refused('one class only', lambda: ReweightedClassifier().fit(x, y*0))
    refused('missing', lambda: ReweightedClassifier().fit(x, np.array(['a', None]*3, object)))
    refused('the same rows', lambda: ReweightedClassifier().fit(x, y, X_clean=x, y_clean=y))
    refused('y_clean has the class', lambda: ReweightedClassifier().fit(x, y, X_clean=x[:2]*2, y_clean=[0, 7]))


def test_references_that_need_the_truth_are_refused_without_it():
    source = digits()
    crawled = biased_from_samples(source.pool.take(range(300)), source.pool.take(range(300, 400)), source.test, source.classes)
    for method in 'oracle', 'ceiling': refused('nobody knows which these are', lambda: run(replace(small, method=method), crawled))


# --- classifiers

shared = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def net(*layers): return lambda: nn.Sequential(nn.Flatten(), *[layer() for layer in layers])

class Pair(nn.Module):
    def __init__(self):
        super().__init__(); self.head = nn.Linear(64, 10)
    def forward(self, x): return self.head(x.flatten(1)), x

wrong_models = {
    'no parameters': lambda: nn.Flatten(), 'the same parameters each time': lambda: shared, 'wanted [2, 10]': net(lambda: nn.Linear(64, 3)),
    'cannot take inputs': net(lambda: nn.Linear(63, 10)), 'gives a tuple': Pair,
    'wanted torch.float32': net(lambda: nn.Linear(64, 10, dtype=torch.float64)),
}


@pytest.mark.parametrize('words', wrong_models)
def test_wrong_classifiers_are_refused(words): refused(words, lambda: run(small, model_fn=wrong_models[words]))


def test_a_softmax_at_the_end_is_warned_of():
    with pytest.warns(UserWarning, match='seems to end in a softmax'):
        run(small, model_fn=net(lambda: nn.Linear(64, 10), lambda: nn.Softmax(1)))


# --- folders, lists, images

def album(root, sizes=(8,), classes=('cat', 'dog'), parts=('train', 'test'), each=3):
    for part in parts:
        for c in classes:
            for i in range(each):
                path = root/part/c/f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                draw, height = np.random.default_rng([*f'{part}{c}{i}'.encode()]), sizes[i % len(sizes)]
                Image.fromarray(draw.integers(256, size=(height, 8, 3), dtype=np.uint8)).save(path)
    return root


def test_folders_that_cannot_be_right(tmp_path):
    fine = album(tmp_path/'fine')
    assert image_folder(fine).classes == ('cat', 'dog')
    (album(tmp_path/'loop')/'train/cat/again').symlink_to(tmp_path/'loop/train')
    refused('again, by a link', lambda: image_folder(tmp_path/'loop'))
    os.mkfifo(album(tmp_path/'fifo')/'train/cat/pipe.png')
    refused('is not there', lambda: image_folder(tmp_path/'fifo'))
    os.mkfifo(tmp_path/'pipe.png')
    assert images_in(album(tmp_path/'more')) and str(tmp_path/'fifo/train/cat/pipe.png') not in images_in(tmp_path/'fifo')
    refused('it is no file', lambda: Reader((3, 8, 8), (.5,)*3, (.5,)*3)([tmp_path/'pipe.png']))
    twice = album(tmp_path/'twice')
    (twice/'test/dog/copy.png').write_bytes((twice/'train/cat/0.png').read_bytes())
    refused('are the same image', lambda: image_folder(twice))
    refused('4 of 12 images are not of', lambda: image_folder(album(tmp_path/'odd', (8, 8, 9), each=3)))
    try: (album(tmp_path/'name')/'train/cat'/os.fsdecode(b'\xff.png')).write_bytes((fine/'train/cat/0.png').read_bytes())
    except OSError: pass # a file system that takes UTF-8 only
    else: refused('is not UTF-8', lambda: image_folder(tmp_path/'name'))
    broken = album(tmp_path/'broken')
    (broken/'train/cat/0.png').write_bytes(b'no image')
    refused('1 of 12 images are bad', lambda: image_folder(broken))
    with pytest.warns(UserWarning, match='1 of 12 images are left out'): assert len(image_folder(broken, skip_broken=True).train.y) == 5
    with pytest.warns(UserWarning, match='1 of 12'):
        run(Setting(dataset='image_folder', data_root=str(broken), skip_broken=True, method='ce', epochs=1, out_dir=str(tmp_path/'run')))
    assert (tmp_path/'run/broken.txt').read_text().count('cat/0.png cannot be read') == 1
    refused('is missing', lambda: image_folder(tmp_path/'nowhere'))
    one = str(album(tmp_path/'one', classes=('cat',)))
    refused('one class only', lambda: run(Setting(dataset='image_folder', data_root=one, method='ce', epochs=1)))


def test_an_image_of_a_line_is_refused_in_no_time(tmp_path):
    Image.new('RGB', (60000, 1)).save(tmp_path/'line.png')
    began = time.time()
    refused('60000×1', lambda: Reader((3, 224, 224), (.5,)*3, (.5,)*3, cut=True)([tmp_path/'line.png']))
    assert time.time() - began < 30


words_of_lists = ['path', 'label', 'split', 'true_label', 'a.png', 'cat', 'train', 'test', '../x', '', '01', '1', 'nan']
lines = st.lists(st.lists(st.one_of(st.sampled_from(words_of_lists), st.text(max_size=4)), max_size=5), max_size=5)


@bounded
@given(lines, st.booleans())
def test_any_list_is_read_or_refused(tmp_path_factory, rows, header):
    folder = tmp_path_factory.mktemp('list')
    text = '\n'.join(','.join(row) for row in ([['path', 'label']] if header else []) + rows)
    (folder/'list.csv').write_bytes(text.encode('utf-8', 'surrogatepass'))
    refusal(lambda: csv_manifest(folder/'list.csv'), (ValueError, FileNotFoundError))


def test_lists_that_cannot_be_right(tmp_path):
    album(tmp_path, parts=('train',))
    def listed(*rows):
        (tmp_path/'list.csv').write_text('\n'.join(['path,label', *rows]) + '\n')
        return csv_manifest(tmp_path/'list.csv')
    a, b, c = (f'train/cat/{i}.png' for i in range(3))
    refused('are the same number', lambda: listed(f'{a},01', f'{b},1', f'{c},1'))
    refused('where a label is missing', lambda: listed(f'{a},nan', f'{b},cat'))
    refused('leads out of', lambda: listed('../x.png,cat'))
    (tmp_path/'lists').mkdir()
    (tmp_path/'lists/list.csv').write_text('path,label\n' + ''.join(f'train/{k}/{i}.png,{k}\n' for k in ('cat', 'dog') for i in range(3)))
    refused('is not there', lambda: csv_manifest(tmp_path/'lists/list.csv'))
    assert csv_manifest(tmp_path/'lists/list.csv', image_root=tmp_path).classes == ('cat', 'dog')
    refused('there is no folder', lambda: csv_manifest(tmp_path/'lists/list.csv', image_root=tmp_path/'none'))


# --- grids

trees = st.recursive(anything, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
    st.sampled_from(['name', 'fixed', 'product', 'blocks', 'seeds', 'method', 'lr', 'dataset', 'epochs', 'table', 'tuned']),
    inner, max_size=4)), max_leaves=8)


@bounded
@given(trees)
def test_any_grid_is_taken_or_refused(tree): refusal(lambda: grid.expand(tree), ValueError)


@bounded
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda s: s.encode('utf-8', 'surrogatepass')),
                 trees.map(lambda t: yaml.dump(t).encode())))
def test_any_file_is_a_grid_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp('grid')/'g.yaml'
    path.write_bytes(content)
    refusal(lambda: grid.expand(grid.load_grid(path)), ValueError)


def test_grids_that_would_fill_the_memory(tmp_path):
    letters = 'abcdefghijkl'
    tenfold = ''.join(f'{c}: &{c} [{",".join(["*" + p]*10)}]\n' for p, c in zip(letters, letters[1:]))
    (tmp_path/'bomb.yaml').write_text('a: &a [x,x,x,x,x,x,x,x,x,x]\n' + tenfold)
    began = time.time()
    refused('more than 100,000 values', lambda: grid.load_grid(tmp_path/'bomb.yaml'))
    refused('has 1,000,000,000 runs', lambda: grid.expand({'product': {'lr': [.1]*1000, 'epochs': [1]*1000, 'batch_size': [2]*1000}}))
    refused('at most 1,000,000', lambda: grid.expand({'seeds': 10**9}))
    assert time.time() - began < 30


# --- files of the package's own, damaged

@bounded
@given(st.binary(max_size=200))
def test_damaged_files_are_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp('own')
    for name in 'curves.npz', 'model.json', 'model.safetensors', 'run.json', 'row.json', 'checkpoint.pt': (folder/name).write_bytes(content)
    assert refusal(lambda: LossCurves.load(folder/'curves.npz'), ValueError)
    assert refusal(lambda: load_classifier(folder), (ValueError, OSError))
    assert grid._read(folder/'row.json') is None or content.strip().startswith(b'{')
    assert grid.gather(folder.parent) is not None


def test_rows_that_are_no_rows(tmp_path):
    for content in '[]', '1', '"x"', '{', '\0', 'null':
        run_folder = tmp_path/'g'/'one-0123456789'
        run_folder.mkdir(parents=True, exist_ok=True)
        for name in 'row.json', 'run.json': (run_folder/name).write_text(content)
        assert len(grid.gather(tmp_path/'g')) == 0
        assert grid.run_grid({'name': 'g', 'fixed': {'method': 'ce'}}, tmp_path, dry_run=True, direct=True).status.tolist() == ['new']


def test_a_damaged_probe_in_the_cache_is_made_again(tmp_path):
    setting = replace(small, method='curvenet', probe_cache=str(tmp_path))
    first = run(setting)
    path, = tmp_path.glob('probe-*.npz')
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match='the probe is made again'): again = run(setting)
    assert torch.equal(first.curves.losses, again.curves.losses)


def test_links_are_not_followed(tmp_path):
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'out').mkdir()
    (tmp_path/'out/.lock').symlink_to(tmp_path/'precious')
    def enter():
        with lock(tmp_path/'out'): pass
    refused('cannot be locked', enter)
    assert (tmp_path/'precious').read_text() == 'mine'


def test_a_used_folder_is_not_overwritten(tmp_path):
    run(replace(small, out_dir=str(tmp_path)))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != '.lock'}
    refused('has the results of another run', lambda: run(replace(small, seed=3, out_dir=str(tmp_path))))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != '.lock'} == before


def test_formulas_in_class_names_are_words(tmp_path):
    source = digits()
    names = ('=cmd', '+1', '@x', *'3456789')
    data = biased_from_samples(source.pool.take(range(200)), source.pool.take(range(200, 400)), source.test, names)
    run(replace(small, out_dir=str(tmp_path)), data)
    for name in 'suspects.csv', 'predictions.csv':
        words = pd.read_csv(tmp_path/name, dtype=str, keep_default_na=False)
        assert not any(w[:1] in tuple('=+@') for w in words.label), name


def test_a_classifier_refuses_what_it_has_not_learned_to_read(tmp_path):
    kept = Classifier(nn.Linear(4, 2), Reader((4,)), ('a', 'b'), {'factory': 'mine'})
    for bad in np.zeros((2, 3)), np.zeros((2, 4, 1)), ['a.png'], [[1, 2], [3]], 'nowhere', np.array([['a']*4]):
        assert refusal(lambda: kept.predict(bad)), bad
    save_classifier(kept, tmp_path)
    (tmp_path/'model.safetensors').write_bytes(b'')
    refused('damaged', lambda: load_classifier(tmp_path, lambda: nn.Linear(4, 2)))
