"The preflight on miniatures and stand-ins, without a network: what is missing, what is there, and what the machine lacks."
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_datasets as sets
import torch
from safetensors.torch import save_file
from test_evaluators import LOOK, TINY, random_weights, release
from test_hub import in_hub, make_backbone, make_text_encoder

from pacl.app import pipeline, preflight
from pacl.app.pipeline import STAGES, notebook_parameters, read_settings
from pacl.app.preflight import check, evaluation_pictures, main, on_the_hub, plan_training, speed, time_backbone, unreachable

ROOT = Path(__file__).parents[1]
DECLARED = {notebook: notebook_parameters(ROOT / f'nbs/{notebook}.ipynb') for notebook in STAGES.values()}
FEW = ['image_size=64', 'batch_size=4', 'epochs=3', 'processes=1', 'probe_epochs=1', 'fine_tune_epochs=2']


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache, and no network."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(preflight, 'speed', lambda step, most: (step(2), 10.)[1])  # works, and is not timed
    return tmp_path / 'hub'


def asked(tmp_path, *given, profile='tumemo', data=True):
    settings, stages = read_settings(ROOT / f'data/profiles/{profile}.yaml', [*given], DECLARED, STAGES,
                                     str(tmp_path / 'data') if data else None)
    return tmp_path / 'runs/tumemo', json.loads(json.dumps(settings)), stages


def fill(data):
    "Every data set of the profile, and DeepSentiBank, in miniature."
    for name, make in {'TumEmo': sets.tumemo, 'FI': sets.fi_folders, 'Emotion-6': sets.emotion_6, 'UnbiasedEmo': sets.emotion_6,
                       'WEBEmo': sets.webemo, 'Emotic': sets.emotic_mat, 'IAPS': sets.iaps}.items(): make(data / name)
    (data / 'DeepSentiBank').mkdir()
    release(data / 'DeepSentiBank', random_weights())


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory):
    "Weights in the hub's layout: ResNet-50, small text encoders; and a small CLIP's folder."
    cache = tmp_path_factory.mktemp('cache')
    make_backbone('resnet50', in_hub(cache / 'hub', 'timm/resnet50.a1_in1k'))
    make_text_encoder('skep', in_hub(cache / 'hub', 'Yaxin/roberta-large-ernie2-skep-en'))
    make_text_encoder('bertweet-sentiment', in_hub(cache / 'hub', 'finiteautomata/bertweet-base-sentiment-analysis'))
    import open_clip
    (cache / 'clip').mkdir()
    (cache / 'clip/open_clip_config.json').write_text(json.dumps({'model_cfg': TINY, 'preprocess_cfg': LOOK}))
    save_file(open_clip.CLIP(**TINY).state_dict(), cache / 'clip/open_clip_model.safetensors')
    return cache


@pytest.fixture
def complete(tmp_path, hub, stand_ins, monkeypatch):
    "All is there; complete(…) is the check."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(stand_ins / 'hub'))
    fill(tmp_path / 'data')
    return lambda *given: check(*asked(tmp_path, *FEW, f'factual=open_clip:{stand_ins}/clip', *given))


EXPECTED = {  # what, where to get it
    'TumEmo (posts)': 'YangXiaocui1215/MVAN', 'FI (benchmark)': 'sherleens/WSCNet', 'Emotion-6 (benchmark)': 'Panda',
    'UnbiasedEmo (benchmark)': 'Panda', 'WEBEmo (benchmark)': 'ccivit/download_webEmo', 'Emotic (benchmark)': 'rkosti/emotic',
    'IAPS (benchmark)': 'CSEA', 'weights of resnet50 (backbone)': 'timm/resnet50.a1_in1k',
    'weights of skep (text_encoder)': 'Yaxin/roberta-large-ernie2-skep-en',
    'weights of open_clip:ViT-B-32/openai (factual)': 'timm/vit_base_patch32_clip_224.openai',
    'DeepSentiBank (phrases)': 'stephen-pilli/DeepSentiBank',
    'weights of bertweet-sentiment (sentences)': 'finiteautomata/bertweet-base-sentiment-analysis'}


@pytest.mark.parametrize('data', [False, True])
def test_nothing_is_there(tmp_path, hub, monkeypatch, data):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**15))
    monkeypatch.setattr('psutil.virtual_memory', lambda: SimpleNamespace(available=10**15))
    lines, missing = check(*asked(tmp_path, 'image_size=64', data=data))
    assert {m.what for m in missing} == set(EXPECTED)
    for m in missing:
        assert EXPECTED[m.what] in m.where and m.remedy, m
        if 'weights' in m.what: assert f'hf download {m.where.split(".co/")[1]}' in m.remedy and 'HF_HUB_OFFLINE' in m.why
        else: assert '--data ROOT' in m.remedy if not data else f'{tmp_path}/data/' in m.why
    text = '\n'.join(lines)
    assert 'as if there were 195,265' in text and 'pacl: 22,720 steps' in text  # the plan by what was published
    assert 'disk       8.0 GB are needed' in text  # 4.8 of pictures, 2.4 of features, 0.8 of models
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'data').exists()


