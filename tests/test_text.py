"""Text to CTC symbols and back: orthographies, tags, vocabulary files, greedy decoding."""

import copy
import json
import os
import pickle
import stat
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ser.data.dataset import SpeechDataset
from ser.data.labels import Labels
from ser.data.manifest import Utterance
from ser.data.text import MAX_VOCABULARY_BYTES, ORTHOGRAPHIES, Rewriting, Vocabulary, clean, minimum_frames
from ser.errors import ConfigError, TextError

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
quick = settings(max_examples=60, deadline=None, derandomize=True)
english = Vocabulary.librispeech()
words = st.lists(st.text("ABE'Z", min_size=1, max_size=5), max_size=5).map(" ".join)


def tiny(*tokens: str, word_delimiter: str = "|") -> Vocabulary:
    return Vocabulary({token: i for i, token in enumerate(tokens)}, word_delimiter=word_delimiter)


# ---------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("orthography", "text", "expected"),
    [
        ("librispeech", "It’s  a\tcafé-bar, straße.", "IT'S A CAFÉ-BAR, STRASSE."),
        ("librispeech", "‘Hello’", "'HELLO'"),
        ("timit", "The Quarter-century -- OLD", "the quarter century old"),
        ("buckwalter", "sil waraj~aHa - Alt~aqoriyru ^um~a sil >an silo", "waraj~aHa Alt~aqoriyru vum~a >an silo"),
        ("none", " As is-It  was… ", "As is-It was…"),
    ],
)
def test_each_orthography_spells_its_way(orthography, text, expected):
    assert clean(text, orthography=orthography) == expected


@pytest.mark.parametrize("orthography", ORTHOGRAPHIES)
@quick
@given(st.text())
def test_cleaned_text_is_nfc_with_single_spaces_and_clean_already(orthography, text):
    once = clean(text, orthography=orthography)
    assert once == unicodedata.normalize("NFC", once) == " ".join(once.split())
    spelling = ORTHOGRAPHIES[orthography]
    assert spelling.clean(once) == once


def test_decomposed_letters_are_the_composed_ones():
    assert clean("Cafe\u0301") == "CAF\u00c9" == clean("Caf\u00e9")
    assert english.unknown_characters(["e\u0301"]) == Counter("é")
    assert clean("\u0390") == "\u03aa\u0301"  # whose upper case comes in three parts


@pytest.mark.parametrize("tag", ["[LAUGHTER]", "{LG}", "<LG>", "[[LG] x]", "{a [b} c]", "[]", "{[<LG>]}"])
def test_a_tag_is_removed_with_its_letters(tag):
    assert clean(f"yes {tag} no{tag}so {tag}") == "YES NO SO"


@pytest.mark.parametrize("bracket", "[]{}<>")
def test_an_unbalanced_bracket_swallows_nothing(bracket):
    text = f"well {bracket} i do"
    assert clean(text) == text.upper()
    assert english.encode(clean(text)) == english.encode("WELL I DO")


def test_a_tag_inside_an_open_bracket_is_removed_alone():
    assert clean("[one [LG] two") == "[ONE TWO"
    assert clean("one [LG] two]") == "ONE TWO]"


def test_many_open_brackets_take_linear_time():
    deep = "[" * 100_000 + "x" + "]" * 100_000
    assert clean(f"a {deep} b") == "A B"
    assert clean("[" * 100_000) == "[" * 100_000


