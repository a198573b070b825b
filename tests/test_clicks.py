"""Clicks: every container and dtype gives the same canonical matrix; bad input is named by row and index."""

import io
import json
import multiprocessing.reduction
import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import Labelled, run_child
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvae import Clicks, reference, sparse_linear
from fastvae.clicks import gather_rows

DENSE = np.array([[0, 2, 0, 1], [0, 0, 0, 0], [3, 0, 0, 0]])


def assert_is(clicks, dense):
    """clicks is canonical and equals dense."""
    assert clicks.shape == dense.shape
    assert clicks.indptr.dtype == torch.int64 and clicks.indices.dtype == torch.int32
    assert clicks.values is None or clicks.values.dtype == torch.float32
    np.testing.assert_array_equal(clicks.to_dense().numpy(), dense)
    for u in range(clicks.n_users):
        row = clicks.indices[clicks.indptr[u] : clicks.indptr[u + 1]].tolist()
        assert row == sorted(set(row)), "sorted, no duplicates"
    assert clicks.nnz == np.count_nonzero(dense), "no stored zeros"


CONTAINERS = {
    "csr_matrix": sp.csr_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "coo_array": sp.coo_array,
    "lil_array": sp.lil_array,
    "dok_array": sp.dok_array,
    "dia_array": sp.dia_array,
    "bsr_array": lambda d: sp.bsr_array(d, blocksize=(3, 2)),
    "numpy": np.asarray,
    "torch-dense": torch.from_numpy,
    "torch-csr": lambda d: torch.from_numpy(d).to_sparse_csr(),
    "torch-csc": lambda d: torch.from_numpy(d).to_sparse_csc(),
    "torch-coo": lambda d: torch.from_numpy(d).to_sparse(),
    "torch-bsr": lambda d: torch.from_numpy(d).to_sparse_bsr((1, 2)),
    "torch-bsc": lambda d: torch.from_numpy(d).to_sparse_bsc((3, 2)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.float64, np.float32, np.bool_])
@pytest.mark.filterwarnings("ignore:Sparse [CB]S[RC] tensor support:UserWarning")
def test_every_container_gives_the_same_clicks(container, dtype):
    dense = DENSE.astype(dtype)
    assert_is(Clicks.from_matrix(CONTAINERS[container](dense)), dense.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(dtype):
    assert_is(Clicks.from_matrix(torch.from_numpy(DENSE).to(dtype)), DENSE)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1", "u1", "i8", "?"])
def test_index_and_value_dtypes(index_dtype, dtype):
    csr = sp.csr_array(DENSE)
    values = csr.data.astype(dtype)
    clicks = Clicks(csr.indptr.astype(index_dtype), csr.indices.astype(index_dtype), values, 4)
    expected = sp.csr_array((values.astype(np.float32), csr.indices, csr.indptr), DENSE.shape)
    assert_is(clicks, expected.toarray())


@pytest.mark.parametrize("indptr_dtype", ["i4", "i8"])
@pytest.mark.parametrize("indices_dtype", ["i4", "i8"])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1", "u1", "i8", "?"])
def test_the_first_layer_is_the_same_for_every_mix_of_dtypes(indptr_dtype, indices_dtype, dtype):
    csr = sp.csr_array(DENSE if dtype != "?" else DENSE > 0)
    csr.indptr, csr.indices = csr.indptr.astype(indptr_dtype), csr.indices.astype(indices_dtype)
    data = csr.data.astype(dtype)
    every = [Clicks(csr.indptr, csr.indices, data, 4)]
    if dtype != "f2":  # scipy has no sparse fp16
        every.append(Clicks.from_matrix(sp.csr_array((data, csr.indices, csr.indptr), csr.shape)))
    weight = torch.arange(12.0).reshape(3, 4) / 10
    expected = reference.sparse_linear(torch.from_numpy(csr.toarray()).float(), weight)
    for clicks in every:
        torch.testing.assert_close(sparse_linear(clicks, weight), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1e-12, 1e12])
