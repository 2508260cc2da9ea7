"reproduce.sh with a stand-in for Python: nothing is installed, and every message is seen."
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = 'bash dirname cat df awk mkdir rm cp cksum cut sleep tail grep mktemp diff chmod env'.split()
PYTHON = '''#!/usr/bin/env bash
# a Python that notes what it is asked and does as FAKE_… say
echo "$*" >>"$FAKE_LOG"
case "$*" in
  *version_info*) [ "${FAKE_VERSION:-3.11.7}" != 3.9.1 ] ;;
  *python_version*) echo "${FAKE_VERSION:-3.11.7}" ;;
  *sys.prefix*) echo "$FAKE_PREFIX" ;;
  '-m venv'*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  '-m pip install'*) echo "${FAKE_PIP:-}"; sleep "${FAKE_SLOW:-0}"; [ -z "${FAKE_PIP:-}" ] ;;
  '-m pacl.app.pipeline'*) pwd; exit "${FAKE_EXIT:-0}" ;;
  '-m pytest'*) echo '1 passed in 0.01s'; exit "${FAKE_PYTEST:-0}" ;;
esac
'''


class Clone:
    "A copy of the repository's frame in a path with spaces, and a PATH that holds only what a bare machine has."
    def __init__(self, tmp):
        self.folder, self.path, self.log = tmp / 'a path with spaces/pacl', tmp / 'bin', tmp / 'log'
        for folder in (self.folder / 'nbs', self.folder / 'pacl', self.path): folder.mkdir(parents=True)
        for name in ('reproduce.sh', 'pyproject.toml', 'constraints.txt', 'settings.ini'): shutil.copy(ROOT / name, self.folder)
        for tool in TOOLS: (self.path / tool).symlink_to(shutil.which(tool))
        self.tool('python3', PYTHON)
        self.tool('df', '#!/usr/bin/env bash\necho; echo "disk 1 1 ${FAKE_FREE:-99000000} 1% /"\n')

    def tool(self, name, text):
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def environment(self, **variables):
        return {'PATH': str(self.path), 'FAKE_LOG': str(self.log), 'HOME': str(self.folder), **variables}

    def run(self, *arguments, cwd='/', **variables):
        self.log.write_text('')
        return subprocess.run([self.folder / 'reproduce.sh', *arguments], cwd=cwd, capture_output=True, text=True,
                              env=self.environment(**variables))

    def asked(self, what): return [line for line in self.log.read_text().splitlines() if what in line]


@pytest.fixture
def clone(tmp_path): return Clone(tmp_path)


def test_help_needs_no_python(clone):
    (clone.path / 'python3').unlink()
    run = clone.run('--help')
    assert run.returncode == 0 and all(words in run.stdout for words in ('reproduce.sh test', 'PACL_ENV=active', '--data ROOT --dry-run'))


def test_first_run_sets_up_and_the_second_does_not(clone):
    first = clone.run(cwd=clone.path)
    assert first.returncode == 0, first.stderr
    assert clone.asked('-m venv') == [f'-m venv --clear {clone.folder}/.venv']
    install, = clone.asked('pip install')  # one call for all
    assert install.endswith(f'-c {clone.folder}/constraints.txt -e {clone.folder}[reproduce,onnx,dev]')
    assert clone.asked('pacl.app.pipeline') == ['-m pacl.app.pipeline']
    assert first.stdout.splitlines()[-1] == str(clone.path)  # runs where the user is
    second = clone.run()
    assert second.returncode == 0 and not clone.asked('venv') and not clone.asked('pip install')
    assert 'set up' not in second.stdout


def test_set_up_again_when_it_is_out_of_date(clone):
    assert clone.run('setup').returncode == 0
    project = clone.folder / 'constraints.txt'
    before = project.read_text()
    project.write_text('torch==2.6.0\n')  # other versions
    assert clone.run('setup', FAKE_PIP='killed').returncode == 1 and not clone.asked('-m venv')
    project.write_text(before)  # and yet what is installed may be half of the other
    assert clone.run('setup').returncode == 0 and clone.asked('pip install')
    clone.folder = clone.folder.rename(clone.folder.with_name('moved'))
    assert clone.run('setup').returncode == 0 and clone.asked('pip install')
    (clone.folder / '.venv/bin/python').unlink()
    assert clone.run('setup').returncode == 0 and clone.asked('-m venv')


@pytest.mark.parametrize('arguments, offline, code', [
    (('demo', 'threshold=0.6', 'text=two words'), '1', 0), (('smoke',), '1', 1), (('seed=1',), '1', 0), (('--runs', '/x y'), '', 0),
    (('tumemo', '--data', '/my data', 'backbone=vit_base', '--dry-run'), '', 2)])
def test_what_reaches_the_pipeline_and_what_comes_back(clone, arguments, offline, code):
    clone.tool('python3', PYTHON.replace('pwd;', 'echo "offline $HF_HUB_OFFLINE";'))
    run = clone.run(*arguments, FAKE_EXIT=str(code))
    assert run.returncode == code and run.stdout.splitlines()[-1] == f'offline {offline}'
    assert clone.asked('pacl.app.pipeline') == [' '.join(('-m pacl.app.pipeline', *arguments))]


