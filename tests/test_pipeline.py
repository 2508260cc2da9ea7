"The pipeline on two miniature notebooks: what runs, what is skipped, what is said, and every bad input."
import ast
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest

from pacl.app import pipeline
from pacl.app.pipeline import declared, main, must_be_there, parameters_cell, read_settings, write_report
from pacl.parts.stages import InputError
from pacl.train import TrainConfig

MODULE = '''
import os, subprocess, time
from pathlib import Path
from pacl.parts.stages import InputError, progress, stage

@stage('numbers')
def run_numbers(run, out, *, n=3, kind='even', seed=0):
    if n == 13: raise InputError('posts.csv, row 13: unlucky. Choose another n.')
    if n == 14: raise KeyError('fourteen')
    if n == 15: os._exit(1)
    (out / 'numbers.txt').write_text(' '.join(str(2 * i + (kind == 'odd')) for i in range(n)))
    return {'numbers': n}

@stage('total', reads=('numbers',))
def run_total(run, out, *, scale=1.0, seed=0, folder='', slow=False, lr=0.1, chosen={}):
    if slow:
        (run / 'pid').write_text(str(subprocess.Popen(['sleep', '600'], start_new_session=True).pid))
        for _ in progress(range(999), 'steps'): time.sleep(.05)
    total = sum(map(int, (run / 'numbers/numbers.txt').read_text().split()))
    (out / 'total.txt').write_text(str(total * scale))
    return {'total': total * scale, 'folder': folder}
'''
CELLS = {
    'a_numbers': """run = 'x'  # the profile's folder
n = 3           # how many, ≥ 1
kind = 'even'   # of numbers
seed = 0        # of nothing""",
    'b_total': """run = 'x'  # the profile's folder
scale = 1.0     # of the total, (0, 10]
seed = 0        # of nothing
folder = ''     # any
slow = False    # with a child in a session of its own, as torchrun's are
lr = 0.1        # of nothing
chosen = {}     # of nothing"""}
RUN = {'a_numbers': 'run_numbers(run, n=n, kind=kind, seed=seed)',
       'b_total': 'run_total(run, scale=scale, seed=seed, folder=folder, slow=slow, lr=lr, chosen=chosen)'}
STAGES = {'numbers': 'a_numbers', 'total': 'b_total'}
ROOT = Path(__file__).parents[1]
CELLS_OF = {stage: parameters_cell(ROOT / f'nbs/{name}.ipynb') for stage, name in pipeline.STAGES.items()}
PROGRAM = f'''import sys
from pathlib import Path
from pacl.app import pipeline
from pacl.app.pipeline import main
pipeline.ROOT, pipeline.STAGES = Path.cwd(), {STAGES}
'''


@pytest.fixture
def mini(tmp_path, monkeypatch):
    "Notebooks, their module and a profile in a folder of their own; mini(…) is the command line, run in this process."
    for folder in ('code', 'nbs', 'data/profiles'): (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'code/mini.py').write_text(MODULE)
    for name, parameters in CELLS.items():
        cells = [nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']}),
                 nbformat.v4.new_code_cell(f'from mini import *\n{RUN[name]}')]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f'nbs/{name}.ipynb')
    (tmp_path / 'data/profiles/demo.yaml').write_text('# the two miniatures\nn: 4\n')
    monkeypatch.syspath_prepend(tmp_path / 'code')
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path / "code"}:{ROOT}')
    monkeypatch.setattr(pipeline, 'ROOT', tmp_path)
    monkeypatch.setattr(pipeline, 'STAGES', STAGES)
    monkeypatch.setattr(pipeline, 'get_context', lambda how: get_context('fork'))  # quicker; there is no torch here
    monkeypatch.delitem(sys.modules, 'mini', raising=False)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    yield lambda *arguments: main([*arguments, '--runs', 'runs'])
    for number, handler in handlers.items(): signal.signal(number, handler)


