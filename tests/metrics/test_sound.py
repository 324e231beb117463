"""CLAP score, KL-PaSST and FD-OpenL3 by tiny and made-up networks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smoothcache.errors import FileFormatError, InvalidArgumentError, MissingPackageError
from smoothcache.metrics import (
    ClapEncoder,
    MissingWeightsError,
    OpenL3Embeddings,
    PasstLabels,
    clap_score,
    fd_openl3,
    kl_passt,
    openl3_statistics,
)
from smoothcache.metrics.sound import PEAK, mono, resampled

pytest.importorskip("scipy", reason="sounds are resampled with it")


def tone(seconds: float, rate: int, frequency: float = 440.0, channels: int = 1) -> Tensor:
    times = torch.arange(round(seconds * rate)) / rate
    waves = [torch.sin(2 * math.pi * frequency * (c + 1) * times) for c in range(channels)]
    return 0.3 * torch.stack(waves)


def noise(seconds: float, rate: int, seed: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(channels, round(seconds * rate), generator=generator)


def test_sounds_are_resampled_and_brought_to_their_peak() -> None:
    ours = resampled(tone(1, 44100), 44100, 32000)[0, 1000:-1000]
    torch.testing.assert_close(ours, tone(1, 32000)[0, 1000:-1000], rtol=0, atol=1e-3)
    assert mono(tone(1, 44100, channels=2), 44100, rate=48000).abs().max() == pytest.approx(PEAK)
    assert mono(torch.zeros(100), 48000, rate=48000).abs().max() == 0
    both = torch.stack([torch.ones(10), -torch.ones(10)])
    assert mono(both, 10, rate=10).abs().max() == 0


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (torch.zeros(3, 100), "swapped"),
        (torch.zeros(1, 0), "floating point"),
        (torch.zeros(1, 9, dtype=torch.int16), "floating point"),
        (torch.full((9,), torch.nan), "NaN"),
    ],
    ids=["channels", "empty", "integers", "nan"],
)
def test_bad_sounds_are_refused(sound: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        mono(sound, 100, rate=100)


class Bands(nn.Module):
    """Scores or embeddings of windows: the logarithm of the power in a few bands."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.gain = nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, windows: Tensor) -> Tensor:
        self.shapes.append(tuple(windows.shape))
        power = torch.fft.rfft(windows.flatten(1)).abs().square()[:, : 512 * 20]
        return self.gain * (power.reshape(len(windows), self.size, -1).mean(dim=2) + 1e-3).log()


@pytest.mark.parametrize(("seconds", "windows"), [(3, 1), (10, 1), (12, 2), (20, 3), (47, 9)])
def test_passt_windows(seconds: int, windows: int) -> None:
    network = Bands(8)
    sound = noise(seconds, 32000, seed=0)
    scores = PasstLabels(network)(sound, 32000)
    assert network.shapes == [(1, 320_000)] * windows
    whole = sound[0] * (PEAK / sound.abs().max())
    expected = []
    for start in range(windows):
        part = whole[start * 160_000 : start * 160_000 + 320_000]
        expected.append(network(nn.functional.pad(part, (0, 320_000 - len(part)))[None])[0])
    torch.testing.assert_close(scores, torch.stack(expected).mean(dim=0))


def test_kl_passt_is_its_formula() -> None:
    labels = PasstLabels(Bands(8), name="bands")
    sounds = [tone(3, 32000, f) for f in (440, 880)]
    references = [noise(3, 32000, seed) for seed in (0, 1)]
    expected = []
    for sound, reference in zip(sounds, references, strict=True):
        p, q = (labels(x, 32000).double().softmax(dim=0) for x in (sound, reference))
        logs = [(math.log(a) - math.log(b + 1e-6)) for a, b in zip(p, q, strict=True) if a > 0]
        expected.append(sum(a * x for a, x in zip(p.tolist(), logs, strict=True)))
    result = kl_passt(sounds, references, 32000, labels)
    assert result.value == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert result.unit == "nats" and result.weights == labels.digest
    assert kl_passt(sounds, sounds, 32000, labels).value == pytest.approx(0, abs=1e-4)
    with pytest.raises(InvalidArgumentError, match="2 sounds and 1 references"):
        kl_passt(sounds, references[:1], 32000, labels)


def test_openl3_windows_and_channels() -> None:
    network = Bands(512)
    embeddings = OpenL3Embeddings(network, content="music")
    sound = noise(2, 48000, seed=0, channels=2)
    made = embeddings(sound, 48000, bandwidth=48000)
    assert made.shape == (4, 1024)  # 0.5 s of silence before 2 s of sound: 1 + 1.5 / 0.5
    assert network.shapes == [(4, 1, 48000)] * 2
    left = nn.functional.pad(sound[0] * (PEAK / sound.abs().max()), (24000, 0))
    by_hand = torch.stack([left[s : s + 48000] for s in (0, 24000, 48000, 72000)])
    torch.testing.assert_close(made[:, :512], network(by_hand[:, None]))
    one = embeddings(sound[:1], 48000, bandwidth=48000)
    torch.testing.assert_close(one[:, :512], one[:, 512:])
    assert len(embeddings(sound[:, :2000], 48000)) == 1