def test_python_is_missing_or_too_old(clone):
    run = clone.run(FAKE_VERSION='3.9.1')
    assert run.returncode == 1 and 'Python 3.11 or later is needed, and python3 is 3.9.1. Install one' in run.stderr
    assert not clone.asked('-m venv')
    (clone.path / 'python3').unlink()
    run = clone.run()
    assert re.fullmatch(r'Python 3.11 or later is needed, and there is no python3\. Install one .*PYTHON=.*\n', run.stderr)
    assert 'there is no /x y/python' in clone.run(PYTHON='/x y/python').stderr


def test_a_newer_python_beside_an_old_one_is_found(clone):
    (clone.path / 'python3.12').write_text((clone.path / 'python3').read_text())
    (clone.path / 'python3.12').chmod(0o755)
    clone.tool('python3', '#!/usr/bin/env bash\nexit 1\n')
    run = clone.run('setup')
    assert run.returncode == 0 and f'Making an environment with {clone.path}/python3.12 in ' in run.stdout


@pytest.mark.parametrize('said, message', [
    ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'", 'pip cannot reach its package index'),
    ('Could not fetch URL: Temporary failure in name resolution', 'HTTPS_PROXY'),
    ('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device', 'The disk is full'),
    ('ERROR: No matching distribution found for torch==2.14.1', 'No matching distribution found for torch==2.14.1\npip could not install'),
])
def test_pip_fails(clone, said, message):
    run = clone.run(FAKE_PIP=said)
    assert run.returncode == 1 and message in run.stderr and not clone.asked('pacl.app.pipeline')
    if 'All that' in run.stderr: assert said in Path(run.stderr.strip().split('said: ')[-1]).read_text()
    assert clone.run('setup').returncode == 0  # nothing is taken for done


def test_too_little_space(clone):
    run = clone.run(FAKE_FREE='3100000')
    assert run.returncode == 1 and re.search(r'needs 8 GB, and .*/.venv has 3 GB.\nFree some space, or .*PACL_VENV', run.stderr)
    assert not clone.asked('-m venv')


def test_an_environment_elsewhere(clone, tmp_path):
    assert clone.run('setup', PACL_VENV='there', cwd=tmp_path).returncode == 0
    assert (tmp_path / 'there/bin/python').exists() and not (clone.folder / '.venv').exists()
    (tmp_path / 'file').touch()
    run = clone.run('setup', PACL_VENV=str(tmp_path / 'file/there'))
    assert run.returncode == 1 and 'a folder that you may write' in run.stderr


def test_the_active_environment(clone, tmp_path):
    (tmp_path / 'conda').mkdir()
    for asked in (1, 0):
        run = clone.run(PACL_ENV='active', FAKE_PREFIX=str(tmp_path / 'conda'))
        assert run.returncode == 0 and len(clone.asked('pip install')) == asked
        assert not clone.asked('-m venv') and not (clone.folder / '.venv').exists()


def test_ctrl_c_ends_pip(clone):
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & is deaf to Ctrl-C, and so are its children
    environment = clone.environment(FAKE_SLOW='600')
    run = subprocess.Popen([clone.folder / 'reproduce.sh', 'setup'], env=environment, start_new_session=True, preexec_fn=heed)
    while not (clone.log.exists() and clone.asked('pip install')): time.sleep(.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(20) == 130
    with contextlib.suppress(ProcessLookupError): os.killpg(run.pid, signal.SIGKILL)  # the stand-in's own sleep
    assert not (clone.folder / '.venv/.pacl').exists()


@pytest.mark.parametrize('fails', [None, 'ruff', 'nbdev_export', 'pytest', 'smoke profile'])
def test_test_goes_on_after_a_failure_and_names_it(clone, fails):
    for name in ('ruff', 'nbdev_export', 'nbdev_clean', 'nbdev_test'):
        clone.tool(name, f'#!/usr/bin/env bash\necho "{name} $*" >>"$FAKE_LOG"\nexit {int(name == fails == "ruff")}\n')
    if fails == 'nbdev_export': clone.tool(fails, f'#!/usr/bin/env bash\necho {fails} >>"$FAKE_LOG"\necho changed >pacl/new.py\n')
    run = clone.run('test', FAKE_PYTEST=str(int(fails == 'pytest')), FAKE_EXIT=str(int(fails == 'smoke profile')))
    checks = ['-m pip check', 'ruff check .', 'nbdev_export', 'nbdev_clean', 'nbdev_test --n_workers 2',
              '-m pacl.app.pipeline smoke', '-m pytest']
    assert [' '.join(line.split()[:3]) for line in clone.log.read_text().splitlines()][-7:] == checks
    assert run.stdout.endswith('1 passed in 0.01s\n')
    if fails:
        assert run.returncode == 1 and re.fullmatch(rf'FAILED: {fails}( changes nothing)?', run.stderr.splitlines()[-1])
        assert not (clone.folder / 'pacl/new.py').exists()
    else: assert run.returncode == 0 and not run.stderr


def test_bash_of_2007():
    "macOS has bash 3.2: none of what came later."
    text = (ROOT / 'reproduce.sh').read_text() + (ROOT / '.ci/run').read_text()
    for later in (r'declare -A', r'local -n', r'\$\{\w+(,,|\^\^|@)', r'mapfile|readarray', r'&>>', r'\|&', r'wait -n', r'\$\{\w+\[@'):
        assert not re.search(later, text), later
    for name in ('reproduce.sh', '.ci/run'):
        assert subprocess.run(['bash', '-n', ROOT / name]).returncode == 0 and os.access(ROOT / name, os.X_OK)
