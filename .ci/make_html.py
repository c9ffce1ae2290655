"""HTML of all notebooks with their outputs, in _docs/: `python .ci/make_html.py [folder]`. Nothing is executed.

The pages open without a network: all scripts are left out (MathJax, RequireJS and Mermaid would be loaded from a server, and no output needs any), and formulas are
turned into MathML, which browsers draw themselves. That takes `pip install latex2mathml`; without it, formulas stay as they are written, in TeX. Fonts are the system's.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

try: from latex2mathml.converter import convert
except ImportError: convert = None

root = Path(__file__).parents[1]


def mathml(tex, display='inline'):
    "A formula in MathML, after what the converter does not know"
    return convert(tex.replace(r'\arg', r'\operatorname{arg}').replace(r'\big\|', r'\|').replace(r'\Big\|', r'\|'), display=display)


class Renderer(IPythonRenderer):
    "Markdown to HTML with formulas in MathML"
    def inline_math(self, body): return mathml(body) if convert else super().inline_math(body)
    def block_math(self, body): return mathml(body, 'block') if convert else super().block_math(body)


class Exporter(HTMLExporter):
    def default_filters(self):
        yield from super().default_filters()
        yield 'markdown2html', lambda source: MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def title(notebook):
    "Title and subtitle of a notebook, from its first cells"
    text = '\n'.join(c.source for c in notebook.cells[:2])
    heading, subtitle = (re.search(pattern, text, re.M) for pattern in (r'^# (.+)', r'^> (.+(?:\n> .+)*)'))
    return heading[1], subtitle[1].replace('\n> ', ' ') if subtitle else ''


def page(notebook, name, notebooks):
    "The page of a notebook; the index's has a list of all"
    heading, _ = title(notebook)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell('[All notebooks](index.html#all)'))
    if name == 'index': notebook.cells.append(nbformat.v4.new_markdown_cell('<a id="all"></a>\n\n## All notebooks\n\n' + '\n'.join('- [{}]({}.html): {}. {}'.format(n, n, *title(nb)) for n, nb in notebooks.items() if n != 'index')))
    html, _ = Exporter(template_name='lab').from_notebook_node(notebook, {'metadata': {'name': heading}})
    html = re.sub(r'<script\b.*?</script>', '', html, flags=re.S)
    return re.sub(r'href="(\w+)\.ipynb', lambda m: f'href="{m[1]}.html' if m[1] in notebooks else m[0], html)


def main(folder):
    notebooks = {p.stem: nbformat.read(p, as_version=4) for p in sorted((root/'nbs').glob('*.ipynb'))}
    folder.mkdir(parents=True, exist_ok=True)
    pages = {name: page(nbformat.from_dict(notebook), name, notebooks) for name, notebook in notebooks.items()}
    for old in folder.glob('*.html'): old.unlink()
    for name, html in pages.items(): (folder/f'{name}.html').write_text(html, encoding='utf-8')
    print(f'{len(pages)} pages: {folder/"index.html"}' + ('' if convert else '; formulas in TeX, for want of latex2mathml'))


if __name__ == '__main__': main(Path(sys.argv[1]) if sys.argv[1:] else root/'_docs')
