"""Many samples into a folder: divided by number, taken up after any end, never mixed."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.folders import content, noise
from support.tiny_pipeline import build_audio_pipeline, build_clip_pipeline, build_pipeline
from torch import Tensor

from examples import tiny
from smoothcache import FileFormatError, InvalidArgumentError, Schedule
from smoothcache.diffusers_io import PipelineSampler
from smoothcache.files import document
from smoothcache.generation import (
    DiskFullError,
    Manifest,
    SampleSet,
    join_arrays,
    read_prompts,
    sample_many,
    sample_pipeline,
)
from smoothcache.generation import folder as folder_module
from smoothcache.generation.folder import SampleFolder
from smoothcache.generation.lock import locked
from smoothcache.generation.shards import divide, share_of
from smoothcache.metrics import read_images


def make(folder: Path, num_samples: int = 11, sample: Any = noise, **options: Any) -> Manifest:
    options = {"batch_size": 2, "shard_size": 4, "progress": False, **options}
    return sample_many(sample, folder, num_samples, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_all_samples_without_overlap(size: int) -> None:
    shards = divide(num_samples=53, batch_size=2, shard_size=6)
    mine = [share_of(shards, rank, size) for rank in range(size)]
    numbers = [i for shards in mine for shard in shards for i in shard.samples]
    assert sorted(numbers) == list(range(53))
    assert max(map(len, mine)) - min(map(len, mine)) <= 1


def test_every_sample_is_of_its_own_number(tmp_path: Path) -> None:
    manifest = make(tmp_path / "run")
    assert [x.count for x in manifest.files or ()] == [4, 4, 3]
    images = torch.cat(list(read_images(tmp_path / "run" / "samples")))
    expected = (255 * noise(range(11))).round().to(torch.uint8)
    assert torch.equal(images, expected)
    opened = SampleSet.open(tmp_path / "run")
    numbers = torch.cat([numbers for _, numbers in opened.batches()])
    assert torch.equal(torch.cat([x for x, _ in opened.batches()]), expected)
    assert numbers.tolist() == list(range(11))


def test_one_array_for_the_evaluator_of_adm(tmp_path: Path) -> None:
    make(tmp_path / "run")
    join_arrays(tmp_path / "run", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        whole = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(whole, torch.cat(list(read_images(tmp_path / "run" / "samples"))))


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from support.folders import content, noise
from smoothcache.generation import sample_many
from smoothcache.generation.manifest import Manifest

torch.set_num_threads(1)
rng, path = random.Random(int(sys.argv[2])), Path(sys.argv[1])

def slowly(numbers):
    time.sleep(0.004)
    return noise(numbers)

def run(layout):
    sample_many(slowly, path / layout, 60, batch_size=2, layout=layout, progress=False)

for layout in ("npz", "png"):
    kills = 0
    while True:
        child = os.fork()
        if not child:
            run(layout)
            os._exit(0)
        time.sleep(rng.uniform(0.005, 0.08) * (1 + kills / 4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        done = (path / layout / "manifest.json").is_file()
        if done and Manifest.load(path / layout).is_complete:
            break
    run(layout)
    print(layout, kills)
"""


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    script, tests = tmp_path / "driver.py", str(Path(__file__).parents[1])
    script.write_text(f"import sys\nsys.path[:0] = {[tests, *sys.path]!r}\n{DRIVER}")
    seed = random.randrange(1000)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "killed", str(seed)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    kills = dict(line.split() for line in done.stdout.splitlines())
    assert sum(map(int, kills.values())) >= 4, f"seed {seed}: {kills}"
    for layout in ("npz", "png"):
        sample_many(noise, tmp_path / layout, 60, batch_size=2, layout=layout, progress=False)
        killed = content(tmp_path / "killed" / layout)
        assert killed == content(tmp_path / layout), f"seed {seed}"


def test_what_was_written_is_not_generated_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def failing(numbers: Sequence[int]) -> Tensor:
        if 8 in numbers:
            raise KeyboardInterrupt
        seen.extend(numbers)
        return noise(numbers)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", sample=failing)
    assert seen == list(range(8))

    def rest(numbers: Sequence[int]) -> Tensor:
        seen.extend(numbers)
        return noise(numbers)

    make(tmp_path / "run", sample=rest)
    assert seen == list(range(11))
    make(tmp_path / "whole")
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    make(tmp_path / "run", sample=lambda numbers: pytest.fail("everything was there"))


