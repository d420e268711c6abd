"""A stopped run goes on wherever data and --init lie by then: content is compared, paths are recorded (N4, N7)."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train import QUICK as CONFIG
from toy import toy_recognizer, write_corpus

from ser.cli import execute
from ser.cli.crossval import check_same
from ser.data.labels import LABELS, LabelSpec
from ser.data.manifest import Utterance, read_manifest, write_manifest
from ser.errors import ConfigError, ModelFolderError, RunFolderError
from ser.train.checkpoint import SETTINGS, checkpoints, seal_checkpoint
from ser.train.content import contents
from ser.train.loop import fit

QUICK = ["--epochs", "2", "--effective-batch", "4", "--rate", "1e-3", "--threads", "1", "--save-every", "1"]
QUICK += ["--keep", "9"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A corpus, --init, and a run of four updates that has everything; `stopped` gives what two of them leave."""
    folder = tmp_path_factory.mktemp("begun")
    write_corpus(folder / "corpus/wav", 8)
    (folder / "corpus/wav/train.csv").rename(folder / "corpus/wav/t.csv")
    toy_recognizer().save(folder / "init")
    (folder / "init/README.md").write_text("license: mit\n")
    train(folder, f"--train {folder}/corpus/wav/t.csv --init {folder}/init")
    return folder


def train(folder: Path, arguments: str, *more: str) -> Path:
    """The script's `main` in this process; the run's folder."""
    execute("train", [*arguments.split(), *more, "--out", str(folder / "run"), *QUICK])
    return folder / "run"


@pytest.fixture
def stopped(begun, tmp_path):
    """A folder of its own with corpus, init, and the run as it was after two of its four updates."""
    shutil.copytree(begun, tmp_path / "job1")
    for path in checkpoints(tmp_path / "job1/run")[2:]:
        shutil.rmtree(path)
    for name in ("last", "best"):
        shutil.rmtree(tmp_path / "job1/run" / name)
    return tmp_path / "job1"


def assert_ended_as(begun: Path, run: Path) -> None:
    assert len(checkpoints(run)) == 4
    one, two = (load_file(p / "checkpoints/step-00000004/model.safetensors") for p in (begun / "run", run))
    assert all((one[name] == two[name]).all() for name in one)


def moved(stopped: Path, where: str) -> tuple[str, Path]:
    """The command that continues, and the folder that it starts in, after data and --init moved."""
    job = stopped
    plain = "--train {0}/corpus/wav/t.csv --init {0}/init"
    if where == "another scratch folder":
        job = stopped.with_name("job2")
        for name in ("corpus", "init"):
            shutil.move(stopped / name, job / name)
        return plain.format(job), job
    if where == "a relative path":
        return "--train corpus/wav/t.csv --init ./init/", job
    if where == "a path with dots":
        return f"--train {job}/init/../corpus//wav/./t.csv --init {job}/corpus/../init", job
    if where == "a symbolic link":
        (job.parent / "link").symlink_to(job, target_is_directory=True)
        return plain.format(job.parent / "link"), job
    if where == "another root":
        shutil.move(job / "corpus/wav/t.csv", job / "t.csv")
        return f"--train {job}/t.csv --root {job}/corpus/wav --init {job}/init", job
    table = job / "corpus/wav/t.csv"
    rows = list(csv.DictReader(table.open()))
    if where == "a manifest with absolute paths":
        rows = [row | {"file": str(job / "corpus/wav" / row["file"])} for row in rows]
    elif where == "a manifest with ids":
        rows = [row | {"id": str(i)} for i, row in enumerate(rows)]
    names = list(rows[0])
    if where == "other columns, line ends and a byte order mark":
        names = ["note", *reversed([*names[:2], "words", *names[3:]])]
        rows = [row | {"note": "x", "words": row.pop("text")} for row in rows]
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, names, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
    return plain.format(job) + (" --columns text=words" if "words" in names else ""), job


@pytest.mark.parametrize(
    "where",
    [
        "another scratch folder",
        "a relative path",
        "a path with dots",
        "a symbolic link",
        "another root",
        "a manifest with absolute paths",
        "a manifest with ids",
        "other columns, line ends and a byte order mark",
    ],
)
def test_a_stopped_run_ends_bit_identically_wherever_data_and_init_lie(begun, stopped, monkeypatch, where):
    command, folder = moved(stopped, where)
    monkeypatch.chdir(folder)
    run = train(stopped, command)
    assert_ended_as(begun, run)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["train"]["data"] == str(Path(command.split()[1])), "the newest paths are recorded"
    assert Path(recorded["init"]).resolve() == (folder / "init").resolve()
    assert json.loads((run / "last/training.json").read_text())["settings"]["train"] == recorded["train"]


