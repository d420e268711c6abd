"""Read and write the settings in a model folder: labels, what heads read, and how sound is preprocessed.

A folder is ours, or a release from 3 to 5 of `transformers` wrote it. These releases put the same settings into
different files. If several files have a setting, the first of these counts, as in release 5:

    sound   "feature_extractor" in processor_config.json, preprocessor_config.json, tokenizer_config.json
    tokens  vocab.json (else tokenizer.json), completed by "added_tokens_decoder" in tokenizer_config.json, else by
            added_tokens.json and tokenizer.json
    names of special tokens
            tokenizer_config.json if it has "added_tokens_decoder"; else first special_tokens_map.json

If no file has a setting, or files contradict each other, a note says which value was used.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ser.audio import SAMPLE_RATE
from ser.data.labels import DIMENSIONS, LABELS, PLURALS, Labels
from ser.data.text import BLANKS, MAX_SYMBOLS, ORTHOGRAPHIES, SPECIALS, Vocabulary
from ser.errors import ConfigError, ModelFolderError, TextError, brief_repr, shorten
from ser.files import write_json, write_tensors
from ser.models import pretrained
from ser.models.config import ARCHITECTURES, Wav2Vec2Config
from ser.models.heads import HEADS
from ser.models.multitask import SIZES, HeadsConfig, MultiTaskModel

FORMAT = 1  # the format of the "ser" part of config.json

# problem_type in config.json -> the kind of prediction of a ForSequenceClassification's head
PROBLEMS = {
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}
POOLING_MODES = ("mean", "sum", "max")  # those of ForSpeechClassification

# Settings of `HeadsConfig` that are in the "ser" part of config.json; its sizes follow from the labels.
READS = ("layers", "weighted_final_norm", "pooling", "emotion_head", "dimension_head")
# head -> where a folder has the names of its outputs
WHERE_LABELS_STAND = {
    "emotion": "id2label in config.json",
    "ctc": "vocab.json, with tokenizer_config.json beside it",
    "speaker": "ser.speakers in config.json",
    "dimensions": "id2label in config.json, with problem_type regression or of arousal, dominance and valence",
}


@dataclass
class FolderSettings:
    """Collect the settings of a folder, before it is known which of them the heads need.

    ``names`` are for heads that the folder has or had; ``reads`` are settings of `HeadsConfig`: what the heads
    read, and their form. ``notes`` say what was assumed.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    multi_label: bool = False
    vocabulary: Vocabulary | None = None  # read separately, if there is a CTC head (`read_vocabulary`)
    reads: dict[str, Any] = field(default_factory=dict)
    orthography: str = "librispeech"
    tags: str = "remove"
    do_normalize: bool = True
    notes: list[str] = field(default_factory=list)

    def labels(self, heads: Collection[str]) -> Labels:
        """Return the labels of a model that has these heads."""
        names = {head: self.names.get(head, []) for head in heads if LABELS[head].kind != "text"}
        vocabulary = self.vocabulary if "ctc" in heads else None
        return Labels(names, vocabulary, self.multi_label, self.orthography, self.tags, self.do_normalize)


# ---------------------------------------------------------------------------------------------- entries


def expect(right: bool, entry: str, value: Any, known: str, most: int = 200, *, word: str = "expected ") -> None:
    """Raise ModelFolderError unless an entry, named with its file, is valid; ``most`` is for `brief_repr`."""
    if not right:
        raise ModelFolderError(f"{entry} is {brief_repr(value, most)}; {word}{known}")


def optional_json(folder: Path, name: str) -> dict:
    """Read a JSON file of a folder; empty if there is none."""
    return pretrained.read_json(folder, name) if pretrained.stands_in(folder, name) else {}


# ---------------------------------------------------------------------------------------------- labels


