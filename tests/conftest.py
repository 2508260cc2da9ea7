"What several test files share."
import pytest
import torch
from hypothesis import settings

settings.register_profile('calm', deadline=None)  # a busy machine is no failure
settings.load_profile('calm')


@pytest.fixture(scope='module')
def one_thread():
    "For the whole file: `pytestmark = pytest.mark.usefixtures('one_thread')`."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