def test_all_is_there(tmp_path, complete, capsys):
    before = sorted(p for p in (tmp_path / 'data').rglob('*') if 'DeepSentiBank' not in p.parts)
    lines, missing = complete()
    text = '\n'.join(lines)
    assert not missing, missing
    assert '14 rows; published: 195,265 posts' in text and 'emotic/vad' in text and 'resnet50: in the cache' in text
    table = {line.split()[0]: line for line in lines[lines.index('') + 2:]}
    assert list(table) == 'data features partition clusters models results experiments tables report'.split()
    assert all('never ran' in line for line in table.values())
    assert ['?' in line for line in table.values()] == [False] * 6 + [True] * 3, text  # each has a time but what takes little
    assert sorted(p for p in (tmp_path / 'data').rglob('*') if 'DeepSentiBank' not in p.parts) == before  # no split.csv
    assert not (tmp_path / 'runs').exists()


def test_the_grid_has_its_time(complete):
    lines, missing = complete('tables=4', 'n_seeds=2')
    assert not missing and 'grid       9 rows for tables=4, at most 18 more trainings' in lines
    assert '?' not in next(line for line in lines if line.startswith('experiments'))
    assert 'is none of 1, 2' in str(complete('tables=7')[1])
    wrong, = complete('tables=4', 'datasets=[fi/label, emotic/vda]')[1]
    assert wrong.what == 'datasets' and '"emotic/vda" is no SET/TASK of the benchmarks; nearest valid: emotic/vad' in wrong.why


def test_the_other_text_encoders_are_looked_for_where_a_table_asks(complete):
    lines, missing = complete('tables=text', 'text_encoders=[bag-of-words, minilm, bert, skep, folder/of/mine]')
    found = [m.what for m in missing]
    assert found == ['weights of bert (text_encoders)', 'weights of folder/of/mine (text_encoders)']
    assert missing[1].why.startswith('folder/of/mine is not there') and 'Put the folder there' in missing[1].remedy
    assert [line for line in lines if line.startswith('text_encoders')] == ['text_encoders skep: in the cache']


def test_a_damaged_download_shows_itself(tmp_path, complete, stand_ins, monkeypatch):
    shutil.copytree(stand_ins / 'hub', tmp_path / 'hub')
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    path = next((tmp_path / 'hub').glob('models--timm*/snapshots/*/model.safetensors'))
    path.write_bytes(path.read_bytes()[:10**6])
    (tmp_path / 'data/FI/emotion_dataset/awe/awe_0000.jpg').unlink()
    (tmp_path / 'data/TumEmo/all_data_id_and_label.txt').write_text('ID label\n0 Furious\n')
    _, missing = complete()
    text = '\n'.join(map(str, missing))
    assert len(missing) == 2 and 'backbone=resnet50' in text and 'all_data_id_and_label.txt, row 2' in text


def test_what_is_done_is_read(tmp_path, complete):
    "The posts as the data stage left them, the partition as it is; a run that has neither is told so."
    run = tmp_path / 'runs/tumemo'
    _, missing = complete('stages=[models]')
    assert [m.what for m in missing] == ['data']
    for stage in ('data', 'partition'):
        (run / stage).mkdir(parents=True)
        (run / stage / 'stage.json').write_text('{"parameters": {}}')
    names = ['strong'] * 8 + ['emotional'] * 4 + ['factual'] * 4 + ['weak'] * 4
    (run / 'data/tasks.json').write_text('{}')
    (run / 'data/posts.csv').write_text('id,image,text\n' + ''.join(f'{i},{i}.jpg,so happy\n' for i in range(20)))
    np.save(run / 'data/posts.npy', np.zeros((20, 8, 8, 3), np.uint8))
    (run / 'partition/partition.csv').write_text('id,partition\n' + ''.join(f'{i},{name}\n' for i, name in enumerate(names)))
    lines, missing = complete('stages=[models]')
    assert not missing and 'training   pacl: 6 steps, 64 pictures' in lines, lines  # 2 steps an epoch, of 1, 3, 4 batches of 4


