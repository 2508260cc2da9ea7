"The three files that name the dependencies name the same ones; nbdev leaves the package's front door alone."
import configparser
import tomllib
from pathlib import Path

import pytest
import yaml

import pacl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def test_dependencies_are_the_same_in_all_three_files():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    ini = settings['DEFAULT']
    extras = PROJECT['optional-dependencies']
    assert ini['requirements'].split() == PROJECT['dependencies']
    assert ini['demo_requirements'].split() == extras['demo']
    assert ini['dev_requirements'].split() == extras['dev']
    conda = yaml.safe_load((ROOT / 'environment.yml').read_text())['dependencies']
    assert conda[-1]['pip'] == PROJECT['dependencies'] + extras['demo'] + extras['dev']
    assert f'>={ini["min_python"]}' == PROJECT['requires-python'] and f'python={ini["min_python"]}' in conda
    assert ini['version'] == pacl.__version__


def test_nbdev_clean_keeps_the_parameters_tag():
    settings = configparser.ConfigParser()
    settings.read(ROOT / 'settings.ini')
    assert 'tags' in settings['DEFAULT']['allowed_cell_metadata_keys'].split()


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match='pacl.*"lod"'): pacl.lod