def test_keep_letters_gives_the_symbols_of_the_papers_cleaner():
    text = "YES {LG} [BREATHING] <NS> NO{BR}"
    in_vocabulary = "".join(c for c in text if c in " |'ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert clean(text, tags="keep-letters") == in_vocabulary == "YES LG BREATHING NS NOBR"


def test_the_letters_of_buckwalter_are_no_brackets():
    text = "<ilaY >an qara>a {lkitAb waraja} [LG]"
    assert clean(text, orthography="buckwalter") == "<ilaY >an qara>a {lkitAb waraja}"
    assert clean(text, orthography="buckwalter", tags="keep-letters").endswith("waraja} LG")


@pytest.mark.parametrize("text", ["", "  ", "[LAUGHTER]", "{LG} <NS>"])
def test_an_utterance_without_text_is_no_error(text):
    assert clean(text) == ""
    assert english.encode(clean(text)) == []


def test_unknown_settings_fail_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'buckwalter'"):
        clean("x", orthography="Buckwalder")
    with pytest.raises(ConfigError, match="'remove' or 'keep-letters', not 'keep'"):
        clean("x", tags="keep")


# -------------------------------------------------------------------------------------- presenting


def test_buckwalter_is_shown_in_arabic_script():
    show = ORTHOGRAPHIES["buckwalter"].present
    # The first verse as corpus.quran.com spells it in both.
    verse = unicodedata.normalize("NFC", "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ")
    assert show("bisomi {ll~ahi {lr~aHoma`ni {lr~aHiymi") == verse
    assert show("'|>&<}A") == "ءآأؤإئا"
    assert show("v*$SDTZxgqp") == "ثذشصضطظخغقة"


def test_all_47_buckwalter_letters_stand_for_an_arabic_one():
    table = ORTHOGRAPHIES["buckwalter"].script
    assert len(table) == len(set(table.values())) == 47
    assert all(unicodedata.name(c).startswith("ARABIC") for c in table.values())
    names = {
        "A": "ALEF",
        "p": "TEH MARBUTA",
        "H": "HAH",
        "E": "AIN",
        "g": "GHAIN",
        "y": "YEH",
        "Y": "ALEF MAKSURA",
    }
    assert {k: unicodedata.name(table[k]).removeprefix("ARABIC LETTER ") for k in names} == names
    marks = {
        "a": "FATHA",
        "u": "DAMMA",
        "i": "KASRA",
        "~": "SHADDA",
        "o": "SUKUN",
        "_": "TATWEEL",
        "F": "FATHATAN",
    }
    assert {k: unicodedata.name(table[k]).removeprefix("ARABIC ") for k in marks} == marks


@pytest.mark.parametrize("orthography", ["librispeech", "timit", "none"])
def test_other_orthographies_are_shown_as_they_are(orthography):
    assert ORTHOGRAPHIES[orthography].present("it's A|b") == "it's A|b"


# -------------------------------------------------------------------------------------- vocabulary


def test_the_librispeech_vocabulary_is_the_checkpoints():
    file = SHARED / "hf-configs" / "facebook-wav2vec2-base-960h" / "vocab.json"
    if not file.exists():
        pytest.skip("the shared model configurations are not here")
    assert {token: i for i, token in enumerate(english.tokens)} == json.loads(file.read_text())
    assert Vocabulary.read(file) == english
    assert (len(english), english.blank, english.unknown, english.word_delimiter) == (32, 0, 3, "|")


def test_a_vocabulary_cannot_be_changed_and_survives_copies():
    with pytest.raises(AttributeError):
        english.blank = 1
    assert isinstance(english.tokens, tuple)
    for other in (pickle.loads(pickle.dumps(english)), copy.deepcopy(english)):
        assert other == english
        assert hash(other) == hash(english)
        assert other.encode("A B") == english.encode("A B")
    assert english != Vocabulary.build(["A"])


def test_a_built_vocabulary_has_the_specials_the_delimiter_and_the_sorted_letters():
    vocabulary = Vocabulary.build(["zähl ab", "Öl", "e\u0301|"])
    assert vocabulary.tokens == ("<pad>", "<s>", "</s>", "<unk>", "|", *"abhlzÖäé")
    arabic = Vocabulary.build(["b|/a"], word_delimiter="/")
    assert arabic.tokens[4:] == ("/", "a", "b", "|")
    assert arabic.encode("a b| ") == [5, 4, 6, 7]
    assert Vocabulary.build(["a\ud800b"]).tokens[5:] == ("a", "b")


@quick
@given(st.lists(st.text(max_size=8), max_size=5))
def test_a_built_vocabulary_knows_its_texts_and_survives_its_file(tmp_path_factory, texts):
    vocabulary = Vocabulary.build(texts)
    assert not vocabulary.unknown_characters(texts)
    for text in texts:
        expected = " ".join(unicodedata.normalize("NFC", text).replace("|", " ").split())
        assert "".join(vocabulary.tokens[i] for i in vocabulary.encode(text)) == expected.replace(" ", "|")
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    vocabulary.write(path)
    assert Vocabulary.read(path) == vocabulary


@pytest.mark.parametrize("delimiter", ["", " ", "ab", "\t"])
def test_a_delimiter_is_one_visible_character(delimiter):
    with pytest.raises(TextError, match="delimiter"):
        Vocabulary.build(["a"], word_delimiter=delimiter)


def test_a_written_vocabulary_has_the_mode_of_any_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text("old")
    os.link(path, tmp_path / "other")
    english.write(path)
    assert (tmp_path / "other").read_text() == "old"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "vocab.json"]


