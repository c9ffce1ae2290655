"Learn classifiers from data with noisy labels and imbalanced classes. The notebooks in nbs/ are the source and the manual."
__version__ = "0.1.0"

_where = {'Setting': 'setting', 'run': 'experiment', 'Source': 'data', 'make_samples': 'data', 'make_biased': 'corruption',
          'biased_from_samples': 'corruption', 'ReweightedClassifier': 'estimator', 'normalise_curves': 'curves',
          'Weighting': 'weighting', 'MWNet': 'weighting', 'CurveNet': 'weighting'}
__all__ = list(_where)


def __getattr__(name):
    "Load a public name's module when it is first used, so that the import itself is quick"
    if name not in _where: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_where[name]}'), name)


def __dir__(): return sorted([*globals(), *_where])
