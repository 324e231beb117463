"""The options that all commands share: what reaches the pipeline, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_commands import refused, run, succeed
from PIL import Image
from support.tiny_pipeline import build_clip_pipeline, build_pipeline

from examples import tiny
from smoothcache import InvalidArgumentError, MissingPackageError, Schedule
from smoothcache.cli import options
from smoothcache.cli.options import Setup
from smoothcache.cli.sources import images_of
from smoothcache.diffusers_io import preparing
from smoothcache.diffusers_io.call_arguments import call_arguments
from smoothcache.diffusers_io.preparing import Preparation, prepared_pipeline

SHARED = (
    *("calibrate", "search", "generate", "compare", "benchmark", "inspect", "doctor"),
    *("sample", "evaluate"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines on disk: DiT, FLUX, clips."""
    folder = tmp_path_factory.mktemp("options")
    build_pipeline().save_pretrained(folder / "dit")
    tiny.flux().save_pretrained(folder / "flux")
    build_clip_pipeline(depth=1).save_pretrained(folder / "clips")
    return folder


@pytest.mark.parametrize("command", SHARED)
def test_commands_share_one_set_of_options(command: str) -> None:
    from typer.main import get_command

    from smoothcache.cli.app import app

    group: Any = get_command(app)
    given = {x for one in group.commands[command].params for x in one.opts}
    wanted = {f"--{name.replace('_', '-')}" for name in vars(Setup())}
    assert wanted <= given and {"--config", "--save-config"} <= given


def test_what_is_asked_for_reaches_the_pipeline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    calls: list[dict[str, Any]] = []
    made = FluxPipeline.__call__

    def call(self: Any, **given: Any) -> Any:
        calls.append(given)
        return made(self, **given)

    call.__signature__ = __import__("inspect").signature(made)  # type: ignore[attr-defined]
    call.__annotations__, call.__wrapped__ = made.__annotations__, made  # type: ignore[attr-defined]
    monkeypatch.setattr(FluxPipeline, "__call__", call)
    (prompts := tmp_path / "p.txt").write_text("a cat\na dog\n")
    common = ("--steps", 3, "--height", 32, "--width", 48, "--prompt", "a bird")
    more = ("--prompts", prompts, "--negative-prompt", "blur", "--call", "true_cfg_scale=2")
    curves = tmp_path / "c.safetensors"
    succeed("calibrate", folder / "flux", "-o", curves, "--samples", 3, *common, *more)
    assert [x["prompt"] for x in calls[-3:]] == ["a bird", "a cat", "a dog"]
    assert {(x["height"], x["width"]) for x in calls} == {(32, 48)}
    assert calls[-1]["negative_prompt"] == "blur" and calls[-1]["true_cfg_scale"] == 2.0
    plan = tmp_path / "s.json"
    succeed("plan", curves, "--alpha", 10, "-o", plan)
    succeed("generate", folder / "flux", "--schedule", plan, "-o", tmp_path, *common, *more)
    assert len(list(tmp_path.glob("*.png"))) == 3, "one for each prompt"
    with Image.open(tmp_path / "0000.png") as image:
        assert image.size == (48, 32)
    kinds = {x.kind for x in Schedule.load(plan).layers or ()}
    assert "joint_attn" in kinds


