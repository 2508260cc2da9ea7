"The check for a GPU: every line of it runs, and without a GPU it says so."
import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_check import CHECKS

FILE = Path(__file__).with_name('gpu_check.py')


def run(*given):
    return subprocess.run([sys.executable, FILE, *given], capture_output=True, text=True, env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})


def test_without_a_gpu_it_says_so():
    said = run()
    assert said.returncode == 3 and 'no GPU' in said.stdout


def test_every_check_runs(tmp_path):
    said = run('--cpu-dry-run', '--out', str(tmp_path / 'gpu.json'))
    rows = json.loads((tmp_path / 'gpu.json').read_text())['rows']
    assert said.returncode == 0 and {row['check'] for row in rows} == {*CHECKS}, said.stderr
    right = [row for row in rows if row['check'] == 'float32' or row['what'].startswith('loss, against')]  # a kill may come too late
    assert len(right) == 5 and all(row['fine'] for row in right)