def test_values_at_the_ends_of_their_range_keep_the_rows_norm(value):
    clicks = Clicks([0, 3], [0, 1, 4], [value, value, 0.5 * value + 0.5e-12], n_items=5)
    y = sparse_linear(clicks, torch.eye(5), tanh=False)
    x = clicks.to_dense().double()
    torch.testing.assert_close(y, (x / x.norm()).float())


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float16, torch.bool]
)
def test_rare_dtypes_of_tensors(dtype):
    assert_is(Clicks.from_matrix(torch.from_numpy(DENSE > 0).to(dtype)), DENSE > 0)


def test_numpy_half_precision():
    assert_is(Clicks.from_matrix(DENSE.astype(np.float16)), DENSE)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int64"])
def test_rows_of_every_integer_dtype(dtype):
    chosen = Clicks.from_matrix(DENSE).rows(np.array([2, 0], dtype))
    assert_is(chosen, DENSE[[2, 0]])


def test_choosing_one_row_stays_two_dimensional():
    row = Clicks.from_matrix(DENSE).rows([2])
    assert row.shape == (1, 4) and row.to_dense().tolist() == [[3.0, 0.0, 0.0, 0.0]]
    assert row.to_scipy().shape == (1, 4) and row.compact().shape == (1, 4)


def test_rows_through_a_data_loader_are_the_same_with_and_without_workers():
    clicks = Clicks(np.arange(201) * 3, np.tile([1, 4, 7], 200), n_items=9)

    def batches(n_workers):
        # what travels between processes are row ids; the clicks stay where they are
        loader = torch.utils.data.DataLoader(
            range(200),
            batch_size=64,
            num_workers=n_workers,
            multiprocessing_context="fork" if n_workers else None,
        )
        return [(ids.tolist(), clicks.rows(ids).to_dense()) for ids in loader]

    alone, together = batches(0), batches(2)
    assert [ids for ids, _ in alone] == [ids for ids, _ in together]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, together, strict=True))


def test_clicks_travel_to_another_process():
    clicks = Clicks.from_matrix(DENSE).rows([2, 0])
    buffer = io.BytesIO()
    multiprocessing.reduction.ForkingPickler(buffer).dump(clicks)
    other = multiprocessing.reduction.ForkingPickler.loads(buffer.getbuffer())
    assert torch.equal(other.to_dense(), clicks.to_dense()) and other.n_items == 4


def test_a_hundred_thousand_users_are_chosen_within_a_second():
    clicks = Clicks(np.arange(10_001) * 50, np.tile(np.arange(50), 10_000), n_items=50)
    started = time.perf_counter()
    for _ in range(10):
        clicks.rows(
            torch.randperm(10_000)
        ).compact()  # a copy of the clicks, which the ops do not even need
    # 100,000 users; the limit is ten times what two cores take
    assert time.perf_counter() - started < 1


def test_sums_of_small_integers_do_not_wrap():
    one = np.ones(300, np.int8)
    clicks = Clicks([0, 300], np.zeros(300, np.int64), one, n_items=2)
    assert clicks.values.tolist() == [300.0]
    # u8: 16 * 16 wraps to 0 where squares are taken in the stored dtype
    clicks = Clicks.from_matrix(sp.csr_array(np.full((1, 1), 16, np.uint8)))
    assert clicks.values.square().sum() == 256


def test_unsorted_rows_duplicates_and_explicit_zeros():
    clicks = Clicks([0, 4, 4, 6], [3, 1, 3, 0, 2, 2], [1.0, 2.0, 1.0, 0.0, 0.0, 0.0], n_items=5)
    assert_is(clicks, np.array([[0, 2, 0, 2, 0], [0] * 5, [0] * 5]))
    clicks = Clicks([0, 2], [0, 1], [0.0, 1.0], n_items=3)
    assert clicks.nnz == 1 and clicks.values is None