@pytest.fixture
def quick(mini, monkeypatch):
    "As mini, without papermill: a kernel's start takes seconds."
    def call(run, name, parameters): getattr(__import__('mini'), f'run_{name[2:]}')(run, **parameters)
    monkeypatch.setattr(pipeline, 'run_notebook', call)
    return mini


def test_through_papermill(mini, capfd, monkeypatch):
    "In this Python, whatever Jupyter would take, and without a home; the kernel has nothing to say."
    foreign = Path('jupyter/kernels/python3/kernel.json')
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"argv": ["false"], "display_name": "", "language": "python"}')
    monkeypatch.setenv('JUPYTER_PATH', str(foreign.parents[2].absolute()))
    monkeypatch.setenv('HOME', '/nowhere')
    assert mini('folder=a b', 'scale=2') == 0 and Path(os.environ['HOME']) == Path('runs/demo/.home').absolute()
    out, err = capfd.readouterr()
    assert not err
    out = out.splitlines()
    assert re.fullmatch(r'\d\d:\d\d:\d\d  numbers    never ran …', out[0])
    assert re.fullmatch(r' +numbers    0:\d\d:\d\d: numbers 4', out[1])
    assert re.fullmatch(r' +total      0:\d\d:\d\d: total 24.0, folder a b', out[3])
    assert re.search(r'0:\d\d:\d\d in all.*: runs/demo$', out[4])
    executed = json.loads(Path('runs/demo/notebooks/b_total.ipynb').read_text())
    assert 'scale = 2.0' in json.dumps(executed) and Path('runs/demo/total/total.txt').read_text() == '24.0'


def test_only_what_is_not_current_runs(quick, capsys):
    def lines(*arguments):
        assert quick(*arguments) == 0
        return re.sub(r'\d+:\d\d:\d\d', '', capsys.readouterr().out).splitlines()
    assert all('never ran' in line for line in lines()[:4:2])
    numbers, total, _ = lines()
    assert 'numbers    current: numbers 4' in numbers and 'total      current: total 12' in total
    numbers, _, total, *_ = lines('n=5', 'scale=3')
    assert 'n was 4, is 5' in numbers and 'scale was 1.0, is 3.0; numbers changed …' in total
    Path('runs/demo/numbers/numbers.txt').write_text('by hand')
    numbers, _, total, *_ = lines('n=5', 'scale=3')
    assert 'numbers.txt is not as the stage left it' in numbers and 'current: total 60' in total


def test_all_current_needs_neither_papermill_nor_torch(quick):
    assert quick() == 0
    run = subprocess.run([sys.executable, '-c', f'{PROGRAM}main(["--runs", "runs"])\nprint(*sys.modules)'], capture_output=True, text=True)
    assert run.stdout.count('current:') == 2, run.stderr
    assert not {'papermill', 'torch', 'numpy', 'pandas', 'mini'} & set(run.stdout.split())


@pytest.mark.parametrize('arguments, message', [
    (['dmeo'], r'profiles/dmeo.yaml: no such profile "dmeo"; nearest valid: demo'),
    (['demo', 'smoke'], r'command line: unknown parameter "smoke"; valid: chosen, folder, kind'),
    (['scael=2'], r'command line: unknown parameter "scael"; nearest valid: scale'),
    (['xyzzy=2'], r'command line: unknown parameter "xyzzy"; valid: chosen, folder, kind, lr, n, scale, seed, slow, stages'),
    (['run=elsewhere'], r'unknown parameter "run"'),
    (['n=many'], r"command line: n is 'many', expected int such as 3"),
    (['n=2.5'], r'n is 2.5, expected int such as 3'),
    (['n=true'], r'n is True, expected int'),
    (['scale=[1'], r"scale is '\[1', expected float such as 1.0"),
    (['slow=1'], r'slow is 1, expected bool'),
    (['lr=.inf'], r'lr is inf, expected float such as 0.1'),
    (['lr=0'], r'lr is 0.0, expected float such as 0.1'),
    (['stages=[numbers, totl]'], r'unknown stage "totl"; nearest valid: total'),
    (['stages=numbers'], r"stages is 'numbers', expected list"),
    (['n=0'], r'n is 0, expected int such as 3'),
    (['seed=-1'], r'seed is -1, expected int such as 0'),
])
def test_bad_input_stops_before_any_work(mini, capsys, arguments, message):
    assert mini(*arguments) == 2
    assert re.search(message, capsys.readouterr().err) and not Path('runs').exists()