def test_images_are_used_in_turn(folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipeline = FluxImg2ImgPipeline.from_pipe(tiny.flux())
    pipeline.set_progress_bar_config(disable=True)
    for i, value in enumerate((0, 255)):
        Image.new("L", (32, 32), value).save(tmp_path / f"{i}.png")
    setup = Setup(prompt=["a cat"], images=[str(tmp_path)], height=32, width=32)
    sampler = setup.sampler(pipeline, 4)
    assert sampler.count == 2
    dark, light, again = (sampler._arguments(i, 4)["image"] for i in range(3))
    assert dark.getpixel((0, 0)) == (0, 0, 0) and light.getpixel((0, 0)) == (255, 255, 255)
    assert again is dark and sampler(0).shape == (1, 3, 32, 32)
    named = images_of(pipeline, [f"image={tmp_path}"])
    assert list(named) == ["image"] and len(named["image"]) == 2
    made_up = Setup(height=32, width=32).any_sampler(pipeline, 2)
    assert made_up._arguments(0, 2)["image"].size == (32, 32)


@pytest.mark.parametrize("strength", [0.35, 0.7, 1.0, None])
def test_a_schedule_fits_a_pipeline_that_starts_from_images(
    strength: float | None, tmp_path: Path
) -> None:
    from diffusers import FluxImg2ImgPipeline

    FluxImg2ImgPipeline.from_pipe(tiny.flux()).save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in" / "a.png")
    common = ("--height", 32, "--width", 32, "--images", tmp_path / "in", "--prompt", "a cat")
    common += ("--call", f"strength={strength}") if strength else ()
    curves, plan = tmp_path / "c.safetensors", tmp_path / "s.json"
    run_here = ("--samples", 1, "--steps", 13, "--max-gap", 1)
    succeed("calibrate", tmp_path / "model", "-o", curves, *run_here, *common)
    succeed("plan", curves, "--alpha", 10, "-o", plan)
    assert Schedule.load(plan).num_steps < 13 or strength == 1.0
    options = ("--schedule", plan, "-o", tmp_path / "out", "--json")
    told = json.loads(succeed("generate", tmp_path / "model", *options, *common).stdout)
    assert told["finished"] == 1 and told["reused"] > 0 and told["recomputed"] == {}


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipeline = FluxImg2ImgPipeline.from_pipe(tiny.flux())
    with pytest.raises(InvalidArgumentError, match="takes no images"):
        images_of(build_pipeline(), [str(tmp_path)])
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        images_of(pipeline, [str(tmp_path / "none")])
    with pytest.raises(InvalidArgumentError, match="there is no image in"):
        images_of(pipeline, [str(tmp_path)])
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(InvalidArgumentError, match=r"x.png' cannot be read"):
        images_of(pipeline, [str(tmp_path)])
    with pytest.raises(InvalidArgumentError, match="takes no 'imag'; did you mean 'image'"):
        images_of(pipeline, [f"imag={tmp_path}"])


class Pipeline:
    def __call__(
        self,
        prompt: str | list[str],
        strength: float = 0.3,
        frames: int | None = None,
        sizes: list[int] | None = None,
        pair: tuple[int, int] = (0, 0),
        clean: bool = True,
        prompt_2: str | list[str] | None = None,
        options: dict[str, Any] | None = None,
        embeds: torch.Tensor | None = None,
        untyped=None,  # type: ignore[no-untyped-def]
    ) -> None: ...


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("strength=1", 1.0),
        ("frames=None", None),
        ("frames=3", 3),
        ("sizes=[1, 2]", [1, 2]),
        ("pair=[4, 5]", (4, 5)),
        ("clean=False", False),
        ("prompt_2=12", "12"),
        ('prompt_2=["a"]', ["a"]),
        ("prompt_2=a = b", "a = b"),
        ('options={"scale": 0.5}', {"scale": 0.5}),
        ("untyped=2.5", 2.5),
        ("untyped=words", "words"),
    ],
)
def test_arguments_have_the_types_of_the_signature(text: str, value: Any) -> None:
    (found,) = call_arguments(Pipeline(), [text]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strength", "expected KEY=VALUE"),
        ("strength=a", "expected a number, got 'a'"),
        ("frames=1.5", "expected a whole number or None, got '1.5'"),
        ("clean=1", "expected true or false"),
        ("sizes=[1, 2.5]", "expected a list of whole numbers or None"),
        ("pair=[1]", "expected a list of whole numbers"),
        ("embeds=1", "None"),
        ("strenght=1", "takes no 'strenght'; did you mean 'strength'? it takes 'strength', 'fr"),
        ("prompt=a", "'prompt' is set by --prompt"),
        ("output_type=pil", "is set by smoothcache"),
    ],
)
def test_arguments_that_are_refused(text: str, said: str) -> None:
    if "output_type" in text:
        said = "is set by smoothcache"
    with pytest.raises(InvalidArgumentError) as error:
        call_arguments(Pipeline(), [text])
    assert said in str(error.value)


def test_an_argument_twice_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="given twice"):
        call_arguments(Pipeline(), ["strength=1", "strength=2"])


def test_another_scheduler(folder: Path) -> None:
    how = Preparation(scheduler="DPMSolverMultistepScheduler:solver_order=3,use_karras_sigmas=true")
    scheduler = prepared_pipeline(str(folder / "dit"), how).scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert scheduler.config.solver_order == 3 and scheduler.config.use_karras_sigmas is True
    for text, said in {
        "NoScheduler": "no noise scheduler 'NoScheduler'; of the kind of DDIMScheduler it has 'DD",
        "DiTPipeline": "no noise scheduler 'DiTPipeline'",
        "DDIMScheduler:steps=3": "takes no 'steps'; it takes 'num_train_timesteps'",
        "DDIMScheduler:eta": "expected DDIMScheduler:KEY=VALUE",
    }.items():
        with pytest.raises(InvalidArgumentError) as error:
            prepared_pipeline(str(folder / "dit"), Preparation(scheduler=text))
        assert said in str(error.value)