def test_a_vocabulary_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(TextError, match=r"missing/vocab\.json: cannot write the vocabulary: No such file"):
        english.write(tmp_path / "missing" / "vocab.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[1]", "object of token -> id, found list"),
        ("[" * 100_000, "not a vocabulary"),
        ('{"<pad>": 0, "a": 0}', "'<pad>' and 'a' have the same id 0"),
        ('{"<pad>": 0, "a": 2}', "the id of 'a' is 2, but 2 tokens have ids 0..1"),
        ('{"<pad>": 0, "a": -1}', "the id of 'a' is -1"),
        ('{"<pad>": 0, "a": 1.0}', "the id of 'a' is 1.0, expected an integer"),
        ('{"<pad>": 0, "a": true}', "the id of 'a' is True, expected an integer"),
        ('{"<pad>": 0, "a": "1"}', "the id of 'a' is '1', expected an integer"),
        ('{"<pad>": 0, "a": [[1]]}', "expected an integer"),
        ('{"<pad>": 0, "a": ' + "9" * 5000 + "}", "not a vocabulary"),
        ('{"<pad>": 0, "a": 1, "a": 2}', "'a' stands twice"),
        ('{"<pad>": 0, "": 1}', "token '' is not a non-empty string"),
        ('{"<pad>": 0, "\\ud800": 1}', "not valid Unicode"),
        ('{"a": 0, "b": 1}', "no '<pad>', which is the CTC blank"),
        ("{}", "no '<pad>'"),
        (b'{"<pad>": 0, "\xff": 1}', "utf-8"),
        (json.dumps({"<pad>": 0} | {str(i): i for i in range(1, 65_537)}), "65537 tokens, at most 65536"),
        (" " * (MAX_VOCABULARY_BYTES + 1), f"larger than {MAX_VOCABULARY_BYTES} bytes"),
    ],
)
def test_a_hostile_vocabulary_file_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError) as caught:
        Vocabulary.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TextError, match="not a regular file"):
        Vocabulary.read(tmp_path / "fifo")
    with pytest.raises(TextError, match="not a regular file"):
        Vocabulary.read(tmp_path)
    with pytest.raises(TextError, match="No such file"):
        Vocabulary.read(tmp_path / "missing")
    with pytest.raises(TextError, match="null"):
        Vocabulary.read("a\0b")


def test_the_largest_vocabulary_survives_its_file(tmp_path):
    largest = Vocabulary.build([chr(c) for c in range(0xF0000, 0xF0000 + 65_536 - 5)])
    assert len(largest) == 65_536
    largest.write(tmp_path / "vocab.json")
    assert Vocabulary.read(tmp_path / "vocab.json") == largest
    with pytest.raises(TextError, match="65537 tokens"):
        Vocabulary.build([*largest.tokens[5:], "a"])


# ---------------------------------------------------------------------------------------- encoding


def test_encoding_collapses_spaces_also_around_removed_characters():
    assert english.encode("  A   -  B. ") == [english.tokens.index(t) for t in "A|B"]
    assert english.encode("...") == []


def test_the_delimiter_in_a_text_counts_as_a_space():
    assert english.encode("A|B || C|") == english.encode("A B C")


@quick
@given(st.lists(st.sampled_from([*english.tokens, " ", "é", "[PAD]", "a", "\n"])).map("".join))
def test_specials_are_never_produced(text):
    assert not {0, 1, 2, 3} & set(english.encode(text))


