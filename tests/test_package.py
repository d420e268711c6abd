"""The package: installs by itself, imports without side effects or optional libraries, layers as designed."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from toy import toy_recognizer

import ser
from ser.cli import COMMANDS
from ser.data.manifest import Utterance
from ser.errors import AudioError, ManifestError, indented, pip_line, printable
from ser.models.pretrained import LoadReport
from ser.recognizer import Prediction
from ser.scores.folds import PooledReport, pooled_markdown
from ser.scores.report import Figure, Report
from ser.train.distributed import World
from ser.train.evaluation import Evaluation
from ser.train.log import say, show_rows
from ser.train.processes import one_voice

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ser").rglob("*.py"))


def python(code: str, *arguments, interpreter: str | Path = sys.executable, cwd: Path) -> list[str]:
    """The lines that ``code`` prints in a new interpreter, which must end well."""
    command = [interpreter, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ------------------------------------------------------------------------------------------------- importing

BLOCKED = """
    import sys, torch

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in sys.argv[2].split(","):
                raise {"ImportError": ImportError, "OSError": OSError}[sys.argv[1]](f"{name} is broken")

    sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_import_and_recognition_work_without_optional_libraries_and_reading_says_what_to_install(tmp_path, error):
    import numpy
    import soundfile

    soundfile.write(tmp_path / "a.wav", numpy.zeros(800), 8000)
    code = """
    import ser
    recognizer, _ = ser.Recognizer.create("small", emotions=["a", "b"])
    print(recognizer.predict(torch.zeros(1600), 16000)[0].emotion in "ab")
    for recording in ("a.wav", torch.zeros(800)):
        try:
            recognizer.predict(recording, 8000)
        except ser.SerError as error:
            print(error)
    try:
        ser.load_audio("a.wav")
    except ser.SerError as error:
        print(error)

    import pathlib
    from ser.data.demo_corpus import open_espeak
    from ser.models.pretrained import find_folder
    from ser.scores.pictures import draw

    for extra in (lambda: draw({}, pathlib.Path("pictures")), lambda: find_folder("owner/name"),
                  lambda: open_espeak(0).__enter__()):
        try:
            extra()
        except ser.SerError as error:
            print(error)
    """
    blocked = "torchaudio,soundfile,matplotlib,transformers,sklearn,jiwer,espeakng_loader,huggingface_hub"
    said = python(BLOCKED + code, error, blocked, cwd=tmp_path)
    works, file, array, loaded, *extras = said
    for found, name in zip(extras, ("plots", "hub", "demo"), strict=True):
        assert pip_line(name) in found and f"{error}: " in found
    assert works == "True"
    assert "soundfile is broken" in file and "pip install soundfile" in file
    assert loaded == file
    assert "torchaudio is broken" in array and "install the torchaudio build that matches this torch" in array


def test_import_has_no_side_effects(tmp_path):
    code = """
    import os, signal, sys, threading, warnings, torch, torch.multiprocessing, torch.distributed

    def state():
        return {
            "random numbers": torch.random.get_rng_state().tolist(),
            "seed": torch.initial_seed(),
            "default type": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "determinism": torch.are_deterministic_algorithms_enabled(),
            "backends": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                         torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                         torch.get_float32_matmul_precision()),
            "start method": torch.multiprocessing.get_start_method(allow_none=True),
            "sharing": torch.multiprocessing.get_sharing_strategy(),
            "process group": torch.distributed.is_initialized(),
            "environment": dict(os.environ),
            "warnings": list(warnings.filters),
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
            "threads": threading.active_count(),
            "folder": os.listdir(),
            "hooks": (sys.excepthook, sys.displayhook),
        }

    before = state()
    for name in sys.argv[1:]:
        __import__(name)
    after = state()
    print([key for key in before if before[key] != after[key]])
    libraries = ("transformers", "sklearn", "jiwer", "torchaudio", "soundfile", "matplotlib", "pandas", "scipy",
                 "huggingface_hub", "torch._dynamo")
    print([name for name in libraries if name in sys.modules])
    """
    names = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in MODULES]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}"
    assert python(code, *names, cwd=tmp_path) == ["[]", "[]"]


