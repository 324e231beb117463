"""Metrics of folders: the right ones of the right samples, the same over ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import noise, run_ranks
from support.tiny_pipeline import build_pipeline
from torch import Tensor

from examples import tiny
from smoothcache import FileFormatError, InvalidArgumentError, Row, Schedule
from smoothcache.diffusers_io import PipelineSampler
from smoothcache.evaluation import (
    METRICS,
    Candidate,
    EvaluationRow,
    EvaluationTable,
    evaluate,
    evaluate_schedules,
)
from smoothcache.evaluation import measure as measure_module
from smoothcache.evaluation.measure import Protocol, take_all
from smoothcache.evaluation.networks import Networks
from smoothcache.evaluation.registry import metrics_named
from smoothcache.evaluation.schedules import sampler_of
from smoothcache.evaluation.source import open_source
from smoothcache.generation import sample_many
from smoothcache.metrics import (
    Gaussian,
    MetricResult,
    MissingWeightsError,
    Statistics,
    gaussian_distance,
    inception_score,
    precision_recall,
    save_reference,
)
from smoothcache.report import table_page


class Pooled:
    """A made-up network whose features are a few pixels and means."""

    name, digest = "pooled", "sha256:00"
    sizes = {"pool": 6, "spatial": 4, "logits": 5, "class_token": 6}  # noqa: RUF012

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(images))
        pixels = images.float().flatten(1) / 255
        pool = torch.stack([pixels[:, i::6].mean(dim=1) for i in range(6)], dim=1)
        return {
            "pool": pool,
            "class_token": pool,
            "spatial": pixels[:, :4],
            "logits": 8 * pixels[:, 10:15],
        }


def real(numbers: list[int]) -> Tensor:
    return 0.8 * noise([i + 1000 for i in numbers]) + 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    options: dict[str, Any] = {"batch_size": 3, "shard_size": 6, "progress": False}
    sample_many(noise, folder / "samples", 40, **options)
    sample_many(real, folder / "real", 40, **options)
    return folder


def measured(folders: Path, metrics: list[str], reference: Any = "real", **options: Any) -> Any:
    networks = {name: Pooled() for name in ("inception", "dinov2")}
    options = {"networks": networks, "split_size": 10, "subset_size": 10, **options}
    against = None if reference is None else folders / reference
    return evaluate(folders / "samples", against, metrics, progress=False, **options)


def features(name: str) -> dict[str, Tensor]:
    samples = {"samples": noise, "real": real}[name](list(range(40)))
    return Pooled()((255 * samples).round().to(torch.uint8))


def test_values_are_those_of_the_metrics_themselves(folders: Path) -> None:
    results = measured(folders, ["fd_dinov2", "is", "precision", "recall", "kid"])
    ours, theirs = features("samples"), features("real")
    statistics = [Statistics(6, num_groups=1) for _ in range(2)]
    for one, rows in zip(statistics, (ours, theirs), strict=True):
        one.update(rows["pool"])
    expected = gaussian_distance(*(x.gaussian() for x in statistics))
    assert results["fd_dinov2"].value == pytest.approx(expected, rel=1e-9)
    assert results["is"].value == pytest.approx(
        inception_score(ours["logits"], split_size=10).value
    )
    both = precision_recall(ours["pool"], theirs["pool"])
    assert [results[x].value for x in ("precision", "recall")] == [x.value for x in both]
    assert all(x.num_samples == 40 and x.weights == "sha256:00" for x in results.values())


def test_a_network_sees_each_image_once(folders: Path) -> None:
    network = Pooled()
    metrics = ["precision", "recall", "kid", "is"]
    measured(folders, metrics, networks={"inception": network}, batch_size=8)
    assert network.batches == [12, 12, 12, 4] * 2  # whole files, of the samples and the reference


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_ranks_add_up(folders: Path, size: int) -> None:
    """Features are the same to the last bit, statistics to 1e-12."""
    networks = Networks({"inception": Pooled(), "dinov2": Pooled()}, {})
    metrics = metrics_named(["fd_dinov2", "is", "precision"], "image")
    source = open_source(folders / "samples", 8)

    def taken(rank: int, size: int) -> Any:
        protocol = Protocol(num_groups=3, split_size=10)
        return take_all(source, metrics, networks, None, (rank, size), protocol)

    whole, first = taken(0, 1), taken(0, size)
    for rank in range(1, size):
        for key, collected in taken(rank, size).items():
            first[key].merge(collected)
    a, b = (x["dinov2.class_token.statistics"].gaussian() for x in (whole, first))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-15)
    assert torch.equal(*(x["inception.pool.rows"].joined() for x in (whole, first)))
    scores = [x["inception.logits.scores"].result().value for x in (whole, first)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-12)


def test_published_statistics_are_a_reference(folders: Path, tmp_path: Path) -> None:
    statistics = Statistics(6, num_groups=1, extractor="pooled (sha256:00)")
    statistics.update(features("real")["pool"])
    save_reference(tmp_path / "real.npz", class_token=statistics.gaussian())
    networks = {"dinov2": Pooled()}
    options: dict[str, Any] = {"networks": networks, "progress": False}
    by_file = evaluate(folders / "samples", tmp_path / "real.npz", ["fd_dinov2"], **options)
    by_folder = evaluate(folders / "samples", folders / "real", ["fd_dinov2"], **options)
    assert by_file["fd_dinov2"].value == pytest.approx(by_folder["fd_dinov2"].value, rel=1e-9)
    with pytest.raises(InvalidArgumentError, match="'precision' need the reference samples"):
        evaluate(
            folders / "samples",
            tmp_path / "real.npz",
            ["fd_dinov2", "precision"],
            networks={**networks, "inception": Pooled()},
            progress=False,
        )


@pytest.mark.parametrize(
    ("gaussian", "message"),
    [
        (Gaussian(torch.zeros(7).double(), torch.eye(7).double()), "6 features, .* statistics 7"),
        (
            Gaussian(torch.zeros(6).double(), torch.eye(6).double(), 9, "another (sha256:11)"),
            "the reference statistics from another",
        ),
    ],
)
def test_statistics_of_another_network_are_refused_before_anything_is_measured(
    gaussian: Gaussian, message: str, folders: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    save_reference(tmp_path / "real.npz", class_token=gaussian)
    monkeypatch.setattr(measure_module, "measure_chunk", lambda *_: pytest.fail("measured"))
    with pytest.raises(InvalidArgumentError, match=message):
        measured(folders, ["fd_dinov2"], tmp_path / "real.npz")


def test_pairs_are_samples_of_the_same_number(folders: Path) -> None:
    same = measured(folders, ["psnr"], "samples")
    assert same["psnr"].value == 150
    other = measured(folders, ["psnr"])["psnr"]
    ours, theirs = ((255 * x(list(range(40)))).round() / 255 for x in (noise, real))
    errors = (ours - theirs).square().flatten(1).mean(dim=1)
    assert other.value == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)


def test_what_pairs_need_is_said(folders: Path, tmp_path: Path) -> None:
    sample_many(noise, tmp_path / "few", 7, progress=False)
    with pytest.raises(InvalidArgumentError, match="make both folders with the same number"):
        measured(folders, ["psnr"], tmp_path / "few")
    with pytest.raises(InvalidArgumentError, match=r"which image in .* belongs to which sample"):
        measured(folders, ["psnr"], folders / "real" / "samples")
    wide = tmp_path / "wide"
    sample_many(lambda x: noise(x).repeat(1, 1, 2, 2), wide, 40, batch_size=3, shard_size=6,
                progress=False)  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=r"are \[8, 12\] pixels, the samples \[4, 6\]"):
        measured(folders, ["psnr"], wide)


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (["fidd"], {}, "there is no metric 'fidd'; there are 'fid', 'sfid'"),
        ([], {}, "name at least one metric"),
        (["clap_score"], {}, "clap_score is measured on sounds, and these are images"),
        (["fd_dinov2"], {"reference": None}, "'fd_dinov2' need a reference"),
        (["is"], {"split_size": 12}, "full splits of 12 samples, and .* has 40"),
        (["kid"], {"subset_size": 50}, "subsets of 50, and .* has 40 samples"),
        (["clip_score"], {}, "were made without prompts"),
        (["is"], {"weights": {"incption": "x"}}, "there is no network 'incption'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    metrics: list[str], options: dict[str, Any], message: str, folders: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        measured(folders, metrics, **options)


def test_missing_weights_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"Download https://.* and give its path"):
        measured(folders, ["is"], networks={}, weights={"inception": str(tmp_path / "none.pth")})


def test_damaged_samples_are_refused(tmp_path: Path) -> None:
    sample_many(noise, tmp_path / "samples", 8, progress=False)
    file = next((tmp_path / "samples" / "samples").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FileFormatError, match="is damaged"):
        measured(tmp_path, ["is"], None, split_size=8)
    with pytest.raises(InvalidArgumentError, match="neither a file nor a folder"):
        evaluate(tmp_path / "none", None, ["is"])


def test_vbench_runs_where_it_is_named(tmp_path: Path) -> None:
    def clips(numbers: list[int]) -> Tensor:
        return torch.stack([noise(numbers), 1 - noise(numbers)], dim=1)

    sample_many(clips, tmp_path / "run", 2, layout="gif", inputs=["a cat"], progress=False)
    with pytest.raises(InvalidArgumentError, match="name the program that runs it"):
        evaluate(tmp_path / "run", None, ["vbench"])
    program = tmp_path / "vbench.py"
    program.write_text(
        "import json, sys, pathlib\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "videos = sorted(pathlib.Path(options['--videos_path']).iterdir())\n"
        "each = [{'video_path': str(x), 'video_results': 0.5} for x in videos]\n"
        "file = pathlib.Path(options['--output_path']) / 'x_eval_results.json'\n"
        "file.write_text(json.dumps({options['--dimension']: [0.5, each]}))\n"
    )
    results = evaluate(
        tmp_path / "run", None, ["vbench"], vbench_command=[sys.executable, str(program)]
    )
    assert results["vbench"].unit == "%" and len(results) == 17
    # Its results do not count as samples.
    assert evaluate(tmp_path / "run", None, ["vbench"], vbench_command=["none"]) == results


def test_sounds(tmp_path: Path) -> None:
    def sounds(numbers: list[int]) -> Tensor:
        return 2 * noise(numbers).flatten(2).repeat(1, 1, 500)[:, :2] - 1

    class Clap:
        name, digest = "made up", None

        def sound(self, waveform: Tensor, sampling_rate: int) -> Tensor:
            assert waveform.shape == (2, 12000) and sampling_rate == 12000
            return torch.tensor([1.0, 0.0])

        def texts(self, texts: list[str]) -> Tensor:
            return torch.tensor([[0.6, 0.8] if texts == ["rain"] else [1.0, 0.0]])

    options: dict[str, Any] = {"layout": "wav", "sampling_rate": 12000, "progress": False}
    inputs = {"inputs": ["rain", "a dog"], "names": ["12", "13"]}
    sample_many(sounds, tmp_path / "run", 2, **inputs, **options)
    results = evaluate(
        tmp_path / "run", None, ["clap_score"], networks={"clap": Clap()}, progress=False
    )
    assert results["clap_score"].value == pytest.approx(0.8)

    def labels(waveform: Tensor, sampling_rate: int) -> Tensor:
        return waveform[0, :3]

    by_name: dict[str, Any] = {"networks": {"passt": labels}, "progress": False}
    reference = tmp_path / "run" / "samples"  # plain sounds, told by their names
    results = evaluate(tmp_path / "run", reference, ["kl_passt"], **by_name)
    assert abs(results["kl_passt"].value) < 1e-4 and results["kl_passt"].unit == "nats"
    (reference / "13.wav").rename(tmp_path / "13.wav")
    with pytest.raises(FileFormatError, match=r"lacks '13.wav'"):
        evaluate(tmp_path / "run", reference, ["kl_passt"], **by_name)
    with pytest.raises(InvalidArgumentError, match=r"has no '12.wav', the reference of a sample"):
        evaluate(reference, tmp_path, ["kl_passt"], **by_name)


def test_schedules_side_by_side(tmp_path: Path) -> None:
    pipe = build_pipeline()
    sampler = PipelineSampler(pipe, class_labels=(0, 3), num_steps=4)
    candidates = [
        Candidate("uncached"),
        Candidate("every 2nd step", Schedule.uniform(pipe, num_steps=4, interval=2)),
        Candidate("2 steps", num_steps=2),
    ]
    table = evaluate_schedules(
        sampler, candidates, tmp_path, 4, ["is", "psnr"], batch_size=2, timings=1, split_size=4,
        networks={"inception": Pooled()}, progress=False, title="Tiny",
    )  # fmt: skip
    first, cached, fewer = table.rows
    assert (first.compute, first.steps, fewer.steps) == (1, 4, 2)
    assert cached.compute is not None and 0.5 < cached.compute < 0.7
    assert fewer.compute == pytest.approx(0.5)
    assert all(row.seconds for row in table.rows)
    assert first.results["psnr"].value == 150 > cached.results["psnr"].value
    assert list(cached.results) == ["is", "psnr"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["2-steps", "every-2nd-step", "uncached"]
    with pytest.raises(InvalidArgumentError, match="names of their own"):
        evaluate_schedules(sampler, [Candidate("a b"), Candidate("a-b")], tmp_path, 2, ["is"])


def test_schedules_run_all_their_steps_where_a_pipeline_starts_from_an_image() -> None:
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    sampler = PipelineSampler(
        FluxImg2ImgPipeline.from_pipe(tiny.flux()),
        ("a cat",),
        options={"strength": 0.5},
        images={"image": (Image.new("RGB", (32, 32)),)},
    )
    schedule = Schedule(3, {"attn": Row.uniform(3, 2)})
    assert sampler_of(sampler, Candidate("half", schedule)).steps == 5


def test_tables_as_text_markdown_and_json(tmp_path: Path) -> None:
    result = MetricResult("fid", 2.2711, 50, unit="", protocol="ADM", spread=0.041)
    rows = (
        EvaluationRow("no cache", 50, 11.4, 1.0, 0.26, {"fid": result}),
        EvaluationRow("n = 2 | <b>", 50, extras={"printed": "2.65"}),
    )
    table = EvaluationTable(rows, "DiT", ("a note",))
    assert str(table).splitlines()[2].split() == [
        *("no", "cache", "50", "11.4", "100.0", "%", "0.26", "2.271", "±", "0.041", "-")
    ]
    assert "n = 2 \\| <b>" in table.to_markdown()
    assert table.header()[:2] == ["", "steps"] and len(table.cells()) == 2
    html = table_page(table, title="DiT").to_html()
    assert "n = 2 | &lt;b&gt;" in html and "2.271 ± 0.041" in html and "a note" in html
    table.save(tmp_path / "t.json", tmp_path / "t.md")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["rows"][0]["results"]["fid"]["value"] == 2.2711
    with pytest.raises(InvalidArgumentError, match=r"must end in .json or .md"):
        table.save(tmp_path / "t.pdf")


def test_every_metric_says_what_it_is() -> None:
    assert all(metric.what and metric.name == name for name, metric in METRICS.items())


def work(folder: Path) -> None:
    """What every rank does."""
    results = measured(folder, ["fd_dinov2", "is", "precision", "psnr"])
    if os.environ["RANK"] == "1":
        values = {name: (x.value, x.spread, x.num_samples) for name, x in results.items()}
        (folder / "results.json").write_text(json.dumps(values))
    try:
        measured(folder, ["fd_dinov2"], num_groups=2 + int(os.environ["RANK"]))
    except InvalidArgumentError as error:
        (folder / f"refused-{os.environ['RANK']}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(folders: Path) -> None:
    ended = run_ranks(__file__, 2, folders)
    assert [code for code, _ in ended] == [0, 0], ended
    found = json.loads((folders / "results.json").read_text())
    for name, result in measured(folders, ["fd_dinov2", "is", "precision", "psnr"]).items():
        assert found[name] == pytest.approx([result.value, result.spread, 40], rel=1e-9)
    for rank in range(2):
        assert "different arguments" in (folders / f"refused-{rank}.txt").read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