def test_specials_of_one_vocabulary_written_in_a_text_are_their_letters():
    vocabulary = Vocabulary.build(["<pad> s unk"])
    encoded = [vocabulary.tokens[i] for i in vocabulary.encode("<s> <pad>")]
    assert encoded == list("<s>|<pad>")


def test_unknown_characters_are_exactly_those_that_encoding_leaves_out():
    texts = ["GRÜẞE, AUS KÖLN!", "Ü  -"]
    assert english.unknown_characters(texts) == Counter({"Ü": 2, "ẞ": 1, ",": 1, "Ö": 1, "!": 1, "-": 1})
    for text in texts:
        kept = "".join(c for c in text if c not in english.unknown_characters(texts))
        assert english.encode(text) == english.encode(kept)


def test_several_words_need_the_delimiter_in_the_vocabulary():
    vocabulary = tiny("<pad>", "a", "b")
    assert vocabulary.encode(" ab ") == [1, 2]
    with pytest.raises(TextError, match=r"delimiter '\|' is not in the vocabulary of 3 symbols.*'a b'"):
        vocabulary.encode("a b")


def test_decomposed_tokens_of_a_foreign_vocabulary_are_found():
    vocabulary = tiny("<pad>", "|", "e\u0301", "\u212b")
    assert vocabulary.encode("é Å") == [2, 1, 3]
    assert vocabulary.decode([2, 1, 3]) == "é Å"
    assert tiny("<pad>", "\u00e9", "e\u0301").encode("é") == [1]


def test_the_tutorials_names_of_the_specials_are_known():
    vocabulary = tiny("a", "|", "[UNK]", "[PAD]")
    assert (vocabulary.blank, vocabulary.unknown) == (3, 2)
    assert vocabulary.decode([3, 0, 3, 0, 2, 1]) == "aa"


def test_a_space_can_be_the_delimiter_of_a_foreign_vocabulary():
    vocabulary = tiny("<pad>", "a", " ", word_delimiter=" ")
    assert vocabulary.encode("a a") == [1, 2, 1]
    assert vocabulary.decode([1, 0, 2, 1]) == "a a"


# ---------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ("", ""),
        ("____", ""),
        ("AAA", "A"),
        ("A_A", "AA"),
        ("__AA_AB||_B__", "AAB B"),
        ("||A|_|B||", "A B"),
        ("E|'|E", "E ' E"),
    ],
)
def test_decoding_merges_repeats_then_drops_blanks(frames, text):
    ids = [0 if c == "_" else english.tokens.index(c) for c in frames]
    assert english.decode(ids) == english.decode(torch.tensor(ids, dtype=torch.long)) == text


def test_decoding_drops_specials_after_merging():
    a, start, end, unknown = (english.tokens.index(t) for t in ("A", "<s>", "</s>", "<unk>"))
    assert english.decode([start, a, unknown, a, end, a, a]) == "AAA"


def test_tokens_of_several_characters_are_decoded_but_not_encoded():
    vocabulary = tiny("<pad>", "|", "sch", "s")
    assert vocabulary.decode([2, 1, 3]) == "sch s"
    assert vocabulary.encode("sch") == [3]


@pytest.mark.parametrize("symbol", [-1, 32])
def test_a_symbol_outside_the_vocabulary_is_refused(symbol):
    with pytest.raises(TextError, match=rf"symbol {symbol} is outside the vocabulary 0\.\.31"):
        english.decode([5, symbol])


@quick
@given(words, st.lists(st.integers(1, 3), min_size=40, max_size=40))
def test_decoding_an_alignment_of_a_text_gives_the_text(text, durations):
    frames: list[int] = []
    for symbol, duration in zip(english.encode(text), durations, strict=False):
        frames += [0] * (bool(frames) and frames[-1] == symbol) + [symbol] * duration
    assert english.decode(frames) == text


@quick
@given(st.lists(st.integers(0, 31).filter(lambda i: i not in (1, 2, 3)), max_size=30))
def test_decoding_equals_the_reference_tokenizers_but_for_empty_words(tmp_path_factory, ids):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.getbasetemp() / "reference-vocab.json"
    if not path.exists():
        english.write(path)
    theirs = transformers.Wav2Vec2CTCTokenizer(path)
    assert english.decode(ids) == " ".join(theirs.decode(ids, clean_up_tokenization_spaces=False).split())