def test_pairs_are_binary_unless_counts_are_asked_for():
    users, items = [0, 0, 0], [0, 0, 1]
    assert_is(Clicks.from_pairs(users, items), np.array([[1, 1]]))
    assert_is(Clicks.from_pairs(users, items, counts=True), np.array([[2, 1]]))


def test_all_ones_store_no_values():
    assert Clicks.from_matrix(DENSE > 0).values is None
    assert Clicks.from_matrix(DENSE).values is not None


@pytest.mark.parametrize(
    "clicks",
    [
        pytest.param(Clicks([0], [], n_items=4), id="no-users"),
        pytest.param(Clicks([0, 0, 0], [], n_items=4), id="no-clicks"),
        pytest.param(Clicks([0, 0], [], n_items=0), id="no-items"),
    ],
)
def test_empty(clicks):
    assert clicks.nnz == 0 and clicks.to_dense().shape == clicks.shape
    assert clicks.rows([]).n_users == 0
    assert clicks.transpose().shape == clicks.shape[::-1]
    assert clicks.row_sums().tolist() == [0.0] * clicks.n_users


def test_what_is_derived_from_chosen_rows_is_of_those_rows():
    chosen = Clicks.from_matrix(DENSE).rows([2, 0, 0])
    assert_is(chosen.binary(), DENSE[[2, 0, 0]] > 0)
    assert chosen.fingerprint() == Clicks.from_matrix(DENSE[[2, 0, 0]]).fingerprint()


def test_the_fingerprint_is_of_pattern_values_and_shape():
    same = [
        Clicks([0, 2, 2], [0, 2], [2, 3], n_items=4), Clicks([0, 2, 2], [0, 2], [2, 4], n_items=4),
        Clicks([0, 2, 2], [0, 2], n_items=4), Clicks([0, 2, 2], [0, 2], n_items=5),
        Clicks([0, 2], [0, 2], n_items=4), Clicks([0, 2, 2], [0, 3], n_items=4),
    ]  # fmt: skip
    assert len({clicks.fingerprint() for clicks in same}) == len(same)


@pytest.mark.parametrize("values", [None, [2, 3]])
def test_the_scipy_matrix_has_memory_of_its_own(values):
    clicks = Clicks([0, 2], [0, 2], values, n_items=4)
    before, matrix = clicks.fingerprint(), clicks.to_scipy()
    matrix.data[:], matrix.indices[:], matrix.indptr[:] = 9, 1, 0
    assert clicks.fingerprint() == before


def test_duplicates_of_large_counts_in_a_tensor_are_summed_exactly():
    many = torch.sparse_coo_tensor(
        [[0] * 4, [1] * 4], [2.0**24, 1, 1, 2], (1, 2), check_invariants=True
    )
    assert Clicks.from_matrix(many).values.item() == 2**24 + 4


def test_rows_share_memory_and_compose():
    clicks = Clicks.from_matrix(DENSE)
    view = clicks.rows([2, 0, 2])
    assert view.indices is clicks.indices
    np.testing.assert_array_equal(view.to_dense(), DENSE[[2, 0, 2]])
    np.testing.assert_array_equal(view.rows(torch.tensor([1, 1])).to_dense(), DENSE[[0, 0]])
    assert view.row_sums().tolist() == [3.0, 3.0, 3.0] and view.nnz == 4 and len(view) == 3
    np.testing.assert_array_equal(view.transpose().to_dense(), DENSE[[2, 0, 2]].T)
    assert (view.to_scipy() != sp.csr_array(DENSE[[2, 0, 2]])).nnz == 0
    assert view.compact().row_ids is None and clicks.compact() is clicks


