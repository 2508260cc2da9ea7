"""The profile `tumemo` from posts to tables, with everything but the weights and the data: each of the paper's four backbones in its
true architecture, small text encoders in their authors' formats, all randomly initialised and found by name in an offline hub cache;
TumEmo, FI and IAPS in miniature, in their owners' layouts. Two processes train."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_readers
import torch
from PIL import Image
from safetensors.torch import load_file
from test_hub import WORDS, in_hub, make_backbone, make_open_clip, make_text_encoder, timm_id

import pacl
import pacl.train as train_module
from pacl.cluster import run_cluster
from pacl.parts.data import load_tasks, run_data
from pacl.parts.encoders import BACKBONES, TEXT_ENCODERS, load_backbone, run_features
from pacl.evaluate import run_evaluate
from pacl.partition import PARTITIONS, read_partition, run_partition
from pacl.app.pipeline import STAGES, notebook_parameters, read_settings
from pacl.parts.stages import read_record, write_stage
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
    declared = {notebook: notebook_parameters(ROOT / f'nbs/{notebook}.ipynb') for notebook in STAGES.values()}
    given = ['benchmarks=[fi:$DATA/FI, iaps:$DATA/IAPS]', f'phrases=clip-anp:{root}/anps.txt', 'scale=rank', 'threshold=0.53',
             'epochs=3', 'batch_size=2', 'processes=2', 'workers=0', 'probe_epochs=2', 'fine_tune_epochs=1']
    found, stages = read_settings(ROOT / 'data/profiles/tumemo.yaml', given, declared, STAGES, str(root))
    assert list(stages) == list(RUNS)
    return {stage: found[notebook] for stage, notebook in stages.items()}


@pytest.fixture(scope='module')
def shared(hub, root, settings, tmp_path_factory):
    "Data and partition do not depend on the backbone."
    run = tmp_path_factory.mktemp('runs') / 'tumemo'
    for stage in ('data', 'partition'): RUNS[stage](run, **settings[stage])
    return run


def test_posts_are_judged_by_clip_and_bertweet(shared):
    assert read_record(shared / 'data')['result'] | {'posts': 14, 'fi': 12, 'iaps': 20} == read_record(shared / 'data')['result']
    assert {name: [task.kind for task in tasks.values()] for name, tasks in load_tasks(shared).items()} == {
        'fi': ['single-label'], 'iaps': ['regression']}
    table = read_partition(shared / 'partition/partition.csv')
    assert len(table) == 14 and table['partition'].value_counts()[list(PARTITIONS)].min() >= 2


def keep_set(data, name):
    "The data stage's folder as it would be with this benchmark alone."
    with write_stage(data, json.loads((data / 'stage.json').read_text())) as folder:
        for file in ('posts.csv', 'posts.npy', 'rejected.csv', f'{name}.csv', f'{name}.npy'): shutil.copy(data / file, folder)
        tasks = json.loads((data / 'tasks.json').read_text())
        (folder / 'tasks.json').write_text(json.dumps({name: tasks[name]}))


@pytest.mark.parametrize('backbone', BACKBONES)
def test_from_posts_to_tables(hub, settings, shared, tmp_path, monkeypatch, backbone):
    tuned = ', fine-tune' if backbone == 'resnet50' else ''  # the others take a second a picture
    (tmp_path / 'runs.yaml').write_text(f'main:\n- {{method: [initial, pacl], protocols: [linear-all, zero-shot{tuned}]}}\n')
    monkeypatch.setattr(train_module, 'LIST', tmp_path / 'runs.yaml')
    run = tmp_path / 'tumemo'
    run.mkdir()
    for stage in ('data', 'partition'): shutil.copytree(shared / stage, run / stage)
    sets = ['fi']
    if backbone == 'resnet50': sets.append('iaps')  # ratings too; the others take minutes as it is
    else: keep_set(run / 'data', 'fi')
    lr = 1e-3 if backbone == 'resnet50' else 1e-5
    for stage in ('features', 'clusters', 'models', 'results', 'tables'):
        own = {'features': dict(backbone=backbone), 'models': dict(lr=lr),
               'results': dict(backbone_lr=lr / 10, datasets=[f'{sets[-1]}/{dict(fi="label", iaps="vad")[sets[-1]]}'])}.get(stage, {})
        RUNS[stage](run, **settings[stage] | own)
    log = pd.read_csv(run / 'models/pacl-s0/log.csv')
    assert [set(rows[list(PARTITIONS)].dropna(axis=1)) for _, rows in log.groupby('epoch')] == [
        {'strong'}, {'strong', 'emotional', 'factual'}, set(PARTITIONS)]  # each phase had a step
    assert np.isfinite(log.drop(columns='step').fillna(0)).all(axis=None)
    folder, initial = run / 'models/pacl-s0', load_backbone(backbone)
    enhanced = load_file(folder / 'model.safetensors')
    assert {k: v.shape for k, v in enhanced.items()} == {k: v.shape for k, v in initial.state_dict().items()}  # no parameter more
    moved = sum((enhanced[k] - v).abs().max() > 0 for k, v in initial.state_dict().items() if v.is_floating_point())
    assert moved > len(enhanced) / 3
    with torch.no_grad(): assert pacl.load(folder)(Image.new('RGB', (30, 20), 'red')).shape == (1, initial.num_features)
    results = pd.read_csv(run / 'tables/results.csv', keep_default_na=False)
    assert set(zip(results['method'], results['protocol'], results['dataset'])) >= {
        (m, 'linear', d) for m in ('initial', 'pacl') for d in sets} | {(m, 'fine-tune', sets[-1]) for m in ('initial', 'pacl') if tuned}
    if sets == ['fi']:
        zero_shot = results['protocol'].str.startswith('zero-shot')
        assert set(results.loc[zero_shot, 'protocol']) == {f'zero-shot {p}' for p in ('1', '2', 'all')}
    assert 'FI' in (run / 'tables/table1.md').read_text()  # its sets are the paper's
