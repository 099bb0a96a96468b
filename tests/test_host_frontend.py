"""Everything the real front end asks for when it starts is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from host.lab import write_tiny_models
from host.process import HostProcess, start_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostProcess]:
    models = write_tiny_models(tmp_path_factory.mktemp("models"))
    with start_host(models=models, template="video_wan2_2_14B_t2v") as running:
        yield running


BOOT = (
    *("/", "/scripts/app.js", "/scripts/api.js", "/users", "/settings", "/extensions", "/object_info", "/features"),
    *("/system_stats", "/i18n", "/jobs", "/queue", "/history", "/global_subgraphs", "/experiment/models"),
    *("/templates/index.json", "/templates/video_wan2_2_14B_t2v.json", "/templates/text_to_video_wan.json"),
    *("/workflow_templates", "/internal/logs/raw", "/internal/folder_paths", "/embeddings", "/models", "/prompt"),
)


@pytest.mark.parametrize("path", BOOT)
def test_a_route_of_the_start_answers(host: HostProcess, path: str) -> None:
    assert host.get(path).status == 200


def test_routes_that_are_not_static_answer_under_api_too(host: HostProcess) -> None:
    for path in ("/users", "/object_info", "/system_stats", "/jobs?limit=1&offset=0", "/settings", "/prompt"):
        assert host.get("/api" + path).status == host.get(path).status == 200


def test_a_bare_address_leads_to_the_official_workflow(host: HostProcess) -> None:
    async def ask() -> tuple[int, str]:
        async with aiohttp.ClientSession() as http, http.get(host.url + "/", allow_redirects=False) as answer:
            return answer.status, answer.headers["Location"]

    assert asyncio.run(ask()) == (302, "/?template=video_wan2_2_14B_t2v")


def test_no_first_run_tour_opens(host: HostProcess) -> None:
    assert host.get("/api/settings").body["Comfy.TutorialCompleted"] is True


def test_a_setting_is_kept(host: HostProcess) -> None:
    assert host.post("/api/settings/Some.Setting", [1, 2]).status == 200
    assert host.get("/api/settings/Some.Setting").body == [1, 2]


def test_a_user_file_is_kept_and_cannot_leave_its_folder(host: HostProcess) -> None:
    assert host.post("/api/userdata/workflows%2Fmine.json", {"nodes": []}).body == "workflows/mine.json"
    assert host.get("/api/userdata?dir=workflows").body == ["mine.json"]
    assert host.get("/api/userdata/workflows%2Fmine.json").body == {"nodes": []}
    assert host.post("/api/userdata/..%2F..%2Fout.json", {}).status == 403


def test_the_packs_scripts_are_listed_and_served(host: HostProcess) -> None:
    scripts = [path for path in host.get("/api/extensions").body if path.startswith("/extensions/vram-headroom/")]
    assert scripts
    assert {host.get(path).status for path in scripts} == {200}


def test_lists_of_files_are_those_of_the_models_folder(host: HostProcess) -> None:
    info = host.get("/api/object_info/VAELoader").body["VAELoader"]
    assert info["input"]["required"]["vae_name"][0] == ["tiny_wan_2.1_vae.safetensors", "pixel_space"]
    assert host.get("/api/models/vae").body == ["tiny_wan_2.1_vae.safetensors"]
    assert host.get("/api/object_info/NoSuchNode").body == {}


def test_a_browser_is_greeted_with_its_id_and_told_the_features(host: HostProcess) -> None:
    async def talk() -> tuple[Any, Any]:
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(host.url + "/ws", params={"clientId": "one"}) as socket,
        ):
            first = await socket.receive_json()
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            return first, await socket.receive_json()

    first, second = asyncio.run(talk())
    assert first == {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "one"}}
    assert second["type"] == "feature_flags"
    assert second["data"]["supports_preview_metadata"] is True


def test_every_node_of_the_official_wan_workflows_that_0_33_knows_is_described(host: HostProcess) -> None:
    info = host.get("/api/object_info").body
    assert {"WanImageToVideo", "WanVaceToVideo", "SaveVideo", "KSamplerAdvanced", "ComfySwitchNode"} <= set(info)
    assert all(set(entry) >= {"input", "output", "name", "category", "output_node"} for entry in info.values())


def test_a_picture_that_is_uploaded_can_be_loaded(host: HostProcess, tmp_path: Path) -> None:
    async def upload() -> Any:
        form = aiohttp.FormData()
        form.add_field("image", b"\x89PNG", filename="mine.png", content_type="image/png")
        async with aiohttp.ClientSession() as http, http.post(host.url + "/api/upload/image", data=form) as answer:
            return await answer.json()

    assert asyncio.run(upload()) == {"name": "mine.png", "subfolder": "", "type": "input"}
    assert "mine.png" in host.get("/api/object_info/LoadImage").body["LoadImage"]["input"]["required"]["image"][0]