def test_compiling_blocks_or_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux = prepared_pipeline(str(folder / "flux"), Preparation(compile="blocks")).transformer
    assert flux._compiled_call_impl is None
    assert all(x._compiled_call_impl is not None for x in flux.transformer_blocks)
    whole = prepared_pipeline(str(folder / "flux"), Preparation(compile="model")).transformer
    assert whole._compiled_call_impl is not None
    with pytest.raises(InvalidArgumentError, match="use --compile model"):
        prepared_pipeline(str(folder / "clips"), Preparation(compile="blocks"))


def test_offloading_needs_an_accelerator(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="runs on the CPU"):
        prepared_pipeline(str(folder / "dit"), Preparation(offload="model"))


def test_offloading_asks_the_pipeline() -> None:
    asked: list[Any] = []

    class Offloaded:
        def enable_model_cpu_offload(self, device: Any) -> None:
            asked.append(("model", device))

        def enable_sequential_cpu_offload(self, device: Any) -> None:
            asked.append(("sequential", device))

        def enable_group_offload(self, onload_device: Any, offload_type: str) -> None:
            asked.append((offload_type, str(onload_device)))

    for how in ("model", "sequential", "group"):
        preparing.offload(Offloaded(), how, "cuda")
    assert asked == [("model", "cuda"), ("sequential", "cuda"), ("leaf_level", "cuda")]
    with pytest.raises(InvalidArgumentError, match="--offload group"):
        preparing.offload(object(), "group", "cuda")


def test_quantising_names_the_missing_package(folder: Path) -> None:
    missing = [x for x, (name, _) in preparing.QUANTISERS.items() if not _is_installed(name)]
    for backend in missing:
        with pytest.raises(MissingPackageError, match=f"--quantize {backend} needs .*pip install"):
            prepared_pipeline(str(folder / "dit"), Preparation(quantize=backend))
    with pytest.raises(InvalidArgumentError, match="no backend 'magic'; there are 'bitsandbytes"):
        prepared_pipeline(str(folder / "dit"), Preparation(quantize="magic"))


def test_quantising_is_passed_on_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    asked: dict[str, Any] = {}
    monkeypatch.setattr(preparing, "find_spec", lambda _: True)
    monkeypatch.setattr(diffusers, "PipelineQuantizationConfig", lambda **x: asked.update(x))
    preparing.quantisation("torchao:quant_type=int4wo", ["transformer"])
    assert asked == {
        "quant_backend": "torchao",
        "quant_kwargs": {"quant_type": "int4wo"},
        "components_to_quantize": ["transformer"],
    }


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def test_adapters_are_loaded_with_their_scales(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import FluxPipeline
    from peft.utils import get_peft_model_state_dict

    source = tiny.flux()
    source.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    )
    state = get_peft_model_state_dict(source.transformer)
    FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    (file,) = (tmp_path / "lora").iterdir()
    how = Preparation(loras=(f"{tmp_path / 'lora'}:0.5", str(file)))
    pipeline = prepared_pipeline(str(folder / "flux"), how)
    assert pipeline.get_active_adapters() == ["lora_0", "lora_1"]
    scaling = pipeline.transformer.transformer_blocks[0].attn.to_q.scaling
    assert scaling["lora_0"] == pytest.approx(0.5 * scaling["lora_1"])
    with pytest.raises(InvalidArgumentError, match="DiTPipeline takes no LoRA"):
        prepared_pipeline(str(folder / "dit"), Preparation(loras=("x",)))
    with pytest.raises(InvalidArgumentError, match="no such file or folder"):
        prepared_pipeline(str(folder / "flux"), Preparation(loras=(str(tmp_path / "no"),)))


def test_a_file_holds_the_same_options(folder: Path, tmp_path: Path) -> None:
    config, written = tmp_path / "run.toml", tmp_path / "used.toml"
    config.write_text(
        f"""
        model = "{folder / "dit"}"
        class-label = [1, 2]
        seed = 3
        [calibrate]
        samples = 2
        steps = 4
        output = "{tmp_path / "c.safetensors"}"
        [compare]
        schedule = ["not read here"]
        """
    )
    result = succeed(
        *("calibrate", "--config", config, "--steps", 3, "--save-config", written, "--json")
    )
    told = json.loads(result.stdout)
    assert told["samples"] == 2 and told["steps"] == 3, "the command line comes first"
    text = written.read_text()
    assert 'class-label = [1, 2]\nseed = 3\n\n[calibrate]\noutput = "' in text
    assert "steps = 3" in text and "samples = 2" in text and "json" not in text
    (tmp_path / "c.safetensors").rename(tmp_path / "first.safetensors")
    succeed("calibrate", "--config", written)
    again = (tmp_path / "c.safetensors").read_bytes()
    assert len(again) == (tmp_path / "first.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class-lable = 1", "there is no option 'class-lable'; did you mean 'class-label'"),
        ("[calibrate]\nclass_lable = 1", "no option 'calibrate.class_lable'"),
        ("[frobnicate]\nx = 1", "there is no command 'frobnicate'"),
        ("[generate]\nalpha = 1", "there is no option 'generate.alpha'"),
        ("seed = 1979-05-27", "must be a text, a number, true or false, or a list"),
        ("seed = -1", "seed"),
        ("seed = 'x'", "seed"),
        ("seed = ", "not valid TOML"),
        ("dtype = 'float8'", "dtype"),
        ("as_json = true", "there is no option 'as_json'"),
    ],
)
def test_files_of_options_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (config := tmp_path / "run.toml").write_text(text)
    line = refused("calibrate", "x", "-o", tmp_path / "c", "--class-label", 1, "--config", config)
    assert said in line