@pytest.mark.parametrize('profile, message', [
    ('n: x\nscael: 2\nstages: [totl]\n', r"""n is 'x'.*\n.*unknown parameter "scael".*\n.*unknown stage"""),
    ('n: 4\nscael: 2\n', r'profiles/demo.yaml: unknown parameter "scael"; nearest valid: scale'),
    ('# odd\n\nkind: yes\n', r'profiles/demo.yaml: kind is True, expected str'),
    ('n: 4\nkind: [even\nscale: 2\n', r'profiles/demo.yaml: expected one "name: value" a line'),
    ('n: 4\n\tkind: even\n', r'profiles/demo.yaml: expected one "name: value" a line;[^$]*line 2'),
    ('- n\n- 4\n', r'profiles/demo.yaml: expected one "name: value" a line'),
    ('n: 4\nstages: [totl]\n', r'unknown stage "totl"; nearest valid: total'),
    ('n: !!python/object/apply:os.system ["touch harm"]\n', r'profiles/demo.yaml: [^$]*could not determine a constructor'),
])
def test_bad_profile(mini, capsys, profile, message):
    Path('data/profiles/demo.yaml').write_text(profile)
    assert mini() == 2
    assert re.search(message, capsys.readouterr().err) and not Path('runs').exists() and not Path('harm').exists()


def test_types_that_yaml_reads_otherwise(quick):
    Path('data/profiles/demo.yaml').write_text('')
    assert quick('scale=1e-1', 'folder=123', 'kind=odd') == 0
    assert json.loads(Path('runs/demo/total/stage.json').read_text())['parameters'] == {
        'scale': .1, 'seed': 0, 'folder': '123', 'slow': False, 'lr': .1, 'chosen': {}}



def test_data_stands_for_a_folder(quick):
    Path('data/profiles/demo.yaml').write_text('folder: set:$DATA/A\n')
    def folder(): return json.loads(Path('runs/demo/total/stage.json').read_text())['parameters']['folder']
    assert quick('--data', 'some where', 'n=5') == 0  # options may stand before keys
    assert folder() == f'set:{Path.cwd()}/some where/A'


def lacking(settings, stages, packages):
    if 'total' in stages: raise InputError('1. FI.')


def test_what_is_missing_stops_a_run(quick, monkeypatch, capsys):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')  # as a dry run sets it
    monkeypatch.setattr(pipeline, 'must_be_there', lacking)
    assert quick() == 2 and not Path('runs').exists()
    assert capsys.readouterr().err == '1. FI.\n'
    assert quick('stages=[numbers]') == 0
    monkeypatch.setattr(pipeline, 'expected_seconds', lambda settings: {'total': 7200})
    assert quick('--dry-run') == 2 and re.search(r'numbers +current\ntotal +2:00:00 +never ran', capsys.readouterr().out)


def test_a_stage_on_another_disk(quick):
    "A link is followed, and stays."
    Path('runs/demo').mkdir(parents=True)
    Path('runs/demo/total').symlink_to(Path('disk').absolute())
    for n in (4, 5):
        assert quick(f'n={n}') == 0 and Path('runs/demo/total').is_symlink()
        assert float(Path('disk/total.txt').read_text()) == n * (n - 1)


def test_what_is_waited_for(capsys):
    done = threading.Event()
    thread = threading.Thread(target=pipeline.watch, args=[done, .3])
    thread.start()
    subprocess.run(['sleep', '1'])
    done.set()
    thread.join()
    assert 'Nothing was computed for 0 s. What is waited for: sleep 1' in capsys.readouterr().err


def test_two_runs_in_one_folder(quick, capsys):
    with pipeline.locked(Path('runs/demo')):
        assert quick() == 2
    assert 'runs/demo: another run is at work in this folder. Wait until it ends' in capsys.readouterr().err
    assert quick() == 0


