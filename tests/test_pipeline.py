"The pipeline on two miniature notebooks: what runs, what is skipped, what is said, and every bad input."
import ast
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from pacl.app import pipeline
from pacl.app.pipeline import StageError, located, main, notebook_parameters, outside, run_notebook

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
def run_total(run, out, *, scale=1.0, seed=0, folder='', slow=False):
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
kind = 'even'   # of numbers, even | odd
seed = 0        # ≥ 0""",
    'b_total': """run = 'x'  # the profile's folder
scale = 1.0     # of the total, (0, 10]
seed = 0        # ≥ 0
folder = ''     # any
slow = False    # with a child in a session of its own, as torchrun's are"""}
RUN = {'a_numbers': 'run_numbers(run, n=n, kind=kind, seed=seed)',
       'b_total': 'run_total(run, scale=scale, seed=seed, folder=folder, slow=slow)'}
STAGES = {'numbers': 'a_numbers', 'total': 'b_total'}


@pytest.fixture
def mini(tmp_path, monkeypatch):
    "Notebooks, their module and a profile in a folder of their own; mini(…) is the command line, run in this process."
    for folder in ('code', 'nbs', 'profiles'): (tmp_path / folder).mkdir()
    (tmp_path / 'code/mini.py').write_text(MODULE)
    for name, parameters in CELLS.items():
        cells = [nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']}),
                 nbformat.v4.new_code_cell(f'from mini import *\n{RUN[name]}')]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f'nbs/{name}.ipynb')
    (tmp_path / 'profiles/demo.yaml').write_text('# the two miniatures\nn: 4\n')
    monkeypatch.syspath_prepend(tmp_path / 'code')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'code'))
    monkeypatch.delitem(sys.modules, 'mini', raising=False)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(*arguments):
        return main([*arguments, '--runs', 'runs'], STAGES, tmp_path / 'nbs', tmp_path / 'profiles')
    yield command
    for number, handler in handlers.items(): signal.signal(number, handler)


@pytest.fixture
def quick(mini, monkeypatch):
    "As mini, without papermill: a kernel's start takes seconds."
    def call(notebook, executed, parameters): getattr(__import__('mini'), f'run_{notebook.stem[2:]}')(**parameters)
    monkeypatch.setattr(pipeline, 'run_notebook', call)
    return mini


def test_through_papermill(mini, capsys):
    assert mini(f'folder={Path.cwd().name}/nbs', 'scale=2') == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'\d\d:\d\d:\d\d  numbers    never ran … \d+\.\d s: numbers 4', out[0])
    assert re.fullmatch(r'\d\d:\d\d:\d\d  total      never ran … \d+\.\d s: total 24, folder .*', out[1])
    assert re.search(r'\d+\.\d s in all.*: runs/demo$', out[-1])
    executed = json.loads(Path('runs/demo/notebooks/b_total.ipynb').read_text())
    assert 'scale = 2.0' in json.dumps(executed) and Path('runs/demo/total/total.txt').read_text() == '24.0'
    assert not Path('runs/demo/.progress').exists()


def test_only_what_is_not_current_runs(quick, capsys):
    def lines(*arguments):
        assert quick(*arguments) == 0
        return re.sub(r'\d\d:\d\d:\d\d|\d+\.\d s', '', capsys.readouterr().out).splitlines()
    assert [line.split()[1:3] for line in lines()[:2]] == [['never', 'ran']] * 2
    again = lines()
    assert [line.split()[:2] for line in again[:2]] == [['numbers', 'current:'], ['total', 'current:']]
    assert again[2].startswith('2 of 2 stages were current: parameters, inputs, code and files')
    assert [' '.join(line.split()) for line in lines('scale=3')[:2]] == [
        'numbers current: numbers 4', 'total scale was 1.0, is 3.0 … : total 36, folder']
    assert 'n was 4, is 5' in (changed := lines('n=5', 'scale=3'))[0] and 'numbers changed' in changed[1]
    Path('runs/demo/numbers/numbers.txt').write_text('by hand')
    edited = lines('n=5', 'scale=3')
    assert 'numbers.txt was edited (hash differs)' in edited[0] and 'current' in edited[1]


