"""What folders of `transformers`, releases 3 to 5, say of text and sound is read as that library reads it."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

import ser
from ser.convert.convert import convert
from ser.data.text import SPECIALS
from ser.errors import SerError
from ser.folder import inherited_vocabulary, read_do_normalize, read_vocabulary
from ser.recognizer import Recognizer

LETTERS = "abcdefghij"
USUAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4} | {c: 5 + i for i, c in enumerate(LETTERS)}
XLSR = {c: i for i, c in enumerate(LETTERS + "|")} | {"[UNK]": 11, "[PAD]": 12}
XLSR_NAMES = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
UPPER = {c.upper(): i for c, i in USUAL.items() if len(c) == 1} | {c: i for c, i in USUAL.items() if len(c) > 1}
BARE = {c: i for i, c in enumerate("_|" + LETTERS)} | {"?": 12}


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def as_release_4(folder):
    """The files in which release 4 (to 4.33) kept what release 5 puts into tokenizer_config.json."""
    values = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    added = {t["content"]: int(i) for i, t in values.pop("added_tokens_decoder").items()}
    write(folder, "added_tokens.json", {t: i for t, i in added.items() if t not in vocabulary})
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    write(folder, "special_tokens_map.json", {name: values.pop(name, None) for name in names})
    write(folder, "tokenizer_config.json", values)


def expected_text(tokenizer, ids):
    """As its decode gives it, without special tokens, which it shows and ser does not."""
    text = tokenizer.decode(ids)
    for special in sorted({*SPECIALS, *tokenizer.all_special_tokens} - {tokenizer.word_delimiter_token}, key=len):
        text = text.replace(special.lower() if tokenizer.do_lower_case else special, "")
    return " ".join(text.split())


CASES = {
    "usual": (USUAL, {}),
    "the XLSR tutorial's": (XLSR, XLSR_NAMES),
    "another delimiter": (USUAL | {"▁": 15}, {"word_delimiter_token": "▁"}),
    "a space as the delimiter": (
        {(" " if t == "|" else t): i for t, i in USUAL.items()},
        {"word_delimiter_token": " "},
    ),
    "a delimiter that is shown as nothing": (USUAL, {"replace_word_delimiter_char": ""}),
    "a delimiter that is shown as a hyphen": (USUAL, {"replace_word_delimiter_char": "-"}),
    "shown in lower case": (UPPER, {"do_lower_case": True}),
    "single characters as special tokens": (BARE, {"pad_token": "_", "unk_token": "?"}),
    "no names for begin and end": (XLSR, {**XLSR_NAMES, "bos_token": None, "eos_token": None}),
    "special tokens of its own": (
        USUAL | {"[BOS]": 15, "[LAUGH]": 16},
        {"bos_token": "[BOS]", "extra_special_tokens": ["[LAUGH]"]},
    ),
    "two letters in one symbol": (USUAL | {"ch": 15}, {}),
}


@pytest.mark.parametrize("release", [5, 4])
@pytest.mark.parametrize("case", CASES)
def test_symbols_are_decoded_as_the_tokenizer_decodes_them(tmp_path, case, release):
    vocabulary, settings = CASES[case]
    if case == "special tokens of its own" and release == 4:
        settings = {"bos_token": "[BOS]", "additional_special_tokens": ["[LAUGH]"]}
    write(tmp_path, "vocab.json", vocabulary)
    theirs = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **settings)
    theirs.save_pretrained(tmp_path)
    if release == 4:
        as_release_4(tmp_path)
    ours = read_vocabulary(tmp_path, "librispeech", rows=len(theirs), values={})
    assert len(ours) == len(theirs), (ours.tokens, theirs.get_vocab())
    assert {token: i for i, token in enumerate(ours.tokens)} == theirs.get_vocab()
    assert ours.blank == theirs.pad_token_id
    draw = random.Random(case)
    for _ in range(20):
        ids = [draw.randrange(len(ours)) for _ in range(60)]
        assert ours.decode(ids) == expected_text(theirs, ids)


def test_special_tokens_that_no_file_has_take_the_rows_that_the_tokenizer_gives_them(tmp_path):
    write(tmp_path, "vocab.json", XLSR)
    write(tmp_path, "tokenizer_config.json", XLSR_NAMES)
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    ours = read_vocabulary(tmp_path, "librispeech", rows=15, values={})
    assert {token: i for i, token in enumerate(ours.tokens)} == theirs.get_vocab()
    # and none where the head has no row for them
    assert len(read_vocabulary(tmp_path, "librispeech", rows=13, values={})) == 13


def test_a_delimiter_that_no_file_has_takes_the_row_that_the_tokenizer_gives_it(tmp_path):
    phonemes = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "aa", "ae", "ah"])}
    write(tmp_path, "vocab.json", phonemes)
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    ours = read_vocabulary(tmp_path, "librispeech", rows=len(theirs), values={})
    assert {token: i for i, token in enumerate(ours.tokens)} == theirs.get_vocab()
    assert ours.decode([4, 7, 5]) == expected_text(theirs, [4, 7, 5])


@pytest.mark.parametrize("gap", [False, True])
def test_rows_of_the_head_that_no_file_names_are_read_as_nothing(styles, randomise, tmp_path, caplog, gap):
    """As of the first tutorial, whose head has the default 32 rows for an alphabet of any size."""
    folder = tmp_path / "m"
    xlsr_folder(folder, randomise, styles["large-style"], rows=21)
    if gap:
        write(folder, "vocab.json", {t: i for t, i in XLSR.items() if t not in "bc"})
        write(folder, "tokenizer_config.json", XLSR_NAMES)  # the row that is next for <s> is [UNK]'s
        (folder / "added_tokens.json").unlink()
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    recognizer = ser.load(folder)
    assert "21 rows" in caplog.text and "without a symbol in any file" in caplog.text
    assert len(recognizer.vocabulary) == 21 and recognizer.vocabulary.blank == 12
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(21) for _ in range(60)]
        assert recognizer.vocabulary.decode(ids) == expected_text(tokenizer, ids)
    caplog.clear()
    recognizer.save(tmp_path / "ours")
    again = ser.load(tmp_path / "ours")
    assert again.vocabulary == recognizer.vocabulary
    assert again.vocabulary.decode(ids) == expected_text(tokenizer, ids)
    assert len(Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "ours")) == 21 and not caplog.text


def test_more_symbols_than_rows_are_refused_by_name(styles, randomise, tmp_path):
    xlsr_folder(tmp_path / "m", randomise, styles["large-style"], rows=12)
    with pytest.raises(SerError, match=r"vocab\.json .* have 13 symbols, the CTC head .* has 12 rows"):
        ser.load(tmp_path / "m")


def test_tokens_beyond_the_head_s_rows_are_left(tmp_path):
    write(tmp_path, "vocab.json", XLSR)
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **XLSR_NAMES).save_pretrained(tmp_path)
    assert len(read_vocabulary(tmp_path, "librispeech", rows=13, values={})) == 13
    assert len(read_vocabulary(tmp_path, "librispeech", rows=14, values={})) == 14


def test_a_vocabulary_by_language_is_that_of_the_target_language(tmp_path):
    nested = {"eng": USUAL, "deu": {t: i for i, t in enumerate([*USUAL, "ä", "ö"])}}
    write(tmp_path, "vocab.json", nested)
    write(tmp_path, "tokenizer_config.json", {"target_lang": "deu"})
    assert read_vocabulary(tmp_path, "librispeech", rows=17, values={}).tokens[-1] == "ö"
    for wrong in ({}, {"target_lang": "fra"}, {"target_lang": ["deu"]}):
        write(tmp_path, "tokenizer_config.json", wrong)
        with pytest.raises(SerError, match=r"vocab\.json: has 2 languages.*target_lang"):
            read_vocabulary(tmp_path, "librispeech", rows=17, values={})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"pad_token": "<s>", "added_tokens_decoder": {}}}, "<s>"),
        ({"tokenizer_config.json": {"pad_token": "<s>"}}, "<s>"),
        # as the library: the map counts, but not beside added_tokens_decoder
        ({"tokenizer_config.json": {"pad_token": "<s>"}, "special_tokens_map.json": {"pad_token": "a"}}, "a"),
        (
            {
                "tokenizer_config.json": {"pad_token": "<s>", "added_tokens_decoder": {}},
                "special_tokens_map.json": {"pad_token": "a"},
            },
            "<s>",
        ),
        ({"special_tokens_map.json": {"pad_token": {"content": "b", "lstrip": False}}}, "b"),
        ({}, "<pad>"),
    ],
)
def test_of_two_files_the_one_that_the_library_takes_names_the_blank(tmp_path, files, expected):
    write(tmp_path, "vocab.json", USUAL)
    for name, value in files.items():
        write(tmp_path, name, value)
    assert Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).pad_token == expected
    notes = []
    ours = read_vocabulary(tmp_path, "librispeech", rows=15, values={"pad_token_id": 0}, notes=notes)
    assert ours.tokens[ours.blank] == expected
    assert any("pad_token_id in config.json is 0" in note for note in notes) == (expected != "<pad>")
    assert any("neither tokenizer_config.json" in note for note in notes) == (not files)


def test_a_tokenizer_in_one_file_completes_or_is_the_vocabulary(tmp_path):
    tokens = {"added_tokens": [{"id": 13, "content": "<s>", "special": True}], "model": {"vocab": XLSR}}
    write(tmp_path, "tokenizer.json", tokens)
    write(tmp_path, "tokenizer_config.json", XLSR_NAMES)
    for _ in range(2):
        assert read_vocabulary(tmp_path, "librispeech", rows=14, values={}).tokens == (*XLSR, "<s>")
        write(tmp_path, "vocab.json", XLSR)


def xlsr_folder(folder, randomise, config, release=4, rows=None):
    """A ForCTC with 13 symbols in vocab.json and a head of 15 (or ``rows``), as the XLSR tutorial leaves it."""
    folder.mkdir()
    write(folder, "vocab.json", XLSR)
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **XLSR_NAMES)
    tokenizer.save_pretrained(folder)
    if release == 4:
        as_release_4(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    peer = transformers.Wav2Vec2ForCTC
    model = randomise(
        peer(peer.config_class(**config.to_dict(), vocab_size=rows or len(tokenizer), pad_token_id=12))
    )
    model.eval().save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("release", [5, 4])
def test_a_vocabulary_that_other_files_complete_is_read_when_loaded_trained_from_and_converted(
    styles, randomise, tmp_path, release
):
    model, tokenizer = xlsr_folder(tmp_path / "m", randomise, styles["large-style"], release)
    waveform = torch.randn(1, 7000, generator=torch.Generator().manual_seed(3))
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "m")(
        waveform[0].numpy(), sampling_rate=16000, return_tensors="pt"
    )
    with torch.no_grad():
        expected = expected_text(tokenizer, model(inputs.input_values).logits.argmax(-1)[0])
    assert expected and ser.load(tmp_path / "m").predict(waveform[0], 16000)[0].transcript == expected

    vocabulary = inherited_vocabulary(tmp_path / "m", "none")
    recognizer, report = Recognizer.create(tmp_path / "m", emotions=["a", "b"], vocabulary=vocabulary)
    assert torch.equal(recognizer.model.lm_head.weight, model.lm_head.weight)
    assert vocabulary.blank == 12 and len(vocabulary) == 15 and not report.notes
    recognizer.save(tmp_path / "ours")
    assert ser.load(tmp_path / "ours").predict(waveform[0], 16000)[0].transcript == expected

    weights = tmp_path / "m" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "m" / "pytorch_model.bin")
    weights.unlink()
    convert(tmp_path / "m", tmp_path / "converted")
    assert ser.load(tmp_path / "converted").predict(waveform[0], 16000)[0].transcript == expected


def test_an_orthography_with_a_delimiter_of_its_own_keeps_it(tmp_path):
    write(tmp_path, "vocab.json", USUAL | {"/": 15})
    assert read_vocabulary(tmp_path, "buckwalter").word_delimiter == "/"
    assert read_vocabulary(tmp_path, "timit").word_delimiter == "|"


# ----------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("normalize", [False, True])
def test_a_processor_of_release_5_says_how_sound_is_prepared(tmp_path, normalize):
    write(tmp_path, "vocab.json", USUAL)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    Wav2Vec2Processor(
        feature_extractor=extractor, tokenizer=Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    ).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists(), "as the release does"
    notes = []
    assert read_do_normalize(tmp_path, notes) is normalize and not notes
    # The older file beside it does not count, in both libraries, and that is said.
    write(tmp_path, "preprocessor_config.json", {"do_normalize": not normalize, "sampling_rate": 16000})
    theirs = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert read_do_normalize(tmp_path, notes) is theirs.do_normalize is normalize
    assert "feature_extractor in processor_config.json, which counts" in notes[0]


@pytest.mark.parametrize(
    ("files", "expected", "said"),
    [
        ({}, True, "neither processor_config.json nor preprocessor_config.json"),
        (
            {"processor_config.json": {"processor_class": "Wav2Vec2Processor"}},
            True,
            "do_normalize true is assumed",
        ),
        ({"preprocessor_config.json": {}}, True, "preprocessor_config.json lacks do_normalize: true"),
        ({"preprocessor_config.json": {"do_normalize": False}}, False, ""),
        ({"processor_config.json": {"audio_processor": {"do_normalize": False}}}, False, ""),
        ({"processor_config.json": {"feature_extractor": {"sampling_rate": 16000}}}, True, "lacks do_normalize"),
        (
            {
                "processor_config.json": {"processor_class": "Wav2Vec2Processor"},
                "preprocessor_config.json": {"do_normalize": False},
            },
            False,
            "",
        ),
        ({"tokenizer_config.json": {"do_normalize": False}}, False, ""),  # release 4.3
        (
            {
                "preprocessor_config.json": {"do_normalize": False},
                "tokenizer_config.json": {"do_normalize": True},
            },
            False,
            "do_normalize is false in preprocessor_config.json, which counts, and true in tokenizer_config.json",
        ),
    ],
)
def test_the_first_place_that_says_it_counts_and_an_assumption_is_said(tmp_path, files, expected, said):
    for name, value in files.items():
        write(tmp_path, name, value)
    notes = []
    assert read_do_normalize(tmp_path, notes) is expected
    assert [said in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize(
    ("file", "value", "expected"),
    [
        ("processor_config.json", {"feature_extractor": [1]}, "expected an object"),
        ("processor_config.json", {"feature_extractor": {"do_normalize": "no"}}, "do_normalize is 'no'"),
        ("processor_config.json", {"feature_extractor": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
        ("processor_config.json", [], "expected an object"),
        ("tokenizer_config.json", {"word_delimiter_token": 3}, "word_delimiter_token is 3; expected a token"),
        ("tokenizer_config.json", {"pad_token": {"content": []}}, "pad_token is"),
        ("tokenizer_config.json", {"do_lower_case": "yes"}, "do_lower_case is 'yes'"),
        ("tokenizer_config.json", {"replace_word_delimiter_char": "x" * 99}, "replace_word_delimiter_char"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 9999: "a"}}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"15": 3}}, "expected a token"),
        ("added_tokens.json", {"<x>": "15"}, "expected an integer"),
        ("added_tokens.json", {"\ud800": 15}, "not valid Unicode"),
        ("added_tokens.json", [], "expected an object"),
        ("tokenizer.json", {"added_tokens": {"id": 1}}, "added_tokens is"),
        ("tokenizer.json", {"added_tokens": [{"id": [], "content": "x"}]}, "expected an integer"),
        ("vocab.json", {"a": {}, "b": 1}, "expected an integer"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path, file, value, expected):
    write(tmp_path, "vocab.json", USUAL)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(SerError, match=expected) as caught:
        read_do_normalize(tmp_path, [])
        read_vocabulary(tmp_path, "librispeech", values={})
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000
