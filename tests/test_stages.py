"Stage folders: whole or not there, current or made again, and said why."
import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pacl.parts.stages import InputError, in_shards, is_litter, keep, kept_folder, link, listing, read_record, stage

TOY = '''
from pathlib import Path
from pacl.parts.stages import stage
from toy.maths import double

@stage('numbers', code=('toy.maths',))
def run_numbers(run: Path, out: Path, *, n: int = 3, noise: int = 0) -> dict:
    (out / 'deep').mkdir()
    (out / 'deep/numbers.txt').write_text(' '.join(str(double(i)) for i in range(n)))
    return {'n': n}

@stage('total', reads=lambda parameters: () if parameters['alone'] else ('numbers',))
def run_total(run: Path, out: Path, *, scale: float = 1., seeds: tuple = (0, 1), alone: bool = False) -> dict:
    numbers = '1' if alone else (run / 'numbers/deep/numbers.txt').read_text()
    (out / 'total.txt').write_text(str(scale * sum(map(int, numbers.split()))))
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
    for name in [name for name in sys.modules if name.startswith('toy')]:
        monkeypatch.delitem(sys.modules, name)
    import toy.toys
    toy.toys.run = tmp_path / 'runs/demo'
    toy.toys.maths = package / 'maths.py'
    return toy.toys


def test_stage_json_says_what_the_folder_was_made_from(toy):
    toy.run_numbers(toy.run)
    record = read_record(toy.run_total(toy.run, scale=2.))
    assert record['parameters'] == {'scale': 2., 'seeds': [0, 1], 'alone': False}
    assert [*record['inputs'], *record['outputs'], *record['code']] == ['numbers', 'total.txt', 'toy.toys']


def test_every_reason_is_said(toy):
    numbers = toy.run_numbers(toy.run)
    total = toy.run_total(toy.run)
    before = total.stat().st_ino
    assert toy.run_total.stale(toy.run) is None and toy.run_total(toy.run) == total and total.stat().st_ino == before
    assert toy.run_total.stale(toy.run, scale=.5) == 'scale was 1.0, is 0.5'
    assert toy.run_numbers.stale(toy.run, n=9, noise=9) == 'n was 3, is 9; noise was 0, is 9'
    (total / 'notes.txt').write_text('mine')
    assert toy.run_total.stale(toy.run) == 'notes.txt is not as the stage left it'
    (total / 'notes.txt').rename(total / 'Thumbs.db')
    assert toy.run_total.stale(toy.run) is None
    (numbers / 'deep/numbers.txt').write_text('1 2 3 4 5')
    assert toy.run_total.stale(toy.run) == 'numbers changed'
    assert toy.run_numbers.stale(toy.run) == 'deep/numbers.txt is not as the stage left it'
    toy.run_numbers(toy.run, noise=1)
    assert toy.run_total.stale(toy.run) is None  # upstream wrote equal bytes
    (total / 'stage.json').write_text('{"stage": ')
    assert toy.run_total.stale(toy.run) == 'never ran'


def test_code_is_compared_and_comments_are_not(toy):
    toy.run_numbers(toy.run)
    toy.maths.write_text('# twice\n' + toy.maths.read_text())
    assert toy.run_numbers.stale(toy.run) is None
    toy.maths.write_text('def double(i): return 3 * i\n')
    assert toy.run_numbers.stale(toy.run) == 'toy.maths changed'
    toy.maths.unlink()
    assert toy.run_numbers.stale(toy.run) == 'toy.maths changed'


def test_bad_calls(toy):
    with pytest.raises(InputError, match='numbers is missing, and total reads it.*reproduce.sh demo'):
        toy.run_total(toy.run)
    assert not (toy.run / 'total').exists()
    toy.run_total(toy.run, alone=True)  # what is read may depend on a parameter
    with pytest.raises(TypeError, match='scael'):
        toy.run_total(toy.run, alone=True, scael=1)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    @stage('here')
    def run_here(run, out, *, fail=False):
        (out / 'x').write_text('half' if fail else 'whole')
        if fail: raise error
    run_here(tmp_path)
    with pytest.raises(error): run_here(tmp_path, fail=True)
    assert (tmp_path / 'here/x').read_text() == 'whole' and run_here.stale(tmp_path) is None
    assert os.listdir(tmp_path) == ['here']


KILLED = '''
import os, signal, sys
from pathlib import Path
from pacl.parts import stages
from toy.toys import run_numbers
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
moment, steps, rename = sys.argv[1], iter(range(9)), Path.rename
if moment == 'filling': stages.file_hashes = die
if moment == 'clearing': stages.shutil.rmtree = lambda path, **_: die() if Path(path).exists() else None
def rename_or_die(self, target):
    rename(self, target)
    if moment == f'rename {next(steps)}': die()
