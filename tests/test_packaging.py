"The three files that name the dependencies name the same ones; nbdev leaves the package's front door alone."
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import papermill
import pytest
import yaml

import pacl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PUBLIC = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['mypy']['files']


def test_dependencies_are_the_same_in_all_three_files():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    ini = settings['DEFAULT']
    extras = PROJECT['optional-dependencies']
    assert ini['requirements'].split() == PROJECT['dependencies']
    assert ini['demo_requirements'].split() == extras['demo']
    assert ini['dev_requirements'].split() == extras['dev']
    assert ini['onnx_requirements'].split() == extras['onnx'] == extras['dev'][-len(extras['onnx']):]  # tests export too
    conda = yaml.safe_load((ROOT / 'environment.yml').read_text())['dependencies']
    assert conda[-1]['pip'] == PROJECT['dependencies'] + extras['demo'] + extras['dev']
    assert f'>={ini["min_python"]}' == PROJECT['requires-python'] and f'python={ini["min_python"]}' in conda
    assert ini['version'] == pacl.__version__


def test_nbdev_clean_keeps_the_parameters_tag():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    assert 'tags' in settings['DEFAULT']['allowed_cell_metadata_keys'].split()


def test_what_users_call_is_typed(tmp_path):
    (tmp_path / 'user.py').write_text('''from typing import Any
import pacl
answers: list[dict[str, Any]] = pacl.load('model').predict(['cat.jpg'])
names: list[str] = pacl.features('photos', 'model').images
pacl.features(3, 'model')  # type: ignore[arg-type]
pacl.export('model', 'out', onnnx=True)  # type: ignore[call-arg]
reveal_type(pacl.enhance('posts', 'out'))
''')
    command = [sys.executable, '-m', 'mypy', '--warn-unused-ignores', *PUBLIC, str(tmp_path / 'user.py')]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and 'Revealed type is "pacl.app.package.EmotionEncoder"' in said.stdout, said.stdout + said.stderr


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match='pacl.*"lod"'): pacl.lod


@pytest.mark.parametrize('path', sorted(ROOT.glob('pacl/**/[!_]*.py')), ids=lambda path: path.stem)
def test_imports_go_down_only(path):
    "Parts name neither sections nor the app, sections not the app; not even inside a function."
    place = path.relative_to(ROOT).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        level, module = getattr(node, 'level', 0), getattr(node, 'module', None) or ''
        names = ['.'.join(filter(None, [*(place[:-level] if level else ()), module, alias.name])) for alias in node.names]
        above = r'pacl\.(?!parts|__version__)' if place[1] == 'parts' else r'pacl\.app' if place[1] != 'app' else '$^'
        assert not [name for name in names if re.match(above, name)]


@pytest.mark.parametrize('path', sorted(ROOT.glob('nbs/**/*.ipynb')), ids=lambda path: path.stem)
def test_a_notebook_can_be_read_without_being_run(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    looks = [c for c in cells if c['cell_type'] == 'code' and 'run' not in c['metadata'].get('tags', [])]
    assert any(c['outputs'] for c in looks)


@pytest.mark.parametrize('path', sorted(ROOT.glob('nbs/**/*.ipynb')), ids=lambda path: path.stem)
def test_papermill_reads_every_parameter_and_no_look_overwrites_one(path):
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    sources = [''.join(c['source']) for c in cells if 'parameters' not in c['metadata'].get('tags', [])]
    given = {node.targets[0].id for c in cells if 'parameters' in c['metadata'].get('tags', [])
             for node in ast.parse(''.join(c['source'])).body}
    assert given == set(papermill.inspect_notebook(str(path)))
    for node in [node for source in sources for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.For, ast.With))]:
        names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        comprehended = {name.id for inner in ast.walk(node) if isinstance(inner, ast.comprehension)
                        for name in ast.walk(inner.target) if isinstance(name, ast.Name)}
        assert not (names - comprehended) & given, ast.unparse(node)
