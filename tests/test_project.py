"The project's own promises: README, pages and notebooks agree, and the commands are the ones that CI runs."
import json
import re
import runpy
from itertools import pairwise

import pytest

papermill_runs = '20', '22', '23', '24', '25', '30', '33a', '34', '35' # notebooks with parameters


def markdown_of(path):
    "The text of a page, or of a notebook's markdown cells"
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')


def test_readme_is_made_from_the_index(root):
    text, pictures = runpy.run_path(str(root/'.ci'/'make_readme.py'))['readme']()
    assert text == (root/'README.md').read_text(encoding='utf-8'), 'run: python .ci/make_readme.py'
    assert pictures, 'the README has a picture'
    for name, content in pictures.items():
        assert name in text and (root/name).read_bytes() == content


def test_readme_is_read_in_a_minute(root):
    assert len((root/'README.md').read_text(encoding='utf-8').split()) < 900


def test_readme_has_two_one_line_commands(root):
    lines = (root/'README.md').read_text(encoding='utf-8').splitlines()
    commands = [line for line in lines if line.startswith('python3 -m venv')]
    assert len(commands) == 2
    assert 'papermill nbs/20_run_setting.ipynb' in commands[0] and 'nbdev_test' in commands[1] and 'pytest' in commands[1]


@pytest.mark.parametrize('kind', ['experiments', 'rooms'])
def test_every_notebook_is_executed_and_small(root, kind):
    for path in (root/'nbs').glob('*.ipynb'):
        if (path.name.split('_')[0] in papermill_runs) != (kind == 'experiments'): continue
        cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
        assert any(c['outputs'] for c in cells), f'{path.name} has no outputs'
        assert not any(o['output_type'] == 'error' for c in cells for o in c['outputs']), f'{path.name} shows an error'
        assert path.stat().st_size < 500_000, f'{path.name} is too large to read on a code host'
        assert ('parameters' in [t for c in cells for t in c['metadata'].get('tags', [])]) == (kind == 'experiments')


def test_notebooks_are_a_course(root):
    names = sorted(p.stem for p in (root/'nbs').glob('[0-9]*.ipynb'))
    for name, following in pairwise([*names, 'index']):
        last = ''.join(json.loads((root/'nbs'/f'{name}.ipynb').read_text())['cells'][-1]['source']).split('---')[-1]
        assert re.search(r'\((\w+)\.ipynb\)', last)[1] == following, f'{name} does not lead on to {following}'
    listed = re.findall(r'^\| \[(\w+)\]', (root/'docs'/'notebooks.md').read_text(encoding='utf-8'), re.M)
    assert listed == names, 'the table in docs/notebooks.md is out of date'


def test_links_lead_somewhere(root):
    pages = [root/'README.md', *(root/'grids').glob('*.md'), *(root/'docs').glob('*.md'), *(root/'nbs').glob('*.ipynb')]
    links = {(path, link) for path in pages for link in re.findall(r'\]\(([^)#\s]+)', markdown_of(path))}
    broken = [f'{path.name}: {link}' for path, link in links if ':' not in link and not (path.parent/link).exists()]
    assert not broken


def test_pages_name_files_that_are_there(root):
    pages = [root/'README.md', *(root/'grids').glob('*.md'), *(root/'docs').glob('*.md')]
    named = {(path.name, file) for path in pages
             for file in re.findall(r'\b(?:grids|results|nbs|\.ci)/[\w/]+\.(?:yaml|csv|ipynb|py)\b', markdown_of(path))}
    missing = [f'{page}: {file}' for page, file in named if not (root/file).exists()]
    assert named and not missing