@pytest.mark.parametrize("start", [["predict"], []], ids=["command", "example"])
def test_recognising_a_file_loads_nothing_heavy_beside_torch(tmp_path, start):
    """A cold start is what `torch` takes and little more."""
    toy_recognizer().save(tmp_path / "model")
    soundfile.write(tmp_path / "turn.wav", 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    code = """
    import gc, runpy, sys, torch, numpy
    before = set(sys.modules)
    sys.argv[1:] = [*START, "turn.wav", "--model", "model", "--format", "jsonl"]
    try:
        runpy.run_path(PATH, run_name="__main__") if PATH else runpy.run_module("ser", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    new = set(sys.modules) - before
    print(sorted({name.partition(".")[0] for name in new} & set(LIBRARIES)))
    print(sorted(name for name in new if name.startswith("ser.train")))
    print(gc.get_freeze_count() > 100_000, gc.isenabled())
    """
    libraries = ["tqdm", "torchaudio", "pandas", "matplotlib", "scipy", "sklearn", "transformers", "sympy"]
    path = None if start else str(ROOT / "examples" / "infer.py")
    given = f"PATH, START, LIBRARIES = {path!r}, {start!r}, {libraries!r}\n"
    said, *found = python(given + textwrap.dedent(code), cwd=tmp_path)
    assert json.loads(said)["emotion"] and found == ["[]", "[]", "True True"], "and the collector leaves it alone"


def test_help_version_and_a_wrong_command_are_answered_without_torch_and_numpy(tmp_path):
    code = """
    import sys
    import ser
    from ser.cli import main

    for argv in (["--help"], ["--version"], ["-h"], [], ["recognise", "a.wav"]):
        try:
            status = main(argv)
        except SystemExit as end:
            status = end.code
        print("status", status or 0)
    dir(ser), ser.SerError
    heavy = ("torch", "numpy", "safetensors", "ser.audio", "ser.cli.predict")
    print([name for name in heavy if name in sys.modules])
    """
    *shown, loaded = python(code, cwd=tmp_path)
    assert loaded == "[]"
    assert [line for line in shown if line.startswith("status ")] == ["status 0"] * 4 + ["status 2"]
    assert f"ser {ser.__version__}" in shown
    for name, (_, line) in COMMANDS.items():
        assert sum(text.split()[:1] == [name] and text.split()[1] == line.split()[0] for text in shown) == 3


def test_public_names_are_found_when_they_are_asked_for_and_others_are_not(tmp_path):
    code = """
    import sys
    import ser
    print(sorted(set(ser.__all__) - set(dir(ser))), "torch" in sys.modules)
    from ser import *
    print(load is ser.load, Recognizer is ser.recognizer.Recognizer, SAMPLE_RATE, ser.errors.SerError is SerError)
    for name in ("nothing", "_nothing", "__wrapped__"):
        print(hasattr(ser, name))
    """
    assert python(code, cwd=tmp_path) == ["[] False", "True True 16000 True", "False", "False", "False"]


def test_the_public_names_are_there_and_documented():
    assert sorted(ser.__all__) == sorted(set(ser.__all__))
    for name in ser.__all__:
        assert isinstance(getattr(ser, name), int) or getattr(ser, name).__doc__


# ---------------------------------------------------------------------------------------------------- layers

# Each may import itself and what is named here, which is what DESIGN.md's arrows say.
BOTTOM = {"ser.errors", "ser.files", "ser.device", "ser.containers"}
SOUND = {"ser.audio", *BOTTOM}
MODEL = {"ser.models", "ser.data", *SOUND}
USE = {"ser.folder", "ser.inputs", "ser.recognizer", *MODEL}
MAY_IMPORT = {
    "ser": {"ser.audio", "ser.errors", "ser.models", "ser.recognizer"},  # __init__: the public names
    "ser.errors": set(),
    "ser.files": {"ser.errors"},
    "ser.device": {"ser.errors"},
    "ser.containers": {"ser.errors"},
    "ser.audio": BOTTOM,
    "ser.models": SOUND,
    "ser.data": SOUND,
    "ser.folder": MODEL,
    "ser.inputs": MODEL,
    "ser.recognizer": USE - {"ser.recognizer"},
    "ser.scores": USE,
    "ser.convert": {"ser", *USE},
    "ser.train": {"ser.scores", *USE},
    "ser.writers": USE,
    "ser.cli": {"ser", "ser.train", "ser.writers", "ser.convert", "ser.scores", *USE},
    "ser.__main__": {"ser", "ser.cli"},
}
CORE = {"torch", "numpy", "safetensors", "tqdm", *sys.stdlib_module_names}
ONLY_IN = {
    "soundfile": {"ser.audio"},  # the one file that opens sound
    "torchaudio": {"ser.audio"},
    "espeakng_loader": {"ser.data.demo_corpus"},
}
INSIDE_FUNCTIONS = {*ONLY_IN, "matplotlib", "huggingface_hub"}  # `import ser` works without them


def layer(module: str) -> str:
    """``ser.models.heads`` -> ``ser.models``."""
    return ".".join(module.split(".")[:2])


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at import time) of each import statement; relative ones resolved."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] + "." if node.level else ""
            name = (base + (node.module or "")).rstrip(".")
            # "from ser import audio" imports ser.audio
            names = [f"ser.{alias.name}" for alias in node.names] if name == "ser" else [name]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def violations(source: str, module: str) -> list[str]:
    """What a module does at import time, or imports, against the design."""
    tree = ast.parse(source)
    found = []
    for name, at_import in imports(tree, module):
        top = name.partition(".")[0]
        if top == "ser":
            if layer(name) != layer(module) and layer(name) not in MAY_IMPORT[layer(module)]:
                found.append(f"{module} imports {name}")
        elif top in ONLY_IN and module not in ONLY_IN[top]:
            found.append(f"{module} imports {top}, which is for {' and '.join(sorted(ONLY_IN[top]))}")
        elif top not in CORE | INSIDE_FUNCTIONS:
            found.append(f"{module} imports {top}")
        elif top in INSIDE_FUNCTIONS and at_import:
            found.append(f"{module} imports {top} at import time")
        if name.startswith("ser.data.iemocap") and layer(module) == "ser.train":
            found.append(f"{module} knows IEMOCAP")
    deferred = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "manual_seed", "seed"):
            found.append(f"{module} line {node.lineno}: {node.attr} at import time")
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, deferred)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_module_imports_only_what_stands_to_its_right_and_reads_no_environment(path):
    module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    assert violations(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ser.models.heads", "from ser.data.text import Vocabulary"),
        ("ser.data.text", "import ser.models.heads"),
        ("ser.data.text", "def f():\n    from ser.recognizer import load"),
        ("ser.data.text", "from ..models import heads"),
        ("ser.data.text", "from ser import recognizer"),
        ("ser.recognizer", "from ser.train import loop"),
        ("ser.recognizer", "import ser"),
        ("ser.audio", "from ser.data import text"),
        ("ser.errors", "from ser.audio import load_audio"),
        ("ser.files", "from ser.data.text import clean"),
        ("ser.train.loop", "from ser.data.iemocap import folds"),
        ("ser.train.loop", "from tests.toy import corpus"),
        ("ser.train.loop", "from examples.infer import main"),
        ("ser.models.wav2vec2", "def f():\n    import transformers"),
        ("ser.convert.convert", "def f():\n    import transformers"),
        ("ser.convert.convert", "def f():\n    import torchaudio"),
        ("ser.data.dataset", "def f():\n    import soundfile"),
        ("ser.audio", "import soundfile"),
        ("ser.audio", "try:\n    import torchaudio\nexcept ImportError:\n    torchaudio = None"),
        ("ser.train.loop", "import os\nclass A:\n    rank = os.environ['RANK']"),
        ("ser.train.loop", "import torch\ntorch.manual_seed(0)"),
    ],
)
def test_a_module_against_the_design_is_found(module, source):
    assert violations(source, module)


