"""Features of networks: images in, vectors out, kept on disk and joined."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothcache.errors import FileFormatError, InvalidArgumentError
from smoothcache.metrics import (
    Features,
    InceptionFeatures,
    MissingWeightsError,
    adm_evaluation,
    extract,
    fid,
    frechet_distance,
    image_statistics,
    inception_score,
    precision_recall,
    read_images,
    sfid,
)
from smoothcache.metrics.inception import Inception


class Averages:
    """An extractor whose features are easily made by hand."""

    name = "averages"
    digest = "sha256:0"
    sizes: Mapping[str, int] = {"colour": 3, "light": 1}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        colour = images.float().mean(dim=(2, 3))
        return {"colour": colour, "light": colour.mean(dim=1, keepdim=True)}


def pictures(count: int, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def write_npz(path: Path, images: Tensor, **more: np.ndarray) -> None:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)


def test_images_of_files_and_folders(tmp_path: Path) -> None:
    from PIL import Image

    images = pictures(10)
    write_npz(tmp_path / "all.npz", images, mu=np.zeros(2))
    batches = list(read_images(tmp_path / "all.npz", batch_size=4))
    assert [len(x) for x in batches] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(batches), images)

    (tmp_path / "shards").mkdir()
    for number, part in enumerate(images.split(5)):
        write_npz(tmp_path / "shards" / f"{number:03}.npz", part)
    torch.testing.assert_close(torch.cat(list(read_images(tmp_path / "shards"))), images)

    (tmp_path / "png").mkdir()
    for number, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "png" / f"{number:03}.png")
    batches = list(read_images(tmp_path / "png", batch_size=3))
    assert [len(x) for x in batches] == [3, 3, 3, 1]
    torch.testing.assert_close(torch.cat(batches), images)


def test_bad_images_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "good.npz", pictures(4))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:200])
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "0.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (9, 2, 2, 3)}
    )
    np_zip = tmp_path / "short.npz"
    import zipfile

    with zipfile.ZipFile(np_zip, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(30))
    for name, message in {
        "float.npz": "float64 of shape",
        "other.npz": "no array 'arr_0'",
        "cut.npz": "not an .npz file",
        "short.npz": "cut short",
        "png": "not a readable picture",
        "empty": "neither",
    }.items():
        with pytest.raises(FileFormatError, match=message):
            list(read_images(tmp_path / name))
    with pytest.raises(InvalidArgumentError, match="neither a file nor a folder"):
        list(read_images(tmp_path / "absent"))


def test_features_are_kept_and_joined(tmp_path: Path) -> None:
    images = pictures(11)
    whole = extract(images.split(4), Averages())
    for rank in range(3):
        numbers = range(rank, 11, 3)
        part = extract([images[rank::3]], Averages(), indices=numbers)
        part.save(tmp_path / f"{rank}.safetensors")
    joined = Features.load(*(tmp_path / f"{rank}.safetensors" for rank in (2, 0, 1)))
    for name, values in whole.values.items():
        torch.testing.assert_close(joined.values[name], values)
    torch.testing.assert_close(joined.indices, torch.arange(11))
    with pytest.raises(FileFormatError, match=r"samples 0, 3, 6, 9 come twice"):
        Features.load(tmp_path / "0.safetensors", tmp_path / "0.safetensors")


def test_features_of_others_are_not_joined(tmp_path: Path) -> None:
    features = extract([pictures(3)], Averages())
    features.save(tmp_path / "a")
    Features(features.values, features.indices + 3, "other (sha256:1)").save(tmp_path / "b")
    with pytest.raises(FileFormatError, match="come from other"):
        Features.load(tmp_path / "a", tmp_path / "b")
    fewer = {"colour": features.values["colour"]}
    Features(fewer, features.indices + 3, features.extractor).save(tmp_path / "b")
    with pytest.raises(FileFormatError, match=r"colour of 3, those of .* colour of 3, light of 1"):
        Features.load(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="not a file of features"):
        Features.load(tmp_path / "b")
    broken = {"colour": torch.full((3, 3), torch.nan)}
    Features(broken, features.indices, features.extractor).save(tmp_path / "b")
    with pytest.raises(FileFormatError, match="finite numbers"):
        Features.load(tmp_path / "b")


def test_bad_batches_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no images"):
        extract([], Averages())
    with pytest.raises(InvalidArgumentError, match="uint8 of shape"):
        extract([torch.rand(2, 3, 4, 4)], Averages())
    with pytest.raises(InvalidArgumentError, match="rising"):
        extract([pictures(2)], Averages(), indices=[1, 0])
    with pytest.raises(InvalidArgumentError, match="no feature 'pool'; it has 'colour', 'light'"):
        image_statistics([pictures(2)], Averages(), ["pool"])


def test_statistics_of_images_are_those_of_their_features() -> None:
    images = pictures(40)
    made = image_statistics(images.split(9), Averages(), ["colour"])["colour"].gaussian()
    features = extract([images], Averages()).values["colour"].double()
    torch.testing.assert_close(made.covariance, torch.cov(features.T))
    assert made.extractor == "averages (sha256:0)"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, seeded weights of the Inception network."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Inception()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


def test_inception_has_the_parameters_of_torch_fidelitys(inception: InceptionFeatures) -> None:
    state = inception.network.state_dict()
    assert len(state) == 566
    assert sum(p.numel() for p in inception.network.parameters()) == 23_850_960


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's own network. Its package imports torchvision, which this file needs not."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed: its network is not compared with ours")
    for name in [x for x in sys.modules if x.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", importlib.util.module_from_spec(spec))
    yield importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    for name in [x for x in sys.modules if x.startswith("torch_fidelity.")]:
        del sys.modules[name]


@pytest.mark.parametrize("size", [40, 299, 400])
def test_inception_is_torch_fidelitys(
    torch_fidelity: Any, weights: Path, inception: InceptionFeatures, size: int
) -> None:
    names = ["2048", "logits_unbiased"]
    theirs = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", names, str(weights))
    images = pictures(2, size=size)
    pool, logits = theirs(images)
    ours = inception(images)
    torch.testing.assert_close(ours["pool"], pool, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-6)


def test_spatial_features_are_seven_channels_in_the_order_of_tensorflow(
    inception: InceptionFeatures,
) -> None:
    images = pictures(2, size=40)
    features = inception(images)
    assert {name: x.shape[1] for name, x in features.items()} == inception.sizes
    seen: list[Tensor] = []
    block = inception.network.Mixed_6d
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    inception(images)
    handle.remove()
    branch = block.get_submodule("branch1x1")
    maps = torch.relu(branch.bn(torch.nn.functional.conv2d(seen[0], branch.conv.weight)))[:, :7]
    assert maps.shape == (2, 7, 17, 17)
    # TensorFlow has channels last, and so has the mean in ADM's reference file.
    by_hand = torch.stack(
        [maps[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], dim=1
    )
    assert by_hand.shape == (2, 2023)
    torch.testing.assert_close(features["spatial"], by_hand)
    weight = inception.network.fc.weight
    torch.testing.assert_close(features["logits"], features["pool"] @ weight.T)


@pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning")
def test_adm_metrics_from_images_to_results(inception: InceptionFeatures) -> None:
    ours, theirs = (
        image_statistics(pictures(6, 16, seed).split(3), inception, ["spatial"], num_groups=1)
        for seed in (0, 1)
    )
    result = sfid(ours["spatial"], theirs["spatial"].gaussian(), weights=inception.digest)
    assert result.weights == inception.digest and result.num_samples == 6
    assert result.value > 1e-3 * float(ours["spatial"].gaussian().covariance.trace())
    with pytest.raises(InvalidArgumentError, match="feature 'pool' of InceptionFeatures"):
        fid(ours["spatial"], theirs["spatial"].gaussian())
    logits = inception(pictures(4, size=16))["logits"]
    assert 1 <= inception_score(logits, split_size=4).value <= 4


class Small:
    """An extractor with the names of Inception's features, and small ones."""

    name = "small"
    digest = "sha256:5"
    sizes: Mapping[str, int] = {"pool": 4, "spatial": 3, "logits": 5}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        values = images.float().flatten(1)[:, :5] / 64
        return {"pool": values[:, :4], "spatial": values[:, :3], "logits": values}


