"Stage folders: whole or not there, current or made again, and said why."
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pacl.parts import stages
from pacl.parts.stages import InputError, in_shards, listing, progress, stage, why_stale

TOY = '''
from pathlib import Path
from pacl.parts.stages import stage
from toy.maths import double  # the stage's result hangs on it

@stage('numbers')
def run_numbers(run: Path, out: Path, *, n: int = 3, noise: int = 0) -> dict:
    (out / 'deep').mkdir()
    (out / 'deep/numbers.txt').write_text(' '.join(str(double(i)) for i in range(n)))
    return {'n': n}

@stage('total', reads=('numbers',))
def run_total(run: Path, out: Path, *, scale: float = 1., seeds: tuple = (0, 1)) -> dict:
    numbers = (run / 'numbers/deep/numbers.txt').read_text().split()
    (out / 'total.txt').write_text(str(scale * sum(map(int, numbers))))
    return {}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A package of two stages, and a folder to run them in."
    package = tmp_path / 'code/toy'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / 'maths.py').write_text('def double(i): return 2 * i\n')
    (package / 'toys.py').write_text(TOY)
    monkeypatch.syspath_prepend(package.parent)
    for name in [n for n in sys.modules if n.split('.')[0] == 'toy']: monkeypatch.delitem(sys.modules, name)
    import toy.toys
    toy.toys.run, toy.toys.package = tmp_path / 'runs/demo', package
    return toy.toys


def test_a_stage_that_is_current_does_nothing(toy):
    assert toy.run_numbers.stage == 'numbers' and toy.run_numbers.stale(toy.run) == 'never ran'
    folder = toy.run_numbers(str(toy.run), n=4)
    before = (folder / 'stage.json').stat().st_mtime_ns
    assert toy.run_numbers.stale(toy.run, n=4) is None
    assert toy.run_numbers(toy.run, n=4) == folder == toy.run / 'numbers'
    assert (folder / 'stage.json').stat().st_mtime_ns == before


def test_stage_json_says_what_the_folder_was_made_from(toy):
    toy.run_numbers(toy.run)
    record = json.loads((toy.run_total(toy.run, scale=2.) / 'stage.json').read_text())
    assert record['parameters'] == {'scale': 2., 'seeds': [0, 1]} and record['seed'] == [0, 1]
    assert list(record['inputs']) == ['numbers'] and list(record['outputs']) == ['total.txt']
    assert list(record['code']) == ['toy.maths', 'toy.toys']
    assert {'packages', 'device', 'seconds', 'result', 'stage'} <= set(record)


def test_every_reason_is_said(toy):
    numbers, total = toy.run_numbers(toy.run), toy.run_total(toy.run)
    assert toy.run_total.stale(toy.run) is None
    assert toy.run_total.stale(toy.run, scale=.5) == 'scale was 1.0, is 0.5'
    assert toy.run_numbers.stale(toy.run, n=9, noise=9) == 'n was 3, is 9; noise was 0, is 9'
    (total / 'notes.txt').write_text('mine')
    assert toy.run_total.stale(toy.run) == 'notes.txt was added'
    (total / 'notes.txt').unlink()
    (total / '.DS_Store').write_text('a file browser was here')
    assert toy.run_total.stale(toy.run) is None
    (numbers / 'deep/numbers.txt').write_text('1 2 3 4 5')
    assert toy.run_total.stale(toy.run) == 'numbers changed'
    (numbers / 'deep/numbers.txt').unlink()
    assert toy.run_numbers.stale(toy.run) == 'deep/numbers.txt is missing'
    (total / 'stage.json').write_text('{"stage": ')
    assert toy.run_total.stale(toy.run) == 'stage.json cannot be read'


def test_a_comment_is_no_change_of_code(toy):
    toy.run_numbers(toy.run)
    maths = toy.package / 'maths.py'
    maths.write_text('# twice\n' + maths.read_text())
    assert toy.run_numbers.stale(toy.run) is None
    maths.write_text('def double(i): return 3 * i\n')
    assert toy.run_numbers.stale(toy.run) == 'code changed: maths'
    maths.unlink()
    assert toy.run_numbers.stale(toy.run) == 'code changed: maths'


def test_a_file_edited_by_hand_is_made_again(toy):
    file = toy.run_numbers(toy.run) / 'deep/numbers.txt'
    whole = file.read_text()
    file.write_text('edited by hand')
    assert toy.run_numbers.stale(toy.run) == 'deep/numbers.txt was edited (hash differs)'
    toy.run_numbers(toy.run)
    assert file.read_text() == whole and toy.run_numbers.stale(toy.run) is None


def test_upstream_with_equal_bytes_leaves_downstream_current(toy):
    toy.run_numbers(toy.run)
    toy.run_total(toy.run)
    toy.run_numbers(toy.run, noise=1)
    assert toy.run_total.stale(toy.run) is None
    toy.run_numbers(toy.run, n=5)
    assert toy.run_total.stale(toy.run) == 'numbers changed'


def test_missing_upstream_is_named(toy):
    with pytest.raises(InputError, match='numbers is missing, and total reads it.*reproduce.sh demo'): toy.run_total(toy.run)
    assert not (toy.run / 'total').exists()


def test_unknown_parameter(toy):
    with pytest.raises(TypeError, match='scael'): toy.run_total(toy.run, scael=1)


def test_device_is_recorded_and_not_compared(tmp_path):
    @stage('here')
    def run_here(run, out, *, device='cpu'): (out / 'x').write_text('x')
    run_here(tmp_path, device='cuda')
    assert run_here.stale(tmp_path, device='cpu') is None


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    @stage('here')
    def run_here(run, out, *, fail=False):
        (out / 'x').write_text('half' if fail else 'whole')
        if fail: raise error
    run_here(tmp_path)
    with pytest.raises(error): run_here(tmp_path, fail=True)
    assert (tmp_path / 'here/x').read_text() == 'whole' and run_here.stale(tmp_path) is None
    assert [p.name for p in tmp_path.iterdir()] == ['here']


KILLED = '''
import os, shutil, signal, sys
from pathlib import Path
from pacl.parts import stages
from toy.toys import run_numbers
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
moment, steps, rename = sys.argv[1], iter(range(9)), Path.rename
if moment == 'filling': stages.file_hashes = die
if moment == 'clearing': stages.shutil.rmtree = lambda path, **_: die() if Path(path).exists() else None
def rename_or_die(self, target):
    step = next(steps)
    if moment == f'before {step}': die()
    rename(self, target)
    if moment == f'after {step}': die()
