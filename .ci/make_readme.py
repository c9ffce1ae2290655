"README.md from nbs/index.ipynb: `python .ci/make_readme.py`. Cells tagged `remove-input` show their output only."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parents[1]
pictures = 'nbs/index_files'


def from_the_root(text):
    "Links that lead from nbs/ as links that lead from the root."
    text = re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', text)
    return text.replace('](../', '](')


def readme():
    "The text of README.md, and its pictures: path → bytes"
    config = Config(TagRemovePreprocessor={'enabled': True, 'remove_input_tags': {'remove-input'}})
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor('nbconvert.preprocessors.TagRemovePreprocessor', enabled=True)
    notebook = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    notebook.metadata['language_info'] = {'name': 'python'}
    text, resources = exporter.from_notebook_node(notebook, {'output_files_dir': pictures})
    text = from_the_root(text).replace('![png]', '![What is believed of labels]')
    text = '\n'.join(line.rstrip() for line in text.strip().splitlines())
    return re.sub(r'\n{3,}', '\n\n', text) + '\n', resources['outputs']


if __name__ == '__main__':
    text, files = readme()
    (root/'README.md').write_text(text, encoding='utf-8')
    (root/pictures).mkdir(exist_ok=True)
    for old in set(p.name for p in (root/pictures).iterdir()) - set(Path(name).name for name in files): (root/pictures/old).unlink()
    for name, content in files.items(): (root/name).write_bytes(content)
