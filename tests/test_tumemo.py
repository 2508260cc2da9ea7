"""The profile `tumemo` from posts to tables, with everything but the weights and the data: the paper's four backbones in their true
architectures, two of them all the way; small text encoders in their authors' formats, all randomly initialised and found by name in an
offline hub cache; TumEmo, FI and IAPS in miniature, in their owners' layouts. Two processes train."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_readers
from PIL import Image
from safetensors.torch import load_file
from test_hub import WORDS, in_hub, make_backbone, make_open_clip, make_text_encoder, timm_id

import pacl
import pacl.train as train_module
from pacl.cluster import run_cluster
from pacl.parts.data import run_data
from pacl.parts.encoders import BACKBONES, TEXT_ENCODERS, load_backbone, run_features
from pacl.evaluate import run_evaluate
from pacl.partition import PARTITIONS, read_partition, run_partition
from pacl.app.pipeline import STAGES, by_stage, parameters_cell, read_settings
from pacl.parts.stages import read_record
from pacl.tables import run_tables

ROOT = Path(__file__).parents[1]
RUNS = dict(data=run_data, features=run_features, partition=run_partition, clusters=run_cluster, models=train_module.run_train,
            results=run_evaluate, tables=run_tables)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "What --data names."
    root, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for name, make in (('TumEmo', test_readers.tumemo), ('FI', test_readers.fi_wscnet), ('IAPS', test_readers.iaps)): make(root / name)
    for split in ('train', 'val'):  # a ViT takes a second a picture: one of two classes is enough to learn from
        for path in root.glob(f'FI/FI/{split}/*/*.jpg'):
            if path.parent.name not in ('awe', 'fear') or path.stem != '0': path.unlink()
    for path in [path for end in ('jpg', 'JPG') for path in root.rglob(f'*.{end}')]:  # all different, or posts would be test pictures
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(path, 'jpeg')
    for path in root.glob('TumEmo/all_data/*.txt'): path.write_text(' '.join(rng.choice(WORDS, 6)))
    (root / 'anps.txt').write_text('happy_dog\nsad_cat\nscary_rain\nlonely_dog\n')
    return root


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "All of the profile's models, as their owners' repositories would lie in the cache after a download."
    from huggingface_hub import constants
    cache = tmp_path_factory.mktemp('hub')
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('HF_HUB_CACHE', str(cache)), ('HF_HUB_OFFLINE', '1')): patch.setenv(name, value)  # of torchrun's processes
        patch.setattr(constants, 'HF_HUB_CACHE', str(cache))
        patch.setattr(constants, 'HF_HUB_OFFLINE', True)
        for name in BACKBONES: make_backbone(name, in_hub(cache, timm_id(name)))
        for kind in ('skep', 'bertweet-sentiment'): make_text_encoder(kind, in_hub(cache, TEXT_ENCODERS[kind]))
        make_open_clip('ViT-B-32/openai', in_hub(cache, timm_id('vit_clip')))  # one repository holds both forms
        yield cache


@pytest.fixture(scope='module')
def settings(root):
    "The profile's, cut to a few steps; random judges have no absolute scale."
    cells = {stage: parameters_cell(ROOT / f'nbs/{notebook}.ipynb') for stage, notebook in STAGES.items()}
    given = ['benchmarks=[fi:$DATA/FI, iaps:$DATA/IAPS]', f'phrases=clip-anp:{root}/anps.txt', 'scale=rank', 'threshold=0.53',
             'epochs=3', 'batch_size=4', 'processes=2', 'workers=0', 'probe_epochs=2', 'fine_tune_epochs=1']
    found = by_stage(read_settings(ROOT / 'data/profiles/tumemo.yaml', given, cells, str(root)), cells)
    assert list(found) == list(RUNS)
    return found


@pytest.fixture(scope='module')
def shared(hub, root, settings, tmp_path_factory):
    "Data and partition do not depend on the backbone."
    run = tmp_path_factory.mktemp('runs') / 'tumemo'
    for stage in ('data', 'partition'): RUNS[stage](run, **settings[stage])
    return run


def test_posts_are_judged_by_clip_and_bertweet(shared):
    assert read_record(shared / 'data')['result'] | {'posts': 14, 'fi': 12, 'iaps': 20} == read_record(shared / 'data')['result']
    table = read_partition(shared / 'partition/partition.csv')
    assert len(table) == 14 and table['partition'].value_counts()[list(PARTITIONS)].min() >= 2


def start(shared, run):
    run.mkdir()
    for stage in ('data', 'partition'): shutil.copytree(shared / stage, run / stage)
    return run


def must_be_enhanced(folder, backbone):
    "Its own keys and shapes, other weights, and pacl.load takes it."
    initial, enhanced = load_backbone(backbone), load_file(folder / 'model.safetensors')
    assert {k: v.shape for k, v in enhanced.items()} == {k: v.shape for k, v in initial.state_dict().items()}  # no parameter more
    moved = sum((enhanced[k] - v).abs().max() > 0 for k, v in initial.state_dict().items() if v.is_floating_point())
    assert moved > len(enhanced) / 3
    assert pacl.load(folder)(Image.new('RGB', (30, 20), 'red')).shape == (1, initial.num_features)


@pytest.mark.parametrize('backbone, lr, datasets', [('resnet50', 1e-3, ['iaps/vad', 'fi/label']), ('vit_clip', 1e-5, ['fi/label'])])
def test_from_posts_to_tables(hub, settings, shared, tmp_path, monkeypatch, backbone, lr, datasets):
    tuned = ', fine-tune' if backbone == 'resnet50' else ''  # the other takes a second a picture
    (tmp_path / 'runs.yaml').write_text(f'main:\n- {{method: [initial, pacl], protocols: [linear, zero-shot{tuned}]}}\n')
    monkeypatch.setattr(train_module, 'LIST', tmp_path / 'runs.yaml')
    run = start(shared, tmp_path / 'tumemo')
    own = {'features': dict(backbone=backbone), 'models': dict(lr=lr), 'results': dict(backbone_lr=lr / 10, datasets=datasets)}
    for stage in ('features', 'clusters', 'models', 'results', 'tables'): RUNS[stage](run, **settings[stage] | own.get(stage, {}))
    log = pd.read_csv(run / 'models/pacl-s0/log.csv')
    assert [set(rows[list(PARTITIONS)].dropna(axis=1)) for _, rows in log.groupby('epoch')] == [
        {'strong'}, {'strong', 'emotional', 'factual'}, set(PARTITIONS)]  # each phase had a step
    assert np.isfinite(log.drop(columns='step').fillna(0)).all(axis=None)
    must_be_enhanced(run / 'models/pacl-s0', backbone)
    results = pd.read_csv(run / 'tables/results.csv', keep_default_na=False)
    protocols = {('linear', name.split('/')[0]) for name in datasets} | {('zero-shot all', 'fi')}
    if tuned: protocols.add(('fine-tune', 'iaps'))
    rows = results[results['method'] == 'pacl']
    assert {*zip(rows['protocol'], rows['dataset'])} >= protocols and {*results['method']} == {'initial', 'pacl'}
    assert 'FI' in (run / 'tables/table1.md').read_text()  # its sets are the paper's


@pytest.mark.parametrize('backbone', ['vit_base', 'swin_base'])
def test_a_step_of_the_larger_ones(hub, settings, shared, tmp_path, backbone):
    "They take seconds a picture."
    run = start(shared, tmp_path / 'tumemo')
    RUNS['features'](run, **settings['features'] | dict(backbone=backbone))
    RUNS['clusters'](run, **settings['clusters'])
    train_module.enhance(run, tmp_path / 'pacl', epochs=1, images=2, batch_size=2, lr=1e-5)
    must_be_enhanced(tmp_path / 'pacl', backbone)