def test_gather_rows_gives_positions_in_the_whole_matrix():
    clicks = Clicks.from_matrix(DENSE)
    offsets, position = gather_rows(clicks.indptr, torch.tensor([2, 1, 0]))
    assert offsets.tolist() == [0, 1, 1, 3] and position.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], [5], None, 5), ValueError, "Clicks: indices must lie in [0, 5), got 5 at row 0, position 0"),
        (([0, 1, 2], [0, -1], None, 5), ValueError, "Clicks: indices must lie in [0, 5), got -1 at row 1, position 1"),
        (([0, 2, 1], [0], None, 5), ValueError, "Clicks: indptr must not decrease, got 2 then 1 at row 1"),
        (([1, 1], [0], None, 5), ValueError, "Clicks: indptr must start with 0, got [1]"),
        (([], [], None, 5), ValueError, "Clicks: indptr must start with 0, got []"),
        (([0, 2], [0], None, 5), ValueError, "Clicks: indptr must end with the number of indices 1, got 2"),
        (([0, 1], [0.5], None, 5), TypeError, "Clicks: indices must be integers, got float64"),
        (([[0, 1]], [0], None, 5), ValueError, "Clicks: indptr must have 1 dimension, got 2"),
        (([0, 1], [0], [1.0, 2.0], 5), ValueError, "Clicks: values must have shape [1], got [2]"),
        (([0, 0, 1], [3], [float("nan")], 5), ValueError,
         "Clicks: values must be finite, got nan at row 1, position 0"),
        (([0, 1], [3], [-1.0], 5), ValueError, "Clicks: values must not be negative, got -1.0 at row 0, position 0"),
        (([0, 1], [3], [1e39], 5), ValueError,
         "Clicks: values must be 0 or lie in [1e-12, 1e+12], got 1e+39 at row 0, position 0"),
        (([0, 2], [1, 3], [1.0, 1e-13], 5), ValueError,
         "Clicks: values must be 0 or lie in [1e-12, 1e+12], got 1e-13 at row 0, position 1"),
        (([0, 1], [3], ["a"], 5), TypeError, "Clicks: values must be real numbers, got <U1"),
        (([0, 0], [], None, 2**31), ValueError,
         "Clicks: n_items must lie in [0, 2**31), got 2147483648; number the items from 0 without gaps"),
    ],
)  # fmt: skip
def test_bad_arrays_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        Clicks(*arguments)
    assert str(caught.value) == message