@pytest.mark.filterwarnings("ignore")  # of its own
def test_openl3_loads_torchopenl3s_network(tmp_path: Path) -> None:
    reason = "torchopenl3 is not installed: its network is not loaded"
    models = pytest.importorskip("torchopenl3.models", reason=reason)
    network = models.PytorchOpenl3(content_type="env", input_repr="mel256", embedding_size=512)
    torch.save(network.state_dict(), tmp_path / "random.pth")
    embeddings = OpenL3Embeddings.load("env", tmp_path / "random.pth")
    assert embeddings(noise(1, 44100, seed=0, channels=2), 44100).shape == (2, 1024)
    with pytest.raises(FileFormatError, match="not the weights of OpenL3"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
        OpenL3Embeddings.load("env", tmp_path / "other.pth")


@pytest.mark.filterwarnings("ignore::smoothcache.errors.SmoothCacheWarning")
def test_fd_openl3_tells_sounds_apart() -> None:
    embeddings = OpenL3Embeddings(Bands(512), content="env")
    made = [
        openl3_statistics(
            [noise(2, 44100, seed, channels=2) * gain for seed in seeds],
            44100,
            embeddings,
            num_groups=2,
        )
        for seeds, gain in ((range(4), 1), (range(4, 8), 1))
    ]
    tones = openl3_statistics([tone(2, 44100, channels=2)] * 4, 44100, embeddings, num_groups=2)
    reference = made[0].gaussian()
    near, far = (fd_openl3(x, reference, weights="sha256:0") for x in (made[1], tones))
    assert near.value < far.value / 5 and near.num_samples == 16
    other = openl3_statistics(
        [tone(2, 44100)], 44100, OpenL3Embeddings(Bands(512), content="music"), num_groups=1
    )
    with pytest.raises(InvalidArgumentError, match="OpenL3 music"):
        fd_openl3(other, reference)
    with pytest.raises(InvalidArgumentError, match="'music' or 'env'"):
        OpenL3Embeddings(Bands(512), content="speech")  # type: ignore[arg-type]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hear21passt", "hear21passt.base", "torchopenl3", "torchopenl3.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"\[passt\]"):
        PasstLabels.load()
    with pytest.raises(MissingPackageError, match="pip install --no-deps torchopenl3"):
        OpenL3Embeddings.load("music")
    with pytest.raises(MissingWeightsError, match="hf download none/such"):
        pytest.importorskip("transformers")
        ClapEncoder.load("none/such", local_files_only=True)


def test_passt_beside_a_torchvision_of_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hear21passt").mkdir()
    (tmp_path / "hear21passt" / "__init__.py").touch()
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "hear21passt" / "base.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("hear21passt", "hear21passt.base"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingPackageError, match=r"nms does not exist.*belong to torch"):
        PasstLabels.load()
    monkeypatch.delitem(sys.modules, "hear21passt", raising=False)


def test_passt_without_a_network_says_where_to_put_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import ModuleType
    from urllib.error import URLError

    def offline(**options: Any) -> None:
        raise URLError("no network")

    base = ModuleType("hear21passt.base")
    base.get_basic_model = offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hear21passt", ModuleType("hear21passt"))
    monkeypatch.setitem(sys.modules, "hear21passt.base", base)
    with pytest.raises(MissingWeightsError, match=r"no network.*passt-s-f128.*checkpoints"):
        PasstLabels.load()


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, texts: list[str], **options: Any) -> Any:
        import transformers

        longest = max(map(len, texts))
        rows = [[2 + ord(x) % 90 for x in text] for text in texts]
        padded = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return transformers.BatchEncoding({"input_ids": padded, "attention_mask": mask})


@pytest.fixture(scope="module")
def encoder() -> ClapEncoder:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ClapConfig(
            text_config={
                **{"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1},
                **{"num_attention_heads": 2, "intermediate_size": 16},
                **{"max_position_embeddings": 64, "projection_dim": 8},
            },
            audio_config={
                **{"spec_size": 128, "num_mel_bins": 64, "window_size": 4, "patch_size": 4},
                **{"patch_stride": [4, 4], "depths": [1, 1], "num_attention_heads": [1, 2]},
                **{"patch_embeds_hidden_size": 8, "hidden_size": 16, "projection_dim": 8},
                **{"enable_fusion": True},
            },
            projection_dim=8,
        )
        model = transformers.ClapModel(config)
    features = transformers.ClapFeatureExtractor(
        feature_size=64, truncation="fusion", max_length_s=2, sampling_rate=48000
    )
    return ClapEncoder(model, features, Letters(), name="tiny")


def test_clap_score_is_the_cosine_of_the_model(encoder: ClapEncoder) -> None:
    sounds = [tone(1, 48000, 440), noise(1, 48000, 0)]
    prompts = ["a flute", "rain"]
    expected = []
    for sound, prompt in zip(sounds, prompts, strict=True):
        whole = ((sound[0] * (PEAK / sound.abs().max())) * 32767).trunc() / 32767
        inputs = encoder.feature_extractor(whole.numpy(), sampling_rate=48000, return_tensors="pt")
        with torch.no_grad():
            output = encoder.model(**inputs, **Letters()([prompt]))
        expected.append(float((output.audio_embeds * output.text_embeds).sum()))
    result = clap_score(sounds, 48000, prompts, encoder)
    assert result.value == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert result.weights == encoder.digest and "tiny" in result.protocol
    with pytest.raises(InvalidArgumentError, match="2 sounds and 1 prompts"):
        clap_score(sounds, 48000, prompts[:1], encoder)


def test_clap_of_long_sounds_is_repeatable(encoder: ClapEncoder) -> None:
    sound = noise(5, 44100, 3, channels=2)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = encoder.sound(sound, 44100)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    torch.testing.assert_close(encoder.sound(sound, 44100), first, rtol=0, atol=0)
