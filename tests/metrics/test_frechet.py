"""Statistics in bounded memory, Frechet distances, and the files that both live in."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothcache.errors import FileFormatError, InvalidArgumentError, SmoothCacheWarning
from smoothcache.metrics import (
    Gaussian,
    Statistics,
    fid,
    frechet_distance,
    frechet_infinity,
    gaussian_distance,
    load_reference,
    save_reference,
    sfid,
)
from smoothcache.metrics.frechet import frechet_from_statistics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collected(features: Tensor, **options: int) -> Statistics:
    statistics = Statistics(features.shape[1], **options)
    for batch in features.split(37):
        statistics.update(batch)
    return statistics


def gaussian(features: Tensor) -> Gaussian:
    return collected(features).gaussian()


@pytest.mark.parametrize("num_groups", [1, 7])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_those_of_one_pass(num_groups: int, offset: float) -> None:
    features = normal(3001, 5).double() @ normal(5, 5, seed=1).double() + offset
    made = collected(features, num_groups=num_groups).gaussian()
    torch.testing.assert_close(made.mean, features.mean(dim=0))
    torch.testing.assert_close(made.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-9)
    assert made.count == 3001


@pytest.mark.parametrize("ranks", [2, 3])
def test_merging_ranks_is_one_pass(ranks: int) -> None:
    features, indices = normal(2000, 6), torch.arange(2000)
    whole = Statistics(6, num_groups=4)
    whole.update(features, indices)
    merged = Statistics(6, num_groups=4)
    for rank in range(ranks):
        part = Statistics(6, num_groups=4)
        part.update(features[rank::ranks], indices[rank::ranks])
        merged.merge(part)
    for without in (None, 0, 3):
        ours, theirs = merged.gaussian(without=without), whole.gaussian(without=without)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-12, atol=1e-12)
        assert ours.count == theirs.count


def test_leaving_a_group_out_is_statistics_of_the_rest() -> None:
    features = normal(500, 3).double()
    made = collected(features, num_groups=5).gaussian(without=2)
    rest = features[torch.arange(500) % 5 != 2]
    torch.testing.assert_close(made.covariance, torch.cov(rest.T))
    assert made.count == 400


def test_memory_does_not_grow_with_the_samples() -> None:
    def peak(num_batches: int) -> int:
        statistics = Statistics(16)
        tracemalloc.start()
        for seed in range(num_batches):
            statistics.update(normal(500, 16, seed=seed))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert statistics.count == 500 * num_batches
        held = sum(len(rows) for rows, _ in statistics._pending)
        assert held < 1024  # tensors are beyond tracemalloc: what is held is counted as well
        return result

    peak(1)
    assert peak(100) < 2 * peak(10) + 100_000  # 50,000 samples and 5,000


def test_files_of_statistics(tmp_path: Path) -> None:
    made = Statistics(3, num_groups=2, extractor="net (sha256:1)")
    made.update(normal(50, 3))
    made.save(tmp_path / "a.safetensors")
    read = Statistics.load(tmp_path / "a.safetensors")
    assert read.extractor == made.extractor and read.count == 50
    torch.testing.assert_close(read.gaussian().covariance, made.gaussian().covariance)
    with pytest.raises(InvalidArgumentError, match="extractor"):
        read.merge(Statistics(3, num_groups=2, extractor="net (sha256:2)"))
    (tmp_path / "b").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="not a file of statistics"):
        Statistics.load(tmp_path / "b")


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(3, 4),
        torch.zeros(3, 2, dtype=torch.long),
        torch.full((3, 2), torch.nan),
        torch.zeros(2),
    ],
    ids=["size", "integers", "nan", "row"],
)
def test_statistics_refuse(features: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="features must be"):
        Statistics(2).update(features)


def test_distance_of_commuting_covariances_is_that_of_deviations() -> None:
    basis = torch.linalg.qr(normal(4, 4).double())[0]
    ours, theirs = (torch.tensor(x).double() for x in ([1.0, 2, 0, 4], [3.0, 2, 1, 0]))
    mean = normal(4, seed=1).double()
    a = Gaussian(mean, basis @ ours.square().diag() @ basis.T)
    b = Gaussian(torch.zeros(4).double(), basis @ theirs.square().diag() @ basis.T)
    expected = mean.square().sum() + (ours - theirs).square().sum()
    assert gaussian_distance(a, b) == pytest.approx(float(expected), rel=1e-7)
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-7)


def test_distance_is_that_of_the_matrix_square_root() -> None:
    a, b = normal(80, 6) @ normal(6, 6, seed=2), normal(90, 6, seed=1) + 0.5
    ours = gaussian_distance(gaussian(a), gaussian(b))
    first, second = (torch.cov(x.double().T) for x in (a, b))
    crossed = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    apart = (a.double().mean(dim=0) - b.double().mean(dim=0)).square().sum()
    expected = float(apart + first.trace() + second.trace() - 2 * crossed)
    assert ours == pytest.approx(expected, rel=1e-9)
    assert ours == pytest.approx(gaussian_distance(gaussian(b), gaussian(a)), rel=1e-9)
    assert ours == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_spread_is_that_of_repeated_runs() -> None:
    reference = gaussian(normal(20_000, 4, seed=99))
    results = []
    for seed in range(30):
        statistics = collected(normal(400, 4, seed=seed) * 1.5 + 0.5, num_groups=10)
        results.append(
            frechet_from_statistics("fd", statistics, reference, protocol="", weights=None)
        )
    repeated = torch.tensor([x.value for x in results]).std()
    mean_spread = torch.tensor([x.spread for x in results]).mean()
    assert 0.7 < mean_spread / repeated < 1.4
    assert "jackknife over 10" in str(results[0].spread_of)


def test_results_carry_the_weights_of_their_statistics() -> None:
    statistics = Statistics(3, extractor="net (sha256:0a)")
    statistics.update(normal(30, 3))
    result = frechet_from_statistics("fd", statistics, gaussian(normal(30, 3)), protocol="")
    assert result.weights == "sha256:0a"
    unknown = collected(normal(30, 3))
    assert (
        frechet_from_statistics("fd", unknown, statistics.gaussian(), protocol="").weights is None
    )


def test_empty_groups_do_not_shrink_the_spread() -> None:
    features, reference = normal(60, 3), gaussian(normal(90, 3, seed=1))
    spreads = []
    for num_groups in (3, 10):
        statistics = Statistics(3, num_groups=num_groups)
        statistics.update(features, torch.arange(60) % 3)  # windows of three sounds
        result = frechet_from_statistics("fd", statistics, reference, protocol="")
        assert "over 3 groups" in str(result.spread_of)
        spreads.append(result.spread)
    assert spreads[0] == pytest.approx(spreads[1])
    alone = Statistics(3)
    alone.update(features, torch.zeros(60, dtype=torch.long))
    assert frechet_from_statistics("fd", alone, reference, protocol="").spread is None


def test_infinity_is_below_the_biased_value_and_near_the_truth() -> None:
    reference = Gaussian(torch.zeros(10).double(), torch.eye(10).double())
    features = normal(2000, 10) + 0.1  # truth: 10 * 0.01
    result = frechet_infinity(features, reference)
    assert result.value == pytest.approx(0.1, abs=0.04)
    assert result.value < gaussian_distance(gaussian(features), reference)
    with pytest.raises(InvalidArgumentError, match="not all different"):
        frechet_infinity(features[:10], reference)


def test_infinity_takes_the_line_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    monkeypatch.setattr("smoothcache.metrics.frechet._distance", lambda s, r, x: 3 + 8 / s.count)
    result = frechet_infinity(normal(100, 2), reference, num_points=5)
    assert (result.value, result.spread) == pytest.approx((3, 0), abs=1e-6)


def test_fid_names_sizes_and_warns_of_few_samples() -> None:
    with pytest.raises(InvalidArgumentError, match="2048 features, got 5"):
        fid(collected(normal(9, 5)), gaussian(normal(9, 5)))
    with pytest.raises(InvalidArgumentError, match="2023 features, got 5"):
        sfid(collected(normal(9, 5)), gaussian(normal(9, 5)))
    few = collected(normal(9, 12), num_groups=1)
    with pytest.warns(SmoothCacheWarning, match="singular"):
        result = frechet_from_statistics(
            "fd", few, gaussian(normal(30, 12)), protocol="", weights="sha256:0"
        )
    assert result.to_json()["num_samples"] == 9 and result.spread is None
    with pytest.raises(InvalidArgumentError, match="at least 2 samples"):
        frechet_from_statistics(
            "fd", collected(normal(1, 3)), gaussian(normal(9, 3)), protocol="", weights=None
        )


def test_other_features_or_weights_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"3 features.*reference statistics 4"):
        gaussian_distance(gaussian(normal(9, 3)), gaussian(normal(9, 4)))
    made = [Statistics(3, extractor=x) for x in ("net (a)", "net (b)")]
    for statistics in made:
        statistics.update(normal(30, 3))
    with pytest.raises(InvalidArgumentError, match=r"net \(a\).*net \(b\)"):
        gaussian_distance(made[0].gaussian(), made[1].gaussian())


def test_adm_statistics_are_read(tmp_path: Path) -> None:
    arrays = {}
    for suffix, size in (("", 4), ("_s", 3)):
        made = gaussian(normal(50, size))
        arrays[f"mu{suffix}"] = made.mean.numpy().astype(np.float32)
        arrays[f"sigma{suffix}"] = made.covariance.numpy()
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
    assert load_reference(tmp_path / "ref.npz").num_features == 4
    spatial = load_reference(tmp_path / "ref.npz", "spatial")
    assert spatial.num_features == 3 and spatial.count is None
    np.testing.assert_array_equal(spatial.mean.numpy(), arrays["mu_s"].astype(np.float64))


def test_references_are_written_for_adm(tmp_path: Path) -> None:
    statistics = Statistics(3, extractor="net (sha256:1)")
    statistics.update(normal(20, 3))
    path = tmp_path / "ref.npz"
    save_reference(path, pool=statistics.gaussian(), class_token=gaussian(normal(9, 2)))
    with np.load(path) as file:
        assert {"mu", "sigma", "mu_class_token", "sigma_class_token"} <= set(file.files)
    read = load_reference(path)
    assert (read.count, read.extractor) == (20, "net (sha256:1)")
    assert load_reference(path, "class_token").num_features == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no array sigma"),
        ({"arr_0": np.zeros((1, 2, 2, 3), np.uint8)}, "extract their features"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "mu and sigma"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1.0]])}, "not symmetric"),
        ({"mu": np.array(["a", None], dtype=object), "sigma": np.eye(2)}, "plain arrays"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "plain arrays"),
    ],
    ids=["missing", "images", "shape", "nan", "asymmetric", "pickle", "text"],
)
def test_bad_references_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(FileFormatError, match=message):
        load_reference(tmp_path / "ref.npz")


def test_damaged_or_absent_references_are_refused(tmp_path: Path) -> None:
    save_reference(tmp_path / "ref.npz", pool=gaussian(normal(9, 3)))
    data = (tmp_path / "ref.npz").read_bytes()
    for damaged in (data[:-30], b"", b"nothing"):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"bad\.npz"):
            load_reference(tmp_path / "bad.npz")
    with pytest.raises(FileFormatError, match="no such file"):
        load_reference(tmp_path / "absent.npz")