def check_names(path: Path, what: str, names: Any) -> list[str]:
    """Return ``names``; raise ModelFolderError unless it is a list of strings that can be printed."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFolderError(f"{path}: {what} needs a list of names; found {brief_repr(names)}")
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ModelFolderError(
                f"{path}: {what} has the name {brief_repr(name, 80)}, which is no valid text (half a surrogate "
                "pair); correct it there"
            )
    return names


def class_names(path: Path, values: Mapping) -> list[str]:
    """Return the names in id2label, in the order of the head's rows; empty without any."""
    id2label = values.get("id2label")
    if id2label is None:
        return []
    numbers = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else None
    if numbers is None or set(id2label) != set(numbers) or not all(isinstance(v, str) for v in id2label.values()):
        raise ModelFolderError(f'{path}: id2label needs names for "0" to "K-1"; found {brief_repr(id2label)}')
    return check_names(path, "id2label", [id2label[n] for n in numbers])


def rows_of(files: pretrained.TensorFiles, part: str) -> int | None:
    """Return the number of outputs of a folder's "lm_head" (CTC) or "projector", None without one."""
    shape = files.shapes.get(f"{part}.weight", ())
    return shape[0] if len(shape) == 2 else None


def classifier_form(files: pretrained.TensorFiles) -> str | None:
    """Return the form (`HEAD_FORMS`) of the head that `transformers` calls classifier, None without one."""
    for name, form in (("cls_head.weight", "linear"), ("dimension_head.dense.weight", "dense")):
        _, key = files.names.get(name, (None, ""))
        if "classifier" in key.split("."):
            return form
    return None


def answer_kind(path: Path, values: Mapping, names: list[str], notes: list[str]) -> str:
    """Return the classifier's kind of prediction: "single-label", "multi-label" or "regression"."""
    problem = values.get("problem_type")
    known = (None, *PROBLEMS)  # not a dict, since the value may be unhashable
    expect(problem in known, f"{path}: problem_type", problem, f"one of {', '.join(PROBLEMS)}", 80)
    if "ser" in values:
        return PROBLEMS.get(problem or "", "single-label")
    if names and {name.lower() for name in names} <= set(DIMENSIONS):
        if problem not in (None, "regression"):
            notes.append(f"problem_type is {problem}, but the names are {', '.join(names)}: taken as dimensions")
        return "regression"
    if problem is None and len(names) == 1:
        notes.append(f"{names[0]!r} is the only class and problem_type is missing: taken as a regression")
        return "regression"
    return PROBLEMS.get(problem or "", "single-label")


def label_classifier(path: Path, values: Mapping, files: pretrained.TensorFiles, settings: FolderSettings) -> None:
    """Decide whether `transformers`' classifier is the emotion or dimension head, and rename its tensors."""
    form, names = classifier_form(files), class_names(path, values)
    if form is not None and not names and "ser" not in values:
        weight = "cls_head.weight" if form == "linear" else "dimension_head.out_proj.weight"
        names = [f"LABEL_{i}" for i in range((files.shapes.get(weight) or (0,))[0])]
        settings.notes.append(
            f"{path.name} has no id2label: the classes are called {', '.join(names[:4])}, as transformers does; "
            "`ser convert --labels` names them"
        )
    kind = answer_kind(path, values, names, settings.notes)
    if kind == "regression":
        settings.names["dimensions"] = settings.names.get("dimensions") or names
        if form == "linear":
            files.move("cls_head", "dimension_head")
        if form is not None:
            settings.reads["dimension_head"] = form
    else:
        settings.names["emotion"], settings.multi_label = names, kind == "multi-label"
        if form == "dense":
            files.move("dimension_head", "cls_head")
            settings.reads["emotion_head"] = form


def own_entries(path: Path, values: Mapping) -> dict:
    """Return the "ser" part of config.json, which must have this version's format."""
    own = values.get("ser", {})
    expect(isinstance(own, dict), f"{path}: ser", own, "an object")
    if own.get("format", FORMAT) != FORMAT:
        raise ModelFolderError(
            f"{path}: ser.format is {brief_repr(own['format'])}, this version reads {FORMAT}; update ser"
        )
    return own


