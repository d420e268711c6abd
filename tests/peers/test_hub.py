"""A name on the Hugging Face hub loads from the hub's cache, without a connection; its layout is not a way out."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import toy_recognizer

import ser
from ser.errors import ModelFolderError, pip_line

pytest.importorskip("huggingface_hub", reason="needs the extra hub")
ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "a" * 40, "b" * 40

# Loads each NAME or NAME@REVISION; prints the first speaker, or the error.
LOAD = """
import os, socket, sys, ser

def asked(host, *rest, **options):
    print("asked for", host, flush=True)
    os._exit(0)  # at once: the client would try again and again

socket.getaddrinfo = asked
for argument in sys.argv[1:]:
    name, _, revision = argument.partition("@")
    try:
        print(ser.load(name, revision=revision or None).speakers[0])
    except ser.SerError as error:
        print(f"refused: {error}")
"""


def load(cache: Path, *arguments: str, **environment: str) -> str:
    settings = (
        os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment
    )
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=True, cwd=cache)
    return done.stdout.strip()


@pytest.fixture
def cache(tmp_path):
    """The hub's cache with two commits of someone/model, as its client lays it out."""
    home = tmp_path / "cache" / "models--someone--model"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    for commit, speaker in ((OLD, "Old"), (NEW, "New")):
        recognizer = toy_recognizer()
        names = {**recognizer.labels.names, "speaker": [speaker, *recognizer.speakers[1:]]}
        recognizer.labels = replace(recognizer.labels, names=names)
        recognizer.save(tmp_path / commit)
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (tmp_path / commit).iterdir():
            blob = home / "blobs" / f"{commit[:1]}-{file.name}"
            shutil.move(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (home / "refs" / "main").write_text(NEW)
    (home / "refs" / "v1").write_text(OLD)
    return tmp_path / "cache"


def test_a_name_loads_from_the_cache_offline_at_the_branch_tag_or_commit_that_is_asked_for(cache):
    snapshot = str(cache / "models--someone--model/snapshots" / OLD)
    said = load(cache, "someone/model", "someone/model@v1", f"someone/model@{OLD}", snapshot)
    assert said.split() == ["New", "Old", "Old", "Old"]


def test_what_is_not_in_the_cache_is_an_error_that_names_both_possibilities(cache):
    first, *others = load(cache, "someone/model", "someone/other", HF_HUB_OFFLINE="0").splitlines()
    assert first == "New", "no other machine was asked for"
    assert any("asked for" in line for line in others)
    names = ["someone/other", "someone/model@v2", "runs/typo"]
    for name, said in zip(names, load(cache, *names).splitlines(), strict=True):
        short = name.partition("@")[0]
        assert said.startswith(f"refused: {short}: there is no such folder, and the Hugging Face hub"), said
    # A part of a folder, as other programs leave it, is completed.
    (cache / "models--someone--model/snapshots" / OLD / "preprocessor_config.json").unlink()
    assert "asked for" in load(cache, f"someone/model@{OLD}", HF_HUB_OFFLINE="0")
    shutil.rmtree(cache / "models--someone--model/blobs")
    assert load(cache, "someone/model").startswith("refused: ")


def test_without_the_hub_s_client_a_name_is_an_error_that_says_what_to_install(cache, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')")
    said = load(cache, "someone/model", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert pip_line("hub") in said


def test_a_folder_of_that_name_comes_first(cache):
    toy_recognizer().save(cache / "someone" / "model")
    assert load(cache, "someone/model") == "s0"


def test_links_may_lead_to_the_blobs_of_the_same_repository_and_nowhere_else(cache):
    home = cache / "models--someone--model"
    secret = cache / "models--another--model" / "blobs" / "config"
    secret.parent.mkdir(parents=True)
    shutil.copy(home / "snapshots" / NEW / "config.json", secret)
    link = home / "snapshots" / NEW / "config.json"
    link.unlink()
    link.symlink_to(os.path.relpath(secret, link.parent))
    assert "outside the model folder" in load(cache, "someone/model")


@pytest.mark.parametrize(
    "name", ["../model", "/someone/model", "a/b/c", "someone/", "C:\\model", "someone/mo del", ""]
)
def test_what_is_no_name_of_the_hub_is_looked_for_as_a_path_alone(name):
    with pytest.raises(ModelFolderError, match=r"there is no such folder$|is a file|no config"):
        ser.load(name)


def test_a_revision_of_a_folder_is_an_error(tmp_path):
    toy_recognizer().save(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"no revision v1"):
        ser.load(tmp_path / "model", revision="v1")


# ------------------------------------------------------------------------------------ what is fetched

# In the place of the hub's client: what it fetches comes out of the folder HUB, by the patterns of the call.
CLIENT = """
import fnmatch, os, pathlib, shutil

def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
    there = pathlib.Path(os.environ["HUB"]) / name
    here = pathlib.Path("cache") / name.replace("/", "--")
    if not here.exists() and local_files_only:
        raise OSError("not in the cache")
    if not local_files_only:
        here.mkdir(parents=True, exist_ok=True)
        for file in there.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
    return str(here)
"""


@pytest.fixture
def hub(tmp_path):
    """owner/name in a folder that stands for the hub, and a function that runs Python with a client for it."""
    recognizer = toy_recognizer()
    recognizer.save(tmp_path / "hub" / "owner" / "name")
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "huggingface_hub.py").write_text(CLIENT)

    def run(*command: str) -> subprocess.CompletedProcess:
        path = f"{tmp_path / 'client'}{os.pathsep}{ROOT}"
        settings = os.environ | {"PYTHONPATH": path, "HUB": str(tmp_path / "hub")}
        command = (sys.executable, "-W", "ignore", *command)
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    return tmp_path / "hub" / "owner" / "name", run


def as_pickle(folder: Path) -> None:
    """In place of the safetensors two shards of pickles, as the library splits a large model."""
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number in range(2):
        part = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % 2 == number}
        shard = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_a_repository_with_a_pickle_alone_is_said_to_be_one_and_the_line_that_is_advised_works(hub):
    folder, run = hub
    as_pickle(folder)
    said = run("-c", LOAD, "owner/name").stdout
    assert said.startswith("refused: owner/name: the repository on the Hugging Face hub has no model.safetensors")
    assert "ser convert owner/name FOLDER" in said
    assert not list(folder.parents[2].glob("cache/*/*.bin")), "no pickle was fetched"
    done = run("-m", "ser", "convert", "owner/name", "converted")
    assert done.returncode == 0, done.stderr
    assert run("-c", LOAD, "converted").stdout.split() == ["s0"]
    certificate = json.loads((folder.parents[2] / "converted" / "certificate.json").read_text())
    assert certificate["source"]["name"] == "owner/name"
    # and once more, out of the cache
    shutil.rmtree(folder)
    assert run("-m", "ser", "convert", "owner/name", "again").returncode == 0


def test_a_repository_with_an_adapter_alone_is_said_to_be_one(hub):
    folder, run = hub
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter of PEFT" in run("-c", LOAD, "owner/name").stdout


def test_where_there_are_safetensors_no_pickle_is_fetched_to_be_converted(hub):
    folder, run = hub
    shutil.copy(folder / "config.json", folder / "pytorch_model.bin")
    done = run("-m", "ser", "convert", "owner/name", "converted")
    assert done.returncode == 0, done.stderr
    assert not list(folder.parents[2].glob("cache/*/*.bin"))


def test_the_processor_of_release_5_comes_along_and_makes_a_folder_in_the_cache_complete(hub):
    folder, run = hub
    (folder / "preprocessor_config.json").unlink()
    processor = {"feature_extractor": {"do_normalize": False}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    code = "import ser; print(ser.load('owner/name').do_normalize)"
    assert run("-c", code).stdout.split() == ["False"]
    shutil.rmtree(folder)  # so that nothing can be fetched
    assert run("-c", code).stdout.split() == ["False"]


def test_a_name_that_neither_is_a_folder_nor_on_the_hub_is_an_error_of_one_line(hub):
    _, run = hub
    done = run("-m", "ser", "convert", "owner/other", "converted")
    assert done.returncode == 1 and "could not give it" in done.stderr and "Traceback" not in done.stderr
