import pytest
import torch


@pytest.fixture
def one_thread():
    """Threads that meet every few microseconds crawl on a busy machine; the test that needs several asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