def names_of_others(path: Path, own: Mapping) -> dict[str, list[str]]:
    """Return the names of the outputs of heads that were added to `HEADS`."""
    names = own.get("names", {})
    expect(isinstance(names, dict), f"{path}: ser.names", names, "an object")
    if missing := [head for head in names if head not in HEADS or head not in LABELS]:
        raise ModelFolderError(
            f"{path}: ser.names has the head {brief_repr(missing[0], 80)}, which is not known here; add its rows "
            "to HEADS and LABELS before the folder is loaded"
        )
    return {head: check_names(path, f"ser.names of {head}", value) for head, value in names.items()}


def what_heads_read(path: Path, values: Mapping, own: Mapping, form: str | None, notes: list[str]) -> dict:
    """Return the settings of `HeadsConfig` except its sizes; ``form`` is `classifier_form`."""
    weighted = values.get("use_weighted_layer_sum") or False
    expect(isinstance(weighted, bool), f"{path}: use_weighted_layer_sum", weighted, "true or false")
    mode = values.get("pooling_mode", "mean")  # of ForSpeechClassification, whose head is dense
    known = ", ".join(POOLING_MODES)
    expect(mode in POOLING_MODES, f"{path}: pooling_mode", mode, known, word="supported: ")
    if form != "dense" and mode != "mean":
        notes.append(f"pooling_mode is {mode}, which no class with this head follows: the mean is taken")
        mode = "mean"
    # Use what the release that saved the folder computes; see HeadsConfig.
    release = str(values.get("transformers_version") or "4").partition(".")[0]
    reads = {"weighted_final_norm": release in ("2", "3", "4"), "pooling": mode}
    reads["layers"] = "weighted" if weighted and form != "dense" else "last"
    reads |= {name: own[name] for name in READS if name in own}
    try:
        HeadsConfig(**reads)
    except ConfigError as error:
        raise ModelFolderError(f"{path}: ser.{shorten(str(error))}") from None
    return reads


# ----------------------------------------------------------------------------------------------- sound


def extractors(folder: Path) -> dict[str, dict]:
    """Return what a folder's files say about preprocessing: place -> settings; the first one counts."""
    said = {}
    processor, preprocessor = pretrained.PREPROCESSORS
    values = optional_json(folder, processor)
    name = "feature_extractor" if "feature_extractor" in values else "audio_processor"
    if values.get(name) is not None:  # earlier releases kept it in the other file
        said[f"{name} in {processor}"] = values[name]
    if pretrained.stands_in(folder, preprocessor):
        said[preprocessor] = pretrained.read_json(folder, preprocessor)
    values = optional_json(folder, "tokenizer_config.json")
    if "do_normalize" in values:  # written by the Wav2Vec2Tokenizer of release 4.3
        said["tokenizer_config.json"] = {"do_normalize": values["do_normalize"]}
    for place, values in said.items():
        expect(isinstance(values, dict), f"{folder}: {place}", values, "an object", 80)
    return said


def read_do_normalize(folder: Path, notes: list[str]) -> bool:
    """Tell whether waveforms are scaled to zero mean and unit variance; assumptions are added to ``notes``."""
    places = extractors(folder)
    for place, values in places.items():
        rate, normalize = values.get("sampling_rate", SAMPLE_RATE), values.get("do_normalize", True)
        where, right = f"{folder}: {place}", rate == SAMPLE_RATE
        expect(right, f"{where}: sampling_rate", rate, str(SAMPLE_RATE), word="supported: ")
        expect(isinstance(normalize, bool), f"{where}: do_normalize", normalize, "true or false")
    if not places:
        notes.append(
            f"there is neither {' nor '.join(pretrained.PREPROCESSORS)}, so no file says how sound is prepared: "
            "do_normalize true is assumed"
        )
        return True
    (first, values), *others = places.items()
    normalize = values.get("do_normalize", True)
    if "do_normalize" not in values:
        notes.append(f"{first} lacks do_normalize: true is assumed, the default there")
    here, there = ("true", "false") if normalize else ("false", "true")
    for place, values in others:
        if values.get("do_normalize", normalize) != normalize:
            notes.append(f"do_normalize is {here} in {first}, which counts, and {there} in {place}")
    return normalize


