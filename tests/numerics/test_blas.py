"""On how many threads BLAS works."""

from threadpoolctl import threadpool_info

from onnxcomp.numerics.blas import as_pays


def threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_small_matrices_get_one_thread_and_wide_ones_as_many_as_before() -> None:
    before = threads()
    with as_pays(100):
        assert set(threads()) == {1}
    with as_pays(10_000):
        assert threads() == before
    assert threads() == before