Path.rename = rename_or_die
run_numbers(sys.argv[2], n=7)
'''


@pytest.mark.parametrize('old, moment, left', [
    (3, 'filling', 3), (3, 'before 0', 3), (3, 'after 0', 3),  # rename 0: stage.json gets its name
    (3, 'before 1', 3), (3, 'after 1', 7),                     # rename 1: the old folder steps aside; the new one is complete
    (3, 'before 2', 7), (3, 'after 2', 7), (3, 'clearing', 7),
    (None, 'filling', None), (None, 'before 0', None), (None, 'after 0', 7), (None, 'after 1', 7)])
def test_kill_9_leaves_a_whole_folder(toy, old, moment, left):
    "And the next run ends with what an undisturbed one would have written, and nothing beside it."
    if old: toy.run_numbers(toy.run, n=old)
    killed = subprocess.run([sys.executable, '-c', KILLED, moment, str(toy.run)], env={'PYTHONPATH': ':'.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    if left: assert toy.run_numbers.stale(toy.run, n=left) is None
    else: assert toy.run_numbers.stale(toy.run, n=7) == 'never ran' and not (toy.run / 'numbers').exists()
    folder = toy.run_numbers(toy.run, n=7)
    assert toy.run_numbers.stale(toy.run, n=7) is None and (folder / 'deep/numbers.txt').read_text() == '0 2 4 6 8 10 12'
    toy.run_numbers(toy.run, n=8)
    assert [p.name for p in toy.run.iterdir()] == ['numbers']


def test_an_output_folder_that_cannot_be_written(toy, monkeypatch):
    toy.run.parent.mkdir(parents=True)
    toy.run.write_text('a file where the run wants its folder')
    with pytest.raises(InputError, match=f'{toy.run}.*: not a directory.*--runs'): toy.run_numbers(toy.run)
    toy.run.unlink()

    def refuse(self, **_): raise PermissionError(errno.EACCES, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'mkdir', refuse)  # chmod does not stop root
    with pytest.raises(InputError, match='numbers.*: permission denied.*--runs'): toy.run_numbers(toy.run)


def full(out): raise OSError(errno.ENOSPC, 'No space left on device', str(out / 'x'))
def full_numpy(out): raise OSError('999 requested and 12 written')        # ndarray.tofile: no errno
def full_safetensors(out): raise RuntimeError('Error while serializing')  # nor an OSError at all


@pytest.mark.parametrize('write', [full, full_numpy, full_safetensors])
def test_a_full_disk(tmp_path, monkeypatch, write):
    @stage('here')
    def run_here(run, out, *, n=0):
        if n: write(out)
    folder = run_here(tmp_path)
    if write is not full: monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(InputError, match='here.*the disk is full. Free some space'): run_here(tmp_path, n=1)
    assert why_stale(folder, {'n': 0}) is None and [p.name for p in tmp_path.iterdir()] == ['here']


def test_an_error_of_the_code_stays_itself(tmp_path):
    @stage('here')
    def run_here(run, out, *, n=0): (run / 'not/there').read_text()
    with pytest.raises(FileNotFoundError): run_here(tmp_path)


def test_progress_goes_to_the_file_that_the_pipeline_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PACL_PROGRESS', str(tmp_path / 'progress'))
    assert list(progress(range(3), 'epochs')) == [0, 1, 2]
    assert 'epochs 3/3' in (tmp_path / 'progress').read_text() and not capsys.readouterr().err
    monkeypatch.delenv('PACL_PROGRESS')
    list(progress(iter('ab'), 'letters', total=2))
    assert not capsys.readouterr().err  # of short work nothing: a notebook keeps what its looks print
    list(progress((time.sleep(.8) for _ in range(4)), 'naps', total=4))
    assert 'naps: 100%' in capsys.readouterr().err


def test_import_is_light():
    "So that the pipeline can tell in a moment that all is current."
    loaded = subprocess.run([sys.executable, '-c', 'import pacl.parts.stages, sys; print(*sys.modules)'], capture_output=True, text=True)
    assert not {'torch', 'pandas', 'numpy', 'papermill'} & set(loaded.stdout.split())
    assert stages.__name__ in loaded.stdout


def test_what_a_stage_reads_may_depend_on_its_parameters(tmp_path):
    @stage('numbers')
    def run_numbers(run, out): (out / 'numbers.txt').write_text('1')

    @stage('total', reads=lambda parameters: () if parameters['alone'] else ('numbers',))
    def run_total(run, out, *, alone=False): (out / 'total.txt').write_text('2')

    assert list(json.loads((run_total(tmp_path, alone=True) / 'stage.json').read_text())['inputs']) == []
    with pytest.raises(InputError, match='numbers is missing, and total reads it'): run_total(tmp_path)
    run_numbers(tmp_path)
    assert list(json.loads((run_total(tmp_path) / 'stage.json').read_text())['inputs']) == ['numbers']


def test_a_folder_of_the_users_is_looked_at(tmp_path):
    own = tmp_path / 'own'
    (own / 'images').mkdir(parents=True)
    (own / 'images/a.jpg').write_bytes(b'1')
    (own / 'images/round').symlink_to(own)

    @stage('read', outside=lambda parameters: [Path(f) for f in parameters['folders']])
    def run_read(run, out, *, folders=()):
        (own / 'split.csv').write_text('the stage may write beside the pictures')

    folders = [str(own)]
    run_read(tmp_path / 'run', folders=folders)
    assert run_read.stale(tmp_path / 'run', folders=folders) is None
    assert sorted(listing(own)) == ['images/a.jpg', 'split.csv']
    (own / 'images/.hidden').touch()
    assert run_read.stale(tmp_path / 'run', folders=folders) is None
    assert list(listing(own / 'split.csv').values()) == [listing(own)['split.csv']] and listing(own / 'nothing') == {}
    (own / 'images/b.jpg').touch()
    assert run_read.stale(tmp_path / 'run', folders=folders) == f'{own} changed'


def test_shards_stay_after_a_kill_and_are_shared(tmp_path):
    done = []
    def begin():
        def compute(start, stop):
            done.append((start, stop))
            if len(done) == 2: raise KeyboardInterrupt  # as good as a kill: before the second file has its name
            return np.arange(start, stop)[:, None]
        return compute
    with pytest.raises(KeyboardInterrupt): in_shards(tmp_path, 7, 3, begin, 'rows')
    assert [p.name for p in sorted(tmp_path.glob('*.npy'))] == ['000000000.npy']
    files = in_shards(tmp_path, 7, 3, begin, 'rows')
    assert done == [(0, 3), (3, 6), (3, 6), (6, 7)] and np.concatenate([np.load(f) for f in files])[:, 0].tolist() == [*range(7)]
    in_shards(tmp_path, 7, 3, None, 'rows')  # nothing left: nothing is begun
    for rank in (1, 0): in_shards(tmp_path / 'two', 7, 3, begin, 'rows', rank, 2)
    assert done[4:] == [(3, 6), (0, 3), (6, 7)] and in_shards(tmp_path / 'none', 0, 3, None, 'rows') == []