def read_settings(folder: Path, values: dict, files: pretrained.TensorFiles) -> FolderSettings:
    """Read labels, what the heads read, and how sound is preprocessed; ``values`` is config.json.

    The tensors of a classifier are renamed in ``files`` to those of the emotion or the dimension head.
    """
    path = folder / "config.json"
    own, settings = own_entries(path, values), FolderSettings()
    settings.names["speaker"] = check_names(path, "ser.speakers", own.get("speakers", []))
    settings.names["dimensions"] = check_names(path, "ser.dimensions", own.get("dimensions", []))
    settings.names |= names_of_others(path, own)
    settings.reads = what_heads_read(path, values, own, classifier_form(files), settings.notes)
    settings.reads["projection"] = rows_of(files, "projector") or 0
    for name, known in (("orthography", [*ORTHOGRAPHIES]), ("tags", ["remove", "keep-letters"])):
        choice = own.get(name, getattr(settings, name))  # the value may be unhashable, so `known` is a list
        expect(choice in known, f"{path}: ser.{name}", choice, f"one of {', '.join(known)}")
        setattr(settings, name, choice)
    label_classifier(path, values, files, settings)
    settings.do_normalize = read_do_normalize(folder, settings.notes)
    return settings


# ------------------------------------------------------------------------------------------------ text


def token_text(path: Path, name: str, token: Any) -> str | None:
    """Return the text of a token in a tokenizer's files, which is a string or the content of an object."""
    text = token.get("content") if isinstance(token, dict) else token
    expect(text is None or isinstance(text, str), f"{path}: {name}", token, "a token", 80)
    return text


