"The files that name the dependencies name the same ones; nbdev leaves the package's front door alone."
import ast
import configparser
import dis
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import papermill
import pytest
import yaml
from packaging.requirements import Requirement

import pacl
from pacl.app.pipeline import STAGES, declared, parameters_cell

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PUBLIC = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['mypy']['files']


def names(requirements): return [Requirement(text).name for text in requirements]


def test_dependencies_are_the_same_in_all_files():
    "settings.ini says what pyproject.toml says, environment.yml names it, constraints.txt has one version of each, within the range."
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    ini, extras = settings['DEFAULT'], PROJECT['optional-dependencies']
    assert ini['requirements'].split() == PROJECT['dependencies']
    everything = PROJECT['dependencies'].copy()
    for extra in ('reproduce', 'onnx', 'dev'):
        assert ini[f'{extra}_requirements'].split() == extras[extra]
        everything += extras[extra]
    pins = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    versions = dict(pin.split('==') for pin in pins)
    assert sorted(versions) == sorted(names(everything)) and len(pins) == len(versions)
    assert not [text for text in everything if versions[Requirement(text).name] not in Requirement(text).specifier]
    conda = yaml.safe_load((ROOT / 'environment.yml').read_text())['dependencies']
    assert conda[-1]['pip'] == ['-c constraints.txt', *names(everything)]
    assert f'>={ini["min_python"]}' == PROJECT['requires-python'] and f'python={ini["min_python"]}' in conda
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert ini['version'] == pacl.__version__ == cited['version'] and f'## {pacl.__version__}' in (ROOT / 'CHANGELOG.md').read_text()


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
    assert said.returncode == 0 and 'Revealed type is "pacl.app.package.VisualEncoder"' in said.stdout, said.stdout + said.stderr


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


@pytest.mark.parametrize('name', STAGES.values())
def test_papermill_reads_every_parameter_and_no_look_overwrites_one(name):
    path = ROOT / f'nbs/{name}.ipynb'
    given = {'run', *declared(parameters_cell(path))}
    assert given == set(papermill.inspect_notebook(str(path)))
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    for source in [''.join(c['source']) for c in cells if 'parameters' not in c['metadata'].get('tags', [])]:
        stored = {step.argval for step in dis.get_instructions(source) if step.opname == 'STORE_NAME'}
        assert not stored & given


# what a reader sees

def shown(path):  # by the Run cells: {mime type: texts}
    cells = [cell for cell in json.loads(path.read_text())['cells'] if ''.join(cell['source']).startswith('#| eval: false')]
    found = {}
    for output in [output for cell in cells for output in cell['outputs']]:
        for kind, text in output.get('data', {}).items(): found.setdefault(kind, []).append(''.join(text))
    return found


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('0*.ipynb')), ids=lambda path: path.stem)
def test_a_section_shows_a_table_and_a_figure_of_a_run(path):
    assert {'text/html', 'image/png'} <= shown(path).keys()


def test_the_readme_says_the_numbers_that_07_shows():
    tables = ' '.join(shown(ROOT / 'nbs/07_tables.ipynb')['text/html']).replace('−', '-')
    section = (ROOT / 'README.md').read_text().partition('## What came out')[2].partition('**Verdict')[0].replace('−', '-')
    numbers = re.findall(r'\d+\.\d \[-?\d+\.\d, \d+\.\d\]', section)
    assert len(numbers) == 12 and not [number for number in numbers if number not in tables]