def test_all_current_needs_neither_papermill_nor_torch(quick):
    assert quick() == 0
    code = f'''import sys
from pathlib import Path
from pacl.app.pipeline import main
assert main(['--runs', 'runs'], {STAGES}, Path('nbs').absolute(), Path('profiles').absolute()) == 0
print(*sys.modules)'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ':'.join(sys.path)})
    assert '2 of 2 stages were current' in run.stdout, run.stderr
    assert not {'papermill', 'torch', 'numpy', 'pandas', 'mini'} & set(run.stdout.split())


@pytest.mark.parametrize('arguments, message', [
    (['dmeo'], r'profiles/dmeo.yaml: no such profile; nearest valid: demo'),
    (['demo', 'smoke'], r'one profile at a time, not demo, smoke'),
    (['scael=2'], r'command line: unknown parameter "scael"; nearest valid: scale'),
    (['xyzzy=2'], r'command line: unknown parameter "xyzzy"; valid: folder, kind, n, scale, seed, slow'),
    (['run=elsewhere'], r'"run" is not for a profile to set.*--runs'),
    (['n=many'], r'command line: n is "many", expected a whole number'),
    (['n=2.5'], r'n is 2.5, expected a whole number'),
    (['n=true'], r'n is true, expected a whole number'),
    (['n=0'], r'n is 0, expected ≥ 1'),
    (['scale=0'], r'scale is 0, expected \(0, 10\]'),
    (['scale=10.5'], r'scale is 10.5, expected \(0, 10\]'),
    (['scale=nan'], r'scale is "nan", expected \(0, 10\]'),
    (['scale=[1'], r'scale is "\[1", expected a number'),
    (['slow=1'], r'slow is 1, expected true or false'),
    (['kind=evne'], r'kind is "evne", expected even \| odd'),
])
def test_bad_input_stops_before_any_work(mini, capsys, arguments, message):
    assert mini(*arguments) == 2
    assert re.search(message, capsys.readouterr().err) and not Path('runs').exists()


@pytest.mark.parametrize('profile, message', [
    ('n: 4\nscael: 2\n', r'profiles/demo.yaml, line 2: unknown parameter "scael"; nearest valid: scale'),
    ('# odd\n\nkind: yes\n', r'profiles/demo.yaml, line 3: kind is true, expected text, in quotes'),
    ('n: 4\nkind: [even\nscale: 2\n', r'profiles/demo.yaml, line 3: .*expected one "name: value" a line'),
    ('n: 4\n\tkind: even\n', r'profiles/demo.yaml, line 2: '),
    ('- n\n- 4\n', r'profiles/demo.yaml, line 1: expected one "name: value" a line'),
    ('n: !!python/object/apply:os.system ["touch harm"]\n', r'profiles/demo.yaml, line 1: could not determine a constructor'),
])
def test_bad_profile(mini, capsys, profile, message):
    Path('profiles/demo.yaml').write_text(profile)
    assert mini() == 2
    assert re.search(message, capsys.readouterr().err) and not Path('runs').exists() and not Path('harm').exists()


def test_all_problems_at_once(mini, capsys):
    Path('profiles/demo.yaml').write_text('n: 0\nscael: 2\nseed: -1\n')
    assert mini('kind=evne') == 2
    assert capsys.readouterr().err.count('\n') == 4  # seed is declared twice and wrong once


def test_types_that_yaml_reads_otherwise(quick):
    Path('profiles/demo.yaml').write_text('')
    assert quick('scale=1e-1', 'folder=123', 'kind=odd') == 0
    assert json.loads(Path('runs/demo/total/stage.json').read_text())['parameters'] | {'seed': 0} == {
        'scale': .1, 'seed': 0, 'folder': '123', 'slow': False}
    assert quick('folder=./nbs') == 0  # from where the user is, not from where notebooks run
    assert json.loads(Path('runs/demo/total/stage.json').read_text())['parameters']['folder'] == str(Path('nbs').absolute())


def test_relative_paths_are_those_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / 'sets/fi').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in ('sets/fi', 'fi:sets/fi', 'fi/polarity:./sets/fi'):
        assert located(text, None) == text.replace('./', '').replace('sets/fi', f'{tmp_path}/sets/fi')
    for text in ('sets/nowhere', 'fi', 'fi:', f'fi:{tmp_path}/sets/fi', 3): assert located(text, None) == text
    assert located(['$DATA/fi', 'fi:$DATA/fi', 3], f'{tmp_path}/sets') == [f'{tmp_path}/sets/fi', f'fi:{tmp_path}/sets/fi', 3]


def test_ranges_at_their_ends():
    def ends(comment, *values): return [outside(v, comment) is None for v in values]
    assert ends('γ, [0, 1]', -.1, 0, 1, 1.1) == [False, True, True, False]
    assert ends('(0, 1)', 0, .5, 1) == [False, True, False]
    assert ends('[-1.5, 1e3)', -1.5, 999, 1000) == [True, True, False]
    assert ends('≥ 1', .9, 1) == [False, True] and ends('> 0', 0, 1e-9) == [False, True]
    assert ends('≤ 5', 5, 6) == [True, False] and ends('< 5', 4, 5) == [True, False]
    assert ends('cosine | rank', 'rank', 'cosine | rank', '') == [True, False, False]
    assert ends('E of Eqs. 15–17 [three parts] of a step', -7) == [True]


def test_a_profile_may_have_some_of_the_stages(quick, capsys):
    Path('profiles/demo.yaml').write_text('stages: [total, numbers]\nn: 4\n')
    assert quick('stages=[numbers]') == 0 and not Path('runs/demo/total').exists()
    assert quick() == 0 and quick() == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith('2 of 2 stages were current')


@pytest.mark.parametrize('stages, message', [
    ('[numbers, totl]', 'unknown stage "totl"; nearest valid: total'), ('numbers', 'stages is "numbers", expected a list of stages'),
    ('[]', r'stages is \[\], expected'), ('[1]', 'unknown stage "1"; valid: numbers, total'), ('', 'stages is (null|""), expected')])
def test_stages_that_do_not_exist(mini, capsys, stages, message):
    assert mini(f'stages={stages}') == 2
    assert re.search(f'command line: {message}', capsys.readouterr().err)
    Path('profiles/demo.yaml').write_text(f'n: 4\nstages: {stages}\n')
    assert mini() == 2
    assert re.search(f'profiles/demo.yaml, line 2: {message}', capsys.readouterr().err) and not Path('runs').exists()


def test_data_stands_for_a_folder(quick, capsys, monkeypatch):
    Path('profiles/demo.yaml').write_text('folder: set:$DATA/A\n')
    def folder(): return json.loads(Path('runs/demo/total/stage.json').read_text())['parameters']['folder']
    assert quick('--data', 'some where', 'n=5') == 0  # options may stand before keys
    assert folder() == f'set:{Path.cwd()}/some where/A'
    assert quick('--data', '~/x', 'folder=$DATA') == 0 and folder() == os.path.expanduser('~/x')
    asked = []
    monkeypatch.setattr(pipeline, 'preflight', lambda run, settings, stages: asked.append(settings) or 2)
    assert quick() == 2 and asked[0]['b_total']['folder'] == 'set:$DATA/A'  # it says that --data is wanting


def test_what_is_looked_at_before_a_run(quick, monkeypatch):
    looked = []
    def preflight(run, settings, stages):
        looked.append(list(stages))
        return code
    monkeypatch.setattr(pipeline, 'preflight', preflight)
    code = 0
    assert quick('--dry-run') == 0 and looked.pop() == ['numbers', 'total'] and not Path('runs').exists()
    monkeypatch.setitem(STAGES, 'world', 'a_numbers')
    assert quick('stages=[numbers]') == 0 and looked.pop() == ['numbers'] and Path('runs/demo/numbers').exists()
    code = 2
    assert quick('stages=[total]') == 2 and not Path('runs/demo/total').exists()
    code, looked[:] = 0, []
    monkeypatch.delitem(STAGES, 'world')
    assert quick() == 0 and not looked  # the demo's way: nothing of the user's is read


def test_a_preflight_that_fails_is_no_yes(quick, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.subprocess, 'run', lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert quick('--dry-run') == 1 and 'Nothing was run' in capsys.readouterr().err


def test_two_runs_in_one_folder(quick, capsys):
    holder = subprocess.Popen([sys.executable, '-c', '''