def test_stages_that_are_done_need_nothing(tmp_path, hub, monkeypatch):
    run, settings, stages = asked(tmp_path)
    monkeypatch.setattr(preflight, 'why_stale', lambda folder, parameters: None)
    lines, missing = check(run, settings, stages)
    assert not missing and [line.split()[-1] for line in lines[-len(stages):]] == ['done'] * len(stages)
    monkeypatch.setattr(preflight, 'why_stale', lambda folder, parameters: None if folder.name != 'tables' else 'never ran')
    assert not check(run, settings, stages)[1]


def test_a_large_run_is_not_hashed(tmp_path, hub, monkeypatch):
    run, settings, stages = asked(tmp_path)
    for stage, notebook in stages.items():
        (run / stage).mkdir(parents=True)
        (run / stage / 'stage.json').write_text(json.dumps({'parameters': settings[notebook]}))
    with open(run / 'data/posts.npy', 'w') as file: file.truncate(10**10)
    monkeypatch.setattr(preflight, 'why_stale', None)
    settings['04_train']['lr'] = .5
    state = preflight.state_of(run, stages, settings)
    assert state == dict.fromkeys(stages) | {'models': 'other settings'}


def test_disk_and_memory_that_do_not_suffice(complete, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**6))
    _, (disk,) = complete()
    assert disk.what == 'disk' and '--runs FOLDER' in disk.remedy
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=10**15))
    parameters = 16 * 23_508_032
    for available, says in ((parameters * 1.3, 'chunk='), (parameters, 'smaller backbone')):
        monkeypatch.setattr('psutil.virtual_memory', lambda: SimpleNamespace(available=available))
        _, (memory,) = complete('batch_size=64')
        assert memory.what == 'memory for training' and says in memory.remedy and '0.4 GB' in memory.why


def test_fewer_gpus_than_processes(complete, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (0, 24 * 10**9))
    lines, missing = complete('processes=4')
    text = '\n'.join(lines)
    assert not missing and '2 × a GPU' in text and 'each of 2 processes' in text
    assert 'set processes=2 chunk=4' in text  # four partitions of at most 4 pairs, by four


def test_the_profiles(tmp_path):
    "§4.2, value by value; and the template takes its overrides."
    run, settings, stages = asked(tmp_path)
    given = {name: value for parameters in settings.values() for name, value in parameters.items()}
    paper = dict(threshold=.7, n_clusters=2, temperature=.07, epochs=30, batch_size=64, lr=1e-3, projector_lr=1e-3, backbone='resnet50',
                 text_encoder='skep', scale='clipscore', trainable_stages=0, image_size=224, processes=4, probe_epochs=40,
                 fine_tune_epochs=40, backbone_lr=1e-4, max_length=77, factual='open_clip:ViT-B-32/openai', sentences='bertweet-sentiment',
                 phrases=f'deepsentibank:{tmp_path}/data/DeepSentiBank', posts=f'tumemo:{tmp_path}/data/TumEmo')
    assert {name: given[name] for name in paper} == paper and len(given['benchmarks']) == 7
    assert list(stages) == 'data features partition clusters models results experiments tables report'.split()
    _, settings, _ = asked(tmp_path, 'backbone=vit_base', 'lr=1e-5', 'benchmarks=[fi:$DATA/FI]')
    assert settings['04_train']['lr'] == 1e-5 and settings['parts/data']['benchmarks'] == [f'fi:{tmp_path}/data/FI']
    _, own, stages = asked(tmp_path, 'backbone=resnet50', 'trainable_stages=0', profile='own')
    assert own['parts/data']['posts'] == f'{tmp_path}/data/posts' and own['parts/encoders']['backbone'] == 'resnet50' and 'world' not in stages