def test_bad_containers_rows_and_pairs_are_named():
    cases = [
        (lambda: Clicks.from_matrix([[1, 0]]), TypeError,
         "Clicks: x must be a scipy sparse matrix, a torch tensor (dense, CSR or COO), a 2-D numpy array or "
         "Clicks, got list"),
        (lambda: Clicks.from_matrix(np.ones(3)), TypeError, "got ndarray of 1 dimensions"),
        (lambda: Clicks.from_matrix(sp.coo_array(np.ones(3))), TypeError, "got coo_array of 1 dimensions"),
        (lambda: Clicks.from_matrix(np.ma.masked_array(DENSE, DENSE == 2)), TypeError,
         "got MaskedArray of 2 dimensions"),
        (lambda: Clicks.from_matrix(DENSE.astype(object)), TypeError,
         "Clicks: values must be real numbers, got object"),
        (lambda: Clicks.from_matrix(torch.ones(2, 2, dtype=torch.complex64)), TypeError,
         "Clicks: values must be real numbers, got complex64"),
        (lambda: Clicks.from_matrix(
            torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (2, 2), check_invariants=True)), ValueError,
         "Clicks: x must hold numbers, got vectors of shape [2]"),
        (lambda: Clicks([0, 3], [0, 0, 0], [1e12] * 3, 2), ValueError,
         "Clicks: values must be 0 or lie in [1e-12, 1e+12], got 3000000000000.0 at row 0, position 0"),
        (lambda: Clicks.from_matrix(DENSE).to(torch.float32), TypeError,
         "Clicks: device must be a torch device such as 'cuda', got torch.float32"),
        (lambda: Clicks.from_matrix(DENSE).to("gpu"), TypeError,
         "Clicks: device must be a torch device such as 'cuda', got 'gpu'"),
        (lambda: Clicks.from_matrix(torch.ones(3)), ValueError, "Clicks: x must have 2 dimensions, got 1"),
        (lambda: Clicks.from_matrix(DENSE).rows([0, 3]), ValueError, "Clicks: rows must lie in [0, 3), got 3"),
        (lambda: Clicks.from_matrix(DENSE).rows([-1]), ValueError, "Clicks: rows must lie in [0, 3), got -1"),
        (lambda: Clicks.from_matrix(DENSE).rows([0.0]), TypeError, "Clicks: rows must be integers, got float64"),
        (lambda: Clicks.from_matrix(DENSE).rows([[0]]), ValueError, "Clicks: rows must have 1 dimension, got 2"),
        (lambda: Clicks.from_pairs([0], [0, 1]), ValueError, "must be equally long, got 1 and 2"),
        (lambda: Clicks.from_pairs([4], [0], n_users=3), ValueError, "Clicks: users must lie in [0, 3), got 4"),
        (lambda: Clicks.from_pairs([0], [4], n_items=3), ValueError,
         "Clicks: items must lie in [0, 3), got 4 at position 0"),
        (lambda: Clicks.from_pairs([0], [-1]), ValueError, "Clicks: items must lie in [0, 1), got -1 at position 0"),
        (lambda: Clicks.from_pairs([-1], [0]), ValueError, "Clicks: users must lie in [0, 1), got -1"),
        (lambda: Clicks.from_pairs([10**15], [0]), ValueError,
         "Clicks: n_users must lie in [0, 2**31), got 1000000000000001; number the users from 0 without gaps"),
        (lambda: Clicks.from_pairs(np.array([2**63], np.uint64), [0]), ValueError,
         "Clicks: users must lie below 2**63, got 9223372036854775808"),
        (lambda: Clicks.from_pairs([0], [0], n_items=2.5), TypeError,
         "Clicks: n_items must be a whole number, got 2.5"),
        (lambda: Clicks.from_matrix(DENSE).rows(slice(0, 2)), TypeError, "Clicks: rows must be integers, got object"),
        (lambda: Clicks.from_matrix(DENSE).rows(["a"]), TypeError, "Clicks: rows must be integers, got <U1"),
        (lambda: Clicks.from_matrix(DENSE).rows([[0], [1, 2]]), TypeError,
         "Clicks: rows must be integers, got [[0], [1, 2]]"),
        (lambda: Clicks.from_matrix(DENSE).rows({0, 1}), TypeError, "Clicks: rows must be integers, got object"),
        (lambda: Clicks.from_matrix(DENSE).rows({0: 1}), TypeError, "Clicks: rows must be integers, got object"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)