from pathlib import Path
from pacl.app.pipeline import locked
with locked(Path('runs/demo')): print('locked', flush=True); input()'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={'PYTHONPATH': ':'.join(sys.path)})
    assert holder.stdout.readline() == b'locked\n'
    assert quick() == 2
    assert f'runs/demo: process {holder.pid} is running in this folder. Wait until it ends' in capsys.readouterr().err
    assert not Path('runs/demo/numbers').exists()
    holder.kill()  # -9: the lock goes with the process
    holder.communicate()
    assert quick() == 0


def test_a_runs_folder_that_cannot_be_written(mini, capsys):
    Path('runs').write_text('a file')
    assert mini() == 2
    assert re.search('runs/demo.*: not a directory', capsys.readouterr().err)


def test_failures_name_the_notebook_the_cell_and_the_remedy(mini, capsys):
    assert mini('n=13') == 1
    out, err = capsys.readouterr()
    assert err == ('nbs/a_numbers.ipynb, cell In [3]:\nposts.csv, row 13: unlucky. Choose another n.\n'
                   'The notebook as far as it came: runs/demo/notebooks/a_numbers.ipynb\n')
    assert 'unlucky' in Path('runs/demo/notebooks/a_numbers.ipynb').read_text() and 'total' not in out
    assert mini('n=14') == 1
    assert "cell In [3]:\nKeyError: 'fourteen'\n" in capsys.readouterr().err
    assert sorted(p.name for p in Path('runs/demo').iterdir()) == ['.lock', 'notebooks']  # nothing half-written