@quick
@given(words)
def test_encoding_equals_the_reference_tokenizers(tmp_path_factory, text):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.getbasetemp() / "reference-vocab.json"
    if not path.exists():
        english.write(path)
    assert english.encode(text) == transformers.Wav2Vec2CTCTokenizer(path)(text).input_ids


@pytest.mark.parametrize(
    ("targets", "frames"), [([], 0), ([5], 1), ([5, 5], 3), ([5, 6, 5], 3), ([5, 5, 5, 6, 6], 8)]
)
def test_minimum_frames_counts_a_blank_between_equal_neighbours(targets, frames):
    assert minimum_frames(targets) == minimum_frames(torch.tensor(targets)) == frames


@quick
@given(st.lists(st.integers(1, 2), min_size=1, max_size=5))
def test_ctc_loss_is_finite_from_minimum_frames_on_and_not_before(targets):
    def loss(frames: int) -> float:
        scores = torch.zeros(frames, 1, 3).log_softmax(-1)
        lengths = (torch.tensor([frames]), torch.tensor([len(targets)]))
        return torch.nn.functional.ctc_loss(scores, torch.tensor([targets]), *lengths, reduction="sum").item()

    fewest = minimum_frames(targets)
    assert loss(fewest) < float("inf")
    assert fewest == 1 or loss(fewest - 1) == float("inf")


def test_real_transcripts_are_in_the_librispeech_vocabulary():
    metadata = SHARED / "corpora" / "librispeech-test-other-100" / "trans.txt"
    if not metadata.exists():
        pytest.skip("the shared recordings are not here")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    texts = [line.split(maxsplit=1)[1] for line in lines if line.strip()]
    assert len(texts) == 100
    assert not english.unknown_characters(map(clean, texts))
    for text in texts:
        assert "".join(english.tokens[i] for i in english.encode(clean(text))) == text.replace(" ", "|")


# ------------------------------------------------------------------ as a vocabulary can write it


LOWER = "abcdefghijklmnopqrstuvwxyz'"
GERMAN = LOWER + "äöüß"


def symbols(letters: str, **options) -> Vocabulary:
    return tiny("<pad>", "|", *letters, **options)


def written(text: str, letters: str, **options) -> str:
    """The reference that this text becomes."""
    dataset = SpeechDataset([Utterance("a", Path("a"), text=text)], Labels(vocabulary=symbols(letters), **options))
    return dataset.references[0]


def changes(letters: str, *texts: str, **options) -> dict:
    """What was changed in texts for these letters, as a report has it."""
    rows = [Utterance(str(i), Path("a"), text=text) for i, text in enumerate(texts)]
    return SpeechDataset(rows, Labels(vocabulary=symbols(letters), **options)).rewriting().to_dict()


@pytest.mark.parametrize(
    ("letters", "case"),
    [
        (LOWER, "lower"), (LOWER.upper(), "upper"), (LOWER + "A", ""), ("你好1-'", ""), (GERMAN, "lower"),
        (LOWER.upper() + "ß", "upper"), ("абвг", "lower"), ("ΑΒΓ", "upper"), ("აბგ", "lower"), ("اب", ""),
        ("ªa", "lower"), ("º1A", "upper"),
    ],
)  # fmt: skip
def test_a_vocabulary_knows_the_case_of_its_letters(letters, case):
    assert symbols(letters).case == case