@pytest.mark.parametrize('parameter, value, name', [
    ('backbone', 'resnet50', 'timm/resnet50.a1_in1k'), ('backbone', 'vit_base', 'timm/vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    ('backbone', 'swin_base', 'timm/swin_s3_base_224.ms_in1k'), ('backbone', 'vit_clip', 'timm/vit_base_patch32_clip_224.openai'),
    ('backbone', 'someone/a-model', 'someone/a-model'), ('backbone', 'tf_efficientnet_lite0', ''), ('backbone', 'resnt50', ''),
    ('backbone', 'open_clip:ViT-B-32/laion2b_e16', 'timm/vit_base_patch32_clip_224.laion2b_e16'),
    ('factual', 'open_clip:ViT-B-32/opnai', ''),
    ('factual', 'open_clip:hf-hub:someone/a-clip', 'someone/a-clip'), ('text_encoder', 'someone/a-bert', 'someone/a-bert')])
def test_names_on_the_hub(parameter, value, name): assert on_the_hub(parameter, value) == (name, '')


def test_revisions_and_folders(tmp_path):
    assert on_the_hub('text_encoder', 'skep@abc') == ('Yaxin/roberta-large-ernie2-skep-en', 'abc')
    assert on_the_hub('backbone', 'resnet50@abc') == ('timm/resnet50.a1_in1k', 'abc')
    assert on_the_hub('text_encoder', str(tmp_path)) == ('', '')


def test_one_repository_holds_two_kinds_of_weights_and_many_revisions(hub):
    folder = in_hub(hub, 'timm/vit_base_patch32_clip_224.openai', 'a' * 40, ('main', 'v1'))
    (folder / 'model.safetensors').touch()
    wanted = [('backbone', 'vit_clip'), ('factual', 'open_clip:ViT-B-32/openai')]
    assert preflight.find_weights(wanted)[0] == {'backbone'}
    (folder / 'model.safetensors').rename(folder / 'open_clip_model.safetensors')
    assert preflight.find_weights(wanted)[0] == {'factual'}
    (folder / 'model.safetensors').touch()
    assert preflight.find_weights([('backbone', 'vit_clip@v1')])[0] and not preflight.find_weights([('backbone', 'vit_clip@v2')])[0]


def test_weights_that_will_be_fetched(hub, monkeypatch):
    monkeypatch.setattr(preflight, 'unreachable', lambda name: '')
    assert preflight.find_weights([('backbone', 'resnet50')]) == (set(), [
        'backbone   resnet50: will be fetched, the hub has timm/resnet50.a1_in1k'])


@pytest.mark.parametrize('code, says', [(200, ''), (404, '404'), (None, 'cannot be reached')])
def test_the_hub_is_asked(monkeypatch, code, says):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(code)
            self.end_headers()
        def log_message(self, *_): pass
    asked, server = [], HTTPServer(('127.0.0.1', 0), Hub)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    if code: threading.Thread(target=server.serve_forever, daemon=True).start()
    else: server.server_close()
    assert says in (why := unreachable('a/b')) and bool(says) == bool(why) and asked == ['/a/b'] * bool(code)
    if code: server.shutdown()


def test_the_evaluations_pictures_are_counted():
    jobs, _ = plan_training({'compare': 'main', 'n_seeds': 1, 'batch_size': 2, 'epochs': 3}, np.repeat(preflight.PARTITIONS, 4), False)
    table = sets.pd.DataFrame({'split': ['train'] * 8 + ['val'] * 1 + ['test'] * 3})
    seen, learnt = evaluation_pictures(jobs, {'posts': (None, table, {}), 'fi': (None, table, {'label': sets.single(('a', 'b'))})}, 5)
    found = preflight.pieces(jobs, {'fi': {'label': sets.single(('a', 'b'))}}).values()
    tuned = sum(function is preflight.evaluate_tuned for function, _ in found)
    assert tuned and learnt == tuned * 5 * 8 and seen == (len(found) - tuned) * 12 + tuned * (5 * 1 + 3)


def test_speed_and_activations():
    worked = []
    assert speed(worked.append, 8, seconds=9) > 0 and worked == [1, 1, 4, 8]
    class Net(torch.nn.Module):
        num_features, pretrained_cfg = 4, {'mean': (0., 0., 0.), 'std': (1., 1., 1.), 'interpolation': 'bicubic'}
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 4)
        def forward(self, x): return self.layer(x.flatten(1)).exp()
    found = time_backbone(Net(), {'trainable_stages': 0, 'checkpointing': False, 'image_size': 8}, 2)
    assert found['activations'] == 4 * (3 * 8 * 8 + 4) and found['parameters'] == 4 * (3 * 8 * 8 + 1)  # a picture, and exp's result


def test_exit_codes_and_what_is_printed(tmp_path, hub, capsys, monkeypatch):
    run, settings, stages = asked(tmp_path)
    monkeypatch.setattr(preflight, 'check', lambda *_: (['all is well'], []))
    assert main(run, settings, stages) == 0 and 'all is well' in capsys.readouterr().out
    monkeypatch.setattr(preflight, 'check', lambda *_: ([], [preflight.Missing('FI', 'not there', 'the authors', 'Put it there')]))
    assert main(run, settings, stages) == 2
    assert capsys.readouterr().err == '\n1. FI: not there\n   get it: the authors\n   → Put it there\n\nMissing: 1. Nothing was run.\n'


def test_from_the_command_line(tmp_path, monkeypatch, capfd):
    "Through the pipeline, in a process of its own; without --dry-run too, a run stops before its first stage."
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    assert pipeline.main(['tumemo', '--runs', str(tmp_path / 'runs'), 'backbone=resnt50']) == 2
    out, err = capfd.readouterr()
    assert 'never ran' in out and 'TumEmo (posts)' in err and 'DeepSentiBank' in err and 'nearest valid: resnet50' in err
    assert not (tmp_path / 'runs').exists()