def test_a_manifest_of_absolute_paths_goes_on_in_another_scratch_folder(stopped, tmp_path):
    """Its ids are paths, and there they are others."""
    for job in ("a", "b"):
        shutil.copytree(stopped / "corpus", tmp_path / job)
        rows = read_manifest(tmp_path / job / "wav/t.csv")
        write_manifest(tmp_path / f"{job}.csv", [replace(r, id=str(r.file)) for r in rows], root=stopped / "init")
    run = train(tmp_path, f"--train {tmp_path}/a.csv --init {stopped}/init")
    assert str(tmp_path / "a") in (tmp_path / "a.csv").read_text().splitlines()[1]
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(run / "last")
    for path in checkpoints(run)[2:]:
        shutil.rmtree(path)
    train(tmp_path, f"--train {tmp_path}/b.csv --init {stopped}/init")
    assert len(checkpoints(run)) == 4


def test_the_run_s_own_folder_may_move_too(begun, stopped, tmp_path):
    shutil.move(stopped / "run", tmp_path / "run")
    train(tmp_path, f"--train {stopped}/corpus/wav/t.csv --init {stopped}/init")
    assert_ended_as(begun, tmp_path / "run")


def test_a_cache_in_another_folder_continues_and_one_more_or_less_is_a_change(stopped, tmp_path):
    options = ["--freeze", "feature-encoder"]
    command = f"--train {stopped}/corpus/wav/t.csv --init {stopped}/init"
    train(tmp_path, command, *options, "--cache", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    train(tmp_path, command, *options, "--cache", str(tmp_path / "elsewhere"))
    with pytest.raises(RunFolderError, match="--allow-changes cache if that is meant"):
        train(tmp_path, command, *options)
    train(tmp_path, command, *options, "--allow-changes", "cache")


def table_with(change):
    def edit(job: Path) -> None:
        path = job / "corpus/wav/t.csv"
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, *change(rows)]) + "\n")

    return edit


def longer_recording(job: Path) -> None:
    path = job / "corpus/wav/train2.wav"
    path.write_bytes((job / "corpus/wav/train3.wav").read_bytes())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (table_with(lambda rows: [*rows[1:], rows[0]]), r"data\.train: other files, .* or another order"),
        (table_with(lambda rows: [rows[1], rows[0], *rows[2:]]), r"data\.train: other files"),
        (table_with(lambda rows: rows[1:]), r"data\.train: 8 utterances then, 7 now"),
        (
            table_with(lambda rows: [rows[0].replace("angry", "sad"), *rows[1:]]),
            r"data\.train: other emotions now",
        ),
        (table_with(lambda rows: [r.replace("A B", "B A") for r in rows]), r"data\.train: other texts now"),
        (table_with(lambda rows: [r.replace(",s0,", ",s1,") for r in rows]), r"data\.train: other speakers"),
        (longer_recording, r"data\.train: other lengths now(.|\n)*a recording mended since may be longer"),
    ],
)
def test_other_content_is_refused_and_what_differs_is_named(stopped, change, told):
    change(stopped)
    with pytest.raises(RunFolderError, match=told):
        train(stopped, f"--train {stopped}/corpus/wav/t.csv --init {stopped}/init")
    assert len(checkpoints(stopped / "run")) == 2


def test_other_names_of_files_with_the_same_labels_and_lengths_are_refused_unless_they_are_meant(begun, stopped):
    table = stopped / "corpus/wav/t.csv"
    for i in range(8):
        (stopped / f"corpus/wav/train{i}.wav").rename(stopped / f"corpus/wav/take{i}.wav")
    table.write_text(table.read_text().replace("train", "take"))
    command = f"--train {table} --init {stopped}/init"
    with pytest.raises(RunFolderError, match=r"--allow-changes files if that is meant(.|\n)*other names of files"):
        train(stopped, command)
    assert_ended_as(begun, train(stopped, command, "--allow-changes", "files"))


def test_an_init_with_other_weights_is_refused_unless_it_is_meant_and_the_first_stays_on_record(begun, stopped):
    toy_recognizer(seed=3).save(stopped / "other")
    command = f"--train {stopped}/corpus/wav/t.csv --init {stopped}/other"
    with pytest.raises(RunFolderError, match=r"--allow-changes init if that is meant(.|\n)*has other weights"):
        train(stopped, command)
    with pytest.raises(RunFolderError, match=r"init: .* small now, which has other weights"):
        train(stopped, command.replace(f"{stopped}/other", "small"))
    before = json.loads((stopped / "run/config.json").read_text())
    assert_ended_as(begun, train(stopped, command, "--allow-changes", "init"))
    after = json.loads((stopped / "run/config.json").read_text())
    assert [after[name] for name in ("init", "init_content")] == [
        before[name] for name in ("init", "init_content")
    ]