def test_failures_name_the_notebook_the_cell_and_the_remedy(mini, capsys):
    assert mini('n=13') == 1
    out, err = capsys.readouterr()
    assert err == ('nbs/a_numbers.ipynb, cell In [3]:\nposts.csv, row 13: unlucky. Choose another n.\n'
                   'The notebook as far as it came: runs/demo/notebooks/a_numbers.ipynb\n')
    assert 'unlucky' in Path('runs/demo/notebooks/a_numbers.ipynb').read_text() and 'total' not in out
    assert mini('n=14') == 1
    assert "cell In [3]:\nKeyError: 'fourteen'\n" in capsys.readouterr().err
    assert sorted(os.listdir('runs/demo')) == ['.lock', 'notebooks']  # nothing half-written


def test_a_kernel_that_dies(mini, capsys):
    assert mini('n=15') == 1
    assert re.search(r'a_numbers.ipynb:\n.*[Kk]ernel died.*out of memory', capsys.readouterr().err)


def test_help_names_profiles_and_keys(mini, capsys):
    with pytest.raises(SystemExit, match='0'): mini('--help')
    text = capsys.readouterr().out
    assert './reproduce.sh demo threshold=0.6' in text and 'demo       the two miniatures' in text
    assert '--dry-run' in text and 'stages = [data, …]' in text
    assert re.search(r'keys of total:\nscale = 1.0 +# of the total, \(0, 10\]', text)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(mini, number):
    "Progress is shown on a terminal; Ctrl-C ends the kernel and its child, and leaves what is finished."
    terminal, side = pty.openpty()
    program = f'{PROGRAM}sys.exit(main(["slow=true", "--runs", "runs"]))'
    run = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=side, text=True)
    os.close(side)
    seen = b''
    while not re.search(r'steps [1-9]\d*/999', seen.decode(errors='ignore')): seen += os.read(terminal, 1000)
    child = int(Path('runs/demo/pid').read_text())
    seen = b''
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    while True:  # what is left on the terminal, until its other side is closed
        try: seen += os.read(terminal, 1000)
        except OSError: break
    assert run.returncode == 130 and 'numbers 4' in out and b'Stopped. What is finished is kept' in seen
    assert 'Traceback' not in seen.decode(), seen.decode()
    for _ in range(50):
        if not Path(f'/proc/{child}').exists() or ') Z ' in Path(f'/proc/{child}/stat').read_text(): break
        time.sleep(.1)
    else: pytest.fail('the child of the kernel is still there')
    assert sorted(p.name for p in Path('runs/demo').glob('[!.]*')) == ['notebooks', 'numbers', 'pid']


@pytest.mark.parametrize('name, notebook', pipeline.STAGES.items())
def test_every_notebook_declares_what_its_stage_takes(name, notebook):
    "So that no setting is out of a profile's reach, and none is read and then ignored."
    given = declared(CELLS_OF[name])
    module = ast.parse((ROOT / f'pacl/{re.sub("[0-9]+_", "", notebook)}.py').read_text())
    functions = [f for f in ast.walk(module) if isinstance(f, ast.FunctionDef)]
    stage, = [f for f in functions if any(getattr(getattr(d, 'func', 0), 'id', '') == 'stage' for d in f.decorator_list)]
    takes = {a.arg for a in stage.args.kwonlyargs}
    if stage.args.kwarg: takes |= TrainConfig.__dataclass_fields__.keys() & given.keys()  # **training
    assert takes == set(given)
    run_cell = (ROOT / f'nbs/{notebook}.ipynb').read_text()
    assert not [name for name in given if f'{name}={name}' not in run_cell]


def profile(name, *given, data='$DATA'):
    values = read_settings(ROOT / f'data/profiles/{name}.yaml', given, CELLS_OF, data)
    return values, values['stages']