def test_a_file_of_options_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (config := tmp_path / "run.toml").write_bytes(b"prompt = ['caf\xe9']")
    assert "is not UTF-8 (byte 14)" in refused("doctor", "x", "--config", config)
    assert "there is no file" in refused("doctor", "x", "--config", tmp_path / "none.toml")
    assert "no folder" in refused("doctor", "x", "--save-config", tmp_path / "none" / "x.toml")


def test_texts_survive_a_file_of_options(tmp_path: Path) -> None:
    hostile = 'a "quoted" \\ text\nwith\x7f two lines and é = [1]'
    written = options._toml({"prompt": [hostile]}, {"prompt": None}, {"prompt"}, "generate")
    (path := tmp_path / "x.toml").write_bytes(written)
    assert options._read_toml(path) == {"prompt": [hostile]}


def test_what_fails_writes_no_file_of_options(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "used.toml"
    refused("inspect", folder / "dit", "--call", "x=1", "--save-config", target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect {dit} --height 32", "--height: DiTPipeline takes no 'height'"),
        ("inspect {dit} --call eta=1", "takes no 'eta'"),
        ("inspect {dit} --negative-prompt x", "takes no 'negative_prompt'"),
        ("inspect {dit} --num-frames 3", "takes no 'num_frames'"),
        ("inspect {dit} --images .", "takes no images"),
        ("inspect {dit} --offload group", "runs on the CPU"),
        ("inspect {dit} --offload disk", "--offload"),
        ("inspect {dit} --lora x", "takes no LoRA"),
        ("inspect {dit} --variant fp16", "cannot be loaded"),
        ("inspect {flux} --height 0", "--height"),
        (
            "generate {flux} -o x --schedule {flux}/model_index.json --prompts x.txt",
            "expected a list",
        ),
        ("inspect {flux} --prompts {flux}/none.txt", "there is no file"),
    ],
)
def test_options_that_do_not_fit_are_refused(command: str, said: str, folder: Path) -> None:
    known = {name: folder / name for name in ("dit", "flux")}
    assert said in refused(*(word.format(**known) for word in command.split()))


def test_doctor_says_what_works(folder: Path) -> None:
    shown = succeed("doctor", folder / "dit", "--no-try-compile").stdout
    for word in ("✓  exactness", "✓  reuse", "as a batch of 2", "next: smoothcache calibrate"):
        assert word in shown
    assert shown.count("\n") < 24, "one screen"
    options = ("--height", 32, "--width", 32, "--prompt", "a cat", "--json")
    told = json.loads(succeed("doctor", folder / "flux", *options).stdout)
    assert told["fine"] is True
    states = {check["name"]: check["state"] for check in told["checks"]}
    assert states["compile"] == states["layers"] == "ok" and states["guidance"] == "note"


def test_doctor_leaves_the_pipeline_as_it_was(folder: Path) -> None:
    from smoothcache.cli import checkup

    pipeline = prepared_pipeline(str(folder / "dit"), Preparation())
    pipeline.set_progress_bar_config(disable=True)
    before = dict(vars(pipeline.transformer))
    sampler = Setup().any_sampler(pipeline, 2)
    assert checkup.is_fine(checkup.examine(pipeline, sampler))
    assert vars(pipeline.transformer).keys() == before.keys()
    assert pipeline.transformer._compiled_call_impl is None
    assert not pipeline.transformer._forward_pre_hooks


def test_doctor_names_what_does_not_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiTPipeline

    def broken(self: Any, class_labels: Any, num_inference_steps: int = 2) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(DiTPipeline, "__call__", broken)
    result = run("doctor", folder / "dit")
    assert result.exit_code == 1
    assert "✗  two steps  RuntimeError: no memory left" in result.stdout
    assert "something does not work" in result.stdout