def a_nested_tensor():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def a_masked_tensor():
    return torch.masked.masked_tensor(torch.ones(2, 3), torch.ones(2, 3) > 0)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (a_nested_tensor, "nested"),
        (lambda: torch.ones(2, 3, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.quint8), "quantized"),
        (a_masked_tensor, "MaskedTensor"),
    ],
    ids=["nested", "meta", "quantized", "masked"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_read_are_named(make, got):
    with pytest.raises(TypeError) as caught:
        Clicks.from_matrix(make())
    assert str(caught.value) == (
        "Clicks: x must be a scipy sparse matrix, a torch tensor (dense, CSR or COO), a 2-D numpy array or Clicks, "
        f"got a {got} one"
    )


@pytest.mark.parametrize(
    "make",
    [
        np.asfortranarray,
        lambda x: np.repeat(x, 2, 0)[::2],
        lambda x: x.astype(">f4"),
        np.matrix,
        sp.dia_array,
        lambda x: torch.tensor(x).t().contiguous().t(),
        lambda x: torch.nn.Parameter(torch.tensor(x).float()),
        lambda x: torch._neg_view(-torch.tensor(x)),
    ],
)
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_the_layout_of_a_matrix_does_not_matter(make):
    assert_is(Clicks.from_matrix(make(DENSE)), DENSE)


def test_a_diagonal_matrix_that_lost_a_diagonal_is_refused():
    diagonals = sp.dia_array(DENSE)
    diagonals.data = diagonals.data[:1]
    with pytest.raises(ValueError, match=r"^Clicks: x must hold a diagonal for each of \d offsets"):
        Clicks.from_matrix(diagonals)


OFFSETS_FALL = "indptr must not decrease, got {} then {} at {} {}"
COLUMN = "column indices must lie in [0, 5), got {} at position 1"
ROW = "row indices must lie in [0, 2), got {} at position 1"
SIZES = (
    "x must hold {} offsets, and a value for each index, got {} offsets, {} indices and {} values"
)
INVALID = {
    "torch csr falls": OFFSETS_FALL.format(3, 2, "row", 1),
    "torch csr below 0": OFFSETS_FALL.format(0, -1, "row", 0),
    "torch csr past the end": "indptr must end with the number of indices 2, got 9",
    "torch csr short": "indptr must end with the number of indices 2, got 1",
    "torch csr column": "indices must lie in [0, 5), got 5 at row 1, position 1",
    "torch csc falls": OFFSETS_FALL.format(3, 2, "column", 1),
    "torch csc row": "indices must lie in [0, 2), got 2 at column 1, position 1",
    "torch bsr falls": OFFSETS_FALL.format(3, 2, "row", 1),
    "torch bsr column": "indices must lie in [0, 2), got 2 at row 1, position 1",
    "torch coo row": ROW.format(3),
    "torch coo below 0": ROW.format(-1),
    "torch coo column": COLUMN.format(5),
    "scipy csr falls": OFFSETS_FALL.format(3, 2, "row", 1),
    "scipy csr other users": OFFSETS_FALL.format(4, 1, "row", 1),
    "scipy csr past the end": "indptr must end with the number of indices 2, got 9",
    "scipy csr too few rows": SIZES.format(3, 2, 2, 2),
    "scipy csr column": "indices must lie in [0, 5), got -1 at row 1, position 1",
    "scipy csr data": SIZES.format(3, 3, 2, 1),
    "scipy csr large": OFFSETS_FALL.format(1399993, 3, "row", 199999),
    "scipy csc falls": OFFSETS_FALL.format(3, 2, "column", 1),
    "scipy csc row": "indices must lie in [0, 2), got 9 at column 1, position 1",
    "scipy bsr column": "indices must lie in [0, 2), got 9 at row 0, position 1",
    "scipy coo row": ROW.format(3),
    "scipy coo below 0": ROW.format(-1),
    "scipy coo lengths": "row indices, column indices and values must be equally long, got 3, 3 and 2",
    "scipy lil column": COLUMN.format(7),
    "scipy lil lengths": "x must hold 2 rows with a value for each index, got 1 indices in 2 rows and 1001 values",
    "scipy dok place": ROW.format(2),
}


def test_invalid_sparse_matrices_are_refused_before_anything_converts_them():
    child = run_child("invalid_matrices.py")
    said = dict(json.loads(line) for line in child.stdout.splitlines())
    assert said == {name: f"ValueError: Clicks: {text}" for name, text in INVALID.items()}
    assert child.returncode == 0, child.stderr


def test_room_beyond_the_last_offset_is_not_read():
    roomy = sp.csr_array(DENSE)
    roomy.indices, roomy.data = np.append(roomy.indices, 99), np.append(roomy.data, -1)
    assert_is(Clicks.from_matrix(roomy), DENSE)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([0, 1, 2])[::-1],
        np.array([2, 9, 1, 9, 0])[::2],
        np.array([[2, 1, 0], [9, 9, 9]]).T[:, 0],
        torch.tensor([2, 9, 1, 9, 0])[::2],
        torch.tensor([[2, 9], [1, 9], [0, 9]])[:, 0],
        range(2, -1, -1),
        (np.int8(2), 1, torch.tensor(0)),
        Labelled([2, 1, 0]),
    ],
    ids=[
        "reversed",
        "strided",
        "column",
        "strided-tensor",
        "column-tensor",
        "range",
        "mixed",
        "labelled",
    ],
)
def test_row_ids_of_any_layout_choose_those_rows(ids):
    rows = Clicks.from_matrix(DENSE).rows(ids)
    assert_is(rows, DENSE[[2, 1, 0]])
    # the kernels read them one after the other
    assert rows.row_ids.is_contiguous() and rows.rows(ids).row_ids.is_contiguous()
    assert_is(rows.rows(ids), DENSE)