@pytest.mark.parametrize("init", ["{job}/init", "init", "owner/init"])
def test_a_run_goes_on_without_the_init_that_was_wiped_and_the_record_keeps_it(
    begun, stopped, monkeypatch, capsys, init
):
    before = json.loads((stopped / "run/config.json").read_text())
    assert before["licences"]["weights"] == "mit"
    shutil.rmtree(stopped / "init")
    monkeypatch.chdir(stopped)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = train(stopped, f"--train {stopped}/corpus/wav/t.csv --init {init.format(job=stopped)}")
    assert_ended_as(begun, run)
    said = capsys.readouterr().err
    assert "--init is gone: labels, vocabulary and configuration are those of" in said and "step-00000002" in said
    after = json.loads((run / "config.json").read_text())
    for name in ("init", "init_content", "licences"):
        assert after[name] == before[name], name


def test_an_init_that_is_not_there_is_an_error_where_no_checkpoint_has_what_it_held(stopped, tmp_path):
    gone = f"--train {stopped}/corpus/wav/t.csv --init {tmp_path}/gone"
    with pytest.raises(ModelFolderError, match="gone: "):
        train(tmp_path, gone)
    with pytest.raises(ModelFolderError, match="gone: "):
        train(stopped, gone, "--overwrite")
    (tmp_path / "gone").mkdir()
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        train(stopped, gone)
    assert len(checkpoints(stopped / "run")) == 2


def test_a_run_of_a_release_that_told_no_content_goes_on_by_what_it_told(begun, stopped):
    """A config.json of commit e2e6d66: the digest of all rows with their ids, and the paths."""
    for path in (stopped / "run/config.json", *(p / SETTINGS for p in checkpoints(stopped / "run"))):
        settings = json.loads(path.read_text())
        for name in ("content", "init_content", "launch"):
            del settings[name]
        path.write_text(json.dumps(settings))
    for folder in checkpoints(stopped / "run"):
        (folder / "manifest.json").unlink()
        seal_checkpoint(folder, "0123456789abcdef")
    elsewhere = stopped.with_name("elsewhere")
    shutil.move(stopped / "corpus", elsewhere)
    command = f"--train {elsewhere}/wav/t.csv --init"
    table = elsewhere / "wav/t.csv"
    text = table.read_text()
    table.write_text(text.replace("A B", "B A"))
    with pytest.raises(RunFolderError, match=r"data\.train: other ids, labels, .* as --literal-labels"):
        train(stopped, f"{command} {begun}/init")
    table.write_text(text)
    with pytest.raises(RunFolderError, match="--allow-changes init if that is meant"):
        train(stopped, f"{command} {stopped}/init")
    assert_ended_as(begun, train(stopped, f"{command} {begun}/init"))
    assert "content" in json.loads((stopped / "run/checkpoints/step-00000004" / SETTINGS).read_text())


def test_the_content_does_not_depend_on_the_folder_that_all_files_share_nor_on_how_names_are_composed(tmp_path):
    def rows(*names, **more):
        return [Utterance(id=name, file=Path(name), emotion="sad", **more) for name in names]

    here = contents(rows("/a/b/x/1.wav", "/a/b/y/2.wav"), [5, 6])
    assert here == contents(rows("/c/x/1.wav", "/c/y/2.wav"), [5, 6])
    assert here == contents(rows("/x/../a/b/./x/1.wav", "/a/b//y/2.wav"), [5, 6])
    assert here != contents(rows("/c/y/2.wav", "/c/x/1.wav"), [5, 6])
    assert here != contents(rows("/c/x/1.wav", "/c/y/2.wav"), [56, 6])
    assert contents(rows("/a/1.wav"), [1, 23])["lengths"] != contents(rows("/a/1.wav"), [12, 3])["lengths"]
    assert contents(rows("/a/über.wav")) == contents(rows("/a/über.wav"))
    relative = contents([replace(u, file=Path(os.path.relpath(u.file))) for u in rows("/a/x/1.wav", "/a/y/2.wav")])
    assert relative == contents(rows("/a/x/1.wav", "/a/y/2.wav"))
    assert contents([]) == contents([]) and contents([])["utterances"] == 0