Path.rename = rename_or_die
run_numbers(sys.argv[2], n=7)
'''


@pytest.mark.parametrize('old, moment, left', [
    (3, 'filling', 3), (3, 'rename 0', None), (3, 'rename 1', 7), (3, 'clearing', 7), (None, 'filling', None), (None, 'rename 0', 7)])
def test_kill_9_leaves_nothing_half_written(toy, old, moment, left):
    "And the next run ends with what an undisturbed one would have written, and nothing beside it."
    if old:
        toy.run_numbers(toy.run, n=old)
    killed = subprocess.run([sys.executable, '-c', KILLED, moment, str(toy.run)], env={'PYTHONPATH': ':'.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert toy.run_numbers.stale(toy.run, n=left or 7) == (None if left else 'never ran')
    folder = toy.run_numbers(toy.run, n=7)
    assert toy.run_numbers.stale(toy.run, n=7) is None
    assert (folder / 'deep/numbers.txt').read_text() == '0 2 4 6 8 10 12'
    toy.run_numbers(toy.run, n=8)
    assert os.listdir(toy.run) == ['numbers']


def test_an_output_folder_that_cannot_be_written(toy):
    toy.run.parent.mkdir(parents=True)
    toy.run.write_text('a file where the run wants its folder')
    with pytest.raises(InputError, match=f'{toy.run}.*: not a directory.*--runs'):
        toy.run_numbers(toy.run)


@pytest.mark.parametrize('error, message', [
    (PermissionError(errno.EACCES, 'Permission denied'), 'permission denied. Mend that, or .*--runs'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'no space left on device. Mend that'),
    (OSError(errno.ENOLCK, 'No locks available'), 'no locks available. Mend that'),  # of some network drives
    (OSError('999 requested and 12 written'), 'no space left'),  # ndarray.tofile: no errno
    (RuntimeError('Error while serializing'), 'no space left'),  # safetensors: nor an OSError at all
])
def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch, error, message):
    @stage('here')
    def run_here(run, out, *, n=0):
        if n: raise error
    run_here(tmp_path)
    if not getattr(error, 'errno', None):
        with pytest.raises(type(error)): run_here(tmp_path, n=1)  # with space, it is the code's own
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(InputError, match=f'here: {message}'): run_here(tmp_path, n=1)
    assert run_here.stale(tmp_path) is None and os.listdir(tmp_path) == ['here']


def test_what_cannot_be_linked_is_copied(tmp_path, monkeypatch):
    (tmp_path / 'old').write_text('kept')
    link(tmp_path / 'old', tmp_path / 'same')
    monkeypatch.setattr(os, 'link', lambda *paths: os.rename('', ''))  # as from one disk to another: OSError
    link(tmp_path / 'old', tmp_path / 'new')
    assert (tmp_path / 'same').samefile(tmp_path / 'old') and not (tmp_path / 'new').samefile(tmp_path / 'old')
    assert (tmp_path / 'new').read_text() == 'kept'


def test_a_stage_folder_that_is_a_link_stays_one(toy):
    disk = toy.run.parent / 'disk/numbers'
    disk.mkdir(parents=True)
    toy.run.mkdir()
    (toy.run / 'numbers').symlink_to(disk)
    for n in (2, 3): toy.run_numbers(toy.run, n=n)
    assert (toy.run / 'numbers').is_symlink() and (disk / 'deep/numbers.txt').read_text() == '0 2 4'
    assert toy.run_numbers.stale(toy.run) is None and os.listdir(disk.parent) == ['numbers']


def test_a_folder_of_the_users_is_looked_at(tmp_path):
    own = tmp_path / 'own'
    (own / 'images').mkdir(parents=True)
    (own / 'images/a.jpg').write_bytes(b'1')
    (own / 'images/lost').symlink_to(own / 'nowhere')

    @stage('read', outside=lambda parameters: map(Path, parameters['folders']))
    def run_read(run, out, *, folders=()):
        (own / 'split.csv').write_text('the stage may write beside the pictures')

    def reason():
        return run_read.stale(tmp_path / 'run', folders=[str(own)])
    run_read(tmp_path / 'run', folders=[str(own)])
    assert reason() is None
    assert sorted(listing(own)) == ['images/a.jpg', 'split.csv']
    for name in ('.hidden', '.DS_Store', 'Thumbs.db', '@eaDir', '__MACOSX'):
        assert is_litter(name)
        (own / 'images' / name).mkdir()
        (own / 'images' / name / 'x.jpg').touch()
    assert reason() is None
    (own / 'images/b.jpg').touch()
    assert reason() == f'{own} changed'


def test_shards_stay_after_a_kill(tmp_path):
    done = []

    def compute(start, stop):
        done.append(start)
        return np.arange(start, stop) if len(done) != 2 else 1 / 0  # as good as a kill
    with pytest.raises(ZeroDivisionError): in_shards(tmp_path, 7, 3, compute, 'rows')
    files = in_shards(tmp_path, 7, 3, compute, 'rows')
    assert done == [0, 3, 3, 6] and np.concatenate([np.load(f) for f in files]).tolist() == [*range(7)]
    in_shards(tmp_path, 7, 3, None, 'rows')  # nothing is left
    assert in_shards(tmp_path / 'none', 0, 3, None, 'rows') == []


def test_pieces_are_kept_until_they_would_be_others(tmp_path):
    folder = kept_folder(tmp_path, 'models', [], [], {'lr': 1})
    with pytest.raises(ZeroDivisionError): keep(folder / 'a', lambda part: part.write_text(str(1 / 0)))
    assert keep(folder / 'a', lambda part: part.write_text('whole')).read_text() == 'whole'
    assert keep(kept_folder(tmp_path, 'models', [], [], {'lr': 1}) / 'a', None).exists()  # it is not made again
    kept_folder(tmp_path, 'results', [], [], {})
    assert folder.exists()
    kept_folder(tmp_path, 'models', [], [], {'lr': 2})
    assert not folder.exists()


def test_pieces_depend_on_what_is_read_and_on_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'data').mkdir()
    folders = set()
    for file in ('data/a.txt', 'piece_maker.py', 'piece_maker.yaml', 'data/b.txt'):
        (tmp_path / file).write_text('1')
        importlib.invalidate_caches()
        folders |= {kept_folder(tmp_path, 'models', ['data'], ['piece_maker'], {}) for _ in range(2)}
    assert len(folders) == 4