def test_the_profiles():
    "§4.2, value by value; and the template takes its overrides."
    values, stages = profile('tumemo', data='/data')
    paper = dict(threshold=.7, n_clusters=2, temperature=.07, epochs=30, batch_size=64, lr=1e-3, projector_lr=1e-3, backbone='resnet50',
                 text_encoder='skep', scale='clipscore', trainable_stages=0, image_size=224, processes=4, probe_epochs=40,
                 fine_tune_epochs=40, backbone_lr=1e-4, factual='open_clip:ViT-B-32/openai',
                 sentences='bertweet-sentiment', phrases='deepsentibank:/data/DeepSentiBank', posts='tumemo:/data/TumEmo')
    assert {name: values[name] for name in paper} == paper and len(values['benchmarks']) == 7
    assert stages == 'data features partition clusters models results tables'.split()
    values, stages = profile('own', 'backbone=resnet50', 'lr=1e-5', data='/data')
    assert values['posts'] == '/data/posts' and values['lr'] == 1e-5 and values['backbone'] == 'resnet50' and stages[0] == 'data'
    assert profile('demo')[1] == profile('smoke')[1] == list(pipeline.STAGES)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    "An empty cache."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


def missing(*given):
    with pytest.raises(InputError) as raised: must_be_there(*given)
    *texts, count = re.split(r'\n\n(?=\d+\. |Missing: )', f'\n{raised.value}')[1:]
    assert count == f'Missing: {len(texts)}. Nothing was run.'
    return texts


def test_nothing_is_there(no_network, monkeypatch, tmp_path):
    values, stages = profile('tumemo')
    expected = [*(f'README.md, `{name}`' for name in ('tumemo', 'fi', 'emotion-6', 'unbiasedemo', 'webemo', 'emotic', 'emotic', 'iaps')),
                'backbone: resnet50.a1_in1k', 'Yaxin/roberta-large-ernie2-skep-en', 'ViT-B-32/openai', 'README.md, `deepsentibank`',
                'finiteautomata']
    for text, where in zip(missing(values, stages), expected, strict=True):
        assert where in text and ('--data ROOT' in text or 'HF_HOME' in text), text
    values['posts'], values['benchmarks'] = 'tumemo:/nowhere', [f'folder:{tmp_path}', 'folder:/nowhere']
    posts, own = missing(values, ['data'])
    assert '1. tumemo:/nowhere: it is not there' in posts and own.startswith('2. folder:') and 'README.md, `folder`' in own
    values['backbone'] = 'resnt50'
    assert 'nearest valid: resnet50' in missing(values, ['features'])[0]
    must_be_there(*profile('demo'))
    monkeypatch.setattr(pipeline.importlib.util, 'find_spec', lambda name: name != 'ipykernel')
    kernel, = missing({}, [], ['ipykernel'])
    assert 'the package ipykernel' in kernel and 'pip install "pacl[reproduce]"' in kernel


def test_a_plan_in_a_few_seconds(monkeypatch):
    assert 0 < pipeline.seconds_a_picture(profile('smoke')[0]) < 1
    monkeypatch.setattr(pipeline, 'seconds_a_picture', lambda settings: .001)
    values, _ = profile('tumemo')
    once = pipeline.expected_seconds(values)
    more = pipeline.expected_seconds(values | {'n_seeds': 2, 'tables': '4'})
    assert more['models'] > 4 * once['models'] and more['results'] > 2 * once['results']


def test_the_report_is_the_notebook_without_its_code(tmp_path):
    cells = [nbformat.v4.new_markdown_cell('# Words')]
    for source, tags in (('print(1)', []), ('2', ['no-report'])):
        output = nbformat.v4.new_output('display_data', {'text/html': f'of cell {len(cells)}'})
        cells.append(nbformat.v4.new_code_cell(source, outputs=[output], metadata={'tags': tags}))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / 'x.ipynb')
    page = tmp_path / 'report.html'
    write_report(tmp_path / 'x.ipynb', page)
    html = page.read_text()
    assert 'Words' in html and 'of cell 1' in html and 'of cell 2' not in html and 'print(' not in html
    assert not re.search(r'(src|href)="(https?:)?//', html)  # it can be read anywhere
