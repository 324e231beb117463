"""Schedules and calibrations on a stand-in hub: pushed, read back, refused, hostile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hub import Hub, stand_in_hub
from support.made_up import MODEL, calibration_of, layers_of
from support.pages import HOSTILE

from smoothcache import Calibration, Row, Schedule, SearchedSchedule, SearchResult
from smoothcache.errors import FileFormatError, HubError, InvalidArgumentError
from smoothcache.hub.card import plain
from smoothcache.schedule import card
from smoothcache.searching.result import Measured

NAME = "me/flux-50-3x"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with stand_in_hub() as opened:
        yield opened


@pytest.fixture
def at(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    """Where to read from, with a cache of its own."""
    return {"endpoint": hub.address, "token": False, "cache_dir": tmp_path / "cache"}


def a_schedule(**others: Any) -> Schedule:
    layers = layers_of(2)
    return Schedule(
        6,
        {layer.path: Row.uniform(6, 2) for layer in layers},
        layers,
        model=MODEL,
        solver="FlowMatchEulerDiscreteScheduler",
        compute=0.5,
        provenance={"planner": "uniform"},
        **others,
    )


def pushed(hub: Hub, what: Schedule | Calibration, name: str = NAME, **others: Any) -> str:
    return what.push_to_hub(name, endpoint=hub.address, token="hf_secret", **others)


def test_a_schedule_comes_back_as_it_was(hub: Hub, at: dict[str, Any]) -> None:
    schedule = a_schedule(quality={"psnr": 31.5})
    address = pushed(hub, schedule, base_model="black-forest-labs/FLUX.1-dev", private=True)
    assert address == f"{hub.address}/{NAME}"
    assert set(hub.files[NAME]) == {"schedule.json", "README.md"}
    assert hub.tokens == {"Bearer hf_secret"} and b"hf_secret" not in b"".join(
        hub.files[NAME].values()
    )
    assert Schedule.from_pretrained(NAME, **at) == schedule
    assert Schedule.from_pretrained(NAME, revision=hub.commit, **at) == schedule
    pushed(hub, replace(schedule, compute=0.4))
    assert Schedule.from_pretrained(NAME, **at).compute == 0.4


def test_a_calibration_comes_back_as_it_was(hub: Hub, at: dict[str, Any]) -> None:
    calibration = calibration_of(0.25)
    pushed(hub, calibration)
    again = Calibration.from_pretrained(NAME, **at)
    assert again.layers == calibration.layers
    np.testing.assert_array_equal(again.errors, calibration.errors)
    assert "| ffn | 2 | 0.25 | 0.25 | 0.25 |" in hub.files[NAME]["README.md"].decode()


def test_what_was_downloaded_is_there_offline(
    hub: Hub, at: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    pushed(hub, a_schedule())
    Schedule.from_pretrained(NAME, **at)
    asked = len(hub.asked)
    assert Schedule.from_pretrained(NAME, local_files_only=True, **at) == a_schedule()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Schedule.from_pretrained(NAME, **at) == a_schedule()
    assert len(hub.asked) == asked
    with pytest.raises(HubError, match=r"not downloaded before, and the hub is not asked"):
        Calibration.from_pretrained(NAME, **at)


def test_a_local_folder_is_read_as_a_repository(tmp_path: Path) -> None:
    a_schedule().save(tmp_path / card.FILE_KIND.name)
    assert Schedule.from_pretrained(str(tmp_path)) == a_schedule()
    with pytest.raises(HubError, match=r"holds no calibration.*It holds a schedule: Schedule"):
        Calibration.from_pretrained(str(tmp_path))


def test_repositories_of_another_kind_are_refused(hub: Hub, at: dict[str, Any]) -> None:
    pushed(hub, a_schedule())
    with pytest.raises(HubError, match=r"holds no calibration.*Schedule\.from_pretrained"):
        Calibration.from_pretrained(NAME, **at)
    hub.files["me/model"] = {"config.json": b"{}"}
    with pytest.raises(HubError, match=r"'me/model' holds no schedule: it has no schedule.json"):
        Schedule.from_pretrained("me/model", **at)
    with pytest.raises(HubError, match="no repository of that name"):
        Schedule.from_pretrained("me/none", **at)
    with pytest.raises(HubError, match="no revision 'v9'"):
        Schedule.from_pretrained(NAME, revision="v9", **at)


def test_a_hub_that_cannot_be_reached_or_refuses(hub: Hub, at: dict[str, Any]) -> None:
    pushed(hub, a_schedule())
    hub.refuses = 403
    with pytest.raises(HubError, match="token that may write"):
        pushed(hub, a_schedule())
    nowhere = {**at, "endpoint": "http://127.0.0.1:9"}
    with pytest.raises(HubError, match="cannot be reached"):
        Schedule.from_pretrained(NAME, **nowhere)
    with pytest.raises(HubError, match="cannot be reached"):
        a_schedule().push_to_hub(NAME, endpoint="http://127.0.0.1:9", token="x")


def test_sizes_are_bounded(hub: Hub, at: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(hub, a_schedule())
    hub.claimed = 10**12
    with pytest.raises(HubError, match="has 1000000000000 bytes, more than the 67108864"):
        Schedule.from_pretrained(NAME, **at)
    assert not [x for x in hub.asked if x.startswith("GET")], "nothing was downloaded"
    hub.claimed = None
    monkeypatch.setattr(Schedule, "_file_kind", replace(card.FILE_KIND, most_bytes=100))
    with pytest.raises(HubError, match="more than the 100 that are read"):
        Schedule.from_pretrained(NAME, **at)
    with pytest.raises(HubError, match="more than the 100 that are read"):
        a_schedule().save(at["cache_dir"].parent / card.FILE_KIND.name)
        Schedule.from_pretrained(str(at["cache_dir"].parent))


def test_a_size_that_is_not_told_is_refused(hub: Hub, at: dict[str, Any]) -> None:
    pushed(hub, a_schedule())
    hub.hides_sizes = True
    with pytest.raises(HubError, match="does not say how large"):
        Schedule.from_pretrained(NAME, **at)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[[[[", b"\x80\x04pickle", b'{"format": "smoothcache.schedule", "version": 99}'],
)
def test_what_is_read_is_checked(hub: Hub, at: dict[str, Any], data: bytes) -> None:
    hub.files[NAME] = {"schedule.json": data, "calibration.safetensors": data}
    with pytest.raises(FileFormatError):
        Schedule.from_pretrained(NAME, **at)
    with pytest.raises(FileFormatError):
        Calibration.from_pretrained(NAME, **at)


@pytest.mark.parametrize(
    "name",
    ["flux", "../../etc", "me/..", "/etc/passwd", "me/a/b", "me/a b", "http://x/y", "", "a" * 300],
)
def test_names_that_are_none_are_refused(
    hub: Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from where no name is that of a folder
    with pytest.raises(InvalidArgumentError, match="owner/name"):
        pushed(hub, a_schedule(), name)
    with pytest.raises(InvalidArgumentError, match=r"owner/name|branch, tag or commit"):
        Schedule.from_pretrained(name, endpoint=hub.address)
    assert not hub.asked
    with pytest.raises(InvalidArgumentError, match="no branch, tag or commit"):
        Schedule.from_pretrained(NAME, revision="../main", endpoint=hub.address)


def test_a_schedule_has_a_card(hub: Hub) -> None:
    pushed(
        hub,
        a_schedule(),
        base_model="black-forest-labs/FLUX.1-dev",
        base_revision="abc123",
        settings={"resolution": "1024 x 768", "dtype": "bfloat16"},
        prompts=["a cat", "a dog"],
        seeds="0 to 7",
        command="smoothcache search black-forest-labs/FLUX.1-dev --speedup 3",
        license="apache-2.0",
    )
    text = hub.files[NAME]["README.md"].decode()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    metadata = {
        key: json.loads(value) for key, value in (x.split(": ", 1) for x in head.split("\n"))
    }
    assert metadata["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert metadata["library_name"] == "smoothcache" and metadata["license"] == "apache-2.0"
    assert "smoothcache-schedule" in metadata["tags"]
    for word in ("ToyDiT", "0123456789abcdef", "abc123", "1024 x 768", "a dog", "0 to 7"):
        assert word in body
    assert "50.0% of the MACs" in body and f'from_pretrained("{NAME}")' in body
    assert "Any resolution other than 1024 x 768" in body
    assert "The guidance is not stated" in body and "has no figure of it" in body
    assert "```bash\nsmoothcache search" in body


def test_a_searched_schedule_has_its_front_and_baselines_on_the_card(hub: Hub) -> None:
    best = Measured("every 2nd step", 0.5, 0.1, 0.2)
    result = SearchResult(best, (Measured("3 steps", 0.5, 0.3, 0.4),), (best,), 3, 2.0, "pays")
    layers = layers_of(1)
    rows = {x.path: Row.uniform(6, 2) for x in layers}
    pushed(hub, SearchedSchedule(6, rows, layers, quality={"error": 0.1}, result=result))
    body = hub.files[NAME]["README.md"].decode()
    assert "| 3 steps | validation samples | 50.0% | 0.3000 | 0.4000 |" in body
    assert "| every 2nd step | training samples |" in body and "no figure of it" not in body


def test_hostile_names_are_only_text_on_a_card(hub: Hub) -> None:
    hostile = f"{HOSTILE}\n# heading [link](http://x) ![i](http://y) | cell | ``` ~~~ {'x' * 999}"
    layers = layers_of(1)
    schedule = Schedule(
        4,
        {x.path: Row.uniform(4, 2) for x in layers},
        layers,
        model=replace(MODEL, class_name=hostile),
        solver=hostile,
        provenance={hostile: hostile},
        quality={hostile: 1.0},
    )
    pushed(
        hub,
        schedule,
        base_model=hostile,
        settings={hostile: hostile},
        prompts=[hostile] * 50,
        seeds=hostile,
        command=f"{hostile}\n```\n<script>",
    )
    text = hub.files[NAME]["README.md"].decode()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert all(json.loads(line.split(": ", 1)[1]) for line in head.split("\n"))
    assert len(text) < 40_000
    code = re.search(r"^(`{3,})bash\n.*?^\1$", body, re.MULTILINE | re.DOTALL)
    assert code and body.endswith(f"{code[0]}\n"), "nothing within ends the block of code"
    outside = body.replace(code[0], "")
    assert "<" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    assert not re.search(r"^# heading", outside, re.MULTILINE)
    assert "and 10 more" in outside


def test_plain_text() -> None:
    assert plain("a\n b") == "a b" and plain("<b>") == "&lt;b&gt;" and plain("a|b") == "a\\|b"
