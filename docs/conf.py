"""The documentation as a site: `python -m sphinx -c docs . _docs/html`, then open `_docs/html/index.html`. It needs `pip install -e '.[docs]'`.

The sources are the notebooks with the outputs that they hold (nothing is executed), the pages in docs/, and for the API the docstrings
and argument comments of the package. The pages load nothing from a network: formulas are MathML, which browsers draw themselves.
"""
import inspect
import json
import pkgutil
import re
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

from docutils.nodes import SkipNode
from fastcore.docments import docments
from latex2mathml.converter import convert

import curve_reweight

here = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(here.parent/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, release = settings['lib_name'], settings['author'], settings['version']
html_title = project
copyright = settings['copyright']

extensions = ['myst_nb', 'sphinx.ext.autodoc']
root_doc = 'nbs/index'
include_patterns = ['nbs/*.ipynb', 'docs/**', 'grids/README.md', 'CHANGELOG.md']
exclude_patterns = ['docs/_*', '**/.ipynb_checkpoints']
templates_path, html_static_path = ['_templates'], ['_static']
html_theme, html_css_files = 'furo', ['site.css']
html_copy_source = html_show_sourcelink = False
html_additional_pages = {'index': 'to_first_page.html'}

nb_execution_mode, nb_ipywidgets_js = 'off', {} # no scripts from a server
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('html', 'text/markdown', 0), ('html', 'image/png', 1), ('html', 'text/html', 2)]
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
pygments_style = 'friendly'

default_role, add_module_names = 'code', False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none' # types stand beside the arguments, see `argument_lines`


# Formulas
def mathml(tex, display='inline'):
    "A formula in MathML, after what the converter does not know: `\arg`, and brackets in a size of their own, which browsers stretch."
    tex = tex.replace(r'\arg', r'\operatorname{arg}')
    tex = re.sub(r'\\[bB]ig\\\|', r'\\|', tex)
    tex = re.sub(r'\\[bB]ig([(\[])', r'\\left\1', tex)
    tex = re.sub(r'\\[bB]ig([)\]])', r'\\right\1', tex)
    return convert(tex, display=display)


def visit_inline_math(translator, node):
    translator.body.append(mathml(node.astext()))
    raise SkipNode


def visit_block_math(translator, node):
    tag = re.search(r'\\tag\{(.*?)\}', node.astext())
    formula = mathml(node.astext().replace(tag[0], '') if tag else node.astext(), 'block')
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ''
    translator.body.append(f'<div class="math">{formula}{number}</div>')
    raise SkipNode


# Notebooks
def without_directives(cell):
    "A code cell as a reader wants it: no `#| export`; None for cells that only nbdev or the tests need."
    source = ''.join(cell['source'])
    if re.search(r'^#\| *(hide|default_exp)\b', source, re.M): return None
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', source, flags=re.M)}


def read_notebook(app, docname, source):
    "Take directives out, number the titles, and add to the first page, which is the README's, what leads to all others."
    if not docname.startswith('nbs/'): return
    notebook = json.loads(source[0])
    cells = [without_directives(c) if c['cell_type'] == 'code' else c for c in notebook['cells']]
    notebook['cells'] = [c for c in cells if c]
    if docname == root_doc:
        text = (here/'_navigation.md').read_text(encoding='utf-8')
        notebook['cells'].append({'cell_type': 'markdown', 'id': 'navigation', 'metadata': {}, 'source': text})
    else:
        number, first = docname.split('/')[1].split('_')[0], notebook['cells'][0]
        first['source'] = re.sub('^# ', f'# {number} ', ''.join(first['source']))
    source[0] = json.dumps(notebook)


# The API: a page per module, made from the docstrings and the comments beside arguments
page = '''# {name}

{about}

From the notebook [{notebook}](../../nbs/{notebook}.ipynb).

{table}

```{{eval-rst}}
.. automodule:: {module}
   :members:
```
'''


def first_sentence(thing):
    "The first sentence of a docstring; the stop of `Eq. 4` ends none."
    text = inspect.getdoc(thing).split('\n\n')[0].replace('\n', ' ').replace('|', r'\|')
    return re.split(r'(?<!\bEq)(?<!\bEqs)(?<!\bFig)\. (?=[A-Z`])', text)[0].rstrip('.')