def test_a_kernel_that_dies(mini, capsys):
    assert mini('n=15') == 1
    assert re.search(r'a_numbers.ipynb:\n.*[Kk]ernel died.*out of memory', capsys.readouterr().err)


def test_a_full_disk_while_the_notebook_is_saved(tmp_path, monkeypatch):
    import papermill
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(papermill, 'execute_notebook', full)
    with pytest.raises(StageError, match='(?s)x.ipynb:\n.*the disk is full'): run_notebook(tmp_path / 'x.ipynb', tmp_path / 'y.ipynb', {})


def test_a_run_cell_that_forgets_a_parameter(mini, capsys):
    path = Path('nbs/a_numbers.ipynb')
    path.write_text(path.read_text().replace(', kind=kind', ''))
    assert mini('kind=odd') == 1
    assert 'a_numbers.ipynb ran and did not write runs/demo/numbers with its parameters' in capsys.readouterr().err


def test_notebooks_that_are_not_there(tmp_path, capsys):
    assert main([], {'x': 'x'}, tmp_path, tmp_path) == 2
    assert 'x.ipynb is missing: the pipeline runs in a clone' in capsys.readouterr().err


def test_help_names_profiles_and_keys(mini, capsys):
    with pytest.raises(SystemExit, match='0'): mini('--help')
    text = capsys.readouterr().out
    assert './reproduce.sh demo threshold=0.6' in text and 'demo       the two miniatures' in text
    assert 'tumemo --data ROOT --dry-run' in text and 'stages=[data, …]' in text
    assert re.search(r'keys of b_total:\n  scale=1.0 +of the total, \(0, 10\]', text)


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle(mini, number, code):
    "Progress is shown on a terminal; Ctrl-C ends the kernel and its child, and leaves what is finished."
    program = f'''import sys
from pathlib import Path
from pacl.app.pipeline import main
sys.exit(main(['slow=true', '--runs', 'runs'], {STAGES}, Path('nbs').absolute(), Path('profiles').absolute()))'''
    terminal, side = pty.openpty()
    run = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=side, text=True,
                           env={**os.environ, 'PYTHONPATH': ':'.join(sys.path)})
    os.close(side)
    seen = b''
    while not re.search(r'total +never ran … \d+\.\d s  steps [1-9]\d*/999', seen.decode(errors='ignore')): seen += os.read(terminal, 1000)
    child = int(Path('runs/demo/pid').read_text())
    seen = b''
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    while True:  # what is left on the terminal, until its other side is closed
        try: seen += os.read(terminal, 1000)
        except OSError: break
    assert run.returncode == code and 'numbers 4' in out and b'Stopped. Finished stages are kept' in seen
    assert 'Traceback' not in seen.decode(), seen.decode()
    for _ in range(50):
        if not Path(f'/proc/{child}').exists() or ') Z ' in Path(f'/proc/{child}/stat').read_text(): break
        time.sleep(.1)
    else: pytest.fail('the child of the kernel is still there')
    assert sorted(p.name for p in Path('runs/demo').glob('[!.]*')) == ['notebooks', 'numbers', 'pid']


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('notebook', pipeline.STAGES.values())
def test_every_notebook_declares_what_its_stage_takes(notebook):
    "So that no setting is out of a profile's reach, and none is read and then ignored."
    declared = notebook_parameters(ROOT / f'nbs/{notebook}.ipynb')
    module = ast.parse((ROOT / f'pacl/{notebook[3:]}.py').read_text())
    stages = [f for f in ast.walk(module) if isinstance(f, ast.FunctionDef) and any(
        isinstance(d, ast.Call) and getattr(d.func, 'id', '') == 'stage' for d in f.decorator_list)]
    assert len(stages) == 1 and {a.arg for a in stages[0].args.kwonlyargs} == set(declared)
    assert set(papermill.inspect_notebook(ROOT / f'nbs/{notebook}.ipynb')) == {'run', *declared}  # papermill's own reading of the cell
    for name, (default, comment) in declared.items(): assert outside(default, comment) is None or isinstance(default, list | tuple), name
