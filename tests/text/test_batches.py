import torch
from hypothesis import given
from hypothesis import strategies as st

from e3pruner.text.batches import in_order, shuffled_batch


@given(count=st.integers(1, 20), size=st.integers(1, 9), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_an_epoch_shows_each_sequence_once_however_it_is_cut(count, size, seed, epochs):
    data = torch.arange(count)[:, None].expand(count, 3) * 10
    single = [int(shuffled_batch(data, i, 1, seed).rows) for i in range(count * epochs)]
    for epoch in range(epochs):
        assert sorted(single[epoch * count : (epoch + 1) * count]) == list(range(count))
    cut = torch.cat([shuffled_batch(data, i, size, seed).rows for i in range(0, count * epochs, size)])
    assert cut[: len(single)].tolist() == single
    assert shuffled_batch(data, 0, size, seed).input_ids[:, 0].tolist() == (10 * cut[:size]).tolist()


def test_epochs_and_seeds_differ():
    data = torch.zeros(50, 2)
    orders = [shuffled_batch(data, start, 50, seed).rows.tolist() for start in (0, 50) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_in_order_goes_through_all_of_it_once():
    data = torch.arange(10).view(5, 2)
    batches = list(in_order(data, 2))
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), data)
    assert [len(batch.rows) for batch in batches] == [2, 2, 1]
    assert torch.equal(batches[1].labels, data[2:4, 1:])