def module_page(module):
    "The number of the notebook that a module is made from, and the page's text."
    notebook = re.search(r'File to edit: \.\./nbs/(\w+)\.ipynb', Path(module.__file__).read_text(encoding='utf-8'))[1]
    things = {name: getattr(module, name) for name in module.__all__}
    rows = [f'| {{py:obj}}`~{module.__name__}.{name}` | {first_sentence(thing)} |'
            for name, thing in things.items() if callable(thing) and inspect.getdoc(thing)]
    table = '\n'.join(['| | |', '|---|---|', *rows]) if rows else ''
    name = module.__name__.split('.')[-1]
    return notebook, page.format(name=name, module=module.__name__, about=module.__doc__, notebook=notebook, table=table)


def write_api(app):
    "Write docs/api/<module>.md for every module, and their list; leave pages alone that would not change."
    names = [info.name for info in pkgutil.iter_modules(curve_reweight.__path__) if not info.name.startswith('_')]
    made = {name: module_page(import_module(f'curve_reweight.{name}')) for name in names}
    pages = {f'{name}.md': text for name, (_, text) in made.items()}
    in_order = '\n'.join(sorted(made, key=lambda name: made[name][0]))
    pages['index.md'] = '# API\n\nAll modules, in the order of their notebooks.\n\n```{toctree}\n:maxdepth: 1\n\n' + in_order + '\n```\n'
    folder = here/'api'
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.md'):
        if old.name not in pages: old.unlink()
    for name, text in pages.items():
        path = folder/name
        if not path.exists() or path.read_text(encoding='utf-8') != text: path.write_text(text, encoding='utf-8')


def as_rst(text):
    "Text with `code` as reStructuredText."
    code = re.compile(r'(`+)(.+?)\1(\w?)', re.S)
    parts, end = [], 0
    for found in code.finditer(text):
        parts += [escaped(text[end:found.start()]), f'``{found[2]}``', rf'\ {found[3]}' if found[3] else '']
        end = found.end()
    return ''.join([*parts, escaped(text[end:])])


def escaped(text): return re.sub(r'([*_|\\])', r'\\\1', text)


def type_name(annotation):
    "An annotation as it would be written."
    if annotation in (inspect.Parameter.empty, None): return ''
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Za-z])', '', text)


def argument_lines(thing):
    "The comments beside the arguments of a function or class, or the fields of one, as a field list."
    about = dict(docments(thing, full=True))
    if inspect.isclass(thing) and issubclass(thing, tuple): # a NamedTuple: docments does not read its fields
        comments = dict(re.findall(r'^ +(\w+):[^#\n]*# (.+)$', inspect.getsource(thing), re.M))
        about = {k: {'docment': v, 'anno': thing.__annotations__.get(k)} for k, v in comments.items()}
    lines = []
    for name, arg in about.items():
        if not arg['docment']: continue
        kind, text = type_name(arg['anno']), as_rst(arg['docment'].replace('\n', ' '))
        if name == 'return': lines.append(f':returns: *{kind}* – {text}' if kind else f':returns: {text}')
        else: lines += [f':param {name}: {text}', *([f':type {name}: {kind}'] if kind else [])]
    return lines


def process_docstring(app, what, name, thing, options, lines):
    "Docstrings are written in Markdown's `code`; after them come the arguments."
    if what == 'module': lines.clear() # stands at the top of the page already
    lines[:] = as_rst('\n'.join(lines)).split('\n')
    if what not in ('function', 'class', 'method', 'exception'): return
    try: arguments = argument_lines(thing)
    except (OSError, TypeError, ValueError): return # no source to read
    if arguments: lines += ['', *arguments, '']


def skip_member(app, what, name, thing, skip, options):
    "The fields of a NamedTuple stand among its arguments."
    return True if (inspect.getdoc(thing) or '').startswith('Alias for field number') else skip


def setup(app):
    app.add_html_math_renderer('mathml', (visit_inline_math, None), (visit_block_math, None))
    app.config.html_math_renderer = 'mathml'
    app.connect('builder-inited', write_api)
    app.connect('source-read', read_notebook)
    app.connect('autodoc-process-docstring', process_docstring)
    app.connect('autodoc-skip-member', skip_member)