def tokenizer_settings(folder: Path) -> dict:
    """Read tokenizer_config.json with special_tokens_map.json; the top of this file says which one counts."""
    settings = optional_json(folder, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= optional_json(folder, "special_tokens_map.json")
    return settings


def added_token(path: Path, entry: str, token: Any, id_: Any) -> tuple[Any, Any, bool]:
    """Return (token, id, whether it is special) for a token in an entry of a tokenizer's files."""
    return token_text(path, entry, token), id_, isinstance(token, dict) and token.get("special") is True


def tokens_by_id(path: Path, decoder: Any) -> list[tuple[Any, Any, bool]]:
    """Read the entry added_tokens_decoder of tokenizer_config.json; see `added_tokens`."""
    by_id = isinstance(decoder, dict) and all(i.isdecimal() and len(i) < 10 for i in decoder)
    expect(by_id, f"{path}: added_tokens_decoder", decoder, "tokens by id", 80)
    return [added_token(path, "added_tokens_decoder", token, int(i)) for i, token in decoder.items()]


def added_tokens(folder: Path, settings: Mapping) -> list[tuple[Any, Any, bool]]:
    """Return (token, id, whether it is special) for the tokens that complete a vocabulary."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        return tokens_by_id(folder / "tokenizer_config.json", decoder)
    tokens = [(token, id_, False) for token, id_ in optional_json(folder, "added_tokens.json").items()]
    path, rows = folder / "tokenizer.json", optional_json(folder, "tokenizer.json").get("added_tokens") or []
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    expect(listed, f"{path}: added_tokens", rows, "a list of objects", 80)
    return tokens + [added_token(path, "added_tokens", row, row.get("id")) for row in rows]


def ids_of_language(folder: Path, languages: Mapping, settings: Mapping) -> dict[str, Any]:
    """Return the tokens of the language in vocab.json that the tokenizer names."""
    language = settings.get("target_lang")
    if not isinstance(language, str) or language not in languages:
        raise ModelFolderError(
            f"{folder / 'vocab.json'}: has {len(languages)} languages, {brief_repr([*languages], 80)}, and "
            f"target_lang in tokenizer_config.json is {brief_repr(language, 80)}; expected one of them"
        )
    return languages[language]


def base_ids(folder: Path, settings: Mapping) -> dict[str, Any] | None:
    """Read the tokens of vocab.json (of one language), or of tokenizer.json without it; None without either."""
    if pretrained.stands_in(folder, "vocab.json"):
        pretrained.resolve_inside(folder, "vocab.json")
        ids = Vocabulary.read_ids(folder / "vocab.json")
        by_language = ids and all(isinstance(value, dict) for value in ids.values())
        return ids_of_language(folder, ids, settings) if by_language else ids
    model = optional_json(folder, "tokenizer.json").get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    return tokens if isinstance(tokens, dict) else None


def add_tokens(ids: dict[str, Any], added: Iterable[tuple[Any, Any, bool]], rows: int | None) -> None:
    """Add those added tokens to ``ids`` for which the CTC head has one of its ``rows``.

    A token that vocab.json has keeps its id, as in `transformers`.
    """
    taken = set(map(str, ids.values()))
    for token, id_, _ in added:
        fits = rows is None or (type(id_) is int and id_ < rows)
        if token not in ids and str(id_) not in taken and fits:
            ids[token] = id_


def name_free_rows(ids: dict[str, Any], special: Iterable[str | None], rows: int | None) -> list[str]:
    """Add names to ``ids`` for rows of the CTC head without a token; return the names of rows that stay without.

    As in `transformers`, special tokens that no file has get the next ids. A head may have more rows than there
    are symbols, such as 32 for an alphabet of 20 letters (the default of ForCTC). `transformers` reads such rows
    as the unknown token.
    """
    if rows is None or rows > MAX_SYMBOLS:
        return []
    taken = set(map(str, ids.values()))
    free = {i for i in range(rows) if str(i) not in taken}
    for token in special:
        if token is not None and token not in ids and len(ids) in free:
            free.remove(len(ids))
            ids[token] = len(ids)
    if len(ids) + len(free) != rows:  # the vocabulary is wrong: an id occurs twice or is not a row
        return []
    nameless = {f"<row {i}>": i for i in sorted(free)}
    ids |= nameless
    return [*nameless]


def choose_blank(path: Path, ids: Mapping, stated: str | None, values: Mapping, notes: list[str]) -> str | None:
    """Choose the CTC blank: the tokenizer's pad_token, ``<pad>`` or ``[PAD]``, or pad_token_id of config.json."""
    named = values.get("pad_token_id")
    by_id = next((token for token, id_ in ids.items() if type(named) is int and id_ == named), None)
    blank = next((token for token in (stated, *BLANKS, by_id) if token in ids), None)
    if stated is not None and blank != stated:
        notes.append(f"pad_token is {stated!r}, which the vocabulary lacks: the blank is {blank!r}")
    if blank is not None and type(named) is int and ids[blank] != named:
        notes.append(
            f"the CTC blank is {blank!r}, row {brief_repr(ids[blank], 40)}, as the tokenizer says; pad_token_id "
            f"in config.json is {brief_repr(named, 40)}"
        )
    return blank


# The usual names of special tokens.
SPECIAL_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def extra_tokens(path: Path, settings: Mapping, added: Iterable[tuple[Any, Any, bool]]) -> list[str | None]:
    """Return the other special tokens: those in the lists of the settings, and those among the added tokens."""
    lists = (settings.get(name) for name in ("additional_special_tokens", "extra_special_tokens"))
    tokens = [token for tokens in lists if isinstance(tokens, list) for token in tokens]
    return [token_text(path, "a special token", token) for token in tokens] + [t for t, _, s in added if s]


def text_style(path: Path, settings: Mapping, orthography: str) -> dict[str, Any]:
    """Return how a tokenizer writes text, as arguments of `Vocabulary`: delimiter, case and separator."""
    delimiter = token_text(path, "word_delimiter_token", settings.get("word_delimiter_token", "|")) or " "
    lower_case, separator = settings.get("do_lower_case", False), settings.get("replace_word_delimiter_char", " ")
    expect(isinstance(lower_case, bool), f"{path}: do_lower_case", lower_case, "true or false", 80)
    short = isinstance(separator, str) and len(separator) <= 16
    expect(short, f"{path}: replace_word_delimiter_char", separator, "some characters", 80)
    if ORTHOGRAPHIES[orthography].word_delimiter != "|":
        delimiter = ORTHOGRAPHIES[orthography].word_delimiter
    return {"word_delimiter": delimiter, "lower_case": lower_case, "separator": separator}


def read_vocabulary(
    folder: Path,
    orthography: str,
    *,
    rows: int | None = None,
    values: Mapping | None = None,
    notes: list[str] | None = None,
) -> Vocabulary | None:
    """Read the symbols of a folder's CTC head with ``rows`` outputs; None if no file has any.

    A special word delimiter of the orthography replaces that of the folder. ``values`` is config.json; assumptions
    are added to ``notes``.
    """
    notes = notes if notes is not None else []
    settings = tokenizer_settings(folder)
    ids = base_ids(folder, settings)
    if ids is None:
        return None
    path = folder / "tokenizer_config.json"
    special = {name: token_text(path, name, settings.get(name, usual)) for name, usual in SPECIAL_NAMES.items()}
    style = text_style(path, settings, orthography)
    delimiter, added = style["word_delimiter"], added_tokens(folder, settings)
    add_tokens(ids, added, rows)
    if nameless := name_free_rows(ids, [*special.values(), delimiter], rows):
        notes.append(
            f"the CTC head has {rows} rows, {len(nameless)} of them without a symbol in any file: they are read "
            "as nothing"
        )
    stated = special["pad_token"] if "pad_token" in settings else None
    blank = choose_blank(path, ids, stated, values or {}, notes)
    if not settings:
        notes.append(
            "there is neither tokenizer_config.json nor special_tokens_map.json: the word delimiter is assumed to "
            f"be {delimiter!r}, the CTC blank {blank!r}"
        )
    elif delimiter not in ids:
        notes.append(f"the word delimiter {brief_repr(delimiter, 40)} is not in the vocabulary: words are joined")
    tokens = [*special.values(), *extra_tokens(path, settings, added), *nameless]
    specials = [token for token in tokens if token is not None]
    try:
        return Vocabulary(ids, blank=blank, unknown=special["unk_token"], specials=specials, **style)
    except TextError as error:
        raise TextError(f"{folder / 'vocab.json'}: not a vocabulary: {error}") from error


# ----------------------------------------------------------------------------------------- whole folders


def head_config(labels: Labels, reads: Mapping[str, Any]) -> HeadsConfig:
    """Return the configuration of heads for these labels; ``reads`` are its settings except sizes."""
    usual: dict[str, Any] = {field: labels.sizes.get(head, 0) for head, field in SIZES.items()}
    others = {head: size for head, size in labels.sizes.items() if head not in SIZES}
    return HeadsConfig(**usual, others=others, **reads)


def read_own_vocabulary(folder: Path, own: FolderSettings, files: pretrained.TensorFiles, values: Mapping) -> None:
    """Read the symbols of a folder's CTC head into its settings.

    Raises:
        ModelFolderError: there are more or fewer symbols than the head has rows.
    """
    rows = rows_of(files, "lm_head")
    vocabulary = read_vocabulary(folder, own.orthography, rows=rows, values=values, notes=own.notes)
    own.vocabulary = vocabulary
    if vocabulary is not None and rows not in (None, len(vocabulary)):
        raise ModelFolderError(
            f"{folder}: vocab.json and what completes it have {len(vocabulary)} symbols, the CTC head "
            f"(lm_head.weight) has {rows} rows: they do not belong together"
        )
    if "ser" not in values and vocabulary is not None and not vocabulary.case:
        own.orthography = "none"  # in foreign folders without a common case of letters, texts keep their case


def check_classifier(folder: Path, files: pretrained.TensorFiles) -> None:
    """Raise ModelFolderError for a classifier without the projector before it."""
    if classifier_form(files) == "linear" and "projector.weight" not in files.names:
        raise ModelFolderError(
            f"{folder}: has classifier.weight without projector.weight: no ForSequenceClassification, but a "
            "model that judges each frame perhaps, which is not supported"
        )


def heads_of(files: pretrained.TensorFiles) -> list[str]:
    """Return the names of the heads for which a folder has tensors."""
    there = {name.split(".")[0] for name in files.names}
    return [head for head, row in HEADS.items() if row.key in there]


def check_heads(folder: Path, heads: Collection[str], labels: Labels) -> None:
    """Raise ModelFolderError if there is no head, or the outputs of a head have no names."""
    if not heads:
        raise ModelFolderError(
            f"{folder}: holds an encoder without heads, which recognises nothing; "
            f"ser.load_encoder reads it, or train heads on it with --init {folder}"
        )
    for head in heads:
        if head not in labels.sizes:
            text = LABELS[head].kind == "text"
            advice = "put the files of its tokenizer there" if text else "`ser convert` makes a folder with them"
            where = WHERE_LABELS_STAND.get(head, f"ser.names of {head} in config.json")
            raise ModelFolderError(
                f"{folder}: has {HEADS[head].key} but no names for its classes ({where}); {advice}"
            )


def is_preset(init: str | Path) -> bool:
    """Tell whether ``init`` is a preset with random weights, such as "small", and not a folder of this name.

    Raises ConfigError if it is neither a preset, nor a path, nor a name on the hub.
    """
    if pretrained.exists(Path(init)) or "/" in str(init):
        return False
    try:
        Wav2Vec2Config.named(str(init))
    except ConfigError as error:
        raise ConfigError(f"{init}: there is no such model folder, and {error}") from None
    return True


def labels_of(init: str | Path, head: str) -> list[str]:
    """Return the names of a head's outputs in the folder ``init``, in their order; none for a preset."""
    if is_preset(init):
        return []
    folder = pretrained.find_folder(init)
    values = pretrained.read_json(folder, "config.json")
    return read_settings(folder, values, pretrained.TensorFiles(folder)).names.get(head, [])


def inherited_labels(init: str | Path, head: str, training: Iterable[str]) -> list[str]:
    """Return the names to train a head with: the folder's if these include all of ``training``, else the latter.

    With the folder's names, its head can be kept (`Recognizer.create`). Speakers must be the same, so that there
    is no class for a speaker who is not in training.
    """
    wanted, own = sorted(set(training)), labels_of(init, head)
    kept = set(wanted) == set(own) if head == "speaker" else set(wanted) <= set(own)
    return own if wanted and kept else wanted


def inherited_vocabulary(init: str | Path, orthography: str) -> Vocabulary | None:
    """Return the symbols of the folder ``init``, with the orthography's delimiter if it has a special one.

    None for a preset, and for a folder without symbols.
    """
    if is_preset(init):
        return None
    folder = pretrained.find_folder(init)
    rows = rows_of(pretrained.TensorFiles(folder), "lm_head")
    return read_vocabulary(folder, orthography, rows=rows, values=pretrained.read_json(folder, "config.json"))


# --------------------------------------------------------------------------------------------- writing


def classifier_of(heads: HeadsConfig) -> str | None:
    """Return the part that is written as the head of ForSequenceClassification: cls_head or dimension_head."""
    if heads.projection and heads.num_emotions and heads.emotion_head == "linear":
        return "cls_head"
    alone = heads.num_dimensions and not heads.num_emotions
    return "dimension_head" if heads.projection and alone and heads.dimension_head == "linear" else None


def class_of(model: MultiTaskModel) -> str:
    """Return the name of the class in `transformers` that loads most of a model."""
    heads = model.heads_config
    # What that class computes: transformers 5 sums layers without a pre-norm encoder's final norm.
    raw = not (heads.weighted_final_norm and model.config.do_stable_layer_norm)
    theirs = heads.layers == "last" or (heads.layers == "weighted" and raw)
    sequence = classifier_of(heads) and heads.pooling == "mean" and theirs
    task = "ForSequenceClassification" if sequence else "ForCTC" if heads.vocab_size else "Model"
    return model.config.architecture.classes + task


def config_json(model: MultiTaskModel, labels: Labels) -> dict[str, Any]:
    """Return the content of config.json."""
    heads, classifier = model.heads_config, classifier_of(model.heads_config)
    config: dict[str, Any] = {
        "architectures": [class_of(model)],
        **model.config.to_dict(),
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "ctc_loss_reduction": "sum",
    }
    if names := labels.dimensions if classifier == "dimension_head" else labels.emotions:
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if labels.multi_label or classifier == "dimension_head":
        config["problem_type"] = "multi_label_classification" if labels.multi_label else "regression"
    if labels.vocabulary is not None:
        config |= {"vocab_size": len(labels.vocabulary), "pad_token_id": labels.vocabulary.blank}
    if heads.projection:
        config["classifier_proj_size"] = heads.projection
    config["use_weighted_layer_sum"] = heads.layers == "weighted"
    others = {head: names for head, names in labels.names.items() if head not in PLURALS}
    config["ser"] = {
        "format": FORMAT,
        **{name: value for name, value in heads.to_dict().items() if name in READS},
        "speakers": labels.speakers,
        "dimensions": labels.dimensions,
        **({"names": others} if others else {}),
        "orthography": labels.orthography,
        "tags": labels.tags,
    }
    return config


def tokenizer_json(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return the contents of tokenizer_config.json and special_tokens_map.json."""
    tokens, specials = vocabulary.tokens, vocabulary.specials
    special: dict[str, str | None] = {
        "pad_token": tokens[vocabulary.blank],
        "unk_token": None if vocabulary.unknown is None else tokens[vocabulary.unknown],
        "bos_token": "<s>" if "<s>" in tokens else None,
        "eos_token": "</s>" if "</s>" in tokens else None,
    }
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "do_lower_case": vocabulary.lower_case,
        **special,
        "word_delimiter_token": vocabulary.word_delimiter,
    }
    if vocabulary.separator != " ":
        tokenizer["replace_word_delimiter_char"] = vocabulary.separator
    if others := [t for t in tokens if t in specials - SPECIALS and t not in special.values()]:
        tokenizer["additional_special_tokens"] = others
    return tokenizer, special


def written_keys(model: MultiTaskModel) -> dict[str, str]:
    """Return the names of a model's tensors -> their keys in ``model.safetensors``."""
    return pretrained.written_names(model.state_dict(), model.config, classifier=classifier_of(model.heads_config))


def is_replaced(folder: Path) -> bool:
    """Tell whether writing a model folder to ``folder`` replaces one; False for nothing and for an empty folder.

    Raises:
        ModelFolderError: something other than a model folder stands there.
    """
    if not pretrained.exists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        kind = pretrained.read_json(pretrained.check_folder(folder), "config.json").get("model_type")
    except ModelFolderError:
        kind = None
    if kind not in list(ARCHITECTURES):  # a list: what stands in the file may not be hashable
        raise ModelFolderError(f"{folder}: exists and is not a model folder; it is not replaced")
    return True


def write_model_files(folder: Path, model: MultiTaskModel, labels: Labels, tensors: Mapping[str, Tensor]) -> None:
    """Write the files of a model folder into an existing folder; ``tensors`` are named as the model's."""
    write_json(folder / "config.json", config_json(model, labels))
    extractor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": labels.do_normalize,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": model.config.feat_extract_norm == "layer",
    }
    write_json(folder / "preprocessor_config.json", extractor)
    if labels.vocabulary is not None:
        tokenizer, special = tokenizer_json(labels.vocabulary)
        write_json(folder / "vocab.json", {token: i for i, token in enumerate(labels.vocabulary.tokens)})
        write_json(folder / "tokenizer_config.json", tokenizer)
        write_json(folder / "special_tokens_map.json", special)
    keys = written_keys(model)
    write_tensors(folder / "model.safetensors", {keys[name]: tensor for name, tensor in tensors.items()})