@pytest.mark.parametrize(
    ("text", "letters", "expected"),
    [
        ("Hello, IT'S me [LAUGHTER]", LOWER, "hello it's me"),
        ("Hello, it's me", LOWER.upper(), "HELLO IT'S ME"),
        ("Straße, ÜBER Öl", GERMAN, "straße über öl"),  # not by way of capitals, which are STRASSE
        ("Straße", LOWER, "strasse"),
        ("Straße", LOWER.upper(), "STRASSE"),
        ("Straße", LOWER.upper() + "ẞ", "STRASSE"),  # as models of the orthography were trained
        ("über", LOWER, "ber"),
        ("Привет, мир", "абвгдеийклмнопрстуфх", "привет мир"),
        ("ΟΔΟΣ", "αβγδοσς", "οδος"),  # with the final sigma
        ("გამარჯობა", "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ", "გამარჯობა"),  # whose capitals nobody writes
        ("Iğdır İyi", "abdgıiryğ", "ığdır iyi"),
        ("I İ", "ıi\u0307", "i i\u0307"),  # a vocabulary of what Python makes of them
        ("İstanbul", LOWER, "istanbul"),
        ("it\u2019s it\u02bcs", LOWER, "it's it's"),
        ("it's", LOWER.replace("'", "\u2019"), "it\u2019s"),
        ("well\u2011known", LOWER + "-", "well-known"),
        ("ﬁne １ …", LOWER + "1", "fine 1"),
        ("cafe\u0301", LOWER + "é", "café"),
        ("take 7 chairs", LOWER, "take chairs"),
        ("2024", LOWER, ""),
    ],
)  # fmt: skip
def test_a_reference_is_what_the_vocabulary_can_write(text, letters, expected):
    assert written(text, letters) == expected


def test_letters_of_both_cases_are_in_that_of_the_orthography():
    both = LOWER + LOWER[:26].upper()
    assert written("Hello", both) == "HELLO" and written("Hello", both, orthography="none") == "Hello"
    assert written("Hello", LOWER, orthography="none") == "hello"
    assert written("Straße", LOWER.upper() + "ß", orthography="none") == "STRAßE"


def test_buckwalter_s_letters_are_never_changed():
    present = ORTHOGRAPHIES["buckwalter"].present
    assert written("A`b", "abA'", orthography="buckwalter") == present("Ab")
    assert changes("Ab'", "A`b", orthography="buckwalter") == {"characters_outside_vocabulary": {"`": 1}}
    assert written("Ab", "b", orthography="buckwalter") == present("b")


def test_every_change_of_a_reference_is_counted_and_said():
    found = changes(LOWER, "Take 7 chairs in 2024", "2024", "it\u2019s", "[LAUGHTER]", "take it", "schön")
    assert found == {
        "references_recased": {"lower": 4},
        "characters_outside_vocabulary": {"2": 4, "0": 2, "4": 2, "7": 1, "ö": 1},
        "references_left_empty": 1,
    }
    assert changes(LOWER.upper(), "take it") == {}, "what the orthography does is no change"
    assert changes(LOWER, "it\u2010s", orthography="none") == {"characters_outside_vocabulary": {"\u2010": 1}}
    assert changes(LOWER + "-", "a\u2010b", orthography="none") == {"characters_replaced": {"\u2010": 1}}
    notes = SpeechDataset(
        [Utterance("a", Path("a"), text="Ö 7 ab"), Utterance("b", Path("a"), text="7")],
        Labels(vocabulary=symbols(LOWER)),
    ).rewriting()
    shown = "\n".join(notes.notes())
    for piece in ("lower-case letters alone: 1 texts", "removed: '7' x2, 'ö' x1", "1 texts have no character"):
        assert piece in shown


def test_without_a_word_delimiter_the_spaces_are_left_out_and_counted():
    vocabulary = tiny("<pad>", *"你好世界")
    rows = [Utterance("a", Path("a"), text="你好 世界"), Utterance("b", Path("b"), text="你好")]
    dataset = SpeechDataset(rows, Labels(vocabulary=vocabulary))
    assert dataset.references == ["你好世界", "你好"]
    assert dataset.rewriting().to_dict() == {"characters_outside_vocabulary": {" ": 1}}


def test_changes_of_parts_sum_to_those_of_all():
    texts = ["Take 7", "2024", "it\u02bcs", "ß", "", "a"]
    rows = [Utterance(str(i), Path("a"), text=text) for i, text in enumerate(texts)]
    total = Rewriting()
    for part in (rows[:2], rows[2:]):
        total += SpeechDataset(part, Labels(vocabulary=symbols(LOWER))).rewriting()
    whole = SpeechDataset(rows, Labels(vocabulary=symbols(LOWER)))
    assert total == whole.rewriting() and total.emptied == 1
    assert Rewriting.of(json.loads(json.dumps(total.to_dict()))) == total and not Rewriting.of({}).notes()
    assert whole.rewriting(without={0, 1}).removed == Counter()