def test_no_text_installs_another_project_s_package():
    """`ser` on PyPI is another project's: the distribution's name stands in setup.cfg and `pip_line`."""
    wrong = re.compile(r"pip install[^\n]*\bser(?![-\w/.=])|\bser\[[a-z]")
    folders = ("ser", "examples", "docs", "benchmarks", "tests")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    texts += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "setup.cfg", "pyproject.toml")]
    texts.remove(Path(__file__).resolve())
    lines = [(str(path), line) for path in texts for line in path.read_text().splitlines()]
    assert [(path, line) for path, line in lines if wrong.search(line)] == []
    assert all(map(wrong.search, ("pip install ser", "pip install 'ser[hub]'", "(the extra ser[hub])")))
    assert not wrong.search(pip_line("hub")) and not wrong.search(pip_line())


def test_no_text_names_a_folder_that_only_its_authors_have():
    texts = [path for folder in ("ser", "examples", "docs", "benchmarks") for path in (ROOT / folder).rglob("*")]
    texts = [path for path in texts if path.suffix in (".py", ".md")] + [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    assert [str(path) for path in texts if "../shared" in path.read_text()] == []


def test_scripts_never_import_tests():
    for path in (ROOT / "examples").glob("*.py"):
        names = [name for name, _ in imports(ast.parse(path.read_text()), path.stem)]
        assert "ser" in {name.partition(".")[0] for name in names}
        assert "tests" not in {name.partition(".")[0] for name in names}


# --------------------------------------------------------------------------------------- what a terminal is shown


def test_foreign_text_cannot_command_a_terminal():
    hostile = "a\x1b[2J\rb\x07\x9b31m\u202ec\u2028d\udcff\ne"
    assert printable(hostile) == "a�[2J�b��31m�c�d��e"
    assert printable(hostile, lines=True) == "a�[2J�b��31m�c�d�\ne"
    assert printable("Größe, 悲伤, غضب, 🙂: 50 %") == "Größe, 悲伤, غضب, 🙂: 50 %"


HOSTILE = "a\x1b[2J\nerror: forged\r\u202e\udce9"


def only_own_lines(shown: str) -> bool:
    """Whether no line but ours was made, and nothing commands the terminal."""
    return all(line.isprintable() and not line.startswith("error: forged") for line in shown.split("\n"))


def test_names_in_lists_progress_and_errors_stay_on_their_lines(capfd):
    said = World(device=torch.device("cpu"))
    utterance = Utterance(HOSTILE, Path(HOSTILE), emotion=HOSTILE)
    row = (utterance, HOSTILE, Prediction(HOSTILE, 1.0, emotion=HOSTILE, transcript=HOSTILE))
    show_rows(said, Evaluation(rows=[row]))
    say(said, f"2 recordings:{indented([HOSTILE, HOSTILE])}")
    say(said, str(LoadReport(Path("x"), unused=[HOSTILE])))
    for error in (AudioError(printable(HOSTILE)), ValueError("\x1b[2J")):
        with pytest.raises(SystemExit), one_voice():
            raise error
    shown = capfd.readouterr().err
    assert only_own_lines(shown) and shown.count("\n  a�") == 2 and "ValueError: �[2J" in shown


def test_an_error_of_many_lines_keeps_them(capfd):
    with pytest.raises(SystemExit), one_voice():
        raise ManifestError("two problems:\n  line 2: \x1b\n  line 3: b")
    assert capfd.readouterr().err == "error: two problems:\n  line 2: �\n  line 3: b\n"


def test_a_fold_s_name_cannot_make_a_section_of_the_pooled_report():
    figures, judged = {"accuracy": Figure(0.5, [0.4, 0.6])}, {"emotion": 8, "words": 0, "speaker": 0}
    pooled = Report(8, ["```", HOSTILE], 2, 0, 1, figures, judged, confusion=[[4, 0], [4, 0]])
    name = "x |\n\n## Forged <b>"
    fold = replace(pooled, shared_with_training={name: 0.5})
    over = {"accuracy": {"mean": 0.5, "spread": None, "folds": 1}}
    result = PooledReport(pooled, name, name, {name: fold}, over, [], weights="last", audit="a\x1b\n```\n")
    result.repeat = {name: name}
    shown = pooled_markdown(result)
    assert only_own_lines(shown) and "\n## Forged" not in shown
    assert "<b>" not in shown.split("To repeat:")[0] and shown.count("\n````\n") == 4, shown