def test_expanded_row_ids_choose_one_row_often():
    ids = torch.tensor([2]).expand(3)
    rows = Clicks.from_matrix(DENSE).rows(ids)
    assert rows.row_ids.is_contiguous()
    assert_is(rows, DENSE[[2, 2, 2]])


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_rows_stay_those_that_were_chosen(make):
    ids = make([2, 0])
    rows = Clicks.from_matrix(DENSE).rows(ids)
    ids[:] = 99  # a buffer that is filled anew
    assert_is(rows, DENSE[[2, 0]])


def test_values_that_were_put_in_place_must_fit():
    clicks = Clicks.from_matrix(DENSE)
    clicks.values = torch.ones(clicks.nnz, requires_grad=True)
    assert clicks.rows([0]).csr[2].requires_grad
    for values in (torch.ones(clicks.nnz - 1), torch.ones(clicks.nnz, device="meta")):
        clicks.values = values
        with pytest.raises(ValueError) as caught:
            sparse_linear(clicks.rows([0]), torch.ones(2, 4))
        assert str(caught.value) == (
            f"Clicks: values must have shape [{clicks.nnz}] on cpu like indices, "
            f"got {list(values.shape)} on {values.device}"
        )


def test_to_takes_non_blocking():
    assert_is(Clicks.from_matrix(DENSE).to("cpu", non_blocking=True), DENSE)
    assert_is(Clicks.from_matrix(DENSE).rows([2, 0]).to("cpu", True), DENSE[[2, 0]])


@st.composite
def coordinates(draw):
    n_users, n_items = draw(st.integers(0, 6)), draw(st.integers(1, 7))
    entry = st.tuples(
        st.integers(0, max(n_users - 1, 0)), st.integers(0, n_items - 1), st.integers(0, 3)
    )
    entries = draw(st.lists(entry, max_size=20)) if n_users else []
    return (n_users, n_items), entries


@settings(max_examples=40, deadline=None)
@given(coordinates(), st.sampled_from(["f8", "f4", "i8", "u1"]))
@pytest.mark.filterwarnings("ignore:Sparse [CB]S[RC] tensor support:UserWarning")
def test_any_coordinates_through_any_container(case, dtype):
    shape, entries = case
    dense = np.zeros(shape, np.float32)
    for u, i, value in entries:
        dense[u, i] += value
    u, i, value = (np.array(part, np.int64) for part in zip(*entries, strict=True)) if entries else (
        np.zeros(0, np.int64) for _ in range(3)
    )  # fmt: skip
    coo = sp.coo_array((value.astype(dtype), (u, i)), shape=shape)  # duplicates and zeros included
    torch_coo = torch.sparse_coo_tensor(
        np.stack((u, i)), value.astype(dtype), shape, check_invariants=True
    )
    order = np.argsort(u, kind="stable")
    indptr = np.concatenate(([0], np.cumsum(np.bincount(u, minlength=shape[0]))))[: shape[0] + 1]
    for clicks in (
        Clicks.from_matrix(coo),
        Clicks.from_matrix(coo.tocsr()),
        Clicks.from_matrix(torch_coo),
        Clicks.from_matrix(torch_coo.to_dense()),
        Clicks(indptr, i[order], value[order].astype(dtype), shape[1]),
        Clicks.from_matrix(coo).transpose().transpose(),
    ):
        assert_is(clicks, dense)