def test_a_file_that_has_gone_is_generated_again(tmp_path: Path) -> None:
    make(tmp_path / "run")
    before = content(tmp_path / "run")
    (tmp_path / "run" / "samples" / "00000004-00000007.npz").unlink()
    with pytest.raises(FileFormatError, match=r"lacks '00000004-00000007.npz'; run the command"):
        SampleSet.open(tmp_path / "run")
    make(tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_damaged_files_are_refused_when_they_are_read(tmp_path: Path) -> None:
    make(tmp_path / "run")
    file = tmp_path / "run" / "samples" / "00000004-00000007.npz"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    opened = SampleSet.open(tmp_path / "run")
    with pytest.raises(FileFormatError, match=r"00000004-00000007.npz: the file is damaged"):
        list(opened.batches())


def test_doubled_shards_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "run")
    shard = tmp_path / "run" / "samples" / "00000000-00000003.npz"
    (shard.parent / "copy.npz").write_bytes(shard.read_bytes())
    with pytest.raises(FileFormatError, match=r"holds 'copy.npz', which the manifest does not"):
        SampleSet.open(tmp_path / "run")
    (shard.parent / "copy.npz").unlink()
    manifest = tmp_path / "run" / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["files"].append(entries["files"][0])
    manifest.write_text(json.dumps(entries))
    with pytest.raises(FileFormatError, match="begins with sample 0, not 11"):
        SampleSet.open(tmp_path / "run")


def test_a_run_that_is_not_complete_cannot_be_read(tmp_path: Path) -> None:
    def failing(numbers: Sequence[int]) -> Tensor:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make(tmp_path / "run", sample=failing)
    with pytest.raises(FileFormatError, match="is not complete: run the command"):
        SampleSet.open(tmp_path / "run")
    with pytest.raises(FileFormatError, match=r"has no manifest.json"):
        SampleSet.open(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"seed \(here 1, there 0\)"),
        ({"settings": {"steps": 5}}, r"steps \(here 5, there None\)"),
        ({"batch_size": 4}, r"batch_size \(here 4, there 2\)"),
        ({"inputs": [1, 2]}, r"inputs \(here \[1, 2\], there \[\]\)"),
        ({"num_samples": 12}, r"num_samples \(here 12, there 11\)"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    make(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(InvalidArgumentError, match=f"holds another run, which differs in {named}"):
        make(tmp_path / "run", **changed)
    assert content(tmp_path / "run") == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photographs.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match=r"holds 'photographs.txt', but no manifest"):
        make(tmp_path)


def test_a_second_process_in_one_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(InvalidArgumentError, match="another process is writing into"),
    ):
        make(tmp_path)
    make(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 6

    def write(path: Any, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        document.write_atomically(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "write_atomically", write)
        with pytest.raises(DiskFullError, match="free some space and run the same command again"):
            make(tmp_path / "run", num_samples=20)
    assert len(list((tmp_path / "run" / "records").iterdir())) == 3
    make(tmp_path / "run", num_samples=20)
    make(tmp_path / "whole", num_samples=20)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    run = SampleFolder(tmp_path, Manifest(4, 2, 2, "png"))
    run.begin()
    (tmp_path / "samples" / ".0123.tmp").write_bytes(b"half")
    assert len(run.begin()) == 2
    assert not list((tmp_path / "samples").iterdir())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda numbers: torch.rand(1, 3, 4, 4), "a tensor of 2 samples for as many numbers"),
        (lambda numbers: torch.rand(len(numbers), 2, 99), "holds images .* take the layout 'wav'"),
        (lambda numbers: torch.full((len(numbers), 3, 4, 4), torch.nan), "NaN or infinity"),
    ],
)
def test_samples_that_cannot_be_written_are_refused(
    made: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(tmp_path, sample=made)


def test_clips_are_named_as_vbench_asks_for(tmp_path: Path) -> None:
    def clips(numbers: Sequence[int]) -> Tensor:
        images = noise(numbers)
        return torch.stack([images, 1 - images, images], dim=1)

    options: dict[str, Any] = {"layout": "gif", "shard_size": 2}
    make(tmp_path / "run", 5, clips, inputs=["a cat", "a dog"], **options)
    names = sorted(x.name for x in (tmp_path / "run" / "samples").iterdir())
    assert names == ["a cat-0.gif", "a cat-1.gif", "a cat-2.gif", "a dog-0.gif", "a dog-1.gif"]
    (first, _), *_ = SampleSet.open(tmp_path / "run").batches()
    assert first.shape == (1, 3, 3, 4, 6) and first.dtype == torch.uint8
    with pytest.raises(InvalidArgumentError, match="'a cat' would be the name of two files"):
        make(tmp_path / "twice", 2, clips, inputs=["a cat", "a cat"], **options)
    with pytest.raises(InvalidArgumentError, match=r"no file name|names of their own"):
        make(tmp_path / "slash", 2, clips, inputs=["a/b"], **options)


def test_sounds_have_the_names_of_their_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('{"97151": "a dog barks", "12534": "rain"}')
    prompts, names = read_prompts(file)

    def sounds(numbers: Sequence[int]) -> Tensor:
        return 2 * noise(numbers).flatten(2)[:, :2] - 1

    options: dict[str, Any] = {"layout": "wav", "sampling_rate": 8000, "shard_size": 2}
    manifest = make(tmp_path / "run", 2, sounds, inputs=prompts, names=names, **options)
    assert [x.file for x in manifest.files or ()] == ["97151.wav", "12534.wav"]
    assert manifest.input_of(3) == "rain"
    (first, _), *_ = SampleSet.open(tmp_path / "run").batches()
    assert torch.allclose(first, sounds([0]), atol=1 / 32767)
    with pytest.raises(InvalidArgumentError, match="sounds need a sampling_rate"):
        make(tmp_path / "none", 2, sounds, layout="wav")


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (build_pipeline, {"class_labels": (0, 3, 5)}),
        (build_audio_pipeline, {"prompts": ("a", "b c")}),
        (build_clip_pipeline, {"prompts": ("red", "a blue circle")}),
    ],
)
@pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")  # torchsde, of rounding
def test_noise_does_not_depend_on_the_batch(build: Any, inputs: dict[str, Any]) -> None:
    sampler = PipelineSampler(build(), **inputs, num_steps=3)
    alone = torch.cat([sampler(i) for i in range(3)])
    assert torch.allclose(sampler.batch([0, 1, 2]), alone, atol=1e-4)
    assert torch.equal(sampler.batch([0, 1, 2]), sampler.batch([0, 1, 2]))