def test_what_follows_from_the_same_data_is_not_compared_and_what_names_other_utterances_is(begun, tmp_path):
    rows = read_manifest(begun / "corpus/wav/t.csv")
    named = {"data": "a.csv", "sha256": "1", "root": None, "columns": {}, "protocol": "column", "fold": "1"}
    settings = {"train": named, "protocol_description": "first", "shared_with_training": {"valid": {"a": 0.5}}}
    fit(toy_recognizer(), rows, [], replace(CONFIG, epochs=1), tmp_path / "run", settings=settings)
    moved = named | {"data": "b.csv", "sha256": "2", "root": "x", "columns": {"text": "words"}, "map": "m.json"}
    settings = {"train": moved, "protocol_description": "said otherwise"}
    fit(toy_recognizer(), rows, [], replace(CONFIG, epochs=1), tmp_path / "run", settings=settings)
    settings = {"train": named | {"fold": "2"}}
    with pytest.raises(RunFolderError, match=r"train\.fold: '1' then, '2' now"):
        fit(toy_recognizer(), rows, [], replace(CONFIG, epochs=1), tmp_path / "run", settings=settings)


# -------------------------------------------------------------------------------------------- cross-validation

FOLD = {"weights": "last", "init_sha256": "5", "models": None, "known_turns": None}
NAMED = {"protocol": "kfold:speaker:2", "shares": [], "seed": 0, "fold": None, "known_turns": 0, "part": None}


def fold_settings(data="a.csv", init="m", options=(), **more) -> dict:
    data = {"data": data, "sha256": more.pop("sha256", "1"), "root": more.pop("root", None), "columns": {}} | NAMED
    content = {"content": more.pop("content", {"utterances": 3})}
    return FOLD | content | {"data": data, "init": init, "training_options": list(options)} | more


def go_on(folder: Path, before: dict, now: dict, written: dict | None = None) -> None:
    (folder / "run").mkdir(parents=True, exist_ok=True)
    (folder / "run/config.json").write_text("{}")
    (folder / "settings.json").write_text(json.dumps(before))
    check_same(folder, now, lambda: written or now["content"])


def test_a_fold_goes_on_wherever_its_data_init_cache_and_vocabulary_lie(tmp_path):
    before = fold_settings(options=["--cache", "c", "--rate", "1", "--vocab", "v.json"], vocab_sha256="7")
    now = fold_settings(
        "/b.csv", "/m", ["--cache", "/d", "--rate", "1", "--vocab", "/w"], sha256="2", root="/", vocab_sha256="7"
    )
    go_on(tmp_path, before, now)
    assert json.loads((tmp_path / "settings.json").read_text()) == now, "the newest paths are recorded"
    judged = {"models": "a", "model_sha256": "9", "init_sha256": None, "init": "base"}
    go_on(tmp_path, fold_settings() | judged, fold_settings() | judged | {"models": "b"})


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (fold_settings(content={"utterances": 4}), "content"),
        (fold_settings(init_sha256="6"), "init_sha256"),
        (fold_settings(init="base", init_sha256=None), "init"),
        (fold_settings(options=["--cache", "c"]), "training_options"),
        (fold_settings() | {"data": fold_settings()["data"] | {"seed": 1}}, "data"),
    ],
)
def test_a_fold_with_other_content_is_refused(tmp_path, now, told):
    with pytest.raises(ConfigError, match=f"begun with other settings(.|\n)*{told}: "):
        go_on(tmp_path, fold_settings(), now)


def test_a_fold_of_a_release_that_told_no_content_goes_on_by_its_manifest(tmp_path):
    before = fold_settings(options=["--vocab", "v"])
    del before["content"]
    go_on(tmp_path, before, fold_settings("/b.csv", root="/", options=["--vocab", "v"], vocab_sha256="7"))
    with pytest.raises(ConfigError, match="took every label as it is written; give --literal-labels"):
        go_on(tmp_path, before, fold_settings(options=["--vocab", "v"]), written={"utterances": 2})
    with pytest.raises(ConfigError, match="sha256"):
        go_on(tmp_path, before, fold_settings(options=["--vocab", "v"], sha256="2"))
    with pytest.raises(ConfigError, match="training_options"):
        go_on(tmp_path, before, fold_settings(options=["--vocab", "w"], vocab_sha256="7"))


def test_each_label_that_a_head_adds_has_a_digest_of_its_own(monkeypatch):
    monkeypatch.setitem(LABELS, "health", LabelSpec("numbers", ("age", "weight")))
    kept, *changed = (
        contents([Utterance("a", Path("/a.wav"), labels={"age": age, "weight": weight})])
        for age, weight in [(30.0, 70.0), (31.0, 70.0), (30.0, 71.0)]
    )
    differing = [{name for name in kept if kept[name] != other[name]} for other in changed]
    assert differing == [{"age"}, {"weight"}]