def test_adm_evaluation_is_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smoothcache.metrics.frechet._check_size", lambda *_: None)
    samples, real = pictures(40), pictures(30, seed=1)
    made = image_statistics([real], Small(), ["pool", "spatial"])
    gaussians = {name: x.gaussian() for name, x in made.items()}
    arrays = {"mu": gaussians["pool"].mean, "sigma": gaussians["pool"].covariance}
    arrays |= {"mu_s": gaussians["spatial"].mean, "sigma_s": gaussians["spatial"].covariance}
    write_npz(tmp_path / "ref.npz", real, **{k: v.numpy() for k, v in arrays.items()})
    batches = samples.split(9)
    results = adm_evaluation(batches, tmp_path / "ref.npz", Small(), split_size=20)
    assert list(results) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert {x.weights for x in results.values()} == {"sha256:5"}
    features = Small()(samples)
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet_distance(features[name], Small()(real)[name])
        assert results[metric].value == pytest.approx(expected, rel=1e-6)
        assert results[metric].spread is not None
    expected = inception_score(features["logits"], split_size=20).value
    assert results["inception_score"].value == pytest.approx(expected)
    both = precision_recall(features["pool"], Small()(real)["pool"])
    assert [results[x.metric].value for x in both] == [x.value for x in both]
    one = adm_evaluation(batches, tmp_path / "ref.npz", Small(), metrics=["sfid"])
    assert one == {"sfid": results["sfid"]}


def test_adm_evaluation_refuses_before_it_runs(tmp_path: Path) -> None:
    write_npz(tmp_path / "images.npz", pictures(3))
    untouched = iter([pictures(3)])
    with pytest.raises(FileFormatError, match="no array mu and sigma"):
        adm_evaluation(untouched, tmp_path / "images.npz", Small())
    with pytest.raises(InvalidArgumentError, match="no 'kid'"):
        adm_evaluation(untouched, tmp_path / "images.npz", Small(), metrics=["kid"])
    assert len(list(untouched)) == 1
    for metrics in (["precision"], ["inception_score"]):
        with pytest.raises(InvalidArgumentError):
            adm_evaluation([], tmp_path / "images.npz", Small(), metrics=metrics)


def test_inception_weights_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"Download https://github.com/toshas"):
        InceptionFeatures(tmp_path / "absent.pth")
    torch.save({"fc.bias": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(FileFormatError, match="not the weights of Inception"):
        InceptionFeatures(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pth")
    with pytest.raises(FileFormatError, match="not the weights of Inception"):
        InceptionFeatures(tmp_path / "code.pth")


def test_without_a_network_the_error_says_where_to_put_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    def offline(*args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"no network.*checkpoints/weights-inception"):
        InceptionFeatures()