def test_every_sample_of_a_batch_has_its_own_image_and_texts() -> None:
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    pipeline = FluxImg2ImgPipeline.from_pipe(tiny.flux())
    pipeline.set_progress_bar_config(disable=True)
    images = tuple(Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    options = {"height": 32, "width": 32, "prompt_2": "a photograph", "strength": 0.5}
    sampler = PipelineSampler(
        pipeline, ("a cat", "a dog"), num_steps=4, options=options, images={"image": images}
    )
    alone = torch.cat([sampler(i) for i in range(2)])
    assert torch.allclose(sampler.batch([0, 1]), alone, atol=1e-4)
    assert torch.allclose(sampler.batch([1]), alone[1:], atol=1e-4)


def test_samples_of_other_arguments_are_another_run(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    pipe = build_pipeline()
    settings: dict[str, Any] = {"progress": False, "layout": "png"}
    base = PipelineSampler(pipe, class_labels=(0,), num_steps=2)
    sample_pipeline(base, tmp_path / "a", 1, **settings)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(InvalidArgumentError, match="differs in solver_settings"):
        sample_pipeline(base, tmp_path / "a", 1, **settings)


def test_a_pipeline_under_a_schedule(tmp_path: Path) -> None:
    pipe = build_pipeline()
    sampler = PipelineSampler(pipe, class_labels=(0, 1, 2), num_steps=4, seed=5)
    schedule = Schedule.uniform(pipe, num_steps=4, interval=2)
    options: dict[str, Any] = {"batch_size": 2, "shard_size": 2, "progress": False}
    manifest, summary = sample_pipeline(sampler, tmp_path / "a", 4, schedule=schedule, **options)
    assert summary is not None and summary.finished == 2 and summary.reused
    settings = manifest.settings or {}
    assert settings["steps"] == 4 and str(settings["weights"]).startswith("sha256:")
    again, nothing = sample_pipeline(sampler, tmp_path / "a", 4, schedule=schedule, **options)
    assert again == manifest and nothing is None
    with pytest.raises(InvalidArgumentError, match=r"differs in schedule \(here None"):
        sample_pipeline(sampler, tmp_path / "a", 4, **options)
